"""What several test files look at: the built book, the shipped model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from saelib import book
from saelib.models import load_model
from saelib.profile import BUILD, load_profile


@pytest.fixture(scope="session")
def site() -> Path:
    """Folder of the HTML, built once in a session from the committed outputs alone. Any warning makes that fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(book, "SITE", BUILD / "check" / f"site{os.environ.get('PYTEST_XDIST_WORKER', '')}")
        book.stage(book.DEFAULT, committed=True)
        return book.build().parent


@pytest.fixture(scope="module")
def profile():
    """The embedded default; files that need another have a fixture of their own by this name."""
    return load_profile("docstring-gpt")


@pytest.fixture(scope="module")
def model(profile):
    return load_model(profile)
