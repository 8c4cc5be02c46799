import contextlib
import io
import json
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from saelib import UserError, runner

PARAMETERS = 'profile = "docstring-gpt"\nseed = 0\nrate = 0.5\nword = "a"'


def write_chapter(path, *sources):
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell("# A question"), parameters, *(new_code_cell(source) for source in sources)]
    nbformat.write(new_notebook(cells=cells), path)


def output(path):
    """Standard output of a notebook, as one text."""
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", "") for cell in cells for o in cell.get("outputs", []) if o.get("name") == "stdout")


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Chapters run in one go: one is fine, one fails, so no other is reached. (folder, out, lines, failure)"""
    folder, out = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("run") / "out"
    alien = tmp_path_factory.mktemp("jupyter") / "kernels" / "python3"  # another environment's kernel of the same name
    alien.mkdir(parents=True)
    (alien / "kernel.json").write_text('{"argv": ["false"], "display_name": "alien", "language": "python"}')
    write_chapter(
        folder / "01_good.ipynb",
        "import os, sys",
        "print(seed, rate, word, sys.executable, os.environ['SAELIB_RESULTS'], os.path.basename(os.getcwd()))",
        "print(os.environ['MPLBACKEND'])",
    )
    write_chapter(
        folder / "02_bad.ipynb", "print('so far')", "x = 1\nraise ValueError('no such luck\\nmore')", "print('never')"
    )
    write_chapter(
        folder / "03_mine.ipynb", "from saelib import UserError", "raise UserError('the text is empty: give another')"
    )
    write_chapter(folder / "04_dead.ipynb", "import os", "os._exit(1)")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "NOTEBOOKS", folder)
        patch.setenv("JUPYTER_PATH", str(alien.parent.parent))
        patch.setenv("MPLBACKEND", "Agg")
        with pytest.raises(runner.ChapterFailed) as failure, contextlib.redirect_stdout(said):
            runner.run(["all"], out=out)
        yield folder, out, said.getvalue().splitlines(), str(failure.value)


def states(out, pairs=()):
    return [item.state for item in runner.plan(["all"], "docstring-gpt", pairs, out)[0]]


def test_one_line_per_chapter_and_a_stop_at_the_first_failure(book):
    _, out, lines, _ = book
    assert [line.split()[:2] for line in lines] == [["01_good", "done"], ["02_bad", "failed"]]
    assert all(line.endswith(" s") for line in lines)
    assert sorted(path.name for path in out.iterdir()) == ["01_good.ipynb", "02_bad.ipynb"]
    assert states(out) == ["done", "failed", "not run", "not run"]


def test_the_kernel_is_this_python_in_the_notebooks_folder_with_its_own_results(book):
    folder, out, _, _ = book
    first, second, _ = output(out / "01_good.ipynb").split("\n")
    assert first == f"0 0.5 a {sys.executable} {out / 'results'} {folder.name}"
    assert second == "module://matplotlib_inline.backend_inline"


def test_an_executed_notebook_is_the_chapter_and_its_outputs(book):
    folder, out, _, _ = book
    for name in ("01_good.ipynb", "02_bad.ipynb"):
        source, executed = (nbformat.read(place / name, as_version=4) for place in (folder, out))
        assert [cell.source for cell in executed.cells] == [cell.source for cell in source.cells]
        assert str(out) not in json.dumps(executed.metadata)


def test_a_failure_names_cell_source_and_error_and_keeps_the_notebook(book):
    _, out, _, failure = book
    assert "02_bad: cell In [3] failed" in failure
    assert "    raise ValueError('no such luck" in failure
    assert "\nValueError: no such luck\n" in failure and "02_bad.ipynb" in failure
    assert output(out / "02_bad.ipynb") == "so far\n"


def test_a_users_mistake_inside_a_cell_is_one_line(book, capfd):
    _, out, _, _ = book
    with pytest.raises(UserError, match=r"^03_mine, cell In \[3\]: the text is empty: give another$"):
        runner.run(["3"], out=out)
    assert (out / "03_mine.ipynb").is_file() and states(out)[2] == "failed"
    shown = capfd.readouterr()
    assert shown.out.count("\n") == 1 and shown.err == ""  # nor do papermill and the kernel say anything


def test_a_dead_kernel_is_a_failure_not_a_traceback(book):
    _, out, _, _ = book
    with pytest.raises(runner.ChapterFailed, match="04_dead: the kernel died"):
        runner.run(["04_dead"], out=out)
    assert (out / "04_dead.ipynb").is_file() and not list(out.glob(".*"))


def test_what_is_done_is_not_run_again(book, monkeypatch, capsys):
    _, out, _, _ = book
    monkeypatch.setattr(runner, "_execute", lambda *arguments: pytest.fail("was run again"))
    runner.run(["01"], out=out)
    assert capsys.readouterr().out.split()[1:4] == ["up", "to", "date"]


def test_an_interrupted_run_is_not_done(book, tmp_path, monkeypatch):
    """Its numbers may be half of the old and half of the new ones."""
    runner.run(["01"], out=tmp_path)
    assert states(tmp_path)[0] == "done"
    monkeypatch.setattr(runner, "_execute", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        runner.run(["01"], out=tmp_path, force=True)
    assert states(tmp_path)[0] == "not run"


def test_only_what_goes_in_makes_a_chapter_stale(book, monkeypatch):
    folder, out, _, _ = book
    path = folder / "01_good.ipynb"
    before = path.read_bytes()
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="old")]
    nbformat.write(notebook, path)
    assert states(out)[0] == "done"
    notebook.cells[2].source += "\n"
    nbformat.write(notebook, path)
    assert states(out)[0] == "changed"
    path.write_bytes(before)
    assert states(out, ["seed=0"])[0] == "done"
    assert states(out, ["seed=1"])[0] == "changed"
    with monkeypatch.context() as patch:
        patch.setattr(runner, "versions", lambda: {"torch": "0.4"})
        assert states(out)[0] == "changed"


def test_numbers_that_another_run_has_overwritten_make_a_chapter_stale(book):
    _, out, *_ = book
    numbers = out / "results" / "01_good.json"
    numbers.parent.mkdir(exist_ok=True)
    numbers.write_text("{}")
    assert states(out)[0] == "changed"
    numbers.unlink()
    assert states(out)[0] == "done"


def test_a_changed_local_model_makes_chapters_stale(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"1")
    chosen = runner.load_profile("docstring-gpt")
    chosen = chosen.model_copy(update={"model": chosen.model.model_copy(update={"name": str(tmp_path / "model")})})
    before = runner.surroundings(chosen)
    (tmp_path / "model" / "weights").write_bytes(b"2")
    assert runner.surroundings(chosen) != before


def test_parameters_reach_the_notebook_with_its_types_and_replace_the_kept_run(book, tmp_path):
    runner.run(["01"], pairs=["seed=7", "rate=1e-3", "word=two words"], out=tmp_path)
    assert output(tmp_path / "01_good.ipynb").startswith("7 0.001 two words ")


def test_ones_own_profile_reaches_the_kernel_from_any_folder(book, tmp_path, monkeypatch):
    """The kernel runs in the notebooks' folder; the path is that of where the command was typed."""
    folder, *_ = book
    (tmp_path / "my.yml").write_text("extends: docstring-gpt\nname: mine\n")
    monkeypatch.chdir(tmp_path)
    given = runner.plan(["01"], "my.yml", out=tmp_path)[0][0].parameters["profile"]
    assert (folder / given).resolve() == tmp_path / "my.yml"


@pytest.mark.parametrize(
    ("names", "profile", "pairs", "message"),
    [
        (["07"], "docstring-gpt", [], "no chapter '07': choose from 01_good"),
        (["01", "good"], "docstring-gpt", [], "no chapter 'good'"),
        (["01"], "nope", [], "no profile 'nope'"),
        (["01"], "docstring-gpt", ["sed=1"], "no parameter 'sed'; it has: seed, rate, word, and --profile"),
        (["01"], "docstring-gpt", ["seed"], "not of the form key=value"),
        (["01"], "docstring-gpt", ["seed=many"], "'many' is of another type"),
        (["01"], "docstring-gpt", ["seed=1.5"], "1.5 is of another type"),
        (["01"], "docstring-gpt", ["seed=true"], "True is of another type"),
        (["01"], "docstring-gpt", ["profile=gpt2-small"], "no parameter 'profile'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(book, tmp_path, names, profile, pairs, message):
    with pytest.raises(UserError) as error:
        runner.run(names, profile, pairs, tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_out_must_be_a_folder_of_its_own(book, tmp_path):
    folder, *_ = book
    before = tree(folder)
    (tmp_path / "file").touch()
    for out in (folder, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="--out"):
            runner.run(["01"], out=out)
    assert tree(folder) == before


def test_values_are_json_or_words():
    given = ["a=1", "b=4e-4", "c=true", "d=null", "e=two words", "f=[1, 2]", "g=2024-06-23", "h=a=b", 'i="3"']
    assert runner.parse_pairs(given) == {
        "a": 1, "b": 4e-4, "c": True, "d": None, "e": "two words", "f": [1, 2], "g": "2024-06-23", "h": "a=b", "i": "3",
    }  # fmt: skip


def test_chapters_are_chosen_by_number_or_name_in_the_books_order(book):
    found = runner.chapters()
    assert [c.name for c in runner.select(["03", "1", "notebooks/01_good.ipynb"], found)] == ["01_good", "03_mine"]
    assert runner.select([], found) == runner.select(["all"], found) == found
    assert found[0].title == "A question"


def test_a_damaged_notebook_is_named(tmp_path, monkeypatch):
    (tmp_path / "01_torn.ipynb").write_text('{"cells": [')
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path)
    with pytest.raises(UserError, match="01_torn.ipynb"):
        runner.chapters()


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """A sweep of two variants whose notebook counts its runs. (its grid file, results folder, sweep)"""
    folder = tmp_path / "notebooks" / "sweeps"
    folder.mkdir(parents=True)
    parameters = new_code_cell(
        'profile = "docstring-gpt"\nvariant = "a"\nsize = None', metadata={"tags": ["parameters"]}
    )
    code = f"""import yaml
from saelib.profile import load_profile
from saelib.report import Report
grid = yaml.safe_load(open({str(folder / "07_toy.yml")!r}))
values = grid["base"] | grid["variants"][variant]
report = Report(variant, load_profile(profile), seeds=values.pop("seeds"), values=values)
report.publish("half", 0)
report.publish("size", size or values["size"])"""
    cells = [new_markdown_cell("# One line"), parameters, new_code_cell(code)]
    nbformat.write(new_notebook(cells=cells), folder / "07_variant.ipynb")
    write_chapter(folder.parent / "07_toy.ipynb")
    (folder / "07_toy.yml").write_text("base: {seeds: [0], size: 1}\nvariants: {a: {}, b: {size: 2}}\n")
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "BUILD", tmp_path / "_build")
    return folder / "07_toy.yml", tmp_path / "results" / "docstring-gpt" / "07_sweep", lambda: runner.sweep(jobs=2)


def test_a_sweep_stores_every_variant_and_runs_again_only_what_changed(grid):
    file, results, sweep = grid
    sweep()
    sizes = {path.stem: json.loads(path.read_text())["values"]["size"]["value"] for path in results.iterdir()}
    assert sizes == {"a": 1, "b": 2}
    first = {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    sweep()
    assert {path.name: path.stat().st_mtime_ns for path in results.iterdir()} == first
    file.write_text(file.read_text().replace("size: 2", "size: 3"))
    sweep()
    changed = {path.name for path in results.iterdir() if path.stat().st_mtime_ns != first[path.name]}
    assert changed == {"b.json"}


def test_a_variant_that_fails_is_named_and_the_others_are_kept(grid):
    file, results, sweep = grid
    file.write_text(file.read_text().replace("{size: 2}", "{size: .nan}"))
    with pytest.raises(runner.ChapterFailed, match="size is nan"):
        sweep()
    assert [path.name for path in results.glob("*.json")] == ["a.json"], "what b had stored by then does not count"


def test_a_trial_of_a_sweep_leaves_the_stored_results_alone(grid, tmp_path, monkeypatch):
    _, results, _ = grid
    runner.sweep(["7"], pairs=["variant=a"])
    before = tree(tmp_path / "results")
    assert list(before) == [results / "a.json"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yml").write_text("extends: docstring-gpt\nname: mine\n")
    runner.sweep(["7"], "my.yml", ["variant=b", "size=9"])
    runner.sweep(["7"], pairs=["variant=a"], out=tmp_path / "out")
    trials = tmp_path / "_build/runs/mine/07_sweep/results/b.json", tmp_path / "out/07_sweep/results/a.json"
    assert [json.loads(path.read_text())["values"]["size"]["value"] for path in trials] == [9, 1]
    assert tree(tmp_path / "results") == before
