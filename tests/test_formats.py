"""Files of SAEs: what we write comes back, what others write is read, and what is damaged is refused with its key."""

import json
import math
import pickle
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from saelib import UserError, formats
from saelib.formats import SYSTEMS, export, load, save
from saelib.sae import SAE

N, D, K = 24, 8, 4
FACTS = {
    "model": "docstring-gpt", "fingerprint": "0123456789abcdef", "hook": "blocks.2.hook_resid_post",
    "context_length": 64, "text": "abc", "recipe": {"k": K}, "metrics": {"normalized_mse": 0.25},
}  # fmt: skip
MATRICES = ("encoder.weight", "decoder.weight")  # of OpenAI, whose files state no sizes: the two contradict each other
FOREIGN = [name for name in SYSTEMS if name != "ours"]


def random_sae(architecture="topk", *, latent_bias=True, normalize="unit"):
    """An SAE with nothing at its start value."""
    torch.manual_seed(1)
    sae = SAE(N, D, K, architecture=architecture, latent_bias=latent_bias, normalize=normalize).eval()
    for value in sae.state_dict().values():
        value += 0.1 * torch.randn_like(value).abs() if value.ndim == 0 else 0.1 * torch.randn_like(value)
    sae.facts = dict(FACTS)
    return sae


def activations():
    """Raw ones, far from the origin."""
    return 20 * torch.randn(128, D, generator=torch.Generator().manual_seed(2)) + torch.arange(D) * 30 + 300


def place(folder, format):
    return folder / ("sae.pt" if format == "openai" else format)


# --- ours -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_bias", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu", "prolu", "gated"])
def test_ours_comes_back_bit_for_bit(tmp_path, architecture, latent_bias):
    sae = random_sae(architecture, latent_bias=latent_bias)
    save(sae, tmp_path / "sae")
    back = load(tmp_path / "sae")
    assert back.state_dict().keys() == sae.state_dict().keys()
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in sae.state_dict().items())
    for name in ("architecture", "n_latents", "d_model", "k", "normalize", "facts"):
        assert getattr(back, name) == getattr(sae, name)
    assert not back.training and torch.equal(back(activations()), sae(activations()))


def test_ours_has_openai_names_and_equal_bytes(tmp_path):
    for name in ("one", "two"):
        save(random_sae(latent_bias=False), tmp_path / name)
    tensors = load_file(tmp_path / "one" / "sae.safetensors")
    assert {key: list(value.shape) for key, value in tensors.items()} == {
        "encoder.weight": [N, D], "decoder.weight": [D, N], "pre_bias": [D],
    }  # fmt: skip
    for file in ("sae.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_float16_rounds_the_matrices_and_nothing_else(tmp_path):
    sae = random_sae("batchtopk")
    save(sae, tmp_path / "sae", dtype=torch.float16)
    back = load(tmp_path / "sae")
    assert all(value.dtype == torch.float32 for value in back.state_dict().values())
    assert torch.equal(back.W_enc, sae.W_enc.half().float()) and torch.equal(back.W_dec, sae.W_dec.half().float())
    assert torch.equal(back.threshold, sae.threshold) and torch.equal(back.latent_bias, sae.latent_bias)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_is_not_written(tmp_path, value):
    sae = random_sae()
    sae.W_enc.data[3, 2] = value
    with pytest.raises(UserError, match="'encoder.weight' holds values that are not finite"):
        save(sae, tmp_path / "sae", dtype=torch.float16)
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("fact", [float("nan"), torch.zeros(3), Path("/home")])
def test_facts_must_fit_into_json(tmp_path, fact):
    sae = random_sae()
    sae.facts["metrics"] = fact
    with pytest.raises(UserError, match="JSON cannot hold sae.facts"):
        save(sae, tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_an_interrupted_save_leaves_the_old_sae_or_none(tmp_path, monkeypatch, failing):
    old, new = random_sae(), random_sae(latent_bias=False)
    original, calls = getattr(Path, failing), []

    def fail_on_second(self, *arguments):
        calls.append(self)
        if len(calls) % 2 == 0:
            raise OSError(28, "No space left on device")
        return original(self, *arguments)

    save(old, tmp_path / "sae")
    monkeypatch.setattr(Path, failing, fail_on_second)
    for folder in ("sae", "fresh"):
        with pytest.raises(UserError, match="No space left on device"):
            save(new, tmp_path / folder)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(UserError, match="no SAE at 'fresh'"):
        load(tmp_path / "fresh")
    if failing == "write_bytes":
        assert torch.equal(load(tmp_path / "sae").W_enc, old.W_enc)
    else:  # new tensors beside the old configuration: known by the hash
        with pytest.raises(UserError, match="weights_sha256"):
            load(tmp_path / "sae")


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save(random_sae(), tmp_path / "file" / "sae")


# --- other systems ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FOREIGN)
@pytest.mark.parametrize("latent_bias", [True, False])
@pytest.mark.parametrize("normalize", ["unit", "layer_norm", "none"])
def test_every_format_reconstructs_the_same_raw_activations(tmp_path, format, normalize, latent_bias):
    if (format, normalize) == ("openai", "none"):
        pytest.skip("refused, see below")
    sae, x = random_sae(normalize=normalize, latent_bias=latent_bias), activations()
    x = x / 300 if normalize == "none" else x
    export(sae, place(tmp_path, format), format)
    back = load(place(tmp_path, format))
    torch.testing.assert_close(back(x), sae(x), rtol=1e-5, atol=1e-5 * x.abs().max().item())
    assert back.encode(x, dense=True).values.count_nonzero() == sae.encode(x, dense=True).values.count_nonzero()
    assert format == "openai" or FACTS.items() <= back.facts.items()


def test_layer_norm_space_is_unit_space_times_the_root_of_d_minus_one(tmp_path):
    sae = random_sae()
    export(sae, tmp_path / "sae.pt", "openai")
    state = torch.load(tmp_path / "sae.pt", weights_only=True)
    torch.testing.assert_close(state["pre_bias"], math.sqrt(D - 1) * sae.pre_bias.data)
    torch.testing.assert_close(state["latent_bias"], math.sqrt(D - 1) * sae.latent_bias.data)
    assert torch.equal(state["decoder.weight"], sae.W_dec.data.T)


def test_our_openai_file_has_exactly_their_keys_and_dtypes(tmp_path):
    export(random_sae(), tmp_path / "sae.pt", "openai")
    state = torch.load(tmp_path / "sae.pt", weights_only=True)
    assert (state.pop("activation"), state.pop("activation_state_dict")) == ("TopK", {"k": K, "postact_fn": "ReLU"})
    assert {key: (list(value.shape), value.dtype) for key, value in state.items()} == {
        "encoder.weight": ([N, D], torch.float32), "decoder.weight": ([D, N], torch.float32),
        "pre_bias": ([D], torch.float32), "latent_bias": ([N], torch.float32),
        "stats_last_nonzero": ([N], torch.int64), "latents_activation_frequency": ([N], torch.float32),
        "latents_mean_square": ([N], torch.float32),
    }  # fmt: skip
    assert all(value.is_contiguous() for value in state.values())


def openai_state(activation="TopK", postact_fn="ReLU", extra=False):
    """A file's content as OpenAI's own code leaves it."""
    generator = torch.Generator().manual_seed(5)
    state = {
        "pre_bias": torch.randn(D, generator=generator), "latent_bias": torch.randn(N, generator=generator),
        "stats_last_nonzero": torch.arange(N), "latents_activation_frequency": torch.ones(N),
        "latents_mean_square": torch.zeros(N), "encoder.weight": torch.randn(N, D, generator=generator),
        "decoder.weight": torch.randn(D, N, generator=generator), "activation": activation,
        "activation_state_dict": {"k": K, "postact_fn": postact_fn} if activation == "TopK" else {},
    }  # fmt: skip
    return state | ({"activation.k": K, "activation.postact_fn": postact_fn} if extra else {})


@pytest.mark.parametrize("extra", [True, False])
def test_an_openai_topk_file_follows_their_equations(tmp_path, extra):
    state = openai_state(extra=extra)
    torch.save(state, tmp_path / "layer_8.pt")
    sae, x = load(tmp_path / "layer_8.pt"), activations()
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    centred = (x - mean) / (std + 1e-5) - state["pre_bias"]
    top = (centred @ state["encoder.weight"].T + state["latent_bias"]).topk(K, dim=-1)
    z = torch.zeros(len(x), N).scatter(-1, top.indices, top.values.relu())
    expected = (z @ state["decoder.weight"].T + state["pre_bias"]) * std + mean
    torch.testing.assert_close(sae(x).detach(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    export(sae, tmp_path / "again.pt", "openai")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert all(torch.equal(again[key], value) for key, value in state.items() if isinstance(value, torch.Tensor))


def test_an_openai_relu_file_does_not_normalise(tmp_path):
    state = openai_state("ReLU")
    torch.save(state, tmp_path / "sae.pt")
    sae, x = load(tmp_path / "sae.pt"), activations() / 300
    z = ((x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]).relu()
    assert (sae.architecture, sae.normalize, sae.k) == ("relu", "none", None)
    torch.testing.assert_close(sae(x).detach(), z @ state["decoder.weight"].T + state["pre_bias"])


def test_formats_that_cannot_hold_an_sae_say_so(tmp_path):
    for format in FOREIGN:
        with pytest.raises(UserError, match=f"{format} files hold topk only, this SAE is gated: choose ours"):
            export(random_sae("gated"), tmp_path / "sae", format)
    with pytest.raises(UserError, match="reads raw ones: choose one of ours, saelens, sparsify, dictionary_learning"):
        export(random_sae(normalize="none"), tmp_path / "sae", "openai")
    with pytest.raises(UserError, match="unknown format 'npz': choose one of ours, openai"):
        export(random_sae(), tmp_path / "sae", "npz")
    assert not list(tmp_path.iterdir())


# --- damaged, foreign, hostile ----------------------------------------------------------------------------------------


def edit(file, change):
    """Apply `change` to the tree of a JSON, safetensors or torch file; what it returns, if anything, replaces it."""
    if file.suffix == ".json":
        tree = json.loads(file.read_text())
        file.write_text(json.dumps(change(tree) or tree))
    elif file.suffix == ".safetensors":
        state = load_file(file)
        state = change(state) or state
        save_file({key: value.contiguous() for key, value in state.items()}, file)
        rehash(file)
    else:
        state = torch.load(file, weights_only=True)
        torch.save(change(state) or state, file)


def rehash(file):
    """Let our configuration fit the changed tensors: what is refused then is refused for another reason."""
    config = file.with_name("config.json")
    if config.exists():
        edit(config, lambda tree: {**tree, "weights_sha256": formats.hashlib.sha256(file.read_bytes()).hexdigest()})


def parts(folder, format):
    """The file of tensors, and the one with the configuration (for OpenAI the same)."""
    system, path = SYSTEMS[format], place(folder, format)
    return path / system.weights, path / system.config if system.config else path


@pytest.mark.parametrize("format", SYSTEMS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: None, "key '{}' is missing"),
        (lambda t: t[..., :-1], "key '{}' has shape"),
        (lambda t: t.double(), "key '{}' has dtype torch.float64"),
        (lambda t: t.int(), "key '{}' has dtype torch.int32"),
        (lambda t: t * float("nan"), "key '{}' holds values that are not finite"),
    ],
)  # fmt: skip
def test_every_tensor_is_checked_and_named(tmp_path, format, change, words):
    path, weights = place(tmp_path, format), parts(tmp_path, format)[0]
    keys = [key for key, (name, _) in SYSTEMS[format].tensors.items() if name in {"W_enc", "W_dec", "pre_bias"}]
    for key in keys:
        export(random_sae(), path, format)
        edit(weights, lambda state, key=key: changed(state, key, change))
        named = "decoder.weight" if (format, words[-5:]) == ("openai", "shape") and key in MATRICES else key
        with pytest.raises(UserError, match=words.format(named)) as error:
            load(path)
        assert "\n" not in str(error.value) and weights.name in str(error.value)


def changed(state, key, change):
    """The state with one tensor changed, or without it."""
    value = change(state[key])
    return {**{name: old for name, old in state.items() if name != key}, **({} if value is None else {key: value})}


@pytest.mark.parametrize("format", SYSTEMS)
def test_an_unknown_tensor_is_named(tmp_path, format):
    export(random_sae(), place(tmp_path, format), format)
    edit(parts(tmp_path, format)[0], lambda state: {**state, "W_skip": torch.zeros(D, D)})
    with pytest.raises(UserError, match="key 'W_skip' is unknown"):
        load(place(tmp_path, format))


@pytest.mark.parametrize(
    ("format", "changes", "words"),
    [
        ("ours", {"k": N + 1}, "key 'k' is 25"),
        ("ours", {"k": "4"}, "key 'k' is '4', not a fitting int"),
        ("ours", {"k": True}, "key 'k' is 'True'"),
        ("ours", {"architecture": "jumprelu"}, "key 'architecture' is 'jumprelu', not one of"),
        ("ours", {"architecture": "gated"}, "key 'r_mag' is missing"),
        ("ours", {"format": "saelib 2"}, "key 'format' is 'saelib 2', not one of"),
        ("ours", {"n_latents": 10**12}, r"key 'encoder.weight' has shape \[24, 8\], not \[1000000000000, 8\]"),
        ("saelens", {"architecture": "jumprelu"}, "key 'architecture'"),
        ("saelens", {"normalize_activations": "expected_average_only_in"}, "key 'normalize_activations'"),
        ("saelens", {"reshape_activations": "hook_z"}, "key 'reshape_activations'"),
        ("sparsify", {"activation": "groupmax"}, "key 'activation'"),
        ("sparsify", {"skip_connection": True}, "key 'skip_connection'"),
        ("sparsify", {"transcode": True}, "key 'transcode'"),
        ("sparsify", {"num_latents": 0, "expansion_factor": 5}, r"has shape \[24, 8\], not \[40, 8\]"),
        ("dictionary_learning", {"trainer": {"dict_class": "BatchTopKSAE"}}, "key 'trainer.dict_class'"),
        ("dictionary_learning", {"trainer": {"k": 5}}, "key 'k' is 4, which the configuration contradicts"),
        ("openai", {"activation": "Identity"}, "key 'activation' is 'Identity'"),
        ("openai", {"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "_dict.postact_fn' is 'Identity'"),
        ("openai", {"activation_state_dict": {}}, "key 'k' is 0"),
        ("openai", {"activation.k": K + 1}, "key 'activation.k' is 5, activation_state_dict contradicts"),
        ("openai", {"activation.k": torch.ones(2)}, "key 'activation.k' is tensor"),
        ("openai", {"activation.scale": torch.ones(2)}, "key 'activation.scale' is unknown"),
    ],
)  # fmt: skip
def test_every_configuration_is_checked_and_named(tmp_path, format, changes, words):
    export(random_sae(), place(tmp_path, format), format)
    edit(parts(tmp_path, format)[1], lambda tree: {**tree, **changes})
    with pytest.raises(UserError, match=words):
        load(place(tmp_path, format))


def test_sparsify_may_count_latents_by_expansion_factor(tmp_path):
    export(random_sae(), tmp_path / "sae", "sparsify")
    edit(tmp_path / "sae" / "cfg.json", lambda tree: {**tree, "num_latents": 0, "expansion_factor": N // D})
    assert load(tmp_path / "sae").n_latents == N


def test_saelens_before_version_6_had_topk_as_an_activation_function(tmp_path):
    export(random_sae(), tmp_path / "sae", "saelens")
    today, file = load(tmp_path / "sae"), tmp_path / "sae" / "cfg.json"
    old = {
        "architecture": "standard", "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu", "model_name": "gpt2",
        "hook_name": "blocks.8.hook_resid_post", "hook_layer": 8, "hook_head_index": None, "context_size": 64,
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "normalize_activations": "layer_norm", "prepend_bos": False,
        "sae_lens_training_version": "5.0.0", "neuronpedia_id": None,
    }  # fmt: skip
    older = {key: value for key, value in old.items() if key not in {"architecture", "activation_fn_str"}}
    for tree in (old, {**old, "architecture": "topk"}, {**older, "activation_fn": "topk"}):
        file.write_text(json.dumps(tree))
        sae = load(tmp_path / "sae")
        assert (sae.architecture, sae.k, sae.facts["hook"]) == ("topk", K, old["hook_name"])
        assert torch.equal(sae(activations()), today(activations()))
    wrong = {
        "key 'architecture' is 'gated'": {"architecture": "gated"},
        "key 'k' is 'None'": {"activation_fn_kwargs": []},
        "key 'architecture' is 'standard'": {"activation_fn_str": "relu"},
        "key 'normalize_activations' is 'True'": {"normalize_activations": True},
        "key 'reshape_activations' is 'hook_z'": {"hook_name": "blocks.8.attn.hook_z"},
    }
    for words, change in wrong.items():
        file.write_text(json.dumps({**old, **change}))
        with pytest.raises(UserError, match=words):
            load(tmp_path / "sae")


def test_ae_pt_may_stand_alone(tmp_path):
    export(random_sae(normalize="none"), tmp_path, "dictionary_learning")
    (tmp_path / "config.json").unlink()
    assert torch.equal(load(tmp_path).W_dec, load(tmp_path / "ae.pt").W_dec)


def test_what_is_no_sae_is_named(tmp_path):
    with pytest.raises(UserError, match="no SAE at 'nowhere'"):
        load(tmp_path / "nowhere")
    export(random_sae(), tmp_path, "saelens")
    export(random_sae(), tmp_path, "ours")
    with pytest.raises(UserError, match="several SAEs at"):
        load(tmp_path)


class Bomb:
    """Unpickled as code, this makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("writer", [torch.save, lambda what, file: file.write_bytes(pickle.dumps(what))])
def test_nothing_is_unpickled_as_code(tmp_path, writer):
    writer({**openai_state(), "pre_bias": Bomb(tmp_path / "marker")}, tmp_path / "sae.pt")
    with pytest.raises(UserError, match="not a readable file of tensors"):
        load(tmp_path / "sae.pt")
    assert not (tmp_path / "marker").exists()


def test_a_file_that_lies_about_its_size_allocates_nothing(tmp_path):
    state = openai_state()
    torch.save({**state, "encoder.weight": torch.zeros(1).expand(10**9, 10**6)}, tmp_path / "expanded.pt")
    with pytest.raises(UserError, match="'encoder.weight' is not a plain tensor"):
        load(tmp_path / "expanded.pt")
    torch.save({**state, "encoder.weight": torch.empty(10**9, 10**6, device="meta")}, tmp_path / "meta.pt")
    with pytest.raises(UserError, match="'encoder.weight' is not a plain tensor"):
        load(tmp_path / "meta.pt")
    export(random_sae(), tmp_path / "sae", "saelens")
    file, size = tmp_path / "sae" / "sae_weights.safetensors", 10**6
    lie = {"W_enc": {"dtype": "F32", "shape": [size, size], "data_offsets": [0, 4 * size**2]}}
    file.write_bytes(len(json.dumps(lie)).to_bytes(8, "little") + json.dumps(lie).encode() + bytes(16))
    with pytest.raises(UserError, match="not a readable file of tensors"):
        load(tmp_path / "sae")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2**70), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.sampled_from(["topk", "relu", "gated", "layer_norm", "unit", "none", "TopK", "ReLU", "Identity"]),
)  # fmt: skip
TENSORS = {
    "cut": lambda t: t[..., :-1] if t.ndim else t[None], "double": lambda t: t.double(), "half": lambda t: t.half(),
    "int": lambda t: t.long(), "bool": lambda t: t.bool(), "nan": lambda t: t * float("nan"), "inf": lambda t: t / 0,
    "more": lambda t: t[None], "flat": lambda t: t.flatten(), "turned": lambda t: t.T,
    "none": lambda t: t.flatten()[:0], "minus": lambda t: -t, "huge": lambda t: t * 1e38, "complex": lambda t: t + 0j,
}  # fmt: skip


@st.composite
def mutations(draw):
    """A format, and a function that damages its files in one of seven ways."""
    format, spot = draw(st.sampled_from(list(SYSTEMS))), draw(st.integers(0, 2**31))
    kind = draw(st.sampled_from(["flip", "truncate", "drop", "rename", "tensor", "config", "graft"]))
    value, name, at = draw(VALUES), draw(st.sampled_from(list(TENSORS))), draw(st.integers(0, 1))

    def damage(folder):
        file = parts(folder, format)[at if kind in {"flip", "truncate"} else kind == "config"]
        raw = file.read_bytes()
        if kind == "flip":
            file.write_bytes(
                raw[: spot % len(raw)] + bytes([raw[spot % len(raw)] ^ (spot % 255 + 1)]) + raw[spot % len(raw) + 1 :]
            )
        elif kind == "truncate":
            file.write_bytes(raw[: spot % len(raw)])
        else:
            edit(file, lambda tree: damage_tree(tree, kind))
        if kind in {"flip", "truncate"} and file.suffix == ".safetensors":
            rehash(file)

    def damage_tree(tree, kind):
        key = sorted(tree)[spot % len(tree)]
        if kind == "config" and isinstance(tree[key], dict) and tree[key] and spot % 2:
            return {**tree, key: damage_tree(tree[key], kind)}
        if kind in {"drop", "rename"} or (kind == "config" and spot % 3 == 0):
            gone = tree.pop(key)
            return {**tree, "renamed": gone} if kind == "rename" else tree
        if kind == "tensor" and isinstance(tree[key], torch.Tensor):
            return {**tree, key: TENSORS[name](tree[key])}
        if kind == "graft":
            return {**tree, key: torch.zeros(spot % 9, spot % 5)}
        return tree if kind == "tensor" or isinstance(tree[key], torch.Tensor) else {**tree, key: value}

    damage.__name__ = f"{kind}_{format}_{spot}_{name}_{value!r}"
    return format, damage


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    for format in SYSTEMS:
        export(random_sae(), place(folder, format), format)
    return folder


@settings(max_examples=500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(mutation=mutations())
def test_a_damaged_file_is_refused_or_harmless(good, tmp_path_factory, mutation):
    format, damage = mutation
    folder = tmp_path_factory.mktemp("bad")
    source, target = place(good, format), place(folder, format)
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    damage(folder)
    try:
        sae = load(target)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert (sae.W_enc.shape, sae.W_dec.shape, sae.pre_bias.shape) == ((N, D), (N, D), (D,))
        assert all(value.isfinite().all() for value in sae.state_dict().values())
        assert sae.k is None or 1 <= sae.k <= N
    shutil.rmtree(folder)


# --- the model --------------------------------------------------------------------------------------------------------


def model(weights, d_model=D):
    """What `load` looks at of a model."""
    return SimpleNamespace(
        cfg=SimpleNamespace(d_model=d_model, model_name="/a/path/second-seed"), weights_fingerprint=weights
    )


@pytest.mark.parametrize("format", ["ours", "saelens", "sparsify", "dictionary_learning"])
def test_an_sae_of_other_weights_warns_in_one_line(tmp_path, format):
    export(random_sae(), tmp_path / "sae", format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "sae", model(FACTS["fingerprint"]))
    with pytest.warns(UserWarning) as caught:
        load(tmp_path / "sae", model("ffff"))
    assert [str(warning.message) for warning in caught] == [
        "SAE sae was trained on docstring-gpt with weights 0123456789abcdef, this is second-seed with weights ffff"
    ]
    assert caught[0].filename == __file__


def test_an_sae_of_another_size_is_refused(tmp_path):
    save(random_sae(), tmp_path / "sae")
    with pytest.raises(UserError, match="SAE sae has d_model 8, the model 768"):
        load(tmp_path / "sae", model(FACTS["fingerprint"], d_model=768))
