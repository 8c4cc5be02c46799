"""Induction heads: how they are scored, what breaks them, when they appear (chapter 01).

An induction head finds the token that followed the last occurrence of the current one, and copies it (Olsson et al.
2022). The test text is `segment` different random tokens followed by the same once more: nothing but the first half
announces the second. Detection patterns, patching sweeps and factored matrices are TransformerLens's; here they are
batched, averaged and given a standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens import patching
from transformer_lens.head_detector import (
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
)
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import get_act_name
from transformer_lens.utilities.statistics import standard_error

from saelib import UserError
from saelib.models import Checkpoint, checkpoints, load_model
from saelib.profile import Profile
from saelib.text import Document

Hook = tuple[str, Callable]


class Head(NamedTuple):
    """One attention head. Prints as `L2H1`: layer 2, head 1, both counted from zero."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.index}"


def estimate(samples: Float[Tensor, " n"] | None) -> dict[str, float | int | None]:
    """Mean, standard error and number of independent samples, by the names `Report.publish` knows; None: not run."""
    if samples is None:
        return {"value": None}
    return {"value": samples.mean().item(), "se": standard_error(samples).item(), "n": len(samples)}


# --- repeated random tokens -------------------------------------------------------------------------------------------


def repeated_tokens(
    model: TransformerBridge, n: int, segment: int, *, seed: int = 0, prepend_bos: bool = False
) -> Int[Tensor, "n pos"]:
    """`n` sequences of `segment` different random tokens followed by the same; special tokens never among them.

    Raises:
        UserError: the sequence is longer than the model's context, or the vocabulary is too small.
    """
    ordinary = _ordinary_tokens(model)
    length = 2 * segment + prepend_bos
    if not 2 <= segment <= len(ordinary) or length > model.cfg.n_ctx:
        raise UserError(
            f"segment={segment} makes sequences of {length} tokens: choose 2 or more, and at most {model.cfg.n_ctx} "
            f"tokens in all (the model's context) and {len(ordinary)} different ones (its vocabulary)"
        )
    generator = torch.Generator().manual_seed(seed)
    half = torch.stack([ordinary[torch.randperm(len(ordinary), generator=generator)[:segment]] for _ in range(n)])
    return torch.cat([_bos(model, n, prepend_bos), half, half], dim=1)


def _ordinary_tokens(model: TransformerBridge) -> Int[Tensor, " vocab"]:
    special = set(model.tokenizer.all_special_ids)
    return torch.tensor([i for i in range(len(model.tokenizer)) if i not in special])


def _bos(model: TransformerBridge, n: int, wanted: bool) -> Int[Tensor, "n bos"]:
    return torch.full((n, 1), model.tokenizer.bos_token_id) if wanted else torch.empty((n, 0), dtype=torch.long)


@torch.no_grad()
def token_losses(model: TransformerBridge, tokens: Int[Tensor, "n pos"], batch: int = 32) -> Float[Tensor, "n pos-1"]:
    """Cross-entropy of each next token, nats: entry j belongs to the prediction of token j + 1."""
    parts = tokens.to(model.cfg.device).split(batch)
    return torch.cat([model(part, return_type="loss", loss_per_token=True).cpu() for part in parts])


class Halves(NamedTuple):
    """Loss per sequence, nats, on the same tokens after the same predecessors, read for the first time and again."""

    first: Float[Tensor, " n"]
    second: Float[Tensor, " n"]

    @property
    def gap(self) -> Float[Tensor, " n"]:
        return self.first - self.second


def halves(losses: Float[Tensor, "n pos-1"], segment: int) -> Halves:
    """Both halves of `token_losses` on repeated tokens, each half's first token left out: nothing can announce it."""
    start = losses.shape[1] + 1 - 2 * segment  # 1 with a BOS token, 0 without
    first = losses[:, start : start + segment - 1]
    second = losses[:, start + segment : start + 2 * segment - 1]
    return Halves(first.mean(1), second.mean(1))


# --- scores of heads --------------------------------------------------------------------------------------------------


def induction_pattern(tokens: Int[Tensor, "n pos"]) -> Float[Tensor, "n query key"]:
    """1 where the key follows an earlier occurrence of the query's token."""
    return torch.stack([get_induction_head_detection_pattern(row[None]) for row in tokens])


def previous_pattern(tokens: Int[Tensor, "n pos"]) -> Float[Tensor, "n query key"]:
    """1 where the key stands right before the query."""
    return get_previous_token_head_detection_pattern(tokens[:1])[None]


def uniform_attention(positions: int) -> Float[Tensor, "query key"]:
    """A head that looks everywhere alike: the reference for every score."""
    allowed = torch.ones(positions, positions).tril()
    return allowed / allowed.sum(-1, keepdim=True)


def pattern_score(
    attention: Float[Tensor, "n ... query key"], pattern: Float[Tensor, "n query key"]
) -> Float[Tensor, "n ..."]:
    """Share of the attention that goes where `pattern` says, over the queries for which it says anything.

    1: all of it. NaN where the pattern says nothing about a sequence. Equal to TransformerLens's
    `compute_head_attention_similarity_score` (`mul`) once the other rows are set to zero, for all heads at once.
    """
    pattern = pattern.expand(len(attention), -1, -1).to(attention.device)
    hits = torch.einsum("n...qk,nqk->n...", attention, pattern)
    rows = pattern.any(-1).sum(-1)  # [n]
    return hits / rows.view(-1, *[1] * (hits.dim() - 1))


@torch.no_grad()
def head_scores(
    model: TransformerBridge, tokens: Int[Tensor, "n pos"], *patterns: Float[Tensor, "n query key"],
    layers: int | None = None, batch: int = 32,
) -> Float[Tensor, "pattern n layer head"]:  # fmt: skip
    """`pattern_score` of every head of the first `layers` layers (all unless given), for each pattern and sequence.

    A pattern is one per sequence, or one for all of them.
    """
    layers = layers or model.cfg.n_layers
    found = []
    for at in range(0, len(tokens), batch):
        _, cache = model.run_with_cache(
            tokens[at : at + batch].to(model.cfg.device),
            names_filter=lambda name: name.endswith("attn.hook_pattern"), stop_at_layer=layers,
        )  # fmt: skip
        attention = torch.stack([cache["pattern", layer] for layer in range(layers)], dim=1)  # [n layer head query key]
        chosen = [pattern if len(pattern) == 1 else pattern[at : at + batch] for pattern in patterns]
        found.append(torch.stack([pattern_score(attention, pattern) for pattern in chosen]).cpu())
    return torch.cat(found, dim=1)


class Measured(NamedTuple):
    """One model on repeated random tokens."""

    losses: Float[Tensor, "n pos-1"]
    """Nats, see `token_losses`."""
    halves: Halves
    induction: Float[Tensor, "n layer head"]
    previous: Float[Tensor, "n layer head"]


def measure(model: TransformerBridge, tokens: Int[Tensor, "n pos"], segment: int) -> Measured:
    """Losses, induction scores and previous-token scores on `repeated_tokens`."""
    losses = token_losses(model, tokens)
    scores = head_scores(model, tokens, induction_pattern(tokens[:1]), previous_pattern(tokens))
    return Measured(losses, halves(losses, segment), *scores)


def measure_checkpoint(
    profile: Profile, checkpoint: Checkpoint | None, tokens: Int[Tensor, "n pos"], segment: int
) -> Measured | None:
    """Load a checkpoint and `measure` it; None where the profile has none."""
    return None if checkpoint is None else measure(load_model(profile, checkpoint), tokens, segment)


def untrained(profile: Profile) -> Checkpoint | None:
    """The model before its first training step, where the profile has it: the control of every finding."""
    return next((checkpoint for checkpoint in checkpoints(profile) if checkpoint.step == 0), None)


def best(scores: Float[Tensor, "layer head"], first: int = 0, below: int | None = None) -> Head:
    """The head with the highest score in the layers from `first` up to, but not including, `below`."""
    at = scores[first:below].argmax().item()
    return Head(first + at // scores.shape[1], at % scores.shape[1])


# --- what a head does in text -----------------------------------------------------------------------------------------


class Look(NamedTuple):
    """From the token at `query`, a head looks back at the one at `key`, with this share of its attention."""

    query: int
    key: int
    weight: float


class Excerpt(NamedTuple):
    """The beginning of a document, and where one head looks while the model reads it."""

    document: Document
    tokens: list[str]
    looks: list[Look]
    """The strongest look of each token (first token and itself aside), strongest first."""
    expected: list[str]
    """The model's first guess for the token that follows."""

    def table(self, rows: int = 6) -> str:
        """The strongest looks as lines of text."""
        head = f"{'reading':>16}   {'looks back at':<16} {'weight':>6}   {'expects next':<16} and there comes"
        lines = [f"{self.document.package}: {self.document.name}, first {len(self.tokens)} tokens", "", head]
        following = [*self.tokens[1:], ""]
        for query, key, weight in self.looks[:rows]:
            words = self.tokens[query], self.tokens[key], self.expected[query], following[query]
            read, seen, guess, came = (visible(word) for word in words)
            lines.append(f"{read:>16} ← {seen:<16} {weight:6.2f}   {guess:<16} {came}".rstrip())
        return "\n".join(lines)


def visible(token: str) -> str:
    """A token with its white space made visible."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


@torch.no_grad()
def clearest_excerpt(
    model: TransformerBridge, documents: Iterable[Document], head: Head, *, length: int = 32, n: int = 128
) -> Excerpt:
    """Of `n` documents' first `length` tokens, those where induction most often leads to the right guess.

    That is: more than half of the head's attention is induction, and the model's first guess is the token that comes.
    The best case, not a typical one; the average over text is `head_scores` with `induction_pattern`.

    Raises:
        UserError: no document is long enough.
    """
    found = list(islice(_beginnings(model, documents, length), n))
    if not found:
        raise UserError(f"no document has {length} tokens: ask for a shorter excerpt")
    tokens = torch.tensor([ids for _, ids in found])
    logits, cache = model.run_with_cache(tokens.to(model.cfg.device), names_filter=get_act_name("pattern", head.layer))
    attention = cache["pattern", head.layer][:, head.index].cpu()
    on_target = (attention * induction_pattern(tokens)).sum(-1)  # [n query]
    guesses = logits.argmax(-1).cpu()
    right = (on_target[:, :-1] > 0.5) & (guesses[:, :-1] == tokens[:, 1:])
    chosen = right.sum(-1).argmax().item()
    rows = tokens[chosen], guesses[chosen]
    read, expected = ([model.tokenizer.decode([i]) for i in row.tolist()] for row in rows)
    return Excerpt(found[chosen][0], read, strongest_looks(attention[chosen]), expected)


def _beginnings(model: TransformerBridge, found: Iterable[Document], length: int) -> Iterator[tuple[Document, list]]:
    for document in found:
        ids = model.tokenizer(document.text, add_special_tokens=False)["input_ids"]
        if len(ids) >= length:
            yield document, ids[:length]


def strongest_looks(attention: Float[Tensor, "query key"]) -> list[Look]:
    """For each token the one it looks at most, itself and the first (where idle heads rest) aside; strongest first."""
    others = attention.tril(-1)
    others[:, 0] = 0
    weights, keys = others.max(-1)
    looks = [Look(i, key, weight) for i, (key, weight) in enumerate(zip(keys.tolist(), weights.tolist(), strict=True))]
    return sorted((look for look in looks if look.weight > 0), key=lambda look: -look.weight)


# --- what breaks it ---------------------------------------------------------------------------------------------------


def ablation(heads: Iterable[Head], how: Literal["mean", "zero"] = "mean") -> list[Hook]:
    """Hooks that silence heads, for `run_with_hooks` and `model.hooks`.

    `mean` replaces a head's output at each position by its mean over the batch: what it says on average stays,
    what it says about these tokens goes. `zero` removes both.
    """
    return [(get_act_name("z", head.layer), partial(_silence, index=head.index, how=how)) for head in heads]


def _silence(z: Float[Tensor, "n pos head d_head"], hook, index: int, how: str) -> Float[Tensor, "n pos head d_head"]:
    z = z.clone()
    z[:, :, index] = z[:, :, index].mean(0, keepdim=True) if how == "mean" else 0.0
    return z


def scores_without(
    model: TransformerBridge, tokens: Int[Tensor, "n pos"], pattern: Float[Tensor, "n query key"], target: Head,
    heads: Iterable[Head], how: Literal["mean", "zero"] = "mean",
) -> Float[Tensor, "head n"]:  # fmt: skip
    """The target head's score per sequence with each of the heads ablated in turn; all sequences in one batch."""
    rows = []
    for head in heads:
        with model.hooks(fwd_hooks=ablation([head], how)):
            scores = head_scores(model, tokens, pattern, layers=target.layer + 1, batch=len(tokens))
        rows.append(scores[0, :, target.layer, target.index])
    return torch.stack(rows)


def other_heads(model: TransformerBridge, target: Head, without: Head, at_most: int, seed: int = 0) -> list[Head]:
    """The heads in the layers below the target's, one left out: all of them, or `at_most` drawn at random."""
    found = [Head(layer, index) for layer in range(target.layer) for index in range(model.cfg.n_heads)]
    found.remove(without)
    drawn = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:at_most]
    return [found[i] for i in sorted(drawn.tolist())]


class Circuit(NamedTuple):
    """The two heads of one model, and what the first means to the second."""

    measured: Measured
    head: Head
    """The best induction head."""
    previous: Head
    """The best previous-token head in a layer below."""
    drop: Float[Tensor, " n"]
    """Fall of the induction score without it, per sequence."""


def circuit(
    profile: Profile, checkpoint: Checkpoint | None, tokens: Int[Tensor, "n pos"], segment: int
) -> Circuit | None:
    """Find the two heads in another model and ablate the lower one; None where there is no checkpoint."""
    if checkpoint is None:
        return None
    model = load_model(profile, checkpoint)
    measured = measure(model, tokens, segment)
    head = best(measured.induction.mean(0), first=1)
    previous = best(measured.previous.mean(0), below=head.layer)
    without = scores_without(model, tokens, induction_pattern(tokens[:1]), head, [previous])
    return Circuit(measured, head, previous, measured.induction[:, head.layer, head.index] - without[0])


# --- activation patching ----------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two texts that differ in one token. Clean: … A B … A. Corrupted: … X B … A. The answer is B."""

    clean: Int[Tensor, "n pos"]
    corrupted: Int[Tensor, "n pos"]
    answers: Int[Tensor, " n"]
    labels: list[str]
    """Names of the positions: A/X, B, A, and dots for the rest."""


def clean_and_corrupted(
    model: TransformerBridge, n: int, segment: int = 12, *, seed: int = 0, prepend_bos: bool = False
) -> Pair:
    """Repeated random tokens, cut right after the second A; in the corrupted text the first A is another token."""
    tokens = repeated_tokens(model, n, segment + 1, seed=seed, prepend_bos=prepend_bos)
    first = segment // 2 + prepend_bos
    spare = tokens[:, segment + prepend_bos]  # a token that occurs nowhere else in the sequence
    body = tokens[:, prepend_bos : segment + prepend_bos]
    clean = torch.cat([tokens[:, :prepend_bos], body, body[:, : segment // 2 + 1]], dim=1)
    corrupted = clean.clone()
    corrupted[:, first] = spare
    labels = ["·"] * clean.shape[1]
    labels[first], labels[first + 1], labels[-1] = "A/X", "B", "A"
    device = model.cfg.device
    return Pair(clean.to(device), corrupted.to(device), clean[:, first + 1].to(device), labels)


@torch.no_grad()
def recovery(model: TransformerBridge, pair: Pair) -> Callable[[Float[Tensor, "n pos vocab"]], Tensor]:
    """How much of the answer's log-probability logits recover: 0 as in the corrupted run, 1 as in the clean one."""

    def log_probability(logits: Float[Tensor, "n pos vocab"]) -> Tensor:
        return logits[:, -1].log_softmax(-1).gather(1, pair.answers[:, None]).mean()

    corrupted, clean = log_probability(model(pair.corrupted)), log_probability(model(pair.clean))
    return lambda logits: (log_probability(logits) - corrupted) / (clean - corrupted)


@torch.no_grad()
def patch_sweep(
    model: TransformerBridge, pair: Pair, by: Literal["position", "head"]
) -> Float[Tensor, "layer pos"] | Float[Tensor, "layer head"]:
    """`recovery` when one activation of the clean run is put into the corrupted one.

    `position`: the residual stream before a layer at one position; `head`: a head's output at all positions
    (`transformer_lens.patching`; the method is Meng et al. 2022's).
    """
    name, sweep = {
        "position": ("resid_pre", patching.get_act_patch_resid_pre),
        "head": ("z", patching.get_act_patch_attn_head_out_all_pos),
    }[by]
    with _quiet():
        return sweep(model, pair.corrupted, _cached(model, pair.clean, name), recovery(model, pair)).cpu()


@torch.no_grad()
def patch_path(model: TransformerBridge, pair: Pair, source: Head, target: Head) -> dict[str, float]:
    """`recovery` when the source's clean output reaches only the target's queries (`q`), keys (`k`) or values (`v`).

    Every other reader of the source still sees its corrupted output (path patching, Wang et al. 2022).
    """
    caches = [_cached(model, tokens, "z") for tokens in (pair.clean, pair.corrupted)]
    metric = recovery(model, pair)

    def into(component: str) -> float:
        found = patching.get_act_patch_direct_path(
            model, pair.corrupted, *caches, metric, source.layer, source.index, component, verbose=False
        )
        return found[target.layer, target.index].item()

    return {component: into(component) for component in "qkv"}


def _cached(model: TransformerBridge, tokens: Tensor, name: str):
    names = [get_act_name(name, layer) for layer in range(model.cfg.n_layers)]
    return model.run_with_cache(tokens, names_filter=names)[1]


@contextmanager
def _quiet() -> Iterator[None]:
    """TransformerLens draws a progress bar for every sweep, which a notebook would keep."""
    drawn, patching.tqdm = patching.tqdm, partial(tqdm, disable=True)
    try:
        yield
    finally:
        patching.tqdm = drawn


# --- copying ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def copying_scores(model: TransformerBridge, tokens: Int[Tensor, "n pos"] | None = None) -> Float[Tensor, "layer head"]:
    """Sum of the eigenvalues of a head's full OV circuit over the sum of their absolute values.

    1: all eigenvalues are positive, so attending to a token raises its own logit; -1: attending lowers it. The circuit
    W_E W_V W_O W_U is vocabulary by vocabulary, but only d_head of its eigenvalues are not zero, and those are the ones
    of W_O W_U W_E W_V, which is d_head x d_head (Elhage et al. 2021).

    With `tokens`, W_E gives way to what the layer really receives: one row for every token in them, the normalised
    residual stream at its position. Wants a model with LayerNorm folded (`enable_compatibility_mode`).
    """
    layers = range(model.cfg.n_layers)
    if tokens is None:
        round_trip = torch.stack([model.W_U @ model.W_E for _ in layers])
    else:
        names = [f"blocks.{layer}.ln1.hook_normalized" for layer in layers]
        _, cache = model.run_with_cache(tokens.to(model.cfg.device), names_filter=names, stop_at_layer=len(layers))
        unembed = model.W_U[:, tokens.flatten()]
        round_trip = torch.stack([unembed @ cache[name].flatten(0, 1) for name in names])
    eigenvalues = (model.OV @ round_trip[:, None]).eigenvalues  # [layer head d_head], complex
    return (eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)).cpu()


class Copying(NamedTuple):
    """OV copying scores of every head, by two readings of what a head receives."""

    embedded: Float[Tensor, "layer head"]
    """Token embeddings, as the formula says."""
    received: Float[Tensor, "layer head"]
    """The residual stream in front of the head's layer."""


def copying(profile: Profile, checkpoint: Checkpoint | None, tokens: Int[Tensor, "n pos"]) -> Copying | None:
    """Both copying scores, of a second instance of the model with LayerNorm folded; None where there is none."""
    if checkpoint is None:
        return None
    model = load_model(profile, checkpoint)
    model.enable_compatibility_mode()
    return Copying(copying_scores(model), copying_scores(model, tokens))


# --- emergence --------------------------------------------------------------------------------------------------------


class History(NamedTuple):
    """What the training checkpoints score, in order of training."""

    tokens: list[int]
    """Training tokens seen, 0 first."""
    induction: Float[Tensor, "checkpoint layer head"]
    previous: Float[Tensor, "checkpoint layer head"]
    gap: Float[Tensor, " checkpoint"]
    """First minus second half of repeated random tokens, nats."""
    text_loss: Float[Tensor, " checkpoint"]
    """Mean cross-entropy on held-out text, nats."""


def thinned(found: list[Checkpoint], at_most: int) -> list[Checkpoint]:
    """At most so many of them, evenly spread in log steps, first and last among them: the most crowded go first."""
    kept = list(found)
    while len(kept) > max(at_most, 2):
        logs = [math.log1p(checkpoint.step) for checkpoint in kept]
        del kept[min(range(1, len(kept) - 1), key=lambda i: logs[i + 1] - logs[i - 1])]
    return kept


def history(
    profile: Profile, found: list[Checkpoint], repeated: Int[Tensor, "n pos"], segment: int, text: Int[Tensor, "m pos"]
) -> History | None:
    """Load each checkpoint in turn and measure it; None where there is no checkpoint.

    Raises:
        UserError: a checkpoint does not say how many tokens it has seen.
    """
    if not found:
        return None
    if any(checkpoint.tokens is None for checkpoint in found):
        raise UserError(
            f"profile {profile.name!r}: steps are no tokens without model.training_batch and training_context"
        )
    rows = []
    for checkpoint in tqdm(found, desc="checkpoints", leave=False, disable=None):
        model = load_model(profile, checkpoint)
        row = measure(model, repeated, segment)
        text_loss = token_losses(model, text).mean()
        rows.append((row.induction.mean(0), row.previous.mean(0), row.halves.gap.mean(), text_loss))
    columns = (torch.stack(column) for column in zip(*rows, strict=True))
    return History([checkpoint.tokens for checkpoint in found], *columns)


class Emergence(NamedTuple):
    """When something appeared, in training tokens."""

    tokens: float
    low: int
    """The last checkpoint before."""
    high: int
    """The first checkpoint after."""


def emergence(tokens: list[int], values: Float[Tensor, " checkpoint"], share: float = 0.5) -> Emergence | None:
    """Where the values first pass `share` of the final one, on a straight line in log tokens between two checkpoints.

    None where they end no higher than they began, or begin above the goal.
    """
    values = [float(value) for value in values]
    goal = share * values[-1]
    after = next((i for i, value in enumerate(values) if value >= goal), 0)
    if after == 0 or values[-1] <= max(values[0], 0.0):
        return None
    low, high = tokens[after - 1], tokens[after]
    way = (goal - values[after - 1]) / (values[after] - values[after - 1])
    between = low * (high / low) ** way if low else way * high  # from zero on, log tokens have no meaning
    return Emergence(between, low, high)


def law_tokens(exponent: float, batch: int, context: int) -> float:
    """Training tokens after which induction heads appear: 10^exponent * sqrt(batch * context) (Aoyama et al. 2025)."""
    return 10**exponent * math.sqrt(batch * context)


def training_shape(profile: Profile) -> tuple[int, int] | None:
    """Sequences in a pre-training batch and tokens in a sequence, where the profile knows them."""
    if profile.pretrain is not None:
        return profile.pretrain.batch, profile.pretrain.context_length
    batch, context = profile.model.training_batch, profile.model.training_context
    return (batch, context) if batch and context else None
