"""Text sources: determinism, disjoint splits, one interface, and what a wrong source says."""

import pandas as pd
import pytest
import torch

from saelib import UserError, text
from saelib.models import load_tokenizer
from saelib.profile import Docstrings, HuggingFace, Local, Package, load_profile
from saelib.text import Document, contexts, documents, harvest, masked, split_of, token_batches

DEFAULT = load_profile("docstring-gpt")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEFAULT)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small installed package on the path, and the corpus configuration that reads it; nothing of it may run."""
    folder = tmp_path / "site" / "toy"
    folder.mkdir(parents=True)
    for i in range(60):
        (folder / f"m{i}.py").write_text(
            f'"""Module number {i} of the toy package, about topic_{i} and more."""\n'
            f'raise RuntimeError("imported")\n'
            f'class A{i}:\n    """A class that stores the value called attribute_{i} for later use."""\n'
            f'    if True:\n        def f(self):\n            """{words(i)} each of its own kind, like no other."""\n'
        )
    (folder / "__init__.py").write_text("")
    (folder / "broken.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(text.importlib.metadata, "version", lambda name: "1.0+cpu")
    monkeypatch.setattr(text, "BUILD", tmp_path / "build")
    return Docstrings(
        source="docstrings", standard_library=False, packages={"toy": Package(version="1.0", fingerprint="unknown")}
    )


def words(i):
    """A sentence that differs between numbers by more than identifiers and digits."""
    return " ".join("alpha beta gamma delta epsilon zeta eta theta".split()[int(digit)] for digit in f"{i:06o}")


def approved(config):
    """The configuration with the fingerprint its files have."""
    try:
        harvest(config, "test")
    except UserError as error:
        found = str(error).split("found ")[1].split(",")[0]
    return config.model_copy(update={"packages": {"toy": Package(version="1.0", fingerprint=found)}})


def test_harvest_reads_without_importing_and_again_the_same(package):
    config = approved(package)
    first = {split: harvest(config, split) for split in text.SPLITS}
    cached = {split: harvest(config, split) for split in text.SPLITS}
    for file in text.BUILD.rglob("*.parquet"):
        file.unlink()
    afresh = {split: harvest(config, split) for split in text.SPLITS}
    assert first == cached == afresh
    assert {document.kind for split in first.values() for document in split} == {"module", "class", "function"}
    assert "toy.m0.A0.f" in {document.name for split in first.values() for document in split}


def test_splits_follow_files_and_share_no_near_copy(package):
    config = approved(package)
    splits = {split: harvest(config, split) for split in text.SPLITS}
    for split, found in splits.items():
        for document in found:
            file = "/".join(document.name.split(".")[:2]) + ".py"
            assert split_of(file) == split
    masks = {split: {masked(document.text) for document in found} for split, found in splits.items()}
    assert not masks["test"] & masks["validation"] and not (masks["test"] | masks["validation"]) & masks["train"]
    # all class docstrings are near-copies of each other, so they may stand in one split only
    assert sum(any(d.kind == "class" for d in found) for found in splits.values()) == 1


def test_a_changed_package_is_refused_and_leaves_no_cache(package):
    with pytest.raises(UserError, match="docstrings of toy differ .* reinstall toy==1.0"):
        harvest(package, "validation")
    assert not list(text.BUILD.rglob("*"))


def test_another_version_is_refused(package):
    config = package.model_copy(update={"packages": {"toy": Package(version="2.0")}})
    with pytest.raises(UserError, match="expects toy==2.0 but 1.0 is installed: install requirements.lock"):
        harvest(config, "train")


def test_the_shipped_corpus_matches_its_fingerprints():
    """Evaluation text of the default profile: as pinned, from third parties only, splits disjoint."""
    test, validation = harvest(DEFAULT.text, "test"), harvest(DEFAULT.text, "validation")
    text.check_fingerprints(DEFAULT.text, test + validation)
    assert not {masked(d.text) for d in test} & {masked(d.text) for d in validation}
    assert not {"python", "torch"} & {d.package for d in test + validation}
    assert min(len(test), len(validation)) > 2000


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("Return the n_rows of x1.", "Return the n_cols of x2.", True),
        ("See `foo` and bar(x).", "See `spam` and eggs(x).", True),
        ("Uses numpy.mean here.", "Uses numpy.std here.", True),
        ("A LongName of it", "A ShortName  of\nit", True),
        ("Return the mean.", "Return the median.", False),
    ],
)
def test_masking_makes_near_copies_equal(one, other, equal):
    assert (masked(one) == masked(other)) is equal


# --- one interface ---


@pytest.fixture
def sources(tmp_path, tokenizer):
    """The same kind of text behind every source."""
    texts = [f"Paragraph {i} speaks of {words(i)}. " * 8 for i in range(400)]
    (tmp_path / "one.txt").write_text("\n\n".join(texts))
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, content in enumerate(texts):
        (folder / f"{i}.md").write_text(content)
    hub, ids = tmp_path / "hub", tmp_path / "ids"
    for place, rows in ((hub, {"text": texts}), (ids, {"input_ids": tokenizer(texts)["input_ids"]})):
        place.mkdir()
        pd.DataFrame(rows).to_parquet(place / "train.parquet")
    return {
        "file": Local(source="local", path=tmp_path / "one.txt"),
        "folder": Local(source="local", path=folder),
        "hub": HuggingFace(source="huggingface", name=str(hub), evaluation_documents=50),
        "ids": HuggingFace(source="huggingface", name=str(ids), column="input_ids", evaluation_documents=50),
        "docstrings": DEFAULT.text,
    }


@pytest.mark.parametrize("kind", ["file", "folder", "hub", "ids", "docstrings"])
def test_every_source_gives_the_same_shapes_deterministically(kind, sources, tokenizer):
    profile = DEFAULT.model_copy(update={"text": sources[kind], "context_length": 32})
    batches = [next(token_batches(profile, tokenizer, "validation", batch=4, seed=seed)) for seed in (0, 0, 1)]
    assert [b.shape for b in batches] == [(4, 32)] * 3
    assert all(b.dtype == torch.int64 and b.max() < len(tokenizer) for b in batches)
    assert torch.equal(batches[0], batches[1])
    with_bos = DEFAULT.model_copy(update={"text": sources[kind], "context_length": 32, "prepend_bos": True})
    rows = contexts(with_bos, tokenizer, "validation", 4)
    assert (rows[:, 0] == tokenizer.bos_token_id).all() and rows.shape == (4, 32)
    assert torch.equal(rows[0, 1:], batches[0][0, :31])


@pytest.mark.parametrize("kind", ["file", "folder", "hub"])
def test_splits_of_every_source_are_disjoint_and_complete(kind, sources):
    profile = DEFAULT.model_copy(update={"text": sources[kind]})
    found = {split: [d.text for d in documents(profile, split)] for split in text.SPLITS}
    joined = [t for texts in found.values() for t in texts]
    assert len(joined) == len(set(joined)) == 400
    assert all(found.values())


def test_seed_changes_the_order_and_not_the_documents(sources):
    for kind in ("file", "hub"):
        profile = DEFAULT.model_copy(update={"text": sources[kind]})
        for split in ("train", "test"):
            fixed, shuffled = list(documents(profile, split)), list(documents(profile, split, seed=3))
            assert fixed != shuffled and sorted(fixed) == sorted(shuffled)


def test_contexts_hold_the_documents_end_to_end(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n\n".join(f"line {i}" for i in range(2000)))
    profile = DEFAULT.model_copy(update={"text": Local(source="local", path=tmp_path / "a.txt"), "context_length": 16})
    rows = torch.cat(list(token_batches(profile, tokenizer, "validation", batch=1, seed=None)))
    expected = "".join(d.text + tokenizer.eos_token for d in documents(profile, "validation"))
    assert expected.startswith(tokenizer.decode(rows.flatten()))


def test_what_a_wrong_source_says(tmp_path, tokenizer, sources):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00text")
    cases = [
        (Local(source="local", path=tmp_path / "absent.txt"), "no text at"),
        (Local(source="local", path=tmp_path / "empty.txt"), "empty"),
        (Local(source="local", path=tmp_path / "binary.txt"), "binary.txt as UTF-8"),
        (sources["hub"].model_copy(update={"column": "input_ids"}), "no column 'input_ids'; it has text"),
        (sources["hub"].model_copy(update={"name": str(tmp_path / "nowhere")}), "cannot open data set"),
        (sources["hub"].model_copy(update={"hub_split": "dev"}), "cannot open data set"),
        (sources["hub"], "fewer than 99999 contexts"),
    ]
    for source, words_expected in cases:
        profile = DEFAULT.model_copy(update={"text": source})
        with pytest.raises(UserError, match=words_expected) as error:
            contexts(profile, tokenizer, "train", 99999)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="token ids"):
        next(documents(DEFAULT.model_copy(update={"text": sources["ids"]}), "train"))


def test_documents_are_named_for_excerpts():
    document = harvest(DEFAULT.text, "test")[0]
    assert isinstance(document, Document) and document.name.startswith(document.package)
