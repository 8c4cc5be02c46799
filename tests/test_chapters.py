"""Chapters on another model: one of GPT-2 small's kind of profile, with BOS, without checkpoints or a second seed."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from saelib import runner
from saelib.models import load_tokenizer
from saelib.profile import load_profile

PROFILE = """\
extends: docstring-gpt
name: stranger
model: {{name: {folder}, checkpoints: null, second_seed: null}}
pretrain: null
hook: blocks.1.hook_resid_post
prepend_bos: true
saes:
  small: {{path: null}}
  large: {{path: null}}
  chapter: {{path: null}}
  small-seed-1: {{path: null}}
  small-step-0: {{path: null, checkpoint: null}}
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Chapters 01, 03, 05 and 11 of the stranger: what each published."""
    tmp_path = tmp_path_factory.mktemp("stranger")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=4096, n_positions=160, n_embd=48, n_layer=3, n_head=3, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    load_tokenizer(load_profile("docstring-gpt")).save_pretrained(tmp_path / "model")
    (tmp_path / "stranger.yml").write_text(PROFILE.format(folder=tmp_path / "model"))
    profile, out = str(tmp_path / "stranger.yml"), tmp_path / "out"
    runner.run(["01"], profile, ["n_sequences=64"], out=out)
    runner.run(["03"], profile, ["n_contexts=16", "n_few=8", "n_graft=4"], out=out)
    runner.run(["05"], profile, ["n_contexts=16", "n_moved=8"], out=out)
    runner.run(["11"], profile, ["n_train=32", "n_contexts=8"], out=out)
    files = (out / "results").glob("*.json")
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))["values"] for path in files}


def not_run(values):
    return {name for name, entry in values.items() if entry["text"] == "not run"}


@pytest.mark.slow
def test_chapter_01_runs_on_a_random_model_and_says_what_was_not_run(results):
    values = results["01_induction"]
    assert abs(values["loss_gap"]["value"]) < 0.1 and values["best_induction_score"]["value"] < 0.1
    missing = not_run(values)
    assert {"emergence_tokens", "law_tokens", "plain_gap", "second_seed_gap", "untrained_gap"} <= missing
    assert not {"ablation_drop", "copying_received", "path_k", "text_induction_score"} & missing


@pytest.mark.slow
def test_chapter_03_without_autoencoders_has_the_ablations(results):
    missing = not_run(results["03_delta_loss"])
    assert {"delta_small", "delta_large", "kl_small", "transplant_seed", "transplant_checkpoint"} <= missing
    assert not {"clean_ce", "delta_zero", "delta_mean", "delta_resample"} & missing


@pytest.mark.slow
def test_chapter_05_without_autoencoders_has_the_channels(results):
    missing = not_run(results["05_sparsity"])
    assert {"sparsity_small", "sparsity_edit_large", "sparsity_step_0", "sparsity_channels_untrained"} <= missing
    assert not {"sparsity_channels", "sparsity_index0_channels", "sparsity_hook_0", "even_gaussian"} & missing


@pytest.mark.slow
def test_chapter_11_without_autoencoders_steers_nothing(results):
    values = results["11_steering"]
    missing = not_run(values)
    assert {"steered_gain_small", "steered_gain_random", "steered_share", "breaks_at", "sparsity_rank"} <= missing
    assert not {"n_contexts", "rise", "n_random"} & missing
