"""A profile: everything that differs between scales, and nothing else.

A profile is one YAML file. `Profile` is its validated, frozen form: an unknown key or value stops the run
in one line that names the file, the key and what is allowed.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from saelib import UserError

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: profiles, shipped models and results are found relative to it."""

BUILD = ROOT / os.environ.get("SAELIB_BUILD", "_build")
"""Everything a run writes goes below this folder; git ignores it. `$SAELIB_BUILD` names another."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Package(Section):
    """One pinned package whose docstrings may be read."""

    version: str
    """Version of the distribution, as `pip show` prints it, without a local tag such as `+cpu`."""
    distribution: str | None = None
    """Name on PyPI where it differs from the import name."""
    fingerprint: str | None = None
    """Start of the SHA-256 of the package's validation and test docstrings; absent: the package feeds training only."""


class Docstrings(Section):
    """Docstrings of installed packages, parsed and never imported (`saelib.text`)."""

    source: Literal["docstrings"]
    packages: dict[str, Package]
    standard_library: bool = True
    """Whether the standard library feeds training; it differs between Python minors, so it is never evaluated on."""


class Local(Section):
    """A text file, or a folder of `.txt` and `.md` files."""

    source: Literal["local"]
    path: Path
    """Absolute, or relative to the checkout."""


class HuggingFace(Section):
    """A data set by hub name or local folder, streamed."""

    source: Literal["huggingface"]
    name: str
    config: str | None = None
    revision: str | None = None
    column: Literal["text", "input_ids"] = "text"
    """`input_ids` means already tokenised with the model's own tokenizer."""
    hub_split: str = "train"
    evaluation_documents: PositiveInt = 10_000
    """The first so many documents are validation, the next so many test, the rest training."""
    documents: PositiveInt | None = None
    """Of the whole data set. With `tokens`, `saelib fetch` gets only what the longest training run reads."""
    tokens: PositiveInt | None = None
    """Of the whole data set, about."""


class Model(Section):
    """The model under study."""

    name: str
    """Hub name, or a local folder in Hugging Face layout, relative to the checkout."""
    revision: str | None = None
    second_seed: str | None = None
    """The same recipe and length from another seed, for transplants and stability."""
    checkpoints: str | None = None
    """Folder of `step-NNNNNN` models, or a hub name whose revisions are training steps."""
    training_batch: PositiveInt | None = None
    """Sequences in one pre-training batch, so that steps can be read as tokens."""
    training_context: PositiveInt | None = None
    """Tokens in one pre-training sequence."""


class Pretrain(Section):
    """How `saelib pretrain` makes the model (only for models we train ourselves)."""

    n_layer: PositiveInt = 4
    n_head: PositiveInt = 4
    d_model: PositiveInt = 128
    vocab_size: Annotated[int, Field(ge=257, le=65_536)] = 4096
    """256 bytes, one special token, and what is learned; token ids are kept in 16 bits."""
    context_length: PositiveInt = 128
    """Tokens."""
    batch: PositiveInt = 8
    """Contexts in one step."""
    steps: PositiveInt
    lr: PositiveFloat = 1.5e-3
    """Constant after a linear warm-up of `warmup` steps."""
    warmup: PositiveInt = 300
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.99
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: PositiveFloat = 1.0
    """Largest gradient norm."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the weight average per step, bias-corrected; every checkpoint is this average."""
    repeat_share: Annotated[float, Field(ge=0, le=0.1)] = 0.0
    """Share of training contexts that repeat their own first 16 to 64 tokens until they are full."""
    checkpoints: Annotated[tuple[int, ...], Field(min_length=1)]
    """Steps at which the averaged model is written; the last one is the final model."""

    @model_validator(mode="after")
    def _fits(self):
        if self.d_model % self.n_head:
            raise ValueError(f"n_head must divide d_model, and {self.n_head} does not divide {self.d_model}")
        if list(self.checkpoints) != sorted(set(self.checkpoints)) or self.checkpoints[-1] != self.steps:
            raise ValueError("checkpoints must rise and end at steps")
        return self


class Recipe(Section):
    """How a sparse autoencoder is trained: one field per ingredient, by default as Gao et al. (2024) have it.

    Sizes (`n_latents`, `k`, `tokens`, `batch`, `k_aux`, `dead_after`) suit a small model, not the paper's.
    """

    architecture: Literal["topk", "batchtopk", "relu", "prolu", "gated"] = "topk"
    """What turns pre-activations into latents (`saelib.sae`): the paper's is `topk`, it compares with the others."""
    n_latents: PositiveInt = 2048
    """Directions in the dictionary."""
    k: PositiveInt = 16
    """Active latents per token (`batchtopk`: on average over a batch; `relu`, `prolu` and `gated` ignore it)."""
    l1: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the sparsity penalty of `relu`, `prolu` and `gated`; TopK needs none (section 2.3)."""
    latent_bias: bool = False
    """A bias per latent before the selection. The paper's equation has none, the released files do."""
    normalize: Literal["unit", "layer_norm", "none"] = "unit"
    """Inputs lose their mean over d_model and are divided by their norm (section 2.1), or by their standard deviation
    (`layer_norm`, the released code), or stay as they are."""
    tokens: PositiveInt = 10_000_000
    """Length of the run; the text is read again as often as needed."""
    batch: PositiveInt = 4096
    """Tokens in one step (the paper: 131,072)."""
    lr: PositiveFloat | None = None
    """Learning rate, constant. Absent: `lr_anchor` x sqrt(2^14 / n_latents), the scaling of section 3.1."""
    lr_anchor: PositiveFloat = 2e-4
    """Learning rate at 2^14 latents."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's decay of the mean gradient (appendix A)."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's decay of the mean squared gradient (appendix A)."""
    eps: PositiveFloat = 6.25e-10
    """Adam's (appendix A)."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up; the paper has none."""
    clip: PositiveFloat | None = None
    """Largest gradient norm; the paper clips only its GPT-4 runs."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay per step of the weight average, bias-corrected, which is the SAE that is kept (appendix A)."""
    tied_init: bool = True
    """The encoder starts as the transpose of the decoder (appendix A); otherwise as another random matrix."""
    tied: bool = False
    """The encoder stays the decoder's transpose for ever: the journal's mistake of entry 0707, kept for comparison."""
    unit_norm: bool = True
    """Decoder directions have norm 1 after every step (appendix A)."""
    project: bool = True
    """The gradient's part along each decoder direction is taken out before the step (appendix A)."""
    pre_bias: Literal["median", "mean", "zero", "raw_median"] = "median"
    """Start of the pre-bias: geometric median of a sample (appendix A), its mean, 0, or the median of the activations
    before normalisation (the journal's mistake of entry 0708)."""
    mse_constant: bool = True
    """The squared error is divided by that of predicting the mean, computed once; otherwise by d_model."""
    loss_space: Literal["normalized", "raw"] = "normalized"
    """Where the error is measured: after normalisation (section 2.1), or in raw units (the journal)."""
    multi_topk: bool = False
    """Adds 1/8 of the loss at 4k, so that the code also works at other k than k (section 5.3, a variant)."""
    k_aux: Annotated[int, Field(ge=0)] = 64
    """Dead latents that reconstruct the error at each token: a power of two near d_model / 2; 0 switches AuxK off."""
    aux_coefficient: Annotated[float, Field(ge=0)] = 1 / 32
    """Weight of the AuxK loss (appendix A.2)."""
    dead_after: PositiveInt = 10_000_000
    """Tokens without firing after which a latent is dead (appendix A.2)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the factors of the encoder's product (`topk` only), whose sums are float32; bfloat16 is for GPUs, where it is
    much faster, and slow on a CPU."""

    @model_validator(mode="after")
    def _fits(self):
        if self.architecture in {"topk", "batchtopk"} and self.k > self.n_latents:
            raise ValueError(f"k = {self.k} is more than n_latents = {self.n_latents}")
        if self.batch > self.tokens:
            raise ValueError(f"batch = {self.batch} is more than tokens = {self.tokens}")
        return self

    @property
    def rate(self) -> float:
        """The learning rate that applies."""
        return self.lr if self.lr is not None else self.lr_anchor * (2**14 / self.n_latents) ** 0.5

    @property
    def steps(self) -> int:
        return self.tokens // self.batch


class Activations(Section):
    """Which activations the SAEs see, and how they are mixed."""

    positions: tuple[int, int | None] = (0, None)
    """First and one-past-last position kept, as in Python slices: (1, null) leaves out position 0. The paper's: all."""
    block: PositiveInt = 4096
    """Contexts that are harvested and shuffled together; two such blocks are in memory at a time."""
    cache: bool = False
    """Keep activations on disk, in float16, instead of running the model in every epoch."""
    limit: PositiveInt | None = None
    """Tokens to keep in the cache, in whole blocks, and to read again and again; absent: all of the text."""


class Sae(Section):
    """One SAE of the profile, by the profile's recipe with some values replaced."""

    path: Path | None = None
    """Where it is kept, relative to the checkout; absent: below `_build/sae`."""
    seed: int = 0
    """Of the weights and of the order of the data."""
    checkpoint: int | None = None
    """Training step of the model it reads; absent: the final model."""
    openai: Literal["v5_32k", "v5_128k"] | None = None
    """Not trained but fetched: the SAE of this release by OpenAI, of GPT-2 small at the profile's hook."""
    recipe: dict[str, object] = {}
    """Values that replace the profile's."""


class Profile(Section):
    """One scale of the experiment."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    model: Model
    text: Annotated[Docstrings | Local | HuggingFace, Field(discriminator="source")]
    hook: str
    """TransformerLens name of the activation the SAEs read."""
    context_length: Annotated[int, Field(ge=2)] = 64
    """Tokens in a context of the SAE chapters."""
    induction_context: Annotated[int, Field(ge=2)] = 128
    """Tokens in a context of chapter 01."""
    prepend_bos: bool = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    pretrain: Pretrain | None = None
    activations: Activations = Activations()
    """What the SAEs are trained on."""
    recipe: Recipe = Recipe()
    """What they share; each may say otherwise."""
    saes: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")], Sae] = {}
    """The SAEs of this profile by name."""

    def recipe_of(self, sae: str) -> Recipe:
        """The recipe of one of `saes`. Raises UserError: no such SAE."""
        if sae not in self.saes:
            has = ", ".join(self.saes) or "none: add a saes section"
            raise UserError(f"profile {self.name!r} has no SAE {sae!r}; it has {has}")
        return override(self, {f"recipe.{key}": value for key, value in self.saes[sae].recipe.items()}).recipe


def available() -> list[str]:
    """Names of the profiles that ship with the book."""
    return sorted(path.stem for path in (ROOT / "profiles").glob("*.yml"))


def load_profile(name: str | Path) -> Profile:
    """Read a shipped profile by name, or one's own by the path of a `.yml` file.

    A file with `extends: NAME` takes from that profile whatever it does not say itself.

    Raises:
        UserError: no such profile, not YAML, or a key or value that is not allowed.
    """
    path, values = _read(name)
    return _validated(values, path.name)


def _read(name: str | Path) -> tuple[Path, dict]:
    """A profile's file, and what it says together with the profile it extends."""
    path = Path(name)
    if path.suffix not in {".yml", ".yaml"}:
        path = ROOT / "profiles" / f"{name}.yml"
        if not path.is_file():
            known = ", ".join(available())
            raise UserError(f"no profile {str(name)!r}: choose one of {known}, or give the path of a .yml file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        shown = " ".join(str(error).split())
        raise UserError(f"cannot read profile {path.name}: it is absent, or not valid YAML ({shown})") from error
    if not isinstance(values, dict):
        raise UserError(f"profile {path.name} must be a mapping of keys to values; see profiles/docstring-gpt.yml")
    base = values.pop("extends", None)
    if base == path.stem:
        raise UserError(f"profile {path.name} extends itself: name another profile, or drop extends")
    return path, _merged(_read(base)[1], values) if base else values


def _merged(base: dict, values: dict) -> dict:
    """`values` over `base`, section by section; a section of another source replaces the base's."""
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        same = both and value.get("source", base[key].get("source")) == base[key].get("source")
        merged[key] = _merged(base[key], value) if same else value
    return merged


def override(profile: Profile, values: dict[str, object]) -> Profile:
    """The profile with values replaced by dotted key (`pretrain.steps`). Raises UserError: see `load_profile`."""
    tree = profile.model_dump()
    for key, value in values.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = _merged(tree, value)
    return _validated(tree, profile.name)


def _validated(values: dict, origin: str) -> Profile:
    try:
        return Profile(**values)
    except ValidationError as error:
        raise UserError(f"profile {origin}: " + "; ".join(_explain(problem) for problem in error.errors())) from error


def _explain(problem: dict) -> str:
    """One pydantic error in words: the key, what is wrong, what is allowed."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}; allowed here: {', '.join(_allowed(problem['loc'][:-1]))}"
    given = "" if problem["type"] == "missing" else f" (given: {problem['input']!r})"
    return f"key {key!r}: {problem['msg']}{given}"


def _allowed(location: tuple) -> list[str]:
    """Keys allowed at a place in the profile, given as pydantic does: `("text", "docstrings", "packages", "torch")`."""
    sections = {
        "model": Model, "docstrings": Docstrings, "packages": Package, "local": Local, "huggingface": HuggingFace,
        "pretrain": Pretrain, "recipe": Recipe, "activations": Activations, "saes": Sae,
    }  # fmt: skip
    section = Profile
    for part in location:
        section = sections.get(part, section)
    return sorted(section.model_fields)


# --- files ------------------------------------------------------------------------------------------------------------


def is_local(name: str) -> bool:
    """A model or data set is local if its parent folder exists, or if it could not be a hub name."""
    path = Path(name)
    parent = len(path.parts) > 1 and (ROOT / path).parent.is_dir()
    return path.is_absolute() or parent or (ROOT / path).is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)


def text_fingerprint(profile: Profile) -> str:
    """Start of a SHA-256 that changes with the text: of local files the content, of other sources what pins them."""
    if isinstance(profile.text, Local):
        return content_hash(ROOT / profile.text.path)
    pinned = profile.text.model_dump_json()
    if isinstance(profile.text, HuggingFace) and Path(profile.text.name).is_dir():
        pinned += content_hash(Path(profile.text.name))
    return hashlib.sha256(pinned.encode()).hexdigest()[:16]


def content_hash(path: Path) -> str:
    """Start of a SHA-256 over a file, or over the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def write(files: dict[Path, bytes]) -> None:
    """Write all files of one folder under temporary names, then rename them.

    Raises:
        UserError: the place cannot be written. Nothing half-written is left.
    """
    partial = {file: file.with_name(f".{file.name}.{os.getpid()}.partial") for file in files}
    last = list(files)[-1]
    try:
        last.parent.mkdir(parents=True, exist_ok=True)
        try:
            for file, content in files.items():
                partial[file].write_bytes(content)
            for file in files:
                partial[file].replace(file)
        finally:
            for file in files:
                partial[file].unlink(missing_ok=True)
    except OSError as error:
        shown = f"{last.parent.name}/{last.name}"
        raise UserError(f"cannot write {shown} ({error.strerror}): choose another place") from error
