"""Sparse autoencoders: five architectures over one pair of matrices.

All read an activation x in R^d, normalise it, and write it as a sparse non-negative sum of n directions:

    z = activation(W_enc (x - pre_bias) + latent_bias)        x_hat = z W_dec + pre_bias

`W_enc` and `W_dec` both have shape [n, d]: row i of the one detects latent i, row i of the other is its direction.

    topk       z keeps the k largest of a token's pre-activations; those below 0 count as 0     arXiv 2406.04093
    batchtopk  the k * batch largest of the whole batch; afterwards those above a threshold     arXiv 2412.06410
    relu       ReLU(pre), with an L1 penalty                                                    arXiv 2309.08600
    prolu      m where m > 0 and m + latent_bias > 0, m = W_enc (x - pre_bias); L1              Taggart 2024
    gated      1[pre > 0] * ReLU(exp(r_mag) * m + mag_bias); L1 on ReLU(pre)                    arXiv 2404.16014
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelib import native, ops

TINY = 1e-12
"""Norm below which a vector counts as 0."""
ROUNDING = 16
"""Last digits of the mean. An activation whose entries are no further from it is normalised to 0, not to noise."""
LN_EPS = 1e-5
"""What OpenAI's released code and SAELens add to the standard deviation."""


class Codes(NamedTuple):
    """Latents of a batch of activations, and what it takes to undo the normalisation."""

    values: Float[Tensor, "*batch k"]
    """Activations of the latents in `indices`; where that is None, of all n latents."""
    indices: Int[Tensor, "*batch k"] | None
    mean: Float[Tensor, "*batch 1"] | None
    scale: Float[Tensor, "*batch 1"] | None
    """What the centred activation was divided by; `mean` and `scale` are None for an SAE that does not normalise."""

    def dense(self, n_latents: int) -> Float[Tensor, "*batch n_latents"]:
        """All latents, zeros included."""
        if self.indices is None:
            return self.values
        zeros = self.values.new_zeros(*self.values.shape[:-1], n_latents)
        return zeros.scatter(-1, self.indices, self.values)


class SAE(nn.Module):
    """A sparse autoencoder. Raw activations go in and raw reconstructions come out: it normalises by itself.

    Args:
        n_latents, d_model: sizes.
        k: active latents per token of `topk` and `batchtopk`.
        architecture: see the module's docstring.
        latent_bias: whether `topk` and `batchtopk` have one; the others always do.
        normalize: `unit` (paper), `layer_norm` (released code), `none`.
        seed: of the random unit directions that both matrices start from.
    """

    def __init__(
        self, n_latents: int, d_model: int, k: int | None = None, *, architecture: str = "topk",
        latent_bias: bool = False, normalize: str = "unit", seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.n_latents, self.d_model, self.k = n_latents, d_model, k
        self.architecture, self.normalize = architecture, normalize
        self.facts: dict = {}
        """Where it comes from: model, hook, text, recipe, metrics (`saelib.formats`)."""
        rows = torch.randn(n_latents, d_model, generator=torch.Generator().manual_seed(seed))
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.clone())
        self.pre_bias = nn.Parameter(torch.zeros(d_model))
        biased = latent_bias or architecture in {"relu", "prolu", "gated"}
        self.latent_bias = nn.Parameter(torch.zeros(n_latents)) if biased else None
        if architecture == "gated":
            self.r_mag = nn.Parameter(torch.zeros(n_latents))
            self.mag_bias = nn.Parameter(torch.zeros(n_latents))
        if architecture == "batchtopk":
            self.register_buffer("threshold", torch.zeros(()))

    @property
    def sparse(self) -> bool:
        """Whether every token has the same number of latents, so that codes are (values, indices)."""
        return self.architecture == "topk"

    def normalized(
        self, x: Float[Tensor, "*batch d_model"]
    ) -> tuple[Float[Tensor, "*batch d_model"], Tensor | None, Tensor | None]:
        """The activation as the SAE sees it, in float32 or better, and the mean and scale that were taken out."""
        x = x if x.dtype == torch.float64 else x.float()
        if self.normalize == "none":
            return x, None, None
        by_spread, noise = self.normalize == "layer_norm", ROUNDING * torch.finfo(x.dtype).eps
        eps, noise = (LN_EPS, noise) if by_spread else (0.0, noise * x.shape[-1] ** 0.5)
        if found := native.normalized(x, by_spread, eps, TINY, noise):
            return found
        mean = x.mean(-1, keepdim=True)
        x = x - mean
        spread = x.std(-1, keepdim=True) if by_spread else x.norm(dim=-1, keepdim=True)
        scale = spread + eps
        divisor = torch.where(spread <= (noise * mean.abs()).clamp_min(TINY), torch.inf, scale)
        return x / divisor if x.requires_grad else x.div_(divisor), mean, scale

    def pre_activations(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_latents"]:
        """W_enc (x - pre_bias) + latent_bias for a normalised x (ProLU and Gated add their biases later)."""
        bias = None if self.architecture in {"prolu", "gated"} else self.latent_bias
        return nn.functional.linear(x.to(self.W_enc.dtype) - self.pre_bias, self.W_enc, bias)

    def activate(self, pre: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        """Dense latents from pre-activations: the reference for every architecture."""
        match self.architecture:
            case "topk":
                values, indices = pre.topk(self.k, dim=-1)
                return torch.zeros_like(pre).scatter(-1, indices, values.relu())
            case "batchtopk":
                return pre * (pre > self._cut(pre))
            case "relu":
                return pre.relu()
            case "prolu":  # the bias is a threshold only; of the two published gradients, ProLU_ReLU's
                return (pre + self.latent_bias - self.latent_bias.detach()) * ((pre > 0) & (pre + self.latent_bias > 0))
            case "gated":
                return (pre * self.r_mag.exp() + self.mag_bias).relu() * (pre + self.latent_bias > 0)
        raise ValueError(f"unknown architecture {self.architecture!r}")

    def _cut(self, pre: Tensor) -> Tensor:
        """BatchTopK: what a latent must exceed: in training the largest value that the batch leaves out, then its mean.

        A moving average over the steps, that is. (The paper averages the smallest value that is kept.)
        """
        if not self.training:
            return self.threshold
        kept = self.k * pre[..., 0].numel()
        cut = pre.detach().flatten().kthvalue(pre.numel() - kept).values if kept < pre.numel() else pre.new_zeros(())
        self.threshold.lerp_(cut.clamp_min(0).to(self.threshold.dtype), 0.01 if self.threshold > 0 else 1.0)
        return cut.clamp_min(0)

    def encode(self, x: Float[Tensor, "*batch d_model"], dense: bool = False) -> Codes:
        """Latents of raw activations: (values, indices) for TopK, largest first, or all n of them (`dense`)."""
        x, mean, scale = self.normalized(x)
        pre = self.pre_activations(x)
        if not self.sparse:
            return Codes(self.activate(pre), None, mean, scale)
        _, indices = ops.topk(pre.detach(), self.k)  # compiled: autograd does not see through it
        codes = Codes(pre.gather(-1, indices).relu(), indices, mean, scale)
        return codes._replace(values=codes.dense(self.n_latents), indices=None) if dense else codes

    def decode(self, codes: Codes) -> Float[Tensor, "*batch d_model"]:
        """Raw reconstructions: the sum of the active directions and `pre_bias`, normalisation undone."""
        if codes.indices is None:
            x_hat = codes.values.to(self.W_dec.dtype) @ self.W_dec
        else:
            x_hat = ops.decode(codes.values, codes.indices, self.W_dec)
        x_hat = x_hat + self.pre_bias
        return x_hat if codes.scale is None else x_hat * codes.scale + codes.mean

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Raw activations to raw reconstructions, in the dtype of `x`."""
        return self.decode(self.encode(x)).to(x.dtype)
