"""Conventions of normalised MSE against slow formulas, a planted giant, and where the error sits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelib import metrics
from saelib import reconstruction as rec
from saelib.metrics import NormalizedMse, in_unit_space, squared_error

CONVENTIONS = pytest.mark.parametrize("convention", rec.WALK.values(), ids=rec.WALK)


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slowly(x, x_hat, convention, first=0):
    """The formula itself: vectors moved, scaled and averaged one by one."""
    moved, errors = [], []
    for token, rebuilt in zip(x[:, first:].flatten(0, 1), x_hat[:, first:].flatten(0, 1), strict=True):
        mean = token.mean() if convention.centred else 0.0
        length = (token - mean).norm() if convention.scaled else 1.0
        moved.append((token - mean) / length)
        errors.append((((token - mean) / length - (rebuilt - mean) / length) ** 2).sum())
    moved = torch.stack(moved)
    ends = moved.view(len(x), -1, x.shape[-1])[:, -1]
    about = {"mean": moved.mean(0), "last": ends.mean(0), "zero": 0.0}[convention.about]
    return (sum(errors) / ((moved - about) ** 2).sum()).item()


def measured(x, x_hat, convention, cuts=(), first=0):
    ruler = rec.Ruler(x.tensor_split(sorted(cuts)), first=first)
    return ruler.measure(squared_error(x, x_hat), convention)


# --- conventions ------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(2, 9), st.integers(2, 6), st.integers(3, 6))


@settings(max_examples=30, deadline=None)
@given(seeds, sizes, st.lists(st.integers(0, 9), max_size=4), st.sampled_from([*rec.WALK.values()]), st.integers(0, 1))
def test_in_any_batches_it_is_the_formula(seed, size, cuts, convention, first):
    x, x_hat = 2 + data(*size, seed=seed), 1 + data(*size, seed=seed + 1)
    found = measured(x, x_hat, convention, cuts, first)
    assert found.value == pytest.approx(slowly(x, x_hat, convention, first), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(seeds, sizes, st.floats(-50, 50), st.floats(1e-3, 1e3))
def test_in_the_papers_the_mean_costs_one_and_the_identity_nothing(seed, size, shift, width):
    """The mean is that of the normalised activations, at each token's own mean and scale."""
    x = shift + width * data(*size, seed=seed) * (1 + data(*size[:2], 1, seed=seed + 1).abs())
    centred = x - x.mean(-1, keepdim=True)
    norm = centred.norm(dim=-1, keepdim=True)
    mean = (centred / norm).mean((0, 1)) * norm + x.mean(-1, keepdim=True)
    assert measured(x, mean, rec.PAPER).value == pytest.approx(1, abs=1e-6)
    assert measured(x, x, rec.PAPER) == (0, 0)


def test_the_papers_is_that_of_the_metrics():
    x, x_hat = 3 + data(20, 4, 8), 3 + data(20, 4, 8, seed=1)
    mse = NormalizedMse()
    mse.add(*in_unit_space(x, x_hat))
    assert measured(x, x_hat, rec.PAPER) == pytest.approx(mse.result(), rel=1e-9)


def test_the_readmes_is_a_mean_of_ratios(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 1)
    x, x_hat = 3 + data(20, 4, 8), 3 + data(20, 4, 8, seed=1)
    ratios = (x - x_hat).square().sum(-1) / x.square().sum(-1)
    found = measured(x, x_hat, rec.README)
    assert found.value == pytest.approx(ratios.mean().item(), rel=1e-12)
    assert found.se == pytest.approx((ratios.mean(1).std() / 20**0.5).item(), rel=1e-9)


def test_the_peers_is_what_variance_explained_leaves():
    """R squared of scikit-learn, weighted by each entry's variance."""
    from sklearn.metrics import r2_score

    x, x_hat = 3 + data(20, 4, 8), 3 + data(20, 4, 8, seed=1)
    explained = r2_score(x.flatten(0, 1).numpy(), x_hat.flatten(0, 1).numpy(), multioutput="variance_weighted")
    assert 1 - measured(x, x_hat, rec.PEERS).value == pytest.approx(explained, rel=1e-9)


@CONVENTIONS
def test_standard_errors_are_those_of_a_bootstrap_over_contexts(convention, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 1)
    contexts, pos = 300, 6
    x = data(contexts, pos, 5) * data(contexts, 1, 1, seed=2).exp() + data(contexts, 1, 5, seed=3)
    x[:, -1] += 3
    x_hat = x + 0.4 * data(contexts, pos, 5, seed=4) * data(contexts, 1, 1, seed=5).exp()
    rng, again = np.random.default_rng(0), []
    for _ in range(250):
        chosen = torch.from_numpy(rng.integers(0, contexts, contexts))
        again.append(measured(x[chosen], x_hat[chosen], convention).value)
    assert measured(x, x_hat, convention).se == pytest.approx(np.std(again, ddof=1), rel=0.15)


@CONVENTIONS
def test_units_do_not_matter(convention):
    x, x_hat = data(30, 8, 6), 0.7 * data(30, 8, 6)
    for factor in (1e-3, 30.0):
        scaled = measured(factor * x, factor * x_hat, convention)
        assert scaled == pytest.approx(measured(x, x_hat, convention), rel=1e-9)


def test_shares_average_to_the_whole():
    x, error = 1 + data(12, 5, 4), data(12, 5, seed=1).square()
    ruler = rec.Ruler([x], first=1)
    for convention in rec.WALK.values():
        shares = ruler.shares(error, convention)
        assert shares.shape == (12, 4)
        assert shares.mean().item() == pytest.approx(ruler.measure(error, convention).value, rel=1e-12)


# --- a giant, planted -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise():
    """Activations without any structure, and errors of a tenth of their squared length."""
    x = data(400, 64, 128)
    return x, squared_error(x, x + 0.1**0.5 * data(400, 64, 128, seed=1))


def test_a_giant_makes_the_journals_error_fifteen_times_too_good(noise):
    """Position 0, 30 times as long, always the same, rebuilt to 1e-4: (63 * 0.1 + 900e-4) / (63 + 900)."""
    found = rec.with_giant(*noise, times=30, exact=1e-4)
    assert found[rec.JOURNAL].value == pytest.approx(0.0066, abs=0.00015)
    assert found[rec.PAPER].value == pytest.approx(0.1, rel=0.02)


def test_length_alone_moves_neither(noise):
    x, error = noise
    short, long = rec.with_giant(x, error, 1, None), rec.with_giant(x, error, 30, None)
    assert long[rec.PAPER].value == pytest.approx(short[rec.PAPER].value, rel=1e-9)
    assert long[rec.JOURNAL].value == pytest.approx(short[rec.JOURNAL].value, rel=0.03)


def test_exactness_alone_moves_both_by_one_token_in_64(noise):
    honest = rec.Ruler([noise[0]])
    for convention, found in rec.with_giant(*noise, times=1, exact=1e-4).items():
        assert found.value == pytest.approx(honest.measure(noise[1], convention).value, rel=0.03)


def test_planting_leaves_all_else_alone(noise):
    x, error = noise[0][:6], noise[1][:6]
    for exact in (None, 1e-4):
        giant, with_it = rec.plant(x, error, 30, exact)
        assert torch.equal(giant[:, 1:], x[:, 1:]) and torch.equal(with_it[:, 1:], error[:, 1:])
        assert giant[:, 0].norm(dim=-1).numpy() == pytest.approx(30 * x[:, 1:].norm(dim=-1).mean().item())
    assert torch.equal(giant[:1, 0].expand(6, -1), giant[:, 0]), "the same everywhere"
    assert with_it[:, 0] / giant[:, 0].square().sum(-1) == pytest.approx(1e-4)


def test_the_implied_length_is_the_planted_one(noise):
    found = rec.with_giant(*noise, times=30, exact=0.0)
    honest = rec.Ruler([noise[0]], first=1).measure(noise[1], rec.JOURNAL).value
    assert rec.implied_ratio(honest, found[rec.JOURNAL].value, 64) == pytest.approx(30, rel=0.01)
    assert rec.implied_ratio(honest, 1.1 * honest, 64) is None, "no giant makes an error larger"


# --- where the error sits ---------------------------------------------------------------------------------------------


def test_norms_of_a_giant_that_is_always_the_same():
    x = data(200, 4, 16)
    x /= x.norm(dim=-1, keepdim=True)
    x[:, 0] = 7 * x[:1, 0]
    found = rec.norms(x.split(64))
    assert found.ratio == pytest.approx((7, 0), abs=1e-9)
    assert found.alike[0].item() == pytest.approx(1) and (found.alike[1:] < 0.2).all()


def test_groups_go_from_edge_to_edge():
    by = torch.tensor([[0.0, 1, 1, 5], [1, 9, 1, -3]])
    found = rec.grouped(2 * by, by, edges=[0, 1, 2, 5])
    assert found.at == pytest.approx([0, 1, 7])
    assert [one.value for one in found.values] == pytest.approx([2 * at for at in found.at])
    only = rec.grouped(2 * by, by, edges=[0, 1, 2, 5], where=by < 5)
    assert only.at == [0, 1], "a group without tokens is left out"


def test_occurrences_are_counted_in_the_other_text():
    tokens, text = torch.tensor([[3, 0, 7]]), torch.tensor([[3, 3, 1, 0]])
    assert rec.occurrences(tokens, text).tolist() == [[500_000, 250_000, 125_000]]


def test_a_control_that_was_not_trained_is_none(tmp_path):
    from saelib.profile import load_profile

    profile = load_profile("docstring-gpt")
    absent = profile.saes["small-step-0"].model_copy(update={"path": tmp_path / "absent"})
    profile = profile.model_copy(update={"name": "nowhere", "saes": {"small-step-0": absent}})
    assert rec.control(profile, "small-step-0") is None and rec.control(profile, "unheard-of") is None
