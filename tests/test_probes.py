"""Probes against scikit-learn and a loop; tasks on windows of our own; a labelled data set on disk."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saelib import UserError, probes
from saelib.metrics import Estimate
from saelib.profile import Local, load_profile, override
from saelib.sae import SAE
from saelib.text import Document


def sparse(n=200, features=12, seed=0):
    """Features of all densities, from a dead one to one that is never 0, on scales far apart."""
    draw = np.random.default_rng(seed)
    x = np.abs(draw.normal(size=(n, features))) * (draw.random((n, features)) < np.linspace(0, 1, features))
    return torch.tensor(x * np.logspace(-3, 2, features))


def labels(x, tasks=3, seed=1):
    draw = torch.Generator().manual_seed(seed)
    score = (x / x.std(0).clamp_min(1e-9)) @ torch.randn(x.shape[1], tasks, generator=draw).double()
    return score + torch.randn(score.shape, generator=draw) > score.median(0).values + 1


def reference(z, y, ridge=probes.RIDGE):
    """One probe by scikit-learn: weight, bias, mean cross-entropy."""
    scale = z.std() or 1.0
    found = LogisticRegression(C=1 / (ridge * len(z)), solver="newton-cholesky", tol=1e-12, max_iter=1000)
    found.fit(z[:, None] / scale, y)
    logit = found.decision_function(z[:, None] / scale)
    return found.coef_[0, 0] / scale, found.intercept_[0], np.mean(np.logaddexp(0, logit) - y * logit)


# --- probes -----------------------------------------------------------------------------------------------------------


def test_newton_is_scikit_learns_regression_latent_by_latent():
    x = sparse()
    y = labels(x)
    found = probes.fit(probes.columns([x]), y)
    for feature in range(x.shape[1]):
        for task in range(y.shape[1]):
            expected = reference(x[:, feature].numpy(), y[:, task].numpy())
            got = [part[feature, task].item() for part in (found.weight, found.bias, found.ce)]
            assert got == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_separable_and_lopsided_tasks_have_an_optimum():
    """A latent that fires twice, both times on positives; one that says it all; a task with a single positive."""
    x = torch.zeros(300, 2, dtype=torch.float64)
    x[:2, 0], x[:150, 1] = 1.0, torch.linspace(1, 40, 150, dtype=torch.float64)
    y = torch.zeros(300, 2, dtype=torch.bool)
    y[:150, 0], y[7, 1] = True, True
    found = probes.fit(probes.columns([x]), y)
    for feature in range(2):
        for task in range(2):
            expected = reference(x[:, feature].numpy(), y[:, task].numpy())
            got = [part[feature, task].item() for part in (found.weight, found.bias, found.ce)]
            assert got == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert found.ce.argmin(0).tolist()[0] == 1


def test_chunks_do_not_matter(monkeypatch):
    x = sparse(features=40)
    whole = probes.fit(probes.columns([x]), labels(x))
    monkeypatch.setattr(probes, "ENTRIES", 700)
    cut = probes.fit(probes.columns([x[:77], x[77:]]), labels(x))
    for one, other in zip(whole, cut, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_constant_and_dead_features_say_nothing():
    x = torch.stack([torch.zeros(60), torch.full((60,), 0.3)], 1)
    y = torch.arange(60)[:, None] % 4 == 0
    found = probes.fit(probes.columns([x]), y)
    assert found.weight.abs().max() == 0
    assert torch.allclose(found.ce, probes.entropy(y).expand(2, 1))


def test_losses_are_those_of_the_chosen_feature():
    x, held_out = sparse(), sparse(seed=5)
    y = labels(x)
    found = probes.fit(probes.columns([x]), y)
    ce = probes.losses(found, probes.columns([held_out]), labels(held_out))
    for task, best in enumerate(found.ce.argmin(0).tolist()):
        p = torch.sigmoid(held_out[:, best] * found.weight[best, task] + found.bias[best, task])
        truth = labels(held_out)[:, task]
        assert torch.allclose(ce[:, task], -torch.where(truth, p, 1 - p).log())


def test_all_channels_at_once_are_read_with_a_ridge_that_suits():
    """As the best of a few ridges does, chosen on a quarter; with one channel and the same ridge, as `fit` does."""
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)).double()
    y = labels(x)
    ce = probes.cross_entropy(probes.whole(x[:200], y[:200], x[200:]), y[200:]).mean(0)
    single = probes.judged([source(x, y, 200)], [(probes.columns([x[:200]]), probes.columns([x[200:]]))])
    assert (ce < single.ce[0].mean(0)).all()
    found = probes.fit(probes.columns([x[:200, :1]]), y[:200], ridge=0.01)
    z = x[200:, :1] * found.weight + found.bias
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "RIDGES", (0.01,))
        assert torch.allclose(probes.whole(x[:200, :1], y[:200], x[200:, :1]), z, atol=0.02)  # n - 1 in its spread


# --- features and scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_latents_are_averaged_over_the_context(architecture):
    sae = SAE(32, 8, 4, architecture=architecture, seed=1).eval()
    batches = list(torch.randn(10, 5, 8, generator=torch.Generator().manual_seed(0)).split(4))
    found = probes.of_sae(sae, batches).to_dense()
    expected = torch.cat([sae.encode(x, dense=True).values.mean(1) for x in batches]).double()
    assert torch.allclose(found, expected, atol=1e-7)


def test_counts_of_tokens():
    found = probes.counts(torch.tensor([[1, 1, 3], [0, 2, 2]]), 4).to_dense()
    assert found.tolist() == [[0, 2, 0, 1], [1, 0, 2, 0]]


def source(x, y, m=120):
    return probes.Source(["a", "b", "c"], probes.Sample(x[:m], y[:m]), probes.Sample(x[m:], y[m:]))


def test_scores_are_over_the_entropy_and_luck_is_none_of_the_held_out():
    x = sparse(n=1200, features=60)
    y = labels(x)
    tasks = [source(x, y, 600)]
    features = [(probes.columns([x[:600]]), probes.columns([x[600:]]))]
    found = probes.judged(tasks, features)
    expected = [ce.mean() / h for ce, h in zip(found.ce[0].mT, probes.entropy(y[600:]), strict=True)]
    result = probes.overall(found.relative())
    assert [one.value for one in found.tasks()] == pytest.approx([value.item() for value in expected])
    assert result.value == pytest.approx(sum(expected).item() / 3) and result.value < 1
    luck = probes.judged(tasks, features, shuffled=3)
    paid = probes.overall(luck.relative())
    assert luck.seen[0].mean() < 1 < paid.value + 2 * paid.se


def test_the_error_of_a_loss_over_its_entropy_is_that_of_a_ratio():
    """Against drawing the documents again: the entropy below the line is measured, too."""
    draw = torch.Generator().manual_seed(0)
    y = torch.rand(4000, 1, generator=draw) < 0.1
    ce = probes.cross_entropy(y * 2.0 - 1.5 + torch.randn(4000, 1, generator=draw), y).double()
    again = [torch.randint(4000, (4000,), generator=draw) for _ in range(400)]
    spread = torch.stack([ce[i].mean() / probes.entropy(y[i])[0] for i in again]).std().item()
    assert probes.Scores([ce], [y]).tasks()[0].se == pytest.approx(spread, rel=0.12)


def test_differences_are_paired():
    y = torch.arange(80)[:, None] % 2 == 0
    one = probes.Scores([torch.rand(80, 1, generator=torch.Generator().manual_seed(0)).double()], [y])
    less = probes.overall(probes.gain(one, one._replace(ce=[one.ce[0] + 0.2])))
    assert less.value == pytest.approx(0.2 / probes.entropy(y).item()) and less.se < 1e-9
    assert probes.gain(None, one) is None


def test_directions_a_few_at_a_time_are_directions_all_at_once():
    x = sparse(n=400, features=6)
    y, turn = labels(x), probes.drawn(6, 9, seed=2)
    tasks, means = [source(x, y, 200)], [(x[:200], x[200:])]
    one, cut = probes.along(tasks, means, [turn]), probes.along(tasks, means, [turn], most=2)
    assert torch.allclose(one.ce[0], cut.ce[0], atol=1e-5) and torch.allclose(one.seen[0], cut.seen[0])


def test_sources_count_by_their_tasks():
    one, two = torch.ones(16, 1).double(), torch.zeros(24, 3).double()
    assert probes.overall([one, two]) == Estimate(0.25, 0.0)
    assert probes.overall([one, two], [True, True, False, False]) == Estimate(0.5, 0.0)
    assert probes.overall([one, two], [False] * 4) is None


# --- tasks ------------------------------------------------------------------------------------------------------------


def window(before="", text="", after="", name="sympy.core.Basic.free", kind="function"):
    return probes.window(Document(before + text + after, name.split(".")[0], name, kind), before, text, after)


NAMED = {name: task for group in probes.TASKS.values() for name, task in group.items()}


@pytest.mark.parametrize(
    ("task", "yes", "no"),
    [
        ("from sympy", window(), window(name="scipy.fft.fft")),
        ("of a class", window(kind="class"), window()),
        ("of a method", window(), window(name="sympy.core.free")),
        ("of something private", window(name="a._b.c"), window(name="a.b_c.__init__")),
        ("example prompt", window(text=">>> 1"), window(before=">>> 1", after=">>> 2")),
        ("URL", window(text="see https://x.org"), window(text="see http")),
        ("parameter line", window(text="    alpha : float"), window(text="Note: this")),
        ("parameter line", window(text="    alpha (float): it"), window(text="a b: c")),
        ("underlined heading", window(text="Notes\n-----\nx"), window(text="a - b")),
        ("citation", window(text="see [1]_"), window(text="x[i]")),
        ("starts among parameters", window(before="Parameters\n----------\nx : int\n"), window(before="Notes\n---\n")),
        ("starts among parameters", window(before="Args:\n  x: it\n"), window(before="Args:\n x\n\nReturns:\n y")),
        ("starts among examples", window(before="Examples\n========\n>>> 1\n"), window(text="Examples\n--------\n")),
        ("prompt after it", window(after="\n>>> 1"), window(text=">>> 1")),
        ("then a new line", window(after=" \nx"), window(after="x\n")),
        ("then a capital", window(after="\n  The"), window(after="the The")),
        ("first word a verb in -s", window(text="Returns it"), window(text="Class it")),
        ("deprecation in the document", window(before=".. deprecated:: 1"), window()),
    ],
)  # fmt: skip
def test_tasks_say_what_their_names_say(task, yes, no):
    assert probes.holds(NAMED[task], yes) and not probes.holds(NAMED[task], no)


def test_there_are_enough_tasks_of_every_kind():
    assert len(NAMED) == sum(map(len, probes.TASKS.values())) >= 24
    assert all(len(group) >= 8 for group in probes.TASKS.values())


@pytest.fixture
def tokenizer():
    words = {"?": 0, **{word: i + 1 for i, word in enumerate(["good", "bad", "x", "y", "z"])}}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="?", eos_token="?")


def corpus(n=400):
    """Every second text is good; every tenth too short."""
    return [f"{'x ' * (i % 7)}{'good' if i % 2 else 'bad'} y z x{'' if i % 10 == 0 else ' y z x y'}" for i in range(n)]


def test_a_data_set_with_labels(tmp_path, tokenizer):
    folder = tmp_path / "reviews"
    folder.mkdir()
    texts = corpus()
    frame = pd.DataFrame({"content": texts, "label": [int("good" in text) for text in texts]})
    frame.to_parquet(folder / "train.parquet")
    profile = override(load_profile("gpt2-small"), {"context_length": 8, "prepend_bos": True})
    entry = {"name": str(folder), "text": "content", "label": "label", "tasks": {"positive": 1, "absent": 7}}
    found = probes.labelled(profile, tokenizer, entry, 200, 100, seed=0)
    assert found.tasks == ["positive"]  # nothing is of the other class
    assert found.train.tokens.shape == (200, 8) and found.test.tokens.shape == (100, 8)
    assert found.train.tokens[:, 0].unique().tolist() == [0]
    good = (found.test.tokens == 1).any(1) | (found.test.tokens == 2).any(1)
    assert (found.test.labels[good, 0] == (found.test.tokens[good] == 1).any(1)).all()
    with pytest.raises(UserError, match="documents as long as a context: ask for fewer"):
        probes.labelled(profile, tokenizer, entry, 400, 100, seed=0)
    with pytest.raises(UserError, match="cannot read data set"):
        probes.labelled(profile, tokenizer, entry | {"name": str(tmp_path / "none")}, 4, 4, seed=0)


def test_a_data_set_that_cannot_be_had_is_left_out_with_a_warning(tmp_path, tokenizer, monkeypatch):
    texts, profile = corpus(), override(load_profile("gpt2-small"), {"context_length": 8, "prepend_bos": True})
    (tmp_path / "there").mkdir()
    frame = pd.DataFrame({"content": texts, "label": [int("good" in text) for text in texts]})
    frame.to_parquet(tmp_path / "there" / "train.parquet")
    gone, there = (
        {"name": str(tmp_path / name), "text": "content", "label": "label", "tasks": {name: 1}}
        for name in ("gone", "there")
    )
    monkeypatch.setattr(probes, "HUB", [gone, there])
    with pytest.warns(UserWarning, match="cannot read data set .*gone"):
        found = probes.sources(profile, tokenizer, 200, 100, seed=0)
    assert [source.tasks for source in found] == [["there"]] and probes.asked(profile) == ["gone", "there"]
    assert "URL" in probes.asked(load_profile("docstring-gpt"))


def test_windows_of_local_text(tmp_path, tokenizer):
    """Windows are whole, come from anywhere in their document, and know what stands around them."""
    documents = [Document(" ".join("xyz"[(i + j) % 3] for j in range(5 + i)), "p", "n", "text") for i in range(40)]
    profile = load_profile("docstring-gpt").model_copy(update={"context_length": 8})
    found = list(probes._windows(profile, tokenizer, documents, seed=0))
    assert len(found) == 37 and len({len(w["before"]) for w, _ in found}) > 5
    for w, ids in found:
        assert tokenizer(w["document"])["input_ids"][len(w["before"].split()) :][:8] == ids
        assert " ".join([w["before"], w["text"], w["after"]]).split() == w["document"].split()


def test_documents_that_are_too_short(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n\n".join(f"x y {i}" for i in range(200)))
    profile = load_profile("docstring-gpt").model_copy(update={"text": Local(source="local", path=tmp_path / "a.txt")})
    with pytest.raises(UserError, match="no document is as long as a context"):
        probes.sources(profile, tokenizer, 10, 10, seed=0)


# --- the stored sweep -------------------------------------------------------------------------------------------------


def test_the_sweep_is_read_seed_by_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "ROOT", tmp_path)
    assert probes.sweep("p").empty and list(probes.sweep("p")[probes.sweep("p").end].n) == []
    folder = tmp_path / "results" / "p" / "08_sweep"
    folder.mkdir(parents=True)
    values = {"n_latents": 64, "k": 4, "tokens": [10, 20], "value": [[0.9, 0.8], [0.7, 0.6]], "se": [[0.1] * 2] * 2}
    (folder / "a.json").write_text(json.dumps({"values": {key: {"value": value} for key, value in values.items()}}))
    found = probes.sweep("p")
    assert found.value.tolist() == [0.9, 0.8, 0.7, 0.6] and found.seed.tolist() == [0, 0, 1, 1]
    assert found[found.end].value.tolist() == [0.8, 0.6] and not found.alone.any()


def test_autoencoders_of_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "BUILD", tmp_path)
    monkeypatch.setattr(probes, "stored", lambda *_: {"tokens": {"value": [10, 20]}})
    (tmp_path / "sweep" / "p" / "n64-k4" / "0" / "20").mkdir(parents=True)
    assert list(probes.folders("p", "n64-k4", 0, every=False)) == [20]
    for seed, every in ((0, True), (1, False)):
        with pytest.raises(UserError, match="not there: run `saelib run 07 --sweep -p variant=n64-k4`"):
            probes.folders("p", "n64-k4", seed, every)
