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

from saelib import sparsity
from saelib.activations import SUB_BATCH
from saelib.metrics import Estimate, activations, mean, pieces
from saelib.profile import BUILD, Profile, write
from saelib.report import stored as published
from saelib.sae import SAE, Codes
from saelib.text import Document

MATCH = 0.7
"""Decoder cosine from which on two latents count as partners."""
OFTEN = 10
"""Firings from which on the company that a latent keeps is judged."""
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
    profile: Profile, model, tokens: Int[Tensor, "n context"], saes: Mapping[str, SAE | None]
) -> dict[str, csc_array | None]:
    """What each SAE makes of every token at the profile's positions: a matrix [n * pos, n_latents] of values above 0.

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


def _entries(fired: csc_array, latent: int) -> slice:
    return slice(fired.indptr[latent], fired.indptr[latent + 1])


def histogram(fired: csc_array, latent: int) -> Int[np.ndarray, "bins"]:
    """How many of a latent's firings lie between the `BINS`; what is beyond them counts in the outermost."""
    return np.histogram(fired.data[_entries(fired, latent)].clip(BINS[0], BINS[-1]), BINS)[0]


def _table(fired: csc_array) -> pd.DataFrame:
    """One row per firing: latent, token, value. A latent's are together, in the order of the text."""
    latent = np.repeat(np.arange(fired.shape[1]), np.diff(fired.indptr))
    return pd.DataFrame({"latent": latent, "token": fired.indices, "value": fired.data})


class Moments(NamedTuple):
    """The tokens at which latents are strongest, each in a context of its own."""

    top: dict[int, list[int]]
    """Per latent, in the contexts with its highest values, highest first. A token is a row of `firings`."""
    sampled: dict[int, list[int]]
    """Per latent, in contexts drawn at random from the others in which it fires."""


def moments(fired: csc_array, length: int, n: int = 5, seed: int = 0) -> Moments:
    """Where to look at each latent: in its `n` top contexts of `length` tokens, and in `n` random others."""
    table = _table(fired).assign(context=fired.indices // length)
    table = table.sort_values(["latent", "value"], ascending=[True, False], kind="stable", ignore_index=True)
    table = table.drop_duplicates(["latent", "context"])
    top = table.groupby("latent").head(n)
    sampled = table.drop(top.index).sample(frac=1, random_state=seed).groupby("latent").head(n)
    return Moments(*(some.groupby("latent").token.agg(list).to_dict() for some in (top, sampled)))


@torch.no_grad()
def ablated(
    profile: Profile, model, tokens: Int[Tensor, "n context"], sae: SAE, fired: csc_array,
    which: Sequence[int] | None = None, n: int = 8, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Ablation sparsity (section 4.5) of some latents (None: all), each switched off at up to `n` random firings.

    One row per latent: `sparsity`, its standard error `se`, and at how many `times`. The lots are drawn for tokens, so
    that latents share some and the model runs fewer times. Latents that are on only where no window follows are left
    out.
    """
    first, length = profile.activations.positions[0], fired.shape[0] // len(tokens)
    table = _table(fired)[["latent", "token"]]
    column = first + table.token % length
    fits = column <= tokens.shape[1] - sparsity.WINDOW
    table = table[fits if which is None else fits & table.latent.isin(which)]
    lots = np.random.default_rng(seed).permutation(fired.shape[0])
    table = table.assign(column=column, lot=lots[table.token]).sort_values("lot").groupby("latent").head(n)
    found = []
    for at, here in table.groupby("column"):
        rows, place = np.unique(here.token // length, return_inverse=True)
        wanted = csr_array((np.ones(len(here), bool), (place, here.latent)), shape=(len(rows), sae.n_latents))
        size = SUB_BATCH[next(model.parameters()).device.type] // tokens.shape[1]
        for start in range(0, len(rows), max(1, size)):  # no more than `sparsity.effects` takes at once
            few = slice(start, start + max(1, size))
            effects = sparsity.effects(model, profile.hook, tokens[rows[few]], int(at), _only(sae, wanted[few]))
            values = {"latent": effects.ids[effects.on], "sparsity": effects.sparsity()[effects.on]}
            found.append(pd.DataFrame({name: value.numpy() for name, value in values.items()}))
    groups = pd.concat(found).groupby("latent").sparsity
    return pd.DataFrame({"sparsity": groups.mean(), "se": groups.sem(), "times": groups.size()})


def _only(sae: SAE, wanted: csr_array) -> sparsity.Source:
    """Of the active latents of each row, those that are wanted there."""

    def parts(x: Float[Tensor, "n d_model"]) -> sparsity.Parts:
        found = sparsity.latents(sae)(x)
        return found._replace(on=found.on & torch.from_numpy(wanted.toarray()).to(x.device).gather(1, found.ids))

    return parts


def stored(profile_name: str, sae_name: str) -> pd.Series | None:
    """Ablation sparsity of all latents that fire in the sweep's text; None where the sweep was not run."""
    values = published(profile_name, f"10_sweep/{sae_name}")
    lines = [line.split() for line in values["sparsity"]["value"]] if values else None
    return lines and pd.Series({int(latent): float(value) for latent, value in lines})


# --- partners ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def matched(a: SAE, b: SAE) -> Float[Tensor, "n_latents"]:
    """For each latent of `a` the highest cosine between its decoder direction and one of `b`."""
    return torch.cat([cosines.amax(1) for cosines in _cosines(a, b, torch.arange(a.n_latents))]).cpu()


def _cosines(a: SAE, b: SAE, which: Int[Tensor, "some"]) -> Iterator[Float[Tensor, "few n_latents"]]:
    """Decoder cosines of some latents of `a` with all of `b`, a few at a time."""
    ours, theirs = (torch.nn.functional.normalize(sae.W_dec.detach().to(b.W_dec.device), dim=1) for sae in (a, b))
    for few in which.split(max(1, 2**24 // b.n_latents)):
        yield ours[few] @ theirs.T


def partners(a: SAE, b: SAE, fired_a: csc_array, fired_b: csc_array) -> pd.DataFrame:
    """For each living latent of `a`, the living one of `b` that is nearest by direction, and by the company it keeps.

    `cosine` is between decoder directions; `together` is the cosine of two records of firing, tokens on which both are
    on over the geometric mean of tokens on which each is. `by_cosine` and `by_together` are the latents of `b`, `there`
    is what `together` is with the one that the cosine names, and `agree` says that no other is on together more.
    """
    which, ours = alive(fired_a), (fired_a > 0).astype(np.float32)
    theirs = (fired_b > 0).astype(np.float32)
    times_a, times_b = (np.diff(fired.indptr) for fired in (fired_a, fired_b))
    found, done = [], 0
    for cosines in _cosines(a, b, torch.from_numpy(which)):
        few = which[done : (done := done + len(cosines))]
        cosine = np.where(times_b > 0, cosines.cpu().numpy(), -2)
        both = (ours[:, few].T @ theirs).toarray()
        together = both / np.sqrt(np.outer(times_a[few], times_b.clip(1)))
        at, near, rows = together.argmax(1), cosine.argmax(1), np.arange(len(few))
        found.append(np.stack([near, cosine[rows, near], at, together[rows, at], together[rows, near]], 1))
    table = pd.DataFrame(np.concatenate(found), pd.Index(which, name="latent"))
    table.columns = ["by_cosine", "cosine", "by_together", "together", "there"]
    agree = (table.there > 0) & (table.there >= table.together - 1e-9)  # a rare latent may have company by the dozen
    return table.astype({"by_cosine": int, "by_together": int}).assign(agree=agree)


def children(found: pd.DataFrame) -> dict[int, list[tuple]]:
    """Kin of the small SAE's latents, by `partners(large, small)`: the large ones nearest to each, which split it."""
    rows = found.assign(latent=found.index).sort_values("cosine", ascending=False, kind="stable")
    wanted = rows[["latent", "cosine", "there", "agree"]]
    return {small: list(some.itertuples(False, None)) for small, some in wanted.groupby(rows.by_cosine)}


def parents(found: pd.DataFrame) -> dict[int, list[tuple]]:
    """Kin of the large SAE's latents: the small one that direction names, and the one that company names."""
    kin = {}
    for row in found.itertuples():
        kin[row.Index] = [(row.by_cosine, row.cosine, row.there, row.agree)]
        if not row.agree and row.together > 0:
            kin[row.Index].append((row.by_together, None, row.together, False))
    return kin


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
    tokens, values, weight = [], [], getattr(model.ln_final, "weight", 1.0)
    for few in torch.from_numpy(which).split(256):
        rows = sae.W_dec[few].detach().to(model.W_U)
        logits = ((rows - rows.mean(1, keepdim=True)) * weight) @ model.W_U
        logits = (logits - logits.mean(1, keepdim=True)).float().cpu()
        ends = [logits.topk(n, largest=up) for up in (True, False)]
        tokens.append(torch.cat([end.indices for end in ends], 1))
        values.append(torch.cat([end.values for end in ends], 1))
    return torch.cat(tokens), torch.cat(values)


def raised(model, sae: SAE, which: Sequence[int]) -> list[str]:
    """Latents in a line each: the number, and the three tokens that `logit_effects` finds most raised."""
    tokens = logit_effects(model, sae, np.array(which), 3)[0][:, :3].tolist()
    words = [[model.tokenizer.decode([i]).strip(" ").replace("\n", "⏎") for i in row] for row in tokens]
    return [f"{latent}: " + "  ".join(row) for latent, row in zip(which, words, strict=True)]


def by_share(x: pd.Series, of: pd.Series, n: int = 8) -> tuple[list[float], list[Estimate]]:
    """Means of one thing in `n` equally large groups of latents, ordered by another; and that one's median in each."""
    numbers = of.astype(float).to_numpy()
    parts = np.array_split(np.argsort(x.to_numpy(), kind="stable"), n)
    return [float(x.iloc[part].median()) for part in parts], [mean(torch.from_numpy(numbers[part])) for part in parts]


def rank(a: pd.Series, b: pd.Series) -> Estimate | None:
    """Spearman's correlation of two columns, where both were measured; its standard error is that of Fisher's z."""
    both = pd.concat([a, b], axis=1).dropna()
    if len(both) < 30:
        return None
    value = both.iloc[:, 0].corr(both.iloc[:, 1], "spearman")
    return Estimate(value, (1 - value**2) / (len(both) - 3) ** 0.5)


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

    It stays in the document. Digits are ninths of the latent's highest value in the text, rounded up: 0 is off.
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


def page(head: dict, model, text: Text, latents: Latents, seed: int = 0) -> str:
    """One file of HTML that needs no other: a list of latents to search, sort and filter, and all about each.

    With more latents alive than `SHOWN`, or than fit into `LARGEST` bytes, it holds some drawn at random and says so.
    Text of the model and of documents stands in it compressed, and is put on the screen as text, never as HTML.

    Args:
        head: what the page says of itself: `profile`, `name`, `hook`, `other` (the page of the kin, or None), and
            `splits`: whether the kin are finer than its own.
    """
    seen, size = moments(latents.fired, text.tokens.shape[1], seed=seed), SHOWN
    order = np.random.default_rng(seed).permutation(latents.table.index)
    template = TEMPLATE.read_text(encoding="utf-8")
    template = template.replace("{{title}}", html.escape(f"Atlas: {head['name']}, {head['profile']}"))
    while True:
        content = head | _content(model, text, latents, seen, np.sort(order[:size]))
        packed = gzip.compress(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(), 6, mtime=0)
        made = template.replace("{{data}}", base64.b64encode(packed).decode())
        if len(made) <= LARGEST or size == 1:
            return made
        size = max(1, int(0.95 * min(size, len(order)) * LARGEST / len(made)))


def _content(model, text: Text, latents: Latents, seen: Moments, which: Int[np.ndarray, "shown"]) -> dict:
    """What a page holds, with tokens and documents counted through in the order in which they come up."""
    near, (tokens, values) = neighbours(latents.sae, which), logit_effects(model, latents.sae, which)
    words, places, cards = {}, {}, []

    def numbered(ids: Sequence[int]) -> list[int]:
        return [words.setdefault(i, len(words)) for i in ids]

    for latent, raised, by in zip(which.tolist(), tokens.tolist(), values.tolist(), strict=True):
        shown = []
        for at in (seen.top[latent], seen.sampled.get(latent, [])):
            found = [excerpt(text, latents.fired, latent, token) for token in at]
            shown.append([[places.setdefault(d, len(places)), i, numbered(ids), digits] for d, i, ids, digits in found])
        counts = histogram(latents.fired, latent)
        first, *_, last = np.flatnonzero(counts).tolist() * 2
        bars, logits = [first, *counts[first : last + 1].tolist()], [numbered(raised), _short(by)]
        kin = [[one, *_short([cosine, there]), int(same)] for one, cosine, there, same in latents.kin.get(latent, ())]
        close = [[one, *_short([cosine])] for one, cosine in near[latent]]
        cards.append([*shown, bars, logits, close, kin, latents.words.get(latent, "")])
    special = set(text.tokenizer.all_special_ids)
    said = ["" if i in special else text.tokenizer.decode([i]) for i in words]
    documents = [[text.documents[i].package, text.documents[i].name] for i in places]
    sizes = {"alive": len(latents.table), "n_latents": latents.sae.n_latents, "n_tokens": latents.fired.shape[0]}
    columns = {name: _short(latents.table.loc[which, name].tolist()) for name in COLUMNS}
    fixed = {"match": MATCH, "words": said, "documents": documents, "bins": _short(BINS.tolist())}
    return sizes | fixed | {"ids": which.tolist(), "columns": columns, "cards": cards}


def _short(values: Sequence[float | None]) -> list[float | None]:
    """Three digits of each; None also for NaN."""
    return [None if value is None or value != value else float(f"{value:.3g}") for value in values]


def save(profile: Profile, pages: Mapping[str, str]) -> dict[str, int]:
    """Write pages to `_build/atlas/<profile>/`, where `saelib book` finds them; returns their sizes in bytes.

    Raises:
        UserError: the place cannot be written.
    """
    files = {PAGES / profile.name / f"{name}.html": content.encode() for name, content in pages.items()}
    write(files)
    return {file.stem: len(content) for file, content in files.items()}
