"""A model of another family, by the very profile of the book's page: loaded, harvested, trained on, and asked."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saelib import cli, induction, n2g, sparsity, splice, steering, train
from saelib.activations import harvest
from saelib.formats import load
from saelib.metrics import activations, evaluate
from saelib.models import load_model, main_model
from saelib.profile import ROOT, load_profile
from saelib.text import contexts


def folder_of_text(path) -> list[str]:
    """Sentences whose words depend on each other a little: 4,000 files."""
    path.mkdir()
    draw = torch.Generator().manual_seed(0)
    words = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8").split()
    for number in range(4000):
        first = int(torch.randint(len(words) - 60, (1,), generator=draw))
        (path / f"{number}.txt").write_text(" ".join(words[first : first + 60]) + f" {number}", encoding="utf-8")
    return [str(file) for file in path.iterdir()]


def model_folder(path, files: list[str]) -> None:
    """Llama in miniature: rotary positions, RMS norms, two heads to each key, a BOS; random weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=letters, show_progress=False)
    tokenizer.train(files[:500], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The page's profile with our paths, and sizes for a model of 3 blocks and 48 dimensions."""
    folder = tmp_path_factory.mktemp("own")
    model_folder(folder / "model", folder_of_text(folder / "text"))
    page = (ROOT / "book" / "own_model.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(name: mine.*?)```", page, re.S)[1]
    assert len(block.splitlines()) == 12
    changes = {
        "HuggingFaceTB/SmolLM2-135M": str(folder / "model"), "/data/texts": str(folder / "text"),
        "blocks.22": "blocks.1",
        "k: 32, k_aux: 256, tokens: 100000000": "k: 8, k_aux: 32, tokens: 20000, batch: 512, dead_after: 10000",
        "block: 2048": "block: 64", "n_latents: 8192": "n_latents: 128",
    }  # fmt: skip
    for theirs, ours in changes.items():
        assert block.count(theirs) == 1
        block = block.replace(theirs, ours)
    assert set(yaml.safe_load(block)) <= set(type(load_profile("docstring-gpt")).model_fields)
    (folder / "my.yml").write_text(block, encoding="utf-8")
    return folder / "my.yml"


@pytest.fixture(scope="module")
def profile(file):
    return load_profile(file)


@pytest.fixture(scope="module")
def model(profile):
    return load_model(profile)


@pytest.fixture(scope="module")
def sae(file):
    """Trained by the page's command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saelib.train.VALIDATION", 64)
        ended = CliRunner().invoke(
            cli.main, ["train", "small", "--profile", str(file), "--out", str(file.with_name("sae"))]
        )
    assert ended.exit_code == 0 and "normalised MSE" in ended.output, ended.output
    return load(file.with_name("sae"))


@pytest.fixture(scope="module")
def tokens(profile, model):
    return contexts(profile, model.tokenizer, "test", 8)


@torch.no_grad()
def test_it_is_the_model_that_hugging_face_loads(profile, model, tokens):
    theirs = LlamaForCausalLM.from_pretrained(main_model(profile).name, attn_implementation="eager").eval()
    expected = theirs(tokens, output_hidden_states=True)
    torch.testing.assert_close(model(tokens), expected.logits, atol=1e-4, rtol=1e-4)
    assert (tokens[:, 0] == model.tokenizer.bos_token_id).all()
    x = harvest(model, tokens, profile.hook)
    torch.testing.assert_close(x, expected.hidden_states[2].flatten(0, 1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_suffix_is_the_whole_model(profile, model, tokens, sae):
    below = splice.prefix(model, profile.hook, tokens)
    assert torch.equal(splice.suffix(model, below, below.x), model(tokens))
    hooks = [(profile.hook, lambda x, hook: sae(x))]
    expected = model.run_with_hooks(tokens, fwd_hooks=hooks)
    torch.testing.assert_close(splice.suffix(model, below, sae(below.x)), expected)
    untouched, found = splice.downstream(model, profile.hook, tokens, {"sae": sae, "same": lambda x: x})
    right = expected[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(found["sae"].ce, -right, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["same"].ce, untouched)


@torch.no_grad()
def test_what_a_latent_changes_is_what_a_whole_run_says(profile, model, tokens, sae):
    """Sparsity runs on from a cache in the middle of a context: positions are rotated as there."""
    index, hook, found = 20, profile.hook, {}
    above = sparsity._Above(model, hook, tokens, None, False)
    less = torch.randn(len(tokens), 48, generator=torch.Generator().manual_seed(0))

    def changed(x, hook):
        x[:, index] -= less
        return x

    for name, hooks in {"before": [], "after": [(hook, changed)]}.items():
        found[name] = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, index : index + sparsity.WINDOW]
    ours = above.change(index, torch.arange(len(tokens)), less)
    torch.testing.assert_close(ours, found["after"] - found["before"], atol=1e-3, rtol=1e-3)
    assert sparsity.of_sae(model, hook, tokens, index, sae).result().value > 0


def test_it_is_trained_on_and_explained(profile, model, tokens, sae):
    measured = evaluate(sae, list(activations(profile, model, tokens)))
    assert 0 < measured["normalized_mse"] < 1 and measured["l0"] == pytest.approx(8, abs=0.5)
    found = n2g.events(model, profile.hook, sae, tokens)
    latents = found.latents[:3].tolist()
    explanations = n2g.explain(model, profile.hook, sae, tokens, latents)
    assert set(explanations) == set(latents)
    x = splice.prefix(model, profile.hook, tokens).x
    steered = steering.clamped(sae, latents[0], 2.0)(x, 1.0)
    assert steered.shape == x.shape and not torch.equal(steered, x)


def test_paths_into_shared_keys(model, lively_model):
    """Of a model whose heads share nothing, the same as TransformerLens says; here, they lead somewhere."""
    for of, source, target in ((lively_model, (0, 1), (2, 0)), (model, (0, 1), (2, 3))):
        source, target = induction.Head(*source), induction.Head(*target)
        of_tokens = torch.randint(2, 400, (2, 4, 20), generator=torch.Generator().manual_seed(0))
        pair = induction.Pair(*of_tokens, torch.arange(4), [])
        found = induction.patch_path(of, pair, source, target)
        caches = [of.run_with_cache(t, names_filter="blocks.0.attn.hook_z")[1] for t in of_tokens]
        with torch.no_grad():
            ours = {name: induction._path_into_group(of, pair, caches, source, target, name) for name in "qkv"}
        assert ours == pytest.approx(found, abs=1e-3) and all(ours.values())


def test_induction_and_copying_are_measured(profile, model):
    strings = induction.repeated_tokens(model, 4, 20, seed=0, prepend_bos=True)
    scores = induction.head_scores(model, strings, induction.induction_pattern(strings[:1]))
    assert scores.shape[-2:] == (3, 4) and scores.isfinite().all()
    assert all(part.shape == (3, 4) for part in induction.copying(profile, main_model(profile), strings))


def test_a_training_run_that_has_not_ended_is_not_there(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "BUILD", tmp_path)
    folder = train.where(profile, "small")
    folder.mkdir(parents=True)
    (folder / "log.jsonl").touch()
    assert not train.there(profile, "small")
    (folder / "config.json").touch()
    assert train.there(profile, "small")
