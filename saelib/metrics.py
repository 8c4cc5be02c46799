"""How well a reconstruction stands for the activation: sums over a stream, one division at the end.

Standard errors come from blocks of contexts, not tokens: the tokens of a context resemble each other, and contexts that
are cut one after the other from the same documents do, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from saelib import UserError
from saelib.activations import harvest
from saelib.profile import Profile
from saelib.ranks import everyone, here, shared, together
from saelib.sae import SAE, TINY

About = Literal["mean", "last", "zero"]
"""What a spread is measured from: the mean of all activations, that of each context's last one, or nothing."""
BLOCK = 8
"""Neighbouring contexts that count as one when it comes to standard errors: together longer than most documents."""
LATENTS = 2**28
"""Latents times tokens that are computed together: 1 GiB before the top k are chosen."""


class Estimate(NamedTuple):
    """A value with its standard error."""

    value: float
    se: float


class Spread:
    """Squared distances of activations from a point chosen at the end, summed over a stream: errors' divisor."""

    def __init__(self) -> None:
        self.sums: list[tuple[Tensor, ...]] = []
        """For each part of the stream: squared lengths, sums, last activations and token counts of its contexts."""

    def add(self, x: Float[Tensor, "contexts pos d_model"]) -> None:
        """Take in contexts."""
        x = precise(x)
        count = torch.full((len(x),), x.shape[1], dtype=torch.float64)
        self.sums.append((torch.linalg.vecdot(x, x).sum(1).cpu(), x.sum(1).cpu(), x[:, -1].cpu().clone(), count))

    def result(self, about: About) -> Float[Tensor, "contexts"]:
        """For each context the sum over its tokens."""
        square, total, end, count = map(torch.cat, zip(*self.sums, strict=True))
        points = {"mean": total.sum(0) / count.sum(), "last": end.mean(0), "zero": torch.zeros_like(end[0])}
        point = points[about]
        return square - 2 * total @ point + count * point.square().sum()


class NormalizedMse:
    """Squared error over that of predicting the mean of all tokens given: 1 for that mean, 0 if exact (section 2.1)."""

    def __init__(self) -> None:
        self.errors: list[Tensor] = []
        self.spread = Spread()

    def add(self, x: Float[Tensor, "contexts pos d_model"], x_hat: Float[Tensor, "contexts pos d_model"]) -> None:
        """Take in contexts and their reconstructions, both in the space that errors are measured in."""
        self.errors.append(squared_error(x, x_hat).sum(1).cpu())
        self.spread.add(x)

    def together(self) -> None:
        """Take in what the other processes found in their shared parts."""
        self.errors, self.spread.sums = together(self.errors), together(self.spread.sums)

    def result(self) -> Estimate:
        """The ratio, and its standard error over contexts."""
        return ratio(torch.cat(self.errors), self.spread.result("mean"))


def squared_error(
    x: Float[Tensor, "*batch d_model"], x_hat: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch"]:
    """Squared length of the difference, each token's by itself, in float64."""
    error = precise(x) - precise(x_hat)
    return torch.linalg.vecdot(error, error)


def ratio(parts: Float[Tensor, "contexts *rest"], whole: Float[Tensor, "contexts *rest"]) -> Estimate:
    """One sum divided by another, from the same contexts; standard error by the delta method, over `blocks`."""
    parts, whole = (precise(values).reshape(len(values), -1).sum(1) for values in (parts, whole))
    value = parts.sum() / whole.sum()
    pull = blocks((parts - value * whole) / whole.sum())
    return Estimate(value.item(), (pull.square().sum() * len(pull) / max(1, len(pull) - 1)).sqrt().item())


def blocks(values: Float[Tensor, "contexts *rest"]) -> Float[Tensor, "blocks *rest"]:
    """Sums over runs of `BLOCK` neighbouring contexts (fewer where that would leave under 8 blocks)."""
    size = min(BLOCK, max(1, len(values) // 8))
    which = torch.arange(len(values), device=values.device) // size
    return values.new_zeros(-(-len(values) // size), *values.shape[1:]).index_add_(0, which, values)


def precise(values: Tensor) -> Float[Tensor, "*shape"]:
    """In float64, on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


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
    weight = torch.ones_like(values) if where is None else where.to(values)
    if not weight.any():
        return Estimate(math.nan, math.nan)
    return ratio(values.where(weight > 0, 0), weight)


def median(draws: Float[Tensor, "n"]) -> Estimate:
    """Median of independent draws. Standard error: the number of draws below it varies by half the root of n, so half
    the distance between those that lie so many places to either side. 0 where these are equal.
    """
    reach = 0.5 / math.sqrt(len(draws))
    places = torch.tensor([0.5 - reach, 0.5, 0.5 + reach], dtype=torch.float64, device=draws.device)
    low, value, high = precise(draws).quantile(places).tolist()
    return Estimate(value, (high - low) / 2)


class Reconstruction(NamedTuple):
    """What one pass over activations says about an SAE."""

    error: Float[Tensor, "n pos"]
    """Squared error of each token, raw units, float64."""
    active: Float[Tensor, "n pos"]
    """Latents above 0."""
    rate: Float[Tensor, "n_latents"]
    """Share of the tokens on which each latent is above 0."""
    mse: Estimate
    """Normalised MSE in the paper's space, centred and scaled to norm 1 by the activation, whatever the SAE reads."""

    @property
    def dead(self) -> float:
        """Share of latents that fire on none of the tokens."""
        return (self.rate == 0).double().mean().item()


@torch.no_grad()
def reconstruct(sae: SAE, contexts: Iterable[Float[Tensor, "contexts pos d_model"]]) -> Reconstruction:
    """Encode and decode raw activations, keeping numbers per token and per latent. Raises UserError: see `pieces`.

    Several processes give the same contexts, share them, and each has the whole result.
    """
    errors, active, fired, mse = [], [], torch.zeros(sae.n_latents, dtype=torch.int64), NormalizedMse()
    batches = tqdm(contexts, desc="reconstructing", unit="batch", leave=False)
    for x in shared(x for batch in batches for x in pieces(batch, sae)):
        codes = sae.encode(x)
        x_hat, on = sae.decode(codes), codes.values > 0
        mse.add(*in_unit_space(x, x_hat))
        errors.append(squared_error(x, x_hat).cpu())
        active.append(on.sum(-1).cpu())
        if codes.indices is None:
            fired += on.flatten(0, -2).sum(0).cpu()
        else:
            fired += torch.bincount(codes.indices[on].cpu(), minlength=sae.n_latents)
    mse.together()
    error, active, fired = torch.cat(together(errors)), torch.cat(together(active)), sum(together([fired]))
    return Reconstruction(error, active.double(), fired / error.numel(), mse.result())


def pieces(x: Float[Tensor, "n pos d_model"], variant) -> tuple[Float[Tensor, "few pos d_model"], ...]:
    """Activations in parts whose latents all fit into memory. Raises UserError: the SAE reads another width."""
    width = getattr(variant, "d_model", x.shape[-1])
    if width != x.shape[-1]:
        raise UserError(f"the SAE reads vectors of {width} entries, not {x.shape[-1]}: take one of this model and hook")
    return x.split(max(1, LATENTS // (getattr(variant, "n_latents", 1) * x.shape[1])))


def evaluate(sae: SAE, contexts: Iterable[Float[Tensor, "contexts pos d_model"]]) -> dict[str, float]:
    """`reconstruct` in five numbers: normalised MSE with its standard error, L0, share of dead latents, tokens."""
    found = reconstruct(sae, contexts)
    sizes = {"l0": found.active.mean().item(), "dead_fraction": found.dead, "tokens": found.error.numel()}
    return {"normalized_mse": found.mse.value, "se": found.mse.se, **sizes}


def activations(profile: Profile, model, tokens: Int[Tensor, "n context"]) -> Iterable[Tensor]:
    """Activations at the profile's hook, 64 contexts at a time: [64, pos, d_model].

    Several processes take turns, and give all of it to each other; what is left over each harvests by itself.
    """

    def one(part: Int[Tensor, "few context"]) -> Float[Tensor, "few pos d_model"]:
        found = harvest(model, part, profile.hook, profile.activations.positions)
        return found.view(len(part), -1, found.shape[-1])

    (rank, size), parts = here(), tokens.split(64)
    even = len(tokens) // (64 * size) * size
    for first in range(0, even, size):
        yield from everyone(one(parts[first + rank]))
    yield from map(one, parts[even:])
