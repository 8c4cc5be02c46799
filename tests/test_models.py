"""Loading models: equal to Hugging Face, known by their weights, and refused in one line when damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from saelib import UserError
from saelib.models import checkpoints, fingerprint, load_model, load_tokenizer, main_model, second_seed
from saelib.profile import ROOT, Model, load_profile

DEFAULT = load_profile("docstring-gpt")


def profile_of(folder, **fields):
    return DEFAULT.model_copy(update={"model": Model(name=str(folder), **fields), "device": "cpu"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny GPT-2 folder with random weights and the shipped tokenizer."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=4096, n_positions=128, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    load_tokenizer(DEFAULT).save_pretrained(path)
    return path


def test_hooks_see_the_hugging_face_hidden_states():
    source = main_model(DEFAULT)
    bridge = load_model(DEFAULT.model_copy(update={"device": "cpu"})).double()  # in float32 processors differ by more
    reference = AutoModelForCausalLM.from_pretrained(
        source.name, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    tokens = torch.randint(4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens)
        expected = reference(tokens, output_hidden_states=True)
    torch.testing.assert_close(logits, expected.logits, atol=1e-9, rtol=1e-9)
    for layer in range(bridge.cfg.n_layers - 1):  # the last hidden state of Hugging Face is taken after ln_f
        hidden = expected.hidden_states[layer + 1]
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_post"], hidden, atol=1e-9, rtol=1e-9)


def test_shipped_checkpoints_start_at_zero_and_end_with_the_final_model():
    found = checkpoints(DEFAULT)
    steps = [checkpoint.step for checkpoint in found]
    assert steps == sorted(set(steps)) and steps[0] == 0 and len(steps) >= 15
    assert found[-1] == main_model(DEFAULT)
    assert sum(0.05 * steps[-1] <= step for step in steps) >= 8
    recipe = DEFAULT.pretrain
    assert all(c.tokens == c.step * recipe.batch * recipe.context_length for c in found)


def test_both_seeds_were_trained_for_as_long():
    assert second_seed(DEFAULT).step == main_model(DEFAULT).step == DEFAULT.pretrain.steps
    for checkpoint in (main_model(DEFAULT), second_seed(DEFAULT)):
        facts = json.loads((Path(checkpoint.name) / "config.json").read_text())["training"]
        assert facts["recipe"] == DEFAULT.pretrain.model_dump(mode="json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_named(folder):
    with pytest.raises(UserError, match="no cuda device here: set device to auto, or to one of"):
        load_model(profile_of(folder).model_copy(update={"device": "cuda"}))


def test_all_shipped_weights_differ_and_are_known_by_their_fingerprint():
    named = [main_model(DEFAULT), second_seed(DEFAULT), checkpoints(DEFAULT)[0]]
    prints = [fingerprint(load_model(DEFAULT, checkpoint)) for checkpoint in named]
    assert len(set(prints)) == 3
    assert prints[0] == fingerprint(load_model(DEFAULT))


def test_the_model_card_says_what_the_configs_say():
    card = (ROOT / "models/docstring-gpt/README.md").read_text()
    for checkpoint in (main_model(DEFAULT), second_seed(DEFAULT)):
        facts = json.loads((Path(checkpoint.name) / "config.json").read_text())["training"]
        row = f"| {facts['seed']} | {facts['step']:,} | {facts['tokens']:,} | {facts['validation_loss']:.4f} |"
        assert row in card and facts["data"] in card
    for name, package in DEFAULT.text.packages.items():
        assert f"| {name} | {package.version} | {package.fingerprint or 'training only'} |" in card


def test_weights_in_git_stay_small():
    size = sum(file.stat().st_size for file in (ROOT / "models").rglob("*.safetensors"))
    assert size < 56e6, "models and SAEs together"


def test_published_checkpoints_are_revisions():
    found = checkpoints(load_profile("stanford-gpt2-small-a"))
    assert len(found) == 609 and found[228].step == 20_000 and found[-1].step == 400_000
    assert found[-1].revision == "checkpoint-400000"
    assert found[-1].tokens == 400_000 * 512 * 1024
    assert checkpoints(load_profile("gpt2-small")) == []


def damaged(folder, tmp_path, name, change):
    copy = tmp_path / name
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def truncate(path):
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def edit_config(**values):
    def change(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **values}))

    return change


def poison(path):
    model = GPT2LMHeadModel.from_pretrained(path)
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    model.save_pretrained(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncate, "cannot load model truncate"),
        (lambda path: (path / "model.safetensors").unlink(), "cannot load model"),
        (lambda path: (path / "config.json").write_text("{"), "no readable config.json"),
        (lambda path: (path / "config.json").unlink(), "no readable config.json"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "cannot load the tokenizer"),
        (edit_config(vocab_size=4000), "cannot load model|4096 tokens but the model only 4000"),
        (poison, r"not finite \(transformer.h.0.mlp.c_fc.weight\)"),
    ],
    ids=["truncated", "no weights", "bad config", "no config", "bad tokenizer", "tokenizer too large", "nan"],
)
def test_a_damaged_model_is_refused_in_one_line(folder, tmp_path, change, words):
    broken = damaged(folder, tmp_path, "truncate", change)
    with pytest.raises(UserError, match=words) as error:
        load_model(profile_of(broken))
    assert "\n" not in str(error.value)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    config = GPT2Config(
        vocab_size=1000, n_positions=128, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    load_tokenizer(DEFAULT).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="4096 tokens but the model only 1000"):
        load_model(profile_of(tmp_path))


def test_a_context_longer_than_the_model_is_refused(folder):
    with pytest.raises(UserError, match="contexts of 256 tokens, but model .* takes at most 128"):
        load_model(profile_of(folder).model_copy(update={"context_length": 256}))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="no model folder models/typo/deep: `git checkout models`"):
        load_model(profile_of("models/typo/deep"))
    with pytest.raises(UserError, match="no model folder models/docstring-gtp: `git checkout models`"):
        load_model(profile_of("models/docstring-gtp"))
    with pytest.raises(UserError, match="no training checkpoints are known for 'gpt2'"):
        checkpoints(profile_of("gpt2", checkpoints="gpt2"))
    with pytest.raises(UserError, match="no step-NNNNNN folder"):
        checkpoints(profile_of("gpt2", checkpoints=str(tmp_path)))
