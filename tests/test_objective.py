"""Hand-written gradients against autograd through dense products, in float64."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from saelib import ops
from saelib.objective import Sparse, dense
from saelib.profile import Recipe
from saelib.sae import SAE


def setup(seed, batch, n, d, **values):
    """An SAE in general position, a batch of raw activations, and which latents are dead; float64."""
    generator = torch.Generator().manual_seed(seed)
    recipe = Recipe(n_latents=n, batch=1, **values)
    sae = SAE(n, d, recipe.k, architecture=recipe.architecture, latent_bias=recipe.latent_bias,
              normalize=recipe.normalize, seed=seed).double()  # fmt: skip
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = 3 + 2 * torch.randn(batch, d, generator=generator, dtype=torch.float64)
    return recipe, sae, x, torch.rand(n, generator=generator) < 0.4


def both(recipe, sae, x, dead, constant=0.7):
    """(terms, gradients) of the reference and of the fast path."""
    found = []
    for way in ("dense", "sparse"):
        own = copy.deepcopy(sae)
        terms = dense(own, x, recipe, constant, dead) if way == "dense" else Sparse(own, recipe, constant)(x, dead)
        found.append((terms, {name: p.grad for name, p in own.named_parameters()}))
    return found


def assert_equal(found):
    (slow, slow_grads), (fast, fast_grads) = found
    for name in ("loss", "mse", "aux", "l0"):
        torch.testing.assert_close(getattr(fast, name).double(), getattr(slow, name).double(), rtol=1e-12, atol=1e-14)
    assert torch.equal(fast.fired, slow.fired)
    for name, expected in slow_grads.items():
        error = (fast_grads[name] - expected).norm() / expected.norm().clamp_min(1e-300)
        assert error <= 1e-12, f"{name}: relative error {error:.1e}"


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 90), st.integers(2, 12), st.integers(1, 20),
    st.integers(0, 30), st.booleans(), st.booleans(), st.sampled_from(["unit", "layer_norm", "none"]),
    st.sampled_from(["normalized", "raw"]), st.sampled_from([ops.PRODUCT, 200, 1]),
)  # fmt: skip
def test_gradients_equal_autograd(seed, batch, n, d, k, k_aux, bias, multi, normalize, space, product):
    # normalised, two numbers are all but signs: errors agree to six digits, and AuxK divides by what is left of them
    assume(d > 2 or normalize == "none" or not k_aux)
    values = {"k": min(k, n), "k_aux": k_aux, "latent_bias": bias, "multi_topk": multi}
    rows = ops.ROWS if seed % 2 else 3
    with mock.patch.multiple(ops, PRODUCT=product, ROWS=rows):  # in tiles of few rows, too
        assert_equal(both(*setup(seed, batch, n, d, normalize=normalize, loss_space=space, **values)))


@pytest.mark.parametrize("k_aux", [8, 60], ids=["few of the dead act", "many"])
@pytest.mark.parametrize("space", ["normalized", "raw"])
def test_compiled_gradients_are_those_of_float64(k_aux, space):
    recipe, sae, x, dead = setup(0, 200, 150, 20, k=5, k_aux=k_aux, multi_topk=True, latent_bias=True, loss_space=space)
    slow, gradients = both(recipe, sae, x, dead)[0]
    own = sae.float()
    terms = Sparse(own, recipe, 0.7)(x.float(), dead)
    torch.testing.assert_close(terms.aux.double(), slow.aux, rtol=1e-4, atol=1e-6)
    for name, parameter in own.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert error <= 1e-3, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_no_tensor_of_batch_times_latents_is_ever_made(monkeypatch, share):
    """Otherwise 131,072 tokens and as many latents would need 64 GiB, and AuxK as much again."""
    batch, n = 256, 1024
    monkeypatch.setattr(ops, "PRODUCT", 16 * n)
    recipe, sae, x, _ = setup(0, batch, n, 8, k=4, k_aux=32, multi_topk=True)
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, torch.Tensor))
            return made

    with Sizes():
        Sparse(sae, recipe, 0.7)(x, torch.rand(n) < share)
    codes = 2 * batch * (4 * recipe.k + recipe.k_aux)  # at k and at 4k, side by side, and AuxK's
    assert max(largest) <= max(codes, 16 * n) < batch * n / 8


def test_bfloat16_rounds_the_factors_of_the_encoders_product_only():
    recipe, sae, x, dead = setup(0, 40, 64, 12, k=4, latent_bias=True, normalize="none", precision="bfloat16")
    sae = sae.float()
    x = x.float()
    found = []

    def seen(x, encoder, *rest):
        found.append((x, encoder(x).clone()))
        return encode(x, encoder, *rest)

    encode = ops.encode
    with mock.patch.object(ops, "encode", seen):
        Sparse(sae, recipe, 0.7)(x, dead)
    ((centred, pre),) = found
    exact = centred.bfloat16().double() @ sae.W_enc.bfloat16().double().T + sae.latent_bias.double()
    torch.testing.assert_close(pre.double(), exact, rtol=1e-5, atol=1e-5)
    assert pre.dtype == torch.float32 and (pre - centred @ sae.W_enc.T - sae.latent_bias).abs().max() > 1e-3


def test_ties_do_not_matter():
    """Latents in equal pairs: whichever of a pair is chosen, loss and summed gradients are the same."""
    recipe, sae, x, _ = setup(0, 30, 20, 6, k=6)
    with torch.no_grad():
        sae.W_enc[10:], sae.W_dec[10:] = sae.W_enc[:10].clone(), sae.W_dec[:10].clone()
    (slow, slow_grads), (fast, fast_grads) = both(recipe, sae, x, torch.zeros(20, dtype=torch.bool))
    torch.testing.assert_close(fast.loss, slow.loss, rtol=1e-12, atol=0)
    for name in ("W_enc", "W_dec"):
        folded = [g[name][:10] + g[name][10:] for g in (slow_grads, fast_grads)]
        torch.testing.assert_close(*folded, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shape", [(1, 40, 5), (8, 4, 5)], ids=["one row", "k = n"])
def test_edges(shape):
    assert_equal(both(*setup(1, *shape, k=4)))


def test_auxk_trains_the_encoder_and_only_dead_latents():
    recipe, sae, x, dead = setup(3, 64, 50, 8, k=3)
    with_aux, without = ({**both(recipe.model_copy(update={"k_aux": k}), sae, x, dead)[1][1]} for k in (16, 0))
    for name in ("W_enc", "W_dec"):
        change = (with_aux[name] - without[name]).norm(dim=1)
        assert (change[dead] > 0).any() and (change[~dead] == 0).all(), name


def test_auxk_is_skipped_when_nothing_is_dead():
    recipe, sae, x, dead = setup(4, 16, 30, 6, k=3)
    terms = Sparse(sae, recipe, 1.0)(x, torch.zeros_like(dead))
    assert terms.aux == 0 and terms.loss == terms.mse


def test_mean_predictor_costs_one():
    """The loss's constant is what predicting the mean costs."""
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sae = SAE(8, 6, 2).double()
    normalized, _, _ = sae.normalized(x)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.pre_bias.copy_(normalized.mean(0))
    constant = (normalized - normalized.mean(0)).square().sum(1).mean().item()
    terms = Sparse(sae, Recipe(n_latents=8, k=2), constant)(x, torch.zeros(8, dtype=torch.bool))
    assert terms.mse.item() == pytest.approx(1, abs=1e-12) and terms.l0 == 0


def test_buffers_do_not_leak_from_one_batch_into_the_next():
    recipe, sae, x, dead = setup(6, 24, 40, 6, k=4)
    sparse = Sparse(sae, recipe, 1.0)
    sparse(x, dead)
    first = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sparse(x.flip(0)[:10] * 3, ~dead)
    sparse(x, dead)
    assert all(torch.equal(p.grad, first[name]) for name, p in sae.named_parameters())
