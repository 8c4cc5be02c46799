"""Which tokens a replacement hurts, and the transplant."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from saelib import damage, splice
from saelib.metrics import mean
from saelib.models import checkpoints, load_model
from saelib.text import contexts

HOOK = "blocks.2.hook_resid_post"


def read(model, text):
    """Token ids, without what TransformerLens puts in front."""
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_deltas():
    clean, half = torch.ones(4, 3), torch.full((4, 3), 2.0)
    assert damage.deltas(clean, {"x": splice.Downstream(half, half, half, None)})["x"] == (1.0, 0.0)


def test_worst_tokens_are_the_worst_and_so_many():
    delta = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    for share, n in ((0.01, 2), (0.1, 20), (1e-9, 1), (1.0, 200)):
        worst = damage.worst_tokens(delta, share)
        assert worst.sum() == n and (n == 200 or delta[worst].min() >= delta[~worst].max())
    assert damage.worst_tokens(torch.zeros(5, 4), 0.1).sum() == 2  # ties are cut, not all taken


def test_every_token_is_of_one_class(model):
    text = "Returns the k_means2 array (a 2d one), 1234.\n\n    shape : int"
    tokens = torch.tensor([[*read(model, text), model.tokenizer.eos_token_id]])
    classes = damage.token_classes(model.tokenizer, tokens)
    assert (torch.stack(list(classes.values())).sum(0) == 1).all()
    words = [model.tokenizer.decode([i]) for i in tokens[0, 1:].tolist()]
    of = {name: [word for word, own in zip(words, where[0], strict=True) if own] for name, where in classes.items()}
    assert of["end of text"] == [model.tokenizer.eos_token]
    assert all(word.isspace() for word in of["white space"]) and of["white space"]
    assert all(not any(map(str.isalnum, word)) for word in of["signs"]) and of["signs"]
    assert "".join(of["digits"]).replace(" ", "").isdigit()
    assert " the" in of["word begins"] and " array" in of["word begins"]
    assert "".join(of["word begins"] + of["word goes on"]).count("array") == 1


def test_words_go_on_after_letters_and_underscores(model):
    ids = [read(model, piece) for piece in ("ab", "s", "_", "s", " ", "s", " s", "1", "s")]
    tokens = torch.tensor([list(itertools.chain(*ids))])
    classes = damage.token_classes(model.tokenizer, tokens)
    pieces = [model.tokenizer.decode([i]) for i in tokens[0].tolist()]
    goes_on = [j for j in range(1, len(pieces)) if classes["word goes on"][0, j - 1]]
    for j in goes_on:
        assert pieces[j][0].isalnum() and (pieces[j - 1][-1].isalnum() or pieces[j - 1].endswith("_"))
    assert sum(pieces[j] == "s" for j in goes_on) == 3  # ab|s, _|s, 1|s, but not after a space


def test_repeated_pairs_by_the_slow_way():
    tokens = torch.randint(4, (6, 15), generator=torch.Generator().manual_seed(0))
    expected = [
        [(row[j], row[j + 1]) in {(row[i], row[i + 1]) for i in range(j)} for j in range(14)] for row in tokens.tolist()
    ]
    assert damage.repeated(tokens).tolist() == expected


@pytest.mark.parametrize("bos", [False, True])
def test_origins_name_the_document_of_every_token(profile, model, bos):
    scale = profile.model_copy(update={"prepend_bos": bos})
    tokens = contexts(scale, model.tokenizer, "test", 30, context=24, seed=3)
    found, which = damage.origins(scale, model.tokenizer, "test", tokens, seed=3)
    assert which.shape == tokens.shape and (which[:, 0] == -1).all() == bos
    ids = [[*read(model, document.text), model.tokenizer.eos_token_id] for document in found]
    for number, expected in enumerate(ids):
        own = tokens[which == number].tolist()
        assert own and own == expected[: len(own)]
        assert len(own) == len(expected) or number == len(ids) - 1


def test_shown_tokens_are_the_worst_of_their_documents(profile, model):
    tokens = contexts(profile, model.tokenizer, "test", 30, context=24)
    clean, found = splice.downstream(model, HOOK, tokens, {"zero": splice.zero})
    delta = found["zero"].ce - clean
    origin = damage.origins(profile, model.tokenizer, "test", tokens)
    table = damage.shown_tokens(model, HOOK, tokens, delta, splice.zero, origin, n=3, length=10)
    assert len(table) == table["from"].nunique() == 3
    assert table["nats lost"].iloc[0] == pytest.approx(delta.max().item())
    assert table["nats lost"].is_monotonic_decreasing
    names = {f"{document.package}: {document.name}" for document in origin[0]}
    assert set(table["from"]) <= names
    assert max(len(read(model, text)) for text in table["text before"]) < 40
    row, column = divmod(delta.argmax().item(), delta.shape[1])
    assert model.tokenizer.decode(tokens[row, [column + 1]].tolist()).strip(" \n") in table["there comes"].iloc[0]


def test_excerpts_are_escaped(profile, model):
    """Somebody else's text must not become markup."""
    ids = read(model, "<script>alert(1)</script> <b> & x" * 4)[:24]
    tokens = torch.tensor([ids])
    which = torch.zeros_like(tokens)
    document = SimpleNamespace(package="<i>p</i>", name="n")
    delta = torch.arange(float(len(ids) - 1))[None]
    table = damage.shown_tokens(model, HOOK, tokens, delta, splice.zero, ([document], which), n=1)
    html = table.to_html()
    assert "<script" not in html and "<i>" not in html and "&lt;" in html


# --- the transplant ---------------------------------------------------------------------------------------------------


def test_a_transplant_brings_the_hosts_own_ablations(profile, model):
    host, tokens = checkpoints(profile)[0], contexts(profile, model.tokenizer, "test", 12, context=24)
    clean, found = damage.transplanted(profile, host, tokens, tokens, {"identity": lambda x: x})
    assert set(found) == {"zero", "mean", "identity"}
    assert (found["identity"].ce == clean).all()
    host_model = load_model(profile, host)
    expected = splice.prefix(host_model, profile.hook, tokens).x.mean((0, 1))
    _, direct = splice.downstream(host_model, profile.hook, tokens, {"mean": splice.constant(expected)})
    torch.testing.assert_close(found["mean"].ce, direct["mean"].ce, atol=1e-5, rtol=0)
    assert mean(clean).value > 8  # the untrained model
