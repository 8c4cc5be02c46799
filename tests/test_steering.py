"""Steering: the identity at strength 0, planted directions, and the shared run against plain forward passes."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from saelib import UserError, sparsity, steering
from saelib.sae import SAE
from saelib.splice import prefix, suffix
from saelib.steering import (
    LEAST,
    Curves,
    added,
    breaks,
    clamped,
    costs,
    crossing,
    drawn,
    own_tokens,
    places,
    pushed,
    swept,
    typical,
)

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def model(lively_model):
    return lively_model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(4096, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["topk", "relu"])
def sae(request):
    normalize = "unit" if request.param == "topk" else "none"
    return SAE(40, 24, k=4, architecture=request.param, normalize=normalize).eval().requires_grad_(False)


def activation(seed=0):
    return torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(seed)) * 5 + 1


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(2)), dim=-1)


# --- pushing ----------------------------------------------------------------------------------------------------------


def test_strength_0_is_the_identity(model, tokens, sae):
    way = added(sae, unit(24), 3.0)
    x = activation()
    assert torch.equal(way(x, 0.0), x)
    below = prefix(model, HOOK, tokens)
    assert torch.equal(suffix(model, below, way(below.x, 0.0)), suffix(model, below, below.x))
    found = swept(model, HOOK, tokens, [way], [0.0], torch.tensor([[1, 2], [3, -1]]))
    assert not found.rise.any() and not found.odds.any()


def test_adding_moves_by_a_multiple_of_the_scale(sae):
    x, direction = activation(), unit(24)
    moved = added(sae, direction, 0.25)(x, 2.0) - x
    scale = (x - x.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True) if sae.normalize == "unit" else 1
    assert torch.allclose(moved, 0.5 * direction * scale, atol=1e-5)


def test_clamping_edits_the_reconstruction_and_keeps_its_error(sae):
    x = activation()
    codes = sae.encode(x)
    latent = int(codes.dense(sae.n_latents).sum((0, 1)).argmax())
    dense = codes.dense(sae.n_latents).clone()
    dense[..., latent] = 0.7
    expected = sae.decode(codes._replace(values=dense, indices=None)) + (x - sae(x))
    assert torch.allclose(clamped(sae, latent, 0.35)(x, 2.0), expected, atol=1e-5)
    silent = codes.dense(sae.n_latents)[..., latent] == 0
    assert torch.equal(clamped(sae, latent, 0.7)(x, 0.0)[silent], x[silent]), (
        "0 is an ablation, and nothing where it is off"
    )
    assert torch.allclose(
        clamped(sae, latent, 0.7)(x, 1.0)[silent], added(sae, sae.W_dec[latent], 0.7)(x, 1.0)[silent], atol=1e-5
    )


def test_a_bos_is_not_steered(sae):
    x = activation()
    moved = (pushed(added(sae, unit(24), 1.0), 2.0, x, 1) != x).any(-1)
    assert not moved[:, 0].any() and moved[:, 1:].all()


def test_the_shared_run_equals_plain_ones(model, tokens, sae, monkeypatch):
    monkeypatch.setitem(steering.LOGITS, "cpu", 2 * 24 * 4096)  # more than one part, the last one smaller
    sets, strengths = torch.tensor([[5, 9, 11], [7, -1, -1]]), [0.3, 1.0]
    directions = unit(2, 24)
    found = swept(
        model,
        HOOK,
        tokens,
        [added(sae, u, length) for u, length in zip(directions, (1.0, 2.0), strict=True)],
        strengths,
        sets,
    )

    def plain(variant):
        logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda x, hook: variant(x, 1.0))])[:, :-1].double()
        p = logits.softmax(-1)
        ce = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        return ce.mean(1), torch.stack([p[..., row[row >= 0]].sum(-1).logit().mean(1) for row in sets])

    before = plain(lambda x, _: x)
    for i, (direction, length) in enumerate(zip(directions, (1.0, 2.0), strict=True)):
        assert not found.rise[i, 0].any() and not found.odds[i, 0].any()
        for j, strength in enumerate(strengths):
            after = plain(added(sae, direction, length * strength))
            assert torch.allclose(found.rise[i, j + 1], after[0] - before[0], atol=1e-4)
            assert torch.allclose(found.odds[i, j + 1], after[1] - before[1], atol=1e-4)


def test_writing_without_a_push_is_drawing_from_the_model(model, monkeypatch):
    prompt, still = torch.arange(5), (lambda x, _: x, 0.0)
    monkeypatch.setattr(steering, "WRITTEN", 2)
    same = steering.written(model, HOOK, prompt, [still, still], seed=3)
    assert same.shape == (2, 2) and torch.equal(same[0], same[1]), "the same luck for all"
    draws = torch.stack([steering.written(model, HOOK, prompt, [still], seed)[0, 0] for seed in range(200)])
    p = model(prompt[None])[0, -1].softmax(-1)
    likely = p.topk(200).indices
    assert torch.isin(draws, likely).double().mean() == pytest.approx(p[likely].sum().item(), abs=0.15)


def test_what_is_written_stays_text():
    class Tokenizer:
        def decode(self, ids):
            return "</script>\n"

    table = pd.DataFrame({"text": [steering.said(Tokenizer(), [[1, 2]])]})
    assert "&lt;/script&gt;⏎" in table.to_html() and "</script>" not in table.to_html()


# --- curves -----------------------------------------------------------------------------------------------------------


def planted(a, b, strengths=(0, 0.25, 0.5, 1, 2, 4), n=6):
    """Rise a s^2, gain b s, of each direction; two sets, the second of which never moves."""
    s = torch.tensor(strengths, dtype=torch.float64)
    rise = (torch.tensor(a)[:, None] * s**2)[..., None].expand(-1, -1, n)
    gain = (torch.tensor(b)[:, None] * s)[..., None, None].expand(-1, -1, 1, n)
    return Curves(s, rise.double(), torch.cat([gain, 0 * gain], 2).double())


def test_a_square_law_is_crossed_exactly():
    found = planted([0.1, 0.4, 1e-4], [1.0, 3.0, 1.0])
    strength, odds = found.at(0.2)
    assert strength[:2].tolist() == pytest.approx([2**0.5, 0.5**0.5]) and strength[2].isnan()
    assert odds[:2, 0].tolist() == pytest.approx([2**0.5, 3 * 0.5**0.5]) and not odds[:2, 1].any()


def test_the_first_crossing_counts_and_falling_below_nothing_is_no_crossing():
    rise = torch.tensor([[0.0, -0.1, 0.5, 0.1, 0.6], [0.0, -0.1, -0.2, 0.0, 0.1]])
    strength, place = crossing(torch.tensor([0.0, 1, 2, 3, 4]), rise, 0.3)
    assert 1 < strength[0] < 2 and place[0] == strength[0] and strength[1].isnan()


def test_gains_are_of_own_sets_or_means_over_directions():
    found = planted([0.1, 0.1], [1.0, 2.0])
    assert found.own().gains(0.1).tolist() == pytest.approx([1.0, 0.0])
    assert found.gains(0.1).tolist() == pytest.approx([1.5, 0.0])
    assert found.of(slice(0, 1)).gains(0.1).tolist() == pytest.approx([1.0, 2.0])


def test_breaking_counts_never_as_infinite():
    found = planted([1.0, 1.0, 1.0, 1e-3, 1.0], [1.0] * 5)
    assert breaks(found, 1.0, 0).value == pytest.approx(1)
    assert costs(found, 0)[-1].value == pytest.approx(16)
    assert breaks(planted([1.0, 1e-3, 1e-3], [1.0] * 3), 1.0, 0) is None, "half of them never"
    assert typical(planted([1e-3] * 3, [1.0] * 3), lambda c: c.gains(1.0), 0) is None


def test_the_error_of_a_median_counts_directions_sets_and_contexts():
    generator = torch.Generator().manual_seed(0)
    still = torch.zeros(400, 2, 30).double()
    for shape, se in (((400, 1, 1, 1), math.sqrt(math.pi / 2 / 400)), ((1, 1, 1, 30), 1 / math.sqrt(30))):
        odds = torch.randn(shape, generator=generator).double().expand(400, 2, 1, 30)
        found = typical(Curves(torch.arange(2.0), still, odds), lambda c: c.odds[:, 1].mean((1, 2)), seed=0)
        assert found.se == pytest.approx(se, rel=0.3)
    odds = torch.randn(400, 1, 1, 1, generator=generator).double().expand(400, 2, 5, 30)
    found = typical(Curves(torch.arange(2.0), still, odds), lambda c: c.odds[:, 1].mean((0, 2)), seed=0)
    assert found.se == pytest.approx(1 / math.sqrt(400), rel=0.3), "random directions are drawn anew as well"


# --- what training text says ------------------------------------------------------------------------------------------


def test_one_latent_of_each_part_of_the_density():
    counts = np.array([0, LEAST - 1, *range(LEAST, LEAST + 100)])
    chosen = drawn(counts, 10, seed=0)
    assert ((counts[chosen] - LEAST) // 10).tolist() == list(range(10))
    assert (drawn(counts, 10, seed=0) == chosen).all() and (drawn(counts, 10, seed=1) != chosen).any()
    more = counts.copy()
    more[50] += 1
    assert (drawn(more, 10, seed=0) == chosen).sum() >= 9, "one firing more changes little"
    with pytest.raises(UserError, match="not 101: steer fewer"):
        drawn(counts, 101, seed=0)


def test_own_tokens_are_more_than_common_ones():
    base = torch.full((50,), 0.01)
    base[0] = 0.51
    following = torch.tensor([0] * 20 + [7] * 15 + [8] * 10 + [9] * 4 + [10])
    assert own_tokens(following, base).tolist() == [7, 8, 9, -1], "not the commonest, none seen once"
    assert own_tokens(torch.arange(3), base)[1:].tolist() == [-1] * 3, "one there is always"


def test_studied_finds_a_planted_latent():
    """Latent 3 fires where token 11 is, after which comes 12; its direction is the third axis."""
    torch.manual_seed(0)
    tokens = torch.randint(20, 60, (200, 20))
    tokens[:, 5:15:5], tokens[:, 6:16:5] = 11, 12
    x = 0.01 * torch.randn(200, 20, 8)
    x[..., 3] += 2 * (tokens == 11) + 0.1 * torch.rand(200, 20) * (tokens == 11)
    sae = SAE(8, 8, architecture="relu", normalize="none").eval().requires_grad_(False)
    sae.W_dec.data = torch.eye(8)
    sae.W_enc.data = torch.eye(8)
    sae.latent_bias.data -= 1
    found = steering.studied(sae, [x[:150], x[150:]], tokens, 64, 1, seed=0)
    assert found.table.index.tolist() == [3] and found.table.density[3] == pytest.approx(0.1)
    values = x[..., 3][tokens == 11] - 1
    assert found.table.p99[3] == pytest.approx(values.quantile(0.99).item(), abs=1e-5)
    assert found.own[0, 0] == 12 and found.table.share[3] > 0.99
    assert found.means[0, 3] > 0.999 and found.decoder[0].tolist() == torch.eye(8)[3].tolist()
    rows, at = (torch.tensor(found.places[name].to_numpy()) for name in ("row", "at"))
    assert (tokens[rows, at] == 11).all()
    assert (found.places["at"] <= 20 - sparsity.WINDOW).all()


def test_the_lens_reads_what_stands_before_the_last_norm(model):
    wanted = torch.tensor([17, 400])
    x = model.unembed.W_U.T[wanted] if hasattr(model.unembed, "W_U") else model.W_U.T[wanted]
    assert (steering.lens_tokens(model, x) == wanted[:, None]).any(1).all()


# --- what it comes to -------------------------------------------------------------------------------------------------


def test_rank_correlation_is_spearman_with_an_error():
    random = np.random.default_rng(0)
    x = random.normal(size=200)
    value, se = steering.rank_correlation(x, x + random.normal(size=200), seed=0)
    assert value == pytest.approx(6 / math.pi * math.asin(0.5**0.5 / 2), abs=0.1)
    assert se == pytest.approx(0.55 / math.sqrt(200), rel=0.35)
    assert steering.rank_correlation([1.0] * 7, [2.0] * 7, seed=0) is None
    assert steering.rank_correlation([*range(10), math.nan], [*range(10), 3.0], seed=0).value == pytest.approx(1)


def test_places_leave_out_sets_that_share_a_token():
    odds = torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, 1.0], [9.0, 9.0, 0.0]])
    assert places(odds, torch.tensor([[1, -1], [2, -1], [3, -1]])).tolist() == [3, 1, 3]
    assert places(odds, torch.tensor([[1, -1], [2, 4], [1, 5]])).tolist() == [2, 1, 2]
    assert places(odds.where(odds != 5, math.nan), torch.tensor([[1, -1], [2, -1], [3, -1]])).tolist() == [3, 3]
