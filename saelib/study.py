"""What chapter 06 asks of a trained SAE: other k, shrinkage, outliers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelib import ops
from saelib.metrics import NormalizedMse
from saelib.sae import SAE


@torch.no_grad()
def at_other_k(sae: SAE, contexts: Sequence[Float[Tensor, "contexts pos d_model"]], ks: Sequence[int]) -> list[float]:
    """Normalised MSE of a TopK SAE that keeps another number of latents than it was trained for (section 5.3)."""
    estimates = [NormalizedMse() for _ in ks]
    for raw in contexts:
        x, _, _ = sae.normalized(raw)
        values, indices = ops.topk(sae.pre_activations(x), max(ks))
        for k, estimate in zip(ks, estimates, strict=True):
            estimate.add(x, ops.decode(values[..., :k].relu(), indices[..., :k], sae.W_dec) + sae.pre_bias)
    return [estimate.result().value for estimate in estimates]


class Refined(NamedTuple):
    """What became of a reconstruction when the latents' values were chosen anew."""

    mse: float
    """Normalised MSE with the best values."""
    norm: float
    """Mean norm of z W_dec with them, over that with the SAE's own: above 1 where the SAE shrinks."""


@torch.no_grad()
def refined(sae: SAE, x: Float[Tensor, "tokens d_model"], rounds: int = 500) -> Refined:
    """The best non-negative values for the latents that the SAE chose, its decoder unchanged (section 5.1).

    Non-negative least squares on each token's own support: projected gradient with Nesterov's momentum.
    """
    z = sae.encode(x, dense=True).values
    x, _, _ = sae.normalized(x)
    own, support = z.topk(max(1, int((z > 0).sum(1).max())))
    directions = sae.W_dec[support]
    gram = directions @ directions.mT
    wanted = directions @ (x - sae.pre_bias)[:, :, None]
    step = 1 / gram.abs().sum(2).amax(1)[:, None, None]
    used = (own > 0)[:, :, None]
    best = ahead = own[:, :, None]
    for number in range(rounds):
        moved = (ahead - step * (gram @ ahead - wanted)).relu_() * used
        best, ahead = moved, moved + number / (number + 3) * (moved - best)
    found, before = ((values.mT @ directions)[:, 0] for values in (best, own[:, :, None]))
    estimate = NormalizedMse()
    estimate.add(x[None], (found + sae.pre_bias)[None])
    return Refined(estimate.result().value, (found.norm(dim=1).mean() / before.norm(dim=1).mean()).item())


def outliers(sae: SAE, x: Float[Tensor, "tokens d_model"]) -> float:
    """|mu| / |sigma| of the activations as the SAE's encoder first sees them, less its pre-bias (arXiv 2605.31518)."""
    seen = (sae.normalized(x)[0] - sae.pre_bias.detach()).double()
    return (seen.mean(0).norm() / seen.std(0).norm()).item()
