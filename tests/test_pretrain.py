"""The recipe that made docstring-gpt: resumable to the bit, averaged as stated, complete or absent on disk."""

import json

import numpy as np
import pytest
import torch

from saelib import UserError, pretrain
from saelib.models import load_model
from saelib.pretrain import Run, batch_at
from saelib.profile import Local, Model, Pretrain, load_profile

RECIPE = Pretrain(
    n_layer=1, n_head=2, d_model=16, vocab_size=300, context_length=32, batch=2, steps=12, warmup=2,
    ema=0.9, checkpoints=(0, 5, 12),
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 300, 5000).astype(np.uint16)


def test_batches_are_a_function_of_seed_and_step():
    inputs, targets = batch_at(TOKENS, RECIPE, 0, 7)
    assert inputs.shape == targets.shape == (2, 32)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, batch_at(TOKENS, RECIPE, 0, 7)[0])
    assert not torch.equal(inputs, batch_at(TOKENS, RECIPE, 0, 8)[0])
    assert not torch.equal(inputs, batch_at(TOKENS, RECIPE, 1, 7)[0])


def test_the_stated_share_of_contexts_repeats_itself():
    recipe = RECIPE.model_copy(update={"batch": 400, "context_length": 128, "repeat_share": 0.1})
    rows = torch.cat(batch_at(TOKENS, recipe, 0, 0), 1)[:, :128]
    periods = [any(torch.equal(row[p:], row[:-p]) for p in range(16, 65)) for row in rows]
    assert 0.05 < np.mean(periods) < 0.16
    plain = batch_at(TOKENS, recipe.model_copy(update={"repeat_share": 0.0}), 0, 0)[0]
    assert not any(any(torch.equal(row[p:], row[:-p]) for p in range(16, 65)) for row in plain)


def test_the_average_is_the_closed_form():
    run, weights = Run(RECIPE, 0, "cpu"), []
    for _ in range(6):
        run.advance(TOKENS)
        weights.append(run.parameters[0].detach().clone())
    decay = RECIPE.ema
    shares = torch.tensor([decay ** (5 - i) for i in range(6)])
    expected = sum(share * weight for share, weight in zip(shares / shares.sum(), weights, strict=True))
    torch.testing.assert_close(next(run.averaged().parameters()).detach(), expected)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    straight = Run(RECIPE, 0, "cpu")
    for _ in range(8):
        straight.advance(TOKENS)
    first, second = Run(RECIPE, 0, "cpu"), Run(RECIPE, 0, "cpu")
    for _ in range(3):
        first.advance(TOKENS)
    first.save(tmp_path / "state.pt")
    second.resume(tmp_path / "state.pt")
    for _ in range(5):
        second.advance(TOKENS)
    for one, other in zip(straight.parameters + straight.average, second.parameters + second.average, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="another recipe, seed or text"):
        Run(RECIPE, 1, "cpu").resume(tmp_path / "state.pt")


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """A tiny run on a local text, caching below tmp_path."""
    monkeypatch.setattr(pretrain, "BUILD", tmp_path / "build")
    monkeypatch.setattr(pretrain, "HELD_OUT", 16)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(200)]
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(rng.choice(words, 40)) for _ in range(700)))
    text = Local(source="local", path=tmp_path / "text.txt")
    return load_profile("docstring-gpt").model_copy(
        update={"text": text, "pretrain": RECIPE, "context_length": 16, "induction_context": 32, "device": "cpu"}
    )


def test_the_command_writes_loadable_models_and_resumes_after_a_crash(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 4)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    pretrain.pretrain(profile, straight)
    advance, calls = Run.advance, []

    def crash(self, tokens):
        calls.append(self.step)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return advance(self, tokens)

    monkeypatch.setattr(Run, "advance", crash)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(profile, stopped)
    assert not (stopped / "model.safetensors").exists()
    pretrain.pretrain(profile, stopped)
    for name in ("model.safetensors", "checkpoints/step-000005/model.safetensors"):
        assert (straight / name).read_bytes() == (stopped / name).read_bytes()
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["step-000000", "step-000005"]
    logs = [[json.loads(line) for line in (run / "log.jsonl").open()] for run in (straight, stopped)]
    losses = [[(line["step"], line["training_loss"], line["validation_loss"]) for line in log] for log in logs]
    assert losses[0] == losses[1] and [step for step, *_ in losses[0]] == [0, 4, 5, 8, 12]
    before = (straight / "log.jsonl").read_text(), (straight / "model.safetensors").read_bytes()
    pretrain.pretrain(profile, straight)  # a finished run stays as it is
    assert before == ((straight / "log.jsonl").read_text(), (straight / "model.safetensors").read_bytes())
    model = load_model(profile.model_copy(update={"model": Model(name=str(straight))}))
    assert model.cfg.n_layers == 1 and model.cfg.d_model == 16
    facts = json.loads((straight / "config.json").read_text())["training"]
    assert facts["step"] == 12 and facts["recipe"]["checkpoints"] == [0, 5, 12]


def test_a_diverging_run_stops_with_the_step(profile, tmp_path):
    mad = profile.model_copy(update={"pretrain": RECIPE.model_copy(update={"lr": 1e30, "clip": 1e30, "warmup": 1})})
    with pytest.raises(UserError, match="step .*lower pretrain.lr"):
        pretrain.pretrain(mad, tmp_path / "out")


def test_a_profile_without_a_recipe_is_refused(profile, tmp_path):
    with pytest.raises(UserError, match="no pretrain section"):
        pretrain.pretrain(profile.model_copy(update={"pretrain": None}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_text_makes_another_vocabulary(profile, tmp_path):
    first = pretrain._tokenizer(profile)
    (tmp_path / "text.txt").write_text("\n\n".join(f"zebra {i} quagga" for i in range(700)))
    assert "zebra" in "".join(pretrain._tokenizer(profile).get_vocab()) and "zebra" not in "".join(first.get_vocab())


@pytest.mark.parametrize(
    "values", [{"checkpoints": ()}, {"warmup": 0}, {"n_head": 3}, {"batch": 0}, {"ema": 1.0}, {"vocab_size": 70000}]
)
def test_an_impossible_recipe_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Pretrain(**{**RECIPE.model_dump(), **values})


def test_a_schedule_must_rise_to_the_end():
    with pytest.raises(ValueError, match="checkpoints must rise and end at steps"):
        Pretrain(steps=10, checkpoints=(0, 5))
