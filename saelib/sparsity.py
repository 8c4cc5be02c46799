"""Ablation sparsity (section 4.5): what switching off one part of an activation, at one token, does to the logits.

The change of the logits at that token and those after it, T in all, less its median over the vocabulary at each token,
is one long vector of V * T numbers. How evenly it is spread is

    (L1 / L2)^2 / (V * T)        1: all numbers alike        1 / (V * T): a single one        2 / pi: Gaussian

The tokens before the ablated one do not change, so the blocks above the hook run for T tokens only, with the keys and
values of the earlier ones remembered, and for many ablated copies of a context at once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache

from saelib import UserError
from saelib.activations import MODEL, SUB_BATCH
from saelib.metrics import Estimate, mean, pieces
from saelib.ranks import shared, together
from saelib.sae import SAE
from saelib.splice import LOGITS, Variant, prefix
from saelib.text import Document

WINDOW = 16
"""Tokens looked at: the ablated one and those after it (section 4.5)."""
GAUSSIAN = 2 / math.pi
"""Sparsity of a long vector of independent Gaussian numbers."""


# --- what can be switched off -----------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What can be switched off at one token of each context: vectors to subtract from the activation there."""

    vectors: Float[Tensor, "n m d_model"]
    ids: Int[Tensor, "n m"]
    """Which latents or channels they are."""
    on: Bool[Tensor, "n m"]
    """False: nothing to switch off."""


Source = Callable[[Float[Tensor, "n d_model"]], Parts]
"""From the true activations at the tokens to what can be switched off there."""


def latents(sae: SAE) -> Source:
    """Each active latent's contribution to the raw reconstruction, strongest first."""

    def parts(x: Float[Tensor, "n d_model"]) -> Parts:
        values, ids, _, scale = sae.encode(x)
        if ids is None:
            values, ids = values.topk(max(1, int((values > 0).sum(-1).max())))
        vectors = values[..., None] * sae.W_dec[ids]
        return Parts(vectors if scale is None else vectors * scale[..., None], ids, values > 0)

    return parts


def channels(m: int, seed: int, towards: Float[Tensor, "d_model"] | float = 0.0) -> Source:
    """`m` random channels of the residual stream, each set to 0, or to what it has in `towards` (the mean)."""
    generator = torch.Generator().manual_seed(seed)

    def parts(x: Float[Tensor, "n d_model"]) -> Parts:
        ids = torch.stack([torch.randperm(x.shape[1], generator=generator)[:m] for _ in x]).to(x.device)
        change = (x - towards).gather(1, ids)
        return Parts(nn.functional.one_hot(ids, x.shape[1]) * change[..., None], ids, torch.ones_like(ids, dtype=bool))

    return parts


def turned(source: Source, seed: int) -> Source:
    """Random directions, as long as the source's vectors."""
    generator = torch.Generator().manual_seed(seed)

    def parts(x: Float[Tensor, "n d_model"]) -> Parts:
        found = source(x)
        random = nn.functional.normalize(torch.randn(found.vectors.shape, generator=generator), dim=-1).to(x)
        return found._replace(vectors=random * found.vectors.norm(dim=-1, keepdim=True))

    return parts


# --- effects ----------------------------------------------------------------------------------------------------------


class Effects(NamedTuple):
    """Norms of the logits' changes, less their median over the vocabulary, at each token from the ablated one on."""

    l1: Float[Tensor, "n m window"]
    l2: Float[Tensor, "n m window"]
    ids: Int[Tensor, "n m"]
    on: Bool[Tensor, "n m"]
    """Where False nothing was switched off, or too little to change a logit."""
    vocab: int

    def sparsity(self, window: int | None = None) -> Float[Tensor, "n m"]:
        """(L1 / L2)^2 / (V * T), by the first T = `window` tokens (None: all); NaN without an effect (section 4.5)."""
        l1, l2 = self.l1[..., :window], self.l2[..., :window]
        return l1.sum(-1).square() / l2.square().sum(-1) / (self.vocab * l1.shape[-1])

    def result(self, window: int | None = None) -> Estimate:
        """Mean sparsity over all that was switched off, standard error over contexts."""
        return mean(self.sparsity(window), self.on)

    def uneven(self) -> Estimate:
        """What that would be if the changes were Gaussian at every token, with the scales that they have."""
        even = self.l2.sum(-1).square() / (self.l2.shape[-1] * self.l2.square().sum(-1))
        return mean(GAUSSIAN * even, self.on)

    def profile(self) -> list[Estimate]:
        """Mean scale s_t at each token of the window: root mean square over the vocabulary, in logits."""
        return [mean(norms / math.sqrt(self.vocab), self.on) for norms in self.l2.unbind(-1)]

    def later(self) -> float:
        """Mean scale at the tokens after the ablated one, over that at it."""
        first, *rest = (point.value for point in self.profile())
        return sum(rest) / len(rest) / first

    def part(self, which: tuple) -> Effects:
        """Some contexts, or some of what was switched off in each: `np.s_[:, :4]` are the four strongest latents."""
        return Effects(*(values[which] for values in self[:4]), self.vocab)


def measured(change: Float[Tensor, "n m window vocab"]) -> Effects:
    """Effects, given as changes of logits."""
    n, m = change.shape[:2]
    l1, l2 = (norm.unflatten(0, (n, m)) for norm in norms(change.flatten(0, 1).clone()))
    return Effects(l1, l2, torch.zeros(n, m, dtype=int), torch.ones(n, m, dtype=bool), change.shape[-1])


def percent(found: Estimate) -> Estimate:
    """The same in per cent."""
    return Estimate(100 * found.value, 100 * found.se)


def norms(change: Float[Tensor, "rows window vocab"]) -> tuple[Float[Tensor, "rows window"], ...]:
    """L1 and L2 norms over the vocabulary of a change of logits less its median. The change is overwritten."""
    change -= median(change)
    l2 = torch.linalg.vector_norm(change, 2, -1)
    return change.abs_().sum(-1), l2


def median(x: Float[Tensor, "rows window vocab"]) -> Float[Tensor, "rows window 1"]:
    """What `x.median(-1)` gives, the lower of the two in the middle: NumPy's partition is several times as fast."""
    if x.device.type != "cpu":
        return x.median(-1, keepdim=True).values
    middle = (x.shape[-1] - 1) // 2
    return torch.stack([torch.from_numpy(np.partition(row, middle)[:, middle]) for row in x.numpy()])[..., None]


@torch.no_grad()
def effects(
    model, hook: str, tokens: Int[Tensor, "n pos"], index: Int[Tensor, "n"] | int, source: Source,
    base: Variant | None = None, *, alone: bool = False,
) -> Effects:  # fmt: skip
    """Switch off each part by itself, at one token of each context (section 4.5).

    Several processes share what is switched off, and each has the whole result.

    Args:
        index: the token, of all contexts or of each.
        source: what there is to switch off, given the true activation.
        base: what stands in the activation's place, with and without the part; None: the activation itself. With an
            SAE, its reconstruction is edited.
        alone: the window does not see the tokens before it in the blocks above the hook, ablated or not.

    Raises:
        UserError: a hook that is not at a block's end, a context that is too short, nothing to switch off.
    """
    index = torch.as_tensor(index).expand(len(tokens))
    _check_window(tokens.shape[1], index)
    order = index.argsort(stable=True)  # contexts with the same index share a run
    size = max(1, SUB_BATCH[next(model.parameters()).device.type] // tokens.shape[1])
    batches = []
    for rows in tqdm(order.split(size), desc=f"ablating at {hook}", unit="batch", leave=False):
        above = _Above(model, hook, tokens[rows], base, alone)
        at = index[rows].to(above.x.device)
        parts = source(above.true[torch.arange(len(at)), at])
        l1, l2 = above.x.new_zeros(2, *parts.on.shape, WINDOW)
        for where, change in _changes(above, parts, at):
            l1[where], l2[where] = norms(change)
        l1, l2 = sum(together([torch.stack([l1, l2]).cpu()]))  # 0 where another process had it
        batches.append([l1, l2, parts.ids.cpu(), parts.on.cpu() & (l2[..., 0] != 0)])
    l1, l2, ids, on = (  # batches may hold different numbers of parts
        pad_sequence([row for some in of_all for row in some], batch_first=True)[order.argsort()]
        for of_all in zip(*batches, strict=True)
    )
    if not on.any():
        raise UserError("no active latents at these tokens: nothing to switch off; check the SAE, or use more contexts")
    return Effects(l1.double(), l2.double(), ids, on, model.cfg.d_vocab)


def _changes(
    above: _Above, parts: Parts, at: Int[Tensor, "n"]
) -> Iterator[tuple[tuple[Tensor, Tensor], Float[Tensor, "rows window vocab"]]]:
    """(which parts, changes of the logits) in pieces that fit into memory; this process's share of them."""
    at_once = max(1, LOGITS[at.device.type] // (WINDOW * above.model.cfg.d_vocab))
    found = []
    for i in at[parts.on.any(1)].unique().tolist():
        n, m = (parts.on & (at == i)[:, None]).nonzero(as_tuple=True)
        found += [(i, where) for where in zip(n.split(at_once), m.split(at_once), strict=True)]
    for i, where in shared(found):
        yield where, above.change(i, where[0], parts.vectors[where])


def drawn(n: int, length: int, generator: torch.Generator, first: int = 0) -> Int[Tensor, "n"]:
    """A random token in each of `n` contexts, from `first` on, a window after it. Raises UserError: too short."""
    _check_window(length, torch.tensor([first]))
    return torch.randint(first, length - WINDOW + 1, (n,), generator=generator)


def _check_window(length: int, index: Int[Tensor, "n"]) -> None:
    if not len(index):
        raise UserError("no contexts to switch anything off in: ask for at least one")
    low, high = int(index.min()), int(index.max())
    if low < 0 or high + WINDOW > length:
        window = f"{WINDOW} tokens from index {high if low >= 0 else low} on"
        raise UserError(f"{window} do not fit into contexts of {length}: take longer contexts, or another index")


class _Above:
    """The blocks above a hook, run for the tokens from some index on."""

    def __init__(self, model, hook: str, tokens: Tensor, base: Variant | None, alone: bool):
        below = prefix(model, hook, tokens)
        if below.residual is not below.x:
            raise UserError(f"hook {hook!r} is not at a block's end: name one that is, like blocks.0.hook_resid_post")
        self.model, self.alone, self.true = model, alone, below.x
        self.x = below.x if base is None else torch.cat([base(some.clone()) for some in pieces(below.x, base)])
        self.blocks = model.blocks[below.start :]
        rest, named = below.arguments
        takes = inspect.signature(model.blocks[below.start - 1].original_component.forward).parameters
        named = {**dict(zip(list(takes)[1:], rest, strict=False)), **named}  # by name: one of them is the cache
        self.arguments = {name: value for name, value in named.items() if value is not None}
        self.cache = DynamicCache()
        self._run(self.x, self.arguments | {"past_key_values": self.cache})

    def change(
        self, index: int, contexts: Int[Tensor, "rows"], less: Float[Tensor, "rows d_model"]
    ) -> Float[Tensor, "rows window vocab"]:
        """What it does to the logits of a window if `less` is taken off its first token's activation."""
        once, copies = contexts.unique(return_inverse=True)
        nothing = torch.zeros_like(less[: len(once)])  # the contexts as they are run along
        logits = self._logits(index, torch.cat([once, contexts]), torch.cat([nothing, less]))
        return logits[len(once) :].sub_(logits[copies])

    def _logits(self, index: int, contexts: Tensor, less: Tensor) -> Tensor:
        window = slice(index, index + WINDOW)
        first = index if self.alone else 0
        residual = self.x[contexts, window]
        residual[:, 0] -= less
        past = DynamicCache()
        for layer, kept in enumerate(self.cache.layers):
            if kept.is_initialized:
                past.update(kept.keys[contexts, :, first:index], kept.values[contexts, :, first:index], layer)
        now = {"past_key_values": past}
        if (mask := self.arguments.get("attention_mask")) is not None:
            now["attention_mask"] = mask.expand(len(self.x), -1, -1, -1)[contexts, :, window, first : window.stop]
        if (positions := self.arguments.get("position_ids")) is not None:
            now["position_ids"] = positions[:, window]
        if (rotary := self.arguments.get("position_embeddings")) is not None:  # cosines and sines, as Llama has them
            now["position_embeddings"] = tuple(part[:, window] for part in rotary)
        return self.model.unembed(self.model.ln_final(self._run(residual, self.arguments | now)))

    def _run(self, residual: Tensor, arguments: dict) -> Tensor:
        with MODEL:
            for block in self.blocks:
                out = block(residual, **arguments)
                residual = out[0] if isinstance(out, tuple) else out
        return residual


def of_sae(
    model, hook: str, tokens: Tensor, index: Tensor | int, sae: SAE, edit: bool = False, alone: bool = False
) -> Effects:
    """`effects` of an SAE's active latents, subtracted from the true activation; or, `edit`, from its reconstruction.

    With `edit` the reconstruction stands at every token. Raises UserError: an SAE of another width; or see `effects`.
    """
    if sae.d_model != model.cfg.d_model:
        raise UserError(f"the SAE reads {sae.d_model} dimensions, not {model.cfg.d_model}: choose one of this model")
    return effects(model, hook, tokens, index, latents(sae), sae if edit else None, alone=alone)


@torch.no_grad()
def attention_to(model, hook: str, tokens: Int[Tensor, "n pos"], index: int) -> Float[Tensor, "n later"]:
    """What the later tokens of its window give a token of their attention: mean over heads, blocks above the hook."""
    layers = range(prefix(model, hook, tokens[:1]).start, len(model.blocks))
    names, found = [f"blocks.{layer}.attn.hook_pattern" for layer in layers], []
    tokens = tokens.to(model.cfg.device)
    for part in tokens.split(max(1, SUB_BATCH[tokens.device.type] // tokens.shape[1])):
        with MODEL:
            cache = model.run_with_cache(part, names_filter=names, stop_at_layer=len(model.blocks))[1].cache_dict
        given = torch.stack([cache[name][:, :, index + 1 : index + WINDOW, index] for name in names])
        found.append(given.mean((0, 2)).cpu())
    return torch.cat(found)


# --- which latents ----------------------------------------------------------------------------------------------------


def by_latent(found: Effects) -> pd.DataFrame:
    """One row per latent: mean sparsity with its standard error, that over one token, how often it was switched off.

    `row` and `part` say where its effect on the ablated token was the largest.
    """
    on = found.on
    row, part = on.nonzero().T
    columns = {"latent": found.ids[on], "sparsity": found.sparsity()[on], "one": found.sparsity(1)[on]}
    columns |= {"scale": found.l2[..., 0][on], "row": row, "part": part}
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    groups = table.groupby("latent")
    where = table.loc[groups.scale.idxmax()].set_index("latent")[["row", "part"]]
    means = groups[["sparsity", "one"]].mean()
    return means.assign(se=groups.sparsity.sem(), times=groups.size()).join(where)


@torch.no_grad()
def faces(
    model, hook: str, tokens: Int[Tensor, "n pos"], index: Int[Tensor, "n"], sae: SAE, table: pd.DataFrame,
    origin: tuple[list[Document], Int[Tensor, "n pos"]],
) -> pd.DataFrame:  # fmt: skip
    """For latents of `by_latent`: text of the document where the effect is largest, the four tokens that it raises.

    `origin` is `damage.origins`. Raised is what falls most, anywhere in the window, when the latent is switched off.
    """
    documents, which = origin
    rows = {}
    for latent, row, part in table[["row", "part"]].itertuples():
        i, document = int(index[row]), documents[which[row, index[row]]]
        own = which[row] == which[row, i]
        text = [
            tokens[row, some][own[some]] for some in (slice(max(i - 12, 0), i), slice(i, i + 1), slice(i + 1, i + 4))
        ]
        above = _Above(model, hook, tokens[row : row + 1], None, False)
        change = above.change(i, torch.zeros(1, dtype=int), latents(sae)(above.true[:, i]).vectors[:, part])
        raised = (change - median(change))[0].amin(0).topk(4, largest=False).indices.cpu()
        words = [model.tokenizer.decode(ids).replace("\n", "⏎") for ids in (*text, *raised[:, None])]
        shown = "{}⟦{}⟧{}".format(*words[:3])
        rows[latent] = shown, "  ".join(words[3:]), f"{document.package}: {document.name}"
    columns = ["text, the ablated token in brackets", "raises", "from"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)
