"""Laws that were planted are found again; the stored sweep is read as it was written."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from saelib import report, scaling
from saelib.profile import Recipe
from saelib.scaling import Joint, Power

N, K = (axis.ravel() for axis in np.meshgrid([128.0, 256, 512, 1024, 2048, 4096], [4.0, 8, 16, 32]))
PLANTED = Joint(alpha=-0.5, beta_k=0.26, beta_n=-0.017, gamma=-0.042, zeta=-2.3, eta=-0.085)
X = np.geomspace(1e2, 1e6, 9)


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [Power(0.3, 0.25), Power(0.3, 0.25, math.log(0.05)), Power(-1.0, 0.6, math.log(1e-3))])
def test_a_planted_power_law_is_recovered(law):
    found = scaling.fit_power(X, law(X), floor=math.isfinite(law.log_floor))
    assert found == pytest.approx(law, abs=1e-4)


def test_a_planted_joint_law_is_recovered():
    found = scaling.fit_joint(N, K, PLANTED(N, K))
    assert found == pytest.approx(PLANTED, abs=2e-3)
    assert found.at(16).log_floor == pytest.approx(-2.3 - 0.085 * math.log(16), abs=1e-3)
    assert found.at(16).exponent == pytest.approx(0.017 + 0.042 * math.log(16), rel=1e-3)


def test_the_joint_law_is_the_paper_s_equation():
    n, k, one = 512.0, 16.0, PLANTED
    falling = one.alpha + one.beta_k * math.log(k) + one.beta_n * math.log(n) + one.gamma * math.log(k) * math.log(n)
    assert one(n, k) == pytest.approx(math.exp(falling) + math.exp(one.zeta + one.eta * math.log(k)), rel=1e-12)


def test_a_stray_run_moves_the_law_little():
    error = Power(0.3, 0.25)(X)
    error[-1] *= 1.5
    least_squares = -np.polyfit(np.log(X), np.log(error), 1)[0]
    assert abs(scaling.fit_power(X, error).exponent - 0.25) < 0.3 * abs(least_squares - 0.25)


def test_refits_of_a_perfect_law_do_not_move_and_noise_moves_them():
    law, draw = Power(0.3, 0.25), np.random.default_rng(0)
    still = scaling.fit(scaling.fit_power, (X,), law(X))
    assert all(one == pytest.approx(law, abs=1e-6) for one in still.again) and still.worst < 1e-6
    noisy = scaling.fit(scaling.fit_power, (X,), law(X) * np.exp(draw.normal(0, 0.02, len(X))))
    value, se, low, high = noisy.reading(lambda one: one.exponent)
    by_the_book = 0.02 / math.sqrt(np.square(np.log(X) - np.log(X).mean()).sum())
    assert 0.4 * by_the_book < se < 2.5 * by_the_book and low < 0.25 < high and low < value < high


def test_points_of_one_run_keep_or_change_their_sign_together():
    run = np.repeat([0, 1, 2], 3)
    error = Power(0.3, 0.25)(X) * np.exp(np.array([0.05, -0.1, 0.05])[run])
    found = scaling.fit(scaling.fit_power, (X,), error, run)
    assert 1 < len({round(law.exponent, 6) for law in found.again}) <= 2**3


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Three variants, one of which was not run; the first has two seeds, the second still falls."""
    variants = {f"n{n}-k4": {"recipe.n_latents": n, "recipe.k": 4} for n in (16, 32, 64)}
    monkeypatch.setattr(scaling, "grid", lambda: {"base": {}, "variants": variants})
    monkeypatch.setattr(report, "ROOT", tmp_path)
    folder = tmp_path / "results" / "toy" / "07_sweep"
    folder.mkdir(parents=True)
    for name, mse in {"n16-k4": [[0.5, 0.4, 0.399], [0.5, 0.42, 0.419]], "n32-k4": [[0.6, 0.3, 0.296]]}.items():
        values = {"tokens": [100, 300, 400], "mse": mse, "se": mse, "dead": [[0.0] * 3] * len(mse)}
        content = {"values": {key: {"value": value} for key, value in values.items()}}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return scaling.curves("toy", d_model=8)


def test_curves_have_a_row_for_each_point_of_each_seed(sweep):
    assert len(sweep) == 9 and sweep.groupby(["n", "seed"]).ngroups == 3
    assert sweep.flops.iloc[0] == 2 * 8 * (16 + 4 * 4) * 100


def test_converged_is_a_fall_below_a_per_cent_over_the_last_quarter(sweep):
    ends = scaling.ends(sweep).set_index("n")
    assert ends.fall[16] == pytest.approx((0.001 / 0.4 + 0.001 / 0.42) / 2) and ends.fall[32] == pytest.approx(
        0.004 / 0.3
    )
    assert ends.converged.to_dict() == {16: True, 32: False}
    assert ends.mse[16] == pytest.approx(0.409) and ends.seeds.to_dict() == {16: 2, 32: 1}
    assert ends.spread[16] == pytest.approx(math.log(0.419 / 0.399) / math.sqrt(2)) and math.isnan(ends.spread[32])


def test_a_sweep_that_nobody_ran_is_empty(sweep):
    nothing = scaling.ends(scaling.curves("another", d_model=8))
    assert nothing.empty and scaling.joint_law(nothing) is None and scaling.foretold(nothing) is None


def test_nothing_beats_the_frontier_with_as_little_compute(sweep):
    draw = np.random.default_rng(0)
    points = pd.DataFrame({"flops": draw.integers(1, 50, 200), "mse": draw.random(200)})
    edge = scaling.frontier(points)
    slow = [i for i, one in points.iterrows() if not ((points.flops <= one.flops) & (points.mse < one.mse)).any()]
    assert sorted(edge.index) == slow and edge.flops.is_monotonic_increasing


def runs_of(law, sizes=6):
    table = pd.DataFrame({"n": N.astype(int), "k": K.astype(int), "mse": law(N, K)})
    return table[table.n < 128 * 2**sizes]


def test_held_out_points_of_a_planted_law_are_foretold_without_being_read(monkeypatch):
    monkeypatch.setattr(scaling, "REFITS", 3)
    runs = runs_of(PLANTED)
    told = scaling.foretold(runs)
    assert set(told.n) == {4096} and told.off.abs().max() < 1e-3
    runs.loc[runs.n == 4096, "mse"] *= 2
    assert scaling.foretold(runs).predicted.to_numpy() == pytest.approx(told.predicted.to_numpy())


def test_no_joint_law_with_fewer_than_twelve_runs(monkeypatch):
    monkeypatch.setattr(scaling, "REFITS", 3)
    eight, twelve = runs_of(PLANTED, sizes=2), runs_of(PLANTED, sizes=3)
    assert scaling.joint_law(eight) is None and scaling.joint_law(twelve[1:]) is None
    assert scaling.foretold(twelve) is None and scaling.joint_law(twelve) is not None


def test_no_power_law_of_two_points():
    assert scaling.power_laws(runs_of(PLANTED, sizes=2).groupby("k"), "n") == {}


# --- FLOPs and money --------------------------------------------------------------------------------------------------


def test_the_dense_count_is_what_pytorch_does():
    from torch.utils.flop_counter import FlopCounterMode

    n, d, batch = 32, 8, 5
    W_enc, W_dec = (torch.randn(shape, requires_grad=True) for shape in ((d, n), (n, d)))
    pre_bias = torch.zeros(d, requires_grad=True)  # as in training: the gradient passes through the encoder, too
    with FlopCounterMode(display=False) as counted:
        ((torch.randn(batch, d) - pre_bias) @ W_enc @ W_dec).sum().backward()
    assert counted.get_total_flops() == batch * scaling.flops(n, 4, d, dense=True)


def test_the_sparse_count_is_the_encoder_when_k_is_small_and_never_more_than_the_dense():
    assert scaling.flops(2**24, 32, 8192) == pytest.approx(2 * 2**24 * 8192, rel=1e-4)
    assert scaling.flops(64, 32, 16) < scaling.flops(64, 32, 16, dense=True)


def test_the_bill_adds_up():
    bill = scaling.bill({"16M": 2**24}, 32, 8192, 4e10, 7e10, 1.5e13, 7.2e17)["16M"]
    assert bill["parameters"] == 2 * 2**24 * 8192 + 8192
    whole = bill["training, FLOPs"] + bill["reading the activations, FLOPs"]
    assert bill["dollars, training and reading"] == pytest.approx(whole / 4e14 / 3600 * 2.0)
    assert bill["training, over the model's"] == pytest.approx(bill["training, FLOPs"] / (6 * 7e10 * 1.5e13))


# --- one run ----------------------------------------------------------------------------------------------------------


def test_milestones_hold_three_quarters_and_the_end():
    steps = scaling.milestones(8000, 1000, 10)
    assert {100, 600, 800} <= set(steps) and steps == sorted(set(steps)) and max(steps) == 800


class Noise:
    d_model, identity = 8, "noise"

    def batches(self, batch, seed, start=0):
        draw = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(batch, 8, generator=draw)

    def sample(self, n, seed):
        return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def test_a_point_on_the_way_is_the_end_of_a_shorter_run():
    judged = [torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(9))]
    recipe = Recipe(n_latents=16, k=2, tokens=640, batch=32, k_aux=0)
    long = scaling.trajectory(Noise(), recipe, 0, judged, 320)
    short = scaling.trajectory(Noise(), recipe.model_copy(update={"tokens": 320}), 0, judged, 320)
    assert next(point for point in long if point.tokens == 320) == short[-1]
