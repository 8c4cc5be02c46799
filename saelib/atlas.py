"""Chapter 10: what every latent does, in one pass over a text; who its partners are; and a page to read it on.

The pass leaves a sparse matrix, tokens by latents, with an entry for each firing. All the rest is read off its columns,
so it is exact, and memory is bounded by the text: 8 bytes for each firing, however many latents there are.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.sparse import csc_array, csr_array, vstack
from torch import Tensor

from saelib.metrics import Estimate, activations, mean, pieces
from saelib.profile import BUILD, Profile, write
from saelib.sae import SAE, Codes
from saelib.text import Document

MATCH = 0.7
"""Decoder cosine from which on two latents count as partners."""
BEFORE, AFTER = 20, 12
"""Tokens of an excerpt before its strongest one and from it on: 32 in all, of the 40 that we allow ourselves."""
BINS = 2.0 ** (np.arange(-40, 41) / 4)
"""Edges of the histograms: quarters of an octave, so that one set of edges suits all latents."""
SHOWN = 8192
"""Latents on a page at most. With more alive, some are drawn at random."""
LARGEST = 8_000_000
"""Bytes that a page may have."""
PAGES = BUILD / "atlas"
"""A folder of pages for each profile."""
TEMPLATE = Path(__file__).with_suffix(".html")


# --- the pass ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def firings(
    profile: Profile, model, tokens: Int[Tensor, "n pos"], saes: Mapping[str, SAE | None]
) -> dict[str, csc_array | None]:
    """What each SAE makes of every token: a matrix [n * pos, n_latents] of its values above 0.

    Raises:
        UserError: an SAE of another width.
    """
    parts: dict[str, list[csr_array]] = {name: [] for name, sae in saes.items() if sae}
    for batch in activations(profile, model, tokens):
        for name in parts:
            parts[name] += [_sparse(saes[name].encode(x), saes[name].n_latents) for x in pieces(batch, saes[name])]
    return {name: vstack(parts[name]).tocsc() if sae else None for name, sae in saes.items()}


def _sparse(codes: Codes, n_latents: int) -> csr_array:
    values = codes.values.flatten(0, -2)
    token, place = (values > 0).nonzero(as_tuple=True)
    latent = place if codes.indices is None else codes.indices.flatten(0, -2)[token, place]
    entries = values[token, place].float().cpu().numpy()
    return csr_array((entries, (token.cpu().numpy(), latent.cpu().numpy())), shape=(len(values), n_latents))


def alive(fired: csc_array) -> Int[np.ndarray, "alive"]:
    """Latents that fire on this text at all."""
    return np.flatnonzero(np.diff(fired.indptr))


def facts(fired: csc_array) -> pd.DataFrame:
    """One row per living latent: on how many tokens it fires, their share of all, and its highest value."""
    times, which = np.diff(fired.indptr), alive(fired)
    highest = np.maximum.reduceat(fired.data, fired.indptr[which])
    columns = {"times": times[which], "density": times[which] / fired.shape[0], "highest": highest}
    return pd.DataFrame(columns, index=pd.Index(which, name="latent"))


def rates(fired: csc_array) -> Float[Tensor, "n_latents"]:
    """Share of the tokens on which each latent is on."""
    return torch.from_numpy(np.diff(fired.indptr)) / fired.shape[0]


def histogram(fired: csc_array, latent: int) -> Int[np.ndarray, "bins"]:
    """How many of a latent's firings lie between the `BINS`; what is beyond them counts in the outermost."""
    return np.histogram(fired.data[_entries(fired, latent)].clip(BINS[0], BINS[-1]), BINS)[0]


def _entries(fired: csc_array, latent: int) -> slice:
    return slice(fired.indptr[latent], fired.indptr[latent + 1])


class Moments(NamedTuple):
    """The tokens at which latents are strongest, each in a context of its own."""

    top: dict[int, list[int]]
    """Per latent, in the contexts with its highest values, highest first. A token is a row of `firings`."""
    sampled: dict[int, list[int]]
    """Per latent, in contexts drawn at random from the others in which it fires."""


def moments(fired: csc_array, length: int, n: int = 5, seed: int = 0) -> Moments:
    """Where to look at each latent: in its `n` top contexts of `length` tokens, and in `n` random others."""
    latent = np.repeat(np.arange(fired.shape[1]), np.diff(fired.indptr))
    order = np.lexsort((fired.indices, -fired.data, latent))  # of equals, the first in the text
    pairs = latent[order].astype(np.int64) * fired.shape[0] + fired.indices[order] // length
    order = order[np.sort(np.unique(pairs, return_index=True)[1])]  # one token of each context, the strongest
    latent, token = latent[order], fired.indices[order]
    first = np.searchsorted(latent, latent)
    place = np.arange(len(latent)) - first
    lots = np.random.default_rng(seed).random(len(latent)) - (place < n)  # the top ones first: they drop out
    drawn = np.lexsort((lots, latent))
    rest = drawn[(place >= n) & (place < 2 * n)]
    return Moments(*(_grouped(latent[which], token[which]) for which in (place < n, rest)))


def _grouped(latent: np.ndarray, token: np.ndarray) -> dict[int, list[int]]:
    return pd.Series(token).groupby(latent).agg(list).to_dict()


# --- partners ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def matched(a: SAE, b: SAE) -> Float[Tensor, "n_latents"]:
    """For each latent of `a` the highest cosine between its decoder direction and one of `b`."""
    return torch.cat([cosines.amax(1) for cosines in _cosines(a, b, torch.arange(a.n_latents))])


def _cosines(a: SAE, b: SAE, which: Int[Tensor, "some"]) -> Iterator[Float[Tensor, "few n_latents"]]:
    """Decoder cosines of some latents of `a` with all of `b`, a few at a time."""
    ours, theirs = (torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=1).cpu() for sae in (a, b))
    for few in which.split(max(1, 2**24 // b.n_latents)):
        yield ours[few] @ theirs.T


def partners(a: SAE, b: SAE, fired_a: csc_array, fired_b: csc_array) -> pd.DataFrame:
    """For each living latent of `a`, the living one of `b` that is nearest by direction, and by the company it keeps.

    `cosine` is between decoder directions; `together` is the cosine of two records of firing, tokens on which both are
    on over the geometric mean of tokens on which each is. `by_cosine` and `by_together` are the latents of `b`, and
    `there` is what `together` is with the one that the cosine names.
    """
    which, ours = alive(fired_a), (fired_a > 0).astype(np.float32)
    theirs = (fired_b > 0).astype(np.float32)
    times_a, times_b = (np.diff(fired.indptr) for fired in (fired_a, fired_b))
    found, done = [], 0
    for cosines in _cosines(a, b, torch.from_numpy(which)):
        few = which[done : (done := done + len(cosines))]
        cosine = np.where(times_b > 0, cosines.numpy(), -2)
        both = (ours[:, few].T @ theirs).toarray()
        together = both / np.sqrt(np.outer(times_a[few], times_b.clip(1)))
        at, near, rows = together.argmax(1), cosine.argmax(1), np.arange(len(few))
        found.append(np.stack([near, cosine[rows, near], at, together[rows, at], together[rows, near]], 1))
    table = pd.DataFrame(np.concatenate(found), pd.Index(which, name="latent"))
    table.columns = ["by_cosine", "cosine", "by_together", "together", "there"]
    return table.astype({"by_cosine": int, "by_together": int})


@torch.no_grad()
def neighbours(sae: SAE, which: Int[np.ndarray, "shown"], n: int = 6) -> dict[int, list[tuple[int, float]]]:
    """For each of some latents the `n` others of them with the nearest decoder directions, and the cosines."""
    found, where = {}, torch.from_numpy(which)
    for cosines in _cosines(sae, sae, where):
        rows = which[len(found) : len(found) + len(cosines)]
        cosines[torch.arange(len(rows)), torch.from_numpy(rows)] = -2
        near = cosines[:, where].topk(min(n, len(which) - 1))
        for latent, values, places in zip(rows.tolist(), near.values.tolist(), near.indices.tolist(), strict=True):
            found[latent] = [(int(which[place]), value) for place, value in zip(places, values, strict=True)]
    return found


@torch.no_grad()
def logit_effects(model, sae: SAE, which: Int[np.ndarray, "shown"], n: int = 8) -> tuple[Tensor, Tensor]:
    """Tokens that latents raise and lower most: decoder rows through the last layer norm's weights and the unembedding.

    What the blocks in between do is left out. Values are less their mean over the vocabulary; each of the two tensors
    is [shown, 2 n]: tokens, and values, from the most raised down and then from the most lowered up.
    """
    tokens, values = [], []
    for few in torch.from_numpy(which).split(256):
        rows = sae.W_dec[few].detach().to(model.W_U)
        logits = ((rows - rows.mean(1, keepdim=True)) * model.ln_final.weight) @ model.W_U
        logits = (logits - logits.mean(1, keepdim=True)).float().cpu()
        ends = [logits.topk(n, largest=up) for up in (True, False)]
        tokens.append(torch.cat([end.indices for end in ends], 1))
        values.append(torch.cat([end.values for end in ends], 1))
    return torch.cat(tokens), torch.cat(values)


def by_share(x: pd.Series, of: pd.Series, n: int = 8) -> tuple[list[float], list[Estimate]]:
    """Means of one thing in `n` equally large groups of latents, ordered by another; and that one's median in each."""
    order, numbers = x.argsort(), of.astype(float).to_numpy()
    parts = np.array_split(order.to_numpy(), n)
    return [float(x.iloc[part].median()) for part in parts], [mean(torch.from_numpy(numbers[part])) for part in parts]


def rank(a: pd.Series, b: pd.Series) -> Estimate | None:
    """Spearman's correlation of two columns, where both were measured; its standard error is that of Fisher's z."""
    both = pd.concat([a, b], axis=1).dropna()
    if len(both) < 30:
        return None
    value = both.iloc[:, 0].corr(both.iloc[:, 1], "spearman")
    return Estimate(value, (1 - value**2) / (len(both) - 3) ** 0.5)


def raised(model, sae: SAE, which: Sequence[int]) -> list[str]:
    """Latents in a line each: the number, and the three tokens that `logit_effects` finds most raised."""
    tokens = logit_effects(model, sae, np.array(which), 3)[0][:, :3].tolist()
    words = [[model.tokenizer.decode([i]).strip(" ").replace("\n", "⏎") for i in row] for row in tokens]
    return [f"{latent}: " + "  ".join(row) for latent, row in zip(which, words, strict=True)]


# --- the page ---------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """The text that latents were seen on."""

    tokenizer: object
    tokens: Int[np.ndarray, "n pos"]
    documents: list[Document]
    which: Int[np.ndarray, "n pos"]
    """The document that each token is from (`damage.origins`)."""


def excerpt(text: Text, fired: csc_array, latent: int, token: int) -> tuple[int, int, list[int], str]:
    """(document, place of the strongest token, token ids, one digit for each) around one moment of a latent.

    It stays in the document. The digits are ninths of the latent's highest value on the whole text, rounded up: 0 is
    off.
    """
    length, entries = text.tokens.shape[1], _entries(fired, latent)
    row, column = divmod(token, length)
    same = text.which[row] == text.which[row, column]
    start, end = max(int(same.argmax()), column - BEFORE), min(length - int(same[::-1].argmax()), column + AFTER)
    first, last = entries.start + np.searchsorted(fired.indices[entries], [row * length + start, row * length + end])
    digits = np.zeros(end - start, int)
    ninths = np.ceil(9 * fired.data[first:last] / fired.data[entries].max())
    digits[fired.indices[first:last] - row * length - start] = ninths.clip(1, 9)
    ids = text.tokens[row, start:end].tolist()
    return int(text.which[row, column]), column - start, ids, "".join(map(str, digits.tolist()))


class Latents(NamedTuple):
    """What a page says of one SAE's latents."""

    sae: SAE
    fired: csc_array
    table: pd.DataFrame
    """One row per living latent, columns as in `COLUMNS`; NaN where it was not measured."""
    kin: Mapping[int, list[tuple]]
    """Relatives in the other SAE: (latent, decoder cosine, how often together, whether both name the same)."""
    words: Mapping[int, str]
    """Explanations; {} where there are none."""


COLUMNS = "density", "highest", "sparsity", "precision", "recall", "partner"


def children(found: pd.DataFrame) -> dict[int, list[tuple]]:
    """Kin of the small SAE's latents, by `partners(large, small)`: the large ones nearest to each, which split it."""
    agree = found.by_cosine == found.by_together
    rows = found.assign(latent=found.index, agree=agree).sort_values("cosine", ascending=False)
    wanted = rows[["latent", "cosine", "there", "agree"]]
    return {small: list(some.itertuples(False, None)) for small, some in wanted.groupby(rows.by_cosine)}


def parents(found: pd.DataFrame) -> dict[int, list[tuple]]:
    """Kin of the large SAE's latents: the small one that direction names, and the one that company names."""
    kin = {}
    for row in found.itertuples():
        agree = row.by_cosine == row.by_together
        kin[row.Index] = [(row.by_cosine, row.cosine, row.there, agree)]
        kin[row.Index] += [] if agree else [(row.by_together, None, row.together, False)]
    return kin


def page(head: dict, model, text: Text, latents: Latents, seed: int = 0) -> str:
    """One file of HTML that needs no other: a list of latents to search, sort and filter, and all about each.

    With more latents alive than `SHOWN`, or than fit into `LARGEST` bytes, it holds some drawn at random and says so.
    Text of the model and of documents stands in it compressed, and is put on the screen as text, never as HTML.

    Args:
        head: what the page says of itself: `profile`, `name`, `hook`, `other` (the page of the kin, or None), and
            `splits`: whether the kin are finer than its own.
    """
    drawn = np.random.default_rng(seed).permutation(latents.table.index)[:SHOWN]
    while True:
        made = _filled(head, _content(model, text, latents, np.sort(drawn), seed))
        if len(made) <= LARGEST:
            return made
        drawn = drawn[: int(0.95 * len(drawn) * LARGEST / len(made))]


def _filled(head: dict, content: dict) -> str:
    packed = gzip.compress(json.dumps(head | content, ensure_ascii=False, separators=(",", ":")).encode(), 6, mtime=0)
    title = html.escape(f"Atlas: {head['name']}, {head['profile']}")
    filled = {"{{title}}": title, "{{data}}": base64.b64encode(packed).decode()}
    made = TEMPLATE.read_text(encoding="utf-8")
    for mark, value in filled.items():
        made = made.replace(mark, value)
    return made


def _content(model, text: Text, latents: Latents, which: Int[np.ndarray, "shown"], seed: int) -> dict:
    """What a page holds, with tokens and documents counted through in the order in which they come up."""
    seen = moments(latents.fired, text.tokens.shape[1], seed=seed)
    near, (tokens, values) = neighbours(latents.sae, which), logit_effects(model, latents.sae, which)
    words, places, cards = _Numbered(), _Numbered(), []
    for latent, raised, by in zip(which.tolist(), tokens.tolist(), values.tolist(), strict=True):
        shown = []
        for at in (seen.top[latent], seen.sampled.get(latent, [])):
            found = [excerpt(text, latents.fired, latent, token) for token in at]
            shown.append([[places(d), place, [*map(words, ids)], digits] for d, place, ids, digits in found])
        counts = histogram(latents.fired, latent)
        first, *_, last = np.flatnonzero(counts).tolist() * 2
        kin = [
            [one, _short(cosine), _short(there), int(same)] for one, cosine, there, same in latents.kin.get(latent, ())
        ]
        row = [*shown, [first, *counts[first : last + 1].tolist()], [[*map(words, raised)], [*map(_short, by)]]]
        cards.append(
            [*row, [[one, _short(cosine)] for one, cosine in near[latent]], kin, latents.words.get(latent, "")]
        )
    table = latents.table.loc[which]
    columns = {name: [*map(_short, table[name].tolist())] for name in COLUMNS}
    special = set(text.tokenizer.all_special_ids)
    said = ["" if i in special else text.tokenizer.decode([i]) for i in words]
    documents = [[text.documents[i].package, text.documents[i].name] for i in places]
    sizes = {"alive": len(latents.table), "n_latents": latents.sae.n_latents, "n_tokens": latents.fired.shape[0]}
    facts = {"match": MATCH, "words": said, "documents": documents, "bins": [*map(_short, BINS.tolist())]}
    return sizes | facts | {"ids": which.tolist(), "columns": columns, "cards": cards}


class _Numbered(dict):
    """Gives out numbers from 0 on, to every key its own."""

    def __call__(self, key: int) -> int:
        return self.setdefault(key, len(self))


def _short(value: float | None) -> float | None:
    return None if value is None or value != value else float(f"{value:.3g}")


def save(profile: Profile, pages: Mapping[str, str]) -> dict[str, int]:
    """Write pages to `_build/atlas/<profile>/`, where `saelib book` finds them; returns their sizes in bytes.

    Raises:
        UserError: the place cannot be written.
    """
    files = {PAGES / profile.name / f"{name}.html": content.encode() for name, content in pages.items()}
    write(files)
    return {file.stem: len(content) for file, content in files.items()}
