import getpass
import json
import math
import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from saelib import UserError, report
from saelib.profile import ROOT, load_profile
from saelib.report import Report, render, reported


@pytest.fixture
def profile():
    return load_profile("docstring-gpt")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELIB_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def glued(monkeypatch):
    """What the book would get from a notebook."""
    found = {}
    monkeypatch.setattr(report, "get_ipython", lambda: object())
    monkeypatch.setattr("myst_nb.glue", lambda name, value, display: found.update({name: (value, display)}))
    return found


def test_json_and_glue_say_the_same(profile, folder, glued):
    chapter = Report("01_toy", profile, seed=3)
    chapter.publish("loss", torch.tensor(1.23456789), se=np.float64(0.0123), n=256, unit="nats")
    chapter.publish("head", np.int64(7))
    chapter.publish("steps", 1_300_000, fmt=",")
    chapter.publish("missing", None)
    chapter.publish("curve", np.array([1.0, 2.0, 3.5]))
    written = json.loads((folder / "01_toy.json").read_text())
    assert (written["chapter"], written["profile"]) == ("01_toy", "docstring-gpt")
    assert written["values"] == {
        "loss": {"value": 1.23457, "se": 0.0123, "n": 256, "unit": "nats", "text": "1.235 ± 0.012"},
        "head": {"value": 7, "se": None, "n": None, "unit": "", "text": "7"},
        "steps": {"value": 1_300_000, "se": None, "n": None, "unit": "", "text": "1,300,000"},
        "missing": {"value": None, "se": None, "n": None, "unit": "", "text": "not run"},
        "curve": {"value": [1.0, 2.0, 3.5], "se": None, "n": None, "unit": "", "text": None},
    }
    assert glued == {name: (v["text"], False) for name, v in written["values"].items() if name != "curve"}


def test_outside_a_notebook_nothing_is_printed(profile, folder, capsys):
    Report("01_toy", profile).publish("x", 1.0)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("bad", [math.nan, math.inf, [1.0, math.nan]])
def test_a_number_that_is_none_is_refused_and_what_was_published_stays(profile, folder, bad):
    chapter = Report("01_toy", profile)
    chapter.publish("good", 1.0)
    before = (folder / "01_toy.json").read_bytes()
    with pytest.raises(ValueError, match="publish None"):
        chapter.publish("bad", bad)
    assert (folder / "01_toy.json").read_bytes() == before
    assert os.listdir(folder) == ["01_toy.json"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((0.6131,), "0.613"), ((0.6131, ".3f", 0.0041), "0.613 ± 0.004"), ((12,), "12"), ((12, ".1f"), "12.0"),
     ((0.215, ".1%"), "21.5%"), (("L1.H3",), "L1.H3"), ((None,), "not run")],
)  # fmt: skip
def test_rendering(arguments, text):
    assert render(*arguments) == text


def test_provenance_says_what_ran_and_not_who_ran_it_where(profile, folder):
    chapter = Report("01_toy", profile, seed=3, word="a")
    model = torch.nn.Linear(2, 2, dtype=torch.float64)
    model.weights_fingerprint = "abc123"
    chapter.uses(model)
    chapter.uses(model, "second seed")
    chapter.publish("x", 1.0)
    text = (folder / "01_toy.json").read_text()
    found = json.loads(text)["provenance"]
    assert found["weights"] == {"model": "abc123", "second seed": "abc123"}
    assert (found["device"], found["dtype"], found["seed"]) == ("cpu", "float64", 3)
    assert found["parameters"] == {"seed": 3, "word": "a"}
    assert found["date"] == chapter.date and len(chapter.date) == 10
    assert found["versions"]["torch"] == torch.__version__
    assert found["wall_seconds"] >= 0
    for private in (str(Path.home()), str(ROOT), socket.gethostname(), f'"{getpass.getuser()}"'):
        assert private not in text


@pytest.mark.parametrize(
    ("endpoint", "marked"),
    [("http://127.0.0.1:8080", True), ("http://localhost/x", True), ("https://mirror.example", False), ("", False)],
)  # fmt: skip
def test_numbers_from_a_hub_on_this_machine_are_a_rehearsal(profile, folder, monkeypatch, endpoint, marked):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    Report("01_toy", profile).publish("x", 1.0)
    assert json.loads((folder / "01_toy.json").read_text())["provenance"].get("rehearsal", False) is marked


def test_the_commit_is_of_this_checkout_or_null(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@e", *arguments], cwd=tmp_path, check=True)

    monkeypatch.setattr(report, "ROOT", tmp_path.resolve())
    assert report._commit() == {"commit": None, "dirty": None}
    git("init", "-q")
    assert report._commit() == {"commit": None, "dirty": None}
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    found = report._commit()
    assert len(found["commit"]) == 40 and found["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert report._commit()["dirty"] is True
    (tmp_path / "below").mkdir()
    monkeypatch.setattr(report, "ROOT", tmp_path.resolve() / "below")  # an archive unpacked inside some other checkout
    assert report._commit() == {"commit": None, "dirty": None}


def test_results_go_below_build_unless_told_otherwise(profile, monkeypatch):
    monkeypatch.delenv("SAELIB_RESULTS", raising=False)
    assert Report("01_toy", profile).path == ROOT / "_build" / "results" / "docstring-gpt" / "01_toy.json"
    monkeypatch.setenv("SAELIB_RESULTS", "_build/check")
    assert Report("01_toy", profile).path == ROOT / "_build" / "check" / "01_toy.json"


def test_reported_figures_have_a_source_in_the_bibliography():
    bibliography = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    for key, figure in yaml.safe_load((ROOT / "book" / "reported.yml").read_text(encoding="utf-8")).items():
        assert set(figure) <= {"value", "unit", "source", "note"} and {"value", "source"} <= set(figure), key
        assert f"{{{figure['source']}," in bibliography, key
    assert reported("induction_law_exponent")["value"] == 5.7
    with pytest.raises(UserError, match="no figure 'nonsense'"):
        reported("nonsense")
