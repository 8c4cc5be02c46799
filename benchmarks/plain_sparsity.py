"""Ablation sparsity the plain way, as the journal did it: one full forward pass per ablated part.

What `saelib.sparsity` is compared with, by its tests and by `sparsity.py` here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def median(x: Tensor) -> Tensor:
    """Over the last dimension, which is kept."""
    return x.median(-1, keepdim=True).values


@torch.no_grad()
def sparsity(
    model, hook: str, tokens: Tensor, index: list[int], parts, base: Callable | None = None, window: int = 16,
    median: Callable[[Tensor], Tensor] = median,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(L1 / L2)^2 / (V * T) of each part of `saelib.sparsity.Parts` [n, m], and the scales s_t [n, m, window]."""
    values = torch.full(parts.on.shape, torch.nan, dtype=torch.float64)
    scales = torch.zeros(*parts.on.shape, window, dtype=torch.float64)
    for c, i in enumerate(index):

        def replace(x, hook):
            return x if base is None else base(x)

        clean = model.run_with_hooks(tokens[c : c + 1], fwd_hooks=[(hook, replace)])
        for j in parts.on[c].nonzero()[:, 0]:

            def ablate(x, hook, i=i, vector=parts.vectors[c, j]):
                x = replace(x, hook).clone()
                x[0, i] -= vector
                return x

            change = model.run_with_hooks(tokens[c : c + 1], fwd_hooks=[(hook, ablate)]) - clean
            change = change[0, i : i + window]
            change = (change - median(change)).double()
            values[c, j] = change.abs().sum() ** 2 / change.square().sum() / change.numel()
            scales[c, j] = change.square().mean(-1).sqrt()
    return values, scales
