"""One notebook over a grid: on local processes, on a cluster's address, through failures, and again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from saelib import UserError, cli
from saelib import sweep as sweeps
from saelib.profile import load_profile

PARAMETERS = 'profile = "docstring-gpt"\nseed = 0\nmode = "fine"'
CODE = """import json, os, pathlib, signal
from saelib import UserError
from saelib.profile import load_profile
folder = pathlib.Path(os.environ["SAELIB_RESULTS"]).parent
with (folder / "runs").open("a") as file:
    file.write("x")
again = len((folder / "runs").read_text()) > 1
worker = int(os.environ["JPY_PARENT_PID"])
if mode == "bad":
    raise ValueError("no such luck\\nmore")
if mode == "mine":
    raise UserError("the text is empty: give another")
if mode == "lethal" or (mode == "killed" and not again):
    os.kill(worker, signal.SIGKILL)
    signal.pause()
if mode == "endless":
    (folder / "pid").write_text(str(os.getpid()))
    signal.pause()
recipe = load_profile(profile).recipe
numbers = {"lr": recipe.rate, "k": recipe.k, "curve": [1, 2], "threads": int(os.environ["MKL_NUM_THREADS"]), "state": 3}
numbers["gpu"] = os.environ.get("CUDA_VISIBLE_DEVICES")
values = {name: {"value": value} for name, value in numbers.items()}
(folder / "results").mkdir()
(folder / "results" / "toy.json").write_text(json.dumps({"values": values}))"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("notebooks") / "toy.ipynb"
    cells = [
        new_markdown_cell("# A toy"),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell(CODE),
    ]
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.fixture(scope="module")
def cluster():
    """Two workers at an address, in processes of their own, that are started again when they die."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs="CRITICAL") as found:
        yield found


def call(toy, *grid, **named):
    pairs = [part for pair in grid for part in ("-g", pair)]
    options = [part for name, value in named.items() for part in (f"--{name}", str(value))]
    return CliRunner().invoke(cli.main, ["sweep", str(toy), *pairs, *options])


def runs(out):
    """How often each point was executed, by its folder's name without the hash."""
    return {path.parent.name.rsplit("-", 1)[0]: len(path.read_text()) for path in out.glob("*/runs")}


def test_a_grid_of_parameters_and_profile_values_on_local_processes(toy, tmp_path, monkeypatch):
    (tmp_path / "my.yml").write_text("extends: docstring-gpt\nname: mine\nrecipe: {k: 8}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    ended = call(toy, "recipe.lr=1e-4,2e-4", "seed=7", profile="my.yml", out="out", jobs=2)
    assert (ended.exit_code, ended.stdout) == (0, "2 of 2 points done: out/rows.csv\n")
    table = pd.read_csv("out/rows.csv")
    assert list(table.columns[:6]) == ["recipe.lr", "seed", "state", "error", "seconds", "host"]
    assert list(table.lr) == list(table["recipe.lr"]) == [1e-4, 2e-4]
    assert set(table.k) == {8} and set(table.state) == {"done"} and set(table.seed) == {7}
    assert "curve" not in table and set(table.threads) == {max(1, len(os.sched_getaffinity(0)) // 2)}
    assert set(table.gpu) == {3, 5}
    assert {"toy.ipynb", "profile.yml"} < {path.name for path in (tmp_path / "out").glob("recipe.lr=0.0002*/*")}


def test_failures_are_isolated_and_retried_once_on_a_cluster(toy, tmp_path, cluster):
    """A worker that dies also takes what others had finished there; that is not run again."""
    grid, where = "mode=fine,bad,mine,killed,lethal", {"scheduler": cluster.scheduler_address, "out": tmp_path}
    ended = call(toy, grid, **where)
    assert ended.exit_code == 1 and "mode bad: ValueError: no such luck\n" in ended.output
    times = {"mode=fine": 1, "mode=bad": 2, "mode=mine": 1, "mode=killed": 2, "mode=lethal": 2}
    assert runs(tmp_path) == times
    table = pd.read_csv(tmp_path / "rows.csv").set_index("mode")
    assert list(table.state) == ["done", "failed", "failed", "done", "failed"]
    assert table.error.bad == "ValueError: no such luck" and "worker was lost" in table.error.lethal
    assert table.error.mine == "UserError: the text is empty: give another"
    (kept,) = tmp_path.glob("mode=bad*/toy.ipynb")
    assert nbformat.read(kept, as_version=4).metadata["saelib"]["state"] == "failed"
    again = call(toy, "mode=fine,killed,other", **where)
    assert (again.exit_code, again.stdout.split(" points")[0]) == (0, "3 of 3")
    assert runs(tmp_path) == times | {"mode=other": 1}


def test_what_goes_in_makes_a_point_stale(toy, tmp_path):
    (point,), _ = sweeps.points(str(toy), ["seed=0"], "docstring-gpt", tmp_path)
    point.folder.mkdir()
    point.keep("done", None)
    assert sweeps.points(str(toy), ["seed=0"], "docstring-gpt", tmp_path)[0][0].row()["state"] == "done"
    notebook = nbformat.read(toy, as_version=4)
    other = toy.with_name("other") / "toy.ipynb"
    other.parent.mkdir()
    notebook.cells[2].source += "\n"
    nbformat.write(notebook, other)
    (again,), _ = sweeps.points(str(other), ["seed=0"], "docstring-gpt", tmp_path)
    assert again.folder == point.folder and again.row() == {"seed": 0, "state": "not run"}
    (tmp_path / "my.yml").write_text("extends: docstring-gpt\nname: mine\nrecipe: {k: 8}\n")
    (mine,), _ = sweeps.points(str(toy), ["seed=0"], str(tmp_path / "my.yml"), tmp_path)
    assert mine.row()["state"] == "not run"


def test_a_points_profile_is_the_given_one_with_its_values(toy, tmp_path):
    grid = "saes.small.recipe.k=4", "activations.positions=[1,null]"
    (point,), _ = sweeps.points(str(toy), grid, "docstring-gpt", tmp_path)
    point.folder.mkdir()
    file = point.folder / "profile.yml"
    file.write_text(yaml.safe_dump(point.profile.model_dump(mode="json")))
    assert load_profile(file) == point.profile
    own, base = load_profile(file), load_profile("docstring-gpt")
    assert own.recipe_of("small").k == 4 and own.activations.positions == (1, None)
    assert (own.name, own.recipe_of("large")) == (base.name, base.recipe_of("large"))


def test_the_grid_is_the_product_of_json_values_or_words():
    assert sweeps.parse_grid(["a=1,2e-4", "b=x,y"]) == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2e-4, "b": "x"}, {"a": 2e-4, "b": "y"},
    ]  # fmt: skip
    assert sweeps.parse_grid(["p=[0,null],[1,2]", "c=null"]) == [{"p": [0, None], "c": None}, {"p": [1, 2], "c": None}]


@pytest.mark.parametrize(
    ("grid", "named", "message"),
    [
        ([], {}, "the grid is empty"),
        (["seed"], {}, "give each key once, and its values"),
        (["seed="], {}, "give each key once, and its values"),
        (["seed=1", "seed=2"], {}, "give each key once, and its values"),
        (["seed=0,1,0"], {}, "and its values, each once"),
        (
            ["recipe.n_latents=512,1024"],
            {},
            "changes nothing, since every SAE of the profile says its own: sweep one of saes.small.recipe.n_latents, ",
        ),
        (["sed=1"], {}, "toy has no parameter 'sed'; it has: seed, mode"),
        (["seed=1,many"], {}, "'many' is of another type"),
        (["recipe.lrr=1"], {}, "unknown key 'recipe.lrr'"),
        (["recipe.k=16,5000"], {}, "k = 5000 is more than n_latents"),
        (["seed=1"], {"profile": "nope"}, "no profile 'nope'"),
        (["seed=1"], {"scheduler": "tcp://127.0.0.1:9", "jobs": "2"}, "leave out one of the two"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(toy, tmp_path, grid, named, message):
    ended = call(toy, *grid, **named, out=tmp_path / "out")
    assert ended.exit_code == 2 and message in ended.stderr and ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_notebooks(tmp_path):
    for name, message in {"all": "one at a time", "77": "no chapter '77'", "no.ipynb": "cannot be read"}.items():
        with pytest.raises(UserError, match=message):
            sweeps.points(name, ["seed=0"], "docstring-gpt")
    cells = [new_markdown_cell("# Bare"), new_code_cell("n = 1", metadata={"tags": ["parameters"]})]
    nbformat.write(new_notebook(cells=cells), tmp_path / "bare.ipynb")
    with pytest.raises(UserError, match="no parameter 'profile' to hand recipe.k on by"):
        sweeps.points(str(tmp_path / "bare.ipynb"), ["recipe.k=1"], "docstring-gpt")
    assert sweeps.points(str(tmp_path / "bare.ipynb"), ["n=2"], "docstring-gpt")[0][0].item.parameters == {"n": 2}


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense", "http://x"])
def test_a_scheduler_that_does_not_answer(toy, tmp_path, monkeypatch, address):
    monkeypatch.setattr(sweeps, "TIMEOUT", 0.5)
    ended = call(toy, "seed=1", scheduler=address, out=tmp_path)
    assert ended.exit_code == 2 and f"no scheduler with a worker at {address}" in ended.stderr


def test_not_under_torchrun(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "leave out torchrun" in call(toy, "seed=1", out=tmp_path).stderr


def test_workers_that_see_another_checkout_are_refused(toy, tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(sweeps, "__version__", "0.0")
    ended = call(toy, "seed=1", scheduler=cluster.scheduler_address, out=tmp_path)
    assert ended.exit_code == 2 and "does not see" in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.long
def test_an_interrupted_sweep_leaves_a_sound_table_and_no_kernel(toy, tmp_path):
    """Ctrl-C goes to the command and its workers; kernels are in a session of their own, and end all the same."""
    command = [sys.executable, "-m", "saelib.cli", "sweep", str(toy), "-g", "mode=fine,endless", "--out", str(tmp_path)]
    with subprocess.Popen(command, start_new_session=True, stdout=-3, stderr=-3) as running:
        wait(lambda: [path for path in tmp_path.glob("*/pid") if path.read_text()])
        (kernel,) = (int(path.read_text()) for path in tmp_path.glob("*/pid"))
        assert psutil.pid_exists(kernel)
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(20) == 1
    wait(lambda: not psutil.pid_exists(kernel))
    table = pd.read_csv(tmp_path / "rows.csv")
    assert list(table.state) == ["done", "not run"] and table.k[0] == 16


def wait(until, seconds=40):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.1)
