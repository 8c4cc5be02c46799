"""What pytest must know before it re-runs the notebooks (`pytest --nbval notebooks`).

nbval compares the text of every output with the committed one. Left out are what a person does not read (messages on
stderr), what repeats another output in another form (HTML, SVG), and what `report.publish` glues: those numbers are
compared with a tolerance, in tests/test_results.py, from what the re-run writes to `_build/check/docstring-gpt`.
"""

from __future__ import annotations

import os
from pathlib import Path

collect_ignore_glob = ["notebooks/sweeps/*"]  # hours; their results are stored
GLUE = "application/papermill.record/"
MIME_TYPES = ("text/plain", "text/html", "text/markdown", "text/latex", "image/png", "image/jpeg", "image/svg+xml")
SKIPPED = ("stderr", "text/html", "image/svg+xml", *(GLUE + kind for kind in MIME_TYPES))
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton; see tests/test_triton.py


def pytest_configure(config):
    """Re-run with the Python that runs pytest, without progress bars, and keep its numbers apart from the book's."""
    if not (config.getoption("nbval", default=False) or config.getoption("nbval_lax", default=False)):
        return
    config.option.nbval_current_env = not config.option.nbval_kernel_name
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("SAELIB_DEVICE", "cpu")  # the committed outputs are of a CPU
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    os.environ.setdefault("SAELIB_RESULTS", str(Path(__file__).parent / "_build" / "check" / "docstring-gpt"))


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # a notebook, under nbval
        collector.skip_compare += SKIPPED
