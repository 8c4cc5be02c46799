"""Run chapters headless, with papermill underneath, and remember what is done.

An executed notebook stands in `_build/runs/<profile>/`. Its metadata say how the run ended, how long it took, and a
hash of everything that went in. A chapter is done when its run was completed and that hash is still the same; so a
second `saelib run all` executes only what changed. A notebook is executed under a temporary name and renamed when it
has ended, failed or not.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from saelib.profile import BUILD, ROOT, Profile, content_hash, load_profile
from saelib.ranks import MEETING, agreed, gpu
from saelib.report import cores, rehearsed, result_file, versions

NOTEBOOKS = ROOT / "notebooks"
FRAME = {f"{name}.py" for name in "cli runner book pretrain scoreboard hub remote plan costs sweep".split()}
"""Files of saelib that no chapter computes with: they may change without a chapter being run again."""
SUMMARY = "12_scoreboard"
"""The chapter that reads what all others have published."""


class Chapter(NamedTuple):
    """One notebook of the book."""

    path: Path
    title: str
    parameters: dict[str, object]
    """What its parameters cell assigns."""
    content: list
    """Type, source and tags of each cell: what decides whether it must be run again."""

    @property
    def name(self) -> str:
        return self.path.stem


class ChapterFailed(Exception):
    """A cell raised an error. The message shows the cell and the error, and says where the notebook is."""


# --- which chapters, with which parameters ----------------------------------------------------------------------------


def chapters() -> list[Chapter]:
    """All chapters (`NN_noun.ipynb`) in order."""
    return [read(path) for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))]


def read(path: Path) -> Chapter:
    """One notebook. Raises UserError: not there, damaged, or without a parameters cell of literals."""
    try:
        cells = nbformat.read(path, as_version=4).cells
        content = [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in cells]
        assignments = ast.parse(next(source for _, source, tags in content if "parameters" in tags)).body
        parameters = {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}
    except Exception as error:  # a damaged notebook raises whatever its first broken part provokes
        shown = " ".join(str(error).split())
        raise UserError(f"{path.name} cannot be read, or its parameters are no literals ({shown}): mend it") from error
    return Chapter(path, content[0][1].split("\n")[0].removeprefix("# "), parameters, content)


def select(names: Sequence[str], found: list[Chapter], what: str = "chapter") -> list[Chapter]:
    """Chapters by number (`01`, `1`) or name, in the book's order; no names, or `all`: all. UserError: no such one."""
    if not names or "all" in names:
        return found
    chosen = []
    for name in names:
        wanted = Path(name).stem.zfill(2)
        matching = [chapter for chapter in found if wanted in (chapter.name, chapter.name[:2])]
        if not matching:
            raise UserError(f"no {what} {name!r}: choose from {', '.join(c.name for c in found)}, or all")
        chosen += matching
    return [chapter for chapter in found if chapter in chosen]


def parse_pairs(pairs: Iterable[str]) -> dict[str, object]:
    """`key=value` texts; a value is JSON (`4e-4`, `null`, `[1, 2]`), or else a text. Raises UserError: no `=`."""
    values: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"-p {pair!r} is not of the form key=value")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values


def check_parameters(chapter: Chapter, values: dict[str, object]) -> None:
    """Raise a UserError where the chapter has no such key, or has it with a value of another type."""
    allowed = [name for name in chapter.parameters if name != "profile"]
    for key, value in values.items():
        if key not in allowed:
            has = ", ".join([*allowed, "and --profile"])
            raise UserError(f"chapter {chapter.name} has no parameter {key!r}; it has: {has}")
        default = chapter.parameters[key]
        whole_for_float = isinstance(default, float) and type(value) is int
        if default is not None and type(value) is not type(default) and not whole_for_float:
            raise UserError(f"chapter {chapter.name}: {key} is {default!r} by default; {value!r} is of another type")


# --- what is done -----------------------------------------------------------------------------------------------------


def surroundings(profile: Profile) -> list:
    """What all chapters share: profile, versions, and hashes of code, local models and text, and published controls."""
    source, model, text = ROOT / "saelib", profile.model, profile.text
    files = [path for path in source.glob("*.*") if path.name not in FRAME]
    named = ["book/reported.yml", model.name, model.second_seed, model.checkpoints, getattr(text, "path", None)]
    files += [ROOT / name for name in named if name]
    files += [path for path in (ROOT / "results").glob("*/*.json") if path.parent.name != profile.name]
    files += [*(ROOT / "results" / profile.name).glob("*/*.json"), *(NOTEBOOKS / "sweeps").glob("*.yml")]
    return [
        profile.model_dump_json(),
        versions() | rehearsed(),
        [(path.name, content_hash(path)) for path in sorted(files)],
    ]


def _read_by(chapter: Chapter, found: list[Chapter], profile: Profile, results: Path) -> list:
    """What goes into the summary besides: its code, the rules, and the newest numbers of every other chapter."""
    if chapter.name != SUMMARY:
        return []
    others = [other for other in found if other != chapter]
    files = {other.name: result_file(profile.name, other.name, results, other.parameters) for other in others}
    numbers = {name: path and content_hash(path) for name, path in files.items()}
    return [content_hash(ROOT / "saelib" / "scoreboard.py"), content_hash(ROOT / "book" / "claims.yml"), numbers]


class Plan(NamedTuple):
    """One chapter, ready to run, and how its last run ended."""

    chapter: Chapter
    parameters: dict[str, object]
    """Those that differ from the notebook's own."""
    inputs: str
    """Start of a SHA-256 over everything that goes in."""
    state: str
    """`done`, `changed` (done, but something that went in is different now), `failed`, or `not run`."""
    seconds: float | None = None


def plan(
    names: Sequence[str], profile_name: str, pairs: Iterable[str] = (), out: Path | None = None
) -> tuple[list[Plan], Path]:
    """What `run` would do, and the folder it would do it in. Raises UserError: whatever a user can get wrong."""
    profile = load_profile(profile_name)
    values, found = parse_pairs(pairs), chapters()
    chosen = select(names, found)
    out = (out or BUILD / "runs" / profile.name).resolve()
    if out == NOTEBOOKS.resolve():
        raise UserError(f"--out {out.name} holds the chapters themselves: choose another folder")
    profile_name = seen_from(NOTEBOOKS, profile_name)
    shared, plans = surroundings(profile), []
    for chapter in chosen:
        check_parameters(chapter, values)
        given = {"profile": profile_name, **values}
        parameters = {key: value for key, value in given.items() if value != chapter.parameters.get(key)}
        numbers = _read_by(chapter, found, profile, results_of(out))
        inputs = inputs_of(shared, chapter.content, parameters, numbers)
        plans.append(Plan(chapter, parameters, inputs, *_last_run(out / chapter.path.name, inputs)))
    return plans, out


def inputs_of(*parts: object) -> str:
    """Start of a SHA-256 over everything that goes into a run."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def seen_from(folder: Path, profile_name: str) -> str:
    """A profile's name, or the path of one's own as the kernel needs it, which runs in `folder`."""
    return os.path.relpath(profile_name, folder) if profile_name.endswith((".yml", ".yaml")) else profile_name


def results_of(out: Path) -> Path:
    """Where the numbers of runs in `out` go."""
    return BUILD / "results" / out.name if out.parent == BUILD / "runs" else out / "results"


def _last_run(executed: Path, inputs: str) -> tuple[str, float | None]:
    """State and seconds, as `Plan` has them. Numbers that another run has overwritten count as a change."""
    metadata = json.loads(executed.read_text(encoding="utf-8"))["metadata"] if executed.is_file() else {}
    if "saelib" not in metadata:
        return "not run", None
    last = metadata["saelib"]
    numbers = content_hash(results_of(executed.parent) / f"{executed.stem}.json")
    stale = last["state"] == "done" and (last["inputs"], last["numbers"]) != (inputs, numbers)
    return "changed" if stale else last["state"], last["seconds"]


# --- running ----------------------------------------------------------------------------------------------------------


def run(
    names: Sequence[str] = (), profile_name: str = "docstring-gpt", pairs: Iterable[str] = (), out: Path | None = None,
    force: bool = False,
) -> None:  # fmt: skip
    """Run chapters that are not done (`force`: all of them) in order, one line each; stop at the first that fails.

    Executed notebooks go to `_build/runs/<profile>`, numbers to `_build/results/<profile>`; or `out`, `out/results`.
    Of several processes that torchrun started, whose kernels share the work, only the first keeps and says anything.

    Raises:
        UserError: see `plan`; or a cell raised one.
        ChapterFailed: a cell raised any other error. Its executed notebook is kept.
    """
    plans, folder = plan(names, profile_name, pairs, out)
    states = agreed({item.chapter.name: item.state for item in plans})  # a kernel that is skipped here has no siblings
    plans = [item._replace(state=states[item.chapter.name]) for item in plans]
    make(folder)
    say = print
    if int(os.environ.get("RANK", 0)):
        scratch = tempfile.TemporaryDirectory(prefix="saelib-")  # goes when this ends
        plans, folder = [item for item in plans if item.chapter.name != SUMMARY], Path(scratch.name)
        say = str
    for item in plans:
        if item.chapter.name == SUMMARY:  # the others may have run since
            item = plan([SUMMARY], profile_name, pairs, out)[0][0]
        if item.state == "done" and not force:
            say(line(item.chapter, "up to date", item.seconds))
        else:
            kept = folder / item.chapter.path.name
            seconds, failure = run_one(item, kept, results_of(folder), **_siblings(item.chapter))
            say(line(item.chapter, "failed" if failure else "done", seconds))
            if failure:
                raise _explained(item.chapter, failure, kept) from failure


def _siblings(chapter: Chapter) -> dict[str, str]:
    """What a kernel has to know where torchrun started several: where they meet, and which GPU is its own."""
    if "RANK" not in os.environ:
        return {}
    gpus, number = os.environ.get("CUDA_VISIBLE_DEVICES"), gpu() or 0
    own = str(number) if gpus is None else gpus.split(",")[number]
    quiet = {"TQDM_DISABLE": "1"} if os.environ["RANK"] != "0" else {}
    return {MEETING: chapter.name, "CUDA_VISIBLE_DEVICES": own, **quiet}


def make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {folder.name}: {error.strerror}; choose another folder") from error


def run_one(item: Plan, kept: Path, results: Path, **environment: str) -> tuple[float, Exception | None]:
    """Execute one notebook, keep it as `kept`, also when a cell fails: seconds, and how it failed."""
    started, failure = time.perf_counter(), None
    kept.unlink(missing_ok=True)  # from here on the numbers are no longer its own
    unfinished = kept.with_name(f".unfinished-{kept.name}")
    try:
        _execute(item, unfinished, results, **environment)
    except (PapermillExecutionError, DeadKernelError) as error:
        failure = error
    seconds, state = round(time.perf_counter() - started, 1), "failed" if failure else "done"
    notebook = remove_error_markers(nbformat.read(unfinished, as_version=4))
    del notebook.metadata["papermill"]  # holds paths of this machine
    numbers = content_hash(results / f"{item.chapter.name}.json")
    notebook.metadata["saelib"] = {"state": state, "inputs": item.inputs, "seconds": seconds, "numbers": numbers}
    nbformat.write(notebook, unfinished)
    unfinished.replace(kept)
    return seconds, failure


def _execute(item: Plan, output: Path, results: Path, **environment: str) -> None:
    """Execute into `output`, which papermill also writes when a cell fails."""
    backend = "module://matplotlib_inline.backend_inline"
    quiet = "TQDM_DISABLE" in environment or None  # None: shown on a terminal only
    environment = {"SAELIB_RESULTS": str(results), "MPLBACKEND": backend, **environment}

    class OwnKernel(AsyncKernelManager):
        """A quiet kernel of the Python that runs this, whatever kernels the user or the machine has installed."""

        kernel_spec = KernelSpec(**get_kernel_dict(["--log-level=CRITICAL"]), env=environment)

    papermill.execute_notebook(
        item.chapter.path, output, item.parameters, cwd=item.chapter.path.parent,
        kernel_name="python3", language="python", kernel_manager_class=OwnKernel,
        progress_bar={"desc": item.chapter.name, "leave": False, "disable": quiet},
    )  # fmt: skip


def sweep(
    names: Sequence[str] = (), profile_name: str = "docstring-gpt", pairs: Iterable[str] = (), out: Path | None = None,
    jobs: int = 1, force: bool = False,
) -> None:  # fmt: skip
    """Run the sweeps of chapters (without names: all there are): the variant notebook, once for each line of the grid.

    Results go to `results/<profile>/NN_sweep/<variant>.json` when their notebook has ended; those whose line of the
    grid is still the same are not run again. `variant=NAME` in `pairs` runs only that one. With other pairs, or `out`,
    results go beside the executed notebooks, in `_build/runs/<profile>/NN_sweep` or `out/NN_sweep`.

    Raises:
        UserError: a chapter without a sweep, or a variant or parameter that does not exist; or a cell raised one.
        ChapterFailed: a cell raised any other error.
    """
    refuse_torchrun()
    values, profile, folder = parse_pairs(pairs), load_profile(profile_name), NOTEBOOKS / "sweeps"
    grids = [chapter for chapter in chapters() if (folder / f"{chapter.name}.yml").is_file()]
    for chapter in select(names, grids, "chapter with a sweep"):
        grid = yaml.safe_load((folder / f"{chapter.name}.yml").read_text(encoding="utf-8"))
        notebook = read(folder / f"{chapter.name[:2]}_variant.ipynb")
        check_parameters(notebook, values)
        only = values.get("variant")
        if only not in {None, *grid["variants"]}:
            raise UserError(f"{chapter.name} has no variant {only!r}; it has: {', '.join(grid['variants'])}")
        shown = (out or BUILD / "runs" / profile.name).resolve() / f"{chapter.name[:2]}_sweep"
        other = bool(values.keys() - {"variant"})
        kept = shown / "results" if out or other else ROOT / "results" / profile.name / shown.name
        for place in (shown / "unfinished", kept):
            make(place)
        item = Plan(notebook, {**values, "profile": seen_from(folder, profile_name)}, "", "")
        _sweep_one(item, grid, [only] if only else list(grid["variants"]), shown, kept, jobs, force or other)


def _sweep_one(item: Plan, grid: dict, variants: list[str], shown: Path, kept: Path, jobs: int, force: bool) -> None:
    """Variants of one grid: executed into `shown`, their finished numbers into `kept`."""
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // jobs)), "TQDM_DISABLE": "1"} if jobs > 1 else {}

    def one(variant: str) -> None:
        wanted, path = grid["base"] | grid["variants"][variant], kept / f"{variant}.json"
        done = json.loads(path.read_text(encoding="utf-8"))["provenance"]["parameters"] if path.is_file() else {}
        if not force and {"seeds": done.get("seeds"), **done.get("values", {})} == wanted:
            return
        started, executed = time.perf_counter(), shown / f"{variant}.ipynb"
        given = item._replace(parameters=item.parameters | {"variant": variant})
        try:
            _execute(given, executed, shown / "unfinished", **threads)
        except (PapermillExecutionError, DeadKernelError) as error:
            raise _explained(item.chapter, error, executed) from error
        (shown / "unfinished" / path.name).replace(path)
        print(f"{variant:<18} done {time.perf_counter() - started:9.1f} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, variants))


def refuse_torchrun() -> None:
    """Raise a UserError in one of several processes that would all run the same sweep."""
    if "RANK" in os.environ:
        raise UserError("a sweep starts its own processes: leave out torchrun")


def line(chapter: Chapter, state: str, seconds: float | None) -> str:
    """One chapter on one line: name, state, seconds."""
    return f"{chapter.name:<18} {state:<10} " + (" " * 9 if seconds is None else f"{seconds:7.1f} s")


def _explained(chapter: Chapter, failure: Exception, kept: Path) -> Exception:
    """The exception to show: a user's mistake as one line, anything else with its cell."""
    shown = os.path.relpath(kept)
    if isinstance(failure, DeadKernelError):
        return ChapterFailed(f"{chapter.name}: {first_line(failure)}; kept as {shown}")
    where = f"cell In [{failure.exec_count}]"
    if failure.ename == "UserError":
        return UserError(f"{chapter.name}, {where}: {failure.evalue}")
    source = "\n".join(f"    {line}" for line in failure.source.splitlines())
    return ChapterFailed(f"{chapter.name}: {where} failed\n{source}\n{first_line(failure)}\nkept as {shown}")


def first_line(failure: Exception) -> str:
    """What went wrong in a notebook, in one line."""
    if isinstance(failure, DeadKernelError):
        return "the kernel died, most often for want of memory"
    return f"{failure.ename}: " + failure.evalue.strip().split("\n")[0]
