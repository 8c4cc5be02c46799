"""N2G: toy latents with known rules, the batched path against one plain run at a time, scores with known answers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from saelib import UserError, n2g, report, splice
from saelib.activations import harvest
from saelib.metrics import BLOCK
from saelib.n2g import Events, Explanation, Pattern
from saelib.sae import SAE

HOOK = "blocks.1.hook_resid_post"
FILLER = 0


@pytest.fixture(scope="module")
def model(lively_model):
    return lively_model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, 40, (48, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["topk", "relu"])
def sae(request):
    torch.manual_seed(2)
    made = SAE(60, 24, k=4, architecture=request.param).eval().requires_grad_(False)
    if request.param == "relu":
        made.latent_bias -= 0.4
    return made


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --- the slow and obvious way -----------------------------------------------------------------------------------------


def trie_of(patterns):
    """Nested dictionaries, the last token outermost; under "end" what a pattern that ends there predicts."""
    trie = {}
    for pattern, value in patterns.items():
        node = trie
        for token in reversed(pattern.tokens):
            node = node.setdefault(token, {})
        node.setdefault("end", []).append((pattern, value))
    return trie


def walked(trie, text):
    """All patterns that end at the last token: the walk back from it, into every branch that fits."""
    found, open_nodes = [], [(trie, len(text) - 1)]
    while open_nodes:
        node, i = open_nodes.pop()
        found += [(p, v) for p, v in node.get("end", []) if not p.start or i == -1]
        if i >= 0:
            open_nodes += [(node[token], i - 1) for token in (text[i], None) if token in node]
    return found


def spoken(trie, text):
    """What the longest of them predicts."""
    return max(((pattern.rank, value) for pattern, value in walked(trie, text)), default=(0, 0.0))[1]


def plain_predict(patterns, texts):
    trie = trie_of(patterns)
    return torch.tensor([[spoken(trie, text[: i + 1]) for i in range(len(text))] for text in texts.tolist()])


def plain_pattern(read_one, context, latent, wanted, front=True):
    """One example: cut, grow, replace, one run at a time."""
    fronts = [[FILLER]] if front else [[]]
    for size in range(1, min(len(context), n2g.LONGEST) + 1):
        piece = context[-size:]
        tries = [(before, not front and size == len(context)) for before in fronts]
        tries += [([], True)] if front and size == len(context) else []
        for before, start in tries:
            old = read_one(before + piece, latent)
            if old >= 0.5 * wanted:
                kept = [t if _needed(read_one, before, piece, i, latent, old) else None for i, t in enumerate(piece)]
                if not start and not any(t is not None for t in kept):
                    kept[-1] = piece[-1]
                while kept[0] is None and not start:
                    kept = kept[1:]
                return Pattern(tuple(kept), start)
    return None


def _needed(read_one, before, piece, i, latent, old):
    changed = piece[:i] + [FILLER] + piece[i + 1 :]
    return piece[i] == FILLER or 1 - read_one(before + changed, latent) / old >= 0.5


# --- toy latents ------------------------------------------------------------------------------------------------------

RULES = {
    0: {Pattern((5,)): 1.0},
    1: {Pattern((3, None, 7)): 2.0, Pattern((8, 7)): 0.5},
    2: {Pattern((3, 4), start=True): 1.0, Pattern((6, None, 2), start=True): 3.0},
    3: {Pattern((7,)): 1.0, Pattern((6, 7)): 3.0, Pattern((5, 6, 7)): 8.0},
    4: {Pattern((2, None)): 1.0},
    5: {Pattern((1, None, None, 4)): 1.0, Pattern((2, 3, 4)): 1.0},
    6: {Pattern((9, 9)): 1.0, Pattern((4, None, 9)): 4.0},
    7: {Pattern((8,), start=True): 2.0},
}
TRIES = {latent: trie_of(rules) for latent, rules in RULES.items()}


def toy(texts, latents):
    """Activations of latents that are their rules and nothing else."""
    pairs = zip(texts.tolist(), latents.tolist(), strict=True)
    return torch.tensor([spoken(TRIES[latent], text) for text, latent in pairs])


def toy_events(texts):
    rows = [plain_predict(RULES[i], texts).flatten() for i in RULES]
    on = [row.nonzero()[:, 0] for row in rows]
    latents = np.repeat(list(RULES), [len(some) for some in on])
    values = torch.cat([row[some] for row, some in zip(rows, on, strict=True)]).numpy()
    return Events(latents, torch.cat(on).numpy(), values)


def test_toy_latents_are_explained_by_exactly_their_rules():
    texts = torch.randint(1, 10, (120, 9), generator=seeded(0))
    found = n2g.explained(toy, texts, toy_events(texts), RULES, FILLER, n=60)
    assert {i: own.patterns for i, own in found.items()} == RULES
    held_out = torch.randint(1, 10, (40, 9), generator=seeded(1))
    predicted, true = n2g.predictions(found, held_out), toy_events(held_out)
    for ours, theirs in zip(predicted, true, strict=True):
        assert np.array_equal(ours, theirs)
    scores = n2g.score(predicted, true, RULES, held_out)
    for name in ("precision", "recall", "f1"):
        assert scores.each(name) == pytest.approx(np.ones(len(RULES)))


def test_without_a_filler_in_front_a_cut_text_begins_the_context_by_accident():
    """The public way takes a latent of `6 7`, and of a 7 at the start, for one of any 7."""
    texts = torch.tensor([[1, 6, 7, 2], [6, 7, 3, 3]])

    def read(rows, latents):
        return torch.tensor([float(r[-1] == 7 and (len(r) == 1 or r[-2] == 6)) for r in rows.tolist()])

    events = Events(np.zeros(2, np.int64), np.array([2, 5]), np.ones(2, np.float32))
    ours, public = (n2g.explained(read, texts, events, [0], FILLER, front=front)[0] for front in (True, False))
    assert set(ours.patterns) == {Pattern((6, 7))} and set(public.patterns) == {Pattern((7,))}


def test_a_latent_that_needs_more_than_the_longest_pattern_is_not_explained():
    texts = torch.full((1, 30), 5)

    def far(rows, latents):
        return torch.full((len(rows),), float(rows.shape[1] > n2g.LONGEST + 2))

    events = Events(np.array([0]), np.array([29]), np.ones(1, np.float32))
    assert n2g.explained(far, texts, events, [0], FILLER)[0] == Explanation({})


def test_a_pattern_that_fits_everywhere_keeps_its_last_token_and_a_filler_stays():
    texts = torch.tensor([[4, FILLER, 6, 3]])

    def always(rows, latents):
        return torch.ones(len(rows))

    events = Events(np.zeros(2, np.int64), np.array([1, 3]), np.ones(2, np.float32))
    found = n2g.explained(always, texts, events, [0], FILLER)[0]
    assert found.patterns == {Pattern((FILLER,)): 1.0, Pattern((3,)): 1.0}


def test_examples_are_the_strongest_and_others_and_latents_without_any_are_left_out():
    values = np.arange(40, dtype=np.float32)
    found = Events(np.repeat([2, 5], [30, 10]), np.arange(40), values)
    latents, rows = n2g.examples(found, [2, 4, 5], 16, seed=0)
    assert latents.tolist() == [2] * 16 + [5] * 10
    assert set(range(22, 30)) <= set(rows[:16]) and len(set(rows[:16])) == 16 and rows.max() < 40
    assert sorted(rows[16:]) == list(range(30, 40))
    assert rows.tolist() == n2g.examples(found, [2, 4, 5], 16, seed=0)[1].tolist()


# --- prediction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_prediction_equals_a_walk_of_the_trie_with_backtracking(seed):
    draw = np.random.default_rng(seed)
    texts = torch.from_numpy(draw.integers(0, 4, (12, 8)))
    patterns = {}
    for _ in range(14):
        length = draw.integers(1, 5)
        some = tuple(None if draw.random() < 0.4 else int(draw.integers(4)) for _ in range(length))
        patterns[Pattern(some, bool(draw.random() < 0.25))] = float(draw.random())
    assert torch.equal(n2g.predict(Explanation(patterns), texts), plain_predict(patterns, texts))


def test_the_longest_match_counts_even_when_the_walk_has_to_turn_back():
    patterns = {Pattern((2, None, 4)): 3.0, Pattern((9, 3, 4)): 9.0, Pattern((4,)): 1.0}
    found = n2g.predict(Explanation(patterns), torch.tensor([[2, 3, 4, 4, 9, 3, 4]]))
    assert found.tolist() == [[0, 0, 3, 1, 0, 0, 9]]


def test_a_pattern_ends_at_the_end_of_its_context():
    found = n2g.predict(Explanation({Pattern((1, 2)): 1.0}), torch.tensor([[5, 1], [2, 6]]))
    assert not found.any()
    assert not len(n2g.predictions({}, torch.tensor([[1]])).at)
    assert not n2g.predict(Explanation({}), torch.tensor([[1]])).any()


# --- the model's part -------------------------------------------------------------------------------------------------


def test_events_are_what_the_autoencoder_says(model, tokens, sae):
    dense = sae.encode(harvest(model, tokens, HOOK), dense=True).dense(60)
    found = n2g.events(model, HOOK, sae, tokens)
    latents, at = (dense.T > 0).nonzero().T
    assert np.array_equal(found.latents, latents) and np.array_equal(found.at, at)
    assert found.values == pytest.approx(dense[at, latents].numpy(), rel=1e-3, abs=1e-6)


def test_the_reader_is_the_model_and_repeats_cost_nothing(model, tokens, sae, monkeypatch):
    texts = tokens[:, :3].repeat(3, 1)
    latents = torch.randint(60, (len(texts),), generator=seeded(3))
    dense = sae.encode(harvest(model, texts, HOOK, (-1, None)), dense=True).dense(60)
    ran = []
    monkeypatch.setattr(n2g, "harvest", lambda *given: ran.append(len(given[1])) or harvest(*given))
    found = n2g.reader(model, HOOK, sae)(texts, latents)
    assert found == pytest.approx(dense[torch.arange(len(texts)), latents], rel=1e-3, abs=1e-6)
    assert sum(ran) == len(texts.unique(dim=0)) < len(texts)


@pytest.mark.parametrize("front", [True, False])
def test_patterns_equal_those_of_one_run_at_a_time(model, tokens, sae, front):
    read = n2g.reader(model, HOOK, sae)
    fired = n2g.events(model, HOOK, sae, tokens)
    latents, rows = n2g.examples(fired, range(0, 60, 6), 4, seed=0)
    found = n2g.explained(read, tokens, fired, range(0, 60, 6), FILLER, n=4, front=front)
    expected = {}
    for latent, row in zip(latents.tolist(), rows, strict=True):
        context, i = divmod(int(fired.at[row]), tokens.shape[1])
        one = plain_pattern(
            lambda text, latent: read(torch.tensor([text]), torch.tensor([latent])).item(),
            tokens[context, : i + 1].tolist(), latent, float(fired.values[row]), front,
        )  # fmt: skip
        own = expected.setdefault(latent, {})
        if one is not None:
            own.setdefault(one, []).append(float(fired.values[row]))
    assert {i: set(own.patterns) for i, own in found.items()} == {i: set(own) for i, own in expected.items()}
    for latent, own in found.items():
        assert own.patterns == pytest.approx({p: np.mean(v) for p, v in expected[latent].items()})


def test_explain_does_it_all(model, tokens, sae):
    fired = n2g.events(model, HOOK, sae, tokens)
    own = n2g.explained(n2g.reader(model, HOOK, sae), tokens, fired, [1, 2], model.tokenizer.eos_token_id, 4)
    assert n2g.explain(model, HOOK, sae, tokens, [1, 2], n=4) == own
    with pytest.raises(UserError, match="choose one of this model"):
        n2g.explain(model, HOOK, SAE(8, 16, k=2), tokens, [0])


# --- scores -----------------------------------------------------------------------------------------------------------


def drawn_events(seed, n_tokens, latents=3, share=0.2):
    draw = np.random.default_rng(seed)
    at = [np.flatnonzero(draw.random(n_tokens) < share) for _ in range(latents)]
    which = np.repeat(range(latents), [len(some) for some in at])
    return Events(which, np.concatenate(at), draw.random(len(which)))


def test_scores_count_hits_and_alarms():
    texts = torch.zeros(1, 8, dtype=int)
    fired = Events(np.array([0, 0, 0, 4]), np.array([1, 2, 3, 0]), np.ones(4))
    predicted = Events(np.array([0, 0, 2]), np.array([2, 7, 5]), np.ones(3))
    found = n2g.score(predicted, fired, [0, 2, 3], texts)
    assert found.predicted.tolist() == [[2, 1, 0]] and found.fired.tolist() == [[3, 0, 0]]
    assert found.each("precision")[:2].tolist() == [0.5, 0] and math.isnan(found.each("precision")[2])
    assert found.each("recall")[0] == pytest.approx(1 / 3) and math.isnan(found.each("recall")[1])
    assert found.each("f1")[0] == pytest.approx(2 * 0.5 / 3 / (0.5 + 1 / 3))
    assert found.mean("precision", np.array([False, False, True])) is None


def test_the_mean_leaves_out_blocks_and_intervals_count_blocks():
    texts = torch.zeros(6 * BLOCK, 10, dtype=int)
    predicted, fired = drawn_events(0, texts.numel()), drawn_events(1, texts.numel())
    found = n2g.score(predicted, fired, range(3), texts)
    assert found.hits.shape == (6, 3)
    means = []
    for left in range(6):
        rest = [i for i in range(6) if i != left]
        means.append((found.hits[rest].sum(0) / found.predicted[rest].sum(0)).mean())
    value, se = found.mean("precision", np.ones(3, bool))
    assert value == pytest.approx(found.each("precision").mean())
    assert se == pytest.approx(math.sqrt(5 / 6 * ((np.array(means) - np.mean(means)) ** 2).sum()))
    single = n2g.Scores(np.array([0]), np.array([[1]] * 10), np.array([[1]] * 10), np.array([[1]] * 10))
    assert single.interval("precision")[0] == pytest.approx((1, 0.7225, 1), abs=2e-4), "Wilson, 10 of 10"


def test_the_best_token_is_the_best_of_all(tokens):
    found = drawn_events(2, tokens.numel(), share=0.05)
    flat = tokens.flatten().numpy()
    for latent, own in n2g.best_tokens(found, tokens, range(3)).items():
        on = np.zeros(len(flat), bool)
        own_rows = found.latents == latent
        on[found.at[own_rows]] = True
        f1 = {t: 2 * on[flat == t].sum() / ((flat == t).sum() + on.sum()) for t in np.unique(flat)}
        ((pattern, value),) = own.patterns.items()
        assert f1[pattern.tokens[0]] == max(f1.values())
        hits = found.values[own_rows & (flat[found.at] == pattern.tokens[0])]
        assert value == pytest.approx(hits.mean())
    assert n2g.best_tokens(found, tokens, [9])[9] == Explanation({})


def test_lens_tokens_are_those_that_the_direction_raises(model, sae):
    found = n2g.lens_tokens(model, sae, [3, 11], n=4)
    for latent, own in found.items():
        x = torch.zeros(1, 1, 24)
        change = model.unembed(x + 1e3 * model.ln_final.weight * (sae.W_dec[latent] - sae.W_dec[latent].mean()))
        expected = (change - model.unembed(x))[0, 0].topk(4).indices.tolist()
        assert {p.tokens[0] for p in own.patterns} == set(expected)
    assert n2g.following(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, -1]]


# --- in the latents' place --------------------------------------------------------------------------------------------


def test_what_really_fires_gives_back_the_reconstruction(model, tokens, sae):
    same = n2g.Explained(sae, n2g.events(model, HOOK, sae, tokens), tokens.numel())
    for _ in range(2):  # it begins anew with the next pass
        _, found = splice.downstream(model, HOOK, tokens, {"sae": sae, "same": same})
        assert found["same"].mse.value == pytest.approx(found["sae"].mse.value, rel=1e-3)
        assert torch.allclose(found["same"].ce, found["sae"].ce, atol=1e-3)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_a_latent_counts_with_its_predicted_value_and_the_token_s_own_scale(normalize):
    """Two latents predicted for the second token of three, none for the others."""
    own = SAE(5, 8, k=2, normalize=normalize).requires_grad_(False)
    own.pre_bias += torch.randn(8, generator=seeded(4))
    x = 3 + 2 * torch.randn(1, 3, 8, generator=seeded(5))
    found = Events(np.array([1, 4]), np.array([1, 1]), np.array([0.5, 2.0]))
    expected = own.pre_bias.repeat(3, 1)
    expected[1] += 0.5 * own.W_dec[1] + 2 * own.W_dec[4]
    if normalize == "layer_norm":
        expected = expected * x[0].std(1, keepdim=True) + x[0].mean(1, keepdim=True)
    assert torch.allclose(n2g.Explained(own, found, 3)(x)[0], expected, atol=1e-4)


def test_rescaling_is_least_squares():
    tried, fired, other = drawn_events(0, 500), drawn_events(1, 500), drawn_events(2, 300, latents=5)
    found = n2g.rescaled(other, tried, fired)
    assert np.array_equal(found.at, other.at) and np.array_equal(found.latents, other.latents)
    for latent in range(5):
        rows = other.latents == latent
        guess, true = np.zeros(500), np.zeros(500)
        for column, events in ((guess, tried), (true, fired)):
            column[events.at[events.latents == latent]] = events.values[events.latents == latent]
        gain = np.linalg.lstsq(guess[:, None], true, rcond=None)[0][0] if guess.any() else 1.0
        assert found.values[rows] == pytest.approx(gain * other.values[rows])


# --- stored -----------------------------------------------------------------------------------------------------------


def test_the_sweep_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert n2g.stored("toy", "small") is None
    empty, found = Explanation({}), Explanation({Pattern((12, None, 5)): 0.25, Pattern((None, 7), start=True): 1.5})
    counts = [np.array(rows) for rows in ([[2, 0], [2, 0]], [[3, 1], [4, 0]], [[1, 0], [2, 0]])]
    made = n2g.lines({5: found, 8: empty}, n2g.Scores(np.array([5, 8]), *counts), [0.5] * 9)
    folder = tmp_path / "results" / "toy" / "09_sweep"
    folder.mkdir(parents=True)
    (folder / "small.json").write_text(json.dumps({"values": {"explanations": {"value": made}}}))
    own, none = n2g.stored("toy", "small").values()
    assert own.explanation == found and none.explanation == empty
    assert (own.predicted, own.fired, own.hits, own.density) == (4, 7, 3, 0.5)
    assert own.precision.value == 0.75 and own.precision.low < 0.75 < own.precision.high
    assert own.recall.value == 3 / 7 and own.f1 == pytest.approx(6 / 11)
    assert math.isnan(none.precision.value) and math.isnan(none.precision.low) and none.recall.value == none.f1 == 0


def test_an_explanation_can_be_read():
    class Tokenizer:
        def decode(self, ids):
            return {1: " the", 2: "\n"}[ids[0]]

    found = Explanation({Pattern((1, None)): 1.0, Pattern((2,), start=True): 2.0})
    assert found.text(Tokenizer()) == "⊢ ⏎  |  ␣the ▢"
    assert found.text(Tokenizer(), 1) == "⊢ ⏎"
