"""The form of a chapter. What a chapter finds is checked by nbval and tests/test_results.py."""

import ast
import re
import statistics

import nbformat
import pytest

from saelib.profile import ROOT

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
MACHINE = re.compile(r"(?<![\w.])/(home|Users|root|tmp|work|mnt|var)/|[A-Z]:\\\\|file://")


def cells(path, kind="code"):
    found = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]
    return [cell for cell in found if cell.source.strip()]


def lines(cell):
    return len(cell.source.splitlines())


def test_there_are_chapters_and_nothing_else():
    assert PATHS
    assert all(re.fullmatch(r"\d\d_[a-z0-9]+(_[a-z0-9]+)?\.ipynb", path.name) for path in PATHS)


@each
def test_every_cell_was_run_in_order_and_without_an_error(path):
    """nbval silently leaves out cells without an execution count."""
    code = cells(path)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]


@each
def test_it_opens_with_imports_and_parameters(path):
    imports, parameters = cells(path)[:2]
    assert isinstance(ast.parse(imports.source).body[0], ast.Import | ast.ImportFrom)
    assert [cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", [])] == [parameters]
    assignments = ast.parse(parameters.source).body
    assert all(isinstance(a, ast.Assign) and isinstance(a.value, ast.Constant | ast.UnaryOp) for a in assignments)
    assert len(assignments) <= 6
    assert ast.unparse(assignments[0]) == "profile = 'docstring-gpt'"


@each
def test_it_is_thin(path):
    code = cells(path)
    assert 12 <= len(code) <= 28
    assert max(map(lines, code)) <= 25
    assert statistics.median(map(lines, code)) <= 6
    nodes = [node for cell in code for node in ast.walk(ast.parse(cell.source))]
    assert not [node.name for node in nodes if isinstance(node, ast.ClassDef)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [f.name for f in functions if f.end_lineno - f.lineno >= 5]


@each
def test_it_holds_nothing_of_the_machine_that_ran_it(path):
    notebook = nbformat.read(path, as_version=4)
    for part in (notebook, *notebook.cells):
        assert not {"papermill", "execution"} & part.metadata.keys()
    texts = [cell.source for cell in notebook.cells]
    texts += [
        str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for c in cells(path) for o in c.outputs
    ]
    assert not [found[0] for text in texts if (found := MACHINE.search(text))]


@each
def test_no_backslash_was_lost(path):
    """`\\frac` typed into a Python string is a form feed and `rac`."""
    for cell in cells(path) + cells(path, "markdown"):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", cell.source), cell.source


@each
def test_it_asks_and_answers(path):
    """A title, the comparison, and what is left open."""
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    assert text.startswith("# ")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    for heading in ("Against the paper and the journal", "What this does not show", "Next"):
        assert heading in headings
