"""Train docstring-gpt: an ordinary GPT-2, small enough for two CPU cores.

The recipe is the `pretrain` section of the profile. The learning rate is constant after a short warm-up and every
checkpoint is an average of the weights (EMA, bias-corrected), so each is as good as a run that had ended there.
Batches follow from (seed, step) alone, so a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from saelib import UserError
from saelib.profile import BUILD, Pretrain, Profile
from saelib.text import contexts, documents

END = "<|endoftext|>"
SAVE_EVERY = 500
"""Steps between resumable states."""
HELD_OUT = 512
"""Validation contexts behind every logged loss."""


def train_tokenizer(profile: Profile) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens, learned on the training documents, one special token."""
    learner = ByteLevelBPETokenizer()
    texts = (document.text for document in documents(profile, "train"))
    learner.train_from_iterator(texts, vocab_size=profile.pretrain.vocab_size, special_tokens=[END])
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
    return PreTrainedTokenizerFast(tokenizer_object=learner._tokenizer, **special)


def training_tokens(profile: Profile, tokenizer) -> np.ndarray:
    """All training documents as one array of token ids, cached."""
    cache = _cache(profile, "tokens").with_suffix(".npy")
    if not cache.is_file():
        texts = [document.text for document in documents(profile, "train", seed=0)]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        flat = np.concatenate([np.array([*row, tokenizer.eos_token_id], dtype=np.uint16) for row in ids])
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".partial.npy")
        np.save(partial, flat)
        partial.replace(cache)
    return np.load(cache)


def batch_at(
    tokens: np.ndarray, recipe: Pretrain, seed: int, step: int
) -> tuple[Int[Tensor, "batch context"], Int[Tensor, "batch context"]]:
    """Inputs and next-token targets of one step; a function of its arguments alone."""
    rng = np.random.default_rng((seed, step))
    length = recipe.context_length + 1
    starts = rng.integers(0, len(tokens) - length, recipe.batch)
    rows = np.stack([tokens[start : start + length] for start in starts]).astype(np.int64)
    for row in np.flatnonzero(rng.random(recipe.batch) < recipe.repeat_share):
        rows[row] = np.resize(rows[row, : rng.integers(16, 65)], length)
    window = torch.from_numpy(rows)
    return window[:, :-1], window[:, 1:]


def new_model(recipe: Pretrain, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 with seeded random weights; `gelu_pytorch_tanh` is GPT-2's `gelu_new` by its fused name."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=recipe.vocab_size, n_positions=recipe.context_length, n_embd=recipe.d_model,
        n_layer=recipe.n_layer, n_head=recipe.n_head, activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def loss_of(model: GPT2LMHeadModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, nats."""
    logits = model(inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Run:
    """One pre-training run: model, optimizer and weight average, saved and resumed together."""

    def __init__(self, recipe: Pretrain, seed: int, device: str, data: str = ""):
        """`data` is the fingerprint of the training tokens."""
        self.recipe, self.seed, self.device, self.data = recipe, seed, device, data
        self.step, self.seconds = 0, 0.0
        self.model = new_model(recipe, seed).to(device)
        self.parameters = list(self.model.parameters())
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, recipe.beta2), fused=True)
        self.average = [torch.zeros_like(p) for p in self.parameters]

    @property
    def tokens(self) -> int:
        """Training tokens seen."""
        return self.step * self.recipe.batch * self.recipe.context_length

    def advance(self, tokens: np.ndarray) -> float:
        """One optimizer step; returns the training loss in nats."""
        recipe, started = self.recipe, time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (self.step + 1) / recipe.warmup)
        inputs, targets = batch_at(tokens, recipe, self.seed, self.step)
        loss = loss_of(self.model, inputs.to(self.device), targets.to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - recipe.ema)
        self.step += 1
        self.seconds += time.perf_counter() - started
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()} at step {self.step}: lower pretrain.lr and start again")
        return loss.item()

    @torch.no_grad()
    def averaged(self) -> GPT2LMHeadModel:
        """The model with the bias-corrected average of its weights (the initial weights before the first step)."""
        model = new_model(self.recipe, self.seed).to(self.device).eval()
        if self.step:
            correction = 1 - self.recipe.ema**self.step
            for parameter, average in zip(model.parameters(), self.average, strict=True):
                parameter.copy_(average / correction)
        return model

    def identity(self) -> str:
        """What a resumed run must share."""
        return f"{self.recipe.model_dump_json()} seed {self.seed} data {self.data}"

    def save(self, path: Path) -> None:
        state = {
            "identity": self.identity(), "step": self.step, "seconds": self.seconds, "average": self.average,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Continue from a saved state. Raises UserError: the state belongs to another recipe, seed or text."""
        state = torch.load(path, weights_only=True, map_location=self.device)
        if state["identity"] != self.identity():
            raise UserError(f"{path} was made by another recipe, seed or text: choose another --out, or remove it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.step, self.seconds = state["step"], state["seconds"]


@torch.no_grad()
def validation_loss(model: GPT2LMHeadModel, held_out: Int[Tensor, "n context"]) -> float:
    """Mean cross-entropy over held-out contexts, nats."""
    batches = held_out.to(model.device).split(64)
    total = sum(loss_of(model, rows[:, :-1], rows[:, 1:]).item() * len(rows) for rows in batches)
    return total / len(held_out)


def export(model: GPT2LMHeadModel, folder: Path, facts: dict) -> None:
    """Write a Hugging Face folder in float16 with the training facts in its config; complete or not at all."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    model.config.activation_function = "gelu_new"
    model.config.update({"training": facts})
    model.to(torch.float16).save_pretrained(partial)
    (partial / "generation_config.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def pretrain(profile: Profile, out: Path, seed: int = 0, device: str = "cpu") -> None:
    """Train by the profile's recipe, resuming where an earlier run with the same `out` stopped.

    Writes `out/checkpoints/step-NNNNNN` for every checkpoint of the recipe, a line every 500 steps to `out/log.jsonl`,
    and at the end the final model with its tokenizer to `out` itself.

    Raises:
        UserError: the profile has no `pretrain` section, the loss is not finite, or `out` holds another run.
    """
    if profile.pretrain is None:
        raise UserError(f"profile {profile.name!r} has no pretrain section: its model is not trained here")
    torch.set_float32_matmul_precision("highest")
    recipe, state = profile.pretrain, out / "state.pt"
    tokenizer = _tokenizer(profile)
    tokens = training_tokens(profile, tokenizer)
    held_out = contexts(profile, tokenizer, "validation", HELD_OUT, context=recipe.context_length + 1)
    run = Run(recipe, seed, device, hashlib.sha256(tokens.tobytes()).hexdigest()[:16])
    out.mkdir(parents=True, exist_ok=True)
    if resumed := state.is_file():
        run.resume(state)
        _forget_after(out / "log.jsonl", run.step)
    losses: list[float] = []
    with tqdm(total=recipe.steps, initial=run.step, unit="step", mininterval=5) as bar:
        while run.step < recipe.steps:
            if not resumed and (run.step % SAVE_EVERY == 0 or run.step in recipe.checkpoints):
                _record(run, held_out, losses, out)
            resumed = False  # what was saved has been recorded
            losses.append(run.advance(tokens))
            bar.update()
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {run.tokens / run.seconds:,.0f} tokens/s", refresh=False)
    if not resumed:
        _record(run, held_out, losses, out)
    tokenizer.save_pretrained(out)
    final = _folder(out, run.step)
    if final.is_dir():  # not so where a finished run is started again
        for file in final.iterdir():
            file.replace(out / file.name)
        final.rmdir()


def _cache(profile: Profile, what: str) -> Path:
    """Where something made from the training text is kept; another text or vocabulary has another name."""
    digest = hashlib.sha256(f"{profile.pretrain.vocab_size}\0".encode())
    for document in documents(profile, "train"):
        digest.update(document.text.encode())
    return BUILD / "cache" / f"{what}-{digest.hexdigest()[:12]}"


def _tokenizer(profile: Profile) -> PreTrainedTokenizerFast:
    folder = _cache(profile, "tokenizer")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        train_tokenizer(profile).save_pretrained(partial)
        partial.rename(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _forget_after(log: Path, step: int) -> None:
    """Drop what was logged after the last saved state: the resumed run will log it again."""
    kept = [line for line in log.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
    partial = log.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(log)


def _folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:06d}"


def _record(run: Run, held_out: Tensor, losses: list[float], out: Path) -> None:
    """Write the checkpoint, where the schedule says so, then the log line, then the resumable state."""
    averaged, folder = run.averaged(), _folder(out, run.step)
    loss = round(validation_loss(averaged, held_out), 4)
    facts = {"step": run.step, "tokens": run.tokens, "seed": run.seed, "data": run.data, "validation_loss": loss}
    if run.step in run.recipe.checkpoints:
        folder.parent.mkdir(exist_ok=True)
        export(averaged, folder, {**facts, "recipe": run.recipe.model_dump(mode="json")})
    training_loss = round(float(np.mean(losses)), 4) if losses else None
    line = {**facts, "training_loss": training_loss, "seconds": round(run.seconds, 1)}
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    losses.clear()
    run.save(out / "state.pt")
