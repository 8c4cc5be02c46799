"""The sparse operations as Triton kernels, for NVIDIA GPUs; `ops.py` chooses them by `usable`.

What all of them rely on:

- float32 sums in an order that follows from the shapes alone: no atomics, no autotuning, so a run repeats its bits.
- Block sizes are constants, not tuned. The product's take, as compiled for d_model divisible by 16, 64 KiB of shared
  memory where cards have 99 (compute capability 8.6, 8.9, 12.0), 96 of 163 on 8.0, 128 of 227 on 9.0 and 10.0.
- Rows are addressed in 64 bits: a batch times k times d_model passes 2^31.

`TRITON_INTERPRET=1`, set before Triton is imported, runs them on a CPU, slowly; with `SAELIB_NATIVE=triton`, `ops.py`
then uses them there. So do the tests. `SAELIB_NATIVE=0` switches them off.
"""

from __future__ import annotations

import functools
import math
import os

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch's builds for GPUs, not with those for CPUs or macOS
    triton = None

jit = (lambda kernel: kernel) if triton is None else triton.jit

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COLUMNS = 256
"""Of a row, at most so many belong to a program. Neighbouring programs do the same columns of other rows, whose part of
a matrix (n = 32,768: 32 MiB) the cache of a large GPU can hold."""
PAIRS = 8
"""Rows that a program fetches at once, to have several loads under way."""
SEGMENT = 512
"""Pairs that one program adds up. A latent with more has several programs, whose sums are then added in their order."""
CHUNK = 32
"""Neighbouring latents of which the product keeps only the largest few."""
CANDIDATES = 2**26
"""Of those few, over all rows: so many are held at a time (5 bytes each, 320 MiB)."""
WIDEST = 8192  # columns of a row that `update` and `across` hold whole

TILE = {"ROWS": 128, "LATENTS": 128, "GROUP": 8}
"""Of the encoder's product, what one program computes, and how many tiles of rows take turns."""
DEPTH = 128
"""Bytes of d_model that it takes in at a time."""


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these floats: contiguous, on a GPU that can (Ampere or later), nothing to differentiate.

    With `SAELIB_NATIVE=triton` in place of a GPU's tensors the CPU's, for the interpreter.
    """
    chosen = os.environ.get("SAELIB_NATIVE")
    if triton is None or chosen == "0" or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return False
    device = tensors[0].device
    fits = all(x.device == device and x.dtype in FLOATS and x.is_contiguous() for x in tensors)
    if chosen == "triton" or device.type != "cuda":
        return fits and chosen == "triton" and device.type == "cpu"
    return fits and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _stages(device: torch.device) -> int:
    """Tiles of the product's factors (32 KiB together) that are on their way to shared memory at the same time."""
    if device.type == "cpu":
        return 1
    with torch.cuda.device(device):
        properties = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    return 4 if properties["max_shared_mem"] >= 160 * 1024 else 3


def _launch(kernel, grid: tuple[int, ...], *arguments, warps: int = 4, **constants) -> None:
    """Run a kernel where its first argument lives, in PyTorch's current stream."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, num_warps=warps, **constants)


def _columns(d_model: int) -> tuple[int, int]:
    """Columns of a program, and how many programs make a row."""
    return (block := min(COLUMNS, triton.next_power_of_2(d_model))), triton.cdiv(d_model, block)


@jit
def _decode(values, indices, weight, out, k, d, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """One token, BLOCK columns: the weighted sum of its k rows, PAIRS of them at a time.

    Reads k rows of `weight` per token (B k d numbers, what the cache does not hold), writes B d.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, k, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        value = tl.load(values + token * k + pair, mask=pair < k, other=0.0).to(tl.float32)
        row = tl.load(indices + token * k + pair, mask=pair < k, other=0)
        there = (pair < k)[:, None] & (column < d)[None, :]
        rows = tl.load(weight + row[:, None] * d + column[None, :], mask=there, other=0.0)
        total += tl.sum(value[:, None] * rows.to(tl.float32), axis=0)
    tl.store(out + token * d + column, total, mask=column < d)


def decode(
    values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"], W_dec: Float[Tensor, "n d_model"]
) -> Float[Tensor, "batch d_model"]:
    """`ops.decode`, in the dtype of `W_dec`; sums are float32."""
    (batch, k), d = values.shape, W_dec.shape[1]
    out, (block, parts) = W_dec.new_empty(batch, d), _columns(d)
    _launch(_decode, (batch, parts), values, indices, W_dec, out, k, d, PAIRS=PAIRS, BLOCK=block)
    return out


@jit
def _latent(z, indices, g, weight, out, tokens, k, d, SETS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """One token, PAIRS of its latents: the gradients of their pre-activations, summed over the sets.

    row . (sum of g over the sets where the latent is active): each of the k rows of `weight` is read once (B k d
    numbers), whatever the number of sets, and g comes from the cache but for the first program of a token.
    """
    token = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    row, total = tl.load(indices + token * k + pair, mask=pair < k, other=0), tl.zeros((PAIRS,), tl.float32)
    for first in range(0, d, BLOCK):
        column = first + tl.arange(0, BLOCK)
        wanted = tl.zeros((PAIRS, BLOCK), tl.float32)
        for number in tl.static_range(SETS):
            at = number * tokens + token
            active = tl.load(z + at * k + pair, mask=pair < k, other=0.0) > 0
            gradient = tl.load(g + at * d + column, mask=column < d, other=0.0)
            wanted += tl.where(active, 1.0, 0.0)[:, None] * gradient[None, :]
        there = (pair < k)[:, None] & (column < d)[None, :]
        total += tl.sum(wanted * tl.load(weight + row[:, None] * d + column[None, :], mask=there, other=0.0), axis=1)
    tl.store(out + token * k + pair, total, mask=pair < k)


@jit
def _segments(
    latents, places, starts, order, z, d_pre, g, x, to_dec, to_enc, to_latent, more_dec, more_enc, more_latent,
    tokens, k, n, d, SETS: tl.constexpr, SEGMENT: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One segment of one latent, BLOCK columns: sums over at most SEGMENT of its pairs, in the order they are sorted.

    Its first segment goes to the gradients (zeros where the latent never fired), further ones to `more_*`. Reads a row
    of x and one of g for every pair and set (B k d (1 + sets) numbers, most from the cache: B times BLOCK of each
    matter at a time), writes each gradient once (2 n d).
    """
    program = tl.program_id(0).to(tl.int64)
    latent, place = tl.load(latents + program), tl.load(places + program)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(starts + latent) + place * SEGMENT
    last = tl.minimum(first + SEGMENT, tl.load(starts + latent + 1))
    dec, enc = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((PAIRS,), tl.float32)
    for start in range(0, last - first, PAIRS):
        at = first + start + tl.arange(0, PAIRS)
        pair = tl.load(order + at, mask=at < last, other=0)
        token = pair // k
        there = (at < last)[:, None] & (column < d)[None, :]
        weight = tl.load(d_pre + pair, mask=at < last, other=0.0)
        rows = tl.load(x + token[:, None] * d + column[None, :], mask=there, other=0.0)
        enc += tl.sum(weight[:, None] * rows, axis=0)
        sums += weight
        for number in tl.static_range(SETS):
            shift = number * (program * 0 + tokens)  # in 64 bits; compiled, a 1 given for `tokens` has no `to`
            weight = tl.load(z + shift * k + pair, mask=at < last, other=0.0)
            rows = tl.load(g + (shift + token)[:, None] * d + column[None, :], mask=there, other=0.0)
            dec += tl.sum(weight[:, None] * rows, axis=0)
    own, more = (column < d) & (program < n), (column < d) & (program >= n)
    tl.store(to_dec + latent * d + column, dec, mask=own)
    tl.store(to_enc + latent * d + column, enc, mask=own)
    tl.store(more_dec + (program - n) * d + column, dec, mask=more)
    tl.store(more_enc + (program - n) * d + column, enc, mask=more)
    once = tl.program_id(1) == 0
    tl.store(to_latent + latent, tl.sum(sums), mask=once & (program < n))
    tl.store(more_latent + program - n, tl.sum(sums), mask=once & (program >= n))


@jit
def _join(
    latents, places, starts, to_dec, to_enc, to_latent, more_dec, more_enc, more_latent, n, d, SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a latent that has several segments: adds the further ones, in their order.

    There is a program for every further segment; that of a latent's second does the work. Reads what was written to
    `more_*`: at most 1 / SEGMENT of what `_segments` reads.
    """
    program = tl.program_id(0).to(tl.int64)
    latent = tl.load(latents + n + program)
    second = (tl.load(places + n + program) == 1) & (latent < n)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pairs = tl.load(starts + latent + 1) - tl.load(starts + latent)
    further, mask = tl.where(second, (pairs - 1) // SEGMENT, 0), (column < d) & second
    dec = tl.load(to_dec + latent * d + column, mask=mask, other=0.0)
    enc = tl.load(to_enc + latent * d + column, mask=mask, other=0.0)
    total = tl.load(to_latent + latent, mask=second, other=0.0)
    for number in range(0, further):
        at = program + number
        dec += tl.load(more_dec + at * d + column, mask=mask, other=0.0)
        enc += tl.load(more_enc + at * d + column, mask=mask, other=0.0)
        total += tl.load(more_latent + at)
    tl.store(to_dec + latent * d + column, dec, mask=mask)
    tl.store(to_enc + latent * d + column, enc, mask=mask)
    tl.store(to_latent + latent, total, mask=second & (tl.program_id(1) == 0))


def _work(starts: Int[Tensor, "n+2"], pairs: int) -> tuple[Int[Tensor, "work"], Int[Tensor, "work"]]:
    """Latent and segment number of every program: each latent's first segment, then the further ones.

    There is room for as many further ones as there can be, so that nobody waits for the GPU to count them; those that
    are not there belong to latent n, which has no pairs.
    """
    n, device = len(starts) - 2, starts.device
    ends = (starts.diff()[:n] - 1).div(SEGMENT, rounding_mode="floor").clamp_min_(0).cumsum(0)
    number = torch.arange(pairs // SEGMENT, device=device)
    owner = torch.searchsorted(ends, number, right=True)
    place = number - torch.nn.functional.pad(ends, (1, 0))[owner] + 1
    return torch.cat([torch.arange(n, device=device), owner]), torch.cat([torch.zeros_like(ends), place])


def gradients(
    indices: Int[Tensor, "batch k"], latents: Int[Tensor, "pairs"], order: Int[Tensor, "pairs"],
    z: Float[Tensor, "sets batch k"], g: Float[Tensor, "sets batch d_model"], x: Float[Tensor, "batch d_model"],
    W_dec: Float[Tensor, "n d_model"], to_dec: Float[Tensor, "n d_model"], to_enc: Float[Tensor, "n d_model"],
) -> Float[Tensor, "n"]:  # fmt: skip
    """`ops.gradients`, from the flat indices in rising order (`latents`) and where each was (`order`)."""
    (sets, batch, k), (n, d) = z.shape, W_dec.shape
    d_pre, (block, parts) = x.new_empty(batch, k), _columns(d)
    sizes = {"SETS": sets, "PAIRS": PAIRS, "BLOCK": block}
    _launch(_latent, (batch, triton.cdiv(k, PAIRS)), z, indices, g, W_dec, d_pre, batch, k, d, **sizes)
    starts = torch.searchsorted(latents, torch.arange(n + 2, dtype=latents.dtype, device=latents.device))
    work, further = _work(starts, batch * k), batch * k // SEGMENT
    found = to_dec, to_enc, x.new_empty(n)
    more = x.new_empty(further, d), x.new_empty(further, d), x.new_empty(further)
    given = (*work, starts, order, z, d_pre, g, x, *found, *more, batch, k, n, d)
    _launch(_segments, (n + further, parts), *given, SEGMENT=SEGMENT, **sizes)
    _launch(_join, (further, parts), *work, starts, *found, *more, n, d, SEGMENT=SEGMENT, BLOCK=block)
    return found[2]


@jit
def _encode(
    x, weight, bias, keys, places, rows, n, d, chunks, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    KEPT: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of x W^T + bias, of which the KEPT largest of every CHUNK latents are written, largest first.

    A value is written as the int32 that sorts as it does, above all others where it is not a number; the least int32
    stands for none. Programs run down GROUP tiles of rows before they go on to the next latents, so that factors are in
    the cache. Reads B d + n d numbers (more as the cache is smaller), writes 5 KEPT / CHUNK bytes instead of 4 for each
    pre-activation.
    """
    least: tl.constexpr = -(2**31)
    program, wide = tl.program_id(0), tl.cdiv(n, LATENTS)
    group = program // (GROUP * wide)
    high = tl.minimum(tl.cdiv(rows, ROWS) - group * GROUP, GROUP)
    row = (group * GROUP + program % (GROUP * wide) % high).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = program % (GROUP * wide) // high
    latent = part.to(tl.int64) * LATENTS + tl.arange(0, LATENTS)
    depth = tl.arange(0, DEPTH)
    left, right = x + row[:, None] * d + depth[None, :], weight + latent[None, :] * d + depth[:, None]
    pre = tl.zeros((ROWS, LATENTS), tl.float32)
    for first in range(0, d, DEPTH):
        a = tl.load(left, mask=(row < rows)[:, None] & (first + depth < d)[None, :], other=0.0)
        b = tl.load(right, mask=(latent < n)[None, :] & (first + depth < d)[:, None], other=0.0)
        pre = tl.dot(a, b, pre, input_precision=PRECISION)
        left, right = left + DEPTH, right + DEPTH
    if BIASED:
        pre += tl.load(bias + latent, mask=latent < n, other=0.0).to(tl.float32)[None, :]
    bits = tl.where(pre == pre, pre.to(tl.int32, bitcast=True), 0x7FC00000)
    key = tl.where((latent < n)[None, :], bits ^ ((bits >> 31) & 0x7FFFFFFF), least)
    key = tl.reshape(key, (ROWS, LATENTS // CHUNK, CHUNK))
    inner = tl.arange(0, CHUNK)[None, None, :]
    chunk = part * (LATENTS // CHUNK) + tl.arange(0, LATENTS // CHUNK)
    there = (row < rows)[:, None] & (chunk < chunks)[None, :]
    for slot in tl.static_range(KEPT):
        best = tl.max(key, axis=2)
        place = tl.min(tl.where(key == best[:, :, None], inner, CHUNK), axis=2)
        key = tl.where(inner == place[:, :, None], least, key)
        at = (row * KEPT + slot)[:, None] * chunks + chunk[None, :]
        tl.store(keys + at, best, mask=there)
        tl.store(places + at, place.to(tl.uint8), mask=there)


def kept(k: int, n: int) -> int | None:
    """How many of a chunk to keep so that, were the k largest spread at random, fewer than one row in a thousand had
    more of them in one chunk (an upper bound: chunks times the binomial tail's first term). None: k is too wide."""
    chunks = math.ceil(n / CHUNK)
    fits = (m for m in range(1, 9) if k <= chunks and k**m < chunks ** (m - 1) * math.factorial(m) / 1000)
    return next(fits, None)


def encode_topk(
    x: Float[Tensor, "batch d_model"], weight: Shaped[Tensor, "n d_model"], bias: Float[Tensor, "n"] | None, k: int
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"], Bool[Tensor, "batch"]] | None:
    """The k largest of each row of x W^T + bias, largest first, their latents, and which rows are in doubt.

    Factors have the dtype of `weight`; float32 ones are multiplied as three products of tf32, which keep float32's
    accuracy, or as one where PyTorch (2.9 or later) is allowed to. None where k is too wide for chunks to be of use.

    Exact but for rows in doubt. Let t be the k-th largest of the values kept. What a chunk hides is not larger than the
    least that it kept. So where no chunk's least is larger than t, nothing hidden is: no k values of the row are larger
    than these. A row with such a chunk is in doubt, and the caller computes it again. Of the chunks, only the k with
    the largest maxima need be looked at (see `ops.topk`).
    """
    if (some := kept(k, len(weight))) is None:
        return None
    rows = max(TILE["ROWS"], CANDIDATES // (some * triton.cdiv(len(weight), CHUNK)))
    x = x.to(weight.dtype)
    if x.device.type == "cpu":  # the interpreter would multiply the bits of bfloat16 as if they were integers
        x, weight = x.float(), weight.float()
    found = [_encode_rows(part, weight, bias, k, some) for part in x.split(rows)]
    return tuple(torch.cat(kind) for kind in zip(*found, strict=True))


def _encode_rows(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, some: int) -> tuple[Tensor, Tensor, Tensor]:
    (rows, d), n = x.shape, len(weight)
    chunks = triton.cdiv(n, CHUNK)
    precision = "tf32" if getattr(torch.backends.cuda.matmul, "fp32_precision", "") == "tf32" else "tf32x3"
    keys = torch.empty(rows, some, chunks, dtype=torch.int32, device=x.device)
    places = torch.empty_like(keys, dtype=torch.uint8)
    _launch(
        _encode, (triton.cdiv(rows, TILE["ROWS"]) * triton.cdiv(n, TILE["LATENTS"]),),
        x, weight, weight if bias is None else bias, keys, places, rows, n, d, chunks, BIASED=bias is not None,
        PRECISION=precision, KEPT=some, CHUNK=CHUNK, DEPTH=DEPTH // weight.element_size(), **TILE, warps=8,
        num_stages=_stages(x.device),
    )  # fmt: skip
    chunk = keys[:, 0].topk(k, sorted=False).indices
    everywhere = chunk[:, None].expand(-1, some, -1)
    top, at = keys.gather(2, everywhere).flatten(1).topk(k)
    place = places.gather(2, everywhere).flatten(1).gather(1, at)
    values = (top ^ ((top >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values, chunk.gather(1, at % k) * CHUNK + place, (keys[:, -1] > top[:, -1:]).any(1)


@jit
def _update(
    w, g, m, v, a, size, columns, rate, rest1, rest2, eps, root, scale, rest, PROJECT: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: projection, Adam, unit norm, average. Reads 5 rows and writes 4: 9 n d numbers."""
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * columns + column
    mask = (column < columns) & (at < size)
    weight, gradient = tl.load(w + at, mask=mask, other=0.0), tl.load(g + at, mask=mask, other=0.0)
    first, second = tl.load(m + at, mask=mask, other=0.0), tl.load(v + at, mask=mask, other=0.0)
    average = tl.load(a + at, mask=mask, other=0.0)
    if PROJECT:
        gradient -= tl.sum(gradient * weight) / tl.sum(weight * weight) * weight
    gradient *= scale
    first += rest1 * (gradient - first)
    second += rest2 * (gradient * gradient - second)
    weight -= rate * first / (tl.sqrt(second) * root + eps)
    if UNIT:
        weight /= tl.sqrt(tl.sum(weight * weight))
    tl.store(w + at, weight, mask=mask)
    tl.store(m + at, first, mask=mask)
    tl.store(v + at, second, mask=mask)
    tl.store(a + at, average + rest * (weight - average), mask=mask)


def update(tensors: list[Float[Tensor, "n d_model"]], numbers: list[float], project: bool, unit: bool) -> bool:
    """`ops.update` of one parameter; False where its rows are too wide. Without rows to look at, it is cut anywhere."""
    size, columns = tensors[0].numel(), tensors[0].shape[1] if project or unit else 1024
    if columns > WIDEST:
        return False
    rate, beta1, beta2, *others, ema = numbers
    given = (*tensors, size, columns, rate, 1 - beta1, 1 - beta2, *others, 1 - ema)
    _launch(_update, (triton.cdiv(size, columns),), *given, PROJECT=project, UNIT=unit, **_whole(columns))
    return True


def _whole(columns: int) -> dict[str, int]:
    """A block for a whole row, with a warp for every 256 of its columns (between 4 and 16)."""
    return {"BLOCK": (block := triton.next_power_of_2(columns)), "warps": min(16, max(4, block // 256))}


@jit
def _across(g, w, out, columns, BLOCK: tl.constexpr):
    """One row: the squared norm of g without its part along w. Reads 2 n d numbers, writes n."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    gradient = tl.load(g + row * columns + column, mask=column < columns, other=0.0)
    weight = tl.load(w + row * columns + column, mask=column < columns, other=0.0)
    along = tl.sum(gradient * weight)
    tl.store(out + row, tl.sum(gradient * gradient) - along * along / tl.sum(weight * weight))


def across(gradient: Float[Tensor, "n d_model"], weight: Float[Tensor, "n d_model"]) -> Float[Tensor, "n"] | None:
    """`ops.across`, or None where rows are too wide."""
    n, columns = gradient.shape
    if columns > WIDEST:
        return None
    squares = gradient.new_empty(n)
    _launch(_across, (n,), gradient, weight, squares, columns, **_whole(columns))
    return squares
