"""What a sparse autoencoder is trained to minimise, and its gradients.

    loss = sum |x - x_hat|^2 / (tokens * constant)          squared error, 1 for predicting the mean
         + 1/8 of the same at 4k                            MultiTopK, if asked
         + l1 * sum z / tokens                              relu, prolu, gated
         + 1/32 * sum |e - e_hat|^2 / sum |e - mean e|^2    AuxK: dead latents reconstruct the error e = x - x_hat

`dense` is the reference, for every architecture: products of full matrices, differentiated by autograd. `sparse` is for
TopK, by hand, and reaches only the k rows that a token uses. Both leave gradients in `.grad`; tests hold them together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelib import UserError, ops
from saelib.profile import Recipe
from saelib.sae import SAE

FEW = 4
"""AuxK goes by the latents that act, where they are at most 1 / FEW of the dead ones; otherwise by dense products."""


class Terms(NamedTuple):
    """Parts of a loss, and what the step learned about its batch."""

    loss: Tensor
    mse: Tensor
    """Squared error over that of predicting the mean."""
    aux: Tensor
    l0: Tensor
    """Active latents per token."""
    fired: Bool[Tensor, "n_latents"]


class World:
    """Where this process stands among others: it holds a part of the latents and sees a part of every batch.

    Processes are numbered as torchrun does; `shards` neighbours share a batch and split the latents, and the groups
    of them split the tokens. Alone, as by default whoever else there is, every operation is the identity.
    """

    def __init__(self, shards: int | None = None):
        there, shards = shards is not None and dist.is_initialized(), shards or 1
        self.size, self.rank = (dist.get_world_size(), dist.get_rank()) if there else (1, 0)
        if self.size % shards:
            raise UserError(f"{self.size} processes do not make groups of {shards} shards: choose a divisor")
        self.shards, self.shard = shards, self.rank % shards
        self.parts, self.part = self.size // shards, self.rank // shards
        ranks = [[part * shards + shard for shard in range(shards)] for part in range(self.parts)]
        self._latents, self._tokens = None, None
        if shards > 1:
            self._latents = [dist.new_group(group) for group in ranks][self.part]
        if self.parts > 1:
            self._tokens = [dist.new_group(list(group)) for group in zip(*ranks, strict=True)][self.shard]

    @staticmethod
    def first() -> bool:
        """Whether this is the process that writes files and shows progress."""
        return not dist.is_initialized() or dist.get_rank() == 0

    def over_latents(self, x: Tensor) -> Tensor:
        """Sum over the processes that hold the other latents, in place."""
        if self._latents is not None:
            dist.all_reduce(x, group=self._latents)
        return x

    def over_tokens(self, x: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
        """Sum over the processes that see the other tokens, in place."""
        if self._tokens is not None:
            dist.all_reduce(x, op, group=self._tokens)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """One tensor of each shard, in order."""
        if self._latents is None:
            return [x]
        everyone = [torch.empty_like(x) for _ in range(self.shards)]
        dist.all_gather(everyone, x.contiguous(), group=self._latents)
        return everyone

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def keep(self, values: Float[Tensor, "batch k"], k: int) -> Float[Tensor, "batch k"]:
        """Candidates, largest first, with all but the k largest (of all shards) set to 0: an exact global top-k."""
        if self._latents is None:
            return torch.nn.functional.pad(values[:, :k], (0, max(0, values.shape[1] - k)))
        best = torch.cat(self.gather(values), dim=1).topk(k).indices - self.shard * values.shape[1]
        mine = (best >= 0) & (best < values.shape[1])
        kept = torch.zeros_like(values)
        return kept.scatter_add(1, best.clamp(0, values.shape[1] - 1), mine.to(values.dtype)) * values


def dense(sae: SAE, x: Float[Tensor, "batch d_model"], recipe: Recipe, constant: float, dead: Tensor) -> Terms:
    """The loss by autograd, gradients in `.grad`: the reference, and the way of every architecture but TopK.

    Args:
        x: raw activations.
        constant: mean squared distance of an activation from the mean (per token, in the loss's space).
        dead: Bool[Tensor, "n_latents"]; AuxK acts on these.
    """
    x, _, scale = sae.normalized(x)
    unit = scale if recipe.loss_space == "raw" and scale is not None else 1.0
    pre = sae.pre_activations(x)
    z = sae.activate(pre)
    error = unit * (x - z @ sae.W_dec - sae.pre_bias)
    mse = error.square().sum() / (len(x) * constant)
    loss, aux = mse, mse.new_zeros(())
    if recipe.multi_topk:
        values, indices = pre.topk(min(4 * recipe.k, sae.n_latents))
        more = torch.zeros_like(pre).scatter(-1, indices, values.relu())
        loss = loss + (unit * (x - more @ sae.W_dec - sae.pre_bias)).square().sum() / (8 * len(x) * constant)
    if sae.architecture == "gated":
        gate = (pre + sae.latent_bias).relu()
        through = gate @ sae.W_dec.detach() + sae.pre_bias.detach()
        loss = loss + (unit * (x - through)).square().sum() / (len(x) * constant) + recipe.l1 * gate.sum() / len(x)
    elif sae.architecture in {"relu", "prolu"}:
        loss = loss + recipe.l1 * z.sum() / len(x)
    if recipe.k_aux and dead.any():
        target = error.detach()
        values, indices = pre[:, dead].topk(min(recipe.k_aux, int(dead.sum())))
        z_aux = torch.zeros_like(pre[:, dead]).scatter(-1, indices, values.relu())
        aux = (target - unit * (z_aux @ sae.W_dec[dead])).square().sum() * _per_spread(target, lambda total: total)
        loss = loss + recipe.aux_coefficient * aux
    loss.backward()
    active = z.detach() > 0
    return Terms(loss.detach(), mse.detach(), aux.detach(), active.sum() / len(x), active.any(0))


def _squares(x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch"]:
    """Squared norms of rows, in one pass."""
    return torch.linalg.vector_norm(x, dim=1).square_()


def _per_spread(e: Float[Tensor, "batch d_model"], over_tokens: Callable[[Tensor], Tensor]) -> Tensor:
    """1 / sum over tokens of |e - mean e|^2; 0 where all errors are equal: one token teaches AuxK nothing."""
    total = over_tokens(torch.cat([e.sum(0), e.new_tensor([len(e)]), e.square().sum()[None]]))
    e = e - total[:-2] / total[-2]
    spread = over_tokens(_squares(e).sum())
    return torch.where(spread > torch.finfo(e.dtype).eps * total[-1], 1 / spread, 0)


class Sparse:
    """The same for TopK, with hand-written gradients. Keeps its large buffers from step to step.

    With `world`, `sae` holds this process's latents and `x` its tokens; terms and gradients are those of the whole.
    """

    def __init__(self, sae: SAE, recipe: Recipe, constant: float, world: World | None = None):
        self.sae, self.recipe, self.constant = sae, recipe, constant
        self.world = world or World()
        self.memory = ops.Memory(like=sae.W_enc.data)
        for parameter in sae.parameters():
            parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "batch d_model"], dead: Tensor) -> Terms:
        sae, recipe, world = self.sae, self.recipe, self.world
        normalized, _, scale = sae.normalized(x)
        raw = recipe.loss_space == "raw" and scale is not None
        weight = scale[:, 0].square() if raw else x.new_ones(len(x))  # of a token's squared error
        per_token = 1 / (len(x) * world.parts * self.constant)
        centred = torch.sub(normalized, sae.pre_bias, out=None if normalized is x else normalized)
        weights = sae.W_enc.data if recipe.precision == "float32" else sae.W_enc.bfloat16()
        encoder = ops.Encoder(weights, sae.latent_bias, self.memory)
        wide = min(4 * recipe.k, sae.n_latents * world.shards) if recipe.multi_topk else recipe.k
        dead = dead if recipe.k_aux else torch.zeros_like(dead)
        number = int(world.over_latents(dead.sum()))  # of all shards: each takes part where any has a dead latent
        buried = dead.nonzero()[:, 0]
        most = min(recipe.k_aux, number)
        to = self._chosen(len(x), len(buried), most, number)
        values, indices, seen = ops.encode(centred, encoder, min(wide, sae.n_latents), buried, most, to)
        z = world.keep(values, recipe.k).relu()
        error, mse = self._error(z, indices, centred, weight)  # x - x_hat
        mse = mse * per_token
        loss, active, g, factors = mse, z[None], error[None], (-2 * per_token * weight)[None]
        if recipe.multi_topk:
            z_wide = world.keep(values, wide).relu()
            error_wide, wide_mse = self._error(z_wide, indices, centred, weight)
            loss = mse + wide_mse * per_token / 8
            active, g = torch.stack([z, z_wide]), torch.stack([error, error_wide])
            factors = torch.cat([factors, factors / 8])
        self.d_latent = ops.gradients(indices, active, g, factors, centred, sae.W_dec, sae.W_dec.grad, sae.W_enc.grad)
        aux = x.new_zeros(())
        if number:
            aux = self._auxiliary(to, seen, encoder, centred, error, buried, most, weight)
            loss = loss + recipe.aux_coefficient * aux
        self._biases(factors.view(-1) @ g.view(-1, g.shape[-1]))
        fired = z.new_zeros(sae.n_latents).index_add_(0, indices.reshape(-1), z.reshape(-1)) > 0
        l0 = world.over_tokens(world.over_latents((z > 0).sum() / len(x))) / world.parts
        return Terms(loss, mse, aux, l0, world.over_tokens(fired.int(), dist.ReduceOp.MAX).bool())

    def _error(self, z: Tensor, indices: Tensor, centred: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """x - x_hat, and its squares summed over all tokens."""
        error = self._residuals(centred, z, indices, self.sae.W_dec)
        return error, self.world.over_tokens(_squares(error) @ weight)

    def _residuals(self, x: Tensor, z: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        """What all shards' latents leave of x: each takes what its own make from its part of it."""
        mine = x if self.world.shard == 0 else torch.zeros_like(x)
        return self.world.over_latents(ops.residuals(mine, z, indices, W_dec) if len(W_dec) else mine.clone())

    def _chosen(self, rows: int, buried: int, most: int, number: int) -> Tensor | ops.Chosen | None:
        """Room for AuxK's latents: a matrix to multiply by or, where few of many act, their values and places."""
        if number and most * FEW <= number and not self.sae.W_enc.is_cuda:
            return self.memory("few", rows, most), torch.empty(rows, most, dtype=torch.int64)
        whole = len(ops.tiles(rows, self.sae.n_latents)) == 1
        return self.memory("dead", rows, buried) if number and whole else None

    def _auxiliary(
        self, chosen: Float[Tensor, "batch dead"] | ops.Chosen | None, seen: bool, encoder: ops.Encoder,
        centred: Float[Tensor, "batch d_model"], error: Float[Tensor, "batch d_model"], dead: Int[Tensor, "dead"],
        k: int, weight: Float[Tensor, "batch"],
    ) -> Tensor:  # fmt: skip
        """AuxK: adds its gradients, by the latents that act where these are few, and otherwise by dense products.

        In tiles of rows, as the encoder's product. Each makes its choice first, if `chosen` has not `seen` to that.
        """
        per_spread, squares = _per_spread(error * weight.sqrt()[:, None], self.world.over_tokens), error.new_zeros(())
        factors = 2 * self.recipe.aux_coefficient * per_spread * weight
        few, buried = isinstance(chosen, tuple), None if seen else encoder.rows(dead)
        W_dec = self.sae.W_dec[dead] if seen or few else ops.some(self.sae.W_dec, dead)
        for rows in ops.tiles(len(error), self.sae.n_latents):
            given = chosen
            if few:
                given = chosen[0][rows], chosen[1][rows]
            elif not seen:
                given = self.memory("dead", rows.stop - rows.start, len(W_dec))
            if not seen:
                ops.largest(buried(centred[rows]), k, given)
            rest = centred[rows], error[rows], W_dec, dead, k, weight[rows], factors[rows]
            squares += self._auxiliary_few(*given, *rest) if few else self._auxiliary_tile(given, *rest)
        return self.world.over_tokens(squares) * per_spread

    def _auxiliary_few(
        self, z: Float[Tensor, "batch k"], places: Int[Tensor, "batch k"], centred: Float[Tensor, "batch d_model"],
        error: Float[Tensor, "batch d_model"], W_dec: Float[Tensor, "dead d_model"], dead: Int[Tensor, "dead"], k: int,
        weight: Float[Tensor, "batch"], factors: Float[Tensor, "batch"],
    ) -> Tensor:  # fmt: skip
        """Adds the gradients, `factors` / 2 times those of squared errors; returns the weighted sum of these."""
        sae = self.sae
        z = self.world.keep(z, k)
        left = self._residuals(error, z, places, W_dec)
        if len(dead):  # of this shard
            to_dec, to_enc = torch.empty_like(W_dec), torch.empty_like(W_dec)
            d_latent = ops.gradients(places, z[None], left[None], -factors[None], centred, W_dec, to_dec, to_enc)
            for whole, found in ((sae.W_dec.grad, to_dec), (sae.W_enc.grad, to_enc), (self.d_latent, d_latent)):
                whole.index_add_(0, dead, found)
        return _squares(left) @ weight

    def _auxiliary_tile(
        self, z: Float[Tensor, "rows dead"], centred: Float[Tensor, "rows d_model"],
        error: Float[Tensor, "rows d_model"], W_dec: Float[Tensor, "dead d_model"], dead: Int[Tensor, "dead"], k: int,
        weight: Float[Tensor, "rows"], factors: Float[Tensor, "rows"],
    ) -> Tensor:  # fmt: skip
        """The same by dense products. `W_dec` may have more rows, of zeros."""
        sae, world = self.sae, self.world
        if world.shards > 1:  # every shard offers k of its own; zeros do no harm
            values, indices = z.topk(min(k, len(dead)))
            kept = world.keep(torch.nn.functional.pad(values, (0, k - values.shape[1])), k)
            z = torch.zeros_like(z).scatter_(1, indices, kept[:, : values.shape[1]])
        difference = torch.mm(z, W_dec, out=self.memory("difference", *error.shape))
        difference = world.over_latents(difference).sub_(error)
        squares = _squares(difference) @ weight
        g = difference.mul_(factors[:, None])
        d_z = torch.mm(g, W_dec.T, out=self.memory("pre", *z.shape))  # where pre-activations were
        torch.ops.aten.threshold_backward.grad_input(d_z, z, 0, grad_input=d_z)  # in one pass: 0 where z is
        sae.W_dec.grad.index_add_(0, dead, (g.T @ z).T[: len(dead)])  # this way round the product is faster
        sae.W_enc.grad.index_add_(0, dead, (centred.T @ d_z).T[: len(dead)])
        self.d_latent.index_add_(0, dead, d_z.sum(0)[: len(dead)])
        return squares

    def _biases(self, g: Float[Tensor, "d_model"]) -> None:
        """Gradients of the biases; then those of all parameters summed over the processes."""
        sae, world = self.sae, self.world
        sae.pre_bias.grad = g - world.over_latents(sae.W_enc.T @ self.d_latent)
        if sae.latent_bias is not None:
            sae.latent_bias.grad = self.d_latent
        for parameter in sae.parameters():
            world.over_tokens(parameter.grad)
