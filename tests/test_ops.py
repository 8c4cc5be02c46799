"""The fast operations against their slow, obvious forms."""

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelib import native, ops

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.float64])  # kernels are compiled for float32


def case(seed, rows, n, d=5, ties=False, dtype=torch.float64):
    """Random scores and weights; with ties, from few distinct values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=generator, dtype=dtype)
    return (x * 2).round() if ties else x, torch.randn(n, d, generator=generator, dtype=dtype), generator


def spoil(x, how, generator):
    """The same scores, some of them infinite, or every other row constant."""
    some = torch.rand(x.shape, generator=generator) < 0.1
    match how:
        case "high" | "low":
            x[some] = torch.inf if how == "high" else -torch.inf
        case "both":
            x[some] = torch.where(torch.rand(int(some.sum()), generator=generator) < 0.5, torch.inf, -torch.inf).to(x)
        case "constant":
            x[::2] = x[::2, :1].clone()
    return x


@settings(max_examples=300, deadline=None)
@given(
    seeds, st.integers(1, 9), st.sampled_from([1, 7, 64, 96, 333, 512, 1024, 1025, 4096, 4099, 4100]),
    st.one_of(st.integers(1, 70), st.floats(0, 0.3)), st.booleans(), dtypes,
    st.sampled_from(["random", "high", "low", "both", "constant"]),
)  # fmt: skip
def test_topk_finds_what_torch_finds(seed, rows, n, k, ties, dtype, how):
    x, _, generator = case(seed, rows, n, ties=ties, dtype=dtype)
    x = spoil(x, how, generator)
    k = min(k if isinstance(k, int) else int(k * n) + 1, n)
    for values, indices in (ops.topk(x, k), ops._staged(x, k)):
        assert torch.equal(values, x.topk(k).values)
        assert torch.equal(x.gather(1, indices), values)
        assert all(len(set(row)) == k for row in indices.tolist())
    compiled = native.library() is not None and dtype == torch.float32 and k <= n // 4
    assert (native.topk(x, k) is not None) == compiled


def test_what_the_kernels_do_not_take_is_left_to_torch():
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    assert ops.topk(x, 0)[0].shape == (4, 0)
    assert native.topk(x, 26) is None and native.topk(x.T, 1) is None and native.topk(x.double(), 1) is None
    columns = torch.arange(0, 100, 2)
    z, strided = torch.empty(4, 50), torch.empty(50, 4).T
    lists = torch.empty(4, 5), torch.empty(4, 5, dtype=torch.int32)
    for which, to in ((columns.int(), z), (torch.arange(100)[::2], z), (columns, strided), (columns, lists)):
        assert native.topk(x, 3, which, 5, to) is None
    expected = with_largest(x.double(), 3, columns, 5)
    for which, to in ((columns.int(), z), (columns, z), (columns, strided)):
        found = with_largest(x, 3, which, 5, to)
        assert all(torch.equal(one.double(), other.double()) for one, other in zip(found, expected, strict=True))


def with_largest(x, k, columns, most, z=None):
    """`ops.topk_and_largest`, with what it writes."""
    z = x.new_full((len(x), len(columns)), float("nan")) if z is None else z.fill_(float("nan"))
    return *ops.topk_and_largest(x, k, columns, most, z), z


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_topk_of_every_dtype_and_shape(dtype):
    x = torch.randn(3, 5, 2048, generator=torch.Generator().manual_seed(0)).to(dtype)
    values, indices = ops.topk(x, 8)
    assert torch.equal(values, x.topk(8).values) and indices.shape == (3, 5, 8)


def test_topk_shows_what_is_not_finite():
    x = torch.zeros(2, 4096)
    x[0, 77], x[1, 5] = float("nan"), float("-inf")
    values, indices = ops.topk(x, 4)
    assert indices[0, 0] == 77 and values[0, 0].isnan()
    assert not values[1].isinf().any()


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 9), st.integers(1, 300), st.integers(1, 80), st.booleans(), dtypes)
def test_largest_keeps_k_positive_values_of_some_columns(seed, rows, n, k, ties, dtype):
    x, _, generator = case(seed, rows, n, ties=ties, dtype=dtype)
    columns = torch.randperm(n, generator=generator)[: n // 2 + 1]
    top = n // 4 + 1 if seed % 2 else max(1, n // 4)  # too wide for the kernel, or not
    values, indices, found = with_largest(x, top, columns, k)
    assert torch.equal(values, x.topk(top).values) and torch.equal(x.gather(1, indices), values)
    offered = x[:, columns].relu()
    k = min(k, len(columns))
    assert torch.equal(found.topk(k).values, offered.topk(k).values)
    assert ((found == 0) | (found == offered)).all() and ((found > 0).sum(1) <= k).all()


@pytest.fixture(scope="module")
def multiplying():
    """The kernels with the product for 256-bit vectors, also where the processor has wider ones and they go unused."""
    with pytest.MonkeyPatch.context() as patch:
        if native.library() is not None and not ctypes.c_long.in_dll(native.library(), "wide").value:
            narrow = native._loaded(["cc", "-mno-avx512f"])
            patch.setattr(native, "library", lambda: narrow)
        if native.library() is None or not ctypes.c_long.in_dll(native.library(), "wide").value:
            pytest.skip("no kernels, or no vectors of 256 bits")
        yield


@settings(max_examples=150, deadline=None)
@given(
    seeds, st.integers(1, 700), st.integers(4, 300), st.integers(1, 9), st.sampled_from([1, 3, 8, 130, 256, 257, 600]),
    st.booleans(), st.sampled_from(["random", "close", "uneven", "spiky", "zeros", "equal", "small"]),
)  # fmt: skip
def test_the_compiled_encoder_finds_what_a_plain_one_does(multiplying, seed, rows, n, k, d, biased, how):
    _, W, generator = case(seed, rows, n, d, dtype=torch.float32)
    x, k = torch.randn(rows, d, generator=generator), min(k, n // 4)
    bias = torch.randn(n, generator=generator) * 10 ** (seed % 7 - 3) if biased else None
    match how:
        case "close":  # nearer to each other than numbers of 16 bits can tell
            W = W[:1] + 1e-5 * W
        case "uneven":
            W, x = (
                W * 10 ** (5 * torch.rand(n, 1, generator=generator)),
                x * 10 ** (5 * torch.rand(rows, 1, generator=generator) - 2),
            )
        case "spiky":
            W[torch.rand(n, d, generator=generator) < 0.05] *= 1e4
            x[:, 0] *= 1e4
        case "zeros":
            W[::2], x[::3] = 0, 0
        case "equal":
            W[:] = W[:1].clone()
        case "small":
            W, x = W * 1e-3, x * 1e-4
    values, indices = native.encode(x, W, bias, k)
    exact = x.double() @ W.double().T + (0 if bias is None else bias.double())
    size = x.double().norm(dim=1)[:, None] * W.double().norm(dim=1) + (0 if bias is None else bias.abs())
    rounding = 2e-7 * d**0.5 * size  # of an unlucky sum in float32
    chosen = exact.gather(1, indices)
    assert ((values - chosen).abs() <= rounding.gather(1, indices)).all()
    assert all(len(set(row)) == k for row in indices.tolist())
    assert (values.diff(dim=1) <= 0).all()
    left_out = torch.ones_like(exact, dtype=torch.bool).scatter_(1, indices, False)
    least = (chosen + rounding.gather(1, indices)).amin(1, keepdim=True)
    assert ((exact - rounding <= least) | ~left_out).all()  # whatever is left out could not be better
    again = native.encode(x[rows // 2 :], W, bias, k)  # whichever rows are beside it, a row's bits are the same
    assert torch.equal(again[0], values[rows // 2 :]) and torch.equal(again[1], indices[rows // 2 :])


@pytest.mark.parametrize("where", ["x", "W", "bias"])
@pytest.mark.parametrize("what", [torch.nan, torch.inf, 1e-20, 1e20])
def test_the_compiled_encoder_leaves_what_it_cannot_bound_to_torch(multiplying, where, what):
    generator = torch.Generator().manual_seed(0)
    given = {"x": torch.randn(9, 5, generator=generator), "W": torch.randn(40, 5, generator=generator)}
    given["bias"] = torch.randn(40, generator=generator)
    changed = given[where][0] if where != "bias" else given[where]
    changed.fill_(what)
    found = native.encode(given["x"], given["W"], given["bias"], 3)
    assert (found is None) == (where != "bias" or not math.isfinite(what))
    values, indices, _ = ops.encode(given["x"], ops.Encoder(given["W"], given["bias"]), 3, torch.arange(0), 0)
    pre = torch.addmm(given["bias"], given["x"], given["W"].T)
    torch.testing.assert_close(values, pre.gather(1, indices), equal_nan=True)
    torch.testing.assert_close(values, pre.topk(3).values, equal_nan=True)


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_shows_what_is_not_a_number(sign):
    x, z = torch.ones(3, 40), torch.empty(3, 40)
    x[1, 7] = math.copysign(math.nan, sign)
    ops.largest(x, 2, z)
    assert z[1].isnan().any() and not z[[0, 2]].isnan().any()


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 200), st.integers(1, 90), st.integers(1, 12), st.integers(1, 40), dtypes)
def test_residuals_and_sorted_pairs_are_what_they_say(seed, rows, n, k, d, dtype):
    k = min(k, n)
    scores, W, generator = case(seed, rows, n, d, dtype=dtype)
    z, indices = scores.topk(k)
    x = torch.randn(rows, d, generator=generator, dtype=dtype)
    left = x - torch.zeros_like(scores).scatter(1, indices, z) @ W
    torch.testing.assert_close(ops.residuals(x, z, indices, W), left, rtol=1e-4, atol=1e-4)
    if native.library() is not None:
        starts, order = native.sorted_pairs(indices, n)
        latents, expected = indices.reshape(-1).sort(stable=True)
        assert torch.equal(order, expected)
        assert torch.equal(starts, torch.searchsorted(latents, torch.arange(n + 1)))


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 80), st.integers(1, 12), st.integers(1, 9), st.integers(1, 2))
def test_decode_and_gradients_equal_dense_products(seed, rows, n, k, d, sets):
    k = min(k, n)
    x, W, generator = case(seed, rows, n, d)
    values, indices = x.topk(k)
    z = torch.stack([values.relu() * (0.5 + s) for s in range(sets)])
    g = torch.randn(sets, rows, d, generator=generator, dtype=torch.float64)
    source = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    dense = [torch.zeros_like(x).scatter(1, indices, row) for row in z]
    torch.testing.assert_close(ops.decode(z[0], indices, W), dense[0] @ W, rtol=1e-12, atol=1e-12)
    factors = torch.randn(sets, rows, generator=generator, dtype=torch.float64)
    scaled = g * factors[..., None]
    d_pre = sum((grad @ W.T) * (active > 0) for grad, active in zip(scaled, dense, strict=True))
    expected = sum(active.T @ grad for grad, active in zip(scaled, dense, strict=True)), d_pre.T @ source, d_pre.sum(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):  # float32 is where kernels are compiled
        found = [torch.full((n, d), torch.nan, dtype=dtype) for _ in range(2)]
        latent = ops.gradients(indices, *(t.to(dtype) for t in (z, g, factors, source, W)), *found)
        for one, other in zip((*found, latent), expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["compiled", "plain"])
def test_update_is_adam_then_unit_norm_then_average(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50, 7, generator=generator, dtype=dtype))
    weight.data /= weight.data.norm(dim=1, keepdim=True)
    reference = torch.nn.Parameter(weight.detach().double().clone())
    adam = torch.optim.Adam([reference], lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    moments, average, mean = [torch.zeros_like(weight) for _ in range(2)], torch.zeros_like(weight), 0
    for step in range(1, 6):
        gradient = torch.randn(50, 7, generator=generator, dtype=torch.float64)
        weight.grad = gradient.to(dtype)
        ops.update(weight, *moments, average, ops.Adam(0.01, 0.9, 0.999, 1e-8, 0.9, step, 0.5), project=True, unit=True)
        along = (gradient * reference.data).sum(1, keepdim=True)
        reference.grad = 0.5 * (gradient - along * reference.data)
        adam.step()
        reference.data /= reference.data.norm(dim=1, keepdim=True)
        mean = 0.9 * mean + 0.1 * reference.data
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(weight.data.double(), reference.data, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(average.double(), mean, rtol=tolerance, atol=tolerance)
    assert (weight.norm(dim=1) - 1).abs().max() < 1e-6
