"""A hub of our own on loopback: what chapters, `saelib fetch` and its tests download from instead of the real servers.

    with local_hub(folder) as hub:                        # HF_ENDPOINT, HF_HOME and the rest point to it
        subprocess.run([sys.executable, "-m", "saelib.cli", "fetch", "--profile", "gpt2-small"])

It speaks the hub's API (repository, tree and paths endpoints, `resolve` with ETag, X-Repo-Commit and Range, large files
by a redirect, as the real one has it) and a plain store of `.pt` files, so that the real client libraries do all of
what they do. The models have random weights, the text is made of shuffled lines of the standard library's docstrings.
`huggingface_hub` reads the environment when it is imported: use a process of your own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import sysconfig
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pandas as pd
import torch
from safetensors.torch import load_file
from transformer_lens.tools.model_registry.checkpoints import get_checkpoint_labels
from transformers import GPT2Config, GPT2LMHeadModel

from saelib import formats, text
from saelib.profile import ROOT
from saelib.sae import SAE

GPT2, STANFORD, TEXT = "openai-community/gpt2", "stanford-crfm/alias-gpt2-small-x21", "Skylion007/openwebtext"
LARGE = 100_000
"""Bytes from which a file lies in the large-file store, as weights do on the hub."""


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path matches.

    Kinds: `cut` (the connection closes after a random number of bytes), `stall` (as `cut`, but it stays open and
    silent), `short` and `corrupt` (half of the bytes, or one changed, as if that were the file), or a status: 404,
    429 (with Retry-After), 500.
    """

    kind: str | int
    path: str
    times: int = 1
    method: str = "GET"
    seen: int = 0


@dataclass
class Hub:
    """The files that are served, and a record of what was asked."""

    folder: Path
    repos: dict[tuple[str, str], dict[str, dict[str, Path]]] = field(default_factory=dict)
    """(`models` or `datasets`, name): revision: path in the repository: file."""
    blobs: dict[str, Path] = field(default_factory=dict)
    """`.pt` files of the plain store by the end of their address."""
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Range of every request."""
    url: str = ""
    patience: float = 30.0
    """Seconds that a stalled connection stays open."""
    environment: dict[str, str] = field(default_factory=dict)

    def fault(self, method: str, path: str) -> str | int | None:
        for fault in self.faults:
            if fault.seen < fault.times and fault.method == method and re.search(fault.path, path):
                fault.seen += 1
                return fault.kind
        return None

    def tree(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, Path]] | None:
        """Commit and files of a revision. A commit that is not known is taken for one of main: profiles pin them."""
        revisions = self.repos[kind, name]
        commits = {hashlib.sha1(f"{kind}/{name}/{known}".encode()).hexdigest(): known for known in revisions}
        for commit, known in commits.items():
            if revision in {commit, known}:
                return commit, revisions[known]
        return (revision, revisions["main"]) if re.fullmatch("[0-9a-f]{40}", revision) else None


@functools.cache
def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def etag(file: Path) -> str:
    """What the hub names a file by: a large one by its SHA-256, a small one as git does."""
    content = file.read_bytes()
    return sha(file) if len(content) >= LARGE else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, file: Path) -> dict:
    """A file as the tree endpoint describes it."""
    found = {"type": "file", "path": path, "size": file.stat().st_size, "oid": etag(file)[:40]}
    lfs = {"oid": sha(file), "size": found["size"], "pointerSize": 134}
    return found | ({"lfs": lfs} if found["size"] >= LARGE else {})


def sibling(path: str, file: Path) -> dict:
    """A file as the repository endpoint describes it."""
    found = entry(path, file)
    said = {"rfilename": path, "size": found["size"], "blobId": found["oid"]}
    return said | ({"lfs": found["lfs"] | {"sha256": found["lfs"]["oid"]}} if "lfs" in found else {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())

    def answer(self, body: str = "") -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, self.headers.get("Range", "")))
        fault = self.hub.fault(self.command, path)
        if isinstance(fault, int):
            self.reply(fault, b"", {"Retry-After": "7"} if fault == 429 else {})
        elif path.startswith("/pt/") and path[4:] in self.hub.blobs:
            self.file(self.hub.blobs[path[4:]], {}, fault)
        elif path.startswith("/lfs/"):
            self.file(self.hub.folder / path[5:], {}, fault)
        elif found := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)/?(.*))?", path
        ):
            self.api(*found.groups(default=""), body)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(refs/convert/[^/]+|[^/]+)/(.+)", path):
            self.resolve(found[1].rstrip("s/") + "s" if found[1] else "models", *found.groups()[1:], fault)
        else:
            self.reply(404, b"")

    def reply(self, status: int, body: bytes | dict | list, headers: dict[str, str] | None = None) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": len(body)} | (headers or {})
        ).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what: str) -> None:
        self.reply(404, {"error": f"{what} not found"}, {"X-Error-Code": f"{what}NotFound"})

    def api(self, kind: str, name: str, what: str, rest: str, body: str) -> None:
        if (kind, name) not in self.hub.repos:
            return self.missing("Repo")
        revision, _, below = ("main", "", "") if what in ("", "refs") else rest.partition("/")
        if rest.startswith("refs/convert/"):
            revision, _, below = rest.removeprefix("refs/convert/").partition("/")
            revision = f"refs/convert/{revision}"
        found = self.hub.tree(kind, name, revision)
        if found is None:
            return self.missing("Revision")
        commit, files = found
        if what == "refs":
            named = [
                {"name": r, "ref": f"refs/heads/{r}", "targetCommit": self.hub.tree(kind, name, r)[0]}
                for r in self.hub.repos[kind, name]
            ]
            return self.reply(200, {"branches": named, "converts": [], "tags": []})
        if what == "tree":
            return self.tree(files, below)
        if what == "paths-info":
            asked = parse_qs(body).get("paths", [])
            return self.reply(200, [entry(p, files[p]) for p in asked if p in files])
        siblings = [
            sibling(*pair) if "blobs=true" in self.path.lower() else {"rfilename": pair[0]} for pair in files.items()
        ]
        return self.reply(200, {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False,
                                "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []})  # fmt: skip

    def tree(self, files: dict[str, Path], below: str) -> None:
        start = f"{below}/" if below else ""
        inside = {path: file for path, file in files.items() if path.startswith(start)}
        if below and not inside:
            return self.missing("Entry")
        if "recursive=true" in self.path.lower():
            return self.reply(200, [entry(*pair) for pair in inside.items()])
        here = [entry(path, file) for path, file in inside.items() if "/" not in path[len(start) :]]
        folders = dict.fromkeys(start + p[len(start) :].split("/")[0] for p in inside if "/" in p[len(start) :])
        return self.reply(200, here + [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders])

    def resolve(self, kind: str, name: str, revision: str, path: str, fault: str | None) -> None:
        if (kind, name) not in self.hub.repos:
            return self.missing("Repo")
        found = self.hub.tree(kind, name, revision)
        if found is None:
            return self.missing("Revision")
        commit, files = found
        if path not in files:
            return self.missing("Entry")
        file, headers = files[path], {"X-Repo-Commit": commit}
        if file.stat().st_size < LARGE:
            return self.file(file, headers, fault)
        linked = {"X-Linked-Size": file.stat().st_size, "X-Linked-Etag": f'"{sha(file)}"'}
        store = self.hub.url.replace("127.0.0.1", "localhost")  # another host, or clients would follow it at once
        place = f"{store}/lfs/{file.relative_to(self.hub.folder).as_posix()}"
        return self.reply(302, b"", headers | linked | {"Location": place})

    def file(self, file: Path, headers: dict[str, str], fault: str | None) -> None:
        """The file, or the part that Range asks for; one of the faults that need bytes may come between."""
        whole = file.read_bytes()
        if fault == "short":
            whole = whole[: len(whole) // 2]
        if fault == "corrupt":
            middle = len(whole) // 2
            whole = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        part = whole[first : int(asked[2]) + 1 if asked and asked[2] else None]
        headers = {"ETag": f'"{etag(file)}"', "Accept-Ranges": "bytes"} | headers
        if asked:
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(whole)}"
        if fault not in {"cut", "stall"}:
            return self.reply(206 if asked else 200, part, headers | {"Content-Type": "application/octet-stream"})
        self.send_response(206 if asked else 200)
        for name, value in (headers | {"Content-Length": len(part)}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(part[: random.Random(len(self.hub.log)).randrange(1, len(part))])
        self.wfile.flush()
        if fault == "stall":
            threading.Event().wait(self.hub.patience)
        self.close_connection = True
        return None


# --- what is served ---------------------------------------------------------------------------------------------------


def lines(n: int, seed: int = 0) -> list[str]:
    """Documents of shuffled lines of the standard library's docstrings: English of a kind, and always there."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))[:80]
    said = [d.text for file in files for d in text._docstrings("python", file.name, file)]
    pool = [line.strip() for one in said for line in one.splitlines() if len(line.strip()) > 20]
    chance = random.Random(seed)
    return ["\n".join(chance.choices(pool, k=chance.randint(2, 6))) for _ in range(n)]


def gpt2(folder: Path, seed: int, sizes: dict, *, old: bool = False) -> dict[str, Path]:
    """A GPT-2 of random weights with the tokenizer of the shipped model, under the file names of the real repository.

    `old`: as the Stanford repositories, without safetensors and without `tokenizer.json`.
    """
    torch.manual_seed(seed)
    config = GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    shipped = ROOT / "models" / "docstring-gpt"
    known = json.loads((shipped / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(known["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in known["merges"])])
    (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    shutil.copy(shipped / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))
    for unwanted in ("tf_model.h5", "onnx/decoder_model.onnx", "README.md"):
        (folder / unwanted).parent.mkdir(exist_ok=True)
        (folder / unwanted).write_bytes(b"not needed\n" * 20_000)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: file for name, file in files.items() if not old or name not in {"model.safetensors", "tokenizer.json"}
    }


def shards(folder: Path, documents: int, n: int) -> dict[str, Path]:
    """The parquet files of the data set's main branch, and its card."""
    folder.mkdir(parents=True)
    found = lines(documents)
    files = {}
    for i in range(n):
        name = f"train-{i:05d}-of-{n:05d}.parquet"
        pd.DataFrame({"text": found[i * len(found) // n : (i + 1) * len(found) // n]}).to_parquet(folder / name)
        files[f"plain_text/{name}"] = folder / name
    card = {
        "config_name": "plain_text",
        "data_files": [{"split": "train", "path": "plain_text/train-*"}],
        "default": True,
    }
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps([card])}\n---\n")
    return files | {"README.md": folder / "README.md"}


def autoencoders(hub: Hub, d_model: int, latents: dict[str, int], layers: int) -> None:
    """OpenAI's files of every location and layer, and the converted copies on the hub, from one file of each size."""
    places = {"resid_post_mlp": "resid-post", "resid_post_attn": "resid-mid", "resid_delta_mlp": "mlp-out",
              "resid_delta_attn": "attn-out"}  # fmt: skip
    for size, n in latents.items():
        sae = SAE(n, d_model, min(32, n), latent_bias=True, normalize="layer_norm")
        formats.export(sae, hub.folder / f"{size}.pt", "openai")
        copy = hub.folder / size
        formats.export(sae, copy, "saelens")
        said = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": sae.k},
                "d_in": d_model, "d_sae": n, "dtype": "torch.float32", "normalize_activations": "layer_norm",
                "apply_b_dec_to_input": True, "model_name": "gpt2-small", "prepend_bos": False, "context_size": 64,
                "hook_name": "blocks.8.hook_resid_post", "hook_layer": 8,}  # fmt: skip
        (copy / "cfg.json").write_text(json.dumps(said))
        for (location, short), layer in itertools.product(places.items(), range(layers)):
            hub.blobs[f"gpt2-small/{location}_v5_{size}/autoencoders/{layer}.pt"] = hub.folder / f"{size}.pt"
            suffix = ".pt" if (size, short) == ("32k", "resid-post") else ""
            repo = hub.repos.setdefault(("models", f"jbloom/GPT2-Small-OAI-v5-{size}-{short}-SAEs"), {"main": {}})
            for file in copy.iterdir():
                repo["main"][f"v5_{size}_layer_{layer}{suffix}/{file.name}"] = file


def furnish(
    hub: Hub, *, n_embd: int = 32, n_layer: int = 12, n_head: int = 4, vocab_size: int = 4096, n_positions: int = 1024,
    documents: int = 40_000, n_shards: int = 80, latents: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """Everything that the profiles gpt2-small and stanford-gpt2-small-a name, in the sizes asked for."""
    shape = {"n_embd": n_embd, "n_layer": n_layer, "n_head": n_head}
    shape |= {"vocab_size": vocab_size, "n_positions": n_positions}
    hub.repos["models", GPT2] = {"main": gpt2(hub.folder / "gpt2", 0, shape)}
    steps, _ = get_checkpoint_labels(STANFORD)
    few = [gpt2(hub.folder / f"stanford-{i}", i + 1, shape, old=True) for i in range(3)]
    stages = {f"checkpoint-{step}": few[i * len(few) // len(steps)] for i, step in enumerate(steps)}
    hub.repos["models", STANFORD] = {"main": few[-1], **stages}
    hub.repos["datasets", TEXT] = {"main": shards(hub.folder / "text", documents, n_shards)}
    autoencoders(hub, n_embd, latents or {"32k": 512, "128k": 1024}, n_layer)


@contextlib.contextmanager
def local_hub(folder: Path, faults: Iterable[Fault] = (), **sizes) -> Iterator[Hub]:
    """The served hub; the environment of this process, and so of those it starts, points to it.

    Args:
        folder: for the files that are served (`served`), a fresh cache (`hf`), and what saelib makes (`build`).
        sizes: see `furnish`.
    """
    hub = Hub(folder / "served", faults=list(faults))
    furnish(hub, **sizes)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "SAELIB_OPENAI_URL": f"{hub.url}/pt",
        "SAELIB_BUILD": str(folder / "build"),
        "no_proxy": "127.0.0.1,localhost",
    }
    before = {name: os.environ.get(name) for name in hub.environment}
    os.environ.update(hub.environment)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
