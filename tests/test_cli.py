import subprocess
import sys

import pytest
from click.testing import CliRunner

from saelib import UserError, cli, runner


def call(*arguments):
    return CliRunner().invoke(cli.main, arguments)


@pytest.mark.parametrize("command", ["", "run", "sweep", "pretrain", "train", "export", "import", "book", "publish"])
def test_help_teaches_by_example(command):
    shown = call(*command.split(), "--help")
    assert shown.exit_code == 0
    assert f"saelib {command or 'run'}" in shown.output.split("\n", 1)[1]


def test_help_is_instant():
    code = (
        "import sys, saelib.cli; print([m for m in ('torch', 'transformers', 'papermill', 'yaml') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "99"], "no chapter '99'"),
        (["run", "--profile", "nope"], "no profile 'nope': choose one of docstring-gpt"),
        (["run", "--list", "--profile", "nope"], "no profile 'nope'"),
        (["run", "-p", "seed"], "not of the form key=value"),
        (["book", "--profile", "nope"], "no profile 'nope'"),
        (["publish", "--profile", "nope"], "no profile 'nope'"),
        (["pretrain", "--profile", "gpt2-small"], "no pretrain section"),
        (["pretrain", "-p", "pretrain.stepz=100"], "'pretrain.stepz'"),
        (["pretrain", "-p", "lr=100"], "'lr'"),
        (["pretrain", "-p", "hook.lr=100"], "'hook'"),
        (["pretrain", "-p", "pretrain.steps=many"], "'pretrain.steps'"),
        (["pretrain", "-p", "pretrain.steps=100"], "checkpoints must rise and end at steps"),
        (["run", "01", "--sweep"], "no chapter with a sweep '01': choose from 06_training"),
        (["run", "06", "--sweep", "-p", "tokns=1"], "no parameter 'tokns'; it has: variant, tokens"),
        (["run", "--sweep", "-p", "variant=hole"], "06_training has no variant 'hole'; it has: whole"),
        (["train", "nope"], "has no SAE 'nope'; it has small"),
        (["train", "small", "-p", "recipe.lrr=1"], "'recipe.lrr'"),
        (["train", "small", "-p", "recipe.k=5000"], "k = 5000 is more than n_latents = 2048"),
        (["train", "small", "-p", "saes.small.checkpoint=77"], "no checkpoint of step 77; there are 0, 100"),
        (["export", "nope", "x", "--format", "openai"], "no SAE at 'nope'"),
        (["import", "pyproject.toml", "x"], "not a readable file of tensors"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    out = ["--out", str(tmp_path / "out")] if arguments[0] in ("run", "pretrain", "train") else []
    ended = call(*arguments, *out)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert message in ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_failed_chapter_is_exit_code_1(monkeypatch):
    def fail(*arguments, **named):
        raise runner.ChapterFailed("01_toy: cell In [3] failed\nValueError: no")

    monkeypatch.setattr(runner, "run", fail)
    ended = call("run")
    assert (ended.exit_code, ended.stderr) == (1, "01_toy: cell In [3] failed\nValueError: no\n")


def test_a_mistake_found_inside_a_chapter_is_exit_code_2(monkeypatch):
    def fail(*arguments, **named):
        raise UserError("01_toy, cell In [3]: no model folder x")

    monkeypatch.setattr(runner, "run", fail)
    assert (call("run").exit_code, call("run").stderr) == (2, "error: 01_toy, cell In [3]: no model folder x\n")


def test_list_shows_every_chapter_with_its_state(tmp_path):
    shown = call("run", "--list", "--out", str(tmp_path / "out"))
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert [line.split()[0] for line in lines] == [chapter.name for chapter in runner.chapters()]
    assert all("not run" in line for line in lines)


def test_pretrain_takes_overrides(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("saelib.pretrain.pretrain", lambda *arguments: calls.append(arguments))
    pairs = ["pretrain.steps=100", "pretrain.checkpoints=[0, 100]", "pretrain.lr=1e-3"]
    overrides = [argument for pair in pairs for argument in ("-p", pair)]
    ended = call("pretrain", *overrides, "--seed", "1", "--threads", "1", "--out", str(tmp_path))
    assert ended.exit_code == 0, ended.output
    profile, out, seed, _ = calls[0]
    recipe = profile.pretrain
    assert (recipe.steps, recipe.lr, recipe.checkpoints, seed, out) == (100, 1e-3, (0, 100), 1, tmp_path)


def test_book_stages_builds_and_says_where_it_is(monkeypatch, tmp_path):
    staged = []
    monkeypatch.setattr("saelib.book.stage", lambda profile, committed: staged.append((profile, committed)))
    monkeypatch.setattr("saelib.book.build", lambda: tmp_path / "index.html")
    for arguments in (["book"], ["book", "--committed"]):
        assert "index.html" in call(*arguments).output
    assert staged == [("docstring-gpt", False), ("docstring-gpt", True)]
