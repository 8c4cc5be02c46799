"""Every architecture against its equation, and what an SAE promises about normalisation, dtypes, shapes and order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from saelib.profile import Recipe
from saelib.sae import SAE, Codes

ARCHITECTURES = ["topk", "batchtopk", "relu", "prolu", "gated"]
N, D, K = 64, 10, 4


def make(architecture="topk", seed=0, dtype=torch.float64, n=N, d=D, **values):
    """An SAE with weights and biases in general position."""
    sae = SAE(n, d, K, architecture=architecture, seed=seed, **values).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    if architecture == "batchtopk":
        sae.threshold.fill_(0.3)
    return sae


def data(*shape, seed=0, dtype=torch.float64):
    return 3 + 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def largest(row, k):
    """The row with all but its k largest values set to 0, by sorting."""
    keep = sorted(range(len(row)), key=lambda i: -row[i])[:k]
    return torch.stack([value if i in keep else 0 * value for i, value in enumerate(row)]).detach()


def equation(sae, m):
    """Latents of one token whose encoder products W_enc (x - pre_bias) are m, as the papers write them."""
    bias = sae.latent_bias
    match sae.architecture:
        case "topk":
            return largest(m, sae.k).clamp_min(0)
        case "batchtopk":
            return torch.where(m > sae.threshold, m, 0.0)
        case "relu":
            return (m + bias).clamp_min(0)
        case "prolu":
            return torch.where((m > 0) & (m + bias > 0), m, 0.0)
        case "gated":
            return torch.where(m + bias > 0, (sae.r_mag.exp() * m + sae.mag_bias).clamp_min(0), 0.0)


@pytest.mark.parametrize("normalize", ["unit", "layer_norm", "none"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_every_architecture_is_its_equation(architecture, normalize):
    sae = make(architecture, normalize=normalize)
    for x, x_hat, latents in zip(data(20, D), sae(data(20, D)), sae.encode(data(20, D)).dense(N), strict=True):
        centred = x - x.sum() / D
        mean, scale = {
            "unit": (x.sum() / D, centred.square().sum().sqrt()),
            "layer_norm": (x.sum() / D, (centred.square().sum() / (D - 1)).sqrt() + 1e-5),
            "none": (0.0, 1.0),
        }[normalize]
        z = equation(sae, sae.W_enc @ ((x - mean) / scale - sae.pre_bias))
        torch.testing.assert_close(latents, z, rtol=1e-12, atol=1e-13)
        expected = (sum(z[i] * sae.W_dec[i] for i in range(N)) + sae.pre_bias) * scale + mean
        torch.testing.assert_close(x_hat, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_latent_bias_takes_part_in_the_selection():
    sae, x = make(latent_bias=True, normalize="none"), data(30, D)
    pre = (x - sae.pre_bias) @ sae.W_enc.T + sae.latent_bias
    expected = torch.stack([largest(row, K).clamp_min(0) for row in pre])
    torch.testing.assert_close(sae.encode(x).dense(N), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 90))
def test_sparse_codes_are_the_dense_latents(seed, batch, n):
    sae = SAE(n, D, min(K, n), seed=seed).double()
    x = data(batch, D, seed=seed)
    sparse, dense = sae.encode(x), sae.encode(x, dense=True)
    normalized, _, _ = sae.normalized(x)
    assert dense.indices is None and torch.equal(sparse.dense(n), dense.values)
    assert torch.equal(dense.values, sae.activate(sae.pre_activations(normalized)))
    assert (sparse.values.diff(dim=-1) <= 0).all() and (sparse.values >= 0).all()
    torch.testing.assert_close(sae.decode(sparse), sae.decode(dense), rtol=1e-12, atol=1e-12)


def test_batchtopk_trains_on_the_largest_of_the_batch_and_then_on_a_threshold():
    sae = make("batchtopk", normalize="none").train()
    sae.threshold.zero_()
    x = data(25, D)
    pre = (x - sae.pre_bias) @ sae.W_enc.T
    z = sae.encode(x).values
    expected = largest(pre.flatten(), 25 * K).clamp_min(0).view_as(pre)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-13)
    assert (z > 0).sum() == 25 * K and len(set((z > 0).sum(1).tolist())) > 1
    cut = pre.flatten().sort(descending=True).values[25 * K]  # the largest value that stays out
    assert sae.threshold.item() == pytest.approx(cut.item(), abs=1e-12)
    sae.encode(x + 1)
    second = (pre + sae.W_enc.sum(1)).flatten().sort(descending=True).values[25 * K]
    assert sae.threshold.item() == pytest.approx((0.99 * cut + 0.01 * second).item(), abs=1e-12)
    sae.eval()
    kept = sae.threshold.clone()
    alone, together = sae.encode(x[3]).values, sae.encode(x).values[3]
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-13)  # a token does not depend on its batch
    torch.testing.assert_close(together, torch.where(pre[3] > kept, pre[3], 0.0), rtol=1e-12, atol=1e-13)
    assert torch.equal(sae.threshold, kept)


def test_batchtopk_never_lets_a_negative_latent_through():
    sae = make("batchtopk", normalize="none", n=2 * K).train()
    sae.W_enc.data = -sae.W_enc.abs()
    z = sae.encode(data(9, D)).values
    assert (z >= 0).all() and (z > 0).sum() < 9 * K and sae.threshold >= 0
    sae.k = sae.n_latents  # all of them: what is left is ReLU
    sae.W_enc.data[0] *= -1
    x = data(9, D)
    torch.testing.assert_close(sae.encode(x).values, ((x - sae.pre_bias) @ sae.W_enc.T).relu())


def test_prolu_bias_is_a_threshold_with_the_gradient_of_relu():
    sae, x = make("prolu", normalize="none"), data(40, D)
    coefficients = data(40, N, seed=9)
    z = sae.encode(x).values
    (z * coefficients).sum().backward()
    m = (x - sae.pre_bias) @ sae.W_enc.T
    on = (m > 0) & (m + sae.latent_bias > 0)
    assert (on != (m > 0)).any()  # the bias decides somewhere
    torch.testing.assert_close(sae.latent_bias.grad, (coefficients * on).sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.W_enc.grad, (coefficients * on).T @ (x - sae.pre_bias.detach()))


@torch.no_grad()
def test_codes_decode_in_any_order_and_any_number_of_times():
    sae, a, b = make(), data(5, D, seed=1), data(7, D, seed=2) * 4 - 30
    expected = sae(a), sae(b)
    codes_a, codes_b = sae.encode(a), sae.encode(b)
    for codes, x_hat in ((codes_b, expected[1]), (codes_a, expected[0]), (codes_a, expected[0])):
        assert torch.equal(sae.decode(codes), x_hat)


@pytest.mark.parametrize("normalize", ["unit", "layer_norm", "none"])
@torch.no_grad()
def test_a_perfect_dictionary_returns_the_raw_activation(normalize):
    """Latents for +- every axis and k = d: whatever normalisation takes out comes back."""
    sae = SAE(2 * D, D, D, normalize=normalize).double()
    axes = torch.cat([torch.eye(D), -torch.eye(D)]).double()
    sae.W_enc.copy_(axes)
    sae.W_dec.copy_(axes)
    sae.pre_bias.copy_(data(D) / 10)
    x = data(50, D) * torch.logspace(-3, 3, 50, dtype=torch.float64)[:, None]
    torch.testing.assert_close(sae(x), x, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ARCHITECTURES), st.floats(1e-3, 1e3), st.floats(-100, 100))
@torch.no_grad()
def test_unit_normalisation_makes_the_sae_scale_and_shift_with_its_input(architecture, a, b):
    sae, x = make(architecture), data(6, D)
    torch.testing.assert_close(sae(a * x + b), a * sae(x) + b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalize", ["unit", "layer_norm"])
@pytest.mark.parametrize("shape", [(5,), (7, 3, 128), (4, 768), (0, 16)])
def test_normalised_in_float32_is_what_it_is_in_float64(normalize, shape):
    x = 5 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sae = SAE(4, shape[-1], 2, normalize=normalize)
    given = x.clone()
    for ours, exact in zip(sae.normalized(x), sae.normalized(x.double()), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, given)
    x = x.requires_grad_()
    assert sae.normalized(x)[0].requires_grad


@pytest.mark.parametrize("normalize", ["unit", "layer_norm", "none"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_zero_and_constant_activations_stay_finite(architecture, normalize):
    sae = make(architecture, normalize=normalize, dtype=torch.float32)
    for value in (0.0, 7.25, 1e-30, 0.1, -3e5 / 7):
        x = torch.full((3, D), value)
        codes = sae.encode(x)
        assert normalize == "none" or (sae.normalized(x)[0] == 0).all()  # nothing of it is what rounding left
        assert codes.values.isfinite().all() and sae(x).isfinite().all()
        if normalize == "unit":
            torch.testing.assert_close(sae(x), x)  # there is nothing but the mean, and that is kept


@pytest.mark.parametrize("normalize", ["unit", "layer_norm"])
def test_a_constant_is_told_from_a_small_signal(normalize):
    for dtype, least in ((torch.float32, 1e-5), (torch.float64, 1e-14)):
        sae = SAE(8, 512, 2, normalize=normalize)
        x = torch.full((1, 512), 1000.1, dtype=dtype)
        assert (sae.normalized(x)[0] == 0).all()
        x[0, ::2] *= 1 + least  # entries that differ in their last hundred digits
        norm = sae.normalized(x)[0].norm().item()
        assert norm == pytest.approx(1, abs=1e-3) if normalize == "unit" else norm > 0


@torch.no_grad()
def test_the_input_is_left_alone():
    for normalize in ("unit", "layer_norm", "none"):
        for dtype in (torch.float32, torch.float64):
            sae, x = make(normalize=normalize, dtype=dtype), data(4, D, dtype=dtype)
            before = x.clone()
            sae(x), sae.encode(x), sae.normalized(x)
            assert torch.equal(x, before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_weights_of_lower_precision_reconstruct_nearly_the_same(architecture, dtype):
    sae, x = make(architecture, dtype=torch.float32), data(200, D, dtype=torch.float32)
    expected = sae(x)
    found = sae.to(dtype)(x)
    assert found.dtype == torch.float32  # the dtype of x, not of the weights
    assert sae(x.to(dtype)).dtype == dtype
    similarity = cosine_similarity(found - x.mean(1, keepdim=True), expected - x.mean(1, keepdim=True))
    assert similarity.median() > {torch.float32: 1 - 1e-6, torch.bfloat16: 0.999, torch.float16: 0.9999}[dtype]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_autocast_keeps_the_dtype_of_the_input(architecture):
    sae = make(architecture, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        x = data(100, D, dtype=torch.float32).to(dtype)
        expected = sae(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = sae(x)
        assert found.dtype == dtype
        mean = x.float().mean(1, keepdim=True)
        assert cosine_similarity(found.float() - mean, expected.float() - mean).median() > 0.999


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_any_number_of_leading_axes(architecture):
    sae, x = make(architecture), data(3, 5, D)
    rows = sae(x.view(-1, D))
    width = K if architecture == "topk" else N
    assert sae.encode(x).values.shape == (3, 5, width) and sae.encode(x[0, 0]).values.shape == (width,)
    torch.testing.assert_close(sae(x).view(-1, D), rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae(x[1, 2]), rows[7], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.encode(x).dense(N)[1], sae.encode(x[1]).dense(N), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", ["unit", "layer_norm", "none"])
@pytest.mark.parametrize("architecture", ["topk", "relu", "gated"])
def test_gradients_reach_the_input(architecture, normalize):
    sae = make(architecture, normalize=normalize)
    assert torch.autograd.gradcheck(sae, data(3, D).requires_grad_())


def test_gradients_of_float32_are_those_of_float64():
    """In float32 the selection is compiled, and must not cut the graph."""
    found = []
    for dtype in (torch.float64, torch.float32):
        sae, x = make().to(dtype), data(8, D).to(dtype).requires_grad_()
        (sae(x) * data(8, D, seed=5).to(dtype)).sum().backward()
        found.append([t.grad.double() for t in (x, sae.W_enc, sae.W_dec, sae.pre_bias)])
    for double, single in zip(*found, strict=True):
        assert double.abs().max() > 0
        torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-4)


def test_dense_codes_need_no_indices():
    values = torch.eye(3)
    assert Codes(values, None, None, None).dense(3) is values


def test_every_architecture_of_a_recipe_can_be_made():
    for architecture in Recipe.model_fields["architecture"].annotation.__args__:
        assert SAE(8, 4, 2, architecture=architecture)(torch.randn(3, 4)).shape == (3, 4)
