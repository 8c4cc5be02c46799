"""Run one notebook over a grid of parameters and profile values, on local processes or any dask.distributed cluster.

Every point of the grid has a folder of its own: the executed notebook, its numbers, its row. All rows together are
`rows.csv`, written anew whenever a point has ended. A point that is done is not run again as long as nothing has
changed that goes into it, so a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import yaml
from tqdm import tqdm

from saelib import UserError, __version__, runner
from saelib.profile import BUILD, ROOT, Profile, load_profile, override, write
from saelib.report import cores, read

TIMEOUT = 20
"""Seconds to wait for a scheduler and its first worker."""


class Point(NamedTuple):
    """One point of the grid."""

    values: dict[str, object]
    """What it sets: parameters of the notebook and, by dotted key, values of the profile."""
    profile: Profile | None
    """Its own profile; None where it sets no value of the given one."""
    item: runner.Plan
    folder: Path

    def row(self) -> dict[str, object]:
        """Its values, how it ended (`not run`, where that was with other inputs or never), and its numbers."""
        kept = self.folder / "row.json"
        row = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        ended = row if row.pop("inputs", None) == self.item.inputs else {"state": "not run"}
        return self.values | ended | self.values

    def keep(
        self, state: str, error: str | None, seconds: float | None = None, numbers: dict[str, object] | None = None
    ) -> None:
        """Write its row: of the numbers only scalars, and none by the name of another column."""
        row = {"inputs": self.item.inputs, "state": state, "error": error, "seconds": seconds}
        row["host"] = socket.gethostname()
        scalars = {name: value for name, value in (numbers or {}).items() if not isinstance(value, list)}
        write({self.folder / "row.json": json.dumps(row | scalars | row).encode()})


# --- the grid ---------------------------------------------------------------------------------------------------------


def parse_grid(pairs: Iterable[str]) -> list[dict[str, object]]:
    """All combinations of `key=v1,v2` texts; values are JSON, or else words. Raises UserError: no key, no value."""
    axes: dict[str, list] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        try:
            values = json.loads(f"[{text}]")
        except ValueError:
            values = [runner.parse_pairs([f"{key}={value}"])[key] for value in text.split(",")]
        if not key or not values or "" in values or key in axes or len(set(map(repr, values))) < len(values):
            raise UserError(f"-g {pair!r}: give each key once, and its values, each once, as in -g seed=0,1,2")
        axes[key] = values
    if not axes:
        raise UserError("the grid is empty: give a key and its values, as in -g recipe.lr=1e-4,2e-4")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def points(notebook: str, pairs: Iterable[str], profile_name: str, out: Path | None = None) -> tuple[list[Point], Path]:
    """The grid's points, checked, and the folder they run in. Raises UserError: whatever a user can get wrong."""
    profile, grid = load_profile(profile_name), parse_grid(pairs)
    if profile_name.endswith((".yml", ".yaml")):
        profile_name = str(Path(profile_name).resolve())
    local = notebook.endswith(".ipynb")
    found = [runner.read(Path(notebook).resolve())] if local else runner.select([notebook], runner.chapters())
    if len(found) > 1:
        raise UserError(f"{notebook!r} means {len(found)} chapters: sweep one at a time")
    out = (out or BUILD / "sweeps" / profile.name / found[0].name).resolve()
    return [_point(found[0], profile, profile_name, values, out) for values in grid], out


def _point(chapter: runner.Chapter, profile: Profile, base: str, values: dict[str, object], out: Path) -> Point:
    sections = {key: value for key, value in values.items() if "." in key}
    parameters = {key: value for key, value in values.items() if key not in sections}
    runner.check_parameters(chapter, parameters)
    own = override(profile, sections)
    _refuse_without_effect(profile, sections)
    words = ",".join(f"{key}={value}" for key, value in values.items())
    name = re.sub(r"[^\w.=,+-]+", "_", words)[:80]  # to be read; the hash makes it the only one
    folder = out / f"{name}-{runner.inputs_of(chapter.name, values)[:8]}"
    if "profile" in chapter.parameters:
        chosen = str(folder / "profile.yml") if sections else base
        parameters["profile"] = runner.seen_from(chapter.path.parent, chosen)
    elif sections:
        raise UserError(f"{chapter.name} has no parameter 'profile' to hand {next(iter(sections))} on by: add one")
    inputs = runner.inputs_of(runner.surroundings(own), chapter.content, values)
    return Point(values, own if sections else None, runner.Plan(chapter, parameters, inputs, ""), folder)


def _refuse_without_effect(profile: Profile, keys: Iterable[str]) -> None:
    """Raise a UserError where every SAE's own section says something else than `recipe`, which is then not heard."""
    for key in keys:
        section, _, field = key.partition(".")
        if section == "recipe" and profile.saes and all(field in sae.recipe for sae in profile.saes.values()):
            names = ", ".join(f"saes.{name}.{key}" for name in profile.saes)
            raise UserError(f"{key} changes nothing, since every SAE of the profile says its own: sweep one of {names}")


# --- running ----------------------------------------------------------------------------------------------------------


def sweep(
    notebook: str, pairs: Iterable[str], profile_name: str, scheduler: str | None = None, jobs: int | None = None,
    out: Path | None = None,
) -> tuple[Path, list[dict[str, object]]]:  # fmt: skip
    """Run the points that are not done; the table, and its rows in the order of the grid.

    A point that fails is tried once more, unless for a user's mistake; so is one whose worker was lost. Then its row
    says `failed` and why, and its notebook is kept. The other points go on.

    Raises:
        UserError: see `points`; no cluster at the address, or one whose workers do not see this checkout.
    """
    runner.refuse_torchrun()
    if scheduler and jobs:
        raise UserError("--jobs is for local processes, and a cluster has its own workers: leave out one of the two")
    grid, out = points(notebook, pairs, profile_name, out)
    todo = [point for point in grid if point.row()["state"] != "done"]
    runner.make(out)
    if todo:
        with _cluster(scheduler, jobs or 1) as client:
            _check(client, out)
            for point in todo:
                shutil.rmtree(point.folder, ignore_errors=True)
                runner.make(point.folder)
                if point.profile:
                    own = yaml.safe_dump(point.profile.model_dump(mode="json"), sort_keys=False)
                    (point.folder / "profile.yml").write_text(own, encoding="utf-8")
            jobs = None if scheduler else jobs or 1
            for _ in tqdm(_ended(client, todo, jobs), todo[0].item.chapter.name, len(todo), unit="point"):
                _table(grid, out)
    return _table(grid, out), [point.row() for point in grid]


def _table(grid: list[Point], out: Path) -> Path:
    rows = pd.DataFrame([point.row() for point in grid], dtype=object)  # whole numbers stay whole beside gaps
    write({out / "rows.csv": rows.to_csv(index=False).encode()})
    return out / "rows.csv"


@contextlib.contextmanager
def _cluster(scheduler: str | None, jobs: int) -> Iterator:
    """A client of the scheduler, or of as many local processes. Raises UserError: nobody answers, or nobody works."""
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise UserError("a sweep needs dask.distributed: pip install 'dask[distributed]'") from error
    local = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": ":0", "memory_limit": 0}
    with contextlib.ExitStack() as stack:
        # of local processes: a point that loses its workers ends by itself; one that only waited there is not to blame
        stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": 10**6}))
        try:
            place = scheduler or stack.enter_context(LocalCluster(**local, silence_logs="CRITICAL"))
            client = stack.enter_context(Client(place, timeout=TIMEOUT))
            client.wait_for_workers(1, timeout=TIMEOUT)
        except (OSError, ValueError, TypeError) as error:
            where = f"{scheduler or 'local processes'} within {TIMEOUT} s"
            raise UserError(f"no scheduler with a worker at {where}: start one, or check the address") from error
        yield client


def _check(client, out: Path) -> None:
    """Raise a UserError where a worker sees another checkout than this one, or not the folder."""
    for worker, seen in client.run(_seen, out, on_error="return").items():
        if seen != (str(ROOT), __version__, True):
            cure = f"workers need saelib {__version__} in the same checkout, and a file system shared with this machine"
            raise UserError(f"worker {worker} does not see {ROOT} and {out} (it has: {seen}): {cure}")


def _seen(out: Path) -> tuple[str, str, bool]:
    return str(ROOT), __version__, out.is_dir()


def _ended(client, todo: list[Point], jobs: int | None) -> Iterator[Point]:
    """Points as they end, their rows written."""
    from distributed import as_completed

    futures = {client.submit(_run, point, jobs, retries=1, pure=False): point for point in todo}
    for future in as_completed(futures):
        if error := future.exception():  # its worker was lost too often, or could not write
            futures[future].keep("failed", f"{type(error).__name__}: {error}".splitlines()[0])
        yield futures[future]


def _run(point: Point, jobs: int | None) -> None:
    """On a worker: run a point, write its row. Raises RuntimeError: it failed, and is to be tried once more."""
    from distributed import get_worker

    if (point.folder / "row.json").is_file():  # it had ended, and dask lost the answer together with a worker
        return None
    worker, results, tries = get_worker(), point.folder / "results", point.folder / "attempts"
    with tries.open("a") as file:
        file.write(f"{worker.address}\n")
    attempt = len(tries.read_text().splitlines())
    if attempt > 2:
        return point.keep("failed", "its worker was lost, most often for want of memory")
    shutil.rmtree(results, ignore_errors=True)
    # all cores that the worker may use are shared out, where its own variables say one thread
    threads = str(max(1, (cores() or 1) // (jobs or worker.state.nthreads)))
    environment = {f"{library}_NUM_THREADS": threads for library in ("OMP", "MKL", "OPENBLAS")} | _gpu(worker.name)
    kept = point.folder / point.item.chapter.path.name
    seconds, failure = runner.run_one(point.item, kept, results, TQDM_DISABLE="1", **environment)
    error = runner.first_line(failure) if failure else None
    if error and attempt == 1 and not error.startswith("UserError"):
        raise RuntimeError(error)
    found = [read(path)["values"] for path in sorted(results.glob("*.json"))]
    numbers = {name: value["value"] for values in found for name, value in values.items()}
    return point.keep("failed" if failure else "done", error, seconds, numbers)


def _gpu(worker: int | str) -> dict[str, str]:
    """The GPU of a numbered worker, in turn of those to be seen; workers with names are given theirs from outside."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = seen.split(",")
    return {"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if seen and isinstance(worker, int) else {}
