"""Scaling laws of sparse autoencoders (section 3): how the error falls with tokens, latents, sparsity and compute.

One run gives a whole curve: the learning rate is constant and the weights are averaged, so the average at any moment is
as good as a run that was ended there. Laws are fitted to the logarithm of the error, by a loss that a stray run moves
little; their intervals come from refits to errors whose residuals change sign at random (a wild bootstrap).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
REFITS = 100
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
            rows += [(n, k, seed, *point) for point in zip(found["tokens"], *run, strict=True)]
    table = pd.DataFrame(rows, columns=["n", "k", "seed", *Point._fields])
    return table.assign(flops=flops(table.n, table.k, d_model) * table.tokens)


def ends(points: pd.DataFrame) -> pd.DataFrame:
    """The last point of every run, the share by which its error fell over the last quarter, and whether that is little.

    One row for each n and k: seeds are averaged, and `spread` is the standard deviation of their log error.
    """
    run = ["n", "k", "seed"]
    last = points.groupby(run).last()
    before = points[points.tokens <= 0.75 * points.groupby(run).tokens.transform("max")].groupby(run).mse.last()
    last = last.assign(fall=1 - last.mse / before, log=np.log(last.mse.astype(float)))
    groups = last.groupby(["n", "k"])
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
    """L(n, k) = exp(alpha + beta_k log k + beta_n log n + gamma log k log n) + exp(zeta + eta log k) (section 3)."""

    alpha: float
    beta_k: float
    beta_n: float
    gamma: float
    zeta: float
    eta: float

    def at(self, k: float | Array) -> Power:
        """The law of n at one k."""
        at = np.log(k)
        return Power(self.alpha + self.beta_k * at, -self.beta_n - self.gamma * at, self.zeta + self.eta * at)

    def __call__(self, n: Array, k: Array) -> Array:
        return self.at(k)(n)


Law = Power | Joint


class Fit(NamedTuple):
    """A law, and how far it can be trusted."""

    law: Law
    again: list[Law]
    """Fitted to errors made anew: the law's own, times its residuals with random signs, one sign for each run."""
    off: float
    """Root mean square of the residuals of log error."""
    worst: float

    def reading(self, read: Callable[[Law], float]) -> tuple[float, float, float, float]:
        """Something read off the law: its value, standard error, and the ends of its 95 % interval."""
        values = [read(law) for law in self.again]
        return read(self.law), float(np.std(values, ddof=1)), *map(float, np.quantile(values, (0.025, 0.975)))


def fit(nearest: Callable[..., Law], x: Sequence[Array], error: Array, run: Array | None = None) -> Fit:
    """Fit a law by `nearest(*x, error)`, then `REFITS` times again.

    What the law cannot fit is among the residuals, so the spread of the refits is not that of seeds alone. They are
    stretched by the degrees of freedom that the fit has taken.

    Args:
        run: the run that each point belongs to; by default every point is a run of its own.
    """
    law = nearest(*x, error)
    expected, free = np.log(law(*x)), sum(map(math.isfinite, law))
    left = np.log(error) - expected
    runs = pd.factorize(np.arange(len(left)) if run is None else run)[0]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (REFITS, runs.max() + 1))[:, runs]
    drawn = signs * left * math.sqrt(len(left) / max(1, len(left) - free))
    again = [nearest(*x, np.exp(expected + one)) for one in drawn]
    return Fit(law, again, float(np.sqrt(np.square(left).mean())), float(np.abs(left).max()))


def fit_power(x: Array, error: Array, floor: bool = False) -> Power:
    """The power law nearest to the errors, with an irreducible term where `floor` says so."""
    starts = []
    for share in (0.1, 0.5, 0.9) if floor else (0.0,):
        slope, level = np.polyfit(np.log(x), np.log(error - share * error.min()), 1)
        starts.append([level, -slope, *np.log([share * error.min()] * floor)])
    return _nearest(Power, (x,), error, starts)


def fit_joint(n: Array, k: Array, error: Array) -> Joint:
    """The joint law nearest to the errors (section 3)."""
    log_n, log_k = np.log(n), np.log(k)
    terms = np.stack([np.ones_like(log_n), log_k, log_n, log_n * log_k], axis=1)
    lowest = pd.Series(error).groupby(k).transform("min").to_numpy()
    slope, level = np.polyfit(log_k, np.log(lowest), 1)
    starts = []
    for share in (0.1, 0.8):  # of the lowest error at each k that is irreducible
        reducible = np.log(np.maximum(error - share * np.exp(level + slope * log_k), 0.02 * error))
        starts.append([*np.linalg.lstsq(terms, reducible, rcond=None)[0], level + math.log(share), slope])
    return _nearest(Joint, (n, k), error, starts)


def _nearest(law: type[Law], x: Sequence[Array], error: Array, starts: Sequence[Sequence[float]]) -> Law:
    """The best of least-squares fits in log error from several starts, with a loss that grows linearly for strays."""

    def residuals(values: Sequence[float]) -> Array:
        return np.nan_to_num(np.log(law(*values)(*x)) - np.log(error))

    # without a bound of ours on eta, one k can have the irreducible term to itself
    most = np.array([2.5 if name == "eta" else math.inf for name in law._fields])[: len(starts[0])]
    how = {"loss": "soft_l1", "f_scale": STRAY, "x_scale": "jac", "bounds": (-most, most), "max_nfev": 200}
    with np.errstate(all="ignore"):  # a wild step is rejected
        found = [least_squares(residuals, np.clip(one, -most, most), **how) for one in starts]
    return law(*min(found, key=lambda one: one.cost).x.tolist())


def power_laws(groups: Iterable[tuple[int, pd.DataFrame]], x: str, run: str | None = None) -> dict[int, Fit]:
    """The power law of `mse` in column `x`, for each group of three points or more; `run` as in `fit`, a column."""
    return {
        key: fit(fit_power, (some[x].to_numpy(float),), some.mse.to_numpy(float), run and some[run])
        for key, some in groups if len(some) >= 3
    }  # fmt: skip


def joint_law(runs: pd.DataFrame) -> Fit | None:
    """The joint law of these runs; None with fewer than `FEWEST`."""
    return fit(fit_joint, _sizes(runs), runs.mse.to_numpy(float)) if len(runs) >= FEWEST else None


def foretold(runs: pd.DataFrame) -> pd.DataFrame | None:
    """The largest n, predicted by the joint law from all the smaller: `predicted` beside `mse`, and `off`, their ratio.

    `off_se` is the standard error of the prediction and of a new run; `as_before` is what one would be off by without
    a law, with the error of the next smaller n. None: fewer than `FEWEST` smaller runs.
    """
    known, asked = runs[runs.n < runs.n.max()], runs[runs.n == runs.n.max()]
    found = joint_law(known)
    if found is None:
        return None
    at, before = _sizes(asked), asked.k.map(known.sort_values("n").groupby("k").mse.last())
    predicted = found.law(*at)
    se = np.hypot(np.std([np.log(law(*at)) for law in found.again], axis=0, ddof=1), found.off)
    off, as_before = predicted / asked.mse - 1, before / asked.mse - 1
    return asked.assign(predicted=predicted, off=off, off_se=se, as_before=as_before)


def _sizes(runs: pd.DataFrame) -> tuple[Array, Array]:
    return runs.n.to_numpy(float), runs.k.to_numpy(float)


# --- the bill ---------------------------------------------------------------------------------------------------------


def bill(
    sizes: Mapping[str, float], k: int, width: int, tokens: float,
    model_parameters: float, model_tokens: float, flops_per_dollar: float,
) -> pd.DataFrame:  # fmt: skip
    """What autoencoders of these many latents cost, one column each: all rows in the units that they name.

    They train on `tokens` activations of this width, which a model gives that was itself trained on `model_tokens`.
    """
    reading, whole = 2 * model_parameters * tokens, 6 * model_parameters * model_tokens
    columns = {}
    for name, n in sizes.items():
        sparse, dense = (flops(n, k, width, dense) * tokens for dense in (False, True))
        columns[name] = {
            "parameters": 2 * n * width + width,
            "over the model's parameters": (2 * n * width + width) / model_parameters,
            "training state, bytes": 20 * 2 * n * width,  # weights, gradients, two moments, average: 4 bytes each
            "training, FLOPs": sparse,
            "the same, dense count": dense,
            "reading the activations, FLOPs": reading,
            "dollars, training and reading": (sparse + reading) / flops_per_dollar,
            "training, over the model's": sparse / whole,
            "the same, dense count, with reading": (dense + reading) / whole,
            "in use, over the model's own FLOPs per token": width * (n + k) / model_parameters,
        }
    return pd.DataFrame(columns)
