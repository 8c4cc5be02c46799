"""Induction: known scores on made-up attention, equal to TransformerLens's own, and a random model shows none."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformer_lens.FactoredMatrix import FactoredMatrix
from transformer_lens.head_detector import compute_head_attention_similarity_score
from transformers import GPT2Config, GPT2LMHeadModel

from saelib import UserError, induction
from saelib.induction import Head
from saelib.models import Checkpoint, load_model, load_tokenizer
from saelib.profile import Model, load_profile
from saelib.text import Document

DEFAULT = load_profile("docstring-gpt")
SEGMENT = 20


@pytest.fixture(scope="module")
def random_profile(tmp_path_factory):
    """A profile whose model has random weights, three layers of two heads, and the shipped tokenizer."""
    path = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=4096, n_positions=128, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    load_tokenizer(DEFAULT).save_pretrained(path)
    return DEFAULT.model_copy(update={"model": Model(name=str(path)), "device": "cpu"})


@pytest.fixture(scope="module")
def random_model(random_profile):
    return load_model(random_profile)


@pytest.fixture(scope="module")
def tokens(random_model):
    return induction.repeated_tokens(random_model, 8, SEGMENT)


@pytest.fixture(scope="module")
def shipped():
    model = load_model(DEFAULT)
    return model, induction.repeated_tokens(model, 256, 50)


# --- repeated random tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_tokens_differ_repeat_and_are_never_special(random_model, bos):
    tokens = induction.repeated_tokens(random_model, 5, SEGMENT, seed=3, prepend_bos=bos)
    body = tokens[:, int(bos) :]
    assert tokens.shape == (5, 2 * SEGMENT + bos)
    assert torch.equal(body[:, :SEGMENT], body[:, SEGMENT:])
    assert all(len(row.unique()) == SEGMENT for row in body)
    special = torch.tensor(random_model.tokenizer.all_special_ids)
    assert not torch.isin(body, special).any()
    assert not bos or (tokens[:, 0] == random_model.tokenizer.bos_token_id).all()
    assert torch.equal(tokens, induction.repeated_tokens(random_model, 5, SEGMENT, seed=3, prepend_bos=bos))
    assert not torch.equal(tokens, induction.repeated_tokens(random_model, 5, SEGMENT, seed=4, prepend_bos=bos))


@pytest.mark.parametrize("segment", [1, 65, 5000])
def test_a_segment_that_does_not_fit_is_refused(random_model, segment):
    with pytest.raises(UserError, match=f"segment={segment} .* choose 2 or more"):
        induction.repeated_tokens(random_model, 2, segment)


@pytest.mark.parametrize("bos", [0, 1])
def test_halves_compare_the_same_tokens_after_the_same_predecessors(bos):
    """Entry j of the losses belongs to token j + 1; both copies of a token fall on the same place of their half."""
    position = torch.arange(1, 2 * SEGMENT + bos).float()
    first_half, second_half = induction.halves(position[None], SEGMENT)
    first = torch.arange(bos + 1, bos + SEGMENT).float()
    assert first_half.item() == first.mean() and second_half.item() == (first + SEGMENT).mean()


def test_losses_are_cross_entropies(random_model, tokens):
    losses = induction.token_losses(random_model, tokens, batch=3)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            random_model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
    torch.testing.assert_close(losses, expected.view(losses.shape))


def test_estimate():
    assert induction.estimate(torch.tensor([1.0, 3.0])) == {"value": 2.0, "se": pytest.approx(1.0), "n": 2}
    assert induction.estimate(None) == {"value": None}


# --- scores -----------------------------------------------------------------------------------------------------------


def perfect_attention():
    """Every token of the second copy looks at the one after its first occurrence; the first copy looks at itself."""
    attention = torch.eye(2 * SEGMENT)
    queries = torch.arange(SEGMENT, 2 * SEGMENT)
    attention[queries, queries] = 0
    attention[queries, queries - SEGMENT + 1] = 1
    return attention[None]


def test_scores_on_made_up_attention(tokens):
    pattern = induction.induction_pattern(tokens[:1])
    uniform = induction.uniform_attention(2 * SEGMENT)
    assert induction.pattern_score(perfect_attention(), pattern).item() == pytest.approx(1)
    known = sum(1 / (query + 1) for query in range(SEGMENT, 2 * SEGMENT)) / SEGMENT
    assert induction.pattern_score(uniform, pattern).item() == pytest.approx(known)
    one_back = torch.eye(2 * SEGMENT).roll(-1, 1).tril()[None]
    assert induction.pattern_score(one_back, induction.previous_pattern(tokens)).item() == pytest.approx(1)
    assert induction.pattern_score(one_back, pattern).item() == 0


def test_a_text_without_repetition_has_no_score():
    pattern = induction.induction_pattern(torch.tensor([[5, 6, 7, 8]]))
    assert induction.pattern_score(induction.uniform_attention(4), pattern).isnan().all()


def test_head_scores_equal_those_of_transformer_lens(random_model, tokens):
    """Rows without a target are set to zero, for TransformerLens divides by the attention of all rows."""
    pattern = induction.induction_pattern(tokens[:1])
    scores = induction.head_scores(random_model, tokens, pattern, induction.previous_pattern(tokens), batch=3)
    assert scores.shape == (2, len(tokens), 3, 2)
    with torch.no_grad():
        _, cache = random_model.run_with_cache(tokens[:1])
    for layer, index in ((0, 1), (2, 0)):
        attention = cache["pattern", layer][0, index] * pattern[0].any(-1, keepdim=True)
        expected = compute_head_attention_similarity_score(
            attention, pattern[0], exclude_bos=False, exclude_current_token=False, error_measure="mul"
        )
        assert scores[0, 0, layer, index].item() == pytest.approx(expected, rel=1e-5)


def test_patterns_may_differ_between_texts(random_model):
    tokens = torch.tensor([[5, 6, 5, 7], [5, 6, 7, 5]])
    both = induction.head_scores(random_model, tokens, induction.induction_pattern(tokens), batch=1)[0]
    for row in range(2):
        alone = induction.head_scores(
            random_model, tokens[row : row + 1], induction.induction_pattern(tokens[row : row + 1])
        )
        torch.testing.assert_close(both[row], alone[0, 0])


def test_best_counts_layers_from_zero():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.1, 0.5]])
    assert str(induction.best(scores)) == "L0H0"
    assert induction.best(scores, first=1) == Head(2, 1)
    assert induction.best(scores, first=1, below=2) == Head(1, 1)


def test_a_random_model_shows_no_induction(random_model):
    tokens = induction.repeated_tokens(random_model, 64, 50)
    measured = induction.measure(random_model, tokens, 50)
    chance = induction.pattern_score(induction.uniform_attention(100), induction.induction_pattern(tokens[:1]))
    assert (measured.induction.mean(0) - chance).abs().max() < 0.01
    assert measured.gap.mean().abs() < 0.02
    assert measured.losses.mean() == pytest.approx(math.log(4096), abs=0.1)


def test_the_shipped_model_shows_induction(shipped):
    measured = induction.measure(*shipped, 50)
    assert measured.gap.mean() >= 3
    assert measured.induction.mean(0).max() >= 0.4


# --- text -------------------------------------------------------------------------------------------------------------


def test_the_clearest_excerpt_is_where_looking_back_is_right(shipped):
    model, tokens = shipped
    head = induction.best(induction.measure(model, tokens[:32], 50).induction.mean(0), first=1)
    texts = ["The value of the first one, and no more than this.", "alpha beta gamma delta epsilon " * 3]
    found = [Document(text * 2, "package", f"name{i}", "text") for i, text in enumerate(texts)]
    short = Document("short", "p", "n", "text")
    document, looks = induction.clearest_excerpt(model, [short, *found], head, length=24)
    assert document.name == "name1" and len(looks) == 24
    assert document.text.startswith("".join(looks.token))
    assert list(looks["and there comes"][:-1]) == list(looks.reading[1:])
    strongest = looks.loc[looks.weight.idxmax()]
    assert strongest["looks back at"] == looks.reading[strongest.key]
    with pytest.raises(UserError, match="no document has 500 tokens"):
        induction.clearest_excerpt(model, found, head, length=500)


def test_looks_leave_out_the_first_token_and_the_present_one():
    attention = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.5, 0.3, 0.2, 0], [0.1, 0.2, 0.6, 0.1]])
    looks = induction.looks(attention, ["a", " b", "\n", "c"], ["1", "2", "3", "4"])
    assert looks.key[2:].tolist() == [1, 2] and looks.weight.tolist() == pytest.approx([0, 0, 0.3, 0.6])
    assert looks.reading.tolist() == ["a", "␣b", "⏎", "c"] and looks["looks back at"][3] == "⏎"


# --- ablation and patching --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mean", "zero"])
def test_ablating_a_head_changes_something_and_leaves_no_trace(random_model, tokens, how):
    with torch.no_grad():
        untouched = random_model(tokens)
        changed = random_model.run_with_hooks(tokens, fwd_hooks=[induction.ablation(Head(0, 1), how)])
        assert not torch.allclose(changed, untouched, atol=1e-4)
        assert torch.equal(random_model(tokens), untouched), "a hook stayed behind"


def test_mean_ablation_takes_what_a_head_says_about_these_tokens():
    z = torch.randn(6, 5, 2, 3)
    name, hook = induction.ablation(Head(1, 0))
    silenced = hook(z, None)
    assert name == "blocks.1.attn.hook_z"
    torch.testing.assert_close(silenced[:, :, 0], z[:, :, 0].mean(0).expand(6, -1, -1))
    assert torch.equal(silenced[:, :, 1], z[:, :, 1])


def test_only_heads_below_matter_to_a_score(random_model, tokens):
    pattern, target = induction.induction_pattern(tokens[:1]), Head(1, 0)
    untouched = induction.head_scores(random_model, tokens, pattern)[0, :, 1, 0]
    below, above = induction.scores_without(random_model, tokens, pattern, target, [Head(0, 0), Head(2, 1)])
    assert torch.equal(above, untouched) and not torch.equal(below, untouched)


def test_other_heads(random_model):
    assert induction.other_heads(random_model, Head(1, 1), Head(0, 0), at_most=9) == [Head(0, 1)]
    drawn = induction.other_heads(random_model, Head(2, 0), Head(1, 1), at_most=2, seed=1)
    assert len(set(drawn)) == 2 and Head(1, 1) not in drawn and all(head.layer < 2 for head in drawn)


@pytest.mark.parametrize("bos", [False, True])
def test_clean_and_corrupted_differ_in_one_token(random_model, bos):
    pair = induction.clean_and_corrupted(random_model, 6, segment=10, prepend_bos=bos)
    different = (pair.clean != pair.corrupted).nonzero()
    (position,) = different[:, 1].unique().tolist()
    assert len(different) == 6 and pair.labels[position : position + 2] == ["A/X", "B"]
    assert pair.clean.shape[1] == len(pair.labels) == 10 + 6 + bos
    assert torch.equal(pair.clean[:, -1], pair.clean[:, position])
    assert torch.equal(pair.answers, pair.clean[:, position + 1])
    replaced = pair.corrupted[:, position, None]
    assert ((pair.corrupted == replaced).sum(1) == 1).all() and not (pair.clean == replaced).any()


def test_patching_everything_that_differs_recovers_everything(random_model):
    pair = induction.clean_and_corrupted(random_model, 6)
    by_position = induction.patch_sweep(random_model, pair, "position")
    changed = pair.labels.index("A/X")
    assert by_position.shape == (3, len(pair.labels))
    assert by_position[0, changed].item() == pytest.approx(1, abs=1e-3)
    assert by_position[:, :changed].abs().max() < 1e-3, "what came before the change is the same in both"
    assert induction.patch_sweep(random_model, pair, "head").shape == (3, 2)


def test_the_shipped_model_reads_the_note_by_its_keys(shipped):
    model, tokens = shipped
    measured = induction.measure(model, tokens[:64], 50)
    head = induction.best(measured.induction.mean(0), first=1)
    previous = induction.best(measured.previous.mean(0), below=head.layer)
    paths = induction.patch_path(model, induction.clean_and_corrupted(model, 32), previous, head)
    assert paths["k"] > 0.1 and abs(paths["q"]) < 0.05 and abs(paths["v"]) < 0.05


# --- copying ----------------------------------------------------------------------------------------------------------


def made_up(ov, vocab=11, d_model=6):
    """Something with the weights of a one-headed model whose unembedding is its embedding."""
    embed = torch.randn(vocab, d_model, generator=torch.Generator().manual_seed(0))
    factors = FactoredMatrix(ov[None, None], torch.eye(d_model)[None, None])
    return SimpleNamespace(cfg=SimpleNamespace(n_layers=1), OV=factors, W_E=embed, W_U=embed.T)


def test_copying_scores_of_known_circuits():
    assert induction.copying_scores(made_up(torch.eye(6))).item() == pytest.approx(1)
    assert induction.copying_scores(made_up(-torch.eye(6))).item() == pytest.approx(-1)
    turn = torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]])] * 3)  # imaginary eigenvalues only
    model = made_up(turn)
    model.W_E = torch.linalg.qr(model.W_E)[0]
    model.W_U = model.W_E.T
    assert induction.copying_scores(model).item() == pytest.approx(0, abs=1e-5)


def test_the_small_matrix_has_the_eigenvalues_of_the_large_one(tmp_path):
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=4096, n_positions=128, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    load_tokenizer(DEFAULT).save_pretrained(tmp_path)
    model = load_model(DEFAULT.model_copy(update={"model": Model(name=str(tmp_path)), "device": "cpu"}))
    model.enable_compatibility_mode()
    scores = induction.copying_scores(model)
    with torch.no_grad():
        embed, unembed = model.W_E[:60].double(), model.W_U[:, :60].double()  # a small vocabulary, for V x V
        few = SimpleNamespace(cfg=model.cfg, OV=model.OV, W_E=embed.float(), W_U=unembed.float())
        for layer, head in ((0, 0), (1, 1)):
            full = embed @ model.W_V[layer, head].double() @ model.W_O[layer, head].double() @ unembed
            eigenvalues = torch.linalg.eigvals(full)
            expected = (eigenvalues.sum().real / eigenvalues.abs().sum()).item()
            assert induction.copying_scores(few)[layer, head].item() == pytest.approx(expected, abs=1e-4)
    assert scores.shape == (2, 2) and scores.abs().max() <= 1


def test_what_the_first_layer_receives_is_the_embedding_and_its_position(random_profile):
    """Without anything in between, both readings see the same tokens; they differ by positions and normalisation."""
    strings = torch.arange(1, 4001).view(80, 50)
    found = induction.copying(random_profile, Checkpoint(random_profile.model.name, None, 0, 0), strings)
    embedded, received = found
    torch.testing.assert_close(received[0], embedded[0], atol=0.1, rtol=0)


# --- emergence --------------------------------------------------------------------------------------------------------


def test_emergence_finds_the_middle_of_a_sigmoid():
    tokens = [0, *(round(10 ** (4 + i / 5)) for i in range(20))]
    middle = 10**5.93
    values = torch.tensor([5 / (1 + (middle / max(count, 1)) ** 3) for count in tokens])
    at, low, high = induction.emergence(tokens, values)
    assert at == pytest.approx(middle, rel=0.05)
    assert low < middle < high and tokens.index(high) == tokens.index(low) + 1


def test_emergence_on_a_straight_line_in_log_tokens():
    assert induction.emergence([0, 100, 10_000], torch.tensor([0.0, 0.0, 2.0]))[0] == pytest.approx(1000)
    assert induction.emergence([0, 100], torch.tensor([0.0, 2.0])) == (50.0, 0, 100)


@pytest.mark.parametrize("values", [[0.0, 0.1, 0.0], [0.3, 0.2, 0.1], [0.0, -1.0, -2.0], [2.0, 3.0, 4.0]])
def test_what_does_not_appear_has_no_emergence(values):
    assert induction.emergence([0, 10, 100], torch.tensor(values)) is None


def test_law():
    published = DEFAULT.model_copy(
        update={"pretrain": None, "model": Model(name="a", training_batch=64, training_context=128)}
    )
    assert induction.law_tokens(5.7, published) == pytest.approx(45.4e6, rel=0.01)
    own = DEFAULT.pretrain
    assert induction.law_tokens(0, DEFAULT) == pytest.approx(math.sqrt(own.batch * own.context_length))
    assert induction.law_tokens(5.7, published.model_copy(update={"model": Model(name="a")})) is None


def test_thinned_keeps_the_ends_and_spreads_the_rest():
    found = [Checkpoint("m", None, step, step) for step in [0, *range(10, 1000, 10)]]
    steps = [checkpoint.step for checkpoint in induction.thinned(found, 9)]
    assert len(steps) == 9 and (steps[0], steps[-1]) == (0, 990)
    logs = [math.log(step) for step in steps[1:]]
    assert max(b - a for a, b in pairwise(logs)) < 1.3
    assert induction.thinned(found[:5], 9) == found[:5]


def test_history_and_circuit_of_a_model(random_profile, tokens):
    own = [Checkpoint(random_profile.model.name, None, step, step * 10) for step in (0, 1)]
    found = induction.history(random_profile, own, tokens, SEGMENT, tokens)
    assert found.tokens == [0, 10] and found.induction.shape == (2, 3, 2) and found.gap.shape == (2,)
    assert torch.equal(found.text_loss[0], found.text_loss[1])
    model = load_model(random_profile, own[0])
    head, previous, drop = induction.circuit(model, tokens, induction.measure(model, tokens, SEGMENT))
    assert previous.layer < head.layer and drop.shape == (len(tokens),)


def test_what_a_profile_does_not_have_is_not_run(random_profile, tokens):
    assert induction.history(random_profile, [], tokens, SEGMENT, tokens) is None
    with pytest.raises(UserError, match="training_batch"):
        induction.history(random_profile, [Checkpoint("m", None, 5, None)], tokens, SEGMENT, tokens)
