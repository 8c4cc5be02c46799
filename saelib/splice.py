"""Run a model with an activation replaced: the layers below the hook once, those above it once per replacement.

`start_at_layer` of TransformerLens 4.3 re-enters a model in the middle, but runs the layers below all the same. Here
the blocks above are called one by one, with the arguments (mask, positions) that the model itself hands to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import Cache

from saelib import UserError, native
from saelib.activations import MODEL, SUB_BATCH, layer_above
from saelib.metrics import Estimate, NormalizedMse, in_unit_space, pieces
from saelib.ranks import here, shared, together

LOGITS = {"cpu": 2**20, "mps": 2**24, "cuda": 2**27}
"""Logits that are there together: few enough for the CPU's cache, enough to keep a GPU busy."""

Variant = Callable[[Float[Tensor, "n pos d_model"]], Float[Tensor, "n pos d_model"]]
"""What takes an activation's place: an SAE, the identity, an ablation.

One that draws or counts from call to call has an attribute `skip` besides, to be called with the shape [n, pos] of
contexts that another process takes.
"""


class Prefix(NamedTuple):
    """What the layers below a hook made of some contexts: all it takes to run on from there."""

    tokens: Int[Tensor, "n pos"]
    hook: str
    x: Float[Tensor, "n pos d_model"]
    """The activation at the hook."""
    residual: Float[Tensor, "n pos d_model"]
    """The residual stream before block `start`: the activation itself where the hook is at a block's end."""
    start: int
    arguments: tuple[tuple, dict]
    """What the model hands to its blocks besides the residual stream."""


@torch.no_grad()
def prefix(model, hook: str, tokens: Int[Tensor, "n pos"]) -> Prefix:
    """Run the layers up to a hook. Raises UserError: no such hook, in no block, or without a vector for each token."""
    above = layer_above(model, hook)
    if above is None:
        raise UserError(f"hook {hook!r} is in no block: name one that is, such as blocks.0.hook_resid_post")
    at_end = hook == f"blocks.{above - 1}.hook_resid_post"
    start = above if at_end else above - 1
    tokens = tokens.to(next(model.parameters()).device)
    calls: list[tuple[tuple, dict]] = []
    first = model.blocks[min(start, len(model.blocks) - 1)]  # it is called even where the run stops before it
    with MODEL:  # from before the hook is there: another thread may run the same model
        watch = first.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
        try:
            x = model.run_with_cache(tokens, names_filter=hook, stop_at_layer=above)[1].cache_dict[hook]
        finally:
            watch.remove()
    if x.dim() != 3 or x.shape[:-1] != tokens.shape:
        raise UserError(f"hook {hook!r} gives shape {list(x.shape)}, not a vector for each token: name another")
    (residual, *rest), named = calls[0]
    # without the cache: it would remember the keys and values of this run
    rest = tuple(None if isinstance(value, Cache) else value for value in rest)
    named = {name: None if isinstance(value, Cache) else value for name, value in named.items()}
    return Prefix(tokens, hook, x, x if at_end else residual, start, (rest, named))


@torch.no_grad()
def suffix(model, below: Prefix, x: Float[Tensor, "n pos d_model"]) -> Float[Tensor, "n pos vocab"]:
    """Logits with `x` in place of the activation at the hook."""
    with MODEL:
        return model.unembed(_last_norm(model, below, x))


def _last_norm(model, below: Prefix, x: Float[Tensor, "n pos d_model"]) -> Float[Tensor, "n pos d_model"]:
    """What is unembedded, with `x` in place of the activation at the hook."""
    rest, named = below.arguments
    at_end = below.residual is below.x
    residual = x if at_end else below.residual
    hooks = [] if at_end else [(below.hook, lambda _, hook: x)]
    with MODEL, model.hooks(fwd_hooks=hooks):
        for block in model.blocks[below.start :]:
            out = block(residual, *rest, **named)
            residual = out[0] if isinstance(out, tuple) else out
        return model.ln_final(residual)


# --- downstream loss --------------------------------------------------------------------------------------------------


class Downstream(NamedTuple):
    """What a replacement does to the model's predictions, token by token, and to the activation."""

    ce: Float[Tensor, "n pos-1"]
    """Cross-entropy, nats: entry j belongs to the prediction of token j + 1."""
    kl: Float[Tensor, "n pos"]
    """KL divergence from the untouched predictions to those with the replacement, nats."""
    agree: Float[Tensor, "n pos"]
    """1 where the likeliest token is still the same."""
    mse: Estimate
    """Normalised MSE of the replacement (section 2.1)."""


@torch.no_grad()
def downstream(
    model, hook: str, tokens: Int[Tensor, "n pos"], variants: Mapping[str, Variant]
) -> tuple[Float[Tensor, "n pos-1"], dict[str, Downstream]]:
    """Cross-entropy of the untouched model, and what each replacement at the hook does (section 4.1).

    All variants see the same tokens and share the run below the hook, so their differences are paired. Several
    processes share the contexts, and each has the whole result.

    Raises:
        UserError: see `prefix`; or a variant changes the shape, or gives values that are not finite.
    """
    each = -(-len(tokens) // here()[1])
    size = max(1, min(each, SUB_BATCH[next(model.parameters()).device.type] // tokens.shape[1]))
    found: list[Float[Tensor, "measure run n pos"]] = []
    errors = {name: NormalizedMse() for name in variants}
    skips = [variant.skip for variant in variants.values() if hasattr(variant, "skip")]
    parts = tqdm(tokens.split(size), desc=f"splicing at {hook}", unit="batch", leave=False)
    for part in shared(parts, lambda part: [skip(part.shape) for skip in skips]):
        below = prefix(model, hook, part)
        runs = [_last_norm(model, below, below.x)]
        for name, variant in variants.items():
            x_hat = _replaced(name, variant, below.x)
            errors[name].add(*in_unit_space(below.x, x_hat))
            runs.append(_last_norm(model, below, x_hat))
        found.append(_compared(model, torch.stack(runs), below.tokens).cpu())
    for error in errors.values():
        error.together()
    ce, kl, agree = torch.cat(together(found), dim=2)
    rows = zip(errors.items(), ce[1:, :, :-1], kl[1:], agree[1:], strict=True)
    return ce[0, :, :-1], {name: Downstream(*row, error.result()) for (name, error), *row in rows}


def _replaced(name: str, variant: Variant, x: Float[Tensor, "n pos d_model"]) -> Float[Tensor, "n pos d_model"]:
    x_hat = torch.cat([variant(part) for part in pieces(x.clone(), variant)])  # the next one gets it as it was
    if x_hat.shape != x.shape:
        raise UserError(f"{name} turns activations of shape {list(x.shape)} into {list(x_hat.shape)}: it does not fit")
    if not x_hat.isfinite().all():
        raise UserError(f"{name} gives values that are not finite: check its weights")
    return x_hat


def _compared(
    model, runs: Float[Tensor, "run n pos d_model"], tokens: Int[Tensor, "n pos"]
) -> Float[Tensor, "measure run n pos"]:
    """Cross-entropy (of no use at a context's last token), KL and agreement of each run, the untouched one first.

    A few tokens at a time, so that logits stay in the cache and are never all there at once.
    """
    rows = max(64, LOGITS[tokens.device.type] // model.cfg.d_vocab)  # fewer would only wait for the unembedding
    following = tokens.roll(-1, 1).flatten().split(rows)
    parts = runs.flatten(1, 2).split(rows, dim=1)
    found = [_compared_rows(model, *both) for both in zip(parts, following, strict=True)]
    return torch.cat(found, dim=2).unflatten(2, tokens.shape)


def _compared_rows(
    model, runs: Float[Tensor, "run rows d_model"], following: Int[Tensor, "rows"]
) -> Float[Tensor, "measure run rows"]:
    found, p = [], None
    for residual in runs:
        with MODEL:
            logits = model.unembed(residual[None])[0]
        if p is None:  # the untouched predictions, kept to compare the others with
            likeliest = logits.max(-1, keepdim=True).indices  # sooner than argmax
            p = logits.softmax(-1)
        top, lse, expected = native.predictions(logits, p) or statistics(logits, p)
        agree = logits.gather(-1, likeliest)[:, 0] == top
        right = logits.gather(-1, following[:, None])[:, 0] - top
        found.append(torch.stack([lse - right, lse - expected, agree.to(lse.dtype)]))  # of KL, the entropy is missing
    measures = torch.stack(found, dim=1)
    measures[1] -= measures[1, 0].clone()
    return measures


def statistics(
    logits: Float[Tensor, "rows vocab"], p: Float[Tensor, "rows vocab"]
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """Of every row: its maximum, and of what lies below it log-sum-exp and mean under p; the kernel's reference."""
    top = logits.amax(-1)
    below = logits - top[:, None]  # small numbers: else differences would lose digits
    return top, below.exp().sum(-1).log(), torch.linalg.vecdot(p, below)


# --- what may take an activation's place ------------------------------------------------------------------------------


def zero(x: Float[Tensor, "n pos d_model"]) -> Float[Tensor, "n pos d_model"]:
    """Zero ablation."""
    return torch.zeros_like(x)


def constant(value: Float[Tensor, "d_model"]) -> Variant:
    """The same vector everywhere: mean ablation, if it is the mean."""
    return lambda x: value.to(x).expand_as(x)


def only(positions: slice, variant: Variant) -> Variant:
    """A replacement at some positions; the others keep their activations."""

    def replaced(x: Float[Tensor, "n pos d_model"]) -> Float[Tensor, "n pos d_model"]:
        x = x.clone()
        x[:, positions] = variant(x[:, positions])
        return x

    if hasattr(variant, "skip"):
        replaced.skip = lambda shape: variant.skip((shape[0], len(range(shape[1])[positions])))
    return replaced


def resample(sample: Float[Tensor, "m d_model"], seed: int) -> Variant:
    """Resample ablation: at every token the activation of another one, drawn from `sample`."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: torch.Size) -> Int[Tensor, "n pos"]:
        return torch.randint(len(sample), shape, generator=generator)

    def replaced(x: Float[Tensor, "n pos d_model"]) -> Float[Tensor, "n pos d_model"]:
        return sample[drawn(x.shape[:-1])].to(x)

    replaced.skip = drawn
    return replaced
