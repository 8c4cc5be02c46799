"""Several processes: each reads text of its own, states fit another number of them, results are those of one."""

import contextlib
import hashlib
import itertools
import json
import os
import signal
import socket

import nbformat
import pytest
import tiny
import torch
import torch.distributed as dist
from test_train import LONG, Planted, Stops, children, ends, on_call, small, weights

from saelib import UserError, activations, metrics, ranks, runner, sparsity, splice, train
from saelib.activations import Cached, Streamed
from saelib.models import load_model
from saelib.profile import load_profile
from saelib.sae import SAE
from saelib.train import fit

CONTEXT = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny GPT-2 with random weights that have a say, a text of a hundred contexts, and a profile of both."""
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)
    given = {"layers": 3, "length": 20, "documents": 40, "initializer_range": 0.3, **still}
    return tiny.write(tmp_path_factory.mktemp("ranks"), "activations: {block: 10}", **given)


@pytest.fixture(scope="module")
def profile(folder):
    return load_profile(folder / "tiny.yml")


@pytest.fixture(scope="module")
def model(profile):
    return load_model(profile)


def member(rank, size, folder, work, name="meeting"):
    """One of several processes: does its work among them, and leaves what it found, or the error, in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / name}", rank=rank, world_size=size)
    try:
        found = work(rank, folder)
    except UserError as error:
        found = str(error)
    torch.save(found, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def together(size, folder, work, name="meeting"):
    """What `work` found in each of several processes."""
    assert ends(children(member, size, folder, work, name, number=size)) == [0] * size
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(size)]


# --- text of their own ------------------------------------------------------------------------------------------------


def labels(model, tokens, hook, positions):
    """In place of activations: token id (in two digits) and position, exact in float16."""
    yield torch.stack([tokens // 64, tokens % 64, torch.arange(CONTEXT).expand_as(tokens)], -1).flatten(0, 1).float()


def drawn(source, n, size, rank, seed=5, start=0):
    """The first `n` of a process's parts of batches, which are contexts' worth of tokens."""
    with contextlib.closing(source.batches(size * CONTEXT, seed, start, rank, size)) as batches:
        return list(itertools.islice(batches, n))


def multiset(parts):
    return sorted(map(tuple, torch.cat(parts).tolist()))


@pytest.mark.parametrize("kind", [Streamed, Cached])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_what_all_processes_see_in_an_epoch_is_the_text_once(kind, size, profile, model, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "_pieces", labels)
    source = kind(profile, model, **({"folder": tmp_path} if kind is Cached else {}))
    total = sum(map(len, source._contexts(0)))
    expected = multiset(drawn(source, total, 1, 0))
    if kind is Streamed:
        counts = [len(range(rank, total, size)) for rank in range(size)]
    else:
        order = activations._order(len(source.shards), 5, 0).tolist()
        shards = [source.shards[f"{number:06d}.safetensors"]["tokens"] // CONTEXT for number in order]
        counts = [sum(shards[rank::size]) for rank in range(size)]
    assert sum(counts) == total and min(counts) > 0
    parts = [drawn(source, n, size, rank) for rank, n in enumerate(counts)]
    assert multiset([part for of_rank in parts for part in of_rank]) == expected
    for rank, n in enumerate(counts):
        (again,) = drawn(source, 1, size, rank, start=n - 1)
        assert torch.equal(again, parts[rank][-1])


def test_a_text_of_fewer_contexts_than_processes_is_refused(profile, model):
    with pytest.raises(UserError, match="shorter than 1000 contexts, one for each process: add text"):
        drawn(Streamed(profile, model), 1, 1000, 999)


def trained(rank, folder):
    """Two groups of two: the batches that each process steps on."""
    profile, seen, train.SAMPLE = load_profile(folder / "tiny.yml"), [], 512
    step = train.Trainer.step
    train.Trainer.step = lambda trainer, x: seen.append(x.clone()) or step(trainer, x)
    source = Streamed(profile, load_model(profile))
    fit(source, small(n_latents=32, batch=64, tokens=64 * 6), shards=2)
    with contextlib.closing(source.batches(64, 0, 0, rank, 4)) as batches:
        own = list(itertools.islice(batches, 6))
    return seen, own, source.sample(20, 0)


def test_the_shards_of_a_group_see_one_batch(folder):
    found = together(4, folder, trained)
    seen, own, samples = zip(*found, strict=True)
    for i in range(6):
        for group in (0, 2):
            whole = torch.cat([own[group][i], own[group + 1][i]])
            assert torch.equal(seen[group][i], whole) and torch.equal(seen[group + 1][i], whole)
        assert not torch.equal(seen[0][i], seen[2][i])
    assert all(torch.equal(sample, samples[0]) for sample in samples)


# --- states -----------------------------------------------------------------------------------------------------------

RECIPE = small(tokens=32 * 8, dead_after=32, latent_bias=True)
AMONG = {"one": (1, 1), "two groups": (2, 1), "two shards": (2, 2), "two by two": (4, 2), "four shards": (4, 4)}
CHANGES = [
    ("two by two", "two groups"), ("two by two", "two shards"), ("two by two", "one"), ("four shards", "two shards"),
    ("one", "two by two"), ("two groups", "four shards"), ("two shards", "one"), ("one", "two groups"),
]  # fmt: skip


def resharded(rank, folder):
    """Every change: five steps by some processes, of which four are kept, and four by others."""
    train.LOG_EVERY, train.SAVE_EVERY = 1, 2
    dist.destroy_process_group()
    found = {}
    for change in CHANGES:
        for which, source in zip(change, (Stops(12, 24), Planted(12, 24)), strict=True):
            size, shards = AMONG[which]
            if rank >= size:
                continue
            out = folder / "-".join(change).replace(" ", "_")
            meeting = f"file://{out}-{which.replace(' ', '_')}"
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
            try:
                sae, log = fit(source, RECIPE, out=out, resume=True, shards=shards)
                found[change] = weights(sae), log
            except KeyboardInterrupt:
                dist.barrier()
            dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder / 'end'}", rank=rank, world_size=4)
    return found


def since_fired(out):
    states = sorted(out.glob("state-*.pt"))
    return torch.cat([torch.load(path, weights_only=True)["since_fired"] for path in states])


def test_states_fit_another_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    sae, log = fit(Planted(12, 24), RECIPE, out=tmp_path / "straight")
    for found in together(4, tmp_path, resharded):
        for (before, after), (own, lines) in found.items():
            where = f"{before} to {after}"
            assert [line["step"] for line in lines] == [line["step"] for line in log] == list(range(1, 9)), where
            for line, expected in zip(lines, log, strict=True):
                for key in ("loss", "mse", "aux", "l0", "dead"):
                    assert line[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), (where, line["step"], key)
            for name, value in weights(sae).items():
                torch.testing.assert_close(own[name], value, rtol=1e-5, atol=1e-5, msg=f"{where}: {name}")
    assert log[-1]["aux"] > 0 and 0 < log[-1]["dead"] < 1
    for before, after in CHANGES:
        out = tmp_path / f"{before}-{after}".replace(" ", "_")
        shards = AMONG[after][1]
        assert sorted(path.name for path in out.iterdir()) == [
            "log.jsonl", *(f"state-00000008-{shard}of{shards}.pt" for shard in range(shards))
        ]  # fmt: skip
        assert torch.equal(since_fired(out), since_fired(tmp_path / "straight")), (before, after)


def test_a_state_of_one_process_from_before_still_resumes(tmp_path, monkeypatch):
    """It kept a hash of recipe, seed, data and processes; recipes said nothing of precision."""
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    sae, log = fit(Planted(12, 24), RECIPE)
    with pytest.raises(KeyboardInterrupt):
        fit(Stops(12, 24), RECIPE, out=tmp_path)
    (path,) = tmp_path.glob("state-*.pt")
    state = torch.load(path, weights_only=True)
    made = state.pop("made")
    del made["recipe"]["precision"]
    whole = f"{json.dumps(made['recipe'], separators=(',', ':'))} {made['seed']} {made['data']} 1 1"
    torch.save({"identity": hashlib.sha256(whole.encode()).hexdigest()[:16], **state}, path)
    with pytest.raises(UserError, match="another recipe, seed, data or number of processes: choose another --out"):
        fit(Planted(12, 24), RECIPE, 1, out=tmp_path, resume=True)
    again, lines = fit(Planted(12, 24), RECIPE, out=tmp_path, resume=True)
    assert [line["loss"] for line in lines] == [line["loss"] for line in log]
    assert all(torch.equal(value, weights(sae)[name]) for name, value in weights(again).items())


def two(rank, folder, meeting, outs, fault):
    """Train on text among two processes, the latents shared, once in each folder; one of them is killed."""
    torch.set_num_threads(1)
    train.LOG_EVERY, train.SAVE_EVERY, train.SAMPLE = 3, 6, 512
    profile = load_profile(folder / "tiny.yml")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    source = Streamed(profile, load_model(profile))
    if fault and rank == 1:  # half its second state is written
        on_call(torch, "save", 2)
    for out in outs:
        fit(source, LONG.model_copy(update={"n_latents": 48, "tokens": 32 * 24}), 3, out=out, resume=True, shards=2)
    dist.destroy_process_group()


def states(out):
    return [torch.load(path, weights_only=True) for path in sorted(out.glob("state-*.pt"))]


def test_processes_that_were_killed_repeat_the_bits(folder, tmp_path):
    straight, out = tmp_path / "straight", tmp_path / "out"
    codes = ends(children(two, folder, tmp_path / "killed", [out], True, number=2))
    assert codes[0] != 0 and codes[1] == -signal.SIGKILL and states(out)
    assert ends(children(two, folder, tmp_path / "again", [out, straight], False, number=2)) == [0, 0]
    one, other = states(straight), states(out)
    assert len(one) == len(other) == 2
    for before, after in zip(one, other, strict=True):
        for key in ("sae", "moments", "average", "since_fired"):
            pairs = zip(flat(before[key]), flat(after[key]), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), key
        lines = [[{**line, "seconds": 0} for line in state["lines"]] for state in (before, after)]
        assert lines[0] == lines[1] and len(lines[0]) == 8


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for part in (value.values() if isinstance(value, dict) else value) for x in flat(part)]


# --- evaluation -------------------------------------------------------------------------------------------------------


def judged(_rank, folder):
    """All that evaluation shares out, on some hundred contexts and with draws of every kind."""
    profile = load_profile(folder / "tiny.yml")
    model, sae = load_model(profile), SAE(64, 8, k=4, normalize="unit").eval().requires_grad_(False)
    tokens = torch.randint(4096, (333, CONTEXT), generator=torch.Generator().manual_seed(1))
    x = list(metrics.activations(profile, model, tokens))
    found = {"x": torch.cat(x), "evaluated": metrics.evaluate(sae, x), "parts": len(x)}
    found["reconstructed"] = metrics.reconstruct(sae, x)[:3]
    variants = {"sae": sae, "zero": splice.zero, "resample": splice.resample(torch.cat(x).flatten(0, 1), 0)}
    clean, spliced = splice.downstream(model, profile.hook, tokens, variants)
    found |= {"clean": clean, "spliced": {name: tuple(one) for name, one in spliced.items()}}
    longer = torch.randint(4096, (9, 40), generator=torch.Generator().manual_seed(2))
    index = sparsity.drawn(9, 40, torch.Generator().manual_seed(0))
    sources = sparsity.latents(sae), sparsity.channels(3, 0), sparsity.turned(sparsity.latents(sae), 0)
    model.double()  # logits differ by what rounding makes of other batches, and effects are differences of logits
    effects = [sparsity.effects(model, profile.hook, longer, index, source) for source in sources]
    return found | {"effects": [tuple(one) for one in effects]}


def test_every_process_has_the_results_of_one(folder, monkeypatch):
    expected = judged(0, folder)
    for found in together(2, folder, judged, "judging"):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            same(found[name], value, name)


def same(found, expected, name):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=name)
    elif isinstance(expected, float | int):
        assert found == pytest.approx(expected, rel=1e-6), name
    else:
        pairs = expected.items() if isinstance(expected, dict) else enumerate(expected)
        for key, value in pairs:
            same(found[key], value, f"{name}, {key}")


def broken(rank, folder):
    """In the middle of the shared work the second process dies."""
    for _ in ranks.shared(range(5)):
        if rank == 1:
            os._exit(3)
    ranks.together([1])


def test_a_process_whose_sibling_died_says_so(tmp_path):
    assert ends(children(member, 2, tmp_path, broken, number=2), within=30) == [0, 3]
    assert (
        torch.load(tmp_path / "meeting-0.pt", weights_only=True)
        == "another process of this run has stopped: its own error says why"
    )


# --- chapters ---------------------------------------------------------------------------------------------------------

CELLS = [
    "# One",
    'profile = "docstring-gpt"',
    "import json, os, pathlib\nfrom saelib.ranks import here, shared, together\n"
    "found = together([(part, here()[0]) for part in shared(range(5))])\n"
    'folder = pathlib.Path(os.environ["SAELIB_RESULTS"])\nfolder.mkdir(parents=True, exist_ok=True)\n'
    '(folder / "CHAPTER.json").write_text(json.dumps(found))',
]


def chapters(rank, folder, port):
    """`saelib run` as torchrun starts it, where only the first process sees that the first chapter is done."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    runner.NOTEBOOKS = folder / "notebooks"
    runner._last_run = lambda path, _: ("done" if rank == 0 and path.stem == "00_done" else "not run", None)
    runner.run(out=folder / "out")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ranks.gpu() == 1
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"more processes than GPUs here \(2\): torchrun --nproc-per-node=2"):
        ranks.gpu()
    monkeypatch.setenv(ranks.MEETING, "01_one")
    assert ranks.gpu() == 0


def test_chapters_share_their_work_and_the_first_process_keeps_it(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in ("00_done", "01_one", "02_two"):
        title, parameters, work = CELLS
        cells = [nbformat.v4.new_markdown_cell(title), nbformat.v4.new_code_cell(parameters)]
        cells[1].metadata["tags"] = ["parameters"]
        cells.append(nbformat.v4.new_code_cell(work.replace("CHAPTER", name)))
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / f"{name}.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    assert ends(children(chapters, tmp_path, port, number=2)) == [0, 0]
    for name in ("01_one", "02_two"):
        found = json.loads((tmp_path / "out" / "results" / f"{name}.json").read_text())
        assert found == [[part, part % 2] for part in range(5)]
        assert (tmp_path / "out" / f"{name}.ipynb").is_file()
    assert len(list((tmp_path / "out").iterdir())) == 3
