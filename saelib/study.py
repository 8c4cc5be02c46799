"""What chapter 06 asks of a trained SAE: other k, shrinkage, outliers. And its stored sweep, read into tables."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from saelib import ops
from saelib.metrics import NormalizedMse, evaluate
from saelib.profile import ROOT, Profile, Recipe, override
from saelib.report import stored
from saelib.sae import SAE
from saelib.train import load_sae, start, there

MEASURES = {
    "normalized_mse": "mse", "l0": "l0", "dead_fraction": "dead", "refined_mse": "refined_mse",
    "refined_norm": "refined_norm", "outliers": "outliers",
}  # fmt: skip
"""What the sweep stores for every seed, and its column in `sweep_table`."""


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
    se: float
    """Its standard error over contexts; 0 where the tokens are not told apart by context."""
    norm: float
    """Mean norm of z W_dec with them, over that with the SAE's own: above 1 where the SAE shrinks."""


@torch.no_grad()
def refined(sae: SAE, x: Float[Tensor, "*contexts tokens d_model"], rounds: int = 500) -> Refined:
    """The best non-negative values for the latents that the SAE chose, its decoder unchanged (section 5.1).

    Non-negative least squares on each token's own support: projected gradient with Nesterov's momentum.
    """
    shape, x = (-1, *x.shape[-2:]), x.flatten(0, -2)
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
    estimate.add(x.view(shape), (found + sae.pre_bias).view(shape))
    return Refined(*estimate.result(), (found.norm(dim=1).mean() / before.norm(dim=1).mean()).item())


def outliers(sae: SAE, x: Float[Tensor, "tokens d_model"]) -> float:
    """|mu| / |sigma| of the activations as the SAE's encoder first sees them, less its pre-bias (arXiv 2605.31518)."""
    seen = (sae.normalized(x)[0] - sae.pre_bias.detach()).double()
    return (seen.mean(0).norm() / seen.std(0).norm()).item()


def at_start(recipe: Recipe, x: Float[Tensor, "tokens d_model"], seed: int = 0) -> tuple[float, float]:
    """|mu| / |sigma|, and the share of latents that no token turns on, before the first step."""
    sae, _ = start(recipe, x.shape[1], seed, x)
    sae = sae.to(x.device)
    return outliers(sae, x), evaluate(sae.eval(), [x[None]])["dead_fraction"]


def at_hand(profile: Profile, names: Sequence[str], model) -> dict[str, SAE | None]:
    """SAEs of the profile by name, on the model's device; None for one that it does not have, or nobody has trained."""
    found = [name for name in names if name in profile.saes and there(profile, name)]
    return {name: load_sae(profile, name, model) if name in found else None for name in names}


# --- the recipe and the sweep -----------------------------------------------------------------------------------------


def ingredients(recipe: Recipe) -> pd.DataFrame:
    """Every field of a recipe: its value, and the first sentence of what it is."""
    values = recipe.model_dump() | {"lr": round(recipe.rate, 5)}
    words = {name: " ".join((field.description or "").split()) for name, field in Recipe.model_fields.items()}
    first = {name: re.split(r"(?<=\w[.)]) |(?<=\)\.) ", text)[0] for name, text in words.items()}
    return pd.DataFrame({"value": {name: str(value) for name, value in values.items()}, "what it is": first})


def grid() -> dict:
    """The chapter's sweep as it is written down: `base`, `other_k`, and `variants` by name."""
    return yaml.safe_load((ROOT / "notebooks" / "sweeps" / "06_training.yml").read_text(encoding="utf-8"))


def recipe_of(profile: Profile, variant: str) -> Recipe:
    """What a variant of the sweep trains by."""
    values = grid()["base"] | grid()["variants"][variant]
    return override(profile, {key: value for key, value in values.items() if key != "seeds"}).recipe


def curve(profile_name: str, variant: str, name: str) -> list[float] | None:
    """One list that a variant stored (`mse_curve`, `steps`, ...); None where it was not run."""
    return stored(profile_name, f"06_sweep/{variant}").get(name, {}).get("value")


def sweep_table(profile_name: str, variants: Sequence[str], against: str = "whole") -> pd.DataFrame:
    """The stored sweep, one row for each variant: means over its seeds. What was not run has 0 `seeds` and is NaN.

    `difference` is what the variant adds to the normalised MSE of `against`, seed by seed, for a seed fixes the first
    weights and the order of the data; `se` is its standard error, `half` half of its 95 % interval (Student's t).
    """
    base = curve(profile_name, against, "normalized_mse")
    rows = {variant: _row(stored(profile_name, f"06_sweep/{variant}"), base) for variant in variants}
    columns = ["seeds", *MEASURES.values(), "difference", "se", "half"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _row(found: dict[str, dict], base: list[float] | None) -> list[float]:
    if not found.keys() >= MEASURES.keys():
        return [0] + [math.nan] * (len(MEASURES) + 3)
    own = found["normalized_mse"]["value"]
    means = [statistics.mean(found[name]["value"]) for name in MEASURES]
    paired = [mine - other for mine, other in zip(own, base or [], strict=False)]  # seeds count from 0 on
    se = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else math.nan
    half = se * stats.t.ppf(0.975, len(paired) - 1) if len(paired) > 1 else math.nan
    return [len(own), *means, statistics.mean(paired) if paired else math.nan, se, half]


def rank_agreement(curves: Mapping[float, Sequence[float]], final: Mapping[float, float]) -> list[float]:
    """At each line of the logs, Spearman's correlation of the order of the runs there with their order at the end."""
    rows = zip(*(curves[key] for key in final), strict=True)
    return [float(stats.spearmanr(row, list(final.values())).statistic) for row in rows]


def matched(table: pd.DataFrame, l0: float) -> float | None:
    """Normalised MSE at an L0, from a straight line between runs in both logarithms; None where no run is beyond."""
    runs = table.dropna(subset="mse").sort_values("l0")
    if runs.empty or not runs.l0.min() - 0.75 <= l0 <= runs.l0.max() + 0.75:  # batchtopk meets its k but roughly
        return None
    return float(np.exp(np.interp(np.log(l0), np.log(runs.l0), np.log(runs.mse))))
