"""The book on gpt2-small, against a hub of our own on loopback with a narrow GPT-2 (`rehearsal.local_hub`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from rehearsal import local_hub

from saelib.profile import ROOT, content_hash

LATENTS = {"small": 512, "large": 1024, "chapter": 512, "chapter-large": 1024}
NARROW = {
    "activations": {"block": 512},
    "recipe": {"batch": 2048, "tokens": 200_000, "k_aux": 16, "dead_after": 20_000},
    "saes": {name: {"recipe": {"n_latents": n}} for name, n in LATENTS.items()},
}
"""What a narrow stand-in cannot take over from the real profiles: sizes, and nothing else."""
SMALL = {
    "01": {"n_sequences": 64, "n_checkpoints": 4}, "02": {"n_contexts": 256, "n_planted": 64},
    "03": {"n_contexts": 128, "n_few": 32, "n_graft": 16}, "04": {"n_contexts": 64},
    "05": {"n_contexts": 32, "n_moved": 16, "n_faces": 64},
    "06": {"tokens": 40_000, "brief": 10_000, "n_contexts": 128}, "07": {}, "08": {"n_train": 100, "n_test": 100},
    "09": {"n_latents": 8, "n_train": 128, "n_test": 64, "n_loss": 16}, "10": {"n_contexts": 64, "n_live": 8},
    "11": {"n_train": 128, "n_contexts": 2, "n_latents": 8}, "12": {},
}  # fmt: skip
"""Parameters of each chapter that make it run in a minute on one core."""


def narrow(folder: Path, name: str, **text: int) -> Path:
    """The profile with the sizes of the stand-in."""
    path = folder / f"narrow-{name}.yml"
    path.write_text(yaml.safe_dump({"extends": name, "name": name, **NARROW, "text": text}))
    return path


def saelib(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """The command, in a process of its own: the hub's client reads the environment when it is imported."""
    command = [sys.executable, "-m", "saelib.cli", *map(str, arguments)]
    quiet = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "SAELIB_DEVICE": "cpu"}
    return subprocess.run(command, env=os.environ | quiet | environment, capture_output=True, text=True)


def done(*arguments: object, **environment: str) -> str:
    ran = saelib(*arguments, **environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def run(chapter: str, profile: Path, *more: str, **environment: str) -> str:
    pairs = [word for key, value in SMALL[chapter].items() for word in ("-p", f"{key}={value}")]
    return done("run", chapter, "--profile", profile, *pairs, *more, **environment)


def results(build: Path, name: str) -> dict[str, dict]:
    """What the chapters of a profile published, by number; everything in them is marked."""
    found = {path.stem[:2]: json.loads(path.read_text()) for path in (build / "results" / name).glob("*.json")}
    assert all(one["profile"] == name and one["provenance"]["rehearsal"] is True for one in found.values())
    return {chapter: {key: entry["value"] for key, entry in one["values"].items()} for chapter, one in found.items()}


def refused(profile: Path, **environment: str) -> None:
    """Neither published nor shown."""
    before = content_hash(ROOT / "results")
    for command in ("publish", "book"):
        ran = saelib(command, "--profile", profile, **environment)
        assert ran.returncode == 2 and ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
        assert "rehearsed" in ran.stderr
    assert content_hash(ROOT / "results") == before


def glued(notebook: Path) -> tuple[set[str], set[str]]:
    """Names that the prose of an executed notebook asks for, and those that its cells have handed over."""
    cells = nbformat.read(notebook, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    names = {output.get("metadata", {}).get("scrapbook", {}).get("name") for output in outputs}
    return set(re.findall(r"\{glue:\w+\}`(\w+)(?::\w+)?`", prose)), names


def test_one_chapter_from_the_hub_and_then_without_it(tmp_path):
    profile = narrow(tmp_path, "gpt2-small", evaluation_documents=300)
    tiny = ("-p", "n_contexts=48", "-p", "n_planted=16")
    with local_hub(tmp_path, n_embd=16, documents=900, n_shards=2) as hub:
        done("fetch", "--profile", profile)
    offline = hub.environment | {"HF_HUB_OFFLINE": "1"}
    assert "done" in done("run", "02", "--profile", profile, *tiny, **offline)
    found = results(tmp_path / "build", "gpt2-small")["02"]
    assert found["mse_small"] > 0 and found["mse_large"] > 0
    assert [found[f"mse_{name}"] for name in ("chapter", "small_seed_1", "small_step_0")] == [None] * 3
    refused(profile, **offline)


@pytest.mark.long
def test_the_whole_book(tmp_path):
    profiles = [
        narrow(tmp_path, name, documents=40_000, tokens=4_000_000) for name in ("gpt2-small", "stanford-gpt2-small-a")
    ]
    before, build = content_hash(ROOT / "results"), tmp_path / "build"
    with local_hub(tmp_path, n_embd=48) as hub:
        for profile in profiles:
            done("fetch", "--profile", profile)
        for chapter in SMALL:
            run(chapter, profiles[0])
        for chapter in ("01", "04"):
            run(chapter, profiles[1])
    run("02", profiles[0], "--force", **hub.environment, HF_HUB_OFFLINE="1")
    check_own(build)
    check_checkpoints(results(build, "stanford-gpt2-small-a"))
    for profile in profiles:
        refused(profile, **hub.environment)
    assert content_hash(ROOT / "results") == before


def check_own(build: Path) -> None:
    """All twelve chapters under gpt2-small: run, without a name missing, and "not run" where there was nothing."""
    notebooks = sorted((build / "runs" / "gpt2-small").glob("*.ipynb"))
    assert [path.stem[:2] for path in notebooks] == list(SMALL)
    for path in notebooks:
        assert nbformat.read(path, as_version=4).metadata["saelib"]["state"] == "done"
        asked, there = glued(path)
        assert asked <= there, f"{path.stem}: {sorted(asked - there)}"
    found = results(build, "gpt2-small")
    for chapter, name in {"02": "mse_small", "03": "delta_large", "05": "sparsity_small", "09": "recall_live"}.items():
        assert found[chapter][name] is not None
    missing = {
        "01": "emergence_tokens", "02": "mse_small_seed_1", "03": "transplant_seed", "04": "equivalent_small",
        "05": "sparsity_step_0", "06": "whole_mse", "07": "exponent_n", "08": "probe_small", "09": "precision_small",
        "10": "matched_share", "11": "steered_gain_seed_1", "12": "mse_small",
    }  # fmt: skip
    assert [found[chapter][name] for chapter, name in missing.items()] == [None] * len(missing)
    assert {value for name, value in found["12"].items() if name.startswith("verdict")} == {"not run"}


def check_checkpoints(found: dict[str, dict]) -> None:
    """Chapters 01 and 04 under Stanford's names: a curve over the training, and a search among 609 revisions."""
    assert len(found["01"]["history_tokens"]) == len(found["01"]["history_gap"]) == SMALL["01"]["n_checkpoints"]
    assert found["04"]["n_checkpoints"] == 609
    assert 3 <= found["04"]["loads"] <= 13
