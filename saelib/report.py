"""Every number a chapter publishes: into `results/<profile>/NN_noun.json`, and as glue into the prose.

    report = Report("01_induction", profile, seed=seed)
    report.uses(model)
    report.publish("second_half_loss", loss, se=error, n=256, unit="nats")

The JSON holds what was measured and how it came about; the prose says `` {glue:text}`second_half_loss` `` and so shows
the same characters. Nothing that identifies a person or a machine is written.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

import yaml
from IPython import get_ipython

from saelib import UserError, __version__
from saelib.profile import BUILD, ROOT, Profile, text_fingerprint, write

Value = float | int | str | list | None


def reported(key: str) -> dict:
    """A figure of the journal's or a paper's: `value`, `unit`, `source` (a key of `book/references.bib`), `note`.

    Raises:
        UserError: `book/reported.yml` has no such figure.
    """
    figures = all_reported()
    if key not in figures:
        raise UserError(f"book/reported.yml has no figure {key!r}: add it there, or choose one of {', '.join(figures)}")
    return figures[key]


@functools.cache
def all_reported() -> dict[str, dict]:
    """All figures of the journal's and the papers', by key."""
    return yaml.safe_load((ROOT / "book" / "reported.yml").read_text(encoding="utf-8"))


def stored(profile_name: str, chapter: str) -> dict[str, dict]:
    """What a chapter published under another profile (`results/<profile>/<chapter>.json`); {} where it was not run."""
    path = ROOT / "results" / profile_name / f"{chapter}.json"
    return read(path)["values"] if path.exists() else {}


def read(path: Path) -> dict[str, dict]:
    """A results file: `values` by name, and their `provenance`."""
    return json.loads(path.read_text(encoding="utf-8"))


def result_file(
    profile_name: str, chapter: str, fresh: Path | None = None, parameters: dict | None = None
) -> Path | None:
    """The newest results of a chapter: in the folder `fresh`, unless what is published is of a later day.

    With `parameters`, the chapter's own, a fresh file counts only if it was made with them; a rehearsal never counts.
    """
    published = ROOT / "results" / profile_name / f"{chapter}.json"

    def counts(path: Path) -> bool:
        made = read(path)["provenance"]
        same = path == published or parameters is None or made["parameters"].items() <= parameters.items()
        return same and not made.get("rehearsal")

    found = [path for path in (fresh and fresh / published.name, published) if path and path.is_file() and counts(path)]
    return max(found, key=lambda path: read(path)["provenance"]["date"], default=None)


class Report:
    """The published values of one chapter under one profile, with their provenance.

    They go to `$SAELIB_RESULTS` (relative to the checkout), or else to `_build/results/<profile>`.
    """

    def __init__(self, chapter: str, profile: Profile, **parameters: object):
        """Start the clock. `parameters` are the notebook's own (`seed=seed`, ...): numbers and words, never paths."""
        self.chapter, self.profile = chapter, profile
        self.path = ROOT / os.environ.get("SAELIB_RESULTS", BUILD / "results" / profile.name) / f"{chapter}.json"
        self.values: dict[str, dict] = {}
        self.date = datetime.datetime.now(datetime.UTC).date().isoformat()
        """UTC day of this run, `YYYY-MM-DD`: the date of the chapter's entry."""
        self._started = time.perf_counter()
        self.provenance = {
            "date": self.date, **_commit(), "versions": versions(),
            "hardware": {"machine": platform.machine(), "cores": cores(), "gpu": None}, "device": None, "dtype": None,
            "seed": parameters.get("seed"), "parameters": parameters, "text": text_fingerprint(profile), "weights": {},
            **rehearsed(),
        }  # fmt: skip

    def uses(self, model, role: str = "model") -> None:
        """Record the fingerprint of a `TransformerBridge`'s weights, and the device and dtype that it computes in."""
        import torch

        from saelib.models import fingerprint

        weight = next(model.parameters())
        self.provenance["weights"][role] = fingerprint(model)
        self.provenance |= {"device": weight.device.type, "dtype": str(weight.dtype).removeprefix("torch.")}
        if weight.is_cuda:
            self.provenance["hardware"]["gpu"] = torch.cuda.get_device_name(weight.device)

    @property
    def fresh(self) -> Path | None:
        """Where the other chapters of this run leave their numbers; None in a re-run that checks what is published."""
        return None if (BUILD / "check") in self.path.resolve().parents else self.path.parent

    def stands_on(self, contents: Iterable[dict]) -> None:
        """Take over weights, device and dtype from chapters' results, all of them where chapters differ."""
        runs = [content["provenance"] for content in contents]
        roles = sorted({role for run in runs for role in run["weights"]})
        self.provenance["weights"] = {role: _all(run["weights"].get(role) for run in runs) for role in roles}
        self.provenance |= {key: _all(run[key] for run in runs) for key in ("device", "dtype")}

    def publish(
        self, name: str, value: Value, fmt: str = ".3f", se: float | None = None, n: int | None = None, unit: str = ""
    ) -> None:
        """Store one value, glue its text under the same name, and write the file.

        Args:
            value: a number, a word, None for "not run", or a list of numbers (a curve: stored, never glued).
            fmt: format of value and standard error in the text; whole numbers ignore the default.
            n: how many observations stand behind the value.
            unit: for the JSON; prose and captions name their units themselves.

        Raises:
            ValueError: a number is not finite. Publish None for what could not be measured.
        """
        value, se = _number(name, value), _number(name, se)
        text = None if isinstance(value, list) else render(value, fmt, se)
        self.values[name] = {"value": value, "se": se, "n": n, "unit": unit, "text": text}
        self.provenance["wall_seconds"] = round(time.perf_counter() - self._started, 1)
        content = {"chapter": self.chapter, "profile": self.profile.name, "values": self.values}
        content["provenance"] = self.provenance
        write({self.path: (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()})
        if text is not None and get_ipython() is not None:  # outside a notebook there is nobody to hand it to
            from myst_nb import glue

            glue(name, text, display=False)


def render(value: Value, fmt: str = ".3f", se: float | None = None) -> str:
    """The characters that stand in prose: `0.613`, `0.613 ± 0.004`, `12`, `not run`."""
    if value is None:
        return "not run"
    if isinstance(value, str):
        return value
    spec = "" if isinstance(value, int) and fmt == ".3f" else fmt
    return format(value, spec) + ("" if se is None else f" ± {format(se, fmt)}")


def _all(words: Iterable[str | None]) -> str | None:
    return ", ".join(sorted(set(filter(None, words)))) or None


def _number(name: str, value: object) -> object:
    """Plain Python from NumPy and PyTorch; floats to six significant digits, the rest is noise between machines."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_number(name, item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}: publish None for what could not be measured")
        return float(f"{value:.6g}")
    return value


# --- provenance -------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python, of this module, and of the packages that can move a number."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "transformer_lens")}
    return {"python": platform.python_version(), "saelib": __version__, **packages}


def rehearsed() -> dict[str, bool]:
    """`rehearsal` where a server on this machine stands in for the hub (`$HF_ENDPOINT`): its models are made up."""
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname or ""
    return {"rehearsal": True} if host in {"localhost", "::1"} or host.startswith("127.") else {}


def _commit() -> dict[str, str | bool | None]:
    """The commit that runs, and whether the checkout differs from it; None where this is no git checkout."""
    git = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    try:
        commit, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}


def cores() -> int | None:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
