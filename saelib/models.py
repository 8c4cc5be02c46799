"""Load the model under study into TransformerLens, and know which model it is.

A local folder in Hugging Face layout, a hub name, and a training checkpoint of either all take the same path:
Hugging Face loads the weights, `TransformerBridge` puts hooks on them. Weights stay raw, so the residual stream
equals the Hugging Face hidden states.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.model_registry.checkpoints import get_checkpoint_labels
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from saelib import UserError
from saelib.profile import ROOT, Profile, is_local
from saelib.remote import listing


class Checkpoint(NamedTuple):
    """One set of weights: where it is, and how far its training had come."""

    name: str
    """Local folder (absolute) or hub name."""
    revision: str | None
    step: int | None
    """Optimizer steps; None where the model does not say."""
    tokens: int | None
    """Training tokens seen; None where the profile does not know the batch."""


def pick_device(profile: Profile) -> str:
    """The profile's device (`auto`: a GPU where there is one), or `$SAELIB_DEVICE`. Raises UserError: not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = os.environ.get("SAELIB_DEVICE", profile.device)
    if wanted == "auto":
        return next(device for device, usable in there.items() if usable)
    if not there.get(wanted):
        usable = ", ".join(device for device in there if there[device])
        raise UserError(f"no {wanted} device here: set device to auto, or to one of {usable}")
    return wanted


def main_model(profile: Profile) -> Checkpoint:
    """The model the profile is about."""
    return _described(profile.model.name, profile.model.revision)


def second_seed(profile: Profile) -> Checkpoint | None:
    """The same recipe from another seed, or None where the profile has none."""
    return _described(profile.model.second_seed, None) if profile.model.second_seed else None


def checkpoints(profile: Profile) -> list[Checkpoint]:
    """Training checkpoints in order of steps, the final model last; empty where the profile has none.

    A folder holds one `step-NNNNNN` model each; a hub name has revisions whose steps TransformerLens lists.

    Raises:
        UserError: the folder holds no checkpoint, or nothing is known about the hub name's.
    """
    name = profile.model.checkpoints
    if name is None:
        return []
    if not is_local(name):
        return _revisions(profile, name)
    found = [_described(str(path), None) for path in _folder(name).glob("step-*") if path.is_dir()]
    if not found:
        raise UserError(f"no step-NNNNNN folder in {name}: fetch or train the checkpoints, or drop model.checkpoints")
    final = main_model(profile)
    steps = {checkpoint.step for checkpoint in found}
    return sorted(found + [final] * (final.step is not None and final.step not in steps), key=lambda c: c.step)


def _revisions(profile: Profile, name: str) -> list[Checkpoint]:
    try:
        labels, unit = get_checkpoint_labels(name)
    except ValueError as error:
        cure = "drop model.checkpoints, or name a folder"
        raise UserError(f"no training checkpoints are known for {name!r}: {cure}") from error
    batch, context = profile.model.training_batch, profile.model.training_context
    per_step = batch * context if batch and context else None
    if unit != "step":
        raise UserError(f"the checkpoints of {name!r} are named by {unit}, not by step: they cannot be used here")
    prefix = "checkpoint-" if name.startswith("stanford-crfm/") else "step"
    return [Checkpoint(name, f"{prefix}{step}", step, per_step and step * per_step) for step in labels]


def _folder(name: str) -> Path:
    path = ROOT / name  # an absolute name stays what it is
    if not path.is_dir():
        cure = "`git checkout models` restores the shipped one, `saelib pretrain` makes one"
        raise UserError(f"no model folder {name}: {cure}")
    return path


def _described(name: str, revision: str | None) -> Checkpoint:
    """A checkpoint with the training facts that our own folders carry in their config."""
    if not is_local(name):
        return Checkpoint(name, revision, None, None)
    config = _folder(name) / "config.json"
    try:
        facts = json.loads(config.read_text(encoding="utf-8")).get("training", {})
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{name} has no readable config.json: it is not a Hugging Face model folder") from error
    return Checkpoint(str(_folder(name)), None, facts.get("step"), facts.get("tokens"))


def load_tokenizer(profile: Profile) -> PreTrainedTokenizerBase:
    """The tokenizer of the profile's model, its checkpoints and second seed. Raises UserError: it cannot be read."""
    source = main_model(profile)
    _reach(source)
    try:
        return AutoTokenizer.from_pretrained(source.name, revision=source.revision)
    except Exception as error:  # a damaged tokenizer.json raises whatever its first broken part provokes
        problem = f"{_first_line(error)}; {_cure(profile, source)}"
        raise UserError(f"cannot load the tokenizer of {_short(source)}: {problem}") from error


def load_model(profile: Profile, checkpoint: Checkpoint | None = None) -> TransformerBridge:
    """The profile's model, or one of its checkpoints, in float32, on the profile's device, in eval mode.

    Raises:
        UserError: missing or damaged files, a tokenizer or context that does not fit, weights that are not finite.
    """
    source = checkpoint or main_model(profile)
    tokenizer = load_tokenizer(profile)
    _reach(source)
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source.name, revision=source.revision)
        model = AutoModelForCausalLM.from_pretrained(
            source.name, revision=source.revision, dtype=torch.float32, attn_implementation="eager"
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        problem = f"{_first_line(error)}; {_cure(profile, source)}"
        raise UserError(f"cannot load {_short(source)}: {problem}") from error
    _check_fit(profile, source, config, tokenizer, model)
    weights, device = _digest(model), pick_device(profile)  # before the bridge renames and splits the tensors
    given = {"hf_model": model.to(device), "tokenizer": tokenizer, "device": device}
    bridge = TransformerBridge.boot_transformers(source.name, **given)
    bridge.weights_fingerprint = weights
    return bridge.eval()


def _check_fit(profile: Profile, source: Checkpoint, config, tokenizer, model: torch.nn.Module) -> None:
    shown, longest = _short(source), getattr(config, "max_position_embeddings", None)
    wanted = max(profile.context_length, profile.induction_context)
    if longest is not None and wanted > longest:
        asked = f"profile {profile.name!r} asks for contexts of {wanted} tokens"
        raise UserError(f"{asked}, but {shown} takes at most {longest}")
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"the tokenizer of {shown} has {len(tokenizer)} tokens but the model only {config.vocab_size}")
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(f"{shown} holds weights that are not finite ({name}): fetch or train it again")


def fingerprint(model: TransformerBridge) -> str:
    """Start of the SHA-256 over the names and float32 weights that `load_model` read."""
    return model.weights_fingerprint


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _short(source: Checkpoint) -> str:
    """A model's name without the path of the checkout."""
    path, shown = Path(source.name), source.name
    if path.is_absolute():
        shown = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return f"model {shown}" + (f" at {source.revision}" if source.revision else "")


def _reach(source: Checkpoint) -> None:
    """Says at once what `transformers` would say in a minute: neither here nor to be had."""
    cached = is_local(source.name) or try_to_load_from_cache(source.name, "config.json", revision=source.revision)
    if not cached:
        listing(source.name, source.revision)


def _cure(profile: Profile, source: Checkpoint) -> str:
    only = " --only checkpoints" if source.revision != profile.model.revision else ""
    fetch = f"`saelib fetch --profile {profile.name}{only}` where there is a network"
    return "the files may be damaged or incomplete" if is_local(source.name) else fetch


def _first_line(error: Exception) -> str:
    """First line of an error, without the path of the checkout."""
    return (str(error).splitlines() or [type(error).__name__])[0].replace(f"{ROOT}/", "")
