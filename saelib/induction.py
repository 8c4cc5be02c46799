"""Induction heads: how they are scored, what breaks them, when they appear (chapter 01).

An induction head finds the token that followed the last occurrence of the current one, and copies it (Olsson et al.
2022). The test text is `segment` different random tokens followed by the same once more: nothing but the first half
announces the second. Detection patterns, patching sweeps and factored matrices are TransformerLens's; here they are
batched, averaged and given a standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens import FactoredMatrix, head_detector, patching
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import get_act_name
from transformer_lens.utilities.statistics import standard_error

from saelib import UserError
from saelib.models import Checkpoint, load_model
from saelib.profile import Profile
from saelib.text import Document

patching.tqdm = partial(tqdm, disable=True)  # else every sweep leaves a progress bar in the notebook


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


def repeated_tokens(
    model: TransformerBridge, n: int, segment: int, *, seed: int = 0, prepend_bos: bool = False
) -> Int[Tensor, "n pos"]:
    """`n` sequences of `segment` different random tokens followed by the same; special tokens never among them.

    Raises:
        UserError: the sequence is longer than the model's context, or the vocabulary is too small.
    """
    special = set(model.tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(model.tokenizer)) if i not in special])
    length = 2 * segment + prepend_bos
    if not 2 <= segment <= len(ordinary) or length > model.cfg.n_ctx:
        raise UserError(
            f"segment={segment} makes sequences of {length} tokens: choose 2 or more, and at most {model.cfg.n_ctx} "
            f"tokens in all (the model's context) and {len(ordinary)} different ones (its vocabulary)"
        )
    generator = torch.Generator().manual_seed(seed)
    half = torch.stack([ordinary[torch.randperm(len(ordinary), generator=generator)[:segment]] for _ in range(n)])
    bos = torch.full((n, int(prepend_bos)), model.tokenizer.bos_token_id or 0)
    return torch.cat([bos, half, half], dim=1)


@torch.no_grad()
def token_losses(model: TransformerBridge, tokens: Int[Tensor, "n pos"], batch: int = 32) -> Float[Tensor, "n pos-1"]:
    """Cross-entropy of each next token, nats: entry j belongs to the prediction of token j + 1."""
    parts = tokens.to(model.cfg.device).split(batch)
    return torch.cat([model(part, return_type="loss", loss_per_token=True).cpu() for part in parts])


def halves(losses: Float[Tensor, "n pos-1"], segment: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Nats per token of both copies of repeated tokens, each copy's first left out: nothing can announce it."""
    start = losses.shape[1] + 1 - 2 * segment  # 1 with a BOS token, 0 without
    first = losses[:, start : start + segment - 1]
    second = losses[:, start + segment : start + 2 * segment - 1]
    return first.mean(1), second.mean(1)


# --- scores of heads --------------------------------------------------------------------------------------------------


def induction_pattern(tokens: Int[Tensor, "n pos"]) -> Float[Tensor, "n query key"]:
    """1 where the key follows an earlier occurrence of the query's token."""
    return torch.stack([head_detector.get_induction_head_detection_pattern(row[None]) for row in tokens.cpu()])


def previous_pattern(tokens: Int[Tensor, "n pos"]) -> Float[Tensor, "1 query key"]:
    """1 where the key stands right before the query."""
    return head_detector.get_previous_token_head_detection_pattern(tokens[:1].cpu())[None]


def uniform_attention(positions: int) -> Float[Tensor, "1 query key"]:
    """A head that looks everywhere alike: the reference for every score."""
    allowed = torch.ones(1, positions, positions).tril()
    return allowed / allowed.sum(-1, keepdim=True)


def pattern_score(
    attention: Float[Tensor, "n ... query key"], pattern: Float[Tensor, "n query key"]
) -> Float[Tensor, "n ..."]:
    """Share of the attention that goes where `pattern` says, over the queries for which it says anything; else NaN.

    TransformerLens's `compute_head_attention_similarity_score` (`mul`), for all heads at once.
    """
    pattern = pattern.to(attention.device)
    hits = torch.einsum("n...qk,nqk->n...", attention, pattern)
    rows = pattern.any(-1).sum(-1)  # [n]
    return hits / rows.view(-1, *[1] * (hits.dim() - 1))


@torch.no_grad()
def head_scores(
    model: TransformerBridge, tokens: Int[Tensor, "n pos"], *patterns: Float[Tensor, "n query key"],
    layers: int | None = None, batch: int = 32,
) -> Float[Tensor, "pattern n layer head"]:  # fmt: skip
    """`pattern_score` of every head of the first `layers` layers, by patterns for each sequence or one for all."""
    layers = layers or model.cfg.n_layers
    patterns = [pattern.expand(len(tokens), -1, -1).split(batch) for pattern in patterns]
    found = []
    for part, *chosen in zip(tokens.to(model.cfg.device).split(batch), *patterns, strict=True):
        wanted = _names(model, "pattern")[:layers]
        _, cache = model.run_with_cache(part, names_filter=wanted, stop_at_layer=layers)
        attention = torch.stack([cache[name] for name in wanted], dim=1)  # [n layer head query key]
        found.append(torch.stack([pattern_score(attention, pattern) for pattern in chosen]).cpu())
    return torch.cat(found, dim=1)


def _names(model: TransformerBridge, activation: str) -> list[str]:
    """The activation's hook name in every layer."""
    return [get_act_name(activation, layer) for layer in range(model.cfg.n_layers)]


class Measured(NamedTuple):
    """One model on repeated random tokens; losses and gap (first copy less second) in nats per token."""

    losses: Float[Tensor, "n pos-1"]
    gap: Float[Tensor, " n"]
    induction: Float[Tensor, "n layer head"]
    previous: Float[Tensor, "n layer head"]


def measure(model: TransformerBridge, tokens: Int[Tensor, "n pos"], segment: int) -> Measured:
    """Losses, induction scores and previous-token scores on `repeated_tokens`."""
    losses = token_losses(model, tokens)
    first, second = halves(losses, segment)
    patterns = induction_pattern(tokens[:1]), previous_pattern(tokens)
    return Measured(losses, first - second, *head_scores(model, tokens, *patterns))


def best(scores: Float[Tensor, "layer head"], first: int = 0, below: int | None = None) -> Head:
    """The head with the highest score in the layers from `first` up to, but not including, `below`."""
    at = scores[first:below].argmax().item()
    return Head(first + at // scores.shape[1], at % scores.shape[1])


# --- what a head does in text -----------------------------------------------------------------------------------------


def clearest_excerpt(
    model: TransformerBridge, documents: Iterable[Document], head: Head, *, length: int = 32, n: int = 128
) -> tuple[Document, pd.DataFrame]:
    """Of `n` documents' first `length` tokens, those where induction most often leads to the right guess: see `looks`.

    More than half of the head's attention is induction there, and the first guess is right: the best case, not a
    typical one. Raises UserError where no document is long enough.
    """
    read = ((document, model.tokenizer(document.text, add_special_tokens=False)["input_ids"]) for document in documents)
    found = list(islice(((document, ids[:length]) for document, ids in read if len(ids) >= length), n))
    if not found:
        raise UserError(f"no document has {length} tokens: ask for a shorter excerpt")
    tokens, name = torch.tensor([ids for _, ids in found]), get_act_name("pattern", head.layer)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens.to(model.cfg.device), names_filter=name)
    attention, guesses = cache[name][:, head.index].cpu(), logits.argmax(-1).cpu()
    on_target = (attention * induction_pattern(tokens)).sum(-1)  # [n query]
    right = (on_target[:, :-1] > 0.5) & (guesses[:, :-1] == tokens[:, 1:])
    chosen = right.sum(-1).argmax().item()
    words = ([model.tokenizer.decode([i]) for i in row[chosen].tolist()] for row in (tokens, guesses))
    return found[chosen][0], looks(attention[chosen], *words)


def looks(attention: Float[Tensor, "query key"], tokens: list[str], guesses: list[str]) -> pd.DataFrame:
    """A row for each token: which `key` it looks at most, with what `weight`, and, white space made visible, in words.

    Looks at itself and at the first token, where idle heads rest, do not count: weight 0 where none is left.
    """
    others = attention.tril(-1)
    others[:, 0] = 0
    weights, keys = others.max(-1)
    read, guess = (pd.Series(row).replace({" ": "␣", "\n": "⏎", "\t": "⇥"}, regex=True) for row in (tokens, guesses))
    words = {"reading": read, "looks back at": read[keys.tolist()].array, "weight": weights, "expects next": guess}
    return pd.DataFrame({"token": tokens, "key": keys, **words, "and there comes": read.shift(-1, fill_value="")})


# --- what breaks it, and what mends it --------------------------------------------------------------------------------


def ablation(head: Head, how: Literal["mean", "zero"] = "mean") -> tuple[str, Callable]:
    """A hook that silences a head: `mean` leaves its mean output over the batch at each position, `zero` nothing."""

    def silence(z: Float[Tensor, "n pos head d_head"], hook) -> Float[Tensor, "n pos head d_head"]:
        z = z.clone()
        z[:, :, head.index] = z[:, :, head.index].mean(0, keepdim=True) if how == "mean" else 0.0
        return z

    return get_act_name("z", head.layer), silence


def scores_without(
    model: TransformerBridge, tokens: Int[Tensor, "n pos"], pattern: Float[Tensor, "n query key"], target: Head,
    heads: Iterable[Head], how: Literal["mean", "zero"] = "mean",
) -> Float[Tensor, "head n"]:  # fmt: skip
    """The target head's score per sequence with each of the heads ablated in turn; all sequences in one batch."""
    rows = []
    for head in heads:
        with model.hooks(fwd_hooks=[ablation(head, how)]):
            scores = head_scores(model, tokens, pattern, layers=target.layer + 1, batch=len(tokens))
        rows.append(scores[0, :, target.layer, target.index])
    return torch.stack(rows)


def other_heads(model: TransformerBridge, target: Head, without: Head, at_most: int, seed: int = 0) -> list[Head]:
    """The heads in the layers below the target's, one left out: all of them, or `at_most` drawn at random."""
    found = [Head(layer, index) for layer in range(target.layer) for index in range(model.cfg.n_heads)]
    found.remove(without)
    drawn = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:at_most]
    return [found[i] for i in sorted(drawn.tolist())]


def circuit(
    model: TransformerBridge, tokens: Int[Tensor, "n pos"], measured: Measured
) -> tuple[Head, Head, Float[Tensor, " n"]]:
    """The best induction head, the best previous-token head in a layer below, and the score's fall without it."""
    head = best(measured.induction.mean(0), first=1)
    previous = best(measured.previous.mean(0), below=head.layer)
    without = scores_without(model, tokens, induction_pattern(tokens[:1]), head, [previous])
    return head, previous, measured.induction[:, *head] - without[0]


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
    tokens = repeated_tokens(model, n, segment + 1, seed=seed, prepend_bos=prepend_bos).to(model.cfg.device)
    bos, body = tokens[:, : int(prepend_bos)], tokens[:, prepend_bos : segment + prepend_bos]
    spare = tokens[:, segment + prepend_bos]  # a token that occurs nowhere else in the sequence
    clean = torch.cat([bos, body, body[:, : segment // 2 + 1]], dim=1)
    first = segment // 2 + prepend_bos
    corrupted = clean.clone()
    corrupted[:, first] = spare
    labels = ["·"] * clean.shape[1]
    labels[first], labels[first + 1], labels[-1] = "A/X", "B", "A"
    return Pair(clean, corrupted, clean[:, first + 1], labels)


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
    """`recovery` when one activation of the clean run is put into the corrupted one (Meng et al. 2022).

    `position`: the residual stream before a layer at one position; `head`: a head's output at all positions.
    """
    name = {"position": "resid_pre", "head": "z"}[by]
    sweep = {"position": patching.get_act_patch_resid_pre, "head": patching.get_act_patch_attn_head_out_all_pos}[by]
    _, cache = model.run_with_cache(pair.clean, names_filter=_names(model, name))
    return sweep(model, pair.corrupted, cache, recovery(model, pair)).cpu()


@torch.no_grad()
def patch_path(model: TransformerBridge, pair: Pair, source: Head, target: Head) -> dict[str, float]:
    """`recovery` when the source's clean output reaches only the target's queries (`q`), keys (`k`) or values (`v`).

    Every other reader of the source still sees its corrupted output (path patching, Wang et al. 2022). Where heads
    share keys and values, those of the target's group are meant.
    """
    runs = pair.clean, pair.corrupted
    caches = [model.run_with_cache(tokens, names_filter=_names(model, "z"))[1] for tokens in runs]
    fixed = model, pair.corrupted, *caches, recovery(model, pair), *source
    groups = model.cfg.n_key_value_heads or model.cfg.n_heads
    shared = "kv" if groups < model.cfg.n_heads else ""  # TransformerLens patches what is a head's own
    paths = {name: patching.get_act_patch_direct_path(*fixed, name, verbose=False) for name in "qkv"[: 3 - len(shared)]}
    found = {name: path[target].item() for name, path in paths.items()}
    return found | {name: _path_into_group(model, pair, caches, source, target, name) for name in shared}


def _path_into_group(model, pair: Pair, caches: list, source: Head, target: Head, name: str) -> float:
    """The path into the keys (`k`) or values (`v`) of a target's group: computed in a run where all see the source."""
    clean, corrupted = (cache[f"blocks.{source.layer}.attn.hook_z"][:, :, source.index] for cache in caches)
    change = (clean - corrupted) @ model.blocks[source.layer].attn.W_O[source.index]
    place, before = f"blocks.{target.layer}.attn.hook_{name}", f"blocks.{target.layer}.hook_resid_pre"
    with model.hooks(fwd_hooks=[(before, lambda residual, hook: residual + change)]):
        wanted = model.run_with_cache(pair.corrupted, names_filter=place)[1][place]
    group = target.index * wanted.shape[2] // model.cfg.n_heads

    def patch(activation: Tensor, hook) -> Tensor:
        activation[:, :, group] = wanted[:, :, group]
        return activation

    return recovery(model, pair)(model.run_with_hooks(pair.corrupted, fwd_hooks=[(place, patch)])).item()


@torch.no_grad()
def copying_scores(model: TransformerBridge, tokens: Int[Tensor, "n pos"] | None = None) -> Float[Tensor, "layer head"]:
    """Sum of the eigenvalues of a head's full OV circuit over the sum of their absolute values (Elhage et al. 2021).

    1: attending to a token raises its own logit; -1: lowers it. The eigenvalues of W_E W_V W_O W_U (vocabulary squared)
    that are not zero are those of W_O W_U W_E W_V, which is d_head x d_head. With `tokens`, W_E gives way to what the
    layer really receives at each of them. Wants a model with LayerNorm folded (`enable_compatibility_mode`).
    """
    received, unembed = [model.W_E] * model.cfg.n_layers, model.W_U
    if tokens is not None:
        names = [f"blocks.{layer}.ln1.hook_normalized" for layer in range(model.cfg.n_layers)]
        _, cache = model.run_with_cache(tokens.to(model.cfg.device), names_filter=names)
        received, unembed = [cache[name].flatten(0, 1) for name in names], model.W_U[:, tokens.flatten()]
    round_trip = torch.stack([unembed @ rows for rows in received])
    circuits = FactoredMatrix(model.OV.A.cpu(), model.OV.B.cpu())  # not every GPU has eigenvalues
    eigenvalues = (circuits @ round_trip[:, None].cpu()).eigenvalues  # [layer head d_head], complex
    return (eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)).cpu()


def copying(profile: Profile, checkpoint: Checkpoint | None, tokens: Int[Tensor, "n pos"]) -> tuple[Tensor, Tensor]:
    """`copying_scores` by token embeddings and by what the layers receive, of an instance with LayerNorm folded."""
    model = load_model(profile, checkpoint)
    model.enable_compatibility_mode()
    return copying_scores(model), copying_scores(model, tokens)


# --- emergence --------------------------------------------------------------------------------------------------------


class History(NamedTuple):
    """What the training checkpoints score, in order of training tokens; losses and gap in nats per token."""

    tokens: list[int]
    induction: Float[Tensor, "checkpoint layer head"]
    previous: Float[Tensor, "checkpoint layer head"]
    gap: Float[Tensor, " checkpoint"]
    text_loss: Float[Tensor, " checkpoint"]


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
    """Load and measure each checkpoint; None without any. Raises UserError: one does not say its training tokens."""
    if any(checkpoint.tokens is None for checkpoint in found):
        missing = "model.training_batch and training_context"
        raise UserError(f"profile {profile.name!r}: steps are no tokens without {missing}")
    rows = []
    for checkpoint in tqdm(found, desc="checkpoints", leave=False, disable=None):
        model = load_model(profile, checkpoint)
        row = measure(model, repeated, segment)
        rows.append((row.induction.mean(0), row.previous.mean(0), row.gap.mean(), token_losses(model, text).mean()))
    columns = map(torch.stack, zip(*rows, strict=True))
    return History([checkpoint.tokens for checkpoint in found], *columns) if found else None


def emergence(
    tokens: list[int], values: Float[Tensor, " checkpoint"], share: float = 0.5
) -> tuple[float, int, int] | None:
    """Where the values first pass a share of the final one, in training tokens, and the checkpoints before and after.

    On a straight line in log tokens between the two; None where they begin above that share, or do not rise.
    """
    values = values.tolist()
    goal = values[-1] * share
    after = next((i for i, value in enumerate(values) if value >= goal), 0)
    if after == 0 or values[-1] <= max(values[0], 0.0):
        return None
    low, high = tokens[after - 1], tokens[after]
    way = (goal - values[after - 1]) / (values[after] - values[after - 1])
    between = low * (high / low) ** way if low else way * high  # from zero on, log tokens have no meaning
    return between, low, high


def law_tokens(exponent: float, profile: Profile) -> float | None:
    """10^exponent * sqrt(batch * context) training tokens (Aoyama et al. 2025); None where these are not known."""
    own, model = profile.pretrain, profile.model
    batch, context = (own.batch, own.context_length) if own else (model.training_batch, model.training_context)
    return 10**exponent * math.sqrt(batch * context) if batch and context else None
