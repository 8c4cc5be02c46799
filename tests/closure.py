"""What `requirements.lock` must hold: all that pyproject.toml asks for, directly or not, at the installed versions.

    .venv/bin/python tests/closure.py > requirements.lock     after trying new versions in .venv

For Linux and CPU, on Python 3.11 and 3.12 together. What a CUDA build of PyTorch asks for on top, and what other
systems need, pip adds by itself; so local version tags, `nvidia-*` and `triton` have no place here.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12")
HEADER = """\
# Every package pinned: what `make`, the workflows and environment.yml install. Python 3.11 and 3.12.
# Made by `.venv/bin/python tests/closure.py`; see CONTRIBUTING.md.
"""


def direct() -> list[Requirement]:
    """Requirements of saelib itself and of all its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def requirements_of(name: str, extras: frozenset[str] = frozenset()) -> Iterator[Requirement]:
    """Requirements of an installed package that hold on one of our Pythons."""
    for line in importlib.metadata.requires(name) or []:
        requirement = Requirement(line)
        if requirement.marker is None or any(
            requirement.marker.evaluate({**_environment(python), "extra": extra})
            for python in PYTHONS
            for extra in ("", *extras)
        ):
            yield requirement


def _environment(python: str) -> dict[str, str]:
    linux = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}
    return {**default_environment(), **linux, "python_version": python, "python_full_version": f"{python}.0"}


def closure() -> dict[str, str]:
    """Name and installed version, without local tag, of every package in the lock."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    pending = direct()
    while pending:
        requirement = pending.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen or name.startswith(("nvidia-", "cuda-")) or name == "triton":
            continue
        seen.add((name, extras))
        found[name] = importlib.metadata.version(name).split("+")[0]
        pending += requirements_of(name, extras)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    print(HEADER + "\n".join(f"{name}=={version}" for name, version in closure().items()))
