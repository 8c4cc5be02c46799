"""Scaling laws of sparse autoencoders (section 3): how the error falls with tokens, latents, sparsity and compute.

One run gives a whole curve: the learning rate is constant and the weights are averaged, so the average at any moment is
as good as a run that was ended there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from saelib.formats import save
from saelib.metrics import evaluate
from saelib.profile import Recipe
from saelib.train import SAMPLE, Source, Trainer


class Point(NamedTuple):
    """The averaged weights after some tokens, judged on held-out activations."""

    tokens: int
    mse: float
    """Normalised (section 2.1), with its standard error."""
    se: float
    dead: float
    """Share of latents that fire on none of the held-out tokens."""


def milestones(tokens: int, first: int, batch: int) -> list[int]:
    """Where a curve is read: `first` times powers of the root of 2, three quarters of the run, and its end.

    In steps.
    """
    points = {0.75 * tokens, tokens}
    while first < tokens:
        points.add(first)
        first *= 2**0.5
    return sorted({max(1, int(point // batch)) for point in points})


def trajectory(
    source: Source,
    recipe: Recipe,
    seed: int,
    judged: Sequence[Float[Tensor, "contexts pos d_model"]],
    first: int,
    out: Path | None = None,
) -> list[Point]:
    """Train one SAE, and judge its averaged weights on the way, from `first` tokens on.

    Args:
        judged: held-out activations.
        out: folder for the SAEs of all points, `<tokens>/` (float16).
    """
    trainer = Trainer(recipe, source.d_model, seed, source.sample(SAMPLE, seed))
    steps, points = milestones(recipe.tokens, first, recipe.batch), []
    with contextlib.closing(source.batches(recipe.batch, seed)) as batches:
        for step in tqdm(range(1, recipe.steps + 1), desc=f"n {recipe.n_latents}, k {recipe.k}", unit="step"):
            trainer.step(next(batches))
            if step in steps:
                sae, tokens = trainer.averaged(), step * recipe.batch
                found = evaluate(sae, judged)
                points.append(Point(tokens, found["normalized_mse"], found["se"], found["dead_fraction"]))
                if out is not None:
                    save(sae, out / str(tokens), torch.float16)
    return points
