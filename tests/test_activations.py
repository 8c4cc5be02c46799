"""Activations: what the hook sees, every token once, the same batches however reached, nothing damaged read."""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from saelib import UserError, activations
from saelib.activations import Cached, Streamed, harvest
from saelib.models import load_model, load_tokenizer
from saelib.profile import Activations, HuggingFace, Local, Model, load_profile
from saelib.text import token_batches

DEFAULT = load_profile("docstring-gpt").model_copy(update={"device": "cpu"})
HOOK = "blocks.1.hook_resid_post"
CONTEXT, BLOCK, BATCH = 16, 10, 37


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny GPT-2 with random weights, and a text of a few hundred contexts."""
    path = tmp_path_factory.mktemp("activations")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=4096, n_positions=128, n_embd=8, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(path / "model")
    load_tokenizer(DEFAULT).save_pretrained(path / "model")
    word = "alpha beta gamma delta epsilon zeta eta theta".split()
    parts = [" ".join(word[(i * i + i * j + j) % 8] for j in range(20)) + f" {i}" for i in range(40)]
    (path / "text.txt").write_text("\n\n".join(parts))
    return path


@pytest.fixture(scope="module")
def profile(folder):
    return DEFAULT.model_copy(
        update={
            "model": Model(name=str(folder / "model")),
            "text": Local(source="local", path=folder / "text.txt"),
            "hook": HOOK,
            "context_length": CONTEXT,
            "activations": Activations(block=BLOCK),
        }
    )


@pytest.fixture(scope="module")
def model(profile):
    return load_model(profile)


@pytest.fixture(params=[Streamed, Cached])
def source(request, profile, model, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "BUILD", tmp_path)
    return request.param(profile, model)


def first(source, n, batch=BATCH, seed=0, start=0):
    with contextlib.closing(source.batches(batch, seed, start)) as batches:
        return list(itertools.islice(batches, n))


@pytest.fixture
def labels(monkeypatch):
    """In place of activations: token id (in two digits) and position, exact in float16; and how many were harvested."""
    seen = []

    def pieces(model, tokens, hook, positions):
        kept = torch.arange(tokens.shape[1]).expand_as(tokens)[:, slice(*positions)]
        ids = tokens[:, slice(*positions)]
        seen.append(len(tokens))
        yield torch.stack([ids // 64, ids % 64, kept], -1).flatten(0, 1).float()

    monkeypatch.setattr(activations, "_pieces", pieces)
    return seen


def labelled(profile, seed, positions=slice(None)):
    """The labels of all tokens of an epoch."""
    tokens = torch.cat(list(token_batches(profile, load_tokenizer(profile), "train", batch=1, seed=seed)))
    ids, kept = tokens[:, positions], torch.arange(CONTEXT).expand_as(tokens)[:, positions]
    return torch.stack([ids // 64, ids % 64, kept], -1).flatten(0, 1).float()


def multiset(rows):
    return sorted(map(tuple, rows.tolist()))


# --- harvest ---


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.3.hook_resid_post"])
def test_harvest_equals_a_full_run(hook):
    whole = load_model(DEFAULT)
    tokens = torch.randint(4096, (70, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole.run_with_cache(tokens)[1][hook]
    torch.testing.assert_close(harvest(whole, tokens, hook), expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
    for positions, kept in (((1, None), slice(1, None)), ((-1, None), slice(-1, None)), ((2, 5), slice(2, 5))):
        found = harvest(whole, tokens, hook, positions)
        torch.testing.assert_close(found, expected[:, kept].flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_layers_above_the_hook_do_not_run(model):
    ran = []
    handles = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(model.blocks)]
    harvest(model, torch.zeros(1, 4, dtype=torch.int64), "blocks.0.hook_resid_post")
    for handle in handles:
        handle.remove()
    assert ran == [0]


def test_gradients_flow_through_what_is_trained_on_it(model):
    weight = torch.ones(8, requires_grad=True)
    (harvest(model, torch.zeros(1, 4, dtype=torch.int64), HOOK) @ weight).sum().backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("hook", "positions", "words"),
    [
        ("blocks.1.hook_resid_pst", (0, None), "no hook 'blocks.1.hook_resid_pst'; it has .*blocks.1.hook_resid_post"),
        ("blocks.7.hook_resid_post", (0, None), "no such layer, they are 0 to 2"),
        ("resid_post", (0, None), "no hook 'resid_post'; it has .*hook_embed"),
        ("blocks.1.attn.hook_z", (0, None), r"shape \[1, 16, 2, 4\]"),
        (HOOK, (16, None), "selects none of 16 positions"),
        (HOOK, (3, 3), "selects none of 16 positions"),
    ],
)
def test_a_hook_or_positions_that_do_not_fit_are_refused(profile, model, hook, positions, words):
    wrong = profile.model_copy(update={"hook": hook, "activations": Activations(positions=positions)})
    with pytest.raises(UserError, match=words) as error:
        Streamed(wrong, model)
    assert "\n" not in str(error.value)


# --- sources ---


def test_an_epoch_holds_every_token_exactly_once(labels, source, profile):
    n = len(labelled(profile, 0))
    assert n % (BLOCK * CONTEXT) and n % BATCH and n > 3 * BLOCK * CONTEXT, "the last block is partial"
    rows = torch.cat(first(source, -(-3 * n // BATCH), seed=5))
    epochs = [rows[epoch * n : (epoch + 1) * n] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        seed = 0 if isinstance(source, Cached) else activations._mixed(5, number)
        assert multiset(epoch) == multiset(labelled(profile, seed))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    assert not torch.equal(rows[:BATCH], first(source, 1, seed=6)[0])


def test_an_only_block_is_in_another_order_in_every_epoch(labels, profile, model, tmp_path):
    one = profile.model_copy(update={"activations": Activations(block=1000)})
    cache = Cached(one, model, folder=tmp_path)
    epoch, after = first(cache, 2, batch=len(labelled(profile, 0)))
    assert len(cache.shards) == 1 and multiset(epoch) == multiset(after) and not torch.equal(epoch, after)


@pytest.mark.parametrize(("positions", "kept"), [((1, None), range(1, 16)), ((-1, None), [15]), ((0, 1), [0])])
def test_only_the_positions_asked_for_come(labels, source, profile, model, positions, kept):
    chosen = profile.model_copy(update={"activations": Activations(positions=positions, block=BLOCK)})
    rows = torch.cat(first(type(source)(chosen, model), 20, batch=11))
    assert set(rows[:, 2].tolist()) == set(kept)


def test_a_batch_is_the_same_however_it_is_reached(source):
    whole = first(source, 60)
    for start in (0, 1, 7, 23, 41, 58):
        again = first(source, 2, start=start)
        assert all(torch.equal(a, b) for a, b in zip(again, whole[start:], strict=False))
    assert len(whole) == 60 and all(batch.shape == (BATCH, 8) for batch in whole)


def test_a_batch_may_exceed_the_text(source):
    assert first(source, 1, batch=10_000)[0].shape == (10_000, 8)


def test_skipping_does_not_run_the_model(labels, profile, model):
    source = Streamed(profile, model)
    labels.clear()
    first(source, 1, start=2 * BLOCK * CONTEXT // BATCH + 200)
    assert sum(labels) <= 3 * BLOCK, "the block it is in, the next, and one ahead"


def test_sources_and_full_runs_agree(source, profile, model):
    """Values, not only labels: means over an epoch; float16 keeps eleven bits."""
    seed = 0 if isinstance(source, Cached) else activations._mixed(0, 0)
    tokens = torch.cat(list(token_batches(profile, load_tokenizer(profile), "train", batch=1, seed=seed)))
    with torch.no_grad():
        expected = model.run_with_cache(tokens)[1][HOOK].flatten(0, 1)
    found = first(source, 1, batch=len(expected))[0]
    nearest = torch.cdist(found.double(), expected.double(), compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    assert nearest.max() < 2**-10 * expected.norm(dim=1).max()
    torch.testing.assert_close(found.mean(0), expected.mean(0), atol=1e-4, rtol=1e-3)


def test_a_sample_is_of_the_data_and_follows_its_seed(labels, source, profile):
    one, again, other = (source.sample(50, seed) for seed in (0, 0, 1))
    assert one.shape == (50, source.d_model) and torch.equal(one, again) and not torch.equal(one, other)
    assert len(source.sample(3000, 0)) == 3000
    seed = 0 if isinstance(source, Cached) else activations._mixed(0, 0)
    assert set(multiset(one)) <= set(multiset(labelled(profile, seed)))


def test_hugging_face_streams_work_as_well(labels, tmp_path, profile, model, folder):
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": part}) for part in (folder / "text.txt").read_text().split("\n\n")]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    text = HuggingFace(source="huggingface", name=str(tmp_path / "data"), evaluation_documents=3)
    source = Streamed(profile.model_copy(update={"text": text}), model)
    whole = first(source, 30)
    assert torch.equal(first(source, 1, start=25)[0], whole[25])


def test_identity_changes_with_whatever_changes_the_data(profile, model, tmp_path):
    (tmp_path / "other.txt").write_text("another text\n\n" * 50)
    changes = [
        {}, {"hook": "blocks.0.hook_resid_post"}, {"context_length": 8}, {"prepend_bos": True},
        {"activations": Activations(block=BLOCK, positions=(1, None))}, {"activations": Activations(block=BLOCK + 1)},
        {"text": Local(source="local", path=tmp_path / "other.txt")},
    ]  # fmt: skip
    found = [Streamed(profile.model_copy(update=change), model).identity for change in changes]
    found.append(Streamed(profile, model, "validation").identity)
    found.append(Cached(profile, model, folder=tmp_path / "cache").identity)
    found.append(Streamed(profile, load_model(DEFAULT)).identity)
    assert len(set(found)) == len(found)
    assert Streamed(profile, model).identity == found[0]


def test_identity_follows_pythons_library_and_the_content_of_a_local_data_set(model, tmp_path, monkeypatch):
    rows = tmp_path / "data" / "train.jsonl"
    rows.parent.mkdir()
    rows.write_text('{"text": "a b"}')
    data = DEFAULT.model_copy(update={"text": HuggingFace(source="huggingface", name=str(rows.parent)), "hook": HOOK})
    docstrings = DEFAULT.model_copy(update={"hook": HOOK})
    kinds = (docstrings, "train"), (docstrings, "validation"), (data, "train")
    found = [Streamed(profile, model, split).identity for profile, split in kinds]
    rows.write_text('{"text": "a c"}')
    monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    again = [Streamed(profile, model, split).identity for profile, split in kinds]
    assert [old == new for old, new in zip(found, again, strict=True)] == [False, True, False]


def test_text_shorter_than_a_context_is_refused(profile, model, tmp_path):
    (tmp_path / "short.txt").write_text("a b\n\nc d")
    short = profile.model_copy(update={"text": Local(source="local", path=tmp_path / "short.txt")})
    with pytest.raises(UserError, match="shorter than a context: add text"):
        first(Streamed(short, model), 1)


# --- mixing ---


def neighbours(rows):
    """Mean cosine of each vector with the next, the mean taken out before."""
    unit = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    return (unit[1:] * unit[:-1]).sum(1).mean().item()


def test_neighbours_in_a_batch_are_no_more_alike_than_random_pairs(tmp_path):
    parts = [f"{name} " * 40 + "is used as it is in the module" for name in ("array", "graph", "model", "token")] * 40
    (tmp_path / "text.txt").write_text("\n\n".join(f"{part} {i}" for i, part in enumerate(parts)))
    text = Local(source="local", path=tmp_path / "text.txt")
    profile = DEFAULT.model_copy(update={"text": text, "activations": Activations(block=64)})
    source = Streamed(profile, load_model(DEFAULT))
    rows = first(source, 1, batch=64 * 64)[0]
    unmixed = source._harvested(next(source._contexts(0)), torch.arange(64 * 64), threading.Event())
    noise = 5 / 64  # five standard errors of a mean over 4096 pairs, whose cosines lie within -1 and 1
    assert abs(neighbours(rows)) < noise < 0.2 < neighbours(unmixed)
    assert abs(neighbours(rows[torch.randperm(len(rows))])) < noise


# --- thread and memory ---


def test_an_error_in_the_thread_reaches_the_consumer_and_ends_it(profile, model, monkeypatch):
    source = Streamed(profile, model)

    def fail(*_):
        raise UserError("the model is gone")

    batches = source.batches(BLOCK * CONTEXT, 0)
    next(batches)
    monkeypatch.setattr(activations, "_pieces", fail)
    with pytest.raises(UserError, match="the model is gone"):
        list(batches)
    assert not harvesters()


def harvesters():
    return [thread for thread in threading.enumerate() if thread.name.startswith("harvest")]


def test_closing_ends_the_thread(source):
    batches = source.batches(BATCH, 0)
    next(batches)
    assert len(harvesters()) == 1
    batches.close()
    assert not harvesters()


def test_closing_does_not_wait_for_the_rest_of_a_block(profile, model, monkeypatch):
    source, ran = Streamed(profile, model), []

    def slow(model, tokens, *_):
        for _ in tokens:
            ran.append(len(ran) >= BLOCK and time.sleep(0.1))
            yield torch.zeros(CONTEXT, 8)

    monkeypatch.setattr(activations, "_pieces", slow)
    batches = source.batches(BATCH, 0)
    next(batches)
    batches.close()
    assert BLOCK <= len(ran) < 2 * BLOCK


def test_values_that_are_not_finite_are_refused(profile):
    broken = load_model(profile)
    torch.nn.init.constant_(broken.blocks[1].mlp.original_component.c_proj.bias, float("nan"))
    with pytest.raises(UserError, match=f"activations at {HOOK} are not finite"):
        Streamed(profile, broken)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", [Streamed, Cached])
def test_memory_stays_within_what_is_stated(profile, model, tmp_path, monkeypatch, kind):
    """Blocks of 35 MB and more, so that each is a mapping of its own and goes back to the system when it is let go."""
    seen, n, width = [], 45, 24576

    def resident():
        seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    def wide(model, tokens, hook, positions):
        for part in tokens:
            resident()
            yield torch.ones(len(part), width)

    monkeypatch.setattr(activations, "_pieces", wide)
    wider = profile.model_copy(update={"activations": Activations(block=n)})
    source = kind(wider, model, **({"folder": tmp_path} if kind is Cached else {}))
    assert 1 <= source.memory / (2 * n * CONTEXT * width * 4) < 1.01
    before = seen[0]
    with contextlib.closing(source.batches(8, 0)) as batches:
        for _ in itertools.islice(batches, 400):
            resident()
    assert max(seen) - before < 1.2 * source.memory, "a third block would be half of it, or a quarter"


# --- shards ---


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def cache(labels, profile, model, tmp_path):
    return Cached(profile, model, folder=tmp_path / "cache")


def test_a_manifest_says_what_is_there(cache, profile):
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    assert manifest["identity"] == cache.identity and manifest["hook"] == HOOK and manifest["complete"]
    assert sum(shard["tokens"] for shard in manifest["shards"].values()) == len(labelled(profile, 0))
    assert all(shard["shape"] == [shard["tokens"], 3] for shard in manifest["shards"].values())
    assert set(contents(cache.folder)) == {*manifest["shards"], "manifest.json"}


@pytest.mark.parametrize("writes", [0, 1, 2, 3, 6])
def test_a_harvest_that_was_cut_off_goes_on_where_it_was(cache, labels, profile, model, tmp_path, monkeypatch, writes):
    """Cut off in the middle of a write: of a shard, or of the manifest after it."""
    whole, left, write = contents(cache.folder), [writes], Path.write_bytes

    def cut_off(path, data):
        left[0] -= 1
        write(path, data if left[0] >= 0 else data[: len(data) // 2])
        if left[0] < 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", cut_off)
        with pytest.raises(KeyboardInterrupt):
            Cached(profile, model, folder=tmp_path / "second")
    labels.clear()
    resumed = Cached(profile, model, folder=tmp_path / "second")
    found = contents(tmp_path / "second")
    assert {name: data for name, data in found.items() if "partial" not in name} == whole
    assert len(labels) == 1 + len(cache.shards) - writes // 2, "one to know the shape, and what was missing"
    assert all(torch.equal(a, b) for a, b in zip(first(cache, 9), first(resumed, 9), strict=True))
    labels.clear()
    Cached(profile, model, folder=tmp_path / "second")
    assert len(labels) == 1


def test_a_damaged_shard_is_refused_and_made_again(cache, profile, model):
    path, expected = cache.folder / "000001.safetensors", first(cache, 9)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="cache/000001.safetensors is damaged: delete it and start again"):
        first(cache, 40)
    path.unlink()
    with pytest.raises(UserError, match="cache/000001.safetensors is gone: start again"):
        first(cache, 40)
    again = Cached(profile, model, folder=cache.folder)
    assert all(torch.equal(a, b) for a, b in zip(first(again, 9), expected, strict=True))


def test_a_folder_of_other_activations_is_refused(cache, profile, model):
    other = profile.model_copy(update={"hook": "blocks.0.hook_resid_post"})
    with pytest.raises(UserError, match="holds other activations than asked for: delete it"):
        Cached(other, model, folder=cache.folder)
    (cache.folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json is damaged: delete the folder"):
        Cached(profile, model, folder=cache.folder)


def test_as_many_tokens_as_asked_for_are_cached(labels, profile, model, tmp_path):
    cache = Cached(profile, model, folder=tmp_path / "cache", tokens=BLOCK * CONTEXT + 1)
    assert [shard["tokens"] for shard in cache.shards.values()] == [BLOCK * CONTEXT] * 2


def test_what_float16_cannot_hold_is_refused(profile, model, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "_pieces", lambda model, tokens, *_: iter([torch.full((tokens.numel(), 3), 7e4)]))
    with pytest.raises(UserError, match="exceed 65504, the most that float16 holds: stream them"):
        Cached(profile, model, folder=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
