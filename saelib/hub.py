"""Get what a profile needs from the network, once and checked, so that afterwards it runs without one.

Models, training checkpoints and text come through `huggingface_hub` into its cache, OpenAI's autoencoders over https
or, if that fails, from their converted copies on the hub; they are left in our format where `train.where` looks.

    HF_ENDPOINT, SAELIB_OPENAI_URL, HTTPS_PROXY    mirrors of the hub and of OpenAI's store, a proxy
    HF_HOME                                        where the hub's cache is, and our record of what was fetched
    HF_HUB_OFFLINE=1                               afterwards: nothing is asked of the network
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from saelib import UserError
from saelib.profile import HuggingFace, Profile, is_local
from saelib.remote import Changed, File, Unreachable, head, into_cache, line, listing, note, record, retried, whole

OPENAI = "https://openaipublic.blob.core.windows.net/sparse-autoencoder"
GPT2 = "openai-community/gpt2"
"""The model that OpenAI's SAEs are of, whatever the profile's is."""
PLACES = {  # TransformerLens's name of an activation: OpenAI's, and that of the converted copies on the hub
    "hook_resid_post": ("resid_post_mlp", "resid-post"), "hook_resid_mid": ("resid_post_attn", "resid-mid"),
    "hook_mlp_out": ("resid_delta_mlp", "mlp-out"), "hook_attn_out": ("resid_delta_attn", "attn-out"),
}  # fmt: skip
SEEN = 24
"""Checkpoints that the chapters look at in any case (`n_checkpoints` of chapter 01); which others, a search decides."""
READ = 100_000_000
"""Training tokens that chapters read without training an SAE, at most."""


class Item(NamedTuple):
    """One thing that a profile needs: a revision of a model, a part of a data set, an SAE."""

    kind: str
    """`model`, `text`, `saes` or `checkpoints`."""
    name: str
    source: str
    """Hub name and revision, or address."""
    bytes: int | None
    """None where no server could be asked and nothing is recorded."""
    where: Path
    """The folder that it ends in."""
    there: bool
    revision: str | None = None
    files: tuple[File, ...] = ()
    """Empty: to be listed when it is fetched."""

    @property
    def repo_type(self) -> str:
        return "dataset" if self.kind == "text" else "model"

    def cached(self, file: File) -> str | None:
        found = try_to_load_from_cache(self.name, file.path, revision=self.revision, repo_type=self.repo_type)
        return found if isinstance(found, str) else None

    @property
    def left(self) -> int | None:
        """Bytes that are still to come; None where that is not known."""
        if self.there or not self.files:
            return 0 if self.there else self.bytes
        return sum(file.bytes for file in self.files if not self.cached(file))

    def folder(self) -> str:
        return self.cached(self.files[0])[: -len(self.files[0].path) - 1]


# --- what is needed ---------------------------------------------------------------------------------------------------


def needs(profile: Profile, only: str | None = None) -> list[Item]:
    """What a profile needs from the network, there or not. Sizes are the servers', or without one those of the record.

    Of training checkpoints those that the chapters look at in any case; with `only="checkpoints"` all of them.

    Raises:
        UserError: a name, revision or hook that does not exist, or a server that does not answer as it should.
    """
    found, text, steps = [], profile.text, profile.model.checkpoints
    if only in {None, "model"}:
        named = [(profile.model.name, profile.model.revision), (profile.model.second_seed, None)]
        found += [_repository("model", *pair) for pair in named if pair[0] and not is_local(pair[0])]
    if only in {None, "model"} and profile.model.revision and found:  # TransformerLens asks main for the tokenizer
        found.append(_item("model", profile.model.name, None, lambda: _words(listing(profile.model.name, None))))
    if only in {None, "text"} and isinstance(text, HuggingFace) and not is_local(text.name):
        found.append(_item("text", text, text.revision, lambda: _share(profile, _text(text))))
    if only in {None, "saes"}:
        found += [_released(profile, name) for name, sae in profile.saes.items() if sae.openai]
    if only in {None, "checkpoints"} and steps and not is_local(steps):
        found += _checkpoints(profile, every=only is not None)
    return found


def _repository(kind: str, name: str, revision: str | None) -> Item:
    return _item(kind, name, revision, lambda: _weights_and_words(listing(name, revision)))


def _item(
    kind: str, what: str | HuggingFace, revision: str | None, listed: Callable[[], Iterable[File]] | None
) -> Item:
    """An item of the hub, by what it lists now or, if it cannot be asked, by what the record says."""
    name, suffix = (what.name, f" {what.config} {what.hub_split}") if kind == "text" else (what, "")
    source = f"{name}@{revision or 'main'}{suffix}"
    recorded = tuple(File(*one) for one in record().get(source, ()))
    try:
        files = tuple(listed()) if listed else recorded
    except Unreachable:
        files = recorded
    item = Item(kind, name, source, sum(f.bytes for f in files) if files else None, Path(), False, revision, files)
    place = Path(constants.HF_HUB_CACHE, f"{item.repo_type}s--{name.replace('/', '--')}")
    there = bool(files) and set(files) <= set(recorded) and all(item.cached(file) for file in files)
    return item._replace(where=place, there=there)


def _weights_and_words(files: list[File]) -> list[File]:
    """Configuration, tokenizer and weights, as safetensors where there are such."""
    safe = any(re.fullmatch(r"model.*\.safetensors", file.path) for file in files)
    weights = r"model.*\.safetensors" if safe else r"pytorch_model.*\.bin"
    return [*_words(files), *(file for file in files if re.fullmatch(weights, file.path))]


def _words(files: list[File]) -> list[File]:
    return [file for file in files if re.fullmatch(r"[\w.-]+\.(json|txt|model|jinja)", file.path)]


def _text(text: HuggingFace) -> list[File]:
    """The card of a data set, which says what its files are, and those of the split as `datasets` orders them."""
    import datasets

    listed = {file.path: file for file in listing(text.name, text.revision, "dataset")}
    try:
        builder = datasets.load_dataset_builder(text.name, text.config, revision=text.revision)
        paths = [path.partition("@")[2].partition("/")[2] for path in builder.config.data_files[text.hub_split]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot open data set {text.name!r}: {line(error)}; check name and revision") from error
    return [listed[path] for path in ["README.md", *paths] if path in listed]


def _share(profile: Profile, files: list[File]) -> list[File]:
    """The first files, as many as hold the evaluation documents and the tokens of the longest run, and 2 % more."""
    text, limit = profile.text, profile.activations.limit
    if not (text.documents and text.tokens):
        return files
    longest = max([profile.recipe_of(name).tokens for name, sae in profile.saes.items() if not sae.openai], default=0)
    tokens = max(READ, min(longest, limit or longest))
    share = 1.02 * (2 * text.evaluation_documents / text.documents + tokens / text.tokens)
    return files[: 1 + math.ceil(share * (len(files) - 1))]


def copy_of(text: HuggingFace) -> str | None:
    """The folder with what `fetch` got of a data set, in its layout; None where it got nothing, but the hub is there.

    Raises:
        UserError: neither.
    """
    if is_local(text.name):
        return None
    item = _item("text", text, text.revision, None)
    if not item.there:
        listing(text.name, text.revision, "dataset")  # says at once what `datasets` would say in a minute
    return item.folder() if item.there else None


def _released(profile: Profile, name: str) -> Item:
    from saelib.train import there, where

    url, *_ = _release(profile, name)
    try:
        size = head(url)[0]
    except UserError:  # there is a second source
        size = record().get(url, [[url, None]])[0][1]
    return Item("saes", name, url, size, where(profile, name), there(profile, name))


def _release(profile: Profile, name: str) -> tuple[str, str, str]:
    """Of OpenAI's SAE at the profile's hook: address, repository of the copy, what its files are called."""
    size, hook = profile.saes[name].openai, re.fullmatch(r"blocks\.(\d+)\.(\w+)", profile.hook)
    if hook is None or hook[2] not in PLACES:
        raise UserError(f"OpenAI released no SAE at {profile.hook}: choose blocks.N. and one of {', '.join(PLACES)}")
    place, short = PLACES[hook[2]]
    url = f"{os.environ.get('SAELIB_OPENAI_URL', OPENAI)}/gpt2-small/{place}_{size}/autoencoders/{hook[1]}.pt"
    files = rf"{size}_layer_{hook[1]}(\.pt)?/(cfg\.json|sae_weights\.safetensors)"  # folders of both names exist
    return url, f"jbloom/GPT2-Small-OAI-{size.replace('_', '-')}-{short}-SAEs", files


def _checkpoints(profile: Profile, every: bool) -> list[Item]:
    from saelib.induction import thinned
    from saelib.models import checkpoints

    found = checkpoints(profile) if every else thinned(checkpoints(profile), SEEN)
    first = _repository("checkpoints", found[0].name, found[0].revision)
    others = [_item("checkpoints", one.name, one.revision, None) for one in found[1:]]
    return [first, *(one if one.files else one._replace(bytes=first.bytes) for one in others)]  # all are of one size


def table(items: list[Item]) -> str:
    """A line for each model, text and SAE, one for all checkpoints, and the sums."""
    groups: dict[tuple[str, str, Path], list[Item]] = {}
    for item in items:
        groups.setdefault((item.kind, item.name, item.where), []).append(item)
    lines = [f"{kind:<12}{name:<40}{_sizes(group):<40}{where}" for (kind, name, where), group in groups.items()]
    asked = [] if all(item.bytes is not None for item in items) else ["unknown: no server could be asked"]
    return "\n".join([*lines, f"{'in all':<52}{_sizes(items)}", *asked])


def _sizes(items: list[Item]) -> str:
    left = [item.left for item in items]
    here = sum(item.bytes - item.left for item in items if item.bytes and item.left is not None)
    missing = "    unknown" if None in left else f"{sum(left) / 1e6:>8,.1f} MB"
    return f"{here / 1e6:>8,.1f} MB here {missing} to fetch"


# --- getting it -------------------------------------------------------------------------------------------------------


def fetch(profile: Profile, items: list[Item]) -> None:
    """Download those of a profile's `needs` that are not there.

    Raises:
        UserError: too little space, or something could not be had. What was got stays, and the next call goes on.
    """
    missing = [item for item in items if not item.there]
    check_space(to_come(missing))
    disable_progress_bars()
    with tqdm(total=sum(item.left or 0 for item in missing), unit="B", unit_scale=True) as bar:
        for item in missing:
            bar.set_description(item.name)
            _sae(profile, item, bar) if item.kind == "saes" else _download(item, bar)


def to_come(items: list[Item]) -> list[tuple[Path, float]]:
    """Folders, and bytes that `fetch` will write there. A converted SAE lies for a moment beside what it comes from."""
    return [(item.where, (item.left or 0) * (2 if item.kind == "saes" else 1)) for item in items]


def check_space(wanted: Iterable[tuple[Path, float]]) -> None:
    """Raises UserError: a disk has not enough room for all that is to come to its folders."""
    sums: dict[int, tuple[Path, float]] = {}
    for place, size in wanted:
        place = next(folder for folder in (place, *place.parents) if folder.is_dir())
        disk = place.stat().st_dev
        sums[disk] = place, sums.get(disk, (place, 0.0))[1] + size
    for place, size in sums.values():
        if size > 0.95 * (free := shutil.disk_usage(place).free):
            cure = (
                "make room, or set HF_HOME (models, text) or SAELIB_BUILD (what is made here) to a larger disk, or say"
            )
            cure += " text.documents and text.tokens in the profile, so that only the share that is read is fetched"
            raise UserError(f"{size / 1e9:.1f} GB are to come to the disk of {place}, {free / 1e9:.1f} GB free: {cure}")


def _download(item: Item, bar: tqdm) -> str:
    """All files of a hub item, into the hub's cache; returns their folder."""
    item = item._replace(files=item.files or tuple(_weights_and_words(listing(item.name, item.revision))))
    for file in item.files:
        retried(
            f"{item.name}/{file.path}",
            lambda file=file: into_cache(item.name, file, item.revision, item.repo_type, bar),
        )
    note(item.source, item.files)
    return item.folder()


def _sae(profile: Profile, item: Item, bar: tqdm) -> None:
    """An SAE of OpenAI's, from them or from the copy on the hub, into our folder."""
    from saelib import formats

    try:
        file, source = _openai(item, bar), item.source
    except Changed:
        raise
    except UserError as error:
        _, source, wanted = _release(profile, item.name)
        bar.write(f"{error}; taking the copy from {source}", file=sys.stderr)
        try:
            file = _copied(source, wanted, bar)
        except UserError as second:
            raise UserError(f"{error}; nor from the copy on the hub: {second}") from second
    sae = formats.load(file)
    sae.facts |= {"model": GPT2, "hook": profile.hook, "context_length": 64, "prepend_bos": False}
    sae.facts |= {"name": item.name, "source": source}
    formats.save(sae, item.where)
    if file.is_file():
        file.unlink()


def _openai(item: Item, bar: tqdm) -> Path:
    """OpenAI's file under a temporary name that changes with its ETag, so that it can be gone on with."""
    size, etag = head(item.source)
    key = hashlib.sha256(f"{item.source} {etag}".encode()).hexdigest()[:12]
    file = item.where.with_name(f".{item.name}.{key}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    for other in set(file.parent.glob(f".{item.name}.*.partial")) - {file}:
        other.unlink()  # of a file that is no longer served
    retried(item.source, lambda: whole(item.source, file, size, bar))
    return file


def _copied(repository: str, wanted: str, bar: tqdm) -> Path:
    """Folder of a converted copy on the hub."""
    files = tuple(file for file in listing(repository, None) if re.fullmatch(wanted, file.path))
    if len(files) != 2:
        raise UserError(f"{repository} has no {wanted.partition('(')[0]}")
    copy = Item("saes", repository, f"{repository} {files[0].path}", None, Path(), False, None, files)
    return Path(_download(copy, bar), files[0].path).parent
