"""Ablation sparsity: known answers, the fast path against one plain forward pass per latent, and bad input."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pandas as pd
import pytest
import torch

from saelib import UserError, metrics, sparsity
from saelib.metrics import mean
from saelib.profile import ROOT
from saelib.sae import SAE
from saelib.sparsity import GAUSSIAN, measured, norms, of_sae
from saelib.text import Document

HOOK = "blocks.0.hook_resid_post"  # two blocks above it


def plain(*arguments, **named):
    """The plain reference, which the benchmark times."""
    spec = importlib.util.spec_from_file_location("plain_sparsity", ROOT / "benchmarks" / "plain_sparsity.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.sparsity(*arguments, **named)


@pytest.fixture(scope="module")
def model(lively_model):
    return lively_model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(4096, (5, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sae():
    return SAE(40, 24, k=4).eval().requires_grad_(False)


# --- known answers ----------------------------------------------------------------------------------------------------


def gaussian(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_gaussian_changes_give_two_over_pi():
    assert measured(gaussian(4, 4, 16, 4096)).result().value == pytest.approx(2 / math.pi, rel=0.005)


def test_one_changed_logit_gives_the_least_there_is():
    change = torch.zeros(1, 1, 16, 4096)
    change[..., 3, 77] = -2.5
    assert measured(change).result().value == pytest.approx(1 / (16 * 4096), rel=1e-12)


def test_half_up_and_half_down_is_the_most_there_is():
    change = torch.ones(1, 1, 16, 4097)
    change[..., :2048] = -1  # the median is one of them: it takes itself off
    found = measured(change).result().value
    assert found == pytest.approx(2048 / 4097, rel=1e-6)
    change[..., 2048] = 0
    assert measured(change).result().value == pytest.approx(1, rel=1e-3)


def test_a_constant_on_all_logits_changes_nothing():
    change = gaussian(2, 3, 16, 4096).double()
    shifted = change + 100 * gaussian(2, 3, 16, 1)
    for one, other in zip(measured(change)[:2], measured(shifted)[:2], strict=True):
        assert torch.allclose(one, other, rtol=1e-10)


def test_planted_scales_give_the_formula():
    scales = torch.tensor([1.0, *[0.1] * 15]), torch.tensor([1.0, *[0.0] * 15]), torch.rand(16)
    for s in scales:
        found = measured(gaussian(2, 4, 16, 4096) * s[:, None])
        formula = GAUSSIAN * s.sum() ** 2 / (16 * s.square().sum())
        assert found.result().value == pytest.approx(formula.item(), rel=0.005)
        assert found.uneven().value == pytest.approx(formula.item(), rel=0.005)
        assert torch.allclose(torch.tensor([p.value for p in found.profile()]), s.clamp(0), rtol=0.02)
    assert measured(gaussian(2, 4, 16, 4096) * scales[0][:, None]).result().value == pytest.approx(0.216, abs=0.003)


def test_a_shorter_window_is_the_first_tokens():
    change = gaussian(2, 3, 16, 512)
    assert measured(change).result(1).value == pytest.approx(measured(change[:, :, :1]).result().value, rel=1e-9)


@pytest.mark.parametrize("vocab", [511, 512])
def test_median_is_that_of_torch(vocab):
    x = gaussian(3, 2, vocab)
    assert torch.equal(sparsity.median(x), x.median(-1, keepdim=True).values)


def test_result_averages_what_was_switched_off_and_groups_by_context():
    found = measured(gaussian(3, 4, 2, 64))
    on = torch.tensor([[True, False, False, False], [True] * 4, [False] * 4])
    found = found._replace(on=on)
    assert found.result() == mean(found.sparsity(), on)
    assert found.part(np.s_[:, :1]).result().value == pytest.approx(found.sparsity()[:2, 0].mean().item())
    assert found.part(np.s_[:1]).result().value == pytest.approx(found.sparsity()[0, 0].item())


# --- the fast path ----------------------------------------------------------------------------------------------------


def residual(model, tokens):
    return model.run_with_cache(tokens, names_filter=HOOK)[1][HOOK]


@pytest.mark.parametrize("edit", [False, True])
def test_the_fast_path_equals_one_forward_pass_per_latent(model, tokens, sae, edit):
    index = torch.tensor([16, 0, 7, 7, 3])
    found = of_sae(model, HOOK, tokens, index, sae, edit)
    parts = sparsity.latents(sae)(residual(model, tokens)[torch.arange(5), index])
    values, scales = plain(model, HOOK, tokens, index.tolist(), parts, sae if edit else None)
    assert torch.equal(found.on, parts.on) and torch.equal(found.ids, parts.ids) and found.on.any(1).all()
    assert torch.allclose(found.sparsity(), values, rtol=0, atol=1e-5, equal_nan=True)
    assert torch.allclose(found.l2 / 4096**0.5, scales, rtol=1e-4, atol=1e-5)
    assert found.result().value == pytest.approx(mean(values, parts.on).value, abs=1e-5)


@pytest.mark.parametrize("kind", ["channels", "towards the mean", "turned"])
def test_so_do_the_baselines(model, tokens, sae, kind):
    def source():  # a new one draws the same numbers again
        return {
            "channels": lambda: sparsity.channels(3, 0),
            "towards the mean": lambda: sparsity.channels(3, 0, torch.arange(24.0)),
            "turned": lambda: sparsity.turned(sparsity.latents(sae), 0),
        }[kind]()

    found = sparsity.effects(model, HOOK, tokens, 5, source())
    parts = source()(residual(model, tokens)[:, 5])
    values, _ = plain(model, HOOK, tokens, [5] * 5, parts)
    assert torch.allclose(found.sparsity(), values, rtol=0, atol=1e-5, equal_nan=True)


@torch.no_grad()
def test_switching_a_latent_off_is_setting_its_value_to_zero(model, tokens, sae):
    """A reference that asks the SAE itself for the reconstruction without a latent."""
    index, part = 7, 2
    found = of_sae(model, HOOK, tokens, index, sae, edit=True)
    x = residual(model, tokens)
    codes = sae.encode(x)
    values = codes.values.clone()
    values[:, index, part] = 0
    whole, without = (
        model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda x, hook, y=y: y)])
        for y in (sae(x), sae.decode(codes._replace(values=values)))
    )
    l1, l2 = norms((without - whole)[:, index : index + 16])
    assert torch.allclose(found.l1[:, part].float(), l1, rtol=1e-3)
    assert torch.allclose(found.l2[:, part].float(), l2, rtol=1e-3)


def test_what_is_too_weak_to_change_a_logit_does_not_count(model, tokens):
    def source(x):
        vectors = torch.stack([torch.ones_like(x), torch.full_like(x, 1e-30)], 1)
        return sparsity.Parts(vectors, torch.zeros(len(x), 2, dtype=int), torch.ones(len(x), 2, dtype=bool))

    found = sparsity.effects(model, HOOK, tokens, 3, source)
    assert found.on[:, 0].all() and not found.on[:, 1].any() and found.result().value > 0.1


def test_little_memory_gives_the_same(model, tokens, sae, monkeypatch):
    whole = of_sae(model, HOOK, tokens, 4, sae, edit=True)
    monkeypatch.setitem(sparsity.LOGITS, "cpu", 3 * 16 * 4096)  # three copies at a time
    monkeypatch.setattr(metrics, "LATENTS", 40 * 32)  # one context through the SAE
    monkeypatch.setitem(sparsity.SUB_BATCH, "cpu", 64)  # two contexts
    assert torch.allclose(of_sae(model, HOOK, tokens, 4, sae, edit=True).l1, whole.l1, rtol=1e-4)


def test_an_sae_whose_tokens_differ_in_active_latents(model, tokens):
    relu = SAE(40, 24, architecture="relu").eval().requires_grad_(False)
    index = torch.tensor([2, 9, 0, 16, 5])
    found = of_sae(model, HOOK, tokens, index, relu)
    active = (relu.encode(residual(model, tokens)[torch.arange(5), index]).values > 0).sum(1)
    assert torch.equal(found.on.sum(1), active) and active.unique().numel() > 1


def test_channels_are_single_ones_and_directions_keep_their_length(sae):
    x = gaussian(6, 24)
    zero = sparsity.channels(5, 0)(x)
    assert ((zero.vectors != 0).sum(-1) == 1).all()
    assert torch.equal(zero.vectors.sum(-1), x.gather(1, zero.ids))
    assert all(len(row.unique()) == 5 for row in zero.ids)
    source = sparsity.latents(sae)
    assert torch.allclose(source(x).vectors.norm(dim=-1), sparsity.turned(source, 1)(x).vectors.norm(dim=-1), atol=1e-6)


def test_contributions_add_up_to_the_reconstruction(sae):
    x = gaussian(6, 24) + 3
    codes = sae.encode(x)
    without = sae.decode(codes._replace(values=torch.zeros_like(codes.values)))
    assert torch.allclose(sparsity.latents(sae)(x).vectors.sum(1) + without, sae(x), atol=1e-5)


def test_blinkers_hide_what_stands_before(model, tokens, sae):
    """In the blocks above, the window sees only itself: attention to it is what is left."""
    index = 9
    found = of_sae(model, HOOK, tokens, index, sae, alone=True)
    x = residual(model, tokens)
    parts = sparsity.latents(sae)(x[:, index])

    def mask(scores, hook):
        scores[..., index:, :index] = torch.finfo(scores.dtype).min
        return scores

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", mask) for layer in (1, 2)]
    with torch.no_grad():
        clean = model.run_with_hooks(tokens[:1], fwd_hooks=hooks)

        def ablate(x, hook):
            x = x.clone()
            x[0, index] -= parts.vectors[0, 0]
            return x

        change = model.run_with_hooks(tokens[:1], fwd_hooks=[(HOOK, ablate), *hooks]) - clean
    l1, l2 = norms(change[:, index : index + 16])
    assert torch.allclose(found.l1[0, 0].float(), l1[0], rtol=1e-4)
    assert torch.allclose(found.l2[0, 0].float(), l2[0], rtol=1e-4)
    apart = of_sae(model, HOOK, tokens, index, sae)
    assert not torch.allclose(found.l1, apart.l1, rtol=1e-2)
    assert torch.allclose(of_sae(model, HOOK, tokens, 0, sae, alone=True).l1, of_sae(model, HOOK, tokens, 0, sae).l1)


def test_attention_to_the_only_token_there_is(model, tokens):
    given = sparsity.attention_to(model, HOOK, tokens, 3)
    assert given.shape == (5, 15) and (given > 0).all() and (given < 1).all()
    patterns = [model.run_with_cache(tokens)[1][f"blocks.{layer}.attn.hook_pattern"] for layer in (1, 2)]
    assert torch.allclose(given[:, 0], torch.stack([p[:, :, 4, 3] for p in patterns]).mean((0, 2)), atol=1e-6)


def test_by_latent_counts_and_averages():
    found = measured(gaussian(3, 2, 2, 64))._replace(ids=torch.tensor([[5, 7], [5, 5], [9, 7]]))
    table = sparsity.by_latent(found)
    assert table.times.to_dict() == {5: 3, 7: 2, 9: 1}
    assert table.sparsity[7] == pytest.approx(found.sparsity()[[0, 2], [1, 1]].mean().item())
    assert found.ids[table.row[7], table.part[7]] == 7


@torch.no_grad()
def test_faces_show_one_document_and_the_tokens_whose_logits_fall_most(model, tokens, sae):
    vector = sparsity.latents(sae)(residual(model, tokens)[:1, 6]).vectors[0, 1]

    def ablate(x, hook):
        return torch.cat([x[:, :6], x[:, 6:7] - vector, x[:, 7:]], 1)

    change = model.run_with_hooks(tokens[:1], fwd_hooks=[(HOOK, ablate)]) - model(tokens[:1])
    change = (change - change.median(-1, keepdim=True).values)[0, 6:22]
    fallen = change.amin(0).topk(4, largest=False).indices
    text = [model.tokenizer.decode(ids).replace("\n", "⏎") for ids in (tokens[0, 4:6], tokens[0, 6:7], tokens[0, 7:8])]
    which = torch.tensor([0] * 4 + [1] * 4 + [2] * 24).expand(5, 32)
    origin = [Document("", name, name, "module") for name in "abc"], which
    table = pd.DataFrame({"row": [0], "part": [1]}, index=[17])
    shown = sparsity.faces(model, HOOK, tokens, torch.full((5,), 6), sae, table, origin).loc[17]
    assert shown.iloc[0] == "{}⟦{}⟧{}".format(*text) and shown["from"] == "b: b"
    assert shown["raises"] == "  ".join(model.tokenizer.decode([i]).replace("\n", "⏎") for i in fallen.tolist())


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_context_shorter_than_the_window_after_the_index(model, tokens, sae):
    with pytest.raises(UserError, match="16 tokens from index 17 on do not fit into contexts of 32: take longer"):
        of_sae(model, HOOK, tokens, torch.tensor([0, 3, 17, 2, 4]), sae)
    with pytest.raises(UserError, match="index -1"):
        of_sae(model, HOOK, tokens, -1, sae)
    with pytest.raises(UserError, match="no contexts"):
        of_sae(model, HOOK, tokens[:0], 4, sae)


def test_tokens_are_drawn_where_a_window_fits():
    draw = torch.Generator().manual_seed(0)
    index = sparsity.drawn(500, 64, draw, first=8)
    assert (index.min(), index.max()) == (8, 48)
    with pytest.raises(UserError, match="index 8 on do not fit into contexts of 12"):
        sparsity.drawn(3, 12, draw, first=8)


def test_no_active_latents(model, tokens, sae):
    silent = SAE(40, 24, k=4, latent_bias=True).eval().requires_grad_(False)
    silent.latent_bias -= 100
    with pytest.raises(UserError, match="no active latents"):
        of_sae(model, HOOK, tokens, 4, silent)


def test_an_sae_of_another_width(model, tokens):
    with pytest.raises(UserError, match="the SAE reads 25 dimensions, not 24"):
        of_sae(model, HOOK, tokens, 4, SAE(40, 25, k=4))


def test_a_hook_inside_a_block_or_not_there(model, tokens, sae):
    with pytest.raises(UserError, match="not at a block's end"):
        of_sae(model, "blocks.0.hook_resid_mid", tokens, 4, sae)
    with pytest.raises(UserError, match="no hook"):
        of_sae(model, "blocks.0.hook_nonsense", tokens, 4, sae)
