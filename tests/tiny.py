"""A tiny GPT-2 with random weights, a text of its own, and a profile of both, in one folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from saelib.models import load_tokenizer
from saelib.profile import load_profile


def write(path: Path, rest: str, *, layers: int, length: int, documents: int, **config: object) -> Path:
    """Model, text (`documents` of `length` words) and `tiny.yml` in `path`; `rest` is what else the profile says."""
    torch.manual_seed(0)
    shape = {"vocab_size": 4096, "n_positions": 128, "n_embd": 8, "n_layer": layers, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, **config))
    model.save_pretrained(path / "model")
    load_tokenizer(load_profile("docstring-gpt")).save_pretrained(path / "model")
    words = "alpha beta gamma delta epsilon zeta eta theta".split()
    parts = [" ".join(words[(i * i + i * j + j) % 8] for j in range(length)) + f" {i}" for i in range(documents)]
    (path / "text.txt").write_text("\n\n".join(parts))
    (path / "tiny.yml").write_text(f"""
name: tiny
model: {{name: {path}/model}}
text: {{source: local, path: {path}/text.txt}}
hook: blocks.{layers - 2}.hook_resid_post
context_length: 16
device: cpu
{rest}""")
    return path
