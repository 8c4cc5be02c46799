"""Run chapters headless, with papermill underneath, and remember what is done.

An executed notebook stands in `_build/runs/<profile>/` beside a small record, `NN_noun.run.json`: how the run ended,
how long it took, and a hash of everything that went in. A chapter is done when its run was completed and that hash is
still the same; so a second `saelib run all` executes only what changed. A notebook is executed under a temporary
name and renamed when it has ended, failed or not.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import nbformat
import papermill
import yaml
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from papermill.execute import remove_error_markers

from saelib import UserError
from saelib.profile import BUILD, ROOT, Local, Profile, load_profile
from saelib.report import content_hash, versions

NOTEBOOKS = ROOT / "notebooks"
FRAME = {"cli.py", "runner.py", "book.py", "pretrain.py"}
"""Files of saelib that no chapter imports: they may change without a chapter being run again."""


class Chapter(NamedTuple):
    """One notebook of the book."""

    path: Path
    title: str
    parameters: dict[str, object]
    """What its parameters cell assigns."""
    content: str
    """Its cells without outputs, as JSON: what decides whether it must be run again."""

    @property
    def name(self) -> str:
        return self.path.stem


class ChapterFailed(Exception):
    """A cell raised an error. The message shows the cell and the error, and says where the notebook is."""


class OwnKernel(AsyncKernelManager):
    """A quiet kernel of the Python that runs this, whatever kernels the user or the machine has installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict(["--log-level=CRITICAL"]))


# --- which chapters, with which parameters ----------------------------------------------------------------------------


def chapters(folder: Path | None = None) -> list[Chapter]:
    """All chapters (`NN_noun.ipynb`) in order."""
    return [_read(path) for path in sorted((folder or NOTEBOOKS).glob("[0-9][0-9]_*.ipynb"))]


def _read(path: Path) -> Chapter:
    try:
        notebook = nbformat.read(path, as_version=4)
        parameters = _parameters(notebook)
    except (OSError, ValueError, KeyError, AttributeError, SyntaxError) as error:
        shown = " ".join(str(error).split())
        raise UserError(
            f"{path.name} is no notebook whose parameters cell holds only literals ({shown}): mend it"
        ) from error
    titles = (re.match(r"# (.+)", cell.source) for cell in notebook.cells if cell.cell_type == "markdown")
    title = next((found[1].strip() for found in titles if found), path.stem)
    metadata = ("tags", "mystnb")
    cells = [
        [cell.cell_type, cell.source, *(cell.metadata.get(key) for key in metadata), cell.get("attachments")]
        for cell in notebook.cells
    ]
    return Chapter(path, title, parameters, json.dumps(cells, sort_keys=True))


def _parameters(notebook: nbformat.NotebookNode) -> dict[str, object]:
    """Names and literals assigned in the cell tagged `parameters`."""
    sources = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assignments = [node for node in ast.parse("\n".join(sources)).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}


def select(names: Sequence[str], found: list[Chapter]) -> list[Chapter]:
    """Chapters by number (`01`, `1`), name (`01_induction`) or `all`, in the book's order.

    Raises:
        UserError: there is no such chapter.
    """
    chosen: set[str] = set()
    for name in names or ["all"]:
        wanted = Path(name).name.removesuffix(".ipynb")
        matching = {c.name for c in found if wanted in ("all", c.name, c.name[:2], c.name[:2].lstrip("0"))}
        if not matching and wanted != "all":
            raise UserError(f"no chapter {name!r}: choose from {', '.join(c.name for c in found)}, or all")
        chosen |= matching
    return [chapter for chapter in found if chapter.name in chosen]


def parse_pairs(pairs: Iterable[str]) -> dict[str, object]:
    """`key=value` texts, values as YAML (`0.5`, `4e-4`, `true`, `null`, `[1, 2]`, words).

    Raises:
        UserError: no `=`, or a value that is not YAML.
    """
    values: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key.strip() and equals):
            raise UserError(f"-p {pair!r} is not of the form key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"-p {key}: {text!r} is not YAML; quote it, as in -p {key}='\"…\"'") from error
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+\.?\d*[eE][-+]?\d+", value):
            value = float(value)  # YAML 1.1 wants a dot and a sign in every float; nobody writes them
        known = value is None or isinstance(value, bool | int | float | str | list | dict)
        values[key.strip()] = value if known else text
    return values


def checked(chapter: Chapter, values: dict[str, object]) -> dict[str, object]:
    """The values, of the types that the chapter's parameters have.

    Raises:
        UserError: a key the chapter does not have, `profile`, or a value of another type.
    """
    fitting: dict[str, object] = {}
    for key, value in values.items():
        if key == "profile":
            raise UserError("-p profile=… is given as --profile")
        if key not in chapter.parameters:
            allowed = ", ".join(name for name in chapter.parameters if name != "profile") or "none"
            raise UserError(f"chapter {chapter.name} has no parameter {key!r}; it has: {allowed}")
        default = chapter.parameters[key]
        if isinstance(default, str) and type(value) in (int, float):
            value = str(value)
        if not _fits(value, default):
            raise UserError(f"chapter {chapter.name}: {key} is {default!r} by default; {value!r} is of another type")
        fitting[key] = float(value) if isinstance(default, float) else value
    return fitting


def _fits(value: object, default: object) -> bool:
    if default is None:
        return True
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    allowed = {float: int | float, tuple: list, list: list}.get(type(default), type(default))
    return isinstance(value, allowed)


# --- what is done -----------------------------------------------------------------------------------------------------


def surroundings(profile: Profile) -> str:
    """Start of a SHA-256 over what all chapters share: code, profile, local models and text, versions."""
    source = ROOT / "saelib"
    code = [path for path in (*source.glob("*.py"), *source.glob("*.mplstyle")) if path.name not in FRAME]
    files = [*code, ROOT / "book" / "reported.yml", *_local_inputs(profile)]
    hashes = [(path.name, content_hash(path)) for path in sorted(files) if path.exists()]
    return _hash(profile.model_dump_json(), hashes, versions())


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _local_inputs(profile: Profile) -> list[Path]:
    """Folders and files on this machine that the profile names: models, checkpoints, text."""
    model = profile.model
    names = [name for name in (model.name, model.second_seed, model.checkpoints) if name]
    names += [str(profile.text.path)] if isinstance(profile.text, Local) else []
    return [ROOT / name for name in names]


class Record(NamedTuple):
    """How the last run of a chapter ended."""

    state: str
    """`done`, `changed` (done, but something that went in is different now), `failed`, or `not run`."""
    seconds: float | None = None


def record(chapter: Chapter, out: Path, inputs: str) -> Record:
    """The state of a chapter whose executed notebook belongs in `out`."""
    try:
        kept = json.loads(_record_path(chapter, out).read_text(encoding="utf-8"))
        state, seconds, same = kept["state"], kept["seconds"], kept["inputs"] == inputs
    except (OSError, ValueError, KeyError, TypeError):
        return Record("not run")
    if not (out / chapter.path.name).is_file():
        return Record("not run")
    return Record("changed" if state == "done" and not same else state, seconds)


def _record_path(chapter: Chapter, out: Path) -> Path:
    return out / f"{chapter.name}.run.json"


# --- running ----------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """One chapter, ready to run."""

    chapter: Chapter
    parameters: dict[str, object]
    """Those that differ from the notebook's own."""
    inputs: str
    last: Record


def plan(
    names: Sequence[str], profile_name: str, pairs: Iterable[str] = (), out: Path | None = None
) -> tuple[list[Plan], Path]:
    """What `run` would do, and the folder it would do it in. Everything a user can get wrong is found here.

    Raises:
        UserError: a chapter, a profile or a parameter that does not exist, or an impossible output folder.
    """
    profile = load_profile(profile_name)
    values, chosen = parse_pairs(pairs), select(names, chapters())
    out = (out or BUILD / "runs" / profile.name).resolve()
    if out == NOTEBOOKS.resolve():
        raise UserError(f"--out {out.name} holds the chapters themselves: choose another folder")
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise UserError(f"--out {out.name} is a file, or below one: choose a folder")
    shared, plans = surroundings(profile), []
    for chapter in chosen:
        parameters = {"profile": _for_kernel(profile_name), **checked(chapter, values)}
        parameters = {k: v for k, v in parameters.items() if (k, v) not in chapter.parameters.items()}
        inputs = _hash(shared, chapter.content, parameters)
        plans.append(Plan(chapter, parameters, inputs, record(chapter, out, inputs)))
    return plans, out


def _for_kernel(profile_name: str) -> str:
    """A profile's file as the kernel, which runs in another folder, can find it; names stay what they are."""
    path = Path(profile_name)
    if not (path.suffix and path.is_file()):
        return profile_name
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def run(
    names: Sequence[str] = (),
    profile_name: str = "docstring-gpt",
    pairs: Iterable[str] = (),
    out: Path | None = None,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Run chapters that are not done (`force`: all of them) in order, one line each; stop at the first that fails.

    Executed notebooks go to `_build/runs/<profile>` and numbers to `_build/results/<profile>`; with `out`, to `out` and
    `out/results`.

    Raises:
        UserError: see `plan`; or a cell raised one.
        ChapterFailed: a cell raised any other error. Its executed notebook is kept.
    """
    plans, folder = plan(names, profile_name, pairs, out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {os.path.relpath(folder)}: {error.strerror}; choose another --out") from error
    results = folder / "results" if out else BUILD / "results" / load_profile(profile_name).name
    for item in plans:
        if item.last.state == "done" and not force:
            say(line(item.chapter, "up to date", item.last.seconds))
            continue
        _run_one(item, folder, results, say)


def _run_one(item: Plan, out: Path, results: Path, say: Callable[[str], None]) -> None:
    chapter, started = item.chapter, time.perf_counter()
    _record_path(chapter, out).unlink(missing_ok=True)  # from here on it is not done until it has ended
    failure = None
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as partial:
        unfinished = Path(partial) / chapter.path.name
        try:
            _execute(item, unfinished, results, started)
        except (PapermillExecutionError, DeadKernelError) as error:
            failure = error
        _strip(unfinished)
        unfinished.replace(out / chapter.path.name)
    seconds = round(time.perf_counter() - started, 1)
    state = "failed" if failure else "done"
    _write_record(_record_path(chapter, out), {"state": state, "inputs": item.inputs, "seconds": seconds})
    say(line(chapter, state, seconds))
    if failure:
        raise _explained(chapter, failure, out / chapter.path.name) from failure


def _execute(item: Plan, output: Path, results: Path, started: float) -> None:
    """Execute into `output`, which papermill also writes when a cell fails. No template is meant by { and }."""
    chapter = item.chapter
    with _environment(SAELIB_RESULTS=str(results), MPLBACKEND="module://matplotlib_inline.backend_inline"):
        papermill.execute_notebook(
            *(str(path).replace("{", "{{").replace("}", "}}") for path in (chapter.path, output)),
            parameters=item.parameters, kernel_name="python3", language="python", cwd=chapter.path.parent,
            progress_bar=False, kernel_manager_class=OwnKernel, on_cell_start=_ticker(chapter, started),
        )  # fmt: skip


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Variables for the kernel, which inherits ours."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _ticker(chapter: Chapter, started: float) -> Callable[..., None]:
    """Says on a terminal which cell is running, on a line that the final one will replace."""

    def tick(cell: nbformat.NotebookNode, cell_index: int) -> None:
        if sys.stdout.isatty():
            print(line(chapter, f"cell {cell_index + 1}", time.perf_counter() - started), end="\r", flush=True)

    return tick


def line(chapter: Chapter, state: str, seconds: float | None) -> str:
    """One chapter on one line: name, state, seconds."""
    return f"{chapter.name:<18} {state:<10} " + (" " * 9 if seconds is None else f"{seconds:7.1f} s")


def _strip(path: Path) -> None:
    """Keep the chapter and its outputs only: papermill's notes hold paths of this machine, and readers may download."""
    notebook = remove_error_markers(nbformat.read(path, as_version=4))
    for part in (notebook, *notebook.cells):
        part.metadata.pop("papermill", None)
        part.metadata.pop("execution", None)
    nbformat.write(notebook, path)


def _write_record(path: Path, content: dict[str, object]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    partial.replace(path)


def _explained(chapter: Chapter, failure: Exception, kept: Path) -> Exception:
    """The exception to show: a user's mistake as one line, anything else with its cell."""
    shown = os.path.relpath(kept)
    if isinstance(failure, DeadKernelError):
        return ChapterFailed(f"{chapter.name}: the kernel died, most often for want of memory; kept as {shown}")
    where = f"cell In [{failure.exec_count}]"
    if failure.ename == "UserError":
        return UserError(f"{chapter.name}, {where}: {failure.evalue}")
    source = "\n".join(f"    {line}" for line in failure.source.splitlines())
    problem = f"{failure.ename}: {(failure.evalue.strip().splitlines() or [''])[0]}"
    return ChapterFailed(f"{chapter.name}: {where} failed\n{source}\n{problem}\nkept as {shown}")
