"""One file over the network: tried again, gone on with, checked, remembered (`saelib.hub` says which).

A file counts only when it is whole: size and checksum are compared before it is used. OpenAI states no checksum, so the
SHA-256 of the first download is kept in the record, and every later one compared with it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from email.utils import mktime_tz, parsedate_tz
from pathlib import Path
from typing import NamedTuple, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from tqdm import tqdm

from saelib import UserError
from saelib.profile import write

TRIES, LONGEST, PATIENCE = 5, 300, 5
"""Of one file; seconds that a server's Retry-After is obeyed; seconds for a server to say anything at all."""
RECORD = Path(constants.HF_HOME, "saelib.json")
"""What was fetched. Source: its files, each as `File`."""
T = TypeVar("T")


class Unreachable(UserError):
    """No server could be asked."""


class Changed(UserError):
    """Not the file that it was when it was first fetched."""


class File(NamedTuple):
    path: str
    bytes: int
    digest: str
    """SHA-256 of a large file, git's SHA-1 of a small one."""


def retried(what: str, call: Callable[[], T]) -> T:
    """The call's result; what may pass is tried again, after as long as the server asks for."""
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except (OSError, httpx2.HTTPError) as error:
            causes = _causes(error)
            response = next((one.response for one in causes if getattr(one, "response", None) is not None), None)
            if any(
                isinstance(one, OfflineModeIsEnabled | httpx2.ConnectError | httpx2.ConnectTimeout) for one in causes
            ):
                cure = "`saelib fetch` where there is a network, a proxy (HTTPS_PROXY) or a mirror (HF_ENDPOINT)"
                raise Unreachable(f"cannot reach the server of {what}: {cure}") from error
            status = response.status_code if response is not None else 500
            if status < 500 and status not in {408, 429}:
                cure = (
                    "accept its licence there, and set HF_TOKEN" if status in {401, 403} else "check name and revision"
                )
                raise UserError(f"cannot get {what}: {status}, {cure}") from error
            if attempt == TRIES or getattr(error, "errno", None) == errno.ENOSPC:
                raise UserError(f"cannot get {what}: {line(error)}; try again, it goes on from there") from error
            wait = _asked(response.headers.get("Retry-After", "")) if response is not None else None
            wait = 2 ** (attempt - 1) if wait is None else min(wait, LONGEST)
            if wait > 10:
                tqdm.write(f"the server of {what} asks for {wait:.0f} seconds", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError


def _asked(retry_after: str) -> float | None:
    """Seconds, which a server says as a number or as a date."""
    date = parsedate_tz(retry_after)
    return float(retry_after) if retry_after.isdigit() else max(0.0, mktime_tz(date) - time.time()) if date else None


def _causes(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *_causes(error.__cause__ or error.__context__)]


def line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def record() -> dict[str, list]:
    try:
        return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    except ValueError as error:
        raise UserError(f"{RECORD} is damaged: delete it, and fetch again what is to be used offline") from error


def note(source: str, files: Iterable[File]) -> None:
    write({RECORD: json.dumps(record() | {source: list(files)}, indent=1).encode()})


def digest(path: Path, git: bool = False) -> str:
    start = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if git else hashlib.sha256()
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: start).hexdigest()


def _shown_on(bar: tqdm) -> type[tqdm]:
    """What `huggingface_hub` would show of one file, shown on the one bar."""
    silent = {"__init__": lambda self, *_, **__: tqdm.__init__(self, disable=True)}
    return type("Part", (tqdm,), silent | {"update": lambda _, n=1: bar.update(n)})


def listing(name: str, revision: str | None, kind: str = "model") -> list[File]:
    """All files of a repository of the hub."""
    how = {"revision": revision, "repo_type": kind, "files_metadata": True, "timeout": PATIENCE}
    found = retried(name, lambda: HfApi().repo_info(name, **how)).siblings
    return [File(one.rfilename, one.size, one.lfs.sha256 if one.lfs else one.blob_id) for one in found]


def into_cache(name: str, file: File, revision: str | None, repo_type: str, bar: tqdm) -> None:
    """One file into the hub's cache; a damaged one is taken out again."""
    how = {"repo_type": repo_type, "revision": revision, "tqdm_class": _shown_on(bar)}
    got = Path(hf_hub_download(name, file.path, **how))
    if digest(got, git=len(file.digest) == 40) != file.digest:
        got.resolve().unlink()
        got.unlink(missing_ok=True)
        raise OSError("its checksum is wrong")


def head(url: str) -> tuple[int, str]:
    """Size and ETag of what lies at an address."""
    how = {"timeout": PATIENCE, "follow_redirects": True}
    headers = retried(url, lambda: get_session().head(url, **how).raise_for_status()).headers
    return int(headers["Content-Length"]), headers.get("ETag", "")


def whole(url: str, file: Path, size: int, bar: tqdm) -> None:
    """Download what is missing of a file, and compare it with its own checksums and with the first download."""
    if file.is_file() and file.stat().st_size > size:
        file.unlink()  # begun when another, larger file was served
    with file.open("ab") as end:
        http_get(url, end, resume_size=end.tell(), expected_size=size, tqdm_class=_shown_on(bar))
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        if archive.testzip() is None:
            found = File(url, size, digest(file))
            if record().get(url, [found])[0][2] == found.digest:
                return note(url, [found])
            file.unlink()
            raise Changed(f"{url} is not what it was when it was first fetched: if it may be, drop it from {RECORD}")
    file.unlink()
    raise OSError("its checksums are wrong")
