"""Normalised MSE with its standard error, and the evaluation of an SAE whose answers are known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelib import UserError, metrics
from saelib.metrics import NormalizedMse, blocks, evaluate, mean, median, ratio, reconstruct
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


def test_the_standard_error_is_that_of_a_bootstrap_over_contexts(monkeypatch):
    """Contexts differ in size of error and in spread; treating tokens as independent would give far less."""
    monkeypatch.setattr(metrics, "BLOCK", 1)
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


def documents(n, seed):
    """A value for each of n contexts that lie three to a document, and what its document has to do with it."""
    shared = data(n // 3 + 2, seed=seed).repeat_interleave(3)
    return (shared[seed % 3 :][:n] + 0.3 * data(n, seed=seed + 10_000))[:, None] + data(n, 4, seed=seed + 20_000)


def test_neighbours_from_one_document_are_no_independent_witnesses(monkeypatch):
    samples = [documents(200, seed) for seed in range(400)]
    truth = torch.tensor([sample.mean() for sample in samples]).std().item()
    assert np.mean([mean(sample).se for sample in samples]) == pytest.approx(truth, rel=0.1)
    monkeypatch.setattr(metrics, "BLOCK", 1)
    assert np.mean([mean(sample).se for sample in samples]) < 0.7 * truth


@given(st.integers(1, 300))
def test_blocks_hold_everything_and_are_not_too_few(n):
    sums = blocks(torch.ones(n, 2))
    assert sums.sum() == 2 * n and len(sums) >= min(n, 8) and sums.max() <= 8


def test_standard_error_of_a_ratio():
    whole = 2 + data(400, 200, 8)
    part = 0.3 * whole + data(400, 200, 8, seed=1)
    found = [ratio(a, b) for a, b in zip(part, whole, strict=True)]
    spread = np.std([value for value, _ in found])
    assert np.mean([se for _, se in found]) == pytest.approx(spread, rel=0.1)
    assert ratio(whole[0] / 4, whole[0]) == pytest.approx((0.25, 0))


def test_standard_error_of_a_median():
    """On average that of medians of fresh draws, here the textbook's for a bell; the median itself is the usual one."""
    found = [median(data(500, seed=seed)) for seed in range(200)]
    expected = math.sqrt(math.pi / 2 / 500)
    assert np.mean([one.se for one in found]) == pytest.approx(expected, rel=0.05)
    assert np.std([one.value for one in found]) == pytest.approx(expected, rel=0.15)
    assert found[0].value == pytest.approx(np.median(data(500)))
    assert median(torch.tensor([1.0] * 9 + [2.0])) == (1, 0) and median(torch.tensor([3.0])) == (3, 0)


def test_means_count_what_they_are_told_to_and_nothing_hides():
    values = torch.tensor([[1.0, math.nan], [3, 5], [math.inf, 7]])
    where = torch.tensor([[True, False], [True, True], [False, True]])
    assert mean(values, where).value == 4 and math.isnan(mean(values).value)
    assert math.isnan(mean(values, where & False).value)


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


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_one_pass_keeps_every_token_and_every_latent(architecture, monkeypatch):
    sae = SAE(64, 8, 3, architecture=architecture, seed=1).eval()
    x = 2 + data(10, 5, 8).float()
    found = reconstruct(sae, x.split(4))
    assert found.error.numpy() == pytest.approx((x - sae(x)).double().square().sum(-1).detach().numpy(), rel=1e-3)
    fires = (sae.encode(x, dense=True).values > 0).double()
    assert found.rate.numpy() == pytest.approx(fires.mean((0, 1)).numpy(), abs=1e-6)
    assert torch.equal(found.active, fires.sum(-1)) and found.dead == (fires.sum((0, 1)) == 0).double().mean()
    monkeypatch.setattr(metrics, "LATENTS", 64 * 5 * 3)  # three contexts at a time
    for one, other in zip(found[:3], reconstruct(sae, [x])[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_an_sae_of_another_width_is_refused():
    with pytest.raises(UserError, match="the SAE reads vectors of 8 entries, not 6: take one of this model") as caught:
        reconstruct(SAE(16, 8, 3), [data(2, 4, 6).float()])
    assert "\n" not in str(caught.value)
