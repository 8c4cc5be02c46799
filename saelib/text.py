"""Token batches from text: the docstring corpus, a local file or folder, or any Hugging Face data set.

`documents` yields them, `contexts` and `token_batches` turn them into `Int[Tensor, "batch context"]`.

The docstring corpus is what every installation already holds: the docstrings of pinned packages, parsed with `ast` and
never imported. Their split follows from the path of the module file. Texts that are equal once identifiers and digits
are masked count as near-copies: those of test texts are dropped from validation and training, those of validation texts
from training. So no whole docstring stands in two splits (paragraphs do: packages repeat themselves).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from saelib import UserError
from saelib.profile import BUILD, ROOT, Docstrings, HuggingFace, Local, Package, Profile

SPLITS = ("test", "validation", "train")
SHORTEST = 32
"""Docstrings of fewer characters are left out: they say little beyond the name."""


class Document(NamedTuple):
    """One text, with where it comes from."""

    text: str
    package: str
    """Import name of the package, or the name of the file or data set."""
    name: str
    """Dotted name of the object the docstring belongs to."""
    kind: str
    """`module`, `class`, `function`, or `text`."""


# --- the docstring corpus ---------------------------------------------------------------------------------------------


def split_of(relative_path: str) -> str:
    """The split of a module file: 5 % test, 5 % validation, the rest training, by a hash of its path."""
    bucket = int(hashlib.sha256(relative_path.encode()).hexdigest(), 16) % 20
    return SPLITS[min(bucket, 2)]


_MASK = re.compile(r"`[^`\n]*`|\w*[\d_]\w*|\w+(?=\()|[a-z]+[A-Z]\w*|[A-Z][a-z]+[A-Z]\w*|(?<=\w\.)\w+")


def masked(text: str) -> str:
    """The text with identifiers and digits masked and white space folded: equal for near-copies."""
    return " ".join(_MASK.sub("#", text).split())


def _check_version(package: str, pinned: Package) -> None:
    """The pinned version, or a UserError. A local tag such as `+cpu` does not count."""
    try:
        installed = importlib.metadata.version(pinned.distribution or package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    if installed != pinned.version:
        wanted = f"{pinned.distribution or package}=={pinned.version}"
        raise UserError(f"the corpus expects {wanted} but {installed} is installed: install requirements.lock")


def _source_files(config: Docstrings, split: str) -> Iterator[tuple[str, str, Path]]:
    """(package, path within the package's parent, file) for the module files of one split, in a fixed order."""
    for package, pinned in sorted(config.packages.items()):
        _check_version(package, pinned)
        folder = Path(importlib.util.find_spec(package).origin).parent  # found without importing it
        for file in sorted(folder.rglob("*.py"), key=Path.as_posix):
            relative = file.relative_to(folder.parent).as_posix()
            if split == (split_of(relative) if pinned.fingerprint else "train"):
                yield package, relative, file
    if config.standard_library and split == "train":
        folder = Path(sysconfig.get_paths()["stdlib"])
        for file in sorted(folder.rglob("*.py"), key=Path.as_posix):
            relative = file.relative_to(folder)
            if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(relative.parts):
                yield "python", relative.as_posix(), file


def _docstrings(package: str, relative: str, file: Path) -> Iterator[Document]:
    """All docstrings of one module file. Files that Python cannot parse hold none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            return
    module = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    stack = [(tree, module)]
    while stack:
        node, name = stack.pop()
        text = ast.get_docstring(node)
        if text and len(text) >= SHORTEST:
            kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
            yield Document(text, package, name, kind)
        for child in reversed(list(_definitions(node))):
            stack.append((child, f"{name}.{child.name}"))


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    """Classes and functions directly inside a node, also below `if`, `try` and `with`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _definitions(child)


def _read_split(config: Docstrings, split: str) -> list[Document]:
    """Docstrings of the files of one split, without exact copies, near-copies of other splits still in."""
    found: dict[str, Document] = {}
    for entry in tqdm(list(_source_files(config, split)), desc=f"docstrings, {split}", unit="file", leave=False):
        for document in _docstrings(*entry):
            found.setdefault(document.text, document)
    return list(found.values())


def harvest(config: Docstrings, split: str) -> list[Document]:
    """Docstrings of one split, near-copies of an earlier split (test before validation before training) left out.

    Deterministic for given package versions, cached under `_build/cache`.

    Raises:
        UserError: a package is missing, of another version, or its evaluation docstrings differ from the fingerprint.
    """
    if not _cache(config, split).is_file():
        if split == "train":
            evaluation = harvest(config, "test") + harvest(config, "validation")
            found = {"train": _without(_read_split(config, "train"), evaluation)}
        else:
            found = {"test": _read_split(config, "test")}
            found["validation"] = _without(_read_split(config, "validation"), found["test"])
            check_fingerprints(config, found["test"] + found["validation"])
        for name, kept in found.items():
            path = _cache(config, name)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            path.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(kept, columns=Document._fields).to_parquet(partial)
            partial.replace(path)
    return [Document(*row) for row in pd.read_parquet(_cache(config, split)).itertuples(index=False)]


def _without(found: list[Document], earlier: list[Document]) -> list[Document]:
    """Documents that are no near-copy of an earlier one."""
    seen = {masked(document.text) for document in earlier}
    return [document for document in found if masked(document.text) not in seen]


def check_fingerprints(config: Docstrings, evaluation: Iterable[Document]) -> None:
    """Raise a UserError where a package's test and validation docstrings do not have the profile's SHA-256 (start)."""
    digests = {package: hashlib.sha256() for package, pinned in config.packages.items() if pinned.fingerprint}
    for document in evaluation:
        digests[document.package].update(f"{document.name}\0{document.text}\0".encode())
    for package, digest in digests.items():
        found, pinned = digest.hexdigest()[:16], config.packages[package]
        if found != pinned.fingerprint:
            cure = f"reinstall {pinned.distribution or package}=={pinned.version} unmodified"
            differ = f"differ from the profile's (found {found}, not {pinned.fingerprint})"
            raise UserError(f"the docstrings of {package} {differ}: {cure}")


def _cache(config: Docstrings, split: str) -> Path:
    """Cache file of one split; its name changes with the packages, with this file, and with the Python that parses."""
    parts = (config.model_dump_json(), Path(__file__).read_text(), sysconfig.get_python_version())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    return BUILD / "cache" / f"docstrings-{split}-{key}.parquet"


# --- local text and Hugging Face data sets ----------------------------------------------------------------------------


def _local(config: Local, split: str) -> list[Document]:
    """Files of a folder, or the blank-line-separated parts of one file; split by a hash of their content."""
    path = ROOT / config.path  # an absolute path stays what it is
    if not path.exists():
        raise UserError(f"no text at {config.path}: give a text file, or a folder of .txt and .md files")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in {".txt", ".md"})
    found = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {file.name} as UTF-8 text: {error}; convert it, or leave it out") from error
        parts = re.split(r"\n\s*\n", text) if path.is_file() else [text]
        found += [Document(part, file.name, file.name, "text") for part in parts if part.strip()]
    if not found:
        raise UserError(f"no text in {config.path}: the file or folder is empty")
    return [document for document in found if split_of(document.text) == split]


def _hub_rows(config: HuggingFace, split: str, seed: int | None) -> Iterator[dict]:
    """Rows of a data set: of what `saelib fetch` got of it, which is its beginning, or from the hub."""
    import datasets

    from saelib.hub import copy_of

    local, n = copy_of(config), config.evaluation_documents
    place, revision = (local, None) if local else (config.name, config.revision)
    try:
        rows = datasets.load_dataset(place, config.config, split=config.hub_split, revision=revision, streaming=True)
        if config.column not in (rows.column_names or [config.column]):
            has = ", ".join(rows.column_names)
            raise UserError(f"data set {config.name!r} has no column {config.column!r}; it has {has}")
        rows = rows.skip(2 * n) if split == "train" else (rows if split == "validation" else rows.skip(n)).take(n)
        yield from rows if seed is None else rows.shuffle(seed=seed, buffer_size=10_000)
    except (OSError, ValueError) as error:  # unreachable, unknown name, unknown configuration or split
        problem = f"cannot open data set {config.name!r}: {' '.join(str(error).split())}"
        raise UserError(f"{problem}; `saelib fetch` gets what a profile reads of it") from error


# --- one interface ----------------------------------------------------------------------------------------------------


def documents(profile: Profile, split: str, seed: int | None = None) -> Iterator[Document]:
    """Documents of one split: in a fixed order, or shuffled by `seed` (streams: within a buffer).

    Raises:
        UserError: the source cannot be read, or holds token ids instead of text.
    """
    text = profile.text
    if isinstance(text, HuggingFace):
        if text.column != "text":
            raise UserError(f"data set {text.name!r} is read as token ids; documents need a text column")
        for row in _hub_rows(text, split, seed):
            yield Document(row["text"], text.name, text.name, "text")
        return
    found = harvest(text, split) if isinstance(text, Docstrings) else _local(text, split)
    if seed is not None:
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        found = [found[i] for i in order.tolist()]
    yield from found


def _token_stream(profile: Profile, tokenizer, split: str, seed: int | None) -> Iterator[list[int]]:
    """Token ids of one document after another, each closed by the tokenizer's end-of-text token."""
    text = profile.text
    if isinstance(text, HuggingFace) and text.column == "input_ids":
        for row in _hub_rows(text, split, seed):
            yield row["input_ids"]
        return
    stream = (document.text for document in documents(profile, split, seed))
    while chunk := list(itertools.islice(stream, 256)):
        for ids in tokenizer(chunk, add_special_tokens=False)["input_ids"]:
            yield ids + [tokenizer.eos_token_id]


def token_batches(
    profile: Profile, tokenizer, split: str, *, batch: int, context: int | None = None, seed: int | None = 0
) -> Iterator[Int[Tensor, "batch context"]]:
    """Full batches of contexts packed from the documents of one split, in one pass.

    Documents follow each other, separated by the end-of-text token, and are cut every `context` tokens (by default the
    profile's `context_length`). With `prepend_bos` each context starts with that token.
    """
    bos = [tokenizer.bos_token_id] if profile.prepend_bos else []
    body = (context or profile.context_length) - len(bos)
    buffer, rows = [], []
    for ids in _token_stream(profile, tokenizer, split, seed):
        buffer.extend(ids)
        while len(buffer) >= body:
            rows.append(bos + buffer[:body])
            del buffer[:body]
            if len(rows) == batch:
                yield torch.tensor(rows)
                rows = []


def contexts(
    profile: Profile, tokenizer, split: str, n: int, *, context: int | None = None, seed: int | None = 0
) -> Int[Tensor, "n context"]:
    """The first `n` contexts of `token_batches`. Raises UserError: the split holds fewer."""
    found = next(token_batches(profile, tokenizer, split, batch=n, context=context, seed=seed), None)
    if found is None:
        shown = f"the {split} text of profile {profile.name!r}"
        raise UserError(f"{shown} holds fewer than {n} contexts: ask for fewer, or add text")
    return found
