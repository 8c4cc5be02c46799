"""The sparse operations of a TopK autoencoder, fast and exact.

Only the pre-activations are a dense product. Everything else touches k rows per token: the decoder's sum, the gradients
of the latents and of both matrices. Each operation has its slow, obvious form in `tests/test_ops.py`. All are plain
PyTorch; most have compiled forms as well, for CPUs in `native.py`, for GPUs in `kernels_triton.py`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import embedding_bag

from saelib import kernels_triton, native

CHUNK = 32
"""Neighbouring values whose maximum stands for them in the first stage of `topk`."""
TILE = 2**20
"""Floats of a gradient that are computed at once: they stay in cache, and their memory is used again."""
PRODUCT = 2**28
"""Pre-activations that are held at a time: 1 GiB, where the paper's batch of 131,072 tokens would make 64."""
ROWS = 1024
"""Rows of them that a CPU makes at a time. Top-k finds some of few rows in cache; the product wants many."""


def topk(x: Float[Tensor, "*batch n"], k: int) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """The k largest values of each row, largest first, and where they are: what `torch.topk` finds, sooner.

    Exact, in stages: of the chunks of a row, only the k with the largest maxima can hold one of the k largest values.
    (If another chunk held one, each of those k chunks would hold a value at least as large.) Among equal values any may
    be chosen, as with `torch.topk`.
    """
    rows = x.reshape(-1, x.shape[-1])
    values, indices, *_ = rows.topk(k) if x.is_cuda else native.topk(rows, k) or _staged(rows, k)
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


def _staged(x: Float[Tensor, "rows n"], k: int, sort: bool = True) -> tuple[Tensor, Tensor]:
    rows, n = x.shape
    if n % CHUNK == 0 and n >= 4 * CHUNK * k:  # contiguous chunks: slower maxima, but whole chunks are fetched
        chunks = n // CHUNK
        best = _staged(x.view(rows, chunks, CHUNK).amax(-1), k, False)[1]
        start = torch.arange(0, rows * chunks, chunks, device=x.device)[:, None]
        candidates = x.view(-1, CHUNK).index_select(0, (start + best).view(-1)).view(rows, k * CHUNK)
        values, place = _staged(candidates, k, sort)
        return values, best.gather(1, place // CHUNK) * CHUNK + place % CHUNK
    if n % 4 == 0 and n >= 16 * k:  # strided chunks {i, i + n/4, ...}: fast maxima, values fetched one by one
        best = x.view(rows, 4, n // 4).amax(1).topk(k, sorted=False).indices
        places = torch.cat([best + i * (n // 4) for i in range(4)], dim=1)
        values, place = x.gather(1, places).topk(k, sorted=sort)
        return values, places.gather(1, place)
    return x.topk(k, sorted=sort)


Chosen = tuple[Float[Tensor, "rows most"], Int[Tensor, "rows most"]]
"""Positive values and where they are, in no order; what is missing at the end of a row is 0, at place 0."""


def topk_and_largest(
    x: Float[Tensor, "rows n"], k: int, columns: Int[Tensor, "m"], most: int, to: Float[Tensor, "rows m"] | Chosen
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """`topk`, and `largest` of some columns of x into `to`. Compiled, both look at a row while it is in cache."""
    found = native.topk(x, k, columns, most, to)
    if found is None:
        largest(x.index_select(1, columns), most, to)
    return found or topk(x, k)


def largest(x: Float[Tensor, "rows m"], most: int, to: Float[Tensor, "rows m"] | Chosen) -> None:
    """The `most` largest positive values of each row, into a tensor that is 0 elsewhere, or into two by `Chosen`."""
    if native.topk(x, 0, torch.arange(x.shape[1]), most, to) is not None:
        return
    values, indices = x.relu_().topk(min(most, x.shape[1]))
    if isinstance(to, Tensor):
        to.zero_().scatter_(1, indices, values)
    else:
        for found, whole in ((values, to[0]), (indices.masked_fill_(values <= 0, 0), to[1])):
            whole.zero_()[:, : found.shape[1]] = found


def tiles(rows: int, n: int, most: int | None = None) -> list[slice]:
    """Runs of rows, at most `most`, whose pre-activations, n each, are at most `PRODUCT` floats."""
    size = max(1, min(PRODUCT // n, most or rows))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class Memory(dict):
    """Tensors by use, kept from step to step. Fresh ones of their size cost page faults every time."""

    def __call__(self, use: str, *shape: int) -> Float[Tensor, "*shape"]:
        """Memory for a use, which grows when it must; what is in it is left from before."""
        size = math.prod(shape)
        if use not in self or self[use].numel() < size:
            self[use] = self["like"].new_empty(size)
        return self[use][:size].view(shape)


def some(weight: Shaped[Tensor, "n d_model"], which: Int[Tensor, "m"]) -> Shaped[Tensor, "m_or_more d_model"]:
    """Rows of a matrix, and zeros up to a multiple of 8: a product whose rows are aligned takes a quarter less."""
    found = weight.new_zeros(-(-len(which) // 8) * 8, weight.shape[1])
    torch.index_select(weight, 0, which, out=found[: len(which)])
    return found


class Encoder(NamedTuple):
    """What makes pre-activations of inputs, and the memory to write them to."""

    weight: Shaped[Tensor, "n d_model"]
    """Its dtype is that of the product's factors, float32 or bfloat16; sums are float32."""
    bias: Float[Tensor, "n"] | None = None
    memory: Memory | None = None

    def __call__(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows n"]:
        """x W^T + bias."""
        out = None if self.memory is None else self.memory("pre", len(x), len(self.weight))
        x, weight = x.to(self.weight.dtype), self.weight
        if x.dtype != torch.bfloat16:
            pre = torch.mm(x, weight.T, out=out)
        elif x.is_cuda:
            pre = torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
        else:  # a CPU's product of bfloat16 would round the sums, too
            pre = torch.mm(x.float(), weight.float().T, out=out)
        return pre if self.bias is None else pre.add_(self.bias)

    def rows(self, which: Int[Tensor, "m"]) -> Encoder:
        """The same for some of the latents, and those of `some`."""
        bias = None if self.bias is None else some(self.bias[:, None], which)[:, 0]
        return Encoder(some(self.weight, which), bias, self.memory)


def encode(
    x: Float[Tensor, "batch d_model"], encoder: Encoder, k: int, columns: Int[Tensor, "m"], most: int,
    to: Float[Tensor, "batch m"] | Chosen | None = None,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"], bool]:  # fmt: skip
    """`topk_and_largest` of the pre-activations, never holding more than `PRODUCT` of them, or some rows per thread.

    Without `to`, and where one kernel chooses while it multiplies, the columns are not looked at; the last value says
    whether they were.
    """
    parts = tiles(len(x), len(encoder.weight), None if x.is_cuda else ROWS)
    if kernels_triton.usable(x, encoder.weight) and (
        found := kernels_triton.encode_topk(x, encoder.weight, encoder.bias, k)
    ):
        values, indices, doubt = found
        for rows in doubt.nonzero()[:, 0].split(parts[0].stop):
            values[rows], indices[rows] = topk(encoder(x[rows]), k)
        return values, indices, False
    room = {} if encoder.memory is None else {"room": functools.partial(encoder.memory, "panels")}
    if found := native.encode(x, encoder.weight, encoder.bias, k, **room):
        return *found, False
    values, indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for part in parts:
        pre = encoder(x[part])
        into = to[part] if isinstance(to, Tensor) else to and tuple(whole[part] for whole in to)
        found = topk(pre, k) if to is None else topk_and_largest(pre, k, columns, most, into)
        values[part], indices[part] = found
    return values, indices, to is not None


def decode(
    values: Float[Tensor, "*batch k"], indices: Int[Tensor, "*batch k"], W_dec: Float[Tensor, "n d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """Sum of rows of `W_dec`, weighted: what `dense_latents @ W_dec` gives."""
    k, shape = values.shape[-1], (*values.shape[:-1], W_dec.shape[1])
    weights, rows = values.to(W_dec.dtype).reshape(-1, k), indices.reshape(-1, k)
    if kernels_triton.usable(weights, W_dec):
        return kernels_triton.decode(weights, rows.contiguous(), W_dec).view(shape)
    return embedding_bag(rows, W_dec, mode="sum", per_sample_weights=weights).view(shape)


def residuals(
    x: Float[Tensor, "batch d_model"], z: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "n d_model"],
) -> Float[Tensor, "batch d_model"]:  # fmt: skip
    """What `decode` leaves of x."""
    found = native.residuals(x, z, indices, W_dec)
    return x - decode(z, indices, W_dec) if found is None else found


def gradients(
    indices: Int[Tensor, "batch k"], z: Float[Tensor, "sets batch k"], g: Float[Tensor, "sets batch d_model"],
    factors: Float[Tensor, "sets batch"], x: Float[Tensor, "batch d_model"], W_dec: Float[Tensor, "n d_model"],
    to_dec: Float[Tensor, "n d_model"], to_enc: Float[Tensor, "n d_model"],
) -> Float[Tensor, "n"]:  # fmt: skip
    """Gradients of both matrices, into `to_dec` and `to_enc`, and of the pre-activations summed over the batch.

    For each set, `decode(z, indices, W_dec)` has the gradient g, each row times its factor, and z is the ReLU of
    W_enc x where it is not 0. The (token, latent) pairs are sorted by latent, so that each row is one sum.
    """
    k, n = indices.shape[1], len(W_dec)
    by_triton, d_latent = kernels_triton.usable(z, g, x, W_dec, to_dec, to_enc), x.new_zeros(n)
    starts, order = (not by_triton and native.sorted_pairs(indices, n)) or (None, None)
    if starts is not None and native.gradients(starts, order, z, g, factors, x, W_dec, to_dec, to_enc, d_latent):
        return d_latent
    g = g * factors[..., None]
    if starts is None:
        latents, order = indices.reshape(-1).to(torch.int32).sort(stable=True)
        if by_triton:
            return kernels_triton.gradients(indices.contiguous(), latents, order, z, g, x, W_dec, to_dec, to_enc)
        starts = torch.searchsorted(latents, torch.arange(n + 1, dtype=torch.int32, device=x.device))
    d_pre = sum(_latent_gradient(grad, indices, W_dec) * (active > 0) for active, grad in zip(z, g, strict=True))
    d_latent.index_add_(0, indices.reshape(-1), d_pre.reshape(-1))
    for tile in torch.arange(n).split(max(1, TILE // W_dec.shape[1])):
        first, last = int(tile[0]), int(tile[-1]) + 1
        pairs = order[starts[first] : starts[last]]
        bags = starts[first:last] - starts[first]
        rows = [
            _weighted_sums(grad, pairs // k, bags, active.reshape(-1)[pairs]) for active, grad in zip(z, g, strict=True)
        ]
        to_dec[first:last] = sum(rows)
        to_enc[first:last] = _weighted_sums(x, pairs // k, bags, d_pre.reshape(-1)[pairs])
    return d_latent


def _weighted_sums(source: Tensor, rows: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    return embedding_bag(rows, source, bags, mode="sum", per_sample_weights=weights)


def _latent_gradient(g: Tensor, indices: Int[Tensor, "batch k"], W_dec: Tensor) -> Float[Tensor, "batch k"]:
    """Gradient of `decode` with respect to its values: g times the rows it summed."""
    batch, k = indices.shape
    bag = torch.arange(batch, device=g.device).repeat_interleave(k)
    start = torch.arange(0, batch * k, k, device=g.device)
    flat = indices.reshape(-1)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(g, W_dec, flat, start, bag, 0).view(batch, k)


def across(gradient: Float[Tensor, "n d_model"], weight: Float[Tensor, "n d_model"]) -> Float[Tensor, "n"]:
    """Squared norm of each row of the gradient without its part along the weight's row."""
    compiled = kernels_triton if kernels_triton.usable(gradient, weight.data) else native
    squares = compiled.across(gradient, weight.data)
    if squares is not None:
        return squares
    along = torch.linalg.vecdot(gradient, weight).square() / torch.linalg.vecdot(weight, weight)
    return torch.linalg.vecdot(gradient, gradient) - along


class Adam(NamedTuple):
    """What `update` needs to know of a step; `step` counts from 1, `scale` is what clipping multiplies gradients by."""

    rate: float
    beta1: float
    beta2: float
    eps: float
    ema: float
    step: int
    scale: float = 1.0


def update(
    weight: Tensor, first: Tensor, second: Tensor, average: Tensor, adam: Adam, project: bool = False,
    unit: bool = False,
) -> None:  # fmt: skip
    """One optimizer step of a parameter from its `.grad`, in place, each row being read from memory once.

    The row's gradient loses its part along the row (`project`) and is scaled; Adam moves the row; it is divided by its
    norm (`unit`); and the average of the weights takes it in: average += (1 - ema) (row - average).
    """
    columns = weight.shape[-1]
    tensors = [x.view(-1, columns) for x in (weight.data, weight.grad, first, second, average)]
    rate = adam.rate / (1 - adam.beta1**adam.step)
    root = (1 - adam.beta2**adam.step) ** -0.5
    numbers = [rate, adam.beta1, adam.beta2, adam.eps, root, adam.scale, adam.ema]
    compiled = kernels_triton if kernels_triton.usable(*tensors) else native
    if compiled.update(tensors, numbers, project, unit):
        return
    for w, g, m, v, a in zip(*(x.split(max(1, TILE // columns)) for x in tensors), strict=True):
        if project:
            g = g - (torch.linalg.vecdot(g, w) / torch.linalg.vecdot(w, w))[:, None] * w
        g = g * adam.scale
        m.lerp_(g, 1 - adam.beta1)
        v.mul_(adam.beta2).addcmul_(g, g, value=1 - adam.beta2)
        w.addcdiv_(m, (v.sqrt() * root).add_(adam.eps), value=-rate)
        if unit:
            w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True))
        a.lerp_(w, 1 - adam.ema)
