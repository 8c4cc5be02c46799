"""N2G (sections 4.3 and 4.4): a latent explained by short patterns of tokens, and what such explanations are worth.

From a few tokens where a latent fires: cut the context behind the token; grow the text leftwards from it until the
latent has half of its activation again; replace each token of that piece by a filler, and where at least half of the
activation is left, let any token stand there. What remains is a pattern; all patterns of a latent explain it.

Every distinct piece of text runs through the model once, up to the hook, however many latents ask for it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from saelib import UserError
from saelib.activations import harvest
from saelib.metrics import BLOCK, LATENTS, Estimate
from saelib.report import stored as published
from saelib.sae import SAE

HALF = 0.5
"""Share of the activation that a shortened text must keep, and that a token must carry to stay in the pattern."""
LONGEST = 16
"""Tokens that a pattern may have. A latent that needs more of the context than that is not explained by an n-gram."""
LEAST = 10
"""Tokens of held-out text on which a latent must fire to count in a mean over latents: a share of fewer is luck."""
EXAMPLES = 16
"""Tokens that an explanation is made of: half of them the strongest, half drawn among all on which the latent fires."""

Reader = Callable[[Int[Tensor, "n pos"], Int[Tensor, "n"]], Float[Tensor, "n"]]
"""From texts and latents to the activation of each text's latent at its last token."""


class Pattern(NamedTuple):
    """Tokens in a row, the last of which is where the latent fires."""

    tokens: tuple[int | None, ...]
    """None: any token."""
    start: bool = False
    """Whether the first one must be the first of the context."""

    @property
    def rank(self) -> tuple[int, int, bool]:
        """The longest match counts, then the one with fewer gaps, then the one that is tied to the start."""
        return len(self.tokens), sum(token is not None for token in self.tokens), self.start


class Explanation(NamedTuple):
    """All patterns of one latent."""

    patterns: dict[Pattern, float]
    """With the activation that each predicts, in the unit of `Codes.values`."""

    def text(self, tokenizer, n: int | None = None) -> str:
        """The `n` strongest patterns (None: all): `▢` is any token, `⊢` the start of the context."""
        found = sorted(self.patterns, key=self.patterns.get, reverse=True)[:n]
        return "  |  ".join("⊢ " * one.start + " ".join(_word(tokenizer, i) for i in one.tokens) for one in found)


def _word(tokenizer, token: int | None) -> str:
    if token is None:
        return "▢"
    return tokenizer.decode([token]).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


# --- where latents fire -----------------------------------------------------------------------------------------------


class Events(NamedTuple):
    """Latents above 0, or predicted to be: sorted by latent, then by token."""

    latents: Int[np.ndarray, "m"]
    at: Int[np.ndarray, "m"]
    """Number of the token, counted through all contexts."""
    values: Float[np.ndarray, "m"]

    def of(self, latent: int) -> Events:
        """Those of one latent."""
        low, high = np.searchsorted(self.latents, [latent, latent + 1])
        return Events(*(column[low:high] for column in self))

    def within(self, n_tokens: int) -> Events:
        """Those of the first `n_tokens` tokens."""
        return Events(*(column[self.at < n_tokens] for column in self))

    def where(self, others: Events, n_tokens: int) -> Events:
        """Those that are among `others`, too, in the same `n_tokens` tokens."""
        ours, theirs = (found.latents * np.int64(n_tokens) + found.at for found in (self, others))
        return Events(*(column[np.isin(ours, theirs, kind="sort")] for column in self))


@torch.no_grad()
def events(model, hook: str, sae: SAE, tokens: Int[Tensor, "n pos"]) -> Events:
    """Where an SAE's latents fire in some contexts.

    Raises:
        UserError: see `activations.harvest`.
    """
    found, first = [], 0
    for part in tqdm(tokens.split(128), desc=f"reading {hook}", unit="batch", leave=False):
        x = harvest(model, part.to(model.cfg.device), hook)
        for some in x.split(max(1, LATENTS // sae.n_latents)):
            values, ids, *_ = sae.encode(some)
            row, column = (values > 0).nonzero(as_tuple=True)
            latent = column if ids is None else ids[row, column]
            found.append([piece.cpu().numpy() for piece in (latent, row + first, values[row, column])])
            first += len(some)
    latents, at, values = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(latents, kind="stable")  # tokens are in order already
    return Events(latents[order], at[order], values[order])


def reader(model, hook: str, sae: SAE) -> Reader:
    """Re-runs of the model up to the hook, each distinct text once."""

    @torch.no_grad()
    def read(texts: Int[Tensor, "n pos"], latents: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        length = texts.shape[1]
        as_one = np.ascontiguousarray(texts).view(f"V{8 * length}")[:, 0]
        _, first, copies = np.unique(as_one, return_index=True, return_inverse=True)
        found, order = torch.zeros(len(texts)), copies.argsort(kind="stable")
        for part in np.array_split(order, range(0, len(order), max(1, min(8192, LATENTS // sae.n_latents)))):
            once, which = np.unique(copies[part], return_inverse=True)
            if len(once):
                x = harvest(model, texts[first[once]].to(model.cfg.device), hook, (-1, None))
                found[part] = _of(sae, x, torch.from_numpy(which), latents[part])
        return found

    return read


def _of(sae: SAE, x: Float[Tensor, "m d_model"], rows: Int[Tensor, "n"], latents: Int[Tensor, "n"]) -> Tensor:
    """One latent each of some activations."""
    values, ids, *_ = sae.encode(x)
    if ids is None:
        return values.cpu()[rows, latents].float()
    return (values.cpu()[rows] * (ids.cpu()[rows] == latents[:, None])).sum(1).float()


# --- from examples to patterns ----------------------------------------------------------------------------------------


def examples(found: Events, latents: Iterable[int], n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the events explain each latent, as rows of `found`: the strongest half, the others drawn.

    Returns:
        latents and rows, one entry each for every example.
    """
    draw = np.random.default_rng(seed)
    rows = []
    for latent in latents:
        low, high = np.searchsorted(found.latents, [latent, latent + 1])
        order = low + np.argsort(-found.values[low:high], kind="stable")
        top, others = order[: n - n // 2], order[n - n // 2 :]
        rows.append(np.concatenate([top, draw.permutation(others)[: n // 2]]))
    counts = [len(some) for some in rows]
    return np.repeat(np.array(list(latents), dtype=np.int64), counts), np.concatenate([*rows, np.zeros(0, np.int64)])


class Cut(NamedTuple):
    """Examples cut down to what the latent needs."""

    length: Int[Tensor, "n"]
    """Tokens that are left; 0 where more than `LONGEST` would be needed."""
    start: Bool[Tensor, "n"]
    """Whether these begin the context, and do not do it elsewhere."""
    value: Float[Tensor, "n"]
    """The activation that they have by themselves."""


def pruned(
    read: Reader, before: Int[Tensor, "n longest"], reach: Int[Tensor, "n"], latents: Int[Tensor, "n"],
    wanted: Float[Tensor, "n"], filler: int | None,
) -> Cut:  # fmt: skip
    """Grow each text leftwards from its last token until the latent has `wanted`.

    Args:
        before: the last tokens of each context, up to the one where the latent fires.
        reach: how many of them there are.
        filler: what stands in front of a piece of a context; None, the public way, is nothing: then a piece begins a
            context by accident, and what has grown to its beginning counts as tied to it.
    """
    length, start, value = torch.zeros_like(reach), torch.zeros_like(reach, dtype=torch.bool), torch.zeros_like(wanted)
    for size in range(1, before.shape[1] + 1):
        whole = [False, True] if filler is not None else [True]
        for alone in whole:  # a context that is there from its first token needs no filler
            rows = ((length == 0) & (reach >= size)).nonzero()[:, 0]
            rows = rows[reach[rows] == size] if alone and filler is not None else rows
            if not len(rows):
                continue
            z = read(_fronted(before[rows, -size:], None if alone else filler), latents[rows])
            enough = z >= wanted[rows]
            length[rows[enough]], value[rows[enough]] = size, z[enough]
            start[rows[enough]] = alone & (reach[rows[enough]] == size)
    return Cut(length, start, value)


def _fronted(texts: Int[Tensor, "n pos"], filler: int | None) -> Int[Tensor, "n more"]:
    return texts if filler is None else torch.nn.functional.pad(texts, (1, 0), value=filler)


def important(
    read: Reader, before: Int[Tensor, "n longest"], cut: Cut, latents: Int[Tensor, "n"], filler: int, front: bool = True
) -> Bool[Tensor, "n longest"]:
    """Which tokens of the shortened texts the latent needs: without it, at least `HALF` of the activation is gone.

    A filler cannot be replaced by itself: it stays.
    """
    needed = before == filler
    for size in cut.length.unique().tolist():
        for start in (False, True):
            rows = ((cut.length == size) & (cut.start == start)).nonzero()[:, 0]
            if not size or not len(rows):
                continue
            texts = before[rows, -size:].repeat_interleave(size, 0)
            place = torch.arange(size).repeat(len(rows))
            texts[torch.arange(len(texts)), place] = filler
            z = read(_fronted(texts, None if start or not front else filler), latents[rows].repeat_interleave(size))
            needed[rows, -size:] |= 1 - z.view(-1, size) / cut.value[rows, None] >= HALF
    return needed


def patterns_of(
    before: Int[Tensor, "n longest"], cut: Cut, needed: Bool[Tensor, "n longest"], latents: Sequence[int],
    values: Sequence[float],
) -> dict[int, Explanation]:  # fmt: skip
    """Patterns of each latent, each with the mean activation of its examples.

    Any tokens at the left say nothing, unless the context's start is before them; and a pattern that would fit
    everywhere keeps its last token.
    """
    found: dict[int, dict[Pattern, list[float]]] = {int(latent): defaultdict(list) for latent in latents}
    columns = (before.tolist(), needed.tolist(), cut.length.tolist(), cut.start.tolist(), latents, values)
    for tokens, keep, length, start, latent, value in zip(*columns, strict=True):
        if not length:
            continue
        keep[-1] |= not start and not any(keep[-length:])
        gaps = [token if kept else None for token, kept in zip(tokens[-length:], keep[-length:], strict=True)]
        first = 0 if start else next(i for i, token in enumerate(gaps) if token is not None)
        found[int(latent)][Pattern(tuple(gaps[first:]), start)].append(float(value))
    return {latent: Explanation({one: sum(z) / len(z) for one, z in own.items()}) for latent, own in found.items()}


def explained(
    read: Reader, tokens: Int[Tensor, "n pos"], found: Events, latents: Iterable[int], filler: int, n: int = EXAMPLES,
    seed: int = 0, front: bool = True,
) -> dict[int, Explanation]:  # fmt: skip
    """Explanations from what fires in some contexts; latents that fire nowhere in them are left out.

    Args:
        filler: stands for nothing in particular: the end-of-text token.
        front: whether it stands in front of pieces of a context, too (the public way: no).
    """
    latents, rows = examples(found, latents, n, seed)
    at, values = torch.from_numpy(found.at[rows]), torch.from_numpy(found.values[rows]).float()
    longest = min(LONGEST, tokens.shape[1])
    reach = at % tokens.shape[1] + 1
    places = (at[:, None] + torch.arange(1 - longest, 1)).clamp_min(0)
    before = tokens.cpu().flatten()[places].masked_fill(torch.arange(longest) < longest - reach[:, None], filler)
    which = torch.from_numpy(latents)
    cut = pruned(read, before, reach, which, HALF * values, filler if front else None)
    needed = important(read, before, cut, which, filler, front)
    return patterns_of(before, cut, needed, latents.tolist(), values.tolist())


def explain(
    model, hook: str, sae: SAE, tokens: Int[Tensor, "n pos"], latents: Iterable[int], n: int = EXAMPLES, seed: int = 0
) -> dict[int, Explanation]:
    """Explanations of some latents (section 4.3), from contexts of the training text.

    Raises:
        UserError: the SAE does not fit the model.
    """
    if sae.d_model != model.cfg.d_model:
        raise UserError(f"the SAE reads {sae.d_model} dimensions, not {model.cfg.d_model}: choose one of this model")
    found = events(model, hook, sae, tokens)
    return explained(reader(model, hook, sae), tokens, found, latents, model.tokenizer.eos_token_id, n, seed)


# --- prediction -------------------------------------------------------------------------------------------------------


class Index:
    """Where every token stands in some contexts, so that a pattern is looked up by its rarest token.

    Finds what a walk of a trie of the reversed patterns, back from every token, finds with backtracking.
    """

    def __init__(self, tokens: Int[Tensor, "n pos"]):
        self.tokens, self.width = tokens.cpu().numpy().ravel(), tokens.shape[1]
        self.column = np.arange(len(self.tokens)) % self.width
        self.order = np.argsort(self.tokens, kind="stable")
        self.sorted = self.tokens[self.order]

    def ends(self, pattern: Pattern) -> Int[np.ndarray, "m"]:
        """Last tokens of all places that a pattern fits."""
        last = len(pattern.tokens) - 1
        fixed = [(last - i, token) for i, token in enumerate(pattern.tokens) if token is not None]
        spans = [np.searchsorted(self.sorted, [token, token + 1]) for _, token in fixed]
        if not fixed:
            at = np.arange(len(self.tokens))
        else:
            best = min(range(len(fixed)), key=lambda i: spans[i][1] - spans[i][0])
            back, _ = fixed.pop(best)
            at = self.order[slice(*spans[best])] + back
            at = at[at < len(self.tokens)]
        at = at[self.column[at] == last] if pattern.start else at[self.column[at] >= last]
        for back, token in fixed:
            at = at[self.tokens[at - back] == token]
        return at

    def predict(self, explanation: Explanation) -> tuple[Int[np.ndarray, "m"], Float[np.ndarray, "m"]]:
        """Tokens at which a pattern ends, and the activation that the longest one predicts there."""
        ranked = sorted(explanation.patterns.items(), key=lambda item: (item[0].rank, item[1]), reverse=True)
        ends = [self.ends(pattern) for pattern, _ in ranked]
        values = np.repeat([value for _, value in ranked], [len(some) for some in ends])
        at, first = np.unique(np.concatenate([*ends, np.zeros(0, np.int64)]), return_index=True)
        return at, values[first]


def predictions(explanations: Mapping[int, Explanation], tokens: Int[Tensor, "n pos"]) -> Events:
    """What explanations predict for some contexts, by the longest pattern that fits."""
    index, found = Index(tokens), []
    for latent in sorted(explanations):
        at, values = index.predict(explanations[latent])
        found.append((np.full(len(at), latent), at, values))
    if not found:
        return Events(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    return Events(*(np.concatenate(column) for column in zip(*found, strict=True)))


def predict(explanation: Explanation, tokens: Int[Tensor, "n pos"]) -> Float[Tensor, "n pos"]:
    """The activation that an explanation predicts for each token: 0 where no pattern fits."""
    found = torch.zeros(tokens.numel())
    at, values = Index(tokens).predict(explanation)
    found[torch.from_numpy(at)] = torch.from_numpy(values).float()
    return found.view(tokens.shape)


# --- scores -----------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A share with its 95 % interval; NaN where there is nothing to take a share of."""

    value: float
    low: float
    high: float


class Scores(NamedTuple):
    """How predictions meet what fires, in counts of tokens, one column per latent, one row per `BLOCK` contexts."""

    latents: Int[np.ndarray, "m"]
    predicted: Int[np.ndarray, "blocks m"]
    fired: Int[np.ndarray, "blocks m"]
    hits: Int[np.ndarray, "blocks m"]

    def sides(self, name: str) -> tuple[Float[np.ndarray, "blocks m"], Float[np.ndarray, "blocks m"]]:
        """What is divided by what: `precision`, `recall`, or `f1`, which is hits over the mean of the other two."""
        below = {"precision": self.predicted, "recall": self.fired, "f1": (self.predicted + self.fired) / 2}
        return self.hits.astype(float), below[name].astype(float)

    def each(self, name: str) -> Float[np.ndarray, "m"]:
        """Of every latent by itself; NaN where nothing is predicted, or fires."""
        hits, below = (side.sum(0) for side in self.sides(name))
        return np.divide(hits, below, out=np.full(len(below), math.nan), where=below > 0)

    def interval(self, name: str) -> list[Interval]:
        """Of every latent, by Wilson's formula; tokens of one block count as one observation (Kish's effective n)."""
        _, below = self.sides(name)
        value, squares = self.each(name), (below**2).sum(0)
        n = np.divide(below.sum(0) ** 2, squares, out=np.full(len(squares), math.nan), where=squares > 0)
        centre, spread = value + 1.92 / n, 1.96 * np.sqrt(value * (1 - value) / n + 0.96 / n**2)
        low, high = ((centre + sign * spread) / (1 + 3.84 / n) for sign in (-1, 1))
        return [Interval(*row) for row in np.stack([value, low.clip(0), high.clip(None, 1)], 1).tolist()]

    def mean(self, name: str, where: Bool[np.ndarray, "m"] | None = None) -> Estimate | None:
        """Mean over latents (those `where` says) that have the score; standard error by leaving out each block.

        None where there is no such latent.
        """
        hits, below = (side if where is None else side[:, where] for side in self.sides(name))
        there = below.sum(0) > 0
        if not there.any():
            return None
        hits, below = hits[:, there], below[:, there]
        rest = below.sum(0) - below
        without = np.divide(hits.sum(0) - hits, rest, out=np.full(rest.shape, math.nan), where=rest > 0)
        means, blocks = np.nanmean(without, axis=1), len(hits)
        se = math.sqrt((blocks - 1) / blocks * ((means - means.mean()) ** 2).sum())
        return Estimate(float((hits.sum(0) / below.sum(0)).mean()), se)


def score(predicted: Events, fired: Events, latents: Iterable[int], tokens: Int[Tensor, "n pos"]) -> Scores:
    """Compare predictions with what fires, at all tokens of some contexts; the event is z > 0 (section 4.3)."""
    which, block = np.array(sorted(latents), dtype=np.int64), BLOCK * tokens.shape[1]
    shape = -(-tokens.numel() // block), len(which)

    def counts(found: Events, keep: np.ndarray | None = None) -> Int[np.ndarray, "blocks m"]:
        mask = np.isin(found.latents, which) if keep is None else keep
        column = np.searchsorted(which, found.latents[mask])
        return np.bincount(found.at[mask] // block * shape[1] + column, minlength=shape[0] * shape[1]).reshape(shape)

    ours, theirs = (found.latents * np.int64(tokens.numel()) + found.at for found in (predicted, fired))
    return Scores(which, counts(predicted), counts(fired), counts(predicted, np.isin(ours, theirs, kind="sort")))


# --- what explanations are compared with ------------------------------------------------------------------------------


def best_tokens(found: Events, tokens: Int[Tensor, "n pos"], latents: Iterable[int]) -> dict[int, Explanation]:
    """The one token that does best as an explanation: with the highest F1 on the text given, the training text."""
    flat = tokens.cpu().numpy().ravel()
    common, best = np.bincount(flat), {}
    for latent in latents:
        _, at, values = found.of(latent)
        on = np.bincount(flat[at], minlength=len(common))
        token = int(np.argmax(on / (common + len(at)))) if len(at) else None  # half the F1
        best[latent] = Explanation(
            {} if token is None else {Pattern((token,)): float(values[flat[at] == token].mean())}
        )
    return best


@torch.no_grad()
def lens_tokens(model, sae: SAE, latents: Iterable[int], n: int = 5) -> dict[int, Explanation]:
    """The tokens that a latent's direction raises most, by the final norm's gain and the unembedding."""
    latents = list(latents)
    directions = sae.W_dec[latents].to(model.cfg.device)
    gain = getattr(model.ln_final, "weight", torch.ones_like(directions[0]))
    raised = model.unembed(((directions - directions.mean(1, keepdim=True)) * gain)[None])[0].topk(n).indices
    return {
        i: Explanation({Pattern((token,)): 1.0 for token in row})
        for i, row in zip(latents, raised.tolist(), strict=True)
    }


def following(tokens: Int[Tensor, "n pos"]) -> Int[Tensor, "n pos"]:
    """In each token's place the next one; -1 in that of the last."""
    return torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-1)


# --- explanations in the latents' place -------------------------------------------------------------------------------


def gains(predicted: Events, fired: Events, latents: Iterable[int], n_tokens: int) -> dict[int, float]:
    """By what to multiply each latent's predictions, so that they are nearest to what it really has there."""
    keys = [found.latents * np.int64(n_tokens) + found.at for found in (predicted, fired)]
    place = np.searchsorted(keys[1], keys[0]).clip(max=max(0, len(keys[1]) - 1))
    true = np.where(keys[1][place] == keys[0], fired.values[place], 0) if len(keys[1]) else np.zeros(len(keys[0]))
    size = max(latents, default=0) + 1
    above, below = (np.bincount(predicted.latents, predicted.values * z, size) for z in (true, predicted.values))
    return {i: float(above[i] / below[i]) if below[i] else 1.0 for i in latents}


class Explained:
    """Takes the activation's place: what an SAE decodes from given events instead of its own codes (section 4.4).

    The activation's mean and scale are its own. Contexts have to come in their order, as `splice.downstream` has them.
    """

    def __init__(self, sae: SAE, found: Events):
        order = np.argsort(found.at, kind="stable")
        self.at = found.at[order]
        self.latents, self.values = (torch.from_numpy(column[order]) for column in (found.latents, found.values))
        self.sae, self.first = sae, 0

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "n pos d_model"]) -> Float[Tensor, "n pos d_model"]:
        last = self.first + x.shape[:-1].numel()
        own = slice(*np.searchsorted(self.at, [self.first, last]))
        rows = torch.from_numpy(self.at[own] - self.first).to(x.device)
        parts = self.values[own, None].to(x) * self.sae.W_dec[self.latents[own].to(x.device)]
        x_hat = torch.zeros_like(x).flatten(0, 1).index_add_(0, rows, parts).view_as(x) + self.sae.pre_bias
        _, mean, scale = self.sae.normalized(x.clone())
        self.first = last
        return x_hat if scale is None else x_hat * scale + mean


# --- the stored sweep -------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """What the sweep found about one latent; scores are over all tokens of held-out text."""

    explanation: Explanation
    precision: Interval
    recall: Interval
    f1: float
    """NaN where it neither fires nor is predicted to."""
    density: float
    """Share of the training tokens on which it fires."""
    gain: float
    """What its predictions are multiplied by, see `gains`."""
    predicted: int
    fired: int
    hits: int


def scored(
    found: Mapping[int, Explanation], scores: Scores, density: Sequence[float], gains: Mapping[int, float]
) -> dict[int, Scored]:
    """Explanations with their scores, by latent."""
    counts = zip(*(side.sum(0).tolist() for side in (scores.predicted, scores.fired, scores.hits)), strict=True)
    shares = zip(scores.interval("precision"), scores.interval("recall"), scores.each("f1").tolist(), strict=True)
    return {
        i: Scored(found[i], *own, float(density[i]), gains[i], *numbers)
        for i, own, numbers in zip(scores.latents.tolist(), shares, counts, strict=True)
    }


def line(latent: int, own: Scored) -> str:
    """One latent in one line of text: numbers, `|`, patterns; `_` is any token and `^` the start of the context."""
    ends = own.precision.low, own.precision.high, own.recall.low, own.recall.high
    numbers = [latent, own.predicted, own.fired, own.hits, *(f"{x:.3g}" for x in (own.density, own.gain, *ends))]
    found = (
        "^" * one.start + ",".join("_" if i is None else str(i) for i in one.tokens) + f"={value:.3g}"
        for one, value in own.explanation.patterns.items()
    )
    return " ".join(map(str, numbers)) + "|" + " ".join(found)


def parsed(text: str) -> tuple[int, Scored]:
    """A `line` read again.

    Raises:
        UserError: it is none.
    """
    try:
        numbers, _, rest = text.partition("|")
        latent, predicted, fired, hits, *others = numbers.split()
        predicted, fired, hits = int(predicted), int(fired), int(hits)
        density, gain, *ends = map(float, others)
        found = {}
        for item in rest.split():
            tokens, value = item.split("=")
            wanted = tuple(None if i == "_" else int(i) for i in tokens.removeprefix("^").split(","))
            found[Pattern(wanted, tokens.startswith("^"))] = float(value)
        shares = (_share(hits, predicted), *ends[:2]), (_share(hits, fired), *ends[2:])
        own = (Explanation(found), *(Interval(*share) for share in shares), _share(2 * hits, predicted + fired))
        return int(latent), Scored(*own, density, gain, predicted, fired, hits)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"a stored explanation is damaged ({text[:40]!r}): run `saelib run 09 --sweep` again"
        ) from error


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def stored(profile_name: str, sae_name: str) -> dict[int, Scored] | None:
    """Explanations and scores of all latents that fire in the sweep's training text; None where it was not run.

    Raises:
        UserError: the file is damaged.
    """
    values = published(profile_name, f"09_sweep/{sae_name}")
    return dict(map(parsed, values["explanations"]["value"])) if "explanations" in values else None
