"""How well a reconstruction stands for the activation: sums over a stream, one division at the end.

Standard errors come from contexts, not tokens: the tokens of a context resemble each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelib.activations import harvest
from saelib.profile import Profile
from saelib.sae import SAE, TINY


class Estimate(NamedTuple):
    """A value with its standard error."""

    value: float
    se: float


class NormalizedMse:
    """Squared error over that of predicting the mean: 1 for the mean predictor, 0 for the identity (section 2.1).

    Both sums run over all tokens given, and the mean is theirs, so the batches that they came in do not matter.
    """

    def __init__(self) -> None:
        self.errors: list[Tensor] = []
        self.squares: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.counts: list[Tensor] = []

    def add(self, x: Float[Tensor, "contexts pos d_model"], x_hat: Float[Tensor, "contexts pos d_model"]) -> None:
        """Take in contexts and their reconstructions, both in the space that errors are measured in."""
        x, x_hat = x.double(), x_hat.double()
        self.errors.append((x - x_hat).square().sum((1, 2)))
        self.squares.append(x.square().sum((1, 2)))
        self.sums.append(x.sum(1))
        self.counts.append(x.new_full((len(x),), x.shape[1]))

    def result(self) -> Estimate:
        """The ratio, and its standard error over contexts by the delta method."""
        error, square, total, count = map(torch.cat, (self.errors, self.squares, self.sums, self.counts))
        mean = total.sum(0) / count.sum()
        spread = square - 2 * total @ mean + count * mean.square().sum()
        ratio = error.sum() / spread.sum()
        return Estimate(ratio.item(), _clustered((error - ratio * spread) / spread.sum()))


def _clustered(influence: Float[Tensor, "contexts"]) -> float:
    """Standard error of a ratio of sums, from what each context pulls it by."""
    n = len(influence)
    return (influence.square().sum() * n / max(1, n - 1)).sqrt().item()


def in_unit_space(
    x: Float[Tensor, "*batch d_model"], x_hat: Float[Tensor, "*batch d_model"]
) -> tuple[Float[Tensor, "*batch d_model"], Float[Tensor, "*batch d_model"]]:
    """Both in the paper's space (section 2.1): less the activation's mean over d_model, over its norm."""
    mean = x.mean(-1, keepdim=True)
    norm = (x - mean).norm(dim=-1, keepdim=True).clamp_min(TINY)
    return (x - mean) / norm, (x_hat - mean) / norm


def mean(values: Float[Tensor, "n *rest"], where: Bool[Tensor, "n *rest"] | None = None) -> Estimate:
    """Mean over all tokens (those `where` says), and its standard error over contexts, the first dimension.

    NaN where there is nothing to average.
    """
    values = values.double().flatten(1)
    weight = torch.ones_like(values) if where is None else where.double().flatten(1)
    total, count = (values.nan_to_num() * weight).sum(1), weight.sum(1)
    if not count.sum():
        return Estimate(math.nan, math.nan)
    value = total.sum() / count.sum()
    return Estimate(value.item(), _clustered((total - value * count) / count.sum()))


@torch.no_grad()
def evaluate(sae: SAE, contexts: Iterable[Float[Tensor, "contexts pos d_model"]]) -> dict[str, float]:
    """Normalised MSE, L0, and the share of latents that never fire, on raw activations in contexts.

    Errors are measured in the paper's space, centred and scaled to norm 1 by the activation, whatever the SAE reads.
    """
    mse, active, tokens = NormalizedMse(), 0, 0
    fired = torch.zeros(sae.n_latents, dtype=torch.bool, device=sae.W_enc.device)
    for x in contexts:
        codes = sae.encode(x)
        mse.add(*in_unit_space(x, sae.decode(codes)))
        on = codes.values > 0
        active, tokens = active + on.sum().item(), tokens + on[..., 0].numel()
        fired |= on.flatten(0, 1).any(0) if codes.indices is None else _marked(codes.indices[on], sae.n_latents)
    value, se = mse.result()
    dead = 1 - fired.float().mean().item()
    return {"normalized_mse": value, "se": se, "l0": active / tokens, "dead_fraction": dead, "tokens": tokens}


def _marked(indices: Int[Tensor, "n"], size: int) -> Tensor:
    marks = torch.zeros(size, dtype=torch.bool, device=indices.device)
    marks[indices] = True
    return marks


def activations(profile: Profile, model, tokens: Int[Tensor, "n context"]) -> Iterable[Tensor]:
    """Activations at the profile's hook, 64 contexts at a time: [64, pos, d_model]."""
    for part in tokens.split(64):
        found = harvest(model, part, profile.hook, profile.activations.positions)
        yield found.view(len(part), -1, found.shape[-1])
