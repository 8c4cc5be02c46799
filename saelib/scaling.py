"""Scaling laws of sparse autoencoders (section 3): how the error falls with tokens, latents, sparsity and compute.

One run gives a whole curve: the learning rate is constant and the weights are averaged, so the average at any moment is
as good as a run that was ended there. Laws are fitted to the logarithm of the error, by a loss that a stray run moves
little, from several starts; their intervals come from refits to resampled residuals.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml
from jaxtyping import Float
from scipy.optimize import least_squares
from torch import Tensor
from tqdm import tqdm

from saelib.formats import save
from saelib.metrics import evaluate
from saelib.profile import ROOT, Recipe
from saelib.report import stored
from saelib.train import SAMPLE, Source, Trainer

CONVERGED = 0.01
"""A run has converged if its error fell by less than this share over the last quarter of its tokens."""
FEWEST = 12
"""Converged runs without which no joint law is fitted."""
STRAY = 0.03
"""Residuals of log error beyond which the fits count a run for less."""
Array = Float[np.ndarray, "runs"]


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


# --- the stored sweep -------------------------------------------------------------------------------------------------


def grid() -> dict:
    """The chapter's sweep as it is written down: `base`, and `variants` by name."""
    return yaml.safe_load((ROOT / "notebooks" / "sweeps" / "07_scaling.yml").read_text(encoding="utf-8"))


def curves(profile_name: str, d_model: int) -> pd.DataFrame:
    """All runs of the sweep that are stored, one row for each point of each: what `Point` has, and `flops` so far."""
    rows = []
    for variant, change in grid()["variants"].items():
        found = {name: entry["value"] for name, entry in stored(profile_name, f"07_sweep/{variant}").items()}
        n, k = change["recipe.n_latents"], change["recipe.k"]
        for seed, run in enumerate(zip(*(found[name] for name in ("mse", "se", "dead")), strict=True) if found else ()):
            rows += [(variant, n, k, seed, *point) for point in zip(found["tokens"], *run, strict=True)]
    table = pd.DataFrame(rows, columns=["variant", "n", "k", "seed", *Point._fields])
    return table.assign(flops=flops(table.n, table.k, d_model) * table.tokens)


def ends(points: pd.DataFrame) -> pd.DataFrame:
    """The last point of every run, the share by which its error fell over the last quarter, and whether that is little.

    One row for each n and k: seeds are averaged, and `spread` is the standard deviation of their log error.
    """
    last = points.groupby(["n", "k", "seed"], as_index=False).tail(1)
    then = points.merge(last[["n", "k", "seed", "tokens"]], on=["n", "k", "seed"], suffixes=("", "_end"))
    then = then[then.tokens <= 0.75 * then.tokens_end].groupby(["n", "k", "seed"]).mse.last()
    by_run = last.set_index(["n", "k", "seed"])
    by_run = by_run.assign(fall=1 - by_run.mse / then, log=np.log(by_run.mse.astype(float)))
    groups = by_run.groupby(["n", "k"])
    table = groups[["tokens", "flops", "mse", "se", "dead", "fall"]].mean()
    table = table.assign(seeds=groups.size(), spread=groups.log.std(), converged=table.fall < CONVERGED)
    return table.reset_index()


def flops(n_latents, k, d_model: int, dense: bool = False):
    """Floating-point operations of one token in training, forward and backward; two for each multiply and add.

    The encoder's forward pass scores every latent: 2 n d. All else touches k latents only: decoding, and the gradients
    of decoder, latents and encoder, 2 k d each. `dense`: as if it touched all, 6 for each of the 2 n d weights, which
    is what a plain implementation does. Neither counts the optimiser, AuxK, or the model that is read.
    """
    return 12 * n_latents * d_model if dense else 2 * d_model * (n_latents + 4 * k)


def frontier(points: pd.DataFrame) -> pd.DataFrame:
    """The points that no other beats with as little compute: lowest error so far, by `flops`."""
    points = points.sort_values(["flops", "mse"])
    return points[points.mse < points.mse.cummin().shift(fill_value=math.inf)]


# --- laws -------------------------------------------------------------------------------------------------------------


class Power(NamedTuple):
    """L(x) = exp(log_scale) x^-exponent + exp(log_floor)."""

    log_scale: float
    exponent: float
    log_floor: float = -math.inf

    def __call__(self, x: Array) -> Array:
        return np.exp(np.logaddexp(self.log_scale - self.exponent * np.log(x), self.log_floor))


class Joint(NamedTuple):
    """L(n, k) = exp(alpha + beta_k log k + beta_n log n + gamma log k log n) + exp(zeta + eta log k) (section 3).

    Ours, not the paper's, is `bend`: it times log^2 k is added within the first exponential.
    """

    alpha: float
    beta_k: float
    beta_n: float
    gamma: float
    zeta: float
    eta: float
    bend: float = 0.0

    def __call__(self, n: Array, k: Array) -> Array:
        log_n, log_k = np.log(n), np.log(k)
        falling = self.alpha + self.beta_k * log_k + self.beta_n * log_n + self.gamma * log_k * log_n
        return np.exp(np.logaddexp(falling + self.bend * log_k**2, self.zeta + self.eta * log_k))

    def floor(self, k: float) -> float:
        """The error that no number of latents takes away: the irreducible term."""
        return float(np.exp(self.zeta + self.eta * np.log(k)))

    def exponent(self, k: float) -> float:
        """How the reducible term falls with n at this k: n^-exponent."""
        return -float(self.beta_n + self.gamma * np.log(k))


Law = Power | Joint


def fit_power(x: Array, error: Array, floor: bool = False, start: Power | None = None) -> Power:
    """The power law nearest to the errors, with an irreducible term where `floor` says so."""
    shares = (0.1, 0.5, 0.9) if floor else (0.0,)
    starts = [
        [*np.polyfit(-np.log(x), np.log(error - s * error.min()), 1)[::-1], *_log(s * error.min())] for s in shares
    ]
    return _nearest(Power, (x,), error, [start[: 2 + floor], starts[0]] if start else starts)


def fit_joint(n: Array, k: Array, error: Array, bend: bool = False, start: Joint | None = None) -> Joint:
    """The joint law nearest to the errors (section 3); with `bend`, one that may curve in log k."""
    log_n, log_k = np.log(n), np.log(k)
    terms = np.stack([np.ones_like(log_n), log_k, log_n, log_n * log_k, *[log_k**2] * bend], axis=1)
    lowest = pd.Series(error).groupby(np.asarray(k)).transform("min").to_numpy()
    slope, level = np.polyfit(log_k, np.log(lowest), 1)
    starts = []
    for share in (0.1, 0.4, 0.7, 0.9):
        reducible = np.log(np.maximum(error - share * np.exp(level + slope * log_k), 0.02 * error))
        falling = np.linalg.lstsq(terms, reducible, rcond=None)[0]
        starts.append([*falling[:4], level + math.log(share), slope, *falling[4:]])
    return _nearest(Joint, (n, k), error, [start[: 6 + bend], starts[1]] if start else starts)


def _log(value: float) -> list[float]:
    return [math.log(value)] if value > 0 else []


def _nearest(law: type[Law], x: Sequence[Array], error: Array, starts: Sequence[Sequence[float]]) -> Law:
    """The best of least-squares fits in log error from several starts, with a loss that grows linearly for strays."""

    @np.errstate(over="ignore")  # a wild step is rejected
    def residuals(values: Sequence[float]) -> Array:
        return np.nan_to_num(np.log(law(*values)(*x)) - np.log(error))

    most = np.array([2.5 if name == "eta" else math.inf for name in law._fields])[: len(starts[0])]
    how = {"loss": "soft_l1", "f_scale": STRAY, "x_scale": "jac", "bounds": (-most, most)}  # else one k owns the floor
    found = [least_squares(residuals, np.clip(one, -most, most), **how, xtol=1e-10, ftol=1e-10) for one in starts]
    return law(*min(found, key=lambda one: one.cost).x.tolist())


def refits(
    fit: Callable[..., Law], law: Law, x: Sequence[Array], error: Array, times: int = 100, seed: int = 0
) -> list[tuple[Law, float]]:
    """Laws fitted to errors made anew: the law's own, times residuals drawn with replacement. With each one residual.

    Residuals are stretched by sqrt(m / (m - p)) for m runs and p parameters. What the law cannot fit is among them, so
    the spread of the refits is not that of seeds alone.
    """
    draw, expected = np.random.default_rng(seed), np.log(law(*x))
    free = sum(map(math.isfinite, law))
    left = (np.log(error) - expected) * math.sqrt(len(error) / max(1, len(error) - free))
    again = []
    for _ in range(times):
        drawn = draw.choice(left, len(left) + 1)
        again.append((fit(*x, np.exp(expected + drawn[1:]), start=law), float(drawn[0])))
    return again


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Standard deviation, and the ends of the middle 95 %."""
    return float(np.std(values, ddof=1)), *map(float, np.quantile(values, (0.025, 0.975)))


def foretold(runs: pd.DataFrame, bend: bool = False) -> pd.DataFrame | None:
    """The largest n, predicted by the joint law from all the smaller: `predicted` beside `mse`, and `off`, their ratio.

    `off_se` is the standard error of the prediction with the noise of one run; `as_before` is what one would be off by
    without a law, with the error of the next smaller n. None: fewer than `FEWEST` smaller runs are left.
    """
    known, asked = runs[runs.n < runs.n.max()], runs[runs.n == runs.n.max()]
    if len(known) < FEWEST:
        return None
    fit = functools.partial(fit_joint, bend=bend)
    x, error, at = _sizes(known), known.mse.to_numpy(float), _sizes(asked)
    law = fit(*x, error)
    again = [np.log(one(*at)) + residual for one, residual in refits(fit, law, x, error, times=40)]
    before = asked.k.map(known.sort_values("n").groupby("k").mse.last())
    table = asked.assign(predicted=law(*at), off=law(*at) / asked.mse - 1, as_before=before / asked.mse - 1)
    return table.assign(off_se=np.std(again, axis=0, ddof=1))


def joint_law(runs: pd.DataFrame, bend: bool = False) -> tuple[Joint, list[Joint]] | None:
    """The joint law of these runs and its refits; None with fewer than `FEWEST`."""
    if len(runs) < FEWEST:
        return None
    fit, x, error = functools.partial(fit_joint, bend=bend), _sizes(runs), runs.mse.to_numpy(float)
    law = fit(*x, error)
    return law, [one for one, _ in refits(fit, law, x, error)]


def _sizes(runs: pd.DataFrame) -> tuple[Array, Array]:
    return runs.n.to_numpy(float), runs.k.to_numpy(float)


# --- the bill ---------------------------------------------------------------------------------------------------------


def bill(
    sizes: Mapping[str, float],
    k: int,
    width: int,
    tokens: float,
    model: tuple[float, float],
    speed: float,
    price: float,
) -> pd.DataFrame:
    """What autoencoders of these many latents cost, one column each: all rows in the units that they name.

    Args:
        width: of the activation that is read, d_model.
        tokens: that an autoencoder trains on.
        model: parameters of the model that is read (those in use for a token), and tokens it was trained on.
        speed: operations per second of one GPU in use; price: of its hour, dollars.
    """
    parameters, trained_on = model
    reading, whole = 2 * parameters * tokens, 6 * parameters * trained_on
    columns = {}
    for name, n in sizes.items():
        sparse, dense = (flops(n, k, width, dense) * tokens for dense in (False, True))
        columns[name] = {
            "parameters": 2 * n * width + width, "over the model's parameters": (2 * n * width + width) / parameters,
            "training state, bytes": 20 * n * 2 * width, "training, FLOPs": sparse, "the same, dense count": dense,
            "reading the activations, FLOPs": reading, "GPU hours, all": (sparse + reading) / speed / 3600,
            "dollars, all": (sparse + reading) / speed / 3600 * price, "over the model's training": sparse / whole,
            "the same, dense count and reading": (dense + reading) / whole,
            "in use, over the model's own FLOPs per token": 2 * width * (n + k) / (2 * parameters),
        }  # fmt: skip
    return pd.DataFrame(columns)
