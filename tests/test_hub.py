"""What `saelib fetch` gets is whole, whatever happens on the way, and afterwards nothing is asked of the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from rehearsal import GPT2, STANFORD, Fault, local_hub

from saelib import UserError, formats, hub, remote, runner, train
from saelib.models import fingerprint, load_model
from saelib.profile import ROOT, load_profile, override

PROFILE = """
extends: gpt2-small
name: narrow
model: {revision: 607a30d783dfa663caf39e06633721c8d4cfcd7e}
text: {evaluation_documents: 300, documents: 2000, tokens: 16000000000}
"""
SIZES = {"n_embd": 8, "documents": 2000, "n_shards": 4, "latents": {"32k": 64, "128k": 96}}
WEIGHTS = r"gpt2/model\.safetensors"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with local_hub(tmp_path_factory.mktemp("hub"), **SIZES) as found:
        yield found


@pytest.fixture
def waits(served, tmp_path, monkeypatch):
    """This process talks to the local hub, with a cache of its own, and does not sleep; how long it would have."""
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what a cut connection loses at most
    monkeypatch.setattr(remote, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(train, "BUILD", tmp_path / "build")
    served.faults.clear()
    served.log.clear()
    found = []
    monkeypatch.setattr(remote.time, "sleep", found.append)
    return found


@pytest.fixture(scope="module")
def profile():
    return load_profile("gpt2-small")


def get(profile, only):
    items = hub.needs(profile, only)
    hub.fetch(profile, items)
    return hub.needs(profile, only)


def ranges(served, end):
    return [asked for method, path, asked in served.log if method == "GET" and path.endswith(end)]


# --- the whole way ----------------------------------------------------------------------------------------------------

LOOK = """
import sys, torch
from saelib import UserError, models, text
from saelib.profile import load_profile, override
from saelib.train import load_sae
profile = load_profile(sys.argv[1])
tokenizer = models.load_tokenizer(profile)
read = [text.contexts(profile, tokenizer, split, 8, seed=None) for split in ("validation", "test", "train")]
model = models.load_model(profile)
saes = [load_sae(profile, name, model) for name in ("small", "large")]
print(models.fingerprint(model), torch.stack(read).sum((1, 2)).tolist(), [s.n_latents for s in saes])
try:
    models.load_model(override(profile, {"model.name": "nobody/nothing"}))
except UserError as error:
    print("refused:", error, file=sys.stderr)
"""


def called(*arguments, **environment):
    found = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )
    assert found.returncode == 0, found.stderr
    return found


def test_after_fetch_everything_loads_offline(served, tmp_path):
    """In processes of their own; nothing but `saelib fetch` was online before."""
    (tmp_path / "narrow.yml").write_text(PROFILE)
    called("-m", "saelib.cli", "fetch", "--profile", tmp_path / "narrow.yml")
    asked = {path.rsplit("/", 1)[1] for method, path, _ in served.log if method == "GET"}
    assert not {"tf_model.h5", "pytorch_model.bin", "decoder_model.onnx"} & asked
    shards = {path for method, path, part in served.log if method == "GET" and path.endswith(".parquet") and not part}
    assert len(shards) == 3  # of 4: 0.3 of the documents to evaluate on, 0.4 of the tokens to train on, and 2 %
    served.log.clear()
    then = called("-c", LOOK, tmp_path / "narrow.yml", HF_HUB_OFFLINE="1")
    local = load_model(override(load_profile("gpt2-small"), {"model.name": str(served.folder / "gpt2")}))
    assert then.stdout.startswith(fingerprint(local)) and "[64, 96]" in then.stdout
    assert "refused: cannot reach the server of nobody/nothing: `saelib fetch`" in then.stderr
    assert "Traceback" not in then.stderr and not served.log


@pytest.mark.long
def test_the_full_size_loads_offline_and_is_the_same(tmp_path):
    """12 layers of 768, 50,257 tokens, 128k latents: three minutes, and 8 GB of disk while it runs."""
    (tmp_path / "narrow.yml").write_text(PROFILE)
    sizes = {"n_embd": 768, "n_head": 12, "vocab_size": 50_257, "latents": {"32k": 32_768, "128k": 131_072}}
    with local_hub(tmp_path, **SIZES | sizes) as served:
        called("-m", "saelib.cli", "fetch", "--profile", tmp_path / "narrow.yml")
        first = called("-c", LOOK, tmp_path / "narrow.yml")
    then = called("-c", LOOK, tmp_path / "narrow.yml", **served.environment, HF_HUB_OFFLINE="1")
    assert then.stdout == first.stdout and "[32768, 131072]" in then.stdout
    assert "404" in first.stderr and "Traceback" not in first.stderr + then.stderr
    shutil.rmtree(tmp_path)


# --- faults -----------------------------------------------------------------------------------------------------------


def sound(served, item):
    """No file of the cache differs from the served one, and nothing half-done lies about."""
    below = [path for path in item.where.rglob("*") if path.is_file()]
    assert not [path for path in below if "incomplete" in path.name or "partial" in path.name]
    for path in (path for path in below if "snapshots" in path.parts):
        assert path.read_bytes() == served.repos["models", GPT2]["main"][path.name].read_bytes()


@pytest.mark.parametrize("kind", ["cut", "stall", "short", "corrupt", 429, 500])
def test_the_hub_fails_once(served, profile, waits, kind):
    served.faults.append(Fault(kind, WEIGHTS))
    (item,) = get(profile, "model")
    assert item.there and served.faults[0].seen == 1
    sound(served, item)
    resumed = any(asked.startswith("bytes=") and asked != "bytes=0-" for asked in ranges(served, "model.safetensors"))
    assert resumed == (kind in {"cut", "stall"})
    assert kind != 429 or any(wait >= 7 for wait in waits)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("stall", "timed out"),
        ("short", "should be of size"),
        ("corrupt", "checksum"),
        (404, "404"),
        (429, "429"),
        (500, "500"),
    ],
)
def test_the_hub_fails_for_good(served, profile, waits, monkeypatch, kind, said):
    monkeypatch.setattr(remote, "TRIES", 2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    served.faults.append(Fault(kind, WEIGHTS, times=10**6))
    (item,) = hub.needs(profile, "model")
    with pytest.raises(UserError, match=said) as error:
        hub.fetch(profile, [item])
    assert "\n" not in str(error.value) and "model.safetensors" in str(error.value)
    sound(served, item)
    assert not hub.needs(profile, "model")[0].there
    served.faults.clear()
    assert get(profile, "model")[0].there


@pytest.mark.parametrize("kind", ["cut", "stall", "short", "corrupt", 429, 500])
def test_openai_fails_once(served, profile, waits, kind):
    served.faults.append(Fault(kind, r"32k.*\.pt"))
    small, large = get(profile, "saes")
    assert small.there and large.there and not list(small.where.parent.glob(".*"))
    sae, sent = formats.load(small.where), formats.load(served.folder / "32k.pt")
    assert torch.equal(sae.W_dec, sent.W_dec) and sae.normalize == "layer_norm" and sae.k == 32
    assert sae.facts["source"] == f"{served.url}/pt/gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt"
    resumed = any(asked not in {"", "bytes=0-"} for asked in ranges(served, "8.pt"))
    assert resumed == (kind in {"cut", "stall", "short"})
    assert kind != 429 or any(wait >= 7 for wait in waits)


def test_an_interrupted_file_goes_on_where_it_was(served, profile, waits, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 1)
    served.faults += [Fault("cut", r"32k.*\.pt"), Fault(500, r"32k.*\.pt", times=99), Fault(404, "jbloom", times=99)]
    with pytest.raises(UserError, match=r"500.*nor from the copy on the hub"):
        get(profile, "saes")
    (partial,) = (train.BUILD / "sae" / "gpt2-small").glob(".small.*.partial")
    done = partial.stat().st_size
    served.faults.clear()
    assert all(item.there for item in get(profile, "saes"))
    assert f"bytes={done}-" in ranges(served, "8.pt")


@pytest.mark.parametrize("fault", [404, "corrupt"])
def test_the_copy_on_the_hub_is_the_second_source(served, profile, waits, monkeypatch, fault):
    monkeypatch.setattr(remote, "TRIES", 2)
    served.faults.append(Fault(fault, r"\.pt$", times=99))
    for item in get(profile, "saes"):
        sae, sent = formats.load(item.where), formats.load(served.folder / {"small": "32k", "large": "128k"}[item.name])
        assert torch.equal(sae.W_dec, sent.W_dec) and sae.k == sent.k and sae.normalize == "layer_norm"
        assert sae.facts["model"] == GPT2 and sae.facts["source"].startswith("jbloom/GPT2-Small-OAI-v5-")


def test_a_file_that_is_not_that_of_the_first_download_is_refused(served, profile, waits, monkeypatch):
    get(profile, "saes")
    shutil.rmtree(train.BUILD)
    monkeypatch.setattr(remote, "TRIES", 1)
    path = "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt"
    monkeypatch.setitem(served.blobs, path, served.folder / "128k.pt")
    with pytest.raises(UserError, match=r"not what it was when it was first fetched"):
        get(profile, "saes")  # though the copy on the hub is there
    assert not any("jbloom" in path for _, path, _ in served.log)
    assert not list(train.BUILD.rglob("*.partial"))


# --- what is needed ---------------------------------------------------------------------------------------------------


def test_sizes_are_the_servers_and_what_is_there_is_not_got_again(served, profile, waits):
    (item,) = hub.needs(profile, "model")
    files = served.repos["models", GPT2]["main"]
    assert item.bytes == sum(files[file.path].stat().st_size for file in item.files) and not item.there
    assert {file.path for file in item.files} >= {"config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
    assert not {file.path for file in item.files} & {"pytorch_model.bin", "tf_model.h5", "README.md"}
    get(profile, "model")
    served.log.clear()
    get(profile, "model")
    assert {method for method, path, _ in served.log if "resolve" in path or "lfs" in path} == set()


def test_checkpoints_are_those_the_chapters_load_or_all(served, waits):
    stanford = load_profile("stanford-gpt2-small-a")
    every = hub.needs(stanford, "checkpoints")
    assert len(every) == len({item.source for item in every}) == 609
    few = hub._checkpoints(stanford, every=False)
    assert len(few) == hub.SEEN == runner.chapters()[0].parameters["n_checkpoints"] and {
        few[0].revision,
        few[-1].revision,
    } == {"checkpoint-0", "checkpoint-400000"}
    assert {item.bytes for item in few} == {few[0].bytes}
    hub.fetch(stanford, few[:2])
    files = {file.path for file in few[0].files}
    assert "pytorch_model.bin" in files and hub._checkpoints(stanford, every=False)[1].there
    assert served.repos["models", STANFORD]["checkpoint-0"]["pytorch_model.bin"].stat().st_size < few[0].bytes


def test_without_a_server_the_record_answers(served, profile, waits, monkeypatch):
    (known,) = get(profile, "model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.needs(profile, "model") == [known]
    other = override(profile, {"model.name": "some/other"})
    (item,) = hub.needs(other, "model")
    assert item.bytes is None and not item.there and "unknown" in hub.table([item])
    with pytest.raises(UserError, match="cannot reach the server of some/other: `saelib fetch`"):
        hub.fetch(other, [item])


def test_folders_of_one_disk_share_its_room(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100))
    hub.check_space([(tmp_path / "a", 60), (tmp_path, 30)])
    with pytest.raises(UserError, match="text.documents and text.tokens"):
        hub.check_space([(tmp_path / "a", 60), (tmp_path / "not" / "there", 60)])


def test_of_what_is_partly_there_only_the_rest_counts(served, profile, waits):
    (item,) = get(profile, "model")
    weights = next(file for file in item.files if file.path == "model.safetensors")
    Path(item.cached(weights)).unlink()
    (partly,) = hub.needs(profile, "model")
    assert (item.left, partly.left) == (0, weights.bytes) and hub.to_come([partly]) == [(item.where, weights.bytes)]


def test_what_a_server_asks_for_and_forbids(served, profile, waits):
    served.faults.append(Fault(401, "api/models"))
    with pytest.raises(UserError, match="401, accept its licence there, and set HF_TOKEN"):
        hub.needs(profile, "model")
    date = formatdate(time.time() + 60, usegmt=True)
    assert remote._asked("7") == 7 and 57 < remote._asked(date) < 61 and remote._asked("soon") is None
    remote.RECORD.write_text("{")
    with pytest.raises(UserError, match="record.json is damaged: delete it"):
        hub.needs(profile, "model")


def test_too_small_a_disk_is_said_before_anything_is_got(served, profile, waits, monkeypatch):
    items = hub.needs(profile, "model")
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2, 1, items[0].bytes))
    served.log.clear()
    with pytest.raises(UserError, match="GB free: make room, or set HF_HOME"):
        hub.fetch(profile, items)
    assert not served.log


def test_the_shipped_profile_takes_58_of_80_shards(profile):
    files = [remote.File("README.md", 1, ""), *(remote.File(f"{i:05d}", 1, "") for i in range(80))]
    assert hub._share(profile, files) == files[:59]  # 80 * 1.02 * (20,000 / 8,013,769 + 6.4e9 / 9.04e9) = 57.97
    assert len(hub._share(override(profile, {"recipe.tokens": 10**6, "recipe.batch": 4096}), files)) == 3
    assert hub._share(override(profile, {"text.tokens": None}), files) == files


@pytest.mark.parametrize(
    ("hook", "place", "copy"),
    [
        ("blocks.8.hook_resid_post", "resid_post_mlp", "resid-post"),
        ("blocks.0.hook_resid_mid", "resid_post_attn", "resid-mid"),
        ("blocks.11.hook_mlp_out", "resid_delta_mlp", "mlp-out"),
        ("blocks.3.hook_attn_out", "resid_delta_attn", "attn-out"),
    ],
)
def test_addresses_follow_from_the_hook(profile, monkeypatch, hook, place, copy):
    monkeypatch.delenv("SAELIB_OPENAI_URL", raising=False)
    url, repository, _ = hub._release(override(profile, {"hook": hook}), "large")
    store = "https://openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small"
    assert url == f"{store}/{place}_v5_128k/autoencoders/{hook.split('.')[1]}.pt"
    assert repository == f"jbloom/GPT2-Small-OAI-v5-128k-{copy}-SAEs"


def test_a_hook_without_released_saes_is_refused(profile):
    with pytest.raises(UserError, match=r"no SAE at blocks.8.hook_resid_pre: choose"):
        hub._release(override(profile, {"hook": "blocks.8.hook_resid_pre"}), "small")
