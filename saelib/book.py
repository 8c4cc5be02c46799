"""The book: stage its parts, build it, publish what ran.

    stage    configuration, pages and notebooks -> `_build/site/`, executed notebooks over committed ones
    build    `_build/site/` -> `_build/site/_build/html/`, every warning an error
    publish  what ran -> `results/<profile>/` and, for the default profile, the outputs in `notebooks/`

A notebook that leaves a run is rebuilt as the committed source plus the outputs of the run: no trace of papermill, no
progress bar and no sentence that has changed since can reach the book or the checkout.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from saelib import UserError
from saelib.profile import BUILD, ROOT, available, load_profile

SITE = BUILD / "site"
DEFAULT = "docstring-gpt"
"""The profile whose outputs are committed."""
STRIPPED = "metadata.papermill cell.metadata.papermill cell.metadata.execution"
BUILD_FLAGS = ("-W", "-n", "--keep-going", "-q", "--all")
"""Warnings are errors. Everything is rebuilt: a page that quotes another's number does not know when it changes."""


# --- notebooks --------------------------------------------------------------------------------------------------------


def _injected(cell: NotebookNode) -> bool:
    """Whether papermill added this cell, because a parameter differs from its default."""
    return "injected-parameters" in cell.metadata.get("tags", ())


def merge(source: NotebookNode, run: NotebookNode, chapter: str) -> NotebookNode:
    """The source with the outputs of its run. A cell of changed parameters stays: it explains the outputs.

    Raises:
        UserError: the run failed, was cut short, or is of another source.
    """
    ours = [(cell.cell_type, cell.source) for cell in run.cells if not _injected(cell)]
    if ours != [(cell.cell_type, cell.source) for cell in source.cells]:
        raise UserError(f"chapter {chapter} was edited after its run: `saelib run {chapter[:2]}` runs it again")
    merged, fresh = copy.deepcopy(source), iter(copy.deepcopy(source.cells))
    merged.cells = [copy.deepcopy(cell) if _injected(cell) else next(fresh) for cell in run.cells]
    for cell, ran in zip(merged.cells, run.cells, strict=True):
        if cell.cell_type != "code":
            continue
        if ran.execution_count is None or any(output.output_type == "error" for output in ran.outputs):
            raise UserError(f"the last run of chapter {chapter} failed: mend it, then `saelib run {chapter[:2]}`")
        cell.execution_count = ran.execution_count
        cell.outputs = [output for output in ran.outputs if output.get("name") != "stderr"]
    return merged


def executed(profile: str) -> dict[str, NotebookNode]:
    """Merged notebooks of the chapters that were run under the profile, by name (`01_induction`).

    Raises:
        UserError: see `merge`.
    """
    runs = BUILD / "runs" / load_profile(profile).name
    return {
        path.stem: merge(nbformat.read(path, 4), nbformat.read(runs / path.name, 4), path.stem)
        for path in _chapters()
        if (runs / path.name).is_file()
    }


def _chapters() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


# --- stage and build --------------------------------------------------------------------------------------------------


def stage(profile: str, committed: bool = False) -> Path:
    """Lay out the book's sources in `_build/site/`, afresh.

    Args:
        profile: whose executed notebooks take the place of the committed ones.
        committed: take the committed ones only.

    Raises:
        UserError: no such profile, or a run that failed or is older than its notebook.
    """
    name, runs = load_profile(profile).name, {} if committed else executed(profile)
    shutil.rmtree(SITE, ignore_errors=True)
    for folder in ("book", "notebooks"):
        shutil.copytree(ROOT / folder, SITE / folder, ignore=shutil.ignore_patterns(".*"))
    for file in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / file, SITE)
    for chapter, notebook in runs.items():
        nbformat.write(notebook, SITE / "notebooks" / f"{chapter}.ipynb")
    (SITE / "book" / "_ran.md").write_text(what_ran(name, set(runs)), encoding="utf-8")
    return SITE


def build() -> Path:
    """Build what is staged; returns the path of `index.html`.

    Raises:
        UserError: the build failed or gave a warning; the warnings are printed before.
    """
    program = Path(sysconfig.get_path("scripts")) / "jupyter-book"
    command = [str(program), "build", str(SITE), "--path-output", str(SITE), *BUILD_FLAGS]
    ran = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if ran.returncode:
        shown = re.sub(r"\x1b\[[\d;]*m", "", ran.stderr).replace(f"{SITE}{os.sep}", "")
        lines = [line for line in shown.splitlines() if line.strip()]
        warnings = [line for line in lines if "WARNING" in line or "ERROR" in line]
        print("\n".join(warnings or lines[-20:]), file=sys.stderr)
        raise UserError(f"the book was not built ({len(warnings)} warnings, shown above): mend the pages they name")
    return SITE / "_build" / "html" / "index.html"


def what_ran(shown: str, fresh: set[str]) -> str:
    """The table of the title page, in Markdown: chapter × profile, when, how long and on what.

    Args:
        shown: the profile that is staged.
        fresh: chapters whose run is staged in place of the committed outputs.
    """
    profiles = sorted({*available(), shown}, key=lambda name: (name != DEFAULT, name))
    lines = ["| chapter | " + " | ".join(f"`{name}`" for name in profiles) + " |", "|---" * (len(profiles) + 1) + "|"]
    for path in _chapters():
        cells = []
        for name in profiles:
            ours = name == shown and path.stem in fresh
            cell = _run_facts((BUILD if ours else ROOT) / "results" / name / f"{path.stem}.json")
            cells.append(f"**{cell}**" if cell and name == (shown if path.stem in fresh else DEFAULT) else cell)
        row = " | ".join(cell or "[not run]{.not-run}" for cell in cells)
        lines.append(f"| [{path.stem[:2]}](../notebooks/{path.name}) | {row} |")
    return "\n".join(lines) + "\n\nIn bold: the run whose outputs this copy of the book shows.\n"


def _run_facts(result: Path) -> str:
    """Date, duration and hardware of the run that wrote a results file; empty if there is none."""
    if not result.is_file():
        return ""
    facts = json.loads(result.read_text(encoding="utf-8"))["provenance"]
    hardware = facts["hardware"]["gpu"] or f"{facts['hardware']['cores']} CPU cores"
    return f"{facts['date']}, {facts['wall_seconds']:.0f} s, {hardware}"


# --- publish ----------------------------------------------------------------------------------------------------------


def publish(profile: str) -> list[Path]:
    """Copy what ran into the checkout, all of it or, when anything is amiss, nothing; returns the files written.

    Raises:
        UserError: nothing ran; or a run failed, is out of date, had other parameters than the book, or left no numbers.
    """
    name, runs, written = load_profile(profile).name, executed(profile), {}
    if not runs:
        raise UserError(f"no chapter was run under profile {name!r}: `saelib run --profile {profile}`, then publish")
    _check_current(profile, set(runs))
    for chapter, notebook in runs.items():
        result = BUILD / "results" / name / f"{chapter}.json"
        if not result.is_file():
            raise UserError(f"chapter {chapter} left no numbers: `saelib run {chapter[:2]} --force --profile {name}`")
        written[ROOT / "results" / name / result.name] = result.read_bytes()
        if name == DEFAULT:
            written[ROOT / "notebooks" / f"{chapter}.ipynb"] = _stripped(notebook)
    for path, content in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(path)
    return sorted(written)


def _check_current(profile: str, chapters: set[str]) -> None:
    """Published numbers are those of this code, this model, this text and the notebooks' own parameters."""
    from saelib.runner import plan

    for item in plan([], profile)[0]:
        if item.chapter.name in chapters and item.last.state != "done":
            state = "is out of date, or used other parameters" if item.last.state == "changed" else item.last.state
            cure = f"`saelib run {item.chapter.name[:2]} --profile {profile}`, then publish"
            raise UserError(f"the last run of chapter {item.chapter.name} {state}: {cure}")


def _stripped(notebook: NotebookNode) -> bytes:
    """The notebook as the pre-commit hook leaves it."""
    command = [sys.executable, "-m", "nbstripout", "--keep-output", "--keep-count", "--extra-keys", STRIPPED]
    ran = subprocess.run(command, input=nbformat.writes(notebook).encode(), capture_output=True, check=True)
    return ran.stdout
