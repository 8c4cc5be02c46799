"""Training from a profile, all the way from its text: killed anywhere, and by several processes, it ends the same."""

import os
import signal

import pytest
import tiny
import torch
from test_train import assert_same, at_batch, children, ends, outcome

from saelib import activations, ranks, train
from saelib.formats import load
from saelib.profile import load_profile, override


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A profile with a tiny model of random weights, a text of its own, and one small SAE."""
    rest = """
activations: {block: 20}
recipe: {n_latents: 32, k: 4, k_aux: 4, batch: 40, tokens: 2400, dead_after: 400}
saes: {one: {}}
"""
    return tiny.write(tmp_path_factory.mktemp("profile"), rest, layers=2, length=30, documents=400)


def run(rank, folder, out, cache, fault=None, processes=1):
    """`saelib train one`, dying when a batch is asked for."""
    torch.set_num_threads(1)
    train.LOG_EVERY, train.SAVE_EVERY, train.VALIDATION = 3, 6, 8
    activations.BUILD = out.parent / "build"
    if fault is not None:
        source_of = train.source_of

        def faulty(*arguments):
            source = source_of(*arguments)
            at_batch(source, fault)
            return source

        train.source_of = faulty
    if processes > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20_000 + os.getppid() % 20_000))
    profile = override(load_profile(folder / "tiny.yml"), {"activations.cache": cache})
    with ranks.processes():
        train.train(profile, "one", out, resume=True)


@pytest.mark.parametrize("cache", [False, True], ids=["streamed", "cached"])
def test_a_killed_run_goes_on_with_the_batches_it_would_have_seen(cache, folder, tmp_path):
    assert ends(children(run, folder, tmp_path / "straight", cache)) == [0]
    expected = outcome(tmp_path / "straight")
    assert expected[0]["steps"] == 60
    for fault in (8, 31):
        assert ends(children(run, folder, tmp_path / "killed", cache, fault)) == [-signal.SIGKILL]
    assert ends(children(run, folder, tmp_path / "killed", cache)) == [0]
    assert_same(outcome(tmp_path / "killed"), expected)
    one, other = (load(tmp_path / name) for name in ("straight", "killed"))
    assert all(torch.equal(one.state_dict()[key], value) for key, value in other.state_dict().items())


def test_processes_share_one_cache_and_train_the_same_sae(folder, tmp_path):
    """Both start before there is a cache, and take turns at its shards: the files are those of one process."""
    assert ends(children(run, folder, tmp_path / "alone", True)) == [0]
    (tmp_path / "build").rename(tmp_path / "other")
    assert ends(children(run, folder, tmp_path / "two", True, None, 2, number=2)) == [0, 0]
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / build).rglob("*") if path.is_file()}
        for build in ("other", "build")
    )
    assert one == two and len(one) > 4
    one, two = (load(tmp_path / name).facts for name in ("alone", "two"))
    assert one["trained_tokens"] == two["trained_tokens"] == 2400
    assert two["metrics"]["normalized_mse"] == pytest.approx(one["metrics"]["normalized_mse"], rel=0.1)
