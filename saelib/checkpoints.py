"""How much pre-training a loss is worth: a search over training checkpoints (section 4.1).

Everything here compares losses on the same contexts, so that what makes a context hard cancels. A curve may be any
object with `steps` and `loss`; `Trained` is the one whose losses come from models that have to be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from scipy.interpolate import PchipInterpolator
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from saelib import UserError
from saelib.induction import token_losses
from saelib.metrics import Estimate, blocks, mean
from saelib.models import Checkpoint, checkpoints, load_model
from saelib.profile import Profile

Z = stats.norm.ppf(0.975)
NOT_MONOTONE = 3.0
"""Standard errors by which a later loss must lie above an earlier one to count as a contradiction."""


class Curve(Protocol):
    """A training run that can be looked at."""

    steps: Sequence[float]
    """How far each checkpoint had come, rising: training tokens, or anything in proportion to compute."""

    def loss(self, index: int) -> Float[Tensor, "contexts"]:
        """Mean loss of a checkpoint in each context, nats per token. May be dear."""


class Trained:
    """The training checkpoints of a profile on given tokens. Each is loaded at most once."""

    def __init__(self, profile: Profile, tokens: Int[Tensor, "contexts pos"]):
        self.profile, self.tokens = profile, tokens
        self.found: list[Checkpoint] = checkpoints(profile)
        unit = "step" if any(checkpoint.tokens is None for checkpoint in self.found) else "tokens"
        self.steps = [getattr(checkpoint, unit) for checkpoint in self.found]
        if None in self.steps:
            raise UserError(f"a checkpoint of profile {profile.name!r} does not say its step: train or fetch it again")
        self.losses: dict[int, Tensor] = {}
        """Of the checkpoints loaded so far, by index."""

    @torch.no_grad()
    def loss(self, index: int) -> Float[Tensor, "contexts"]:
        """Mean loss in each context, nats per token. Raises UserError: the checkpoint is missing or damaged."""
        if index not in self.losses:
            model = load_model(self.profile, self.found[index])
            self.losses[index] = token_losses(model, self.tokens).double().mean(1)
        return self.losses[index]


# --- is it monotone? --------------------------------------------------------------------------------------------------


def drops(losses: Float[Tensor, "checkpoints contexts"]) -> list[Estimate]:
    """By how much the loss falls from each checkpoint to the next, paired by context."""
    return [_mean(before - after) for before, after in pairwise(losses)]


def inversion(drop: Estimate) -> float:
    """Probability that the later of two checkpoints is really the worse one, for the drop that was seen."""
    return float(stats.norm.sf(drop.value / max(drop.se, 1e-300)))


class Monotone(NamedTuple):
    """What speaks against a curve that never rises."""

    rise: float
    """Largest rise between any two checkpoints, in standard errors of the paired difference; negative if all fall."""
    chance: float
    """How often one at least as large would be seen if the curve were flat; if it falls, less often than that."""
    distance: float
    """Largest distance of a loss from the nearest curve that never rises (isotonic regression), nats."""


def monotone_test(losses: Float[Tensor, "checkpoints contexts"], draws: int = 2000, seed: int = 0) -> Monotone:
    """Test of "the loss never rises" on paired losses, with their covariance over contexts.

    Of all such curves the flat one shows the largest rises by chance, so its distribution holds for every other.
    """
    means, covariance = _moments(losses)
    noise = np.random.default_rng(seed).multivariate_normal(0 * means, covariance, draws, method="eigh")
    seen = _rise(means, covariance)
    distance = np.abs(means - isotonic_regression(means, increasing=False)).max()
    return Monotone(float(seen), float((_rise(noise, covariance) >= seen).mean()), float(distance))


def looks_monotone(
    losses: Float[Tensor, "checkpoints contexts"], n: int, stride: int, paired: bool, draws: int = 500, seed: int = 0
) -> float:
    """How often every `stride`-th checkpoint, measured in `n` contexts drawn at random, shows a loss that only falls.

    Paired: all checkpoints in the same contexts; otherwise each in its own. The last checkpoint is always among them.
    """
    shown = losses.flip(0)[::stride].flip(0)
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(losses.shape[1], (draws, 1 if paired else len(shown), n), generator=generator)
    means = shown[torch.arange(len(shown))[:, None], picked].mean(2)
    return (means.diff(dim=1) < 0).all(1).double().mean().item()


def _mean(values: Float[Tensor, "contexts"]) -> Estimate:
    return mean(values[:, None])


def _moments(losses: Float[Tensor, "checkpoints contexts"]) -> tuple[np.ndarray, np.ndarray]:
    """Means of the losses, and the covariance of these means over blocks of contexts."""
    means = losses.double().mean(1, keepdim=True)
    pulls = blocks((losses.double() - means).T) / losses.shape[1]
    return means[:, 0].numpy(), (pulls.T @ pulls * len(pulls) / max(1, len(pulls) - 1)).numpy()


def _rise(means: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Largest (later - earlier) over all pairs, in standard errors of the paired difference; -inf for one loss."""
    variance = np.diag(covariance)
    error = np.sqrt(np.maximum(variance[:, None] + variance - 2 * covariance, 1e-24))
    later, earlier = np.tril_indices(len(variance), -1)
    found = (means[..., later] - means[..., earlier]) / error[later, earlier]
    return found.max(-1, initial=-np.inf)


# --- what a loss is worth ---------------------------------------------------------------------------------------------


class Equivalent(NamedTuple):
    """The point of a training run that has a given loss, as a share of the whole run."""

    value: float
    """Share; where `side` is set, the bound that it lies beyond."""
    low: float
    high: float
    """95 % interval; `high` is infinite where the last checkpoint is not surely better than the target."""
    side: str
    """`>`: the last checkpoint is no better than the target. `<`: the first one is no worse. Otherwise empty."""
    visited: dict[int, Estimate]
    """Checkpoints that were loaded, in this order: their loss less the target, paired by context."""
    rise: float
    """Largest rise of the loss between two visited checkpoints, in standard errors."""

    @property
    def monotone(self) -> bool:
        """Whether the visited losses allow for a curve that never rises; if not, `value` is one of several."""
        return self.rise <= NOT_MONOTONE

    def __str__(self) -> str:
        digits = 1 if self.value >= 0.01 else 2
        value, low, high = (f"{share:.{digits}%}" for share in self[:3])
        interval = f"{low} or more" if math.isinf(self.high) else f"{low} to {high}"
        return f"{self.side}{value} (95 %: {interval}{'' if self.monotone else '; not monotone'})"


def search(curve: Curve, target: Float[Tensor, "contexts"]) -> Equivalent:
    """What share of the training gives a loss, from at most ceil(log2 N) + 3 of N checkpoints (section 4.1).

    Bisection finds two neighbours with the target between them. The two next to these bend the curve that is drawn
    between checkpoints: over log step, monotone wherever their losses are (PCHIP).
    """
    seen: dict[int, Tensor] = {}
    above, below = -1, len(curve.steps)
    while below - above > 1:
        middle = (above + below) // 2
        seen[middle] = _difference(curve, middle, target)
        above, below = (middle, below) if seen[middle].mean() > 0 else (above, middle)
    for index in {above - 1, below + 1} & set(range(len(curve.steps))) - seen.keys():
        seen[index] = _difference(curve, index, target)
    return _answer(curve.steps, seen)


def full_scan(curve: Curve, target: Float[Tensor, "contexts"]) -> Equivalent:
    """The same from all checkpoints: what the search is judged by."""
    return _answer(curve.steps, {i: _difference(curve, i, target) for i in range(len(curve.steps))})


def equivalents(
    curve: Curve | None, targets: Mapping[str, Float[Tensor, "contexts"] | None]
) -> dict[str, Equivalent | None]:
    """`search` for each target; None where there is no target, or no curve to search."""
    there = {name: curve is not None and target is not None for name, target in targets.items()}
    return {name: search(curve, target) if there[name] else None for name, target in targets.items()}


def _difference(curve: Curve, index: int, target: Float[Tensor, "contexts"]) -> Float[Tensor, "contexts"]:
    loss = curve.loss(index).double()
    if loss.shape != target.shape:
        raise UserError(f"the target has {len(target)} contexts, the checkpoints {len(loss)}: take the same tokens")
    return loss - target.double()


def _answer(steps: Sequence[float], seen: Mapping[int, Float[Tensor, "contexts"]]) -> Equivalent:
    order = sorted(seen)
    start = 0.0 if steps[0] or len(steps) == 1 else steps[1]  # log 0 is no place: log(step + second step) then
    x = np.log(np.asarray([steps[index] for index in order], float) + start)
    means, covariance = _moments(torch.stack([seen[index] for index in order]))
    fitted = isotonic_regression(means, increasing=False)
    side = "<" if fitted[0] <= 0 else ">" if fitted[-1] > 0 else ""
    value = _crossing(_fine(x), _curve(x, fitted))
    low, high = _interval(x, means, covariance)
    visited = {index: _mean(found) for index, found in seen.items()}
    ends = np.exp([value, min(low, value), max(high, value)]) - start
    return Equivalent(*(ends.clip(0) / steps[-1]).tolist(), side, visited, float(_rise(means, covariance)))


def _fine(x: Float[np.ndarray, "checkpoints"]) -> Float[np.ndarray, "points"]:
    """The checkpoints' places and many in between."""
    return np.interp(np.linspace(0, len(x) - 1, 64 * (len(x) - 1) + 1), np.arange(len(x)), x)


def _curve(x: Float[np.ndarray, "checkpoints"], losses: Float[np.ndarray, "checkpoints"]) -> np.ndarray:
    return PchipInterpolator(x, losses)(_fine(x)) if len(x) > 1 else losses


def _crossing(x: Float[np.ndarray, "points"], values: Float[np.ndarray, "points"]) -> float:
    """Where values first are above 0 no more; the first or last place if they never are, or always."""
    after = int(np.argmax(values <= 0)) if values.min() <= 0 else len(x) - 1
    if after == 0 or values[after] > 0:
        return x[after]
    pair = slice(after - 1, after + 1)
    return np.interp(0, values[pair][::-1], x[pair][::-1])


def _interval(x: np.ndarray, means: np.ndarray, covariance: np.ndarray) -> tuple[float, float]:
    """First and last place at which the curve is not significantly different from the target (Fieller's interval).

    The noise of all checkpoints and of the target is in the test, by how much each moves the curve at a place.
    """
    nudges = np.diag(1e-4 * np.sqrt(np.diag(covariance)) + 1e-9)
    moved = [(_curve(x, means + nudge) - _curve(x, means - nudge)) / (2 * nudge.sum()) for nudge in nudges]
    error = Z * np.sqrt(np.einsum("ip,ij,jp->p", moved, covariance, moved, optimize=True).clip(0))
    curve, at = _curve(x, means), _fine(x)
    low = -math.inf if curve[0] <= error[0] else _crossing(at, curve - error)
    high = math.inf if curve[-1] >= -error[-1] else _crossing(at[::-1], -(curve + error)[::-1])
    return low, high


# --- the journal's way ------------------------------------------------------------------------------------------------


def evenly(steps: Sequence[float]) -> list[int]:
    """The checkpoints nearest to eleven evenly spaced points between a twentieth of the run and its end."""
    wanted = np.linspace(0.05, 1, 11) * steps[-1]
    return sorted({int(np.abs(np.asarray(steps) - step).argmin()) for step in wanted})


def by_ruler(points: Mapping[float, float], loss: float) -> float:
    """The step of a loss on the straight line between two points of a plot; beyond the first, the line prolonged."""
    steps = sorted(points)
    place = next((i for i in range(1, len(steps)) if points[steps[i]] <= loss), len(steps) - 1)
    left, right = steps[place - 1], steps[place]
    if points[left] == points[right]:
        return left
    return left + (right - left) * (points[left] - loss) / (points[left] - points[right])


def by_eye(
    steps: Sequence[float], losses: Float[Tensor, "checkpoints contexts"], target: Float[Tensor, "contexts"],
    kept: Sequence[int], n: int, draws: int = 500, seed: int = 0,
) -> Float[Tensor, "draws"]:  # fmt: skip
    """Shares that the journal's way gives: a plot of the `kept` checkpoints read to two decimals, and a ruler.

    The plot is made in `n` contexts drawn at random, the delta (`target` less the final model's loss) in `n` others.
    """
    generator = torch.Generator().manual_seed(seed)
    plotted, elsewhere = torch.randint(losses.shape[1], (2, draws, n), generator=generator)
    plot = losses[list(kept)][:, plotted].mean(2).T
    wanted = plot[:, -1] + (target - losses[-1])[elsewhere].mean(1)
    shown = [steps[index] for index in kept]
    read = [
        by_ruler(dict(zip(shown, points, strict=True)), loss)
        for points, loss in zip(plot.round(decimals=2).tolist(), wanted.round(decimals=2).tolist(), strict=True)
    ]
    return torch.tensor(read) / steps[-1]


def left_out(steps: Sequence[float], losses: Sequence[float]) -> dict[str, list[float]]:
    """Each inner checkpoint's loss as the others have it, by a curve and straight lines, less the true one."""
    at, losses = np.asarray(steps, float), np.asarray(losses)
    ways = {
        "curve": lambda x, xs, ys: PchipInterpolator(np.log(xs), ys)(np.log(x)),
        "log step": lambda x, xs, ys: np.interp(np.log(x), np.log(xs), ys),
        "step": np.interp,
    }
    missed = {way: [] for way in ways}
    for i in range(1, len(at) - 1):
        for way, draw in ways.items():
            missed[way].append(float(draw(at[i], np.delete(at, i), np.delete(losses, i)) - losses[i]))
    return missed
