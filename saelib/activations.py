"""Activations at the profile's hook, for training: `Streamed` from the model, or `Cached` in shards on disk.

Text is read in blocks of `activations.block` contexts. The tokens of a block are shuffled together, so a batch mixes
thousands of contexts. Batches are always full: what one block leaves over begins the next batch, over epochs too, and
every token of the text comes exactly once in an epoch.

With several processes each reads text of its own. Of a stream they take contexts in turn, each makes blocks of its
share, and what all of them see in an epoch is the text, once; of a cache they take shards in turn. So the order of the
data depends on how many there are. What one sees follows from the seed, its number and theirs.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from saelib import UserError
from saelib.models import fingerprint, load_tokenizer
from saelib.profile import BUILD, ROOT, Docstrings, Profile, text_fingerprint, write
from saelib.ranks import here, together
from saelib.text import token_batches

MODEL = threading.RLock()
"""Held by whoever runs a model: its hooks belong to it, not to a thread. Draw no batch while you hold it."""

SUB_BATCH = {"cpu": 2048, "mps": 2048, "cuda": 16384}
"""Tokens that run through the model together: few enough for the CPU's cache, enough to keep a GPU busy."""


def harvest(
    model: TransformerBridge,
    tokens: Int[Tensor, "batch context"],
    hook: str,
    positions: tuple[int, int | None] = (0, None),
) -> Float[Tensor, "tokens d_model"]:
    """Activations at a hook, float32, context after context; the layers above the hook are not run.

    Args:
        positions: first and one-past-last position kept of each context, counted as Python slices are.

    Raises:
        UserError: no such hook, a hook without one vector per token, no position selected, values that are not finite.
    """
    return torch.cat(list(_pieces(model, tokens, hook, positions)))


def _pieces(model, tokens: Tensor, hook: str, positions: tuple[int, int | None]) -> Iterator[Tensor]:
    """`harvest` in parts of `SUB_BATCH` tokens."""
    context = tokens.shape[1]
    if not range(context)[slice(*positions)]:
        raise UserError(f"activations.positions {list(positions)} selects none of {context} positions: try [0, null]")
    stop = layer_above(model, hook)
    device = next(model.parameters()).device
    for part in tokens.split(max(1, SUB_BATCH[device.type] // context)):
        with MODEL, torch.inference_mode():
            found = model.run_with_cache(part.to(device), names_filter=hook, stop_at_layer=stop)[1].cache_dict.get(hook)
        if found is None or found.dim() != 3 or found.shape[:2] != part.shape:
            shape = "nothing" if found is None else f"shape {list(found.shape)}"
            given = f"gives {shape} for {len(part)} contexts of {context} tokens, not a vector for each"
            raise UserError(f"hook {hook!r} {given}: name another, such as blocks.0.hook_resid_post")
        if not found.isfinite().all():
            raise UserError(f"activations at {hook} are not finite: check the model, or name another hook")
        yield found[:, slice(*positions)].flatten(0, 1).float()


def layer_above(model: TransformerBridge, hook: str) -> int | None:
    """The first layer that need not run for this hook, None where it is in no layer. Raises UserError: no such hook."""
    parts = hook.split(".")
    layer = int(parts[1]) if parts[0] == "blocks" and parts[1:] and parts[1].isdecimal() else None
    if hook in model.hook_dict:
        return None if layer is None else layer + 1
    prefix = "hook_" if layer is None else f"blocks.{layer}.hook_"
    there = [name for name in model.hook_dict if name.startswith(prefix)]
    known = ", ".join(there) or f"no such layer, they are 0 to {model.cfg.n_layers - 1}"
    raise UserError(f"the model has no hook {hook!r}; it has {known}")


# --- sources ----------------------------------------------------------------------------------------------------------


class Streamed:
    """Activations straight from the model, harvested again in every epoch, never on disk.

    Batch number i is a function of (seed, i, rank, size), bit for bit on a CPU. The next block is harvested in a
    background thread while the current one is used, so see `MODEL`.
    """

    dtype = torch.float32

    def __init__(self, profile: Profile, model: TransformerBridge, split: str = "train"):
        """Try hook and positions on one context. Raises UserError: they do not fit the model."""
        self.profile, self.model, self.split = profile, model, split
        self.hook, self.block = profile.hook, profile.activations.block
        self.device = next(model.parameters()).device
        one = torch.zeros(1, profile.context_length, dtype=torch.int64)
        self.per_context, self.d_model = harvest(model, one, self.hook, profile.activations.positions).shape
        # train text may hold the standard library's docstrings, which change with Python
        library = split == "train" and isinstance(profile.text, Docstrings) and profile.text.standard_library
        self.facts = {  # what the data follows from
            "model": fingerprint(model), "hook": self.hook, "text": text_fingerprint(profile), "split": split,
            "context": profile.context_length, "prepend_bos": profile.prepend_bos,
            "positions": profile.activations.positions, "block": self.block, "dtype": str(self.dtype),
            "python": sys.version_info[:2] if library else None,
        }  # fmt: skip

    @property
    def identity(self) -> str:
        """Start of a SHA-256 that changes when the data would."""
        return hashlib.sha256(json.dumps(self.facts).encode()).hexdigest()[:16]

    @property
    def memory(self) -> int:
        """Most bytes of activations and tokens held at a time: two float32 blocks (cached: four float16 ones).

        Streamed to several processes, each holds its share of that.
        """
        return 2 * self.block * (self.per_context * self.d_model * 4 + self.profile.context_length * 16)

    def batches(
        self, batch: int, seed: int, start: int = 0, rank: int = 0, size: int = 1
    ) -> Iterator[Float[Tensor, "part d_model"]]:
        """Full batches for ever, on the model's device, float32; number `start` first. Close it to end its thread.

        Of each batch, process `rank` of `size` gets the part that it shall train on.
        """
        part = batch // size
        blocks = _ahead(lambda stop: self._blocks(seed, start * part, stop, rank, size), self.device)
        with contextlib.closing(blocks):
            yield from _cut(blocks, part)

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_model"]:
        """Tokens out of four times as many (or of a whole block, if that is less)."""
        smaller = copy.copy(self)
        smaller.block = min(self.block, -(-4 * n // self.per_context))
        with contextlib.closing(smaller.batches(n, seed)) as batches:
            return next(batches)

    def _blocks(
        self, seed: int, skip: int, stop: threading.Event, rank: int, size: int
    ) -> Iterator[Float[Tensor, "tokens d_model"]]:
        """A process's shuffled blocks, epoch after epoch, without the first `skip` tokens."""
        for epoch in itertools.count():
            for number, contexts in enumerate(self._contexts(_mixed(seed, epoch), rank, size)):
                if stop.is_set():
                    return
                n = len(contexts) * self.per_context
                if skip < n:
                    yield self._harvested(contexts, _order(n, seed, epoch, number * size + rank), stop)[skip:]
                skip = max(0, skip - n)

    def _contexts(self, seed: int, rank: int = 0, size: int = 1) -> Iterator[Int[Tensor, "block context"]]:
        """Every `size`-th context in blocks; the last holds what is left. Raises UserError: there is no context."""
        rows = token_batches(self.profile, load_tokenizer(self.profile), self.split, batch=1, seed=seed)
        rows = itertools.islice(rows, rank, None, size)
        first = next(rows, None)
        if first is None:
            few = "a context" if size == 1 else f"{size} contexts, one for each process"
            raise UserError(f"the {self.split} text of {self.profile.name!r} is shorter than {few}: add text")
        rows = itertools.chain([first], rows)
        while block := list(itertools.islice(rows, -(-self.block // size))):
            yield torch.cat(block)

    def _harvested(self, contexts: Tensor, places: Int[Tensor, "tokens"], stop: threading.Event) -> Tensor:
        """Activations of one block, each put straight to its place, so that shuffling needs no copy."""
        block = torch.empty(len(places), self.d_model, dtype=self.dtype, device=self.device)
        at = 0
        for piece in _pieces(self.model, contexts, self.hook, self.profile.activations.positions):
            block[places[at : at + len(piece)].to(self.device)] = piece.to(self.dtype)
            at += len(piece)
            if stop.is_set():  # nobody will read it
                break
        return block


class Cached(Streamed):
    """Activations from shards on disk, one block each, float16 (relative error 2^-11), written once and read at random.

    A harvest that was cut off goes on with the shards that are not there; several processes take turns at them. Batches
    are float32 again.
    """

    dtype = torch.float16

    def __init__(
        self, profile: Profile, model: TransformerBridge, split: str = "train",
        folder: Path | None = None, tokens: int | None = None,
    ):  # fmt: skip
        """Open the cache, harvesting what it lacks.

        Args:
            folder: by default `_build/activations/<identity>`.
            tokens: how many at least, in whole shards; by default, and at most, all of the text.

        Raises:
            UserError: the folder holds other activations, or float16 cannot hold these.
        """
        super().__init__(profile, model, split)
        self.limit = None if tokens is None else -(-tokens // (self.block * self.per_context))
        self.facts["limit"] = self.limit
        self.folder = Path(folder or BUILD / "activations" / self.identity)
        self.shown = str(self.folder).replace(f"{ROOT}/", "")
        self.shards, there, complete = together([] if here()[0] else [self._manifest()])[0]
        if not complete:
            self._build(there)

    def _manifest(self) -> tuple[dict[str, dict], set[str], bool]:
        """Token count and SHA-256 of shards by name, which of them are there, and whether that is the whole cache."""
        path = self.folder / "manifest.json"
        if not path.is_file():
            return {}, set(), False
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            same, shards, complete = manifest["identity"] == self.identity, manifest["shards"], manifest["complete"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.shown}/manifest.json is damaged: delete the folder and harvest again") from error
        if not same:
            raise UserError(f"{self.shown} holds other activations than asked for: delete it, or name another folder")
        there = {name for name in shards if (self.folder / name).is_file()}
        return shards, there, complete and len(there) == len(shards)

    def _build(self, there: set[str]) -> None:
        """Write the shards that are missing, each process one at a time, and the manifest after each time."""
        rank, size = here()
        blocks = enumerate(itertools.islice(self._contexts(seed=0), self.limit))
        named = ((f"{number:06d}.safetensors", contexts) for number, contexts in blocks)
        missing = (entry for entry in named if entry[0] not in there)
        shown = {"disable": True} if rank else {}
        with tqdm(desc=f"harvest {self.hook}", unit="token", unit_scale=True, **shown) as bar:
            while turn := list(itertools.islice(missing, size)):
                written = together([(name, self._write_shard(name, block)) for name, block in turn[rank : rank + 1]])
                self.shards |= dict(written)
                self._write_manifest(complete=False)
                bar.update(sum(shard["tokens"] for _, shard in written))
        self._write_manifest(complete=True)

    def _write_shard(self, name: str, contexts: Int[Tensor, "block context"]) -> dict:
        n = len(contexts) * self.per_context
        block = self._harvested(contexts, torch.arange(n), threading.Event())
        if not block.isfinite().all():
            cure = "stream them (Streamed), or leave out the positions that do (activations.positions)"
            raise UserError(f"activations at {self.hook} exceed 65504, the most that float16 holds: {cure}")
        data = safetensors.torch.save({"activations": block.cpu()})
        write({self.folder / name: data})
        return {"tokens": n, "shape": list(block.shape), "sha256": hashlib.sha256(data).hexdigest()}

    def _write_manifest(self, complete: bool) -> None:
        if here()[0]:  # the first process writes it
            return
        manifest = {"identity": self.identity, **self.facts, "complete": complete, "shards": self.shards}
        write({self.folder / "manifest.json": (json.dumps(manifest, indent=1) + "\n").encode()})

    def _blocks(
        self, seed: int, skip: int, stop: threading.Event, rank: int, size: int
    ) -> Iterator[Float[Tensor, "tokens d_model"]]:
        names, dealt = sorted(self.shards), itertools.count()  # like cards, on into the next epoch
        for epoch in itertools.count():
            for number in _order(len(names), seed, epoch).tolist():
                if next(dealt) % size != rank:
                    continue
                n = self.shards[names[number]]["tokens"]
                if skip < n:
                    yield self._read(names[number])[_order(n, seed, epoch, number)][skip:].to(self.device)
                skip = max(0, skip - n)

    def _read(self, name: str) -> Float[Tensor, "tokens d_model"]:
        """One shard; its checksum is compared every time (in the background, at a GB/s)."""
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise UserError(f"shard {self.shown}/{name} is gone: start again, and it is harvested again") from error
        if hashlib.sha256(data).hexdigest() != self.shards[name]["sha256"]:
            raise UserError(f"shard {self.shown}/{name} is damaged: delete it and start again, it is harvested again")
        return safetensors.torch.load(data)["activations"]


def _mixed(*key: int) -> int:
    """A seed that follows from several numbers."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def _order(n: int, *key: int) -> Int[Tensor, "n"]:
    """A permutation that follows from several numbers."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(_mixed(*key)))


def _cut(blocks: Iterator[Tensor], batch: int) -> Iterator[Float[Tensor, "batch d_model"]]:
    """Full batches in float32 that share no memory with the blocks; no block is held while the next is awaited."""
    parts: list[Tensor] = []
    missing = batch
    for block in blocks:
        at = 0
        while at < len(block):
            parts.append(block[at : at + missing])
            at, missing = at + len(parts[-1]), missing - len(parts[-1])
            if not missing:
                yield torch.cat(parts).float()
                parts, missing = [], batch
        parts = [part.clone() for part in parts]
        del block


def _ahead(make: Callable[[threading.Event], Iterator[Tensor]], device: torch.device) -> Iterator[Tensor]:
    """The endless iterator `make(stop)`, run one item ahead in a thread (on CUDA in a stream of its own)."""
    stop = threading.Event()
    items = make(stop)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def step() -> Tensor:
        with torch.cuda.stream(side):  # None leaves everything as it is
            item = next(items)
        if side is not None:
            side.synchronize()
        return item

    with ThreadPoolExecutor(1, "harvest") as pool:
        try:
            future = pool.submit(step)
            while True:
                item = future.result()
                if side is not None:  # its memory was taken in the other stream and is used in this one
                    item.record_stream(torch.cuda.current_stream(device))
                future = pool.submit(step)  # only now, when the item before is let go: two at a time
                yield item
        finally:
            stop.set()
