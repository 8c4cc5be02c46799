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

from saelib import UserError
from saelib.activations import MODEL, SUB_BATCH, layer_above
from saelib.metrics import Estimate, NormalizedMse, in_unit_space

Variant = Callable[[Float[Tensor, "n pos d_model"]], Float[Tensor, "n pos d_model"]]
"""What takes an activation's place: an SAE, the identity, an ablation."""


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
    """Run the layers up to a hook.

    Raises:
        UserError: no such hook, one that is in no block, or one without a vector for each token.
    """
    above = layer_above(model, hook)
    if above is None:
        raise UserError(f"hook {hook!r} is in no block: name one that is, such as blocks.0.hook_resid_post")
    at_end = hook == f"blocks.{above - 1}.hook_resid_post"
    start = above if at_end else above - 1
    tokens = tokens.to(next(model.parameters()).device)
    calls: list[tuple[tuple, dict]] = []
    first = model.blocks[min(start, len(model.blocks) - 1)]  # it is called even where the run stops before it
    watch = first.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with MODEL:
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
    rest, named = below.arguments
    at_end = below.residual is below.x
    residual = x if at_end else below.residual
    hooks = [] if at_end else [(below.hook, lambda _, hook: x)]
    with MODEL, model.hooks(fwd_hooks=hooks):
        for block in model.blocks[below.start :]:
            out = block(residual, *rest, **named)
            residual = out[0] if isinstance(out, tuple) else out
        return model.unembed(model.ln_final(residual))


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

    All variants see the same tokens and share the run below the hook, so their differences are paired.

    Raises:
        UserError: see `prefix`; or a variant changes the shape, or gives values that are not finite.
    """
    size = max(1, SUB_BATCH[next(model.parameters()).device.type] // tokens.shape[1])
    clean: list[Tensor] = []
    found: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in variants}
    errors = {name: NormalizedMse() for name in variants}
    for part in tqdm(tokens.split(size), desc=f"splicing at {hook}", unit="batch", leave=False):
        below = prefix(model, hook, part)
        reference = _Reference(suffix(model, below, below.x), below.tokens)
        clean.append(reference.ce.cpu())
        for name, variant in variants.items():
            x_hat = _checked(name, variant(below.x), below.x)
            found[name].append(reference.compare(suffix(model, below, x_hat)))
            errors[name].add(*in_unit_space(below.x, x_hat))
    together = {name: map(torch.cat, zip(*parts, strict=True)) for name, parts in found.items()}
    return torch.cat(clean), {name: Downstream(*parts, errors[name].result()) for name, parts in together.items()}


def _checked(name: str, x_hat: Tensor, x: Tensor) -> Tensor:
    if x_hat.shape != x.shape:
        raise UserError(f"{name} turns activations of shape {list(x.shape)} into {list(x_hat.shape)}: it does not fit")
    if not x_hat.isfinite().all():
        raise UserError(f"{name} gives values that are not finite: check its weights")
    return x_hat


class _Reference:
    """Untouched predictions, kept so that each comparison is three passes over the other logits."""

    def __init__(self, logits: Float[Tensor, "n pos vocab"], tokens: Int[Tensor, "n pos"]):
        self.next, self.top = tokens[:, 1:, None], logits.argmax(-1)
        lse = logits.logsumexp(-1)
        self.p = (logits - lse[..., None]).exp_()
        self.entropy = lse - _dot(self.p, logits)
        self.ce = self._ce(logits, lse)

    def compare(self, logits: Float[Tensor, "n pos vocab"]) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy, KL and agreement."""
        lse = logits.logsumexp(-1)
        kl = lse - _dot(self.p, logits) - self.entropy
        return self._ce(logits, lse).cpu(), kl.cpu(), (logits.argmax(-1) == self.top).float().cpu()

    def _ce(self, logits: Tensor, lse: Tensor) -> Tensor:
        return lse[:, :-1] - logits[:, :-1].gather(-1, self.next)[..., 0]


def _dot(p: Float[Tensor, "n pos vocab"], logits: Float[Tensor, "n pos vocab"]) -> Float[Tensor, "n pos"]:
    """Sum over the vocabulary of p times logits, without a product as large as both."""
    return torch.linalg.vecdot(p, logits)


# --- what may take an activation's place ------------------------------------------------------------------------------


def zero(x: Float[Tensor, "n pos d_model"]) -> Float[Tensor, "n pos d_model"]:
    """Zero ablation."""
    return torch.zeros_like(x)


def constant(value: Float[Tensor, "d_model"]) -> Variant:
    """The same vector everywhere: mean ablation, if it is the mean."""
    return lambda x: value.to(x).expand_as(x)


def resample(sample: Float[Tensor, "m d_model"], seed: int) -> Variant:
    """Resample ablation: at every token the activation of another one, drawn from `sample`."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: sample[torch.randint(len(sample), x.shape[:-1], generator=generator)].to(x)
