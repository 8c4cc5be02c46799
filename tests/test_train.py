"""The loop: it finds a planted dictionary, follows the recipe to the letter, and survives whatever stops it.

Several processes, and runs that are killed, are children of a fork server that imports PyTorch once.
"""

import contextlib
import copy
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from saelib import UserError, train
from saelib.objective import Sparse, World, dense
from saelib.profile import Recipe
from saelib.train import Trainer, fit, geometric_median


class Planted:
    """Sparse non-negative sums of known unit directions, and a little noise: activations in memory."""

    def __init__(self, d_model=32, features=64, active=3, seed=0, pause=0.0):
        rows = torch.randn(features, d_model, generator=torch.Generator().manual_seed(seed))
        self.features = rows / rows.norm(dim=1, keepdim=True)
        self.d_model, self.active, self.pause, self.identity = d_model, active, pause, f"planted {features} {seed}"

    def sample(self, n, seed):
        generator = torch.Generator().manual_seed(seed)
        which = torch.rand(n, len(self.features), generator=generator).topk(self.active).indices
        size = 0.5 + torch.rand(n, self.active, generator=generator)
        z = torch.zeros(n, len(self.features)).scatter(1, which, size)
        return z @ self.features + 0.01 * torch.randn(n, self.d_model, generator=generator)

    def batches(self, batch, seed, start=0, rank=0, size=1):
        while True:
            time.sleep(self.pause)
            yield self.sample(batch, 1_000_003 * (seed + 1) + start).chunk(size)[rank]
            start += 1


def small(**values):
    """A recipe that trains in milliseconds."""
    defaults = {"n_latents": 48, "k": 3, "normalize": "none", "batch": 32, "tokens": 32 * 20, "lr": 1e-3, "k_aux": 8}
    return Recipe(**{**defaults, **values})


SOURCE = Planted(d_model=12, features=24)
SAMPLE = SOURCE.sample(500, 0)


def data(number, batch=32):
    return next(SOURCE.batches(batch, 0, number))


def weights(sae):
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


# --- what is learned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "unit"])
def test_a_planted_dictionary_is_found(normalize):
    source = Planted()
    recipe = Recipe(
        n_latents=128, k=3, normalize=normalize, tokens=200_000, batch=256, lr=3e-3, k_aux=16, dead_after=20_000,
        ema=0.99,
    )  # fmt: skip
    sae, log = fit(source, recipe)
    features = source.features
    if normalize == "unit":  # it cannot see the mean over d_model
        features = features - features.mean(1, keepdim=True)
        features /= features.norm(dim=1, keepdim=True)
    assert (features @ sae.W_dec.T).amax(1).mean() >= 0.95
    assert log[-1]["mse"] < min(0.1, log[0]["mse"] / 2)
    assert [line["step"] for line in log] == [*range(50, recipe.steps, 50), recipe.steps]


# --- the recipe, in the obvious way -----------------------------------------------------------------------------------


def plain(recipe, steps, seed=0):
    """The recipe with torch.optim and autograd. Returns the SAE, its average, the losses, and how often AuxK acted."""
    sae, constant = train.start(recipe, SOURCE.d_model, seed, SAMPLE)
    sae.train()
    named = {name: p for name, p in sae.named_parameters() if not (recipe.tied and name == "W_enc")}
    adam = torch.optim.Adam(named.values(), betas=(recipe.beta1, recipe.beta2), eps=recipe.eps)
    since, average = torch.zeros(recipe.n_latents), {name: 0.0 for name in named}
    losses, acted = [], 0
    for step in range(1, steps + 1):
        dead = since > recipe.dead_after
        sae.zero_grad()
        terms = dense(sae, data(step - 1, recipe.batch), recipe, constant, dead)
        acted += bool(terms.aux > 0)
        W = sae.W_dec
        if recipe.tied:
            W.grad += sae.W_enc.grad
        if recipe.project:
            W.grad -= (W.grad * W.data).sum(1, keepdim=True) * W.data / W.data.square().sum(1, keepdim=True)
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(named.values(), recipe.clip)
        adam.param_groups[0]["lr"] = recipe.rate * (min(1, step / recipe.warmup) if recipe.warmup else 1)
        adam.step()
        if recipe.unit_norm:
            W.data /= W.data.norm(dim=1, keepdim=True)
        if recipe.tied:
            sae.W_enc.data.copy_(W.data)
        average = {name: recipe.ema * average[name] + (1 - recipe.ema) * p.data for name, p in named.items()}
        since = torch.where(terms.fired, 0, since + recipe.batch)
        losses.append(terms.loss.item())
    average = {name: value / (1 - recipe.ema**steps) for name, value in average.items()}
    if recipe.unit_norm:
        average["W_dec"] /= average["W_dec"].norm(dim=1, keepdim=True)
    average.setdefault("W_enc", average["W_dec"])
    return sae, average, losses, acted


CASES = {
    "topk": {"dead_after": 64},
    "topk, clipped, warmed up": {"dead_after": 64, "clip": 0.05, "warmup": 7},
    "topk, unit, raw loss": {"dead_after": 64, "normalize": "unit", "loss_space": "raw", "latent_bias": True},
    "topk, MultiTopK": {"dead_after": 64, "multi_topk": True, "latent_bias": True, "clip": 0.05},
    "topk, tied": {"dead_after": 64, "tied": True, "clip": 0.05},
    "topk, no norms": {"unit_norm": False, "project": False, "tied_init": False, "pre_bias": "mean"},
    "topk, no norms, projected, clipped": {"unit_norm": False, "clip": 0.02, "beta1": 0.5, "beta2": 0.99},
    "relu": {"architecture": "relu", "l1": 0.01, "clip": 0.05},
    "prolu": {"architecture": "prolu", "l1": 0.01},
    "gated": {"architecture": "gated", "l1": 0.01},
    "batchtopk": {"architecture": "batchtopk", "dead_after": 64},
}


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_twenty_steps_are_those_of_the_obvious_loop(values):
    recipe = small(ema=0.8, **values)
    sae, average, losses, acted = plain(recipe, 20)
    trainer = Trainer(recipe, SOURCE.d_model, 0, SAMPLE)
    begun = weights(trainer.sae)
    found = [trainer.step(data(i)).loss.item() for i in range(20)]
    assert found == pytest.approx(losses, rel=1e-5)
    assert acted > 5 or "dead_after" not in values
    for name, expected in weights(sae).items():
        assert (expected - begun[name]).abs().max() > 1e-3, f"{name} has not moved"
        torch.testing.assert_close(weights(trainer.sae)[name], expected, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(weights(trainer.averaged())[name], average[name], rtol=1e-5, atol=1e-5, msg=name)
    if recipe.architecture == "batchtopk":
        assert trainer.averaged().threshold == pytest.approx(sae.threshold.item(), rel=1e-5) and sae.threshold > 0


def test_the_rate_scales_with_the_number_of_latents_and_warms_up():
    assert Recipe(n_latents=2**14).rate == 2e-4
    assert Recipe(n_latents=2**12).rate == pytest.approx(4e-4) and Recipe(n_latents=2**16).rate == pytest.approx(1e-4)
    assert Recipe(n_latents=2**12, lr=7e-5).rate == 7e-5
    for warmup, share in ((0, 1), (1, 1), (10, 0.1)):
        trainer = Trainer(small(warmup=warmup), SOURCE.d_model, 0, SAMPLE)
        before = trainer.sae.pre_bias.detach().clone()
        trainer.step(data(0))  # Adam's first step moves everything by the rate
        assert (trainer.sae.pre_bias - before).abs().max().item() == pytest.approx(1e-3 * share, rel=1e-3)


def test_clipping_leaves_a_gradient_of_the_stated_norm():
    for size, expected in ((1e4, 0.5), (0.0, 0.0)):
        trainer = Trainer(small(clip=0.5), SOURCE.d_model, 0, SAMPLE)
        trainer.step(size * data(0) if size else data(0) * 0 + trainer.sae.pre_bias.detach())
        moments = torch.cat([first.flatten() for first, _ in trainer.moments]) / (1 - trainer.recipe.beta1)
        assert moments.norm().item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert all(p.isfinite().all() for p in trainer.sae.parameters())


def test_the_average_is_the_closed_form():
    trainer, seen = Trainer(small(ema=0.9, latent_bias=True), SOURCE.d_model, 0, SAMPLE), []
    for i in range(7):
        trainer.step(data(i))
        seen.append(weights(trainer.sae))
    shares = torch.tensor([0.9 ** (6 - i) for i in range(7)])
    found = weights(trainer.averaged())
    assert set(found) == {"W_enc", "W_dec", "pre_bias", "latent_bias"}
    for name, value in found.items():
        expected = sum(share * w[name] for share, w in zip(shares / shares.sum(), seen, strict=True))
        if name == "W_dec":
            expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    last = Trainer(small(ema=0), SOURCE.d_model, 0, SAMPLE)
    last.step(data(0)), last.step(data(1))
    for name, value in weights(last.averaged()).items():
        torch.testing.assert_close(value, weights(last.sae)[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("values", [{}, {"tied": True}, {"ema": 0.0}, {"architecture": "gated"}])
def test_before_the_first_step_the_average_is_the_start(values):
    trainer = Trainer(small(**values), SOURCE.d_model, 0, SAMPLE)
    for name, value in weights(trainer.averaged()).items():
        torch.testing.assert_close(value, weights(trainer.sae)[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unit", [True, False])
def test_decoder_directions_keep_norm_one_if_asked(unit):
    trainer = Trainer(small(unit_norm=unit, lr=0.03), SOURCE.d_model, 0, SAMPLE)
    for i in range(40):
        trainer.step(data(i))
        off = (trainer.sae.W_dec.detach().norm(dim=1) - 1).abs().max()
        assert not unit or off < 1e-6, f"step {i + 1}"
    assert unit or off > 0.01
    norms = trainer.averaged().W_dec.norm(dim=1)
    assert ((norms - 1).abs().max() < 1e-6) == unit


def test_how_encoder_and_decoder_start_and_stay_tied():
    trainer = Trainer(small(tied=True), SOURCE.d_model, 0, SAMPLE)
    for i in range(5):
        trainer.step(data(i))
        assert torch.equal(trainer.sae.W_enc, trainer.sae.W_dec)
    averaged = trainer.averaged()
    assert torch.equal(averaged.W_enc, averaged.W_dec)
    free = Trainer(small(), SOURCE.d_model, 0, SAMPLE)
    assert torch.equal(free.sae.W_enc, free.sae.W_dec)
    free.step(data(0))
    assert not torch.equal(free.sae.W_enc, free.sae.W_dec)
    other = Trainer(small(tied_init=False), SOURCE.d_model, 0, SAMPLE).sae
    assert torch.equal(other.W_dec, Trainer(small(), SOURCE.d_model, 0, SAMPLE).sae.W_dec)
    assert torch.nn.functional.cosine_similarity(other.W_enc, other.W_dec).abs().mean() < 0.5
    torch.testing.assert_close(other.W_enc.norm(dim=1), torch.ones(48))


def test_a_step_leaves_its_batch_alone():
    for normalize in ("none", "unit", "layer_norm"):
        trainer, x = Trainer(small(normalize=normalize), SOURCE.d_model, 0, SAMPLE), data(0)
        trainer.step(x)
        assert torch.equal(x, data(0)) and torch.equal(SAMPLE, SOURCE.sample(500, 0))


# --- the pre-bias and the constant ------------------------------------------------------------------------------------


def test_the_geometric_median_of_known_points():
    def at(*points, within=1e-5):
        return pytest.approx(geometric_median(torch.tensor(points)).tolist(), abs=within)

    assert at([1.0, 1], [1.0, -1], [-1.0, 1], [-1.0, -1]) == [0, 0]
    assert at([0.0], [1.0], [2.0], [3.0], [50.0]) == [2]  # the median, though the mean is far off
    assert at([0.0], [0.5], [0.6], [2.0], [6.9]) == [0.6]  # the mean, where the search begins, is one of the points
    third = 1 / 3**0.5 / 2
    assert at([0.0, 0], [1.0, 0], [0.5, 3 * third]) == [0.5, third]
    # a right triangle with legs 1 and 1: all sides are seen under 120 degrees
    assert at([0.0, 0], [1.0, 0], [0.0, 1]) == [(3 - 3**0.5) / 6] * 2
    assert at([0.0, 0], [0.0, 0], [0.0, 0], [4.0, 0], [0.0, 4]) == [0, 0]  # most points are one
    assert at([0.0, 0], [10.0, 1], [10.0, -1], within=1e-3) == [10 - 3**-0.5, 0]
    assert at([2.0, 3.0]) == [2, 3] and at([2.0, 3.0], [2.0, 3.0]) == [2, 3]


def test_the_geometric_median_is_where_directions_cancel_and_outliers_do_not_move_it():
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    point = geometric_median(x)
    pull = torch.nn.functional.normalize(x.double() - point, dim=1).mean(0)
    assert pull.norm() < 1e-6
    far = torch.cat([x, torch.full((20, 6), 1e4)])
    assert (geometric_median(far) - point).norm() < 0.3 < (far.mean(0) - point).norm() / 1000


def test_where_the_pre_bias_starts_and_what_the_constant_is():
    sample = 4 + SAMPLE
    centred = sample - sample.mean(1, keepdim=True)
    unit = centred / centred.norm(dim=1, keepdim=True)
    expected = {
        "median": geometric_median(unit), "mean": unit.mean(0), "zero": torch.zeros(12),
        "raw_median": geometric_median(sample),
    }  # fmt: skip
    for name, value in expected.items():
        sae, constant = train.start(small(normalize="unit", pre_bias=name), 12, 0, sample)
        torch.testing.assert_close(sae.pre_bias.detach(), value.float())
        assert constant == pytest.approx((unit - unit.mean(0)).square().sum(1).mean().item(), rel=1e-5)
    raw = train.start(small(normalize="unit", loss_space="raw"), 12, 0, sample)[1]
    assert raw == pytest.approx((sample - sample.mean(0)).square().sum(1).mean().item(), rel=1e-5)
    assert train.start(small(mse_constant=False), 12, 0, sample)[1] == 12


# --- dead latents -----------------------------------------------------------------------------------------------------


def silenced(recipe, latent, row):
    """A trainer of which one latent's encoder row is replaced."""
    trainer = Trainer(recipe, SOURCE.d_model, 0, SAMPLE)
    trainer.sae.W_enc.data[latent] = row
    return trainer


def test_a_latent_is_dead_after_so_many_tokens_and_alive_when_it_fires():
    for dead_after, first in ((96, 4), (95, 3), (33, 2)):
        trainer = silenced(small(dead_after=dead_after, k_aux=0), 5, 0.0)  # its pre-activation is 0: never active
        for step in range(1, 6):
            trainer.step(data(step))
            assert bool(trainer.dead[5]) == (step >= first), (dead_after, step)
            assert trainer.since_fired[5] == 32 * step
    trainer.sae.W_enc.data[5] = 100 * trainer.sae.W_enc.data[6]
    fired = trainer.step(data(9)).fired
    assert fired[5] and trainer.since_fired[5] == 0 and not trainer.dead[5]
    assert torch.equal(trainer.since_fired == 0, fired)


def test_auxk_revives_a_dead_latent():
    """A latent too weak to be among the k largest: its loss has no gradient but AuxK's."""
    fired = {}
    for k_aux in (0, 8):
        trainer = silenced(small(n_latents=16, k=1, dead_after=32, k_aux=k_aux, lr=3e-3), 5, SOURCE.features[3] * 1e-3)
        assert not trainer.sparse(data(0), trainer.dead).fired[5]
        before = trainer.sae.W_enc[5].detach().clone()
        fired[k_aux] = [bool(trainer.step(data(i)).fired[5]) for i in range(120)]
        assert torch.equal(before, trainer.sae.W_enc[5]) == (k_aux == 0)
    assert not any(fired[0]) and any(fired[8])


@pytest.mark.parametrize("dead", [range(48), [7], range(47)], ids=["all", "one", "all but one"])
@pytest.mark.parametrize("batch", [1, 32])
def test_auxk_with_any_number_of_dead_latents(dead, batch):
    recipe = small(k_aux=16, latent_bias=True)
    sae, constant = train.start(recipe, SOURCE.d_model, 0, SAMPLE)
    one, other = sae.double(), copy.deepcopy(sae).double()
    mask, x = torch.zeros(48, dtype=torch.bool), data(0, batch).double()
    mask[list(dead)] = True
    slow, fast = dense(one, x, recipe, constant, mask), Sparse(other, recipe, constant)(x, mask)
    assert (fast.aux > 0) == (batch > 1)  # the errors of one token have no spread
    torch.testing.assert_close(fast.loss, slow.loss, rtol=1e-12, atol=0)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-13)


# --- stopping, resuming, refusing -------------------------------------------------------------------------------------

CONTEXT = multiprocessing.get_context("forkserver")
LONG = small(tokens=32 * 60, dead_after=64, latent_bias=True)


def children(target, *arguments, number=1):
    """Processes that run target(rank, *arguments), started."""
    CONTEXT.set_forkserver_preload(["saelib.train", "saelib.sparsity", "saelib.runner"])  # each imports in seconds
    found = [CONTEXT.Process(target=target, args=(rank, *arguments)) for rank in range(number)]
    for process in found:
        process.start()
    return found


def ends(processes, within=120.0):
    """Exit codes; what has not ended after so many seconds is killed."""
    limit = time.monotonic() + within
    for process in processes:
        process.join(max(0, limit - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def run(_rank, out, pause=0.0, fault=None):
    """Train LONG in `out`, going on where it stopped; `fault` says how the process dies."""
    torch.set_num_threads(1)
    train.LOG_EVERY, train.SAVE_EVERY = 3, 6
    source = Planted(d_model=12, features=24, pause=pause)
    if fault is not None:
        faults[fault[0]](source, fault[1])
    fit(source, LONG, 3, out=out, resume=True)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_batch(source, number):
    """Die when batch `number` is asked for."""
    batches = source.batches

    def counted(batch, seed, start=0, *place):
        for i, x in enumerate(batches(batch, seed, start, *place), start):
            if i == number:
                die()
            yield x

    source.batches = counted


def on_call(owner, name, after):
    """Die in the call number `after` of a function, its work half done or not begun."""
    original, calls = getattr(owner, name), []

    def patched(*arguments, **named):
        calls.append(1)
        if len(calls) < after:
            return original(*arguments, **named)
        if name == "save":
            original(*arguments, **named)
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        die()

    setattr(owner, name, patched)


faults = {
    "batch": at_batch,
    "half a state": lambda _, after: on_call(torch, "save", after),
    "before renaming": lambda _, after: on_call(Path, "replace", after),
    "before removing": lambda _, after: on_call(Path, "unlink", after),
}


def outcome(out):
    """Everything a run ends with, but how long it took."""
    (path,) = out.glob("state-*.pt")
    state = torch.load(path, weights_only=True)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines == state["lines"]
    return state, [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same(found, expected):
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    for key in ("steps", "constant", "made"):
        assert found[0][key] == expected[0][key]
    for key in ("sae", "moments", "average", "since_fired"):
        for one, other in zip(flat(found[0][key]), flat(expected[0][key]), strict=True):
            assert torch.equal(one, other), key


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for part in (value.values() if isinstance(value, dict) else value) for x in flat(part)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The outcome of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("straight")
    assert ends(children(run, out)) == [0]
    found = outcome(out)
    assert found[0]["steps"] == 60 and [line["step"] for line in found[1]] == list(range(3, 61, 3))
    return found


@pytest.mark.parametrize(
    "plan",
    [
        [("batch", 4), ("batch", 5), ("batch", 29)],  # twice before the first state is there
        [("half a state", 2), ("half a state", 1), ("before renaming", 3)],
        [("before removing", 1), ("batch", 20), ("before removing", 2)],
    ],
    ids=["between steps", "while writing", "while removing"],
)
def test_a_killed_run_ends_with_the_same_bits(plan, straight, tmp_path):
    for fault in [*plan, None]:
        assert ends(children(run, tmp_path / "out", 0.0, fault)) == [0 if fault is None else -signal.SIGKILL]
    assert_same(outcome(tmp_path / "out"), straight)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.jsonl", "state-00000060-0of1.pt"]


def test_a_run_killed_at_any_moment_ends_with_the_same_bits(straight, tmp_path):
    moments = random.Random(0)
    for _ in range(3):
        ends(children(run, tmp_path, 0.01), within=0.1 + moments.random() / 2)
    assert ends(children(run, tmp_path)) == [0]
    assert_same(outcome(tmp_path), straight)


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)


def test_a_finished_run_stays_as_it_is(often, tmp_path):
    recipe = small(tokens=32 * 6)
    sae, log = fit(SOURCE, recipe, out=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again, log_again = fit(SOURCE, recipe, out=tmp_path, resume=True)
    assert log == log_again and before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name, value in weights(sae).items():
        assert torch.equal(weights(again)[name], value)


def test_a_run_in_a_folder_with_a_run_is_refused(often, tmp_path):
    recipe = small(tokens=32 * 4)
    fit(SOURCE, recipe, out=tmp_path)
    before = (tmp_path / "log.jsonl").read_text()
    with pytest.raises(UserError, match="holds a run already: go on with --resume, choose another --out"):
        fit(SOURCE, recipe, out=tmp_path)
    longer, other = small(tokens=32 * 6), small(tokens=32 * 4, lr=2e-3)
    for arguments, words in {
        (SOURCE, other, 0): r"another recipe.lr \(0.001, now 0.002\): choose another --out",
        (SOURCE, longer, 1): r"another seed \(0, now 1\), recipe.tokens \(128, now 192\): choose",
        (Planted(12, 24, seed=1), recipe, 0): "another data: choose another --out",
    }.items():
        with pytest.raises(UserError, match=words):
            fit(*arguments, out=tmp_path, resume=True)
    assert (tmp_path / "log.jsonl").read_text() == before


def test_an_sae_without_a_state_is_not_overwritten(often, tmp_path):
    (tmp_path / "sae.safetensors").write_bytes(b"weights")
    (tmp_path / "log.jsonl").write_text("its log")
    for resume in (False, True):
        with pytest.raises(UserError, match="holds an SAE already: choose another --out, or remove it"):
            fit(SOURCE, small(), out=tmp_path, resume=resume)
    assert (tmp_path / "log.jsonl").read_text() == "its log" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:200] + b"\0" * len(b)])
def test_a_damaged_state_is_refused_by_name(damage, often, tmp_path):
    recipe = small(tokens=32 * 4)
    fit(SOURCE, recipe, out=tmp_path)
    (state,) = tmp_path.glob("state-*.pt")
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(UserError, match=f"{state} is damaged: remove it"):
        fit(SOURCE, recipe, out=tmp_path, resume=True)


class Broken(Planted):
    """NaN in batch 7."""

    def batches(self, batch, seed, start=0, *place):
        for i, x in enumerate(super().batches(batch, seed, start, *place), start):
            yield x * torch.nan if i == 7 else x


@pytest.mark.parametrize("values", [{}, {"normalize": "unit"}, {"architecture": "relu"}], ids=["topk", "unit", "relu"])
def test_a_loss_that_is_not_finite_stops_the_run(values, often, tmp_path):
    with pytest.raises(UserError) as error:
        fit(Broken(12, 24), small(**values), out=tmp_path)
    message = str(error.value)
    assert "not finite at step 8 (batch 7)" in message and "recipe.lr" in message and "\n" not in message
    state = tmp_path / "state-00000006-0of1.pt"
    assert str(state) in message
    good = torch.load(state, weights_only=True)
    assert all(value.isfinite().all() for value in flat(good["sae"]))
    with pytest.raises(UserError, match="no state was saved before it"):
        fit(Broken(12, 24), small(**values))


@pytest.mark.parametrize(
    "where",
    [lambda t: t.sae.W_enc.data, lambda t: t.sae.pre_bias.data, lambda t: t.average[1]],
    ids=["W_enc", "pre_bias", "average"],
)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_never_saved(where, value, often, tmp_path, monkeypatch):
    """In a latent that no token uses, or after the last loss: no loss tells of it."""
    step = Trainer.step

    def spoiled(trainer, x):
        terms = step(trainer, x)
        if trainer.n_steps == 4:
            where(trainer).view(-1)[5] = value
        return terms

    monkeypatch.setattr(Trainer, "step", spoiled)
    with pytest.raises(UserError, match=r"weights are not finite at step 4 \(batch 3\); the last good") as error:
        fit(SOURCE, small(), out=tmp_path)
    (state,) = tmp_path.glob("state-*.pt")
    assert state.name == "state-00000002-0of1.pt" and str(state) in str(error.value)
    monkeypatch.undo()


@pytest.mark.parametrize("broken", [False, True])
def test_the_source_is_closed_when_the_run_ends(broken):
    closed = []

    class Closing(Broken if broken else Planted):
        def batches(self, *arguments):
            try:
                yield from super().batches(*arguments)
            finally:
                closed.append(True)

    with pytest.raises(UserError) if broken else contextlib.nullcontext() as error:
        fit(Closing(12, 24), small())
    assert closed == [True] and (error is not None) == broken  # though `error` still holds the frames


def test_shards_need_processes():
    with pytest.raises(UserError, match="1 processes do not make groups of 2 shards"):
        fit(SOURCE, small(), shards=2)


# --- several processes ------------------------------------------------------------------------------------------------

SHARED = {
    "plain": small(dead_after=1),
    "uneven": small(dead_after=32, k=5, k_aux=6),
    "uneven, few": small(dead_after=32, k=5, k_aux=1),
    "rich": small(dead_after=1, multi_topk=True, latent_bias=True, clip=0.05, k=4, k_aux=32),
    "wide": small(dead_after=1, batch=8, multi_topk=True, k=10, k_aux=48),  # 4k is more than a shard has
    "raw": small(dead_after=1, normalize="unit", loss_space="raw", tied=True),
}
WEAK = [0, 1, 2, 3, 13]
"""Latents that only AuxK uses in the cases "uneven": of four shards, two have none that is dead."""


def steps_of(case, world):
    """Six steps of a case: what is to be equal however many processes share it."""
    recipe = SHARED[case]
    trainer = Trainer(recipe, SOURCE.d_model, 0, SAMPLE, world)
    if case.startswith("uneven"):
        trainer.recipe = trainer.sparse.recipe = recipe.model_copy(update={"dead_after": 10**6})
        latents = torch.arange(48)[world.shard * trainer.sae.n_latents :][: trainer.sae.n_latents]
        weak = torch.isin(latents, torch.tensor(WEAK))
        trainer.sae.W_enc.data[weak] *= 1e-2
        trainer.since_fired[weak] = 10**7
    share = recipe.batch // world.parts
    terms, dead, first = [], [], gradients(trainer, data(0, recipe.batch)[world.part * share :][:share])
    for i in range(6):
        dead.append(world.over_latents(trainer.dead.sum()).item())
        found = trainer.step(data(i, recipe.batch)[world.part * share :][:share])
        terms.append([float(found.loss), float(found.mse), float(found.aux), float(found.l0)])
    found = {"terms": terms, "dead": dead, "here": trainer.dead.sum().item(), "gradients": first}
    return found | {"weights": weights(trainer.averaged())}


def gradients(trainer, x):
    """Gradients of all latents, without a step; AuxK takes part, as if every other latent were dead too."""
    since = trainer.since_fired
    trainer.since_fired = since.clone()
    trainer.since_fired[::2] = 10**7
    assert trainer.gradients(x).aux > 0
    trainer.since_fired = since
    named = {name: p.grad for name, p in trainer.sae.named_parameters()}
    return {
        name: (g if name == "pre_bias" else torch.cat(trainer.world.gather(g))).clone() for name, g in named.items()
    }


class Stops(Planted):
    """The machine goes down at batch 5."""

    def batches(self, batch, seed, start=0, *place):
        for i, x in enumerate(super().batches(batch, seed, start, *place), start):
            if i == 5:
                raise KeyboardInterrupt
            yield x


def refusals(size):
    """What each of several processes refuses, before any of them waits for another."""
    wrong = [(small(), 3), (small(batch=31), 1), (small(n_latents=47), size), (small(architecture="relu"), size)]
    for recipe, shards in wrong:
        try:
            fit(SOURCE, recipe, shards=shards)
            yield "nothing"
        except UserError as error:
            yield str(error)


def member(rank, size, folder):
    """One of several processes: all cases for all numbers of shards; what it found goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=size)
    found = {"refusals": list(refusals(size))}
    for shards in [shards for shards in (1, 2, 4) if size % shards == 0]:
        found |= {(case, shards): steps_of(case, World(shards)) for case in SHARED}
        train.LOG_EVERY, train.SAVE_EVERY = 1, 2
        out, recipe = folder / f"run{shards}", small(tokens=32 * 8, dead_after=1)
        try:
            fit(Stops(12, 24), recipe, out=out, shards=shards)
        except KeyboardInterrupt:
            dist.barrier()
        sae, log = fit(SOURCE, recipe, out=out, shards=shards, resume=True)
        found["fit", shards] = weights(sae), [(line["loss"], line["dead"]) for line in log]
    torch.save(found, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same in one process, and an uninterrupted run."""
    expected = {case: steps_of(case, World()) for case in SHARED}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LOG_EVERY", 1)
        sae, log = fit(SOURCE, small(tokens=32 * 8, dead_after=1))
    return expected | {"fit": (weights(sae), [(line["loss"], line["dead"]) for line in log])}


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_train_as_one_does(size, alone, tmp_path):
    assert ends(children(member, size, tmp_path, number=size)) == [0] * size
    results = [torch.load(tmp_path / f"found-{rank}.pt", weights_only=True) for rank in range(size)]
    for found in results:
        messages = found.pop("refusals")
        words = ["groups of 3 shards", "batch of 31 tokens", f"over {size} shards", "relu trains in one process only"]
        assert all(word in message for word, message in zip(words, messages, strict=True)), messages
        for (case, shards), value in found.items():
            where = f"{case}, {shards} shards"
            if case == "fit":
                assert value[1] == [pytest.approx(line, rel=1e-4) for line in alone["fit"][1]], where
            else:
                assert value["dead"] == alone[case]["dead"], where
                for name, expected in alone[case]["gradients"].items():
                    error = (value["gradients"][name] - expected).norm() / expected.norm()
                    assert error < 1e-5, f"{where}: gradient of {name}: relative error {error:.1e}"
                torch.testing.assert_close(
                    torch.tensor(value["terms"]), torch.tensor(alone[case]["terms"]), rtol=1e-5, atol=1e-6, msg=where
                )
            own, expected = (v[0] if case == "fit" else v["weights"] for v in (value, alone[case]))
            assert own.keys() == expected.keys()
            for name in own:
                torch.testing.assert_close(own[name], expected[name], rtol=1e-5, atol=1e-5, msg=f"{where}: {name}")
    assert all(alone[case]["terms"][-1][2] > 0 for case in SHARED)  # AuxK is at work in all of them
    if size == 4:
        assert [found["uneven", 4]["here"] for found in results] == [4, 1, 0, 0]


def test_tensorboard_gets_what_the_log_gets(often, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == tmp_path / "tensorboard"

        def add_scalar(self, name, value, tokens):
            written.append((tokens, name, value))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    _, log = fit(SOURCE, small(tokens=32 * 6), out=tmp_path, tensorboard=True)
    names = ("loss", "mse", "aux", "l0", "dead")
    expected = [(line["tokens"], name, line[name]) for line in log for name in names]
    assert [entry for entry in written if entry[1] in names] == expected and len(log) == 3


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        fit(SOURCE, small(tokens=32 * 6), out=tmp_path, tensorboard=True)
    assert not list(tmp_path.glob("state-*"))
