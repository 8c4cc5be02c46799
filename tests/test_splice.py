"""Suffixes against the whole model, and the measures against a slow reference."""

import math
import threading
from types import SimpleNamespace

import pytest
import torch

from saelib import UserError, metrics, native, splice
from saelib.activations import harvest
from saelib.sae import SAE
from saelib.text import contexts

CONTEXT = 24
HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]
HOOKS += ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre", "blocks.1.hook_resid_mid"]
HOOKS += ["blocks.0.hook_mlp_out", "blocks.3.hook_mlp_out", "blocks.2.hook_attn_out"]


@pytest.fixture(scope="module")
def tokens(profile, model):
    return contexts(profile, model.tokenizer, "test", 12, context=CONTEXT)


def blurred(x):
    """Something that changes every activation, also after a layer norm, and is no zero."""
    return 0.5 * x + 0.5 * x.roll(1, -1)


# --- suffix -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("hook", HOOKS)
def test_suffix_is_the_whole_model(model, tokens, hook):
    below = splice.prefix(model, hook, tokens)
    assert torch.equal(splice.suffix(model, below, below.x), model(tokens))
    expected = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: blurred(x))])
    assert not torch.allclose(expected, model(tokens), atol=0.1)
    assert torch.equal(splice.suffix(model, below, blurred(below.x)), expected)
    assert torch.equal(splice.suffix(model, below, below.x), model(tokens))  # no hook and no cache stays behind


@torch.no_grad()
def test_a_replacement_reaches_no_earlier_token(model, tokens):
    below = splice.prefix(model, HOOKS[0], tokens)
    x = below.x.clone()
    x[:, 10] = 0
    moved = (splice.suffix(model, below, x) - model(tokens)).abs().amax((0, 2))
    assert (moved[:10] == 0).all() and (moved[10:] > 0).all()


def test_another_thread_may_run_the_same_model(model, tokens):
    """As the harvesting thread does while an SAE is trained and evaluated."""
    below = splice.prefix(model, "blocks.1.hook_mlp_out", tokens)
    done = threading.Event()

    def busy():
        while not done.is_set():
            harvest(model, tokens[:3, :10], HOOKS[2])

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        again = [splice.prefix(model, below.hook, tokens).residual for _ in range(20)]
    finally:
        done.set()
        thread.join()
    assert all(torch.equal(one, below.residual) for one in again)


def test_bad_hooks_are_named(model, tokens):
    for hook, words in {
        "blocks.2.hook_nothing": "the model has no hook 'blocks.2.hook_nothing'; it has blocks.2.hook_",
        "blocks.9.hook_resid_post": "no such layer, they are 0 to 3",
        "hook_embed": "hook 'hook_embed' is in no block: name one that is",
        "blocks.1.attn.hook_pattern": "not a vector for each token: name another",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            splice.downstream(model, hook, tokens, {})
        assert "\n" not in str(error.value)


# --- downstream -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow(model, hook, tokens, variant):
    """Cross-entropy of both runs, KL and agreement, in float64 from whole logits."""
    runs = [model(tokens), model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: variant(x))])]
    p, q = (logits.double().log_softmax(-1) for logits in runs)
    ce = [-log[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0] for log in (p, q)]
    return *ce, (p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).double()


@pytest.mark.parametrize("hook", ["blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"])
@pytest.mark.parametrize("variant", [blurred, splice.zero], ids=["blurred", "zero"])
def test_measures_equal_the_slow_reference(model, tokens, hook, variant):
    clean, found = splice.downstream(model, hook, tokens, {"it": variant})
    expected = slow(model, hook, tokens, variant)
    for value, reference in zip((clean, *found["it"][:3]), expected, strict=True):
        assert value.shape == reference.shape
        torch.testing.assert_close(value.double(), reference, atol=2e-5, rtol=0)


class Head:
    """A model whose residual stream is its logits: what `_compared` does to any numbers."""

    def __init__(self, vocabulary):
        self.cfg = SimpleNamespace(d_vocab=vocabulary)

    ln_final = unembed = staticmethod(lambda x: x.clone())


@pytest.mark.parametrize("offset", [0.0, -100.0])
@pytest.mark.parametrize("chunk", [1, 5000, 10**6])
def test_measures_on_random_logits(monkeypatch, offset, chunk):
    monkeypatch.setitem(splice.LOGITS, "cpu", chunk)
    generator = torch.Generator().manual_seed(0)
    runs = 4 * torch.randn(3, 20, 7, 50, generator=generator)
    runs[2] = runs[0] + 1e-3 * runs[2]
    tokens = torch.randint(50, (20, 7), generator=generator)
    log = (runs + offset).double().log_softmax(-1)
    ce, kl, agree = splice._compared(Head(50), runs + offset, tokens)
    expected = -log[:, :, :-1].gather(-1, tokens[None, :, 1:, None].expand(3, -1, -1, -1))[..., 0]
    torch.testing.assert_close(ce[:, :, :-1].double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(kl.double(), (log[0].exp() * (log[0] - log)).sum(-1), atol=5e-6, rtol=1e-5)
    assert torch.equal(agree.bool(), log.argmax(-1) == log[0].argmax(-1))
    assert (kl[0] == 0).all()


def test_the_identity_changes_nothing_and_a_rerun_neither(model, tokens):
    variants = {"identity": lambda x: x, "copy": torch.clone, "blurred": blurred}
    clean, found = splice.downstream(model, HOOKS[2], tokens, variants)
    for name in ("identity", "copy"):
        assert (found[name].ce - clean).abs().max() <= 1e-6 and found[name].kl.abs().max() <= 1e-6
        assert (found[name].agree == 1).all() and found[name].mse.value == 0
    again = splice.downstream(model, HOOKS[2], tokens, variants)
    assert torch.equal(again[0], clean)
    assert all(torch.equal(a, b) for a, b in zip(again[1]["blurred"][:3], found["blurred"][:3], strict=True))


def test_batches_do_not_matter(model, tokens, monkeypatch):
    whole = splice.downstream(model, HOOKS[1], tokens, {"blurred": blurred})
    monkeypatch.setitem(splice.SUB_BATCH, "cpu", 5 * CONTEXT)
    monkeypatch.setitem(splice.LOGITS, "cpu", 7 * 4096)
    monkeypatch.setattr(metrics, "LATENTS", 2 * CONTEXT)
    parts = splice.downstream(model, HOOKS[1], tokens, {"blurred": blurred})
    torch.testing.assert_close(parts[0], whole[0], atol=1e-5, rtol=0)
    for part, all_at_once in zip(parts[1]["blurred"][:3], whole[1]["blurred"][:3], strict=True):
        torch.testing.assert_close(part, all_at_once, atol=2e-5, rtol=0)
    assert parts[1]["blurred"].mse == pytest.approx(whole[1]["blurred"].mse)


def test_variants_do_not_see_each_other(model, tokens):
    def vandal(x):
        return x.mul_(0)  # changes what it was given

    _, alone = splice.downstream(model, HOOKS[1], tokens, {"blurred": blurred})
    _, after = splice.downstream(model, HOOKS[1], tokens, {"vandal": vandal, "blurred": blurred})
    assert torch.equal(alone["blurred"].ce, after["blurred"].ce)


def test_bad_replacements_are_named(model, tokens):
    with pytest.raises(UserError, match=r"thin turns activations of shape .* into .*: it does not fit"):
        splice.downstream(model, HOOKS[1], tokens, {"thin": lambda x: x[..., :5]})
    with pytest.raises(UserError, match="broken gives values that are not finite: check its weights"):
        splice.downstream(model, HOOKS[1], tokens, {"broken": lambda x: x / 0})
    wide = SAE(64, model.cfg.d_model + 2, k=4).eval()
    with pytest.raises(
        UserError, match=r"the SAE reads vectors of 130 entries, not 128: take one of this model and hook"
    ):
        splice.downstream(model, HOOKS[1], tokens, {"wide": wide})


# --- ablations --------------------------------------------------------------------------------------------------------


def test_ablations_are_what_they_say():
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    assert (splice.zero(x) == 0).all() and splice.zero(x).shape == x.shape
    centre = x.flatten(0, 1).mean(0)
    assert torch.equal(splice.constant(centre)(x), centre.expand(6, 5, 4))
    pool = torch.arange(40.0).view(10, 4)
    drawn = splice.resample(pool, seed=1)(x)
    assert drawn.shape == x.shape and torch.equal(drawn, splice.resample(pool, seed=1)(x))
    assert set(drawn[..., 0].flatten().tolist()) <= set(pool[:, 0].tolist())
    assert not torch.equal(drawn, splice.resample(pool, seed=2)(x))
    part = splice.only(slice(1, 3), splice.zero)(x)
    assert (part[:, 1:3] == 0).all() and torch.equal(part[:, [0, 3, 4]], x[:, [0, 3, 4]]) and x.all()
    called, skipped = (splice.only(slice(-3, -1), splice.resample(pool, seed=1)) for _ in range(2))
    called(x)
    skipped.skip(x.shape[:2])
    assert torch.equal(called(x), skipped(x))


def test_the_mean_is_normalised_error_one(model, tokens):
    """Mean ablation by the mean of unit activations is the predictor that the error is measured against."""
    x = splice.prefix(model, HOOKS[2], tokens).x
    unit = (x - x.mean(-1, keepdim=True)) / (x - x.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True)

    def predictor(x):
        centred = x - x.mean(-1, keepdim=True)
        return unit.mean((0, 1)) * centred.norm(dim=-1, keepdim=True) + x.mean(-1, keepdim=True)

    _, found = splice.downstream(model, HOOKS[2], tokens, {"mean": predictor})
    assert found["mean"].mse.value == pytest.approx(1, abs=1e-5)


def test_ablating_the_last_layer_leaves_one_prediction(model, tokens):
    """After the last block nothing tells tokens apart any more: a constant predicts the same everywhere."""
    _, found = splice.downstream(model, HOOKS[3], tokens, {"zero": splice.zero})
    below = splice.prefix(model, HOOKS[3], tokens)
    logits = splice.suffix(model, below, splice.zero(below.x))
    assert torch.equal(logits, logits[:1, :1].expand_as(logits))
    expected = -logits[0, 0].log_softmax(-1)[tokens[:, 1:]]
    torch.testing.assert_close(found["zero"].ce, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [1, 7, 4096, 50_257])
def test_compiled_statistics_are_those_of_float64(n):
    generator = torch.Generator().manual_seed(n)
    logits = 20 * torch.randn(6, n, generator=generator) + torch.tensor([0.0, 1e3, -1e3, 0, 0, 0])[:, None]
    logits[3, n // 2] = 200.0  # all others underflow
    p = torch.randn(6, n, generator=generator).softmax(-1)
    top, lse, expected = native.predictions(logits, p) or splice.statistics(logits, p)
    for found, wanted in zip((top, lse, expected), splice.statistics(logits.double(), p.double()), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=3e-6, atol=3e-5)
    logits[1, n // 3] = math.nan
    lse = (native.predictions(logits, p) or splice.statistics(logits, p))[1]
    assert lse.isnan().tolist() == [False, True, False, False, False, False]
