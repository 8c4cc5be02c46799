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
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from saelib import UserError, __version__
from saelib.profile import BUILD, ROOT, Local, Profile

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

NOT_RUN = "not run"
VERSIONS = ("torch", "transformers", "transformer_lens")
"""Packages whose version can move a number."""
WHOLE = 256 * 2**20
"""Files up to this many bytes are hashed by content, larger ones by size and time of change."""


def results_folder(profile: Profile) -> Path:
    """Where the chapters' numbers go: `$SAELIB_RESULTS` (relative to the checkout), or `_build/results/<profile>`."""
    chosen = os.environ.get("SAELIB_RESULTS")
    return ROOT / chosen if chosen else BUILD / "results" / profile.name


def reported(key: str) -> dict:
    """A figure of the journal's or a paper's: `value`, `unit`, `source` (a key of `book/references.bib`), `note`.

    Raises:
        UserError: `book/reported.yml` has no such figure.
    """
    figures = _reported()
    if key not in figures:
        raise UserError(f"book/reported.yml has no figure {key!r}: add it there, or choose one of {', '.join(figures)}")
    return dict(figures[key])


@functools.cache
def _reported() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "book" / "reported.yml").read_text(encoding="utf-8"))


class Report:
    """The published values of one chapter under one profile, with their provenance."""

    def __init__(self, chapter: str, profile: Profile, **parameters: object):
        """Start the clock. `parameters` are the notebook's own (`seed=seed`, ...); they are recorded as they are."""
        self.chapter, self.profile = chapter, profile
        self.path = results_folder(profile) / f"{chapter}.json"
        self.values: dict[str, dict] = {}
        self._started = time.perf_counter()
        self.provenance = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(), **_commit(), "versions": versions(),
            "hardware": {"machine": platform.machine(), "cores": cores(), "gpu": None}, "device": None, "dtype": None,
            "seed": parameters.get("seed"), "parameters": {name: _plain(value) for name, value in parameters.items()},
            "text": text_fingerprint(profile), "weights": {},
        }  # fmt: skip

    @property
    def date(self) -> str:
        """UTC day of this run, `YYYY-MM-DD`: the date of the chapter's entry."""
        return self.provenance["date"]

    def uses(self, model: TransformerBridge, role: str = "model") -> None:
        """Record the weights' fingerprint and, of the chapter's first model, device and dtype."""
        from saelib.models import fingerprint

        parameter = next(model.parameters())
        self.provenance["weights"][role] = fingerprint(model)
        if self.provenance["device"] is None:
            self.provenance |= {"device": parameter.device.type, "dtype": str(parameter.dtype).removeprefix("torch.")}
            self.provenance["hardware"]["gpu"] = _gpu(parameter.device)

    def publish(
        self,
        name: str,
        value: float | int | str | list | None,
        fmt: str = ".3f",
        se: float | None = None,
        n: int | None = None,
        unit: str = "",
    ) -> None:
        """Store one value and glue its text under the same name.

        Args:
            value: a number, a word, None for "not run", or a list of numbers (a curve: stored, never glued).
            fmt: format of numbers in the text; whole numbers ignore the default.
            se: standard error, rendered behind the value by the same format.
            n: how many observations stand behind the value.
            unit: for the JSON; prose and captions name their units themselves.

        Raises:
            ValueError: a number is not finite. Publish None for what could not be measured.
        """
        value, se = _number(name, value), _number(f"{name} (se)", se)
        text = None if isinstance(value, list) else render(value, fmt, se)
        self.values[name] = {"value": value, "se": se, "n": n, "unit": unit, "text": text}
        self._write()
        if text is not None:
            _glue(name, text)

    def _write(self) -> None:
        seconds = round(time.perf_counter() - self._started, 1)
        content = {
            "chapter": self.chapter, "profile": self.profile.name, "values": self.values,
            "provenance": {**self.provenance, "wall_seconds": seconds},
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(self.path)


def render(value: float | int | str | None, fmt: str = ".3f", se: float | None = None) -> str:
    """The characters that stand in prose: `0.613`, `0.613 ± 0.004`, `12`, `not run`."""
    if value is None:
        return NOT_RUN
    if isinstance(value, str):
        return value
    spec = "" if isinstance(value, int) and fmt == ".3f" else fmt
    return format(value, spec) + ("" if se is None else f" ± {format(se, fmt)}")


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


def _glue(name: str, text: str) -> None:
    """Hand the text to the book. Outside a notebook there is nobody to hand it to."""
    from IPython import get_ipython

    if get_ipython() is not None:
        from myst_nb import glue

        glue(name, text, display=False)


# --- provenance -------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python, of this module, and of the packages that can move a number."""
    found = {name: importlib.metadata.version(name) for name in VERSIONS}
    return {"python": platform.python_version(), "saelib": __version__, **found}


def text_fingerprint(profile: Profile) -> str:
    """Start of a SHA-256 that changes with the text: of local files the content, of other sources what pins them."""
    if isinstance(profile.text, Local):
        path = ROOT / profile.text.path
        return content_hash(path) if path.exists() else "absent"
    return hashlib.sha256(profile.text.model_dump_json().encode()).hexdigest()[:16]


def content_hash(path: Path) -> str:
    """Start of a SHA-256 over a file, or over the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            facts = file.stat()
            digest.update(f"{file.relative_to(path).as_posix()}\0{facts.st_size}\0".encode())
            if facts.st_size > WHOLE:
                digest.update(str(facts.st_mtime_ns).encode())
            else:
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _commit() -> dict[str, str | bool | None]:
    """The commit that runs, and whether tracked files differ from it; None where this is no git checkout."""
    top = _git("rev-parse", "--show-toplevel")
    commit = _git("rev-parse", "--verify", "HEAD") if top and Path(top).resolve() == ROOT else None
    return {"commit": commit, "dirty": commit and bool(_git("status", "--porcelain", "--untracked-files=no"))}


def _git(*arguments: str) -> str | None:
    try:
        ran = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def cores() -> int | None:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def _gpu(device) -> str | None:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _plain(value: object) -> object:
    """A parameter as JSON knows it; of an absolute path only the last part, for it may name a person."""
    value = _number("parameter", value)
    if isinstance(value, str | Path) and Path(value).is_absolute():
        return Path(value).name
    return value if isinstance(value, int | float | str | list | None) else str(value)
