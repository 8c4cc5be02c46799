"""What chapters and training compute and hold, in formulas: the sizes of a model, an SAE and a recipe go in.

Work is counted in floating-point operations (two for a multiplication and its addition) of the transformer's blocks, of
the autoencoders' training steps and of other products, in bytes that pass through memory, and in seconds that follow no
formula: Python's, figures', tables'. Memory is counted tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from saelib import UserError, ops, probes, sparsity, splice
from saelib.activations import SUB_BATCH
from saelib.metrics import LATENTS
from saelib.models import checkpoints
from saelib.profile import HuggingFace, Profile, Recipe
from saelib.report import cores
from saelib.scaling import flops

GPT2 = {"gpt2", "openai-community/gpt2", "stanford-crfm/alias-gpt2-small-x21"}
"""Models whose shape is known also where no config.json is: that of `GPT2Config()`."""
HOST, CALL, LOADED = 8.0, 2e-3, 0.3e9
"""Seconds of any chapter, seconds of a call of a block with its hooks, bytes of weights loaded and hashed a second."""
TOKENIZED, PACKED = 0.5e6, 3e6
"""Tokens a second that one core makes of text (the shipped tokenizer read 2.4 MB of this book in a second on one of
ours, and GPT-2's tokens are 4.5 bytes long on web text), and that Python cuts into contexts."""
PASSES = 8
"""Times that logits, or pre-activations, are written or read on their way to a few numbers."""
ALL = "small", "large", "chapter", "chapter-large", "small-seed-1"
Parameters = Mapping[str, float]
"""A notebook's own: `n_contexts` and the like."""


class Shape(NamedTuple):
    """A language model, as far as its cost goes."""

    parameters: int
    layers: int
    heads: int
    d_model: int
    vocab: int
    block: int
    """Weights of one block that are factors of a product, each of them once for a token."""

    def per_token(self, context: int) -> int:
        """Operations of one block on one token: its weights, and attention to the whole context."""
        return 2 * self.block + 4 * context * self.d_model


def config_of(profile: Profile):
    """The model's configuration. Raises UserError: it is neither here nor to be had."""
    name, known = profile.model.name, profile.model.name in GPT2
    try:
        return AutoConfig.from_pretrained(name, revision=profile.model.revision, local_files_only=known)
    except (OSError, ValueError) as error:
        if known:
            return GPT2Config()
        cure = f"connect, or run saelib fetch --profile {profile.name} first"
        raise UserError(f"the shape of {name} is not known here: {cure}") from error


def shape(profile: Profile) -> Shape:
    """Counted on the model without its weights. Raises UserError: see `config_of`."""
    config = config_of(profile)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    looked_up = [model.get_input_embeddings(), model.get_output_embeddings()]
    looked_up += [table for table in model.modules() if isinstance(table, torch.nn.Embedding)]
    matrices = {id(p): p.numel() for p in model.parameters() if p.dim() == 2}
    matrices = {key: size for key, size in matrices.items() if key not in {id(table.weight) for table in looked_up}}
    sizes = config.num_hidden_layers, config.num_attention_heads, config.hidden_size, config.vocab_size
    parameters = sum(p.numel() for p in model.parameters())
    return Shape(parameters, *sizes, sum(matrices.values()) // config.num_hidden_layers)


class Speed(NamedTuple):
    """Operations, or bytes, a second."""

    blocks: float
    """Of the transformer's blocks, as harvesting runs them."""
    step: float
    """Of an autoencoder's training step, by `scaling.flops`: its sparse part, Adam and all."""
    dense: float
    """Of a plain product of matrices."""
    copy: float
    """Bytes read and written."""


class Work(NamedTuple):
    """Operations by kind, bytes through memory, and seconds of the host."""

    blocks: float = 0
    step: float = 0
    dense: float = 0
    bytes: float = 0
    host: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*map(sum, zip(self, other, strict=True)))

    @property
    def flops(self) -> float:
        return self.blocks + self.step + self.dense

    def seconds(self, speed: Speed) -> float:
        return sum(part / rate for part, rate in zip(self[:4], speed, strict=True)) + self.host


class Cost(NamedTuple):
    """What chapters are made of, for one profile on one kind of device."""

    profile: Profile
    of: Shape
    device: str

    @property
    def at(self) -> int:
        """Blocks up to the hook."""
        parts = self.profile.hook.split(".")
        return int(parts[1]) + 1 if parts[0] == "blocks" else self.of.layers

    @property
    def trained(self) -> Recipe:
        """What chapter 06 trains."""
        return self.profile.recipe_of("chapter") if "chapter" in self.profile.saes else self.profile.recipe

    def latents(self, *names: str) -> list[int]:
        """Sizes of those of the SAEs that the profile has."""
        return [self.profile.recipe_of(name).n_latents for name in names if name in self.profile.saes]

    def read(self, tokens: float, blocks: int | None = None, logits: bool = True, calls: float = 0) -> Work:
        """The model run on tokens: all of it, or some blocks; in the given number of calls, or as few as possible."""
        blocks = self.of.layers if blocks is None else blocks
        calls = calls or math.ceil(tokens / SUB_BATCH[self.device])
        vocab = tokens * self.of.vocab * logits
        return Work(
            blocks=tokens * blocks * self.of.per_token(self.profile.context_length),
            dense=2 * self.of.d_model * vocab, bytes=4 * PASSES * vocab, host=calls * blocks * CALL,
        )  # fmt: skip

    def code(self, tokens: float, *latents: int) -> Work:
        """Tokens encoded by SAEs of these sizes."""
        each = tokens * sum(latents)
        return Work(dense=2 * self.of.d_model * each, bytes=4 * PASSES * each)

    def splice(self, contexts: float, variants: int, *latents: int) -> Work:
        """`splice.downstream`: below the hook once, above it for every variant and for none."""
        tokens = contexts * self.profile.context_length
        below = self.read(tokens, self.at, False) + self.code(tokens, *latents)
        return below + self.read(tokens * (1 + variants), self.of.layers - self.at)

    def switch(self, contexts: float, parts: float, below: int | None = None) -> Work:
        """`sparsity.effects`: the blocks above the hook for a window, once for each part of each context."""
        above = self.of.layers - (self.at if below is None else below)
        rows = contexts * (1 + parts) * sparsity.WINDOW
        calls = max(rows * self.of.vocab / splice.LOGITS[self.device], contexts / 8)
        work = self.read(contexts * self.profile.context_length, logits=False) + self.read(rows, above, calls=calls)
        return work + Work(bytes=4 * PASSES * rows * self.of.vocab)  # medians

    def load(self, models: float) -> Work:
        """Models loaded, hooked and hashed."""
        return Work(host=models * (0.3 + 4 * self.of.parameters / LOADED))

    def fit(self, recipe: Recipe, tokens: float) -> Work:
        """An SAE trained on so many tokens, which the model reads for it (once for all epochs if they are kept)."""
        cached = self.profile.activations.cache and self.profile.activations.limit
        read = min(tokens, cached or tokens)
        ready = getattr(self.profile.text, "column", "text") == "input_ids"
        text = read / PACKED + (0 if ready else read / TOKENIZED / (cores() or 1))
        work = Work(step=tokens * flops(recipe.n_latents, recipe.k, self.of.d_model), host=text)
        return work + self.read(read, self.at, False)


# --- work, chapter by chapter -----------------------------------------------------------------------------------------


def _induction(c: Cost, p: Parameters) -> Work:
    few, text, trained = 128 * p["segment"], 32 * c.profile.induction_context, len(checkpoints(c.profile))
    others = min(trained, p["n_checkpoints"]) + bool(c.profile.model.second_seed) + bool(trained)
    tokens = 4 * text + 4 * p["n_sequences"] * p["segment"] + 24 * p["n_sequences"] + 128 * 32
    patched = c.of.layers * (19 + c.of.heads) + 8
    copied = 4 * c.of.layers * c.of.d_model**2 * (c.of.vocab + p["n_sequences"] * p["segment"])
    ablated = c.read(13 * few, logits=False) + c.read(patched * 64 * 19, calls=patched)
    return c.read(tokens + others * (2 * few + text)) + ablated + Work(dense=copied) + c.load(3 + others)


def _reconstruction(c: Cost, p: Parameters) -> Work:
    tokens, models = p["n_contexts"] * c.profile.context_length, 1 + len(c.latents("small-step-0"))
    saes = c.latents(*ALL, "small-step-0")
    ruled = Work(bytes=100 * 8 * tokens * c.of.d_model * len(saes))  # errors by many rules, in float64
    return c.read(tokens * models, c.at, False) + c.code(tokens, *saes) + ruled + c.load(models)


def _delta_loss(c: Cost, p: Parameters) -> Work:
    saes, tokens = c.latents(*ALL, "small-step-0"), p["n_few"] * c.profile.context_length
    split = 2 + len(range(11, c.profile.context_length - 1, 12))
    hosts = min(len(checkpoints(c.profile)), p["n_checkpoints"]) + bool(c.profile.model.second_seed)
    work = c.splice(p["n_contexts"], len(saes) + 3, *saes) + c.splice(p["n_few"], split, *saes[:1] * split)
    for layer in range(c.of.layers):
        work += c.read(tokens, layer, False) + c.read(tokens * 3, c.of.layers - layer)
    return work + c.splice(p["n_graft"] * hosts, 4, *saes[:2]) + c.load(1 + hosts)


def _checkpoints(c: Cost, p: Parameters) -> Work:
    saes, trained = c.latents(*ALL), len(checkpoints(c.profile))
    loaded = trained if trained <= p["scan_at_most"] else (len(saes) + 2) * (math.ceil(math.log2(trained)) + 3)
    tokens = p["n_contexts"] * c.profile.context_length
    losses = c.read(tokens * loaded, calls=loaded * p["n_contexts"] / 32)
    return c.splice(p["n_contexts"], len(saes) + 1, *saes) + losses + c.load(1 + loaded)


def _sparsity(c: Cost, p: Parameters) -> Work:
    saes, untrained, n, moved = c.latents(*ALL), len(c.latents("small-step-0")), p["n_contexts"], p["n_moved"]
    kinds = len(saes) + min(4, len(saes)) + 3 + 2 * untrained
    work = c.switch(n * kinds + moved * 21 + p["n_faces"], c.profile.recipe.k) + c.switch(2 * moved, 64)
    for layer in range(1, c.of.layers):
        work += c.switch(moved, c.profile.recipe.k, layer)
    return work + c.load(1 + untrained)


def _training(c: Cost, p: Parameters) -> Work:
    recipe, tokens = c.trained, p["n_contexts"] * c.profile.context_length
    judged = c.read(tokens, c.at, False) + c.code(tokens, *c.latents(*ALL), *[recipe.n_latents] * 6)
    return judged + c.fit(recipe, p["tokens"] + 2 * p["brief"]) + c.load(1)


def _scaling(c: Cost, p: Parameters) -> Work:
    live = c.fit(c.profile.recipe.model_copy(update={"n_latents": 256}), 250_000)
    return live + c.read(1024 * c.profile.context_length, c.at, False) + c.load(1) + Work(host=12)  # laws fitted anew


def _probes(c: Cost, p: Parameters) -> Work:
    hub = isinstance(c.profile.text, HuggingFace)
    tasks = [len(entry["tasks"]) for entry in probes.HUB] if hub else [sum(map(len, probes.TASKS.values()))]
    saes, untrained, drawn = c.latents(*ALL), len(c.latents("small-step-0")), c.latents("small")[:1]
    tokens = (p["n_train"] + p["n_test"]) * len(tasks) * c.profile.context_length
    everywhere = sum(drawn) + 2 * c.of.d_model  # features that no document lacks; of an SAE's, most documents lack most
    seldom = (len(saes) + 2 + untrained) * c.profile.context_length * c.profile.recipe.k / 3
    newton = Work(host=p["n_train"] * sum(tasks) * (everywhere + seldom) * 200 / 2e9)  # on the processor, float64
    read = c.read(tokens * (1 + untrained), c.at, False) + c.load(1 + untrained)
    return read + c.code(tokens, *saes, *drawn) + newton


def _n2g(c: Cost, p: Parameters) -> Work:
    small = c.latents("small")[:1]
    read = (p["n_train"] + 2 * p["n_test"] + p["n_loss"]) * c.profile.context_length
    texts = p["n_latents"] * (16 * 3 + 4 + 8 + 32 + 64) * 12  # examples; versions of each, some 8 tokens long
    return c.read(read + 8 * texts, c.at, False) + c.code(read + texts, *small) + c.splice(p["n_loss"], 8) + c.load(1)


def _atlas(c: Cost, p: Parameters) -> Work:
    tokens, saes = p["n_contexts"] * c.profile.context_length, c.latents("small", "large", "small-seed-1")
    pairs = 3 * sum(saes[:1]) * sum(saes[1:])
    partners = Work(dense=2 * c.of.d_model * pairs, host=48 * pairs / 4e9)  # compared by the processor
    lens = Work(dense=2 * c.of.d_model * c.of.vocab * 8192 * len(saes[:2]))
    switched = c.switch(p["n_live"] * 8 * 2, 1)
    return c.read(tokens, c.at, False) + c.code(tokens, *saes) + partners + lens + switched + c.load(1)


def _steering(c: Cost, p: Parameters) -> Work:
    context, saes = c.profile.context_length, c.latents("small", "small-seed-1")
    ways = 5 * (p["n_latents"] * (2.25 + len(saes[1:])) + 39)
    runs = c.read(ways * p["n_contexts"] * context, c.of.layers - c.at, calls=ways)
    studied = c.read(p["n_train"] * context, c.at, False) + c.code(p["n_train"] * context, *saes)
    return runs + studied + c.switch(p["n_latents"] * 8, 1) + c.load(1)


CHAPTERS: dict[str, Callable[[Cost, Parameters], Work]] = {
    "01": _induction, "02": _reconstruction, "03": _delta_loss, "04": _checkpoints, "05": _sparsity, "06": _training,
    "07": _scaling, "08": _probes, "09": _n2g, "10": _atlas, "11": _steering, "12": lambda c, p: Work(),
}  # fmt: skip


# --- memory -----------------------------------------------------------------------------------------------------------

Memory = dict[str, float]
"""Bytes, by what they hold."""


def sae_parameters(recipe: Recipe, d_model: int) -> int:
    """Two matrices, the pre-bias, and a bias per latent where there is one."""
    return 2 * recipe.n_latents * d_model + d_model + recipe.n_latents * recipe.latent_bias


def harvesting(c: Cost) -> Memory:
    """The model, float32, and what a block holds of the tokens that run together: of its MLP alone, 4 d some times."""
    widest = 28 * c.of.d_model + 3 * c.of.heads * c.profile.context_length
    return {"the model": 4 * c.of.parameters, "its blocks at work": 4 * SUB_BATCH[c.device] * widest}


def training(c: Cost, recipe: Recipe) -> Memory:
    """Of `train.fit`. Counted as if all latents were dead at once, when AuxK holds the most."""
    d, n, batch = c.of.d_model, recipe.n_latents, recipe.batch
    context, tile = c.profile.context_length, 4 * min(ops.PRODUCT, batch * n)
    rows = min(batch, ops.ROWS) if c.device == "cpu" else batch
    kept = len(range(context)[slice(*c.profile.activations.positions)])
    return harvesting(c) | {
        "weights, gradients, two moments, average": 5 * 4 * sae_parameters(recipe, d) + 8 * n,
        "weights in bfloat16": 2 * n * d * (recipe.precision == "bfloat16"),
        "two blocks of activations": 2 * c.profile.activations.block * (4 * kept * d + 16 * context),
        "vectors of a batch": batch * ((5 if c.device == "cpu" else 6) * 4 * d + 48 * recipe.k),
        "a tile of pre-activations": min(tile, 4 * rows * n),
        "dead latents": (2 * tile + 3 * 4 * n * d) * bool(recipe.k_aux),
    }


def chapter(c: Cost, number: str, p: Parameters) -> Memory:
    """Of a notebook, at its worst moment. Chapter 06's is when it trains, chapter 12 only reads numbers."""
    if number == "12":
        return {}
    context, d, v = c.profile.context_length, c.of.d_model, 4 * c.of.vocab
    own = {"01": (), "06": (), "07": (), "09": ("small",), "10": ("small", "large"), "11": ("small", "small-seed-1")}
    sources = len(probes.HUB) if isinstance(c.profile.text, HuggingFace) else 1
    contexts = {"02": 1, "06": 2}.get(number, 0) * p.get("n_contexts", 0) + (number == "11") * p.get("n_train", 0)
    contexts += (number == "08") * (p.get("n_train", 0) + p.get("n_test", 0)) * sources
    rows = {"01": max(32 * c.profile.induction_context, 128 * 32), "04": 32 * context}.get(number, 0)
    pieces = 4 * splice.LOGITS[c.device] if number in {"03", "04", "05", "09", "11"} else 0
    latents = c.latents(*own.get(number, ALL))
    found = training(c, c.trained) if number == "06" else harvesting(c)
    return found | {
        "autoencoders": 4 * 2 * d * sum(latents),
        "pre-activations": 2 * 4 * LATENTS * bool(latents),
        "activations": 4 * d * context * contexts,
        "logits": max(3 * v * rows, 4 * pieces),
    }
