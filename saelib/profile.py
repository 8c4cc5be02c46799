"""A profile: everything that differs between scales, and nothing else.

A profile is one YAML file. `Profile` is its validated, frozen form: an unknown key or value stops the run
in one line that names the file, the key and what is allowed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from saelib import UserError

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: profiles, shipped models and results are found relative to it."""

BUILD = ROOT / "_build"
"""Everything a run writes goes below this folder; git ignores it."""


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
    """Whether the standard library feeds training. It differs between Python minors, so it is never evaluated on."""


class Local(Section):
    """A text file, or a folder of `.txt` and `.md` files."""

    source: Literal["local"]
    path: Path


class HuggingFace(Section):
    """A data set by hub name or local folder, streamed."""

    source: Literal["huggingface"]
    name: str
    config: str | None = None
    revision: str | None = None
    column: Literal["text", "input_ids"] = "text"
    """`input_ids` means already tokenised with the model's own tokenizer."""
    hub_split: str = "train"
    evaluation_documents: Annotated[int, Field(gt=0)] = 10_000
    """The first so many documents are validation, the next so many test, the rest training."""


class Model(Section):
    """The model under study."""

    name: str
    """Hub name, or a local folder in Hugging Face layout, relative to the checkout."""
    revision: str | None = None
    second_seed: str | None = None
    """The same recipe from another seed, for transplants and stability."""
    checkpoints: str | None = None
    """Folder of `step-NNNNNN` models, or a hub name whose revisions are training steps."""
    training_batch: Annotated[int, Field(gt=0)] | None = None
    """Sequences in one pre-training batch, so that steps can be read as tokens."""
    training_context: Annotated[int, Field(gt=0)] | None = None
    """Tokens in one pre-training sequence."""


class Pretrain(Section):
    """How `saelib pretrain` makes the model (only for models we train ourselves)."""

    n_layer: int = 4
    n_head: int = 4
    d_model: int = 128
    vocab_size: int = 4096
    context_length: int = 128
    """Tokens."""
    batch: int = 16
    """Contexts in one step."""
    steps: int
    lr: float = 2e-3
    """Constant after a linear warm-up of `warmup` steps."""
    warmup: int = 200
    beta2: float = 0.99
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.999
    """Decay of the weight average per step, bias-corrected; every checkpoint is this average."""
    repeat_share: Annotated[float, Field(ge=0, le=0.1)] = 0.0
    """Share of training contexts that repeat their own first 16 to 64 tokens until they are full."""
    checkpoints: tuple[int, ...]
    """Steps at which the averaged model is written; the last one is the final model."""

    @model_validator(mode="after")
    def _schedule(self):
        if list(self.checkpoints) != sorted(set(self.checkpoints)) or self.checkpoints[-1] != self.steps:
            raise ValueError("checkpoints must rise and end at steps")
        return self


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


def available() -> list[str]:
    """Names of the profiles that ship with the book."""
    return sorted(path.stem for path in (ROOT / "profiles").glob("*.yml"))


def load_profile(name: str | Path) -> Profile:
    """Read a shipped profile by name, or one's own by the path of a `.yml` file.

    Raises:
        UserError: no such profile, not YAML, or a key or value that is not allowed.
    """
    path = Path(name)
    if path.suffix not in {".yml", ".yaml"}:
        path = ROOT / "profiles" / f"{name}.yml"
        if not path.is_file():
            raise UserError(
                f"no profile {str(name)!r}: choose one of {', '.join(available())}, or give the path of a .yml file"
            )
    elif not path.is_file() and (ROOT / path).is_file():
        path = ROOT / path
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read profile {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"profile {path.name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"profile {path.name} must be a mapping of keys to values; see profiles/docstring-gpt.yml")
    return _validated(values, path.name)


def override(profile: Profile, values: dict[str, object]) -> Profile:
    """The profile with some values replaced, each named by its dotted key (`pretrain.steps`), and validated again.

    Raises:
        UserError: a key that does not exist, or a value that is not allowed there.
    """
    tree = profile.model_dump()
    for key, value in values.items():
        *sections, leaf = key.split(".")
        section = tree
        for part in sections:
            section[part] = section.get(part) or {}
            section = section[part]
            if not isinstance(section, dict):
                raise UserError(f"profile {profile.name}: {part!r} in {key!r} is a value, not a section")
        section[leaf] = value
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
    """Keys allowed at a place in the profile, found by walking the sections' annotations."""
    sections = {
        "model": Model,
        "docstrings": Docstrings,
        "local": Local,
        "huggingface": HuggingFace,
        "pretrain": Pretrain,
    }
    named = [sections[part] for part in location if part in sections]
    section = Package if "packages" in location else named[-1] if named else Profile
    return sorted(section.model_fields)
