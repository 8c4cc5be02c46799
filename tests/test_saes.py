"""The SAEs that ship with the book: what their cards say is so."""

import json
import warnings

import pytest

from saelib.metrics import activations, evaluate
from saelib.models import checkpoints, load_model, load_tokenizer
from saelib.profile import ROOT, Recipe, load_profile
from saelib.text import contexts
from saelib.train import load_sae, where

PROFILE = load_profile("docstring-gpt")
SHIPPED = [name for name in PROFILE.saes if where(PROFILE, name).exists()]


@pytest.fixture(scope="module")
def final():
    return load_model(PROFILE)


def test_the_reference_saes_are_there_and_small():
    assert set(SHIPPED) == set(PROFILE.saes) and not [n for n in SHIPPED if "_build" in where(PROFILE, n).parts]
    sizes = [(where(PROFILE, name) / "sae.safetensors").stat().st_size for name in SHIPPED]
    assert sum(sizes) <= 8 * 2**20 + 5 * 2048  # 8 MiB of float16 matrices, headers and biases


@pytest.mark.parametrize("name", SHIPPED)
def test_a_reference_sae_is_what_its_config_says(name, final):
    """It belongs to its model, was trained by the profile's recipe, and does as well as it says."""
    step = PROFILE.saes[name].checkpoint
    model = final if step is None else load_model(PROFILE, next(c for c in checkpoints(PROFILE) if c.step == step))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # loading on another model warns
        sae = load_sae(PROFILE, name, model)
    facts = sae.facts
    assert Recipe(**facts["recipe"]) == PROFILE.recipe_of(name)  # a field that came later has its default
    assert (facts["hook"], facts["seed"], facts.get("checkpoint")) == (PROFILE.hook, PROFILE.saes[name].seed, step)
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-3  # float16
    held_out = contexts(PROFILE, load_tokenizer(PROFILE), "validation", 512)
    found = evaluate(sae, activations(PROFILE, model, held_out))
    said = facts["metrics"]
    assert found["normalized_mse"] == pytest.approx(said["normalized_mse"], abs=5 * (found["se"] + said["se"]))
    assert found["l0"] == pytest.approx(16, abs=0.1)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_log_of_a_reference_sae_ends_flat(name):
    log = [json.loads(line) for line in (where(PROFILE, name) / "log.jsonl").read_text().splitlines()]
    recipe = PROFILE.recipe_of(name)
    assert log[-1]["step"] == recipe.steps and [line["step"] for line in log] == sorted(line["step"] for line in log)
    tenth = len(log) // 10
    before, last = (sum(line["mse"] for line in part) / tenth for part in (log[-2 * tenth : -tenth], log[-tenth:]))
    assert abs(last / before - 1) < (0.05 if name == "chapter" else 0.02)


def test_the_card_shows_the_numbers_of_the_configs():
    card = (ROOT / "models/docstring-gpt/sae/README.md").read_text()
    for name in SHIPPED:
        metrics = load_sae(PROFILE, name).facts["metrics"]
        row = next(line for line in card.splitlines() if line.startswith(f"| `{name}` "))
        for value in (f"{metrics['normalized_mse']:.4f} ± {metrics['se']:.4f}", f"{metrics['dead_fraction']:.1%}"):
            assert value in row
