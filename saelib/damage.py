"""Chapter 03: which tokens a replacement hurts, said in their own words, and what it does in another model."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelib import splice
from saelib.activations import harvest
from saelib.metrics import Estimate, mean
from saelib.models import Checkpoint, load_model
from saelib.profile import Profile
from saelib.splice import Downstream, Variant
from saelib.text import Document, documents


def deltas(clean: Float[Tensor, "n pos-1"], found: Mapping[str, Downstream]) -> dict[str, Estimate]:
    """What each replacement adds to the cross-entropy, nats per token (section 4.1)."""
    return {name: mean(one.ce - clean) for name, one in found.items()}


def worst_tokens(delta: Float[Tensor, "n pos"], share: float) -> Bool[Tensor, "n pos"]:
    """The given share of all tokens (at least one), those with the largest delta."""
    worst = delta.flatten().topk(max(1, round(share * delta.numel()))).indices
    return torch.zeros_like(delta, dtype=torch.bool).flatten().index_fill_(0, worst, True).view_as(delta)


def token_classes(tokenizer, tokens: Int[Tensor, "n pos"]) -> dict[str, Bool[Tensor, "n pos-1"]]:
    """Which tokens are of which kind; entry j is token j + 1, as in `Downstream.ce`.

    A word goes on where a token begins with a letter or digit and the one before ends with one, or with `_`.
    """
    texts = {i: "" if i in tokenizer.all_special_ids else tokenizer.decode([i]) for i in tokens.unique().tolist()}
    kinds = {
        "end of text": lambda text: not text,
        "white space": str.isspace,
        "word": lambda text: any(map(str.isalpha, text)),
        "digits": lambda text: any(map(str.isalnum, text)),
    }
    kind = {i: next((name for name, holds in kinds.items() if holds(text)), "signs") for i, text in texts.items()}
    of = {name: _where(tokens, [i for i in kind if kind[i] == name])[:, 1:] for name in (*kinds, "signs")}
    opens = _where(tokens, [i for i, text in texts.items() if text[:1].isalnum()])[:, 1:]
    closes = _where(tokens, [i for i, text in texts.items() if text[-1:].isalnum() or text.endswith("_")])[:, :-1]
    word = of.pop("word")
    return {"word begins": word & ~(opens & closes), "word goes on": word & opens & closes} | of


def _where(tokens: Int[Tensor, "n pos"], ids: list[int]) -> Bool[Tensor, "n pos"]:
    return torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype))


def repeated(tokens: Int[Tensor, "n pos"]) -> Bool[Tensor, "n pos-1"]:
    """Whether a token and the one before stood next to each other earlier in the context: entry j is token j + 1."""
    pairs = tokens[:, :-1] * (tokens.max() + 1) + tokens[:, 1:]
    return (pairs[:, :, None] == pairs[:, None, :]).tril(-1).any(-1)


def origins(
    profile: Profile, tokenizer, split: str, tokens: Int[Tensor, "n pos"], seed: int = 0
) -> tuple[list[Document], Int[Tensor, "n pos"]]:
    """Documents that `text.contexts` made these tokens of, and which of them each token is from (-1: BOS)."""
    body = tokens.shape[1] - profile.prepend_bos
    found, lengths = [], []
    for document in documents(profile, split, seed):
        found.append(document)
        lengths.append(len(tokenizer(document.text, add_special_tokens=False)["input_ids"]) + 1)
        if sum(lengths) >= len(tokens) * body:
            break
    which = torch.arange(len(found)).repeat_interleave(torch.tensor(lengths))[: len(tokens) * body]
    return found, torch.nn.functional.pad(which.view(len(tokens), body), (int(profile.prepend_bos), 0), value=-1)


def shown_tokens(
    model, hook: str, tokens: Int[Tensor, "n pos"], delta: Float[Tensor, "n pos-1"], variant: Variant,
    origin: tuple[list[Document], Int[Tensor, "n pos"]], n: int = 8, length: int = 24,
) -> pd.DataFrame:  # fmt: skip
    """The `n` documents' tokens that a replacement hurts most, one of each document, in their own words.

    `length` tokens of the document at most, and where they are from; white space made visible. A data frame escapes
    what it shows as HTML.
    """
    found, which = origin
    order = delta.flatten().argsort(descending=True)
    firsts = pd.Series(which[:, 1:].flatten()[order].tolist()).drop_duplicates().index[:n]
    at = [divmod(i, delta.shape[1]) for i in order[firsts.tolist()].tolist()]
    rows, columns = map(list, zip(*at, strict=True))
    below = splice.prefix(model, hook, tokens[rows])
    guesses = [splice.suffix(model, below, x)[range(len(at)), columns].argmax(-1) for x in (below.x, variant(below.x))]
    said = []
    for row, column, *guess in zip(rows, columns, *guesses, strict=True):
        own = (which[row] == which[row, column + 1]).nonzero()[0].item()
        before = tokens[row, max(own, column + 2 - length) : column + 1]
        document = found[which[row, column + 1]]
        read = [before, tokens[row, [column + 1]], *(g[None] for g in guess)]
        texts = [model.tokenizer.decode(ids.tolist()).replace("\n", "⏎").replace("\t", "⇥") for ids in read]
        words = [texts[0], *(text.replace(" ", "␣") for text in texts[1:])]
        said.append([f"{document.package}: {document.name}", *words, column, delta[row, column].item()])
    return pd.DataFrame(
        said, columns=["from", "text before", "there comes", "untouched", "replaced", "position", "nats lost"]
    )


def transplanted(
    profile: Profile, checkpoint: Checkpoint, tokens: Int[Tensor, "n pos"], sample: Int[Tensor, "m pos"],
    variants: Mapping[str, Variant],
) -> tuple[Float[Tensor, "n pos-1"], dict[str, Downstream]]:  # fmt: skip
    """`downstream` in another model at the profile's hook, with its own `zero` and `mean` (of `sample`) ablation."""
    model = load_model(profile, checkpoint)
    centre = harvest(model, sample, profile.hook).mean(0)
    own = {"zero": splice.zero, "mean": splice.constant(centre)}
    return splice.downstream(model, profile.hook, tokens, own | dict(variants))
