"""Steering: push the activation along a direction at every token, and see what the model expects instead.

    add       x + s p scale(x) u                       u: a unit vector
    clamp     x + (s p - z_i(x)) scale(x) W_dec[i]     the reconstruction edited, its error kept

p is the 99th percentile of the latent's activations above 0, s the strength, scale(x) what the SAE divides activations
by. Directions are compared where they cost the model the same: at equal rise of the loss on ordinary text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from saelib.n2g import Scored
from saelib.sae import SAE
from saelib.splice import LOGITS, Variant, only, prefix, suffix

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


# --- what training text says about a latent ---------------------------------------------------------------------------


class Studied(NamedTuple):
    """Latents that are to be steered."""

    table: pd.DataFrame
    """One row per latent (the index): `density`, `p99`, `share` of its top activations that an own token follows."""
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

    Args:
        xs: activations at `tokens`, raw.

    Raises:
        UserError: too few latents fire often enough.
    """
    x, fires = _fires(sae, xs)
    chosen = drawn(np.bincount(fires.latent, minlength=sae.n_latents), m, seed)
    base = torch.bincount(tokens.flatten(), minlength=vocab).double() / tokens.numel()
    length, total = tokens.shape[1], x.sum(0, dtype=torch.float64)
    found, own, means, places = [], [], [], []
    for latent, group in fires[fires.latent.isin(chosen)].groupby("latent"):
        near = group[group["at"] < length - 1].sort_values("value", ascending=False, kind="stable")
        top = torch.tensor(near.drop_duplicates("row").head(TOP)[["row", "at"]].to_numpy())
        following = tokens[top[:, 0], top[:, 1] + 1]
        own.append(own_tokens(following, base))
        here = x[torch.tensor((group["row"] * length + group["at"]).to_numpy())].sum(0, dtype=torch.float64)
        means.append(here / len(group) - (total - here) / (len(x) - len(group)))
        share = torch.isin(following, own[-1]).double().mean().item()
        found.append((latent, len(group) / len(x), group["value"].quantile(0.99), share))
        whole = group[group["at"] <= length - sparsity.WINDOW]
        places.append(whole.sample(min(PLACES, len(whole)), random_state=seed))
    table = pd.DataFrame(found, columns=["latent", "density", "p99", "share"]).set_index("latent")
    decoder = nn.functional.normalize(sae.W_dec[torch.tensor(table.index.to_numpy())], dim=-1)
    unit = nn.functional.normalize(torch.stack(means), dim=-1).to(decoder)
    return Studied(table, torch.stack(own), decoder, unit, pd.concat(places))


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
    random = np.random.default_rng(seed)
    return np.array([random.choice(part) for part in np.array_split(order, m)])


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


def lens_tokens(model, directions: Float[Tensor, "m d_model"]) -> Int[Tensor, "m size"]:
    """The tokens that the directions raise most if nothing stands between them and the last norm (logit lens)."""
    directions = directions[None].to(next(model.parameters()).device)
    with torch.no_grad():
        logits = [model.unembed(model.ln_final(some))[0] for some in (directions, torch.zeros_like(directions))]
    return (logits[0] - logits[1]).topk(SIZE).indices.cpu()


# --- pushing ----------------------------------------------------------------------------------------------------------


def added(sae: SAE, direction: Float[Tensor, "d_model"], length: float) -> Variant:
    """Add a direction, `length` times the SAE's scale, at every token."""

    def steered(x: Float[Tensor, "n pos d_model"]) -> Float[Tensor, "n pos d_model"]:
        scale = sae.normalized(x)[2]
        return x + length * direction.to(x) * (1 if scale is None else scale)

    return steered


def clamped(sae: SAE, latent: int, value: float) -> Variant:
    """Give a latent the same value at every token: its part of the reconstruction changes, the error stays."""

    def steered(x: Float[Tensor, "n pos d_model"]) -> Float[Tensor, "n pos d_model"]:
        codes = sae.encode(x)
        if codes.indices is None:
            now = codes.values[..., latent, None]
        else:
            now = (codes.values * (codes.indices == latent)).sum(-1, keepdim=True)
        return x + (value - now) * sae.W_dec[latent] * (1 if codes.scale is None else codes.scale)

    return steered


def ways(
    sae: SAE, directions: Float[Tensor, "m d_model"], lengths: Sequence[float], strengths: Sequence[float], first: int
) -> list[list[Variant]]:
    """Every direction added at every strength, from token `first` on; a strength is a multiple of its length."""
    pairs = zip(directions, lengths, strict=True)
    some = slice(first, None)  # a BOS is not steered: no SAE was trained on it
    return [[only(some, added(sae, direction, length * one)) for one in strengths] for direction, length in pairs]


def pushed(
    sae: SAE, curves: Curves, rise: float, directions: Float[Tensor, "m d_model"], lengths: Sequence[float],
    rows: Int[Tensor, "few"], first: int,
) -> list[list[Variant]]:  # fmt: skip
    """Some directions, each at the strength where the loss has risen by that much; the largest where it never has."""
    reach = torch.tensor(np.array(lengths)) * curves.at(rise)[0].nan_to_num(curves.strengths[-1].item())
    return ways(sae, directions[rows], reach[rows].tolist(), [1.0], first)


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

    def at(self, rise: float, weights: Float[Tensor, "n"] | None = None) -> tuple[Tensor, Tensor]:
        """(strength [m], odds [m sets]) where the loss has first risen by that much; NaN where it never has."""
        weights = (
            torch.full(self.rise.shape[-1:], 1 / self.rise.shape[-1]).double() if weights is None else weights.double()
        )
        strength, place = crossing(self.strengths, self.rise @ weights, rise)
        return strength, along(self.odds @ weights, place)

    def gains(self, rise: float, weights: Float[Tensor, "n"] | None = None) -> Float[Tensor, "m"]:
        """Gains of the directions' own sets at a rise; or, if there are other sets as well, of all of them.

        Then it is the mean over directions.
        """
        odds = self.at(rise, weights)[1]
        return odds[:, 0] if odds.shape[1] == 1 else odds.nanmean(0)

    def gain(self, rise: float, seed: int) -> Estimate:
        """Median of `gains` over latents."""
        return typical(lambda w: self.gains(rise, w), self.rise.shape[-1], seed)

    def costs(self, seed: int) -> list[Estimate]:
        """Median rise of the loss over directions, at each strength but 0."""
        n = self.rise.shape[-1]
        return [typical(lambda w, j=j: self.rise[:, j] @ w.double(), n, seed) for j in range(1, len(self.strengths))]

    def breaks(self, rise: float, seed: int) -> Estimate:
        """Median strength at which the loss has risen by that much; never counts as infinite."""
        return typical(lambda w: self.at(rise, w)[0].nan_to_num(math.inf), self.rise.shape[-1], seed)

    def rise_at(self, strengths: Sequence[float]) -> Float[Tensor, "strengths m"]:
        """Rise of the loss at some strengths, under every direction."""
        roots = self.rise.mean(-1).clamp_min(0).sqrt()
        return torch.from_numpy(np.stack([np.interp(strengths, self.strengths, root) ** 2 for root in roots], 1))


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


def along(values: Float[Tensor, "m strength *rest"], place: Float[Tensor, "m"]) -> Float[Tensor, "m *rest"]:
    """Values between two strengths, on a straight line."""
    before = place.nan_to_num(0).long().clamp_max(values.shape[1] - 2)
    rows, part = torch.arange(len(values)), (place - before)[:, None]
    return values[rows, before] * (1 - part) + values[rows, before + 1] * part


@torch.no_grad()
def swept(
    model, hook: str, tokens: Int[Tensor, "n pos"], ways: Sequence[Sequence[Variant]], strengths: Sequence[float],
    sets: Int[Tensor, "sets size"],
) -> Curves:  # fmt: skip
    """Run every way of steering, at every strength, over the same text: the layers below the hook once for all.

    Args:
        ways: for each direction a variant per strength.
        sets: tokens whose joint log-odds are followed; -1 does not count.

    Raises:
        UserError: see `splice.prefix`.
    """
    flat = [variant for way in ways for variant in way]
    size = max(1, LOGITS[next(model.parameters()).device.type] // (tokens.shape[1] * model.cfg.d_vocab))
    parts, found = tokens.split(size), []
    with tqdm(total=len(parts) * len(flat), desc="steering", unit="run", leave=False) as bar:
        for part in parts:
            below = prefix(model, hook, part)
            untouched = _read(suffix(model, below, below.x), below.tokens, sets)
            found.append([])
            for variant in flat:
                found[-1].append(_read(suffix(model, below, variant(below.x)), below.tokens, sets) - untouched)
                bar.update()
    read = torch.cat([torch.stack(runs) for runs in found], 1).cpu().unflatten(0, (len(ways), -1))
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


def said(tokenizer, texts: Sequence[Sequence[int]]) -> str:
    """Texts in their own words, white space made visible."""
    words = [tokenizer.decode(ids).replace("\n", "⏎").replace("\t", "⇥") for ids in texts]
    return "  ".join(word.replace(" ", "␣") if len(ids) == 1 else word for word, ids in zip(words, texts, strict=True))


# --- what it comes to -------------------------------------------------------------------------------------------------


def typical(
    gains: Callable[[Float[Tensor, "n"]], Float[Tensor, "m"]], n: int, seed: int, repeats: int = 200
) -> Estimate:
    """Median over latents of what `gains` makes of weights of the contexts; standard error by drawing both anew."""
    generator = torch.Generator().manual_seed(seed)
    again = []
    for _ in range(repeats):
        contexts = torch.randint(n, (n,), generator=generator)
        values = gains(torch.bincount(contexts, minlength=n) / n).double()
        again.append(values[torch.randint(len(values), values.shape, generator=generator)].nanmedian())
    return Estimate(gains(torch.full((n,), 1 / n)).nanmedian().item(), torch.stack(again).std().item())


def rank_correlation(
    one: Sequence[float], other: Sequence[float], seed: int, repeats: int = 1000
) -> tuple[float, float, float] | None:
    """Spearman's correlation with its 95 % interval by bootstrap over pairs; None with fewer than 8 whole pairs."""
    pairs = np.array([pair for pair in zip(one, other, strict=True) if np.isfinite(pair).all()])
    if len(pairs) < 8:
        return None
    random = np.random.default_rng(seed)
    draws = pairs[random.integers(len(pairs), size=(repeats, len(pairs)))]
    ranks = stats.rankdata(draws, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    again = (ranks[..., 0] * ranks[..., 1]).sum(1) / np.sqrt((ranks**2).sum(1).prod(-1))
    return (float(stats.spearmanr(*pairs.T).statistic), *np.nanquantile(again, [0.025, 0.975]).tolist())


def places(odds: Float[Tensor, "m m"], own: Int[Tensor, "m size"]) -> Int[Tensor, "m"]:
    """At which place (from 1) each direction's own set gains, among the sets that share no token with it."""
    real = (own >= 0)[:, None, :, None] & (own[:, None, :, None] == own[None, :, None, :])
    return ((odds > odds.diagonal()[:, None]) & ~real.any((2, 3))).sum(1) + 1


def precision(explained: Mapping[int, Scored], found: Studied) -> list[float]:
    """N2G's precision for each latent studied (section 4.3); NaN for one that it does not explain."""
    return [explained[i].precision.value if i in explained else math.nan for i in found.table.index]


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


@torch.no_grad()
def written(
    model, hook: str, prompt: Int[Tensor, "pos"], variants: Sequence[Variant], n: int, seed: int
) -> Int[Tensor, "variants n"]:
    """How the model goes on with a text under each variant, drawn with the same random numbers for all."""
    device = next(model.parameters()).device
    uniform = torch.rand(n, model.cfg.d_vocab, generator=torch.Generator().manual_seed(seed)).clamp_min(1e-9)
    tokens = prompt.to(device).expand(len(variants), -1)
    for luck in -(-uniform.log()).log():  # Gumbel: the largest sum is a draw by the model's probabilities
        below = prefix(model, hook, tokens)
        x = torch.cat([variant(row[None]) for variant, row in zip(variants, below.x, strict=True)])
        best = (suffix(model, below, x)[:, -1].cpu() + luck).argmax(-1)
        tokens = torch.cat([tokens, best.to(device)[:, None]], 1)
    return tokens[:, len(prompt) :].cpu()


def told(
    model, hook: str, prompt: Int[Tensor, "pos"], columns: Mapping[str, Sequence[Sequence[Variant]]], seed: int
) -> pd.DataFrame:
    """What the model writes after a prompt, `WRITTEN` tokens, one column per way of steering. HTML is escaped."""
    variants = [variant for column in columns.values() for (variant,) in column]
    texts = [said(model.tokenizer, [text.tolist()]) for text in written(model, hook, prompt, variants, WRITTEN, seed)]
    rows = len(texts) // len(columns)
    return pd.DataFrame({name: texts[i * rows : (i + 1) * rows] for i, name in enumerate(columns)})
