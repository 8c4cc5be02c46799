"""Read and write SAEs: our own folder, and the files of OpenAI, SAELens, sparsify and dictionary_learning.

    save(sae, "models/docstring-gpt/sae-small", dtype=torch.float16)
    sae = load("models/docstring-gpt/sae-small", model)
    export(sae, "sae.pt", "openai")

`SYSTEMS` is all there is to know about a system: its files, its tensors, and what else its files say. Nothing is
unpickled as code, and a file that is not what it should be is refused in one line that names file and key.

OpenAI and SAELens divide an activation by its standard deviation, the paper by its norm: x_ln = sqrt(d - 1) x_unit
(but for `LN_EPS`, which OpenAI's code adds only where it divides), and both biases scale with it. sparsify and
dictionary_learning do not normalise: their users hand in what `SAE.normalized` returns, and our note `saelib_inputs` in
the configuration says which kind that is.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from saelib import UserError
from saelib.models import fingerprint
from saelib.profile import write
from saelib.sae import SAE, TINY

NORMALIZE = ("unit", "layer_norm", "none")
FLOATS, INTEGERS = (torch.float32, torch.float16, torch.bfloat16), (torch.int64, torch.int32)


class System(NamedTuple):
    """How one system writes an SAE."""

    weights: str
    """File with the tensors; empty where the path itself is that file."""
    config: str | None
    """File with the rest, in JSON; None where it stands among the tensors."""
    tensors: dict[str, tuple[str, str]]
    """Key: our name and the shape in letters, n = latents and d = d_model. `W_enc` comes first."""
    says: dict[str, tuple[str, type | tuple, object]]
    """Dotted key of the configuration: our name; a type (`int`: from 1) or the allowed values; default, `...` if none.
    Names with a dot are facts."""


STATISTICS = {key: (key, "n") for key in ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")}
MATRICES = {"encoder.weight": ("W_enc", "nd"), "decoder.weight": ("W_dec", "dn")}
BIASES = {"pre_bias": ("pre_bias", "d"), "latent_bias": ("latent_bias", "n")}
NOTES = {"saelib_inputs": ("normalize", NORMALIZE, "none"), "saelib_facts": ("facts", dict, {})}
SYSTEMS = {
    "ours": System("sae.safetensors", "config.json", MATRICES | BIASES | {
        "r_mag": ("r_mag", "n"), "mag_bias": ("mag_bias", "n"), "threshold": ("threshold", ""),
    }, {
        "format": ("format", ("saelib 1",), ...),
        "architecture": ("architecture", ("topk", "batchtopk", "relu", "prolu", "gated"), ...),
        "n_latents": ("n_latents", int, ...), "d_model": ("d_model", int, ...), "k": ("k", int, None),
        "normalize": ("normalize", NORMALIZE, ...), "facts": ("facts", dict, {}),
        "weights_sha256": ("sha256", str, ...),  # the two files belong together
    }),
    "openai": System("", None, MATRICES | BIASES | STATISTICS, {
        "activation": ("activation", ("TopK", "ReLU"), "ReLU"), "activation_state_dict.k": ("k", int, None),
        "activation_state_dict.postact_fn": ("postact_fn", ("ReLU",), "ReLU"),
    }),
    "saelens": System("sae_weights.safetensors", "cfg.json", {
        "W_enc": ("W_enc", "dn"), "W_dec": ("W_dec", "nd"), "b_enc": ("latent_bias", "n"), "b_dec": ("pre_bias", "d"),
    }, {
        "architecture": ("architecture", ("topk",), ...), "d_in": ("d_model", int, ...),
        "d_sae": ("n_latents", int, ...), "k": ("k", int, ...), "dtype": ("dtype", str, "float32"),
        "device": ("device", str, "cpu"), "apply_b_dec_to_input": ("centres", bool, True),
        "normalize_activations": ("normalize", ("layer_norm", "none"), "none"),
        "rescale_acts_by_decoder_norm": ("rescales", bool, False),
        "reshape_activations": ("reshape", ("none",), "none"),
        "metadata": ("facts", dict, {}), "metadata.model_name": ("facts.model", object, None),
        "metadata.hook_name": ("facts.hook", object, None), "metadata.prepend_bos": ("facts.prepend_bos", object, None),
        "metadata.context_size": ("facts.context_length", object, None),
        "metadata.sae_lens_version": ("version", object, "6.0.0"),  # of the layout; files without are taken for older
    }),
    "sparsify": System("sae.safetensors", "cfg.json", {
        "encoder.weight": ("W_enc", "nd"), "W_dec": ("W_dec", "nd"), "encoder.bias": ("latent_bias", "n"),
        "b_dec": ("pre_bias", "d"),
    }, NOTES | {
        "activation": ("activation", ("topk",), "topk"), "d_in": ("d_model", int, ...), "k": ("k", int, ...),
        "num_latents": ("n_latents", int, 0), "expansion_factor": ("expansion", int, 32),  # 0: d_in * expansion_factor
        "normalize_decoder": ("unit_norm", bool, True), "multi_topk": ("multi_topk", bool, False),
        "skip_connection": ("skip", (False,), False), "transcode": ("transcode", (False,), False),
        "signed": ("signed", (False,), False),
    }),
    "dictionary_learning": System("ae.pt", "config.json", MATRICES | {
        "encoder.bias": ("latent_bias", "n"), "b_dec": ("pre_bias", "d"), "k": ("k", ""), "threshold": ("unused", ""),
    }, NOTES | {
        "trainer.dict_class": ("dict_class", ("AutoEncoderTopK",), "AutoEncoderTopK"), "trainer.k": ("k", int, None),
        "trainer.activation_dim": ("d_model", int, None), "trainer.dict_size": ("n_latents", int, None),
        "trainer.lm_name": ("facts.model", object, None), "trainer.submodule_name": ("facts.hook", object, None),
        "buffer": ("buffer", dict, {}),
    }),
}  # fmt: skip


def _refuse(file: Path, problem: str) -> UserError:
    return UserError(f"{file.parent.name}/{file.name}: {problem}; fetch, train or export the SAE again")


# --- reading ----------------------------------------------------------------------------------------------------------


def load(path: str | Path, model: TransformerBridge | None = None) -> SAE:
    """The SAE at `path`, in float32 on the CPU, in eval mode; what lies there is recognised by its content.

    A folder of ours, SAELens, sparsify or dictionary_learning, or a torch file of OpenAI or dictionary_learning (TopK,
    unless a `config.json` beside it says otherwise). With `model`, warns if the SAE was trained on other weights.

    Raises:
        UserError: nothing known lies there, it is damaged, or its size is not the model's.
    """
    name, weights = _find(Path(path))
    state = _state(weights)
    if name is None:
        name = "dictionary_learning" if "encoder.bias" in state else "openai"
    system = SYSTEMS[name]
    file = weights.with_name(system.config) if system.config else weights
    tree = _json(file) if system.config else state
    said = _said(file, system, _as_today(tree) if name == "saelens" else tree)
    if name == "openai":
        state = {key: value for key, value in state.items() if key not in {"activation", "activation_state_dict"}}
        for key in ("k", "postact_fn"):  # some files say it twice
            twice = state.pop(f"activation.{key}", said[key])
            if type(twice) is not type(said[key]) or twice != said[key]:
                raise _refuse(file, f"key 'activation.{key}' is {twice!r:.40}, activation_state_dict contradicts it")
        said["architecture"] = said["activation"].lower()
        said["normalize"] = "layer_norm" if said["activation"] == "TopK" else "none"  # the file has no other sign
    if name == "sparsify":
        said["n_latents"] = said["n_latents"] or said["d_model"] * said["expansion"]
    if name == "ours" and said["sha256"] != hashlib.sha256(weights.read_bytes()).hexdigest():
        raise _refuse(weights, "not the tensors that config.json belongs to (key 'weights_sha256')")
    sae = _built(weights, said, _checked(weights, name, said, state))
    if model is not None:
        _compare(sae, model, Path(path).name)
    return sae


def _find(path: Path) -> tuple[str | None, Path]:
    """System and weights at a path; None for a torch file, whose keys tell the system."""
    if path.is_file():
        return None, path
    found = [
        (name, path / system.weights)
        for name, system in SYSTEMS.items()
        if system.weights.endswith(".safetensors") and all((path / file).is_file() for file in system[:2])
    ] + [(None, path / "ae.pt")] * (path / "ae.pt").is_file()
    if len(found) != 1:
        known = ", ".join(f"{system.weights} and {system.config}" for system in SYSTEMS.values() if system.weights)
        what = "several SAEs" if found else "no SAE"
        raise UserError(f"{what} at {path.name!r}: give a torch file, or a folder with one of {known}")
    return found[0]


def _state(file: Path) -> dict[str, object]:
    """Content of a safetensors or torch file; of the latter only tensors, numbers, strings and containers."""
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        with zipfile.ZipFile(file) as archive:  # torch stores without compression: more inside than outside is a bomb
            if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
                raise ValueError("larger inside than outside")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its first broken part provokes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _refuse(file, f"not a readable file of tensors ({reason[:120]})") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise _refuse(file, "holds no named tensors")
    return state


def _json(file: Path) -> object:
    """A JSON file; {} where there is none (only `ae.pt` may stand alone)."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise _refuse(file, "not readable as JSON") from error


def _said(file: Path, system: System, tree: object) -> dict:
    """What a configuration says, by our names; None where it does not say."""
    said = {"architecture": "topk", "n_latents": None, "d_model": None, "normalize": "none", "facts": {}}
    for key, (name, allowed, default) in system.says.items():
        value = tree
        for part in key.split("."):
            value = value.get(part, default) if isinstance(value, dict) else default
        if value is ...:
            raise _refuse(file, f"key {key!r} is missing")
        if isinstance(allowed, tuple):
            fits = any(type(value) is type(one) and value == one for one in allowed)
        else:
            fits = isinstance(value, allowed) and (allowed is not int or (type(value) is int and value >= 1))
        if not fits and not (type(value) is type(default) and value == default):
            wanted = f"one of {list(allowed)}" if isinstance(allowed, tuple) else f"a fitting {allowed.__name__}"
            raise _refuse(file, f"key {key!r} is {str(value)[:40]!r}, not {wanted}")
        said[name] = value
    facts = {name.removeprefix("facts."): said.pop(name) for name in list(said) if name.startswith("facts.")}
    said["facts"] = said["facts"] | {name: value for name, value in facts.items() if value is not None}
    return said


def _as_today(tree: object) -> object:
    """An older SAELens configuration (TopK as activation function of a `standard` SAE) in the layout of version 6."""
    old = tree if isinstance(tree, dict) else {}
    called = old.get("activation_fn_str", old.get("activation_fn"))
    if called != "topk" or old.get("architecture", "standard") not in ("standard", "topk"):
        return tree
    sizes, hook = old.get("activation_fn_kwargs"), old.get("hook_name", old.get("hook_point"))
    metadata = {"hook_name": hook, **{key: old.get(key) for key in ("model_name", "prepend_bos", "context_size")}}
    new = {"reshape_activations": "hook_z" if "hook_z" in str(hook) else "none"} | old
    new |= {"architecture": "topk", "k": sizes.get("k") if isinstance(sizes, dict) else None, "metadata": metadata}
    return new | {"normalize_activations": old.get("normalize_activations") or "none"}  # could be null or false


def _checked(file: Path, name: str, said: dict, state: dict[str, object]) -> dict[str, Tensor]:
    """A file's tensors by our names and in our layout, in float32, if each of them is as it should be."""
    table = SYSTEMS[name].tensors
    least, most = (set(SAE(1, 1, 1, architecture=said["architecture"], latent_bias=b).state_dict()) for b in (0, 1))
    if name == "ours":
        table = {key: entry for key, entry in table.items() if entry[0] in most}
    else:
        least = most | {"k"}
    for key in state:
        if key not in table:
            raise _refuse(file, f"key {key[:80]!r} is unknown")
    for key, (ours, _) in table.items():
        if key in state:
            _check_tensor(file, key, state[key])
        elif ours in least:
            raise _refuse(file, f"key {key!r} is missing")
    first, (_, axes) = next(iter(table.items()))
    sizes = {axis: said[size] or 0 for axis, size in (("n", "n_latents"), ("d", "d_model"))}
    sizes = {axis: sizes[axis] or length for axis, length in zip(axes, state[first].shape, strict=False)}
    for key in (key for key in table if key in state):
        wanted = [sizes.get(axis, 0) for axis in table[key][1]]
        if list(state[key].shape) != wanted or 0 in wanted:
            raise _refuse(file, f"key {key!r} has shape {list(state[key].shape)}, not {wanted}")
    plain = {key: value.detach() if value.dtype in INTEGERS else value.detach().float() for key, value in state.items()}
    return {table[key][0]: value.T if table[key][1] == "dn" else value for key, value in plain.items()}


def _check_tensor(file: Path, key: str, value: object) -> None:
    """A plain tensor that holds as many numbers as it says, of a kind that fits, all of them finite."""
    plain = isinstance(value, Tensor) and value.device.type == "cpu" and value.layout is torch.strided
    if not plain or value.is_nested or value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise _refuse(file, f"key {key!r} is not a plain tensor")
    allowed = INTEGERS if key in {"k", "stats_last_nonzero"} else FLOATS
    if value.dtype not in allowed:
        raise _refuse(file, f"key {key!r} has dtype {value.dtype}, not one of {', '.join(map(str, allowed))}")
    if not value.isfinite().all():
        raise _refuse(file, f"key {key!r} holds values that are not finite")


def _built(file: Path, said: dict, tensors: dict[str, Tensor]) -> SAE:
    """An SAE of checked tensors, in eval mode: BatchTopK then cuts at its threshold."""
    n, d = tensors["W_enc"].shape
    k = int(tensors.pop("k", said["k"] or 0))
    if said["k"] not in {None, k} or (said["architecture"] in {"topk", "batchtopk"} and not 1 <= k <= n):
        raise _refuse(file, f"key 'k' is {k}, which the configuration contradicts, or which is not from 1 to {n}")
    if said.get("rescales"):  # SAELens: latents compete by what they add; into the weights with it
        norm = tensors["W_dec"].norm(dim=1, keepdim=True)
        tensors |= {"W_enc": tensors["W_enc"] * norm, "W_dec": tensors["W_dec"] / norm.clamp_min(TINY)}
        tensors["latent_bias"] = tensors["latent_bias"] * norm[:, 0]
    if said.get("centres") is False:
        tensors["latent_bias"] = tensors["latent_bias"] + tensors["W_enc"] @ tensors["pre_bias"]
    if not all(value.isfinite().all() for value in tensors.values()):
        raise _refuse(file, "keys 'W_dec' and 'b_dec' are too large to be folded into 'W_enc' and 'b_enc'")
    facts = said["facts"] | {name: tensors.pop(name).tolist() for name in STATISTICS if name in tensors}
    tensors.pop("unused", None)
    biased, styles = "latent_bias" in tensors, {name: said[name] for name in ("architecture", "normalize")}
    sae = SAE(n, d, k or None, latent_bias=biased, **styles)
    sae.load_state_dict(tensors)
    sae.facts = facts
    return sae.eval()


def _compare(sae: SAE, model: TransformerBridge, name: str) -> None:
    """Is this an SAE of this model? Another size cannot be; other weights may be meant."""
    if sae.d_model != model.cfg.d_model:
        raise UserError(f"SAE {name} has d_model {sae.d_model}, the model {model.cfg.d_model}: load one of this model")
    trained, here = sae.facts.get("fingerprint"), fingerprint(model)
    if trained is not None and trained != here:
        known, this = sae.facts.get("model", "an unnamed model"), Path(model.cfg.model_name).name
        other = f"was trained on {known} with weights {trained}, this is {this} with weights {here}"
        warnings.warn(f"SAE {name} {other}", stacklevel=3)


# --- writing ----------------------------------------------------------------------------------------------------------


def save(sae: SAE, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write our folder: `sae.safetensors` with OpenAI's tensor names, `config.json` with the rest and `sae.facts`.

    Equal SAEs give equal bytes. `dtype` is that of the two matrices; what is small stays in float32.

    Raises:
        UserError: a weight is not finite (in that dtype), JSON cannot hold the facts, or the folder is not writable.
    """
    state = {name: value.to(dtype if value.ndim == 2 else torch.float32) for name, value in sae.state_dict().items()}
    _store(sae, Path(folder), "ours", sae.normalize, state)


def export(sae: SAE, path: str | Path, format: str) -> None:
    """Write for another system: `openai` (a `.pt` file), `saelens`, `sparsify` or `dictionary_learning` (folders).

    `ours` is `save`. The first two normalise by the standard deviation: the biases of a `unit` SAE are scaled to that.

    Raises:
        UserError: as `save`; or the format cannot hold this SAE.
    """
    if format not in SYSTEMS:
        raise UserError(f"unknown format {format!r}: choose one of {', '.join(SYSTEMS)}")
    if format == "ours":
        return save(sae, path)
    if sae.architecture != "topk":
        raise UserError(f"{format} files hold topk only, this SAE is {sae.architecture}: choose ours, which holds all")
    if format == "openai" and sae.normalize == "none":
        others = ", ".join(name for name in SYSTEMS if name != "openai")
        raise UserError(f"OpenAI's TopK files mean normalised inputs, this SAE reads raw ones: choose one of {others}")
    normalize = "layer_norm" if format in {"openai", "saelens"} and sae.normalize == "unit" else sae.normalize
    scale = 1.0 if normalize == sae.normalize else math.sqrt(sae.d_model - 1)
    state = {"latent_bias": torch.zeros(sae.n_latents)} | {key: v.float() for key, v in sae.state_dict().items()}
    state |= {name: scale * state[name] for name in BIASES}
    state |= {"k": torch.tensor(sae.k, dtype=torch.int32), "unused": torch.tensor(-1.0)}  # no threshold was estimated
    for name in STATISTICS:
        dtype = torch.int64 if name == "stats_last_nonzero" else torch.float32
        state[name] = torch.tensor(sae.facts.get(name, [0] * sae.n_latents), dtype=dtype)
    return _store(sae, Path(path), format, normalize, state)


def _store(sae: SAE, path: Path, name: str, normalize: str, state: dict[str, Tensor]) -> None:
    """Check and write the tensors that the system knows, and its configuration."""
    system = SYSTEMS[name]
    said = {key: getattr(sae, key) for key in ("architecture", "n_latents", "d_model", "k", "facts")}
    said |= {"normalize": normalize, "activation": "TopK" if name == "openai" else "topk", "format": "saelib 1"}
    tensors = {
        key: (state[ours].T if shape == "dn" else state[ours]).cpu().clone(memory_format=torch.contiguous_format)
        for key, (ours, shape) in system.tensors.items()
        if ours in state
    }
    _checked(path / system.weights, name, said, tensors)
    if system.weights.endswith(".safetensors"):
        content = safetensors.torch.save(tensors)
        said["sha256"] = hashlib.sha256(content).hexdigest()
    else:
        buffer = io.BytesIO()  # torch writes the name of a file into it, a buffer has none
        torch.save(tensors | (_tree(system, said) if name == "openai" else {}), buffer)
        content = buffer.getvalue()
    files = {path / system.weights: content}
    if system.config:
        try:
            text = json.dumps(_tree(system, said), indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"JSON cannot hold sae.facts ({error}): keep numbers, words, lists and dicts") from error
        files[path / system.config] = f"{text}\n".encode()
    write(files)


def _tree(system: System, said: dict) -> dict:
    """A system's configuration: what we know by its names, and its defaults."""
    said = {f"facts.{name}": value for name, value in said["facts"].items()} | said
    tree: dict = {}
    for key, (name, _, default) in system.says.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        value = said.get(name, default)
        node[last] = dict(value) if isinstance(value, dict) else value  # facts stay as they are
    return tree
