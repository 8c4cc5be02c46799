"""What several test files look at: the built book, the shipped model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from saelib import book
from saelib.models import load_model
from saelib.profile import BUILD, load_profile, override


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="Also run what takes minutes (marked `long`).")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; skipped unless --slow is given")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest --slow"))


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


@pytest.fixture(scope="module")
def lively_model(tmp_path_factory):
    """A random GPT-2 of three blocks whose layers have a say."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = GPT2Config(
        vocab_size=4096, n_positions=128, n_embd=24, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        initializer_range=0.3,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return load_model(override(load_profile("docstring-gpt"), {"model.name": str(folder)}))
