"""The search for a loss among checkpoints, against full scans of curves with known answers."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from scipy.interpolate import PchipInterpolator
from sklearn.isotonic import IsotonicRegression

from saelib import UserError, checkpoints, metrics
from saelib.metrics import Estimate
from saelib.models import load_model
from saelib.profile import load_profile
from saelib.report import reported
from saelib.text import contexts


@dataclass
class Fake:
    """Any object with steps and a loss will do; this one counts what it is asked for."""

    steps: list[float]
    losses: torch.Tensor
    asked: list[int] = field(default_factory=list)

    def loss(self, index):
        self.asked.append(index)
        return self.losses[index]


def allowed(n):
    return math.ceil(math.log2(n)) + 3


def curve(means, noise=0.01, n=200, steps=None, seed=0):
    """Checkpoints with given mean losses, contexts that differ much, and a little noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    shared, own = torch.randn(n, generator=generator), torch.randn(len(means), n, generator=generator) * noise
    shared, own = shared - shared.mean(), own - own.mean(1, keepdim=True)
    losses = torch.tensor(means, dtype=torch.float64)[:, None] + shared + own
    return Fake(list(steps or range(1, len(means) + 1)), losses), shared.double()


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 16, 609])
def test_on_a_straight_line_in_log_step_the_answer_is_exact(n):
    steps = [10.0 * 1.1**i for i in range(n)]
    run, shared = curve([5 - math.log(step) for step in steps], steps=steps)
    for wanted in (11.0, 0.37 * steps[-1], 0.999 * steps[-1]):
        answer = checkpoints.search(run, shared + 5 - math.log(wanted))
        if steps[0] < wanted < steps[-1]:
            assert answer.value == pytest.approx(wanted / steps[-1], rel=1e-9) and answer.monotone
            assert answer.low < answer.value < answer.high
        assert len(answer.visited) <= allowed(n)


def test_from_step_zero_it_is_log_of_the_step_plus_the_second_one():
    steps = [0, 100, 400, 1000, 4000]
    run, shared = curve([10 - math.log(step + 100) for step in steps], noise=1e-6, steps=steps)
    for wanted in (30, 200, 2000):
        answer = checkpoints.search(run, shared + 10 - math.log(wanted + 100))
        assert answer.value == pytest.approx(wanted / 4000, rel=1e-3)
    assert checkpoints.search(run, shared + 6).low == 0


def test_between_checkpoints_the_curve_bends():
    """A power law, checkpoints three times as far as each other: a chord would read an eighth late."""
    steps = [float(3**i) for i in range(9)]
    run, shared = curve([step**-0.5 for step in steps], noise=1e-9, steps=steps)
    for wanted in (45.0, 150.0, 400.0):
        found = checkpoints.search(run, shared + wanted**-0.5)
        assert found.value * steps[-1] == pytest.approx(wanted, rel=0.015)
        assert found[:3] == pytest.approx(checkpoints.full_scan(run, shared + wanted**-0.5)[:3], rel=1e-9)


def isotonic_answer(run, target):
    """The plain way: every checkpoint, one regression, a look-up on a grid; infinite or 0 if there is no crossing."""
    means = (run.losses - target).mean(1).numpy()
    fitted = IsotonicRegression(increasing=False).fit_transform(np.arange(len(means)), means)
    if not fitted[-1] <= 0 < fitted[0]:
        return math.inf if fitted[-1] > 0 else 0.0
    x = np.log(run.steps)
    grid = np.unique(np.concatenate([x, np.linspace(x[0], x[-1], 20_001)]))
    return np.exp(grid[PchipInterpolator(x, fitted)(grid) > 1e-12].max()) / run.steps[-1]


def random_curve(rng):
    """Few or many checkpoints, noise from nothing to far above the distance of neighbours, alike in four contexts."""
    n, size = int(np.exp(rng.uniform(np.log(2), np.log(200)))), int(rng.choice([320, 640, 1280]))
    steps = np.sort(np.exp(rng.uniform(0, 8, n)))
    ideal = 3 + 5 * steps ** -rng.uniform(0.05, 0.5)
    noise = np.exp(rng.uniform(np.log(1e-3), np.log(2)))
    wanted = np.exp(rng.uniform(np.log(steps[0]), np.log(steps[-1])))
    level, shared = PchipInterpolator(np.log(steps), ideal)(np.log(wanted)), rng.normal(0, 0.5, size)
    own = rng.normal(0, noise, (n + 1, size // 4)).repeat(4, axis=1)
    losses = ideal[:, None] + shared + own[1:]
    return Fake(list(steps), torch.tensor(losses)), torch.tensor(level + shared + own[0]), wanted


def test_on_noisy_monotone_curves_the_interval_holds_the_full_scan_s_answer_and_the_truth():
    """The truth is the harder half: an interval that the noise of a full scan is in, too, holds that scan's answer."""
    rng = np.random.default_rng(0)
    holds, true, alarms = [], [], []
    for _ in range(1000):
        run, target, wanted = random_curve(rng)
        answer = checkpoints.search(run, target)
        assert len(run.asked) == len(set(run.asked)) == len(answer.visited) <= allowed(len(run.steps))
        holds.append(answer.low <= isotonic_answer(run, target) <= answer.high)
        true.append(answer.low <= wanted / run.steps[-1] <= answer.high)
        alarms.append(not answer.monotone)
    assert np.mean(holds) >= 0.93 and 0.93 <= np.mean(true) <= 0.99
    assert np.mean(alarms) <= 0.01


@pytest.mark.parametrize("seed", range(20))
def test_the_full_scan_is_the_plain_isotonic_answer(seed):
    run, target, _ = random_curve(np.random.default_rng(seed))
    answer, plain = checkpoints.full_scan(run, target), isotonic_answer(run, target)
    assert answer.side == (">" if plain == math.inf else "<" if plain == 0 else "")
    assert answer.side or answer.value == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_is_that_of_a_grid_of_tests(seed, monkeypatch):
    """Every point of the curve against the target, its error by the jackknife: each context left out in turn."""
    monkeypatch.setattr(metrics, "BLOCK", 1)
    seen = np.random.default_rng(seed).normal(2.5 - np.arange(6)[:, None], 3, (6, 300))
    x, places = np.log(2) * np.arange(6.0), np.log(2) * np.linspace(0, 5, 2_001)
    curve = PchipInterpolator(x, seen.mean(1))(places)
    without = (seen.sum(1, keepdims=True) - seen) / 299
    error = PchipInterpolator(x, without)(places).std(1) * math.sqrt(299)
    accepted = places[abs(curve) <= checkpoints.Z * error]
    low, high = checkpoints._interval(x, *checkpoints._moments(torch.tensor(seen)))
    assert low == (pytest.approx(accepted[0], abs=5e-3) if accepted[0] else -math.inf)
    assert high == (pytest.approx(accepted[-1], abs=5e-3) if accepted[-1] < places[-1] else math.inf)


def test_a_bump_that_the_search_sees_is_reported(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 1)
    means = [3 - 0.01 * i for i in range(31)]
    run, shared = curve(means)
    target = shared + 2.985  # the search looks at 15, 7, 3, ... and finds the crossing near the beginning
    assert checkpoints.search(run, target).monotone
    error = ((run.losses[15] - run.losses[7]).std() / math.sqrt(200)).item()
    for size, monotone in ((2.5, True), (3.5, False)):
        run.losses[15] += (run.losses[7] - run.losses[15]).mean() + size * error
        answer = checkpoints.search(run, target)
        assert answer.monotone is monotone and ("not monotone" in str(answer)) is not monotone
        assert answer.rise == pytest.approx(size, rel=1e-3) and 0.03 < answer.value < 0.1


def test_a_target_beyond_the_ends_is_said_to_be_there():
    run, shared = curve([5.0, 4.0, 3.0, 2.5], steps=[10, 20, 40, 80])
    best = checkpoints.search(run, shared + 2.0)
    assert best.side == ">" and best[:3] == pytest.approx((1, 1, math.inf)) and 3 in best.visited
    assert str(best) == ">100.0% (95 %: 100.0% or more)"
    assert "0.06% (95 %: 0.05% to 0.08%)" in str(best._replace(side="", value=0.00064, low=0.0005, high=0.0008))
    worst = checkpoints.search(run, shared + 6.0)
    assert worst.side == "<" and worst[:3] == pytest.approx((0.125, 0.0, 0.125)) and 0 in worst.visited


def test_next_to_an_end_the_interval_is_open():
    run, shared = curve([5.0, 4.0, 3.0, 2.5], noise=0.1, steps=[10, 20, 40, 80])
    almost = checkpoints.search(run, shared + 2.505)
    assert almost.side == "" and 0.9 < almost.low < almost.value < 1 and math.isinf(almost.high)
    assert checkpoints.search(run, shared + 4.995).low == 0


def test_pairing_makes_the_interval_short():
    run, shared = curve([5 - 0.1 * i for i in range(16)])
    paired = checkpoints.search(run, shared + 4.05)
    other = checkpoints.search(run, shared.roll(1) + 4.05)
    assert other.high - other.low > 20 * (paired.high - paired.low)


def test_equivalents_of_what_is_not_there():
    run, shared = curve([3.0, 2.0, 1.0])
    assert checkpoints.equivalents(None, {"small": shared}) == {"small": None}
    found = checkpoints.equivalents(run, {"small": shared + 1.5, "large": None})
    assert found["large"] is None and found["small"] == checkpoints.search(run, shared + 1.5)


def test_a_target_on_other_tokens_is_refused():
    run, shared = curve([3.0, 2.0, 1.0])
    with pytest.raises(UserError, match="199 contexts, the checkpoints 200: take the same tokens"):
        checkpoints.search(run, shared[1:])


# --- monotone? --------------------------------------------------------------------------------------------------------


def test_drops_are_paired_and_tell_the_probability_of_an_inversion():
    run, _ = curve([3.0, 2.9, 2.9, 2.95], noise=0.1)
    falls = checkpoints.drops(run.losses)
    assert [fall.value for fall in falls] == pytest.approx([0.1, 0.0, -0.05], abs=1e-7)
    assert falls[0].se == pytest.approx(0.1 * math.sqrt(2 / 200), rel=0.3), "not the contexts' own spread of 1"
    assert [checkpoints.inversion(fall) for fall in falls] == pytest.approx([0.0, 0.5, 1.0], abs=1e-4)
    assert checkpoints.inversion(Estimate(1.0, 0.0)) == 0


def test_the_test_of_monotony_finds_a_planted_rise_and_lets_noise_pass():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, (300, 8, 800)) + rng.normal(0, 1, (300, 1, 800))
    flat = [checkpoints.monotone_test(torch.tensor(losses), draws=200).chance for losses in noise]
    assert 0.02 <= np.mean(np.array(flat) < 0.05) <= 0.08, "as often wrong as it says, on a curve that does not fall"
    falling = noise[0] - 0.1 * np.arange(8)[:, None]
    found = checkpoints.monotone_test(torch.tensor(falling))
    assert found.rise < 0 and found.chance == 1 and found.distance == 0
    falling[5] += 0.2
    found = checkpoints.monotone_test(torch.tensor(falling))
    assert found.rise > 5 and found.chance < 0.01 and found.distance == pytest.approx(0.05, abs=0.02)


def test_what_looks_monotone_depends_on_pairing():
    run, _ = curve([3 - 0.1 * i for i in range(9)])
    looks = {(n, p): checkpoints.looks_monotone(run.losses, n, 1, p) for n in (8, 200) for p in (True, False)}
    assert looks[8, True] == looks[200, True] == 1 and looks[8, False] < 0.05 < looks[200, False]
    assert checkpoints.looks_monotone(run.losses, 8, 4, False) > looks[8, False]
    run.losses[7] += 1
    assert checkpoints.looks_monotone(run.losses, 8, 1, True) == 0
    assert checkpoints.looks_monotone(run.losses, 8, 2, True) == 1, "a thinned look steps over the bump"


# --- the journal's way ------------------------------------------------------------------------------------------------


def test_the_journal_s_sum_done_again():
    pairs = dict(reported("journal_0630_curve")["value"])
    end = (pairs[362_000] + pairs[400_000]) / 2
    shares = [checkpoints.by_ruler(pairs, end + delta) / 400_000 for delta in (0.1, 0.1336, 0.0816)]
    assert shares == pytest.approx([0.215, 0.13, 0.29], abs=0.005)


def test_a_ruler_reads_a_convex_curve_late():
    steps = [10.0 * 2**i for i in range(8)]
    run, shared = curve([5 - math.log(step) for step in steps], steps=steps)
    kept = [2, 4, 7]
    target = shared + 5 - math.log(300)
    ruled = checkpoints.by_ruler({steps[i]: run.losses[i].mean().item() for i in kept}, target.mean().item())
    assert ruled > 1.3 * 300
    read = checkpoints.by_eye(steps, run.losses, target, kept, 200, draws=50)
    assert read.std() < 0.05 and read.mean() == pytest.approx(ruled / steps[-1], rel=0.03)


def test_a_ruler_beyond_its_points_prolongs_the_line():
    points = {10.0: 3.0, 20.0: 2.0, 40.0: 1.9}
    assert checkpoints.by_ruler(points, 3.5) == pytest.approx(5.0)
    assert checkpoints.by_ruler(points, 1.85) == pytest.approx(50.0)
    assert checkpoints.by_ruler({10.0: 2.0, 20.0: 2.0}, 2.5) == 10.0


def test_evenly_takes_the_nearest_and_each_once():
    assert checkpoints.evenly([0, 1, 2, 4, 8, 50, 100]) == [3, 4, 5, 6]


def test_left_out_checkpoints_on_a_curve_and_on_lines():
    steps = [1.0, 3.0, 10.0, 100.0]
    missed = checkpoints.left_out(steps, [5 - math.log(step) for step in steps])
    assert missed["log step"] + missed["curve"] == pytest.approx([0] * 4, abs=1e-12)
    assert min(missed["step"]) > 0.3


# --- real checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    scale = load_profile("docstring-gpt")
    tokens = contexts(scale, load_model(scale).tokenizer, "test", 4)
    return checkpoints.Trained(scale, tokens)


def test_the_shipped_checkpoints(run):
    assert len(run.steps) == 16 and run.steps[0] == 0 and run.steps == sorted(run.steps)
    assert run.steps[-1] == 28_000 * 8 * 128, "tokens, not steps"
    last = run.loss(15)
    with torch.no_grad():
        logits = load_model(run.profile)(run.tokens).log_softmax(-1)
    plain = -logits[:, :-1].gather(-1, run.tokens[:, 1:, None])[..., 0].double().mean(1)
    assert torch.allclose(last, plain, atol=1e-5) and run.loss(15) is last, "loaded once"
    answer = checkpoints.search(run, last + 0.2)
    assert 0 < answer.value < 1 and set(answer.visited) <= set(run.losses)


def test_a_missing_checkpoint_is_named(run, monkeypatch):
    gone = run.found[3]._replace(name=f"{run.found[3].name}-gone")
    monkeypatch.setattr(run, "found", [*run.found[:3], gone, *run.found[4:]])
    run.losses.pop(3, None)
    with pytest.raises(UserError, match="cannot load model models/docstring-gpt/checkpoints/step-001000-gone"):
        run.loss(3)
