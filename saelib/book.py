"""The book: stage its parts, build it, publish what ran.

    stage    configuration, pages and notebooks -> `_build/site/`, executed notebooks over committed ones
    build    `_build/site/` -> `_build/site/_build/html/`, every warning an error; the atlas's pages beside the chapters
    publish  what ran -> `results/<profile>/` and, for the default profile, the outputs in `notebooks/`

A notebook that leaves a run is rebuilt as the committed source plus the outputs of the run: no trace of papermill, no
progress bar and no sentence that has changed since can reach the book or the checkout.
"""

from __future__ import annotations

import base64
import copy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from saelib import UserError
from saelib.profile import BUILD, ROOT, available, load_profile
from saelib.report import read

SITE = BUILD / "site"
DEFAULT = "docstring-gpt"
"""The profile whose outputs are committed."""
README_FIGURE = "book/images/readme.png"
"""The figure of the cell tagged `readme`."""
ATLAS = "10_atlas"
"""The chapter that makes pages of its own."""
NO_ATLAS = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>No atlas yet</title><link rel="icon" href="data:,"><style>:root { color-scheme: light dark; }
body { font: 1.1rem/1.6 Palatino, Georgia, serif; max-width: 38rem; margin: 4rem auto; padding: 0 1rem; }</style></head>
<body><h1>No atlas here yet</h1>
<p>This copy of the book was built without running chapter 10. The pages of the atlas are made by the run and never
committed, for they quote other people's docstrings. To make them:</p>
<pre>.venv/bin/saelib run 10
.venv/bin/saelib book</pre>
<p><a href="../notebooks/10_atlas.html">Back to the chapter</a></p></body></html>
"""
"""What stands in its place."""


def merge(source: NotebookNode, run: NotebookNode, chapter: str) -> NotebookNode:
    """The source with the outputs of its run. A cell of changed parameters stays: it explains the outputs.

    Raises:
        UserError: the run failed, was cut short, or is of another source.
    """
    merged = copy.deepcopy(source)
    for index, cell in enumerate(run.cells):
        if "injected-parameters" in cell.metadata.get("tags", ()):
            merged.cells.insert(index, copy.deepcopy(cell))
    ours, theirs = ([(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (merged, run))
    if ours != theirs:
        raise UserError(f"chapter {chapter} was edited after its run: `saelib run {chapter[:2]}` runs it again")
    for cell, ran in zip(merged.cells, run.cells, strict=True):
        if cell.cell_type != "code":
            continue
        if ran.execution_count is None or any(output.output_type == "error" for output in ran.outputs):
            raise UserError(f"the last run of chapter {chapter} failed: mend it, then `saelib run {chapter[:2]}`")
        cell.execution_count = ran.execution_count
        cell.outputs = [output for output in ran.outputs if output.get("name") != "stderr"]
    return merged


def executed(profile: str) -> dict[str, NotebookNode]:
    """Merged notebooks of the chapters that were run under the profile, by name.

    Raises:
        UserError: see `merge`; or some are a rehearsal, whose numbers are of no model that anybody uses.
    """
    name = load_profile(profile).name
    runs, results = BUILD / "runs" / name, BUILD / "results" / name
    if rehearsals := [
        path.stem for path in sorted(results.glob("*.json")) if read(path)["provenance"].get("rehearsal")
    ]:
        cure = "run them again without HF_ENDPOINT, on the real models"
        raise UserError(f"{', '.join(rehearsals)} of {name}: only rehearsed against a local hub, no findings: {cure}")
    return {
        path.stem: merge(nbformat.read(path, 4), nbformat.read(runs / path.name, 4), path.stem)
        for path in _chapters()
        if (runs / path.name).is_file()
    }


def _chapters() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def stage(profile: str, committed: bool = False) -> Path:
    """Lay out the book's sources in `_build/site/`, afresh: the profile's executed notebooks over committed ones.

    With `committed`, only these. Raises UserError: no such profile, or a run that failed or is older than its notebook.
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
    _stage_atlas(BUILD / "atlas" / name if ATLAS in runs else None)
    return SITE


def _stage_atlas(made: Path | None) -> None:
    """The pages that chapter 10 made in the run that is shown; where it made none, plain pages that say so."""
    (SITE / "atlas").mkdir()
    for name in ("small", "large"):
        page = made and made / f"{name}.html"
        content = page.read_text(encoding="utf-8") if page and page.is_file() else NO_ATLAS
        (SITE / "atlas" / f"{name}.html").write_text(content, encoding="utf-8")


def build() -> Path:
    """Build what is staged; returns the path of `index.html`. Raises UserError: it failed, or gave a warning."""
    program = Path(sysconfig.get_path("scripts")) / "jupyter-book"
    # --all: a page that quotes another's number does not know when it changes
    flags = ("-W", "-n", "--keep-going", "-q", "--all")
    ran = subprocess.run([program, "build", SITE, "--path-output", SITE, *flags], stdout=subprocess.DEVNULL)
    if ran.returncode:
        raise UserError("the book was not built: mend the pages that the warnings above name")
    html = SITE / "_build" / "html"
    shutil.copytree(SITE / "atlas", html / "atlas", dirs_exist_ok=True)  # after Sphinx, for which they are no pages
    return html / "index.html"


def what_ran(shown: str, fresh: set[str]) -> str:
    """The table of the title page, in Markdown: chapter × profile, when, how long and on what.

    `shown` is the staged profile, `fresh` the chapters whose run is staged in place of the committed outputs.
    """
    profiles = sorted({*available(), shown}, key=lambda name: (name != DEFAULT, name))
    lines = ["| chapter | " + " | ".join(f"`{name}`" for name in profiles) + " |", "|---" * (len(profiles) + 1) + "|"]
    for path in _chapters():
        place, run = (BUILD, shown) if path.stem in fresh else (ROOT, DEFAULT)
        row = f"| [{path.stem[:2]}](../notebooks/{path.name}) |"
        for name in profiles:
            facts = _run_facts((place if name == run else ROOT) / "results" / name / f"{path.stem}.json")
            row += f" **{facts}** |" if name == run else f" {facts} |"
        lines.append(row)
    return "\n".join(lines) + "\n\nIn bold: the run whose outputs this copy of the book shows.\n"


def _run_facts(result: Path) -> str:
    """Date, duration and hardware of the run that wrote a results file."""
    if not result.is_file():
        return "[not run]{.not-run}"
    facts = read(result)["provenance"]
    hardware = facts["hardware"]["gpu"] or f"{facts['hardware']['cores']} CPU cores"
    return f"{facts['date']}, {facts['wall_seconds']:.0f} s, {hardware}"


def publish(profile: str) -> list[Path]:
    """Copy what ran into the checkout, all of it or, when anything is amiss, nothing; returns the files written.

    Raises:
        UserError: nothing ran; or a run failed, is out of date, or had other parameters than the book.
    """
    from saelib.runner import plan

    name, runs, written = load_profile(profile).name, executed(profile), {}
    if not runs:
        raise UserError(f"no chapter was run under profile {name!r}: `saelib run --profile {profile}`, then publish")
    stale = [item.chapter.name for item in plan([], profile)[0] if item.chapter.name in runs and item.state != "done"]
    if stale:
        cure = f"`saelib run --profile {profile}`, then publish"
        raise UserError(f"{', '.join(stale)}: the last run is out of date, or used other parameters: {cure}")
    for chapter, notebook in runs.items():
        numbers = Path("results") / name / f"{chapter}.json"
        written[ROOT / numbers] = (BUILD / numbers).read_bytes()
        if name == DEFAULT:
            written[ROOT / "notebooks" / f"{chapter}.ipynb"] = _stripped(notebook)
            for cell in notebook.cells:
                if "readme" in cell.metadata.get("tags", ()):
                    written[ROOT / README_FIGURE] = base64.b64decode(cell.outputs[0].data["image/png"])
    for path, content in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(path)
    return sorted(written)


def _stripped(notebook: NotebookNode) -> bytes:
    """The notebook as the pre-commit hook leaves it."""
    keys = "metadata.papermill cell.metadata.papermill cell.metadata.execution"
    command = [sys.executable, "-m", "nbstripout", "--keep-output", "--keep-count", "--extra-keys", keys]
    ran = subprocess.run(command, input=nbformat.writes(notebook).encode(), capture_output=True, check=True)
    return ran.stdout
