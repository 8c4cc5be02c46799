"""A committed number that the code no longer gives makes the notebook test fail, under this project's settings."""

import shutil
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from saelib.profile import ROOT

GLUE = "application/papermill.record/text/plain"
NOISE = f"""\
import sys, time
from IPython.display import display
print(time.time(), file=sys.stderr)
display({{"text/html": f"<b>{{time.time()}}</b>", "text/plain": "a table"}}, raw=True)
display({{"{GLUE}": str(time.time())}}, raw=True)"""


def chapter(path, shown):
    number = new_code_cell("print(f'{0.61312:.3f}')", execution_count=1)
    number.outputs = [new_output("stream", name="stdout", text=f"{shown}\n")]
    noise = new_code_cell(NOISE, execution_count=2)
    noise.outputs = [
        new_output("stream", name="stderr", text="1.5\n"),
        new_output("display_data", {"text/html": "<b>1.5</b>", "text/plain": "a table"}),
        new_output("display_data", {GLUE: "1.5"}),
    ]
    untrue = new_code_cell(
        "import os\nprint(os.environ['TQDM_DISABLE'], 'SAELIB_RESULTS' in os.environ)", execution_count=3
    )
    untrue.outputs = [new_output("stream", name="stdout", text="1 True\n")]
    nbformat.write(new_notebook(cells=[number, noise, untrue]), path)


@pytest.mark.slow
def test_a_tampered_number_fails_and_noise_does_not(tmp_path):
    shutil.copy(ROOT / "conftest.py", tmp_path)
    chapter(tmp_path / "true.ipynb", "0.613")
    chapter(tmp_path / "tampered.ipynb", "0.631")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "-rA",
        "-q",
        "-p",
        "no:cacheprovider",
        "true.ipynb",
        "tampered.ipynb",
    ]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    verdicts = [line.split(" - ")[0] for line in ran.stdout.splitlines() if line.startswith(("PASSED", "FAILED"))]
    assert sorted(verdicts) == [
        "FAILED tampered.ipynb::Cell 0", "PASSED tampered.ipynb::Cell 1", "PASSED tampered.ipynb::Cell 2",
        *(f"PASSED true.ipynb::Cell {i}" for i in range(3)),
    ], ran.stdout  # fmt: skip
    assert ran.returncode == 1
