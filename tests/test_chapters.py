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
"""


@pytest.mark.slow
def test_chapter_01_runs_on_a_random_model_and_says_what_was_not_run(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=4096, n_positions=160, n_embd=48, n_layer=3, n_head=3, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    load_tokenizer(load_profile("docstring-gpt")).save_pretrained(tmp_path / "model")
    (tmp_path / "stranger.yml").write_text(PROFILE.format(folder=tmp_path / "model"))
    runner.run(["01"], str(tmp_path / "stranger.yml"), ["n_sequences=64"], out=tmp_path / "out")
    values = json.loads((tmp_path / "out/results/01_induction.json").read_text())["values"]
    assert abs(values["loss_gap"]["value"]) < 0.1 and values["best_induction_score"]["value"] < 0.1
    not_run = {name for name, entry in values.items() if entry["text"] == "not run"}
    assert {"emergence_tokens", "law_tokens", "plain_gap", "second_seed_gap", "untrained_gap"} <= not_run
    assert not {"ablation_drop", "copying_received", "path_k", "text_induction_score"} & not_run
