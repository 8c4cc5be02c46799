"""N2G (sections 4.3 and 4.4): a latent explained by short patterns of tokens, and what such explanations are worth.

From a few tokens where a latent fires: cut the context behind the token; grow the text leftwards from it until the
latent has half of its activation again; replace each token of that piece by a filler, and where more than half of the
activation is left, let any token stand there. What remains is a pattern; all patterns of a latent explain it.
"""

from __future__ import annotations

import itertools
import json
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

        def word(token: int | None) -> str:
            shown = "▢" if token is None else tokenizer.decode([token])
            return shown.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")

        found = sorted(self.patterns, key=self.patterns.get, reverse=True)[:n]
        return "  |  ".join("⊢ " * one.start + " ".join(map(word, one.tokens)) for one in found)


class Events(NamedTuple):
    """Latents above 0, or predicted to be: sorted by latent, then by token."""

    latents: Int[np.ndarray, "m"]
    at: Int[np.ndarray, "m"]
    """Number of the token, counted through all contexts."""
    values: Float[np.ndarray, "m"]

    def among(self, others: Events) -> Bool[np.ndarray, "m"]:
        """Which of these are in `others`, too: the same latent at the same token."""
        ours, theirs = (found.latents * 2**40 + found.at for found in (self, others))
        return np.isin(ours, theirs, kind="sort")

    def where(self, mask: Bool[np.ndarray, "m"]) -> Events:
        """Some of them."""
        return Events(*(column[mask] for column in self))


@torch.no_grad()
def events(model, hook: str, sae: SAE, tokens: Int[Tensor, "n pos"]) -> Events:
    """Where an SAE's latents fire in some contexts. Raises UserError: see `activations.harvest`."""
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


# --- from examples to patterns ----------------------------------------------------------------------------------------


def reader(model, hook: str, sae: SAE) -> Reader:
    """Re-runs of the model up to the hook: each distinct text once, however many latents ask for it."""
    size = max(1, min(8192, LATENTS // sae.n_latents))

    @torch.no_grad()
    def read(texts: Int[Tensor, "n pos"], latents: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        once, which = torch.unique(texts, dim=0, return_inverse=True)
        found = torch.zeros(len(texts))
        for first in range(0, len(once), size):
            x = harvest(model, once[first : first + size].to(model.cfg.device), hook, (-1, None))
            values, ids = (column if column is None else column.cpu() for column in sae.encode(x)[:2])
            asked = (which // size == first // size).nonzero()[:, 0]
            rows, wanted = which[asked] - first, latents[asked, None]
            z = values[rows].gather(1, wanted) if ids is None else values[rows] * (ids[rows] == wanted)
            found[asked] = z.sum(1).float()
        return found

    return read


def examples(found: Events, latents: Iterable[int], n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the events explain each latent: the strongest half, the others drawn; as latents and rows of `found`."""
    draw, rows = np.random.default_rng(seed), [np.zeros(0, np.int64)]
    for low, high in (np.searchsorted(found.latents, [latent, latent + 1]) for latent in latents):
        order = low + np.argsort(-found.values[low:high], kind="stable")
        top, others = order[: n - n // 2], order[n - n // 2 :]
        rows += [top, draw.permutation(others)[: n // 2]]
    rows = np.concatenate(rows)
    return found.latents[rows], rows


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
        reach: how many there are of them, before `before` is cut to size.
        filler: what stands in front of a piece of a context; None, the public way, is nothing: then a piece begins a
            context by accident, and what has grown to its beginning counts as tied to it.
    """
    length, start, value = torch.zeros_like(reach), torch.zeros_like(reach, dtype=torch.bool), torch.zeros_like(wanted)
    fronts = [None] if filler is None else [filler, None]  # a context that is there from its first token needs none
    for size, front in itertools.product(range(1, before.shape[1] + 1), fronts):
        tried = reach == size if front is None and filler is not None else reach >= size
        rows = (tried & (length == 0)).nonzero()[:, 0]
        if not len(rows):
            continue
        z = read(_fronted(before[rows, -size:], front), latents[rows])
        rows, z = rows[z >= wanted[rows]], z[z >= wanted[rows]]
        length[rows], value[rows], start[rows] = size, z, (reach[rows] == size) & (front is None)
    return Cut(length, start, value)


def _fronted(texts: Int[Tensor, "n pos"], filler: int | None) -> Int[Tensor, "n more"]:
    return texts if filler is None else torch.nn.functional.pad(texts, (1, 0), value=filler)


def important(
    read: Reader, before: Int[Tensor, "n longest"], cut: Cut, latents: Int[Tensor, "n"], filler: int, front: bool
) -> Bool[Tensor, "n longest"]:
    """Which tokens of the shortened texts the latent needs: without it, at least `HALF` of the activation is gone.

    A filler cannot be replaced by itself: it stays.
    """
    needed = before == filler
    for size, start in itertools.product(filter(None, cut.length.unique().tolist()), (False, True)):
        rows = ((cut.length == size) & (cut.start == start)).nonzero()[:, 0]
        if not len(rows):
            continue
        texts = before[rows, None, -size:].repeat(1, size, 1)
        texts.diagonal(dim1=1, dim2=2).fill_(filler)
        texts = _fronted(texts.flatten(0, 1), filler if front and not start else None)
        z = read(texts, latents[rows].repeat_interleave(size))
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
    found: dict[int, dict[Pattern, list[float]]] = {latent: defaultdict(list) for latent in latents}
    columns = (before.tolist(), needed.tolist(), cut.length.tolist(), cut.start.tolist(), latents, values)
    for tokens, keep, length, start, latent, value in zip(*columns, strict=True):
        if not length:
            continue
        keep[-1] |= not start and not any(keep[-length:])
        gaps = [token if kept else None for token, kept in zip(tokens[-length:], keep[-length:], strict=True)]
        first = 0 if start else next(i for i, token in enumerate(gaps) if token is not None)
        found[latent][Pattern(tuple(gaps[first:]), start)].append(value)
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
    at, values, which = (torch.from_numpy(column) for column in (found.at[rows], found.values[rows], latents))
    longest, reach = min(LONGEST, tokens.shape[1]), at % tokens.shape[1] + 1
    places = (at[:, None] + torch.arange(1 - longest, 1)).clamp_min(0)
    before = tokens.cpu().flatten()[places].masked_fill(torch.arange(longest) < longest - reach[:, None], filler)
    cut = pruned(read, before, reach, which, HALF * values.float(), filler if front else None)
    needed = important(read, before, cut, which, filler, front)
    return patterns_of(before, cut, needed, latents.tolist(), values.tolist())


def explain(
    model, hook: str, sae: SAE, tokens: Int[Tensor, "n pos"], latents: Iterable[int], n: int = EXAMPLES, seed: int = 0
) -> dict[int, Explanation]:
    """Explanations of some latents, from contexts of the training text. Raises UserError: not an SAE of this model."""
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
        self.tokens = tokens.cpu().numpy().ravel()
        self.column = np.arange(len(self.tokens)) % tokens.shape[1]
        self.order = np.argsort(self.tokens, kind="stable")
        self.sorted = self.tokens[self.order]

    def ends(self, pattern: Pattern) -> Int[np.ndarray, "m"]:
        """Last tokens of all places that a pattern fits."""
        last, at = len(pattern.tokens) - 1, np.arange(len(self.tokens))
        fixed = [(last - i, token) for i, token in enumerate(pattern.tokens) if token is not None]
        if fixed:
            spans = [np.searchsorted(self.sorted, [token, token + 1]) for _, token in fixed]
            rarest = min(range(len(fixed)), key=lambda i: spans[i][1] - spans[i][0])
            at = self.order[slice(*spans[rarest])] + fixed.pop(rarest)[0]
            at = at[at < len(self.tokens)]
        at = at[self.column[at] == last] if pattern.start else at[self.column[at] >= last]
        for back, token in fixed:
            at = at[self.tokens[at - back] == token]
        return at


def predictions(explanations: Mapping[int, Explanation], tokens: Int[Tensor, "n pos"]) -> Events:
    """What explanations predict for some contexts, by the longest pattern that fits."""
    index, found = Index(tokens), [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for latent, own in sorted(explanations.items()):
        ranked = sorted(own.patterns.items(), key=lambda item: (item[0].rank, item[1]), reverse=True)
        ends = [index.ends(pattern) for pattern, _ in ranked]
        values = np.repeat([value for _, value in ranked], [len(some) for some in ends])
        at, first = np.unique(np.concatenate([found[0][0], *ends]), return_index=True)
        found.append((np.full(len(at), latent), at, values[first]))
    return Events(*(np.concatenate(column) for column in zip(*found, strict=True)))


def predict(explanation: Explanation, tokens: Int[Tensor, "n pos"]) -> Float[Tensor, "n pos"]:
    """The activation that an explanation predicts for each token: 0 where no pattern fits."""
    found, (_, at, values) = torch.zeros(tokens.numel()), predictions({0: explanation}, tokens)
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

    def mean(self, name: str, where: Bool[np.ndarray, "m"]) -> Estimate | None:
        """Mean over those latents `where` says that have the score; standard error by leaving out each block.

        None where there is no such latent.
        """
        there = where & np.isfinite(self.each(name))
        if not there.any():
            return None
        hits, below = (side[:, there] for side in self.sides(name))
        rest = below.sum(0) - below
        without = np.divide(hits.sum(0) - hits, rest, out=np.full(rest.shape, math.nan), where=rest > 0)
        means, blocks = np.nanmean(without, axis=1), len(hits)
        se = math.sqrt((blocks - 1) / blocks * ((means - means.mean()) ** 2).sum())
        return Estimate(float((hits.sum(0) / below.sum(0)).mean()), se)


def score(predicted: Events, fired: Events, latents: Iterable[int], tokens: Int[Tensor, "n pos"]) -> Scores:
    """Compare predictions with what fires, at all tokens of some contexts; the event is z > 0 (section 4.3)."""
    which, block = np.array(sorted(latents), dtype=np.int64), BLOCK * tokens.shape[1]
    shape = -(-tokens.numel() // block), len(which)

    def counts(found: Events) -> Int[np.ndarray, "blocks m"]:
        own = found.where(np.isin(found.latents, which))
        cell = own.at // block * shape[1] + np.searchsorted(which, own.latents)
        return np.bincount(cell, minlength=math.prod(shape)).reshape(shape)

    return Scores(which, *map(counts, (predicted, fired, predicted.where(predicted.among(fired)))))


# --- what explanations are compared with ------------------------------------------------------------------------------


def best_tokens(found: Events, tokens: Int[Tensor, "n pos"], latents: Iterable[int]) -> dict[int, Explanation]:
    """The one token that does best as an explanation: with the highest F1 on the text given, the training text."""
    flat = tokens.cpu().numpy().ravel()
    common, best = np.bincount(flat), {}
    for latent in latents:
        rows = slice(*np.searchsorted(found.latents, [latent, latent + 1]))
        here, values = flat[found.at[rows]], found.values[rows]
        token = int(np.argmax(np.bincount(here, minlength=len(common)) / (common + max(1, len(here)))))  # half the F1
        best[latent] = Explanation({Pattern((token,)): float(values[here == token].mean())} if len(here) else {})
    return best


@torch.no_grad()
def lens_tokens(model, sae: SAE, latents: Iterable[int], n: int = 5) -> dict[int, Explanation]:
    """The tokens that a latent's direction raises most, by the final norm's gain and the unembedding."""
    latents = list(latents)
    directions = sae.W_dec[latents].to(model.cfg.device)
    gain = getattr(model.ln_final, "weight", torch.ones_like(directions[0]))
    raised = model.unembed(((directions - directions.mean(1, keepdim=True)) * gain)[None])[0].topk(n).indices.tolist()
    return {i: Explanation({Pattern((one,)): 1.0 for one in row}) for i, row in zip(latents, raised, strict=True)}


def following(tokens: Int[Tensor, "n pos"]) -> Int[Tensor, "n pos"]:
    """In each token's place the next one; -1 in that of the last."""
    return torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-1)


# --- explanations in the latents' place -------------------------------------------------------------------------------


def rescaled(predicted: Events, tried: Events, fired: Events) -> Events:
    """Predictions with each latent's multiplied by what brings them nearest (least squares) to its true values.

    Args:
        tried: what the same explanations predict for other text.
        fired: what fires in that text.
    """
    ours, theirs = tried.where(tried.among(fired)), fired.where(fired.among(tried))  # row by row the same
    size = 1 + max((found.latents[-1] for found in (predicted, tried) if len(found.at)), default=0)
    above = np.bincount(ours.latents, ours.values * theirs.values, size)
    below = np.bincount(tried.latents, tried.values**2, size)
    gain = np.divide(above, below, out=np.ones(size), where=below > 0)
    return predicted._replace(values=predicted.values * gain[predicted.latents])


class Explained:
    """Takes the activation's place: what an SAE decodes from given events instead of its own codes (section 4.4).

    All other latents are 0; each token's mean and scale, which the SAE takes out and puts back, are its own. Contexts
    have to come in their order, all `n_tokens` of them, as `splice.downstream` has them.
    """

    def __init__(self, sae: SAE, found: Events, n_tokens: int):
        order = np.argsort(found.at, kind="stable")
        self.at = found.at[order]
        self.latents, self.values = (torch.from_numpy(column[order]) for column in (found.latents, found.values))
        self.sae, self.n_tokens, self.first = sae, n_tokens, 0

    def skip(self, shape: torch.Size) -> None:
        """Pass over contexts that another process takes; `shape` is that of their tokens."""
        self.first = (self.first + shape.numel()) % self.n_tokens

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "n pos d_model"]) -> Float[Tensor, "n pos d_model"]:
        last = self.first + x.shape[:-1].numel()
        own = slice(*np.searchsorted(self.at, [self.first, last]))
        rows = torch.from_numpy(self.at[own] - self.first).to(x.device)
        parts = self.values[own, None].to(x) * self.sae.W_dec[self.latents[own].to(x.device)]
        x_hat = torch.zeros_like(x).flatten(0, 1).index_add_(0, rows, parts).view_as(x) + self.sae.pre_bias
        _, mean, scale = self.sae.normalized(x.clone())
        self.first = last % self.n_tokens
        return x_hat if scale is None else x_hat * scale + mean


# --- the stored sweep -------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """What the sweep found about one latent; scores are over all tokens of held-out text."""

    explanation: Explanation
    precision: Interval
    recall: Interval
    density: float
    """Share of the training tokens on which it fires."""
    predicted: int
    fired: int
    hits: int

    @property
    def f1(self) -> float:
        """NaN where it neither fires nor is predicted to."""
        return _share(2 * self.hits, self.predicted + self.fired)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def lines(found: Mapping[int, Explanation], scores: Scores, density: Sequence[float]) -> list[str]:
    """What is stored of each latent: a list of numbers, last of them the patterns, each with its value and start."""
    counts = zip(*(side.sum(0).tolist() for side in scores[1:]), strict=True)
    shares = zip(scores.interval("precision"), scores.interval("recall"), strict=True)
    made = []
    for latent, own, (precision, recall) in zip(scores.latents.tolist(), counts, shares, strict=True):
        shown = [_rounded(x) for x in (density[latent], *precision[1:], *recall[1:])]
        patterns = [[_rounded(z), int(one.start), *one.tokens] for one, z in found[latent].patterns.items()]
        made.append(json.dumps([latent, *own, *shown, patterns], separators=(",", ":")))
    return made


def _rounded(x: float) -> float:
    return float(f"{x:.3g}")


def read_line(line: str) -> tuple[int, Scored]:
    """A latent and what one of the `lines` says about it."""
    latent, predicted, fired, hits, density, *ends, patterns = json.loads(line)
    found = Explanation({Pattern(tuple(tokens), bool(start)): value for value, start, *tokens in patterns})
    precision, recall = Interval(_share(hits, predicted), *ends[:2]), Interval(_share(hits, fired), *ends[2:])
    return latent, Scored(found, precision, recall, density, predicted, fired, hits)


def stored(profile_name: str, sae_name: str) -> dict[int, Scored] | None:
    """Explanations and scores of all latents that fire in the sweep's training text; None where it was not run."""
    values = published(profile_name, f"09_sweep/{sae_name}")
    return dict(map(read_line, values["explanations"]["value"])) if values else None
