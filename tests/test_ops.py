"""The fast operations against their slow, obvious forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelib import ops

seeds = st.integers(0, 2**31)


def case(seed, rows, n, k, d=5, ties=False):
    """Random scores, weights and matrices in float64; with ties, from few distinct values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    return (x * 2).round() if ties else x, torch.randn(n, d, generator=generator, dtype=torch.float64), generator


@settings(max_examples=150, deadline=None)
@given(
    seeds, st.integers(1, 9), st.sampled_from([1, 7, 64, 96, 512, 1024, 4096, 4100]), st.integers(1, 70), st.booleans()
)
def test_topk_finds_what_torch_finds(seed, rows, n, k, ties):
    x, _, _ = case(seed, rows, n, k, ties=ties)
    k = min(k, n)
    values, indices = ops.topk(x, k)
    assert torch.equal(values, x.topk(k).values)
    assert torch.equal(x.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


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
@given(seeds, st.integers(1, 9), st.integers(1, 300), st.integers(1, 80), st.booleans(), st.sampled_from([32, 64]))
def test_largest_keeps_k_positive_values_of_some_columns(seed, rows, n, k, ties, bits):
    x, _, generator = case(seed, rows, n, 1, ties=ties)
    x = x.to(torch.float32 if bits == 32 else torch.float64)
    columns = torch.randperm(n, generator=generator)[: n // 2 + 1]
    found, offered = ops.largest(x, columns, k), x[:, columns].relu()
    k = min(k, len(columns))
    assert torch.equal(found.topk(k).values, offered.topk(k).values)
    assert ((found == 0) | (found == offered)).all() and ((found > 0).sum(1) <= k).all()


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 80), st.integers(1, 12), st.integers(1, 9), st.integers(1, 2))
def test_decode_and_gradients_equal_dense_products(seed, rows, n, k, d, sets):
    k = min(k, n)
    x, W, generator = case(seed, rows, n, k, d)
    values, indices = x.topk(k)
    z = torch.stack([values.relu() * (0.5 + s) for s in range(sets)])
    g = torch.randn(sets, rows, d, generator=generator, dtype=torch.float64)
    source = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    dense = [torch.zeros_like(x).scatter(1, indices, row) for row in z]
    torch.testing.assert_close(ops.decode(z[0], indices, W), dense[0] @ W, rtol=1e-12, atol=1e-12)
    d_pre = sum((grad @ W.T) * (active > 0) for grad, active in zip(g, dense, strict=True))
    expected = sum(active.T @ grad for grad, active in zip(g, dense, strict=True)), d_pre.T @ source, d_pre.sum(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):  # float32 is where kernels are compiled
        found = [torch.full((n, d), torch.nan, dtype=dtype) for _ in range(2)]
        latent = ops.gradients(indices, *(t.to(dtype) for t in (z, g, source, W)), *found)
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
