"""Normalised MSE with its standard error, and the evaluation of an SAE whose answers are known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelib.metrics import NormalizedMse, evaluate
from saelib.sae import SAE


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(x, x_hat, cuts=()):
    """The estimate from contexts that come in batches, cut before the given numbers."""
    mse = NormalizedMse()
    for one, other in zip(x.tensor_split(sorted(cuts)), x_hat.tensor_split(sorted(cuts)), strict=True):
        mse.add(one, other)
    return mse.result()


sizes = st.tuples(st.integers(2, 12), st.integers(1, 6), st.integers(1, 5))
seeds = st.integers(0, 2**31)


@settings(max_examples=60, deadline=None)
@given(seeds, sizes, st.floats(-50, 50), st.floats(1e-3, 1e3))
def test_the_mean_costs_one_and_the_identity_nothing(seed, size, shift, width):
    x = shift + width * data(*size, seed=seed)
    mean = x.mean((0, 1)).expand_as(x)
    value, se = measured(x, mean)
    assert value == pytest.approx(1, abs=1e-6) and se == pytest.approx(0, abs=1e-5)
    assert measured(x, x) == (0, 0)


@settings(max_examples=40, deadline=None)
@given(seeds, sizes, st.lists(st.integers(0, 12), max_size=4))
def test_batches_do_not_matter(seed, size, cuts):
    x, x_hat = data(*size, seed=seed), data(*size, seed=seed + 1)
    assert measured(x, x_hat, cuts) == pytest.approx(measured(x, x_hat), rel=1e-12)


def test_a_constant_offset_costs_its_square_over_the_spread():
    x, offset = 5 + data(40, 3, 8), data(8, seed=1)
    spread = (x - x.mean((0, 1))).square().sum(-1).mean()
    assert measured(x, x + offset).value == pytest.approx((offset.square().sum() / spread).item(), rel=1e-12)
    assert measured(x, x + 2 * offset).value == pytest.approx(4 * measured(x, x + offset).value, rel=1e-12)


def test_contexts_of_different_lengths_count_by_their_tokens():
    long, short = data(4, 9, 3), data(6, 2, 3, seed=1)
    mse = NormalizedMse()
    for x in (long, short):
        mse.add(x, 0.5 * x)
    tokens = torch.cat([long.reshape(-1, 3), short.reshape(-1, 3)])
    expected = (0.25 * tokens.square().sum()) / (tokens - tokens.mean(0)).square().sum()
    assert mse.result().value == pytest.approx(expected.item(), rel=1e-12)


def test_single_precision_far_from_zero_loses_nothing():
    x = (1000 + data(50, 4, 6)).float()
    exact = (x.double() - x.double().mean((0, 1))).square().sum()
    assert measured(x, x + 0.5).value == pytest.approx((0.25 * x.numel() / exact).item(), rel=1e-9)


def test_the_standard_error_is_that_of_a_bootstrap_over_contexts():
    """Contexts differ in size of error and in spread; treating tokens as independent would give far less."""
    contexts, pos = 400, 16
    noise = data(contexts, 1, 1, seed=1).exp()
    x = data(contexts, 1, 5) + data(contexts, pos, 5, seed=2) * noise
    x_hat = x + 0.3 * noise * data(contexts, pos, 5, seed=3) * data(contexts, 1, 1, seed=4).exp()
    value, se = measured(x, x_hat)
    rng, found = np.random.default_rng(0), []
    for _ in range(1000):
        chosen = torch.from_numpy(rng.integers(0, contexts, contexts))
        found.append(measured(x[chosen], x_hat[chosen]).value)
    assert se == pytest.approx(np.std(found, ddof=1), rel=0.1)
    tokens = measured(x.reshape(-1, 1, 5), x_hat.reshape(-1, 1, 5))
    assert tokens.value == pytest.approx(value, rel=1e-12) and tokens.se < 0.7 * se


def handmade(architecture, normalize="none"):
    """Latents for both directions of the first three of four axes: the fourth is lost. Two more never fire."""
    sae = SAE(8, 4, 2, architecture=architecture, normalize=normalize)
    rows = torch.zeros(8, 4)
    rows[:3, :3], rows[3:6, :3] = torch.eye(3), -torch.eye(3)
    sae.W_enc.data.copy_(rows)
    sae.W_dec.data.copy_(rows)
    return sae.eval()


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_evaluation_of_an_sae_with_known_answers(architecture):
    """A context's tokens: one along an axis, one between two axes, one along the axis that is lost."""
    x = torch.tensor([[[2.0, 0, 0, 0], [0, 3, -4, 0], [0, 0, 0, -5]], [[-2, 0, 0, 0], [0, -3, 4, 0], [0, 0, 0, 5.0]]])
    found = evaluate(handmade(architecture), [x[:1], x[1:]])
    assert found["l0"] == pytest.approx((1 + 2 + 0) / 3) and found["tokens"] == 6
    assert found["dead_fraction"] == pytest.approx(2 / 8)
    # in the paper's space each token has norm 1 and their mean is 0; the lost one is 25 / (25 - 25 / 4) away
    assert found["normalized_mse"] == pytest.approx((4 / 3) / 3, rel=1e-6)
    half = evaluate(handmade(architecture), [x[:1]])
    assert half["dead_fraction"] == pytest.approx(5 / 8)


def test_evaluation_measures_after_normalisation():
    """A token a hundred times as large costs no more: what is lost is a share of a unit vector."""
    sae = SAE(64, 6, 3, seed=1).eval()
    x = data(9, 4, 6).float()
    scaled = x * data(9, 4, 1, seed=2).float().mul(3).exp() + 7
    one, other = evaluate(sae, [x]), evaluate(sae, [scaled])
    assert one["normalized_mse"] == pytest.approx(other["normalized_mse"], rel=1e-3) and one["l0"] == other["l0"]
    normalized, _, _ = sae.normalized(x)
    bare = SAE(64, 6, 3, seed=1, normalize="none").eval()
    assert evaluate(bare, [normalized])["normalized_mse"] == pytest.approx(one["normalized_mse"], rel=1e-4)
