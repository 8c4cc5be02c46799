"""Profiles: what is allowed, and what one reads when something is not."""

import pytest

from saelib import UserError
from saelib.profile import ROOT, available, load_profile, override


def write(tmp_path, text):
    path = tmp_path / "mine.yml"
    path.write_text(text)
    return path


MINIMAL = (
    "name: mine\nmodel: {name: some/model}\ntext: {source: local, path: notes.txt}\nhook: blocks.0.hook_resid_post\n"
)


def test_every_shipped_profile_is_valid_and_named_as_its_file():
    assert {"docstring-gpt", "gpt2-small", "stanford-gpt2-small-a"} <= set(available())
    for name in available():
        assert load_profile(name).name == name


def test_own_profile_by_path(tmp_path):
    assert load_profile(write(tmp_path, MINIMAL)).text.path.name == "notes.txt"


def test_profile_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_profile("docstring-gpt").hook = "elsewhere"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "hok: 1\n", ["mine.yml", "unknown key 'hok'", "context_length", "hook"]),
        (MINIMAL.replace("{name: some/model}", "{name: a, nam: b}"), ["model.nam", "second_seed"]),
        (MINIMAL.replace("source: local", "source: web"), ["text", "docstrings", "huggingface", "local", "web"]),
        (MINIMAL + "context_length: 1\n", ["context_length", "greater than or equal to 2", "1"]),
        (MINIMAL + "device: tpu\n", ["device", "'auto', 'cpu', 'cuda' or 'mps'", "tpu"]),
        ("name: mine\n", ["model", "Field required"]),
        ("- a\n", ["mapping"]),
        ("a: [\n", ["mine.yml", "not valid YAML"]),
    ],
)
def test_a_wrong_profile_is_explained_in_one_line(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        load_profile(write(tmp_path, text))
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_unknown_name_lists_the_choices(tmp_path):
    with pytest.raises(UserError, match="docstring-gpt, docstring-gpt-plain, gpt2-small"):
        load_profile("docstring")
    with pytest.raises(UserError, match="cannot read"):
        load_profile(tmp_path / "absent.yml")


def test_profile_sections_document_every_field():
    """A reader of `profile.py` finds the unit or meaning of everything that is not plain from its name."""
    plain = {"name", "hook", "model", "text", "source", "path", "config", "revision", "device", "version", "packages",
             "n_layer", "n_head", "d_model", "vocab_size", "steps", "weight_decay", "warmup", "beta2",
             "prepend_bos", "pretrain", "hub_split"}  # fmt: skip
    from saelib import profile

    for section in profile.Section.__subclasses__():
        for name, field in section.model_fields.items():
            assert name in plain or field.description, f"{section.__name__}.{name}"


def test_docstring_profile_evaluates_on_third_party_packages_only():
    text = load_profile("docstring-gpt").text
    evaluated = {name for name, package in text.packages.items() if package.fingerprint}
    assert "torch" not in evaluated  # CPU and CUDA builds of one version may differ
    assert len(evaluated) >= 10
    assert (ROOT / "profiles/docstring-gpt.yml").is_file()


def test_a_profile_may_extend_another(tmp_path):
    base = load_profile("docstring-gpt")
    mine = load_profile(write(tmp_path, "extends: docstring-gpt\nname: mine\nmodel: {name: a/b}\n"))
    assert (mine.model.name, mine.model.second_seed) == ("a/b", base.model.second_seed)
    assert mine.text == base.text and mine.pretrain == base.pretrain
    local = load_profile(write(tmp_path, "extends: docstring-gpt\nname: m\ntext: {source: local, path: a.txt}\n"))
    assert local.text.path.name == "a.txt"
    with pytest.raises(UserError, match="unknown key 'pretrain.stebs'"):
        load_profile(write(tmp_path, "extends: docstring-gpt\nname: m\npretrain: {stebs: 3}\n"))
    with pytest.raises(UserError, match="mine.yml extends itself"):
        load_profile(write(tmp_path, "extends: mine\nname: m\n"))
    with pytest.raises(UserError, match="no profile 'nobody'"):
        load_profile(write(tmp_path, "extends: nobody\nname: m\n"))


def test_the_control_differs_in_the_repeats_and_the_length_only():
    plain, base = load_profile("docstring-gpt-plain").pretrain, load_profile("docstring-gpt").pretrain
    changed = {"repeat_share": 0.0, "steps": plain.steps, "checkpoints": plain.checkpoints}
    assert plain == base.model_copy(update=changed)


def test_an_sae_takes_the_profiles_recipe_and_its_own_values():
    chosen = override(load_profile("docstring-gpt"), {"recipe.lr_anchor": 1e-3})
    large = chosen.recipe_of("large")
    assert (large.n_latents, large.k) == (8192, chosen.recipe.k)
    assert large.rate == pytest.approx(1e-3 * 2**0.5)  # 1 / sqrt(n)
    with pytest.raises(UserError, match="no SAE 'huge'; it has small, large"):
        chosen.recipe_of("huge")
    with pytest.raises(UserError, match="recipe.k_auks"):
        override(chosen, {"saes.large.recipe": {"k_auks": 3}}).recipe_of("large")
