"""requirements.lock, pyproject.toml, environment.yml, the hooks and the corpus agree."""

import re
import sys

import pytest
import yaml
from closure import ROOT, closure, direct
from packaging.utils import canonicalize_name

from saelib.profile import load_profile

LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCK = dict(line.split("==") for line in LINES)


def test_every_line_is_one_public_version():
    for line in LINES:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), line  # no local tag, no hash, no URL, no marker
    assert sorted(LOCK) == list(LOCK) and len(LOCK) == len(LINES)
    assert not [name for name in LOCK if name.startswith(("nvidia-", "cuda-")) or name == "triton"]
    assert LOCK["torch"] == "2.13.0"


def test_it_satisfies_pyproject():
    for requirement in direct():
        assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)]), requirement


@pytest.mark.skipif(sys.platform != "linux", reason="the closure is that of Linux")
def test_it_is_what_the_project_needs_and_what_is_installed():
    assert closure() == LOCK, "tests/closure.py > requirements.lock"


def test_the_corpus_reads_the_locked_versions():
    for name, package in load_profile("docstring-gpt").text.packages.items():
        assert LOCK[canonicalize_name(package.distribution or name)] == package.version, name


def test_conda_installs_the_lock_and_this_package():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert "python=3.12" in dependencies
    pip = next(item["pip"] for item in dependencies if isinstance(item, dict))
    assert pip == ["--extra-index-url https://download.pytorch.org/whl/cpu", "-r requirements.lock", "-e ."]


def test_hooks_are_the_locked_versions():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in hooks:
        name = hook["hooks"][0]["id"].split("-")[0]
        assert hook["rev"].removeprefix("v") == LOCK[name]
