"""The built book, for the tests that look at it: made once in a session, from the committed outputs alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from saelib import book
from saelib.profile import BUILD


@pytest.fixture(scope="session")
def site() -> Path:
    """Folder of the built HTML. Building fails on any warning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(book, "SITE", BUILD / "check" / f"site{os.environ.get('PYTEST_XDIST_WORKER', '')}")
        book.stage(book.DEFAULT, committed=True)
        return book.build().parent
