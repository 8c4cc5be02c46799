"""Steering: push the activation along a direction at every token, and see what the model expects instead.

    add       x + s p scale(x) u                       u: a unit vector
    clamp     x + (s p - z_i(x)) scale(x) W_dec[i]     the reconstruction edited, its error kept

p is the 99th percentile of the latent's activations above 0, s the strength, scale(x) what the SAE divides activations
by. Directions are compared where they cost the model the same: at equal rise of the loss on ordinary text.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from saelib import UserError, sparsity
from saelib.metrics import Estimate, pieces
from saelib.sae import SAE
from saelib.splice import LOGITS, prefix, suffix

TOP = 50
"""Contexts in which a latent fires most strongly: what comes next there are its own next tokens."""
SIZE = 4
"""Tokens in a set, at most."""
LEAST = 64
"""Firings in the training text that a latent needs to be steered: below, neither percentile nor tokens are known."""
PLACES = 8
"""Tokens of the training text at which a latent's ablation sparsity is measured."""
WRITTEN = 24
"""Tokens that the model writes."""

Way = Callable[[Float[Tensor, "n pos d_model"], float], Float[Tensor, "n pos d_model"]]
"""A way of steering: what it makes of activations at a strength."""


# --- what training text says about a latent ---------------------------------------------------------------------------


class Studied(NamedTuple):
    """Latents that are to be steered."""

    table: pd.DataFrame
    """One row per latent (the index): `density`, `p99`, `share` of top activations that an own token follows."""
    own: Int[Tensor, "m size"]
    """Own next tokens, most telling first; -1: no more."""
    decoder: Float[Tensor, "m d_model"]
    """Their directions, of length 1."""
    means: Float[Tensor, "m d_model"]
    """Mean activation where they fire less mean elsewhere, in the SAE's space, scaled to length 1."""
    places: pd.DataFrame
    """Some `row` and `at` where each `latent` fires with a window after it."""

    def words(self, tokenizer) -> list[str]:
        """Their own tokens, white space made visible."""
        return [said(tokenizer, [[i] for i in row if i >= 0]) for row in self.own.tolist()]


@torch.no_grad()
def studied(
    sae: SAE, xs: Sequence[Float[Tensor, "some pos d_model"]], tokens: Int[Tensor, "n pos"], vocab: int, m: int,
    seed: int,
) -> Studied:  # fmt: skip
    """Draw latents evenly over density and look at them in training text.

    Own tokens are chosen in contexts of even number; `share` is of the others' top activations.

    Args:
        xs: activations at `tokens`, raw.

    Raises:
        UserError: too few latents fire often enough.
    """
    x, fires = _fires(sae, xs)
    fires = fires[fires.latent.isin(drawn(np.bincount(fires.latent, minlength=sae.n_latents), m, seed))]
    groups = fires.groupby("latent")
    table = groups.value.agg(density=lambda values: len(values) / len(x), p99=lambda values: values.quantile(0.99))
    base = torch.bincount(tokens.flatten(), minlength=vocab).double() / tokens.numel()
    own, share, inside = [], [], []
    for _, group in groups:
        even = group["row"] % 2 == 0
        own.append(own_tokens(_following(group[even], tokens), base))
        share.append(torch.isin(_following(group[~even], tokens), own[-1]).double().mean().item())
        which = torch.tensor((group["row"] * tokens.shape[1] + group["at"]).to_numpy())
        inside.append(x[which].mean(0, dtype=torch.float64))
    means = torch.stack(inside) - x.mean(0, dtype=torch.float64)  # along inside less outside
    whole = fires[fires["at"] <= tokens.shape[1] - sparsity.WINDOW].sample(frac=1, random_state=seed)
    decoder = nn.functional.normalize(sae.W_dec[torch.tensor(table.index.to_numpy())], dim=-1)
    unit = nn.functional.normalize(means, dim=-1).to(decoder)
    return Studied(table.assign(share=share), torch.stack(own), decoder, unit, whole.groupby("latent").head(PLACES))


def _fires(sae: SAE, xs: Sequence[Tensor]) -> tuple[Float[Tensor, "tokens d_model"], pd.DataFrame]:
    """Activations in the SAE's space, and every firing: latent, context, position, value."""
    spaced, found, row = [], [], 0
    for x in tqdm([part for some in xs for part in pieces(some, sae)], desc="training text", leave=False):
        spaced.append(sae.normalized(x)[0].flatten(0, 1).cpu())
        codes = sae.encode(x)
        on = codes.values > 0
        context, at, slot = on.nonzero().T.cpu()
        latent = slot if codes.indices is None else codes.indices[on].cpu()
        found.append(torch.stack([latent, context + row, at, codes.values[on].cpu()], 1).double())
        row += len(x)
    fires = pd.DataFrame(torch.cat(found).numpy(), columns=["latent", "row", "at", "value"])
    return torch.cat(spaced), fires.astype({"latent": int, "row": int, "at": int})


def _following(group: pd.DataFrame, tokens: Int[Tensor, "n pos"]) -> Int[Tensor, "top"]:
    """The tokens after a latent's top activations, one of each context."""
    near = group[group["at"] < tokens.shape[1] - 1].sort_values("value", ascending=False, kind="stable")
    rows, at = torch.tensor(near.drop_duplicates("row").head(TOP)[["row", "at"]].to_numpy()).T
    return tokens[rows, at + 1]


def drawn(counts: np.ndarray, m: int, seed: int) -> np.ndarray:
    """Of the latents with `LEAST` firings or more, in order of density: one at random from each of `m` equal parts.

    Raises:
        UserError: there are not as many.
    """
    often = np.flatnonzero(counts >= LEAST)
    if len(often) < m:
        raise UserError(
            f"only {len(often)} latents fire {LEAST} times or more, not {m}: steer fewer, or read more text"
        )
    order = often[np.argsort(counts[often], kind="stable")]
    lots = np.random.default_rng(seed).random(len(counts))  # a lot each: a count that is off by one changes little
    return np.array([part[lots[part].argmax()] for part in np.array_split(order, m)])


def own_tokens(following: Int[Tensor, "top"], base: Float[Tensor, "vocab"]) -> Int[Tensor, "size"]:
    """The tokens that say most about what follows: largest n log(n / expected); seen twice at least, or the best one.

    `base` is each token's share of all text. The sum of all such terms is the KL divergence from it, times the number.
    """
    counts = torch.bincount(following, minlength=len(base)).double()
    score = torch.where(counts > 0, counts * (counts / (len(following) * base)).log(), -math.inf)
    best = score.topk(SIZE).indices
    fits = (counts[best] >= 2) & (score[best] > 0)
    fits[0] = True
    return best.where(fits, -1)


@torch.no_grad()
def lens_tokens(model, directions: Float[Tensor, "m d_model"]) -> Int[Tensor, "m size"]:
    """The tokens that the directions raise most if nothing stands between them and the last norm (logit lens)."""
    directions = directions[None].to(next(model.parameters()).device)
    logits = [model.unembed(model.ln_final(some))[0] for some in (directions, torch.zeros_like(directions))]
    return (logits[0] - logits[1]).topk(SIZE).indices.cpu()


# --- pushing ----------------------------------------------------------------------------------------------------------


def added(sae: SAE, direction: Float[Tensor, "d_model"], length: float) -> Way:
    """Add a direction at every token: as long as the strength times `length`, in the SAE's space."""

    def steered(x: Float[Tensor, "n pos d_model"], strength: float) -> Float[Tensor, "n pos d_model"]:
        scale = sae.normalized(x)[2]
        return x + strength * length * direction.to(x) * (1 if scale is None else scale)

    return steered


def clamped(sae: SAE, latent: int, value: float) -> Way:
    """Set a latent to the strength times `value` at every token: its part of the reconstruction, the error stays."""

    def steered(x: Float[Tensor, "n pos d_model"], strength: float) -> Float[Tensor, "n pos d_model"]:
        codes = sae.encode(x)
        change = (strength * value - codes.dense(sae.n_latents)[..., latent, None]) * sae.W_dec[latent]
        return x + change * (1 if codes.scale is None else codes.scale)

    return steered


def pushed(way: Way, strength: float, x: Float[Tensor, "n pos d_model"], first: int) -> Float[Tensor, "n pos d_model"]:
    """Steered from token `first` on: a BOS is not, for no SAE was trained on it."""
    return torch.cat([x[:, :first], way(x[:, first:], strength)], 1)


class Curves(NamedTuple):
    """What steering does to each context of ordinary text, by strength, less the untouched model; first: strength 0."""

    strengths: Float[Tensor, "strength"]
    rise: Float[Tensor, "m strength n"]
    """Rise of the cross-entropy, nats per token."""
    odds: Float[Tensor, "m strength sets n"]
    """Change of the log-odds of each set of tokens, mean over tokens, nats."""

    def own(self, first: int = 0) -> Curves:
        """Of the sets, each direction's own one alone: number `first` for the first direction, and so on."""
        rows = torch.arange(len(self.odds))
        return self._replace(odds=self.odds[rows, :, rows + first, None])

    def of(self, sets: slice) -> Curves:
        """Some of the sets."""
        return self._replace(odds=self.odds[:, :, sets])

    def again(self, random: np.random.Generator) -> Curves:
        """Contexts (their mean, as one), directions and sets drawn anew."""
        m, _, sets, n = self.odds.shape
        rows, those = random.integers(m, size=m), random.integers(sets, size=sets)
        weights = torch.from_numpy(random.multinomial(n, [1 / n] * n) / n)
        rise, odds = ((of @ weights)[rows, ..., None] for of in (self.rise, self.odds))
        return self._replace(rise=rise, odds=odds[:, :, those])

    def at(self, rise: float) -> tuple[Float[Tensor, "m"], Float[Tensor, "m sets"]]:
        """Strength, and change of the odds, where the loss has first risen by that much; NaN where it never has."""
        strength, place = crossing(self.strengths, self.rise.mean(-1), rise)
        return strength, along(self.odds.mean(-1), place)

    def gains(self, rise: float) -> Float[Tensor, "some"]:
        """Change of the odds at a rise: of each direction's own set, or of each of many sets its mean over directions.

        The latter is for random directions, of which no set is the own one.
        """
        odds = self.at(rise)[1]
        return odds[:, 0] if odds.shape[1] == 1 else odds.nanmean(0)


def crossing(
    strengths: Float[Tensor, "strength"], rise: Float[Tensor, "m strength"], wanted: float
) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"]]:
    """Where curves first reach a value: strength, and place among the strengths (2.5: half way from the third on).

    The loss rises with the square of a small strength, so its root is taken as straight between two strengths.
    """
    root, there = rise.clamp_min(0).sqrt(), rise >= wanted
    after = there.int().argmax(1).clamp_min(1)
    low, high = root.gather(1, after[:, None] - 1)[:, 0], root.gather(1, after[:, None])[:, 0]
    place = (after - 1 + (math.sqrt(wanted) - low) / (high - low)).where(there.any(1), math.nan)
    return along(strengths.expand_as(rise)[..., None], place)[:, 0], place


def along(values: Float[Tensor, "m strength sets"], place: Float[Tensor, "m"]) -> Float[Tensor, "m sets"]:
    """Values between two strengths, on a straight line."""
    before = place.nan_to_num(0).long().clamp_max(values.shape[1] - 2)
    rows, part = torch.arange(len(values)), (place - before)[:, None]
    return values[rows, before] * (1 - part) + values[rows, before + 1] * part


@torch.no_grad()
def swept(
    model, hook: str, tokens: Int[Tensor, "n pos"], ways: Sequence[Way], strengths: Sequence[float],
    sets: Int[Tensor, "sets size"], first: int = 0,
) -> Curves:  # fmt: skip
    """Steer in every way, at every strength, over the same text: the layers below the hook run once for all.

    Args:
        sets: tokens whose joint log-odds are followed; -1 does not count.
        first: token from which on the text is steered.

    Raises:
        UserError: see `splice.prefix`.
    """
    size = max(1, LOGITS[next(model.parameters()).device.type] // (tokens.shape[1] * model.cfg.d_vocab))
    parts, found = tokens.split(size), []
    with tqdm(total=len(parts) * len(ways) * len(strengths), desc="steering", unit="run", leave=False) as bar:
        for part in parts:
            below = prefix(model, hook, part)
            untouched = _read(suffix(model, below, below.x), below.tokens, sets)
            runs = []
            for way in ways:
                for strength in strengths:
                    x = pushed(way, strength, below.x, first)
                    runs.append(_read(suffix(model, below, x), below.tokens, sets) - untouched)
                    bar.update()
            found.append(torch.stack(runs))
    read = torch.cat(found, 1).cpu().unflatten(0, (len(ways), len(strengths)))
    read = nn.functional.pad(read, (0, 0, 0, 0, 1, 0)).mT  # strength 0: no change
    return Curves(torch.tensor([0.0, *strengths], dtype=torch.float64), read[:, :, 0], read[:, :, 1:])


def _read(logits: Float[Tensor, "n pos vocab"], tokens: Tensor, sets: Tensor) -> Float[Tensor, "n read"]:
    """Mean over a context's tokens: cross-entropy of the next one, then the log-odds of each set. Overwrites."""
    logits -= logits.amax(-1, keepdim=True)
    right = logits.gather(-1, tokens.roll(-1, 1)[..., None])
    total = logits.exp_().sum(-1, keepdim=True)
    columns, place = sets.clamp_min(0).unique(return_inverse=True)  # few of the vocabulary
    member = torch.zeros(len(sets), len(columns)).scatter_add_(1, place, (sets >= 0).float())
    p = logits.index_select(-1, columns.to(logits.device)) @ member.T.to(logits) / total
    p = p.clamp(1e-30, 1 - 1e-6)
    return torch.cat([total.log() - right, p.log() - (-p).log1p()], -1)[:, :-1].double().mean(1)


# --- what it comes to -------------------------------------------------------------------------------------------------


def typical(
    curves: Curves, values: Callable[[Curves], Float[Tensor, "some"]], seed: int, repeats: int = 200
) -> Estimate | None:
    """Median of some values of the curves, NaN left out; standard error with directions, sets and contexts drawn anew.

    None where it is not finite.
    """
    random = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing but NaN has no median: None
        again = np.nanmedian(torch.stack([values(curves.again(random)) for _ in range(repeats)]), axis=1)
        middle = float(np.nanmedian(values(curves)))
    again = again[np.isfinite(again)]
    return Estimate(middle, float(again.std(ddof=1))) if math.isfinite(middle) and len(again) > 1 else None


def costs(curves: Curves, seed: int) -> list[Estimate]:
    """Median rise of the loss over directions, at each strength but 0."""
    return [typical(curves, lambda c, j=j: c.rise[:, j].mean(-1), seed) for j in range(1, len(curves.strengths))]


def breaks(curves: Curves, rise: float, seed: int) -> Estimate | None:
    """Median strength at which the loss has risen by that much; never counts as infinite. None: never for half."""
    return typical(curves, lambda c: c.at(rise)[0].nan_to_num(math.inf), seed)


def rank_correlation(one: Sequence[float], other: Sequence[float], seed: int) -> Estimate | None:
    """Spearman's correlation, its standard error by bootstrap over pairs; None with fewer than 8 whole pairs."""
    pairs = np.array([pair for pair in zip(one, other, strict=True) if np.isfinite(pair).all()])
    if len(pairs) < 8:
        return None
    again = stats.bootstrap(
        pairs.T, lambda a, b: stats.spearmanr(a, b).statistic, paired=True, vectorized=False, n_resamples=1000,
        method="percentile", rng=seed,
    )  # fmt: skip
    return Estimate(float(stats.spearmanr(*pairs.T).statistic), float(again.standard_error))


def places(odds: Float[Tensor, "m m"], own: Int[Tensor, "m size"]) -> Int[Tensor, "some"]:
    """At which place (from 1) each direction's own set gains, among the sets that share no token with it.

    Directions without odds (NaN) are left out.
    """
    real = (own >= 0)[:, None, :, None] & (own[:, None, :, None] == own[None, :, None, :])
    place = ((odds > odds.diagonal()[:, None]) & ~real.any((2, 3))).sum(1) + 1
    return place[odds.diagonal().isfinite()]


def ablation_sparsity(
    model, hook: str, tokens: Int[Tensor, "n pos"], sae: SAE, found: Studied, first: int
) -> pd.Series:
    """Mean ablation sparsity of each latent studied (section 4.5) at the places where it fires."""

    def those(x: Float[Tensor, "n d_model"]) -> sparsity.Parts:
        parts = sparsity.latents(sae)(x)
        wanted = torch.tensor(found.table.index.to_numpy(), device=parts.ids.device)
        return parts._replace(on=parts.on & torch.isin(parts.ids, wanted))

    rows, at = (torch.tensor(found.places[name].to_numpy()) for name in ("row", "at"))
    effects = sparsity.effects(model, hook, tokens[rows], at + first, those)
    return sparsity.by_latent(effects).sparsity.reindex(found.table.index)


# --- what it writes ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def written(
    model, hook: str, prompt: Int[Tensor, "pos"], pushes: Sequence[tuple[Way, float]], seed: int, first: int = 0
) -> Int[Tensor, "pushes written"]:
    """How the model goes on with a text under each push, drawn with the same random numbers for all."""
    device = next(model.parameters()).device
    uniform = torch.rand(WRITTEN, model.cfg.d_vocab, generator=torch.Generator().manual_seed(seed)).clamp_min(1e-9)
    tokens = prompt.to(device).expand(len(pushes), -1)
    for luck in -(-uniform.log()).log():  # Gumbel: the largest sum is a draw by the model's probabilities
        below = prefix(model, hook, tokens)
        x = [pushed(*push, row[None], first) for push, row in zip(pushes, below.x, strict=True)]
        best = (suffix(model, below, torch.cat(x))[:, -1].cpu() + luck).argmax(-1)
        tokens = torch.cat([tokens, best.to(device)[:, None]], 1)
    return tokens[:, len(prompt) :].cpu()


def said(tokenizer, texts: Sequence[Sequence[int]]) -> str:
    """Texts in their own words, white space made visible."""
    words = [tokenizer.decode(ids).replace("\n", "⏎").replace("\t", "⇥") for ids in texts]
    return "  ".join(word.replace(" ", "␣") if len(ids) == 1 else word for word, ids in zip(words, texts, strict=True))
