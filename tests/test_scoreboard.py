"""The scoreboard shows what was published, says "not run" of the rest, and gives no verdict but by its rules."""

import json
import re

import nbformat
import numpy as np
import pytest
import yaml
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from saelib import UserError, runner, scoreboard
from saelib.profile import ROOT, load_profile
from saelib.report import Report, result_file
from saelib.scoreboard import MEASURES, NOT_RUN, ROLES, Reading

CLAIMS = yaml.safe_load(scoreboard.CLAIMS.read_text())
WORDS = ("reproduced", "explained", "undecided")
HEAD = {"best_induction_score": 0.7, "threshold": 0.3, "ablation_drop": 0.4, "ablation_drop_largest": 0.2,
        "patch_induction_head": 0.8, "patch_other_head": 0.1}  # fmt: skip
FORMULAS = {"mse_small": 0.07, "mse_large": 0.05, "planted_exactly_30_journal": 0.004, "planted_exactly_30_paper": 0.07}
LOSSES = {"delta_small": 0.2, "delta_large": 0.15, "large_over_small": 0.75, "large_over_small_se": 0.02}
MOVED = {"transplant_seed": 6.0, "transplant_seed_se": 0.1, "seed_mean": 4.0, "seed_mean_se": 0.1}
SPARSE = {"sparsity_index0_small": 0.13, "sparsity_index0_small_se": 0.01, "sparsity_small": 0.04,
          "sparsity_small_se": 0.01}  # fmt: skip
BOUND = {"sparsity_channels": 0.1, "sparsity_channels_untrained": 0.2, "sparsity_channels_se": 0.01,
         "later_channels_untrained": 0.02, "later_random": 0.06}  # fmt: skip
RATES = {"rank_1000": 0.95, "rate_first_mse": 0.085, "rate_best_mse": 0.08}
TIED = {"tied_for_ever_added": 0.04, "tied_for_ever_added_se": 0.003}
LEFT_OUT = {"no_projection_added": 0.001, "no_ema_added": 0.004, "no_auxk_added": 0.001, "no_ema_added_se": 0.0001,
            "whole_mse": 0.08}  # fmt: skip
HOME = {"mse_chapter": 0.2, "mse_small": 0.07, "delta_chapter": 0.5, "delta_small": 0.2, "journal_added": 0.01,
        "whole_mse": 0.08}  # fmt: skip
RAW = {"raw_inputs_added": 0.003, "raw_inputs_added_se": 0.0003, "raw_pre_bias_added": 0.3,
       "raw_pre_bias_added_se": 0.03}  # fmt: skip
PROBES = {"probe_small": 0.6, "probe_small_se": 0.01, "probe_random": 0.8, "probe_random_se": 0.01}
BILL = {"params_16m": 275e9, "ratio_16m_model": 3.0}
STEERED = {"steered_gain_small": 1.0, "steered_gain_small_se": 0.1, "steered_gain_random": 0.3}
PLANTED = [
    ("J1", HEAD, "reproduced"),
    ("J1", HEAD | {"ablation_drop": 0.1}, "refuted"),
    ("J1", HEAD | {"ablation_drop_se": 0.2}, "undecided"),
    ("J2", {"copying_embedded": 0.9, "copying_received": 0.9}, "reproduced"),
    ("J2", {"copying_embedded": -0.5, "copying_received": 1.0}, "explained"),
    ("J2", {"copying_embedded": -0.5, "copying_received": 0.1}, "refuted"),
    ("J3", FORMULAS | {"mse_small": 0.007, "mse_large": 0.005}, "reproduced"),
    ("J3", FORMULAS, "explained"),
    ("J3", FORMULAS | {"planted_exactly_30_journal": 0.04}, "refuted"),
    ("J3", FORMULAS | {"planted_exactly_30_paper": 0.004}, "refuted"),
    ("J4", LOSSES, "reproduced"),
    ("J4", LOSSES | {"large_over_small": 1.2}, "refuted"),
    ("J4", LOSSES | {"large_over_small": 0.97}, "undecided"),
    ("J5", MOVED, "reproduced"),
    ("J5", MOVED | {"transplant_seed": 0.3}, "refuted"),
    ("J5", MOVED | {"transplant_seed": 2.1}, "undecided"),
    ("J6", {"monotone_probability": 0.99, "monotone_p": 1.0}, "reproduced"),
    ("J6", {"monotone_probability": 0.2, "monotone_p": 0.4}, "undecided"),
    ("J6", {"monotone_probability": 0.2, "monotone_p": 0.01}, "refuted"),
    ("J7", {"journal_way_inside": 0.97}, "reproduced"),
    ("J7", {"journal_way_inside": 0.4}, "refuted"),
    ("J8", PROBES | {"probe_small": 0.9}, "reproduced"),
    ("J8", PROBES, "refuted"),
    ("J8", PROBES | {"probe_small": 0.79}, "undecided"),
    ("J9", {"n2g_recovered_small": 0.3}, "reproduced"),
    ("J9", {"n2g_recovered_small": 0.8}, "refuted"),
    ("J10", SPARSE, "reproduced"),
    ("J10", SPARSE | {"sparsity_index0_small": 0.3, "sparsity_small": 0.13}, "refuted"),
    ("J10", SPARSE | {"sparsity_index0_small": 0.14, "sparsity_small": 0.13}, "undecided"),
    ("J11", BOUND, "reproduced"),
    ("J11", BOUND | {"sparsity_channels_untrained": 0.05}, "explained"),
    ("J11", BOUND | {"sparsity_channels_untrained": 0.05, "later_random": 0.01}, "refuted"),
    ("J11", BOUND | {"sparsity_channels_untrained": 0.11}, "undecided"),
    ("J12", RATES, "reproduced"),
    ("J12", RATES | {"rate_first_mse": 0.2}, "explained"),
    ("J12", RATES | {"rank_1000": 0.1}, "refuted"),
    ("J13", TIED, "reproduced"),
    ("J13", TIED | {"tied_for_ever_added": -0.02}, "refuted"),
    ("J13", TIED | {"tied_for_ever_added": 0.005}, "undecided"),
    ("J14", LEFT_OUT, "reproduced"),
    ("J14", LEFT_OUT | {"no_ema_added": 0.01}, "refuted"),
    ("J14", LEFT_OUT | {"no_ema_added_se": 0.002}, "undecided"),
    ("J15", HOME, "reproduced"),
    ("J15", HOME | {"mse_chapter": 0.08, "journal_added": 0.5}, "explained"),
    ("J15", HOME | {"mse_chapter": 0.08}, "refuted"),
    ("J16", BILL, "reproduced"),
    ("J16", BILL | {"ratio_16m_model": 0.1}, "explained"),
    ("J16", BILL | {"params_16m": 1e9}, "refuted"),
    ("J17", STEERED, "reproduced"),
    ("J17", STEERED | {"steered_gain_small": -0.1}, "refuted"),
    ("J17", STEERED | {"steered_gain_small": 0.31}, "undecided"),
    ("J18", RAW, "reproduced"),
    ("J18", RAW | {"raw_inputs_added": -0.003}, "refuted"),
    ("J18", RAW | {"raw_inputs_added": 0.0005}, "undecided"),
]


def published(**values):
    """Entries as a results file has them; `x_se=...` is the standard error of x."""
    found = {name: {"value": value, "se": None, "n": 9, "text": str(value)} for name, value in values.items()}
    for name in values:
        if name.endswith("_se"):
            found[name.removesuffix("_se")]["se"] = found.pop(name)["value"]
    return found


def files(chapters, **values):
    """A profile under which these chapters published the same values."""
    provenance = {"date": "2026-01-02", "weights": {"model": "abc"}, "device": "cpu", "dtype": "float32"}
    provenance["parameters"] = {}
    provenance["hardware"] = {"cores": 2, "gpu": None}
    return {chapter: {"values": published(**values), "provenance": provenance} for chapter in chapters}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout in which nothing was ever run: `results` is empty. Returns a function that publishes into it."""
    monkeypatch.setattr(scoreboard, "ROOT", tmp_path)
    monkeypatch.setattr("saelib.report.ROOT", tmp_path)
    (tmp_path / "book").mkdir()
    for name in ("claims.yml", "reported.yml"):
        (tmp_path / "book" / name).write_bytes((ROOT / "book" / name).read_bytes())

    def put(folder, chapter, date="2026-01-02", parameters=None, **values):
        path = tmp_path / folder / f"{chapter}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = files([chapter], **values)[chapter]
        content["provenance"] |= {"date": date, "parameters": parameters or {}}
        path.write_text(json.dumps(content))
        return path

    return put


def report_in(monkeypatch, tmp_path):
    monkeypatch.setenv("SAELIB_RESULTS", str(tmp_path / "fresh"))
    return Report("12_scoreboard", load_profile("docstring-gpt"))


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_every_claim_of_the_journal_has_a_rule():
    assert list(CLAIMS) == [f"J{number}" for number in range(1, 19)]
    page = (ROOT / "book" / "journal.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (J\d+) \| [^|]+ \| ([^|]+) \|", page, re.M)
    assert rows == [(name, entry["claim"]) for name, entry in CLAIMS.items()], "what is judged is what the table says"
    for name, entry in CLAIMS.items():
        keys = {"claim", "chapters", "facts", "reproduced"}
        assert keys <= entry.keys() <= keys | {"explained", "undecided", "changed"}, name


def test_planted_values_reach_every_verdict_that_a_rule_can_give():
    for name, entry in CLAIMS.items():
        possible = {"reproduced", "refuted"} | (set(WORDS) & entry.keys())
        assert {verdict for claim, _, verdict in PLANTED if claim == name} >= possible, name


@pytest.mark.parametrize(("claim", "values", "verdict"), PLANTED)
def test_rules(claim, values, verdict):
    assert scoreboard.judge(CLAIMS[claim], files(CLAIMS[claim]["chapters"], **values)).verdict == verdict


@pytest.mark.parametrize(("claim", "values"), {claim: values for claim, values, _ in PLANTED}.items())
def test_a_value_that_is_missing_or_none_makes_it_not_run_and_is_named(claim, values):
    entry = CLAIMS[claim]
    conditions = [condition for word in WORDS for condition in entry.get(word, [])]
    needed = set().union(*map(scoreboard.names, conditions)) - scoreboard.all_reported().keys()
    assert needed == {name for name in values if not name.endswith("_se")}, "what is planted is what the rule names"
    for name in needed:
        for changed in ({**values, name: None}, {other: value for other, value in values.items() if other != name}):
            if name + "_se" in changed and name not in changed:
                changed.pop(name + "_se")
            judged = scoreboard.judge(entry, files(entry["chapters"], **changed))
            assert judged.verdict == NOT_RUN and name in judged.why


def around(value, se, n=None):
    return {"value": value, "se": se, "n": n}


@pytest.mark.parametrize(("x", "outcome"), [(1.9, None), (2.1, True), (-1.9, None), (-2.1, False)])
def test_a_condition_holds_or_fails_with_its_whole_interval(x, outcome):
    """Against 1.96 standard errors, whichever side carries them and whichever way it is written."""
    known = {"x": around(1 + x, 0.6), "y": around(1, 0.8), "one": around(1, None)}
    assert scoreboard.holds("x > y", known) is scoreboard.holds("y < x", known) is outcome
    assert scoreboard.holds("x - y > 1 - one", known) is scoreboard.holds("0 < 2 * x - 2 * y", known) is outcome


def test_three_seeds_count_as_three():
    """By Student's t, 4.3 standard errors; the smallest number counts."""
    for x, outcome in ((4.2, None), (4.4, True)):
        assert scoreboard.holds("x > 0", {"x": around(x, 1, n=3)}) is outcome
        assert scoreboard.holds("x > y", {"x": around(x, 1, n=3), "y": around(0, 1e-6, n=999)}) is outcome
    assert scoreboard.holds("x > 0", {"x": around(2.1, 1, n=99)})


def test_independent_noise_is_found_about_as_often_as_it_should():
    """Of normal x and y of equal mean, x > y is decided in 5 %."""
    draws = np.random.default_rng(0).normal(7, [[3], [4]], (2, 2000))
    decided = [scoreboard.holds("x > y", {"x": around(x, 3), "y": around(y, 4)}) is not None for x, y in draws.T]
    assert 0.035 < np.mean(decided) < 0.065


def test_distances_are_noisy_too():
    known = {"x": around(0.13, 0.02), "y": around(0.14, 0.02)}
    assert scoreboard.holds("abs(x - 0.12) < abs(y - 0.12)", known) is None


def test_facts_are_what_the_chapter_prints():
    entry = {"claim": "c", "chapters": ["01_a"], "reproduced": ["x > 1"], "facts": "{x} against {y}"}
    assert scoreboard.judge(entry, files(["01_a"], x=2)).why == "2 against not run"


def test_of_equal_names_the_first_chapter_counts():
    given = files(["01_a"], x=1) | files(["02_b"], x=2, y=3)
    assert {name: found["value"] for name, found in scoreboard.values_of(given, "01_a", "02_b").items()} == {
        "x": 1,
        "y": 3,
    }


@pytest.mark.parametrize("broken", ["x >", "x", "0 < x < 1", "x >= 1", "x > 0 and y < 1 or x > 2"])
def test_a_broken_rule_is_named(broken):
    with pytest.raises(UserError, match=rf"book/claims.yml: '{broken}' is no condition"):
        scoreboard.judge({"claim": "c", "chapters": [], "reproduced": [broken], "facts": ""}, {})


def test_a_rule_reaches_nothing_but_values():
    entry = {"claim": "c", "chapters": ["01_a"], "reproduced": ["open('x') + y > 0"], "facts": ""}
    assert scoreboard.judge(entry, files(["01_a"], y=1)).why == "missing: open"


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_reading_has_its_interval():
    given = files(["05_sparsity"], sparsity_small=0.08, sparsity_small_se=0.01, sparsity_large=0.05)
    found = scoreboard.reading(given, "sparsity", "small")
    assert found == pytest.approx((8.0, 8 - 1.96, 8 + 1.96))
    assert scoreboard.shown(found, ".1f") == "8.0 [6.0,\N{NO-BREAK SPACE}10.0]"
    assert scoreboard.shown(scoreboard.reading(given, "sparsity", "large"), ".1f") == "5.0"
    assert scoreboard.reading(given, "sparsity", "chapter") is None and scoreboard.shown(None, ".1f") is None
    ends = {"equivalent_small": 0.3, "equivalent_small_se": 0.9, "equivalent_low_small": 0.25}
    found = scoreboard.reading(files(["04_checkpoints"], **ends, equivalent_high_small="open"), "equivalent", "small")
    assert scoreboard.shown(found, ".1f") == "30.0 [25.0,\N{NO-BREAK SPACE}open]", "its chapter's interval comes first"


@pytest.mark.parametrize(
    ("measure", "sae", "days"),
    [
        ("mse_journal", "small", {"journal, 8 July": 0.0069, "journal, 16 July": 0.0064}),
        ("delta", "chapter_large", {"journal, 8 July": 0.8393, "journal, 16 July": 0.5963}),
        ("mse_readme", "small", {"journal, earlier": 0.1554}),
        ("equivalent", "small", {"journal, 30 June": 21.5}),
        *(("mse", sae, {}) for sae in ROLES), *(("sparsity", sae, {}) for sae in ROLES),
    ],
)  # fmt: skip
def test_the_journals_figures_stand_under_their_autoencoder_and_their_way(measure, sae, days):
    rows = scoreboard.sources({"p": {}}, measure)
    assert {day: figures[sae] for day, figures in rows.items() if sae in figures} == {"p": None} | days


def test_every_figure_of_the_journals_two_tables_is_shown():
    shown = scoreboard.board({"p": {}}, MEASURES)
    figures = scoreboard.all_reported()
    table = [
        figure["value"] for key, figure in figures.items() if re.match(r"journal_07(08|16)_\w+_(home|openai)_", key)
    ]
    assert len(table) == 24 and all(f"| {value:g} |" in shown for value in table)


def test_where_nothing_was_run_every_cell_says_so(checkout, monkeypatch, tmp_path):
    report = report_in(monkeypatch, tmp_path)
    found = scoreboard.results(report)
    assert found == {"docstring-gpt": {}}
    ours = [line for line in scoreboard.board(found, MEASURES).splitlines() if "docstring" in line]
    assert len(ours) == len(MEASURES) and all(line.count("*not run*") == len(ROLES) for line in ours)
    groups = scoreboard.groups(found, ["mse", "mse_journal", "mse_readme"])
    assert [row.replace("\n", ", ") for row in groups] == [
        "docstring-gpt, the paper's formula", "docstring-gpt, the journal's formula",
        "journal, 8 July, the journal's formula", "journal, 16 July, the journal's formula",
        "docstring-gpt, the README's formula", "journal, earlier, the README's formula",
    ]  # fmt: skip
    assert all(set(groups[row].values()) == {None} for row in groups if "docstring" in row)
    judged = {name: scoreboard.judge(entry, {}) for name, entry in CLAIMS.items()}
    assert {one.verdict for one in judged.values()} == {NOT_RUN} and all(one.why for one in judged.values())
    assert scoreboard.verdict_table(judged).count("**not run**") == 18


def test_every_profile_that_was_run_is_a_column_or_a_row(checkout, monkeypatch, tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_induction.ipynb").touch()
    checkout("results/a", "01_induction", x=1)
    checkout("results/b", "03_delta_loss", delta_small=0.5, delta_small_se=0.1)
    checkout("fresh", "02_reconstruction", mse_small=0.07)
    found = scoreboard.results(report_in(monkeypatch, tmp_path))
    assert list(found) == ["docstring-gpt", "a", "b"]
    assert list(scoreboard.sources(found, "delta"))[:2] == ["docstring-gpt", "b"], "a has none of these figures"
    assert "b | *not run* | 0.5000 \\[0.3040,\N{NO-BREAK SPACE}0.6960\\]" in scoreboard.board(found, ["delta"])
    assert scoreboard.groups(found, ["mse"])["docstring-gpt\nthe paper's formula"]["small"] == Reading(0.07)


# --- which results are read -------------------------------------------------------------------------------------------


def test_the_run_at_hand_comes_before_what_is_published_unless_that_is_newer(checkout, tmp_path):
    old = checkout("results/docstring-gpt", "02_reconstruction")
    assert result_file("docstring-gpt", "02_reconstruction", tmp_path / "fresh") == old
    new = checkout("fresh", "02_reconstruction")
    assert result_file("docstring-gpt", "02_reconstruction", tmp_path / "fresh") == new
    assert result_file("docstring-gpt", "02_reconstruction") == old
    assert result_file("docstring-gpt", "03_delta_loss", tmp_path / "fresh") is None
    checkout("results/docstring-gpt", "02_reconstruction", date="2026-03-01")
    assert result_file("docstring-gpt", "02_reconstruction", tmp_path / "fresh") == old


def test_a_fresh_run_with_other_parameters_does_not_count(checkout, tmp_path):
    fresh = checkout("fresh", "02_reconstruction", parameters={"n_contexts": 9})
    find = lambda **own: result_file("docstring-gpt", "02_reconstruction", tmp_path / "fresh", own)  # noqa: E731
    assert find(profile="docstring-gpt", n_contexts=9) == fresh and find(n_contexts=3200) is None
    old = checkout("results/docstring-gpt", "02_reconstruction", parameters={"n_contexts": 9})
    assert find(n_contexts=3200) == old, "what is published counts, whatever it was made with"


def test_a_rehearsal_never_counts(checkout, tmp_path):
    fresh = checkout("fresh", "02_reconstruction")
    content = json.loads(fresh.read_text())
    content["provenance"]["rehearsal"] = True
    fresh.write_text(json.dumps(content))
    assert result_file("docstring-gpt", "02_reconstruction", tmp_path / "fresh") is None
    old = checkout("results/docstring-gpt", "02_reconstruction")
    assert result_file("docstring-gpt", "02_reconstruction", tmp_path / "fresh") == old


def test_a_check_reads_what_is_published(monkeypatch):
    profile = load_profile("docstring-gpt")
    monkeypatch.setenv("SAELIB_RESULTS", "_build/check/docstring-gpt")
    assert Report("12_scoreboard", profile).fresh is None
    monkeypatch.delenv("SAELIB_RESULTS")
    assert Report("12_scoreboard", profile).fresh == ROOT / "_build" / "results" / "docstring-gpt"


def test_the_report_takes_over_what_its_numbers_stand_on(checkout, monkeypatch, tmp_path):
    checkout("fresh", "02_reconstruction")
    report = report_in(monkeypatch, tmp_path)
    scoreboard.results(report)
    assert report.provenance["weights"] == {"model": "abc"}
    assert (report.provenance["device"], report.provenance["dtype"]) == ("cpu", "float32")
    other = {"weights": {"model": "xyz", "second seed": "d"}, "device": "cuda", "dtype": "float32"}
    report.stands_on([{"provenance": other}, *scoreboard.results(report)["docstring-gpt"].values()])
    assert report.provenance["weights"] == {"model": "abc, xyz", "second seed": "d"}, "no chapter wins silently"
    assert (report.provenance["device"], report.provenance["dtype"]) == ("cpu, cuda", "float32")


@pytest.fixture
def book(checkout, tmp_path, monkeypatch):
    """A chapter and the scoreboard, in a checkout whose kernels only write the number `says`. Returns (run, states)."""
    folder, says = tmp_path / "notebooks", {"x": 1}
    folder.mkdir()
    for name in ("02_reconstruction", "12_scoreboard"):
        cells = [
            new_markdown_cell("# T"),
            new_code_cell('profile = "docstring-gpt"', metadata={"tags": ["parameters"]}),
        ]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")

    def execute(item, output, results):
        nbformat.write(new_notebook(metadata={"papermill": {}}), output)
        checkout(results.relative_to(tmp_path), item.chapter.name, **says)

    for name, value in {"ROOT": tmp_path, "NOTEBOOKS": folder, "_execute": execute}.items():
        monkeypatch.setattr(runner, name, value)
    monkeypatch.setattr(runner, "surroundings", lambda profile: [])
    out = tmp_path / "out"
    states = lambda: [item.state for item in runner.plan([], "docstring-gpt", out=out)[0]]  # noqa: E731
    return lambda *names, **kwargs: runner.run(names, out=out, **kwargs), states, says


def test_one_run_of_everything_leaves_nothing_to_do(book):
    """The scoreboard's inputs are taken when its turn comes, after the chapters that it reads."""
    run, states, _ = book
    assert states() == ["not run", "not run"]
    run()
    assert states() == ["done", "done"]


def test_new_numbers_rules_code_or_published_results_call_for_another_scoreboard(book, checkout, tmp_path):
    run, states, says = book
    run()
    says["x"] = 2
    run("02", force=True)
    assert states() == ["done", "changed"]
    run()
    assert states() == ["done", "done"]
    (tmp_path / "saelib").mkdir()
    for file in ("book/claims.yml", "saelib/scoreboard.py"):
        (tmp_path / file).write_text("{}")
        assert states() == ["done", "changed"]
        run()
    checkout("results/docstring-gpt", "02_reconstruction", date="2027-01-01", x=3)
    assert states() == ["done", "changed"]


# --- tables -----------------------------------------------------------------------------------------------------------


def cells_of(markdown):
    page = BeautifulSoup(MarkdownIt("commonmark").enable("table").render(markdown), "html.parser")
    return [[cell.get_text() for cell in row.select("td, th")] for row in page.select("tr")]


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=20))
def test_cells_show_what_they_hold(text):
    _, [shown] = cells_of(scoreboard.table(["h"], [[text]]))
    assert shown.split() == text.split()


@pytest.mark.parametrize("text", ["a | b", "<b>x</b>", "*x* _y_ `z`", "[x](y)", "{glue}`x`", "$x$", "a\nb", "\\"])
def test_nothing_in_a_cell_is_taken_for_markup(text):
    table = scoreboard.table(["h"], [[text]])
    assert cells_of(table) == [["h"], [" ".join(text.split())]]
    assert not re.search(r"(?<!\\)[$<{]", table)


def test_links_lead_to_chapters_that_are_there():
    assert scoreboard.link("01_induction") == "[01](01_induction.ipynb)"
    assert scoreboard.link("99_nothing") == "99"
    notebook = nbformat.read(ROOT / "notebooks" / "12_scoreboard.ipynb", 4)
    outputs = [
        o.data.get("text/markdown", "") for cell in notebook.cells for o in cell.get("outputs", []) if "data" in o
    ]
    linked = set(re.findall(r"\]\(([^)]+\.ipynb)\)", " ".join([*outputs, *(cell.source for cell in notebook.cells)])))
    assert linked and all((ROOT / "notebooks" / name).is_file() for name in linked)


def test_measures_and_claims_name_chapters_of_the_book():
    named = {measure.chapter for measure in MEASURES.values()} | {
        c for entry in CLAIMS.values() for c in entry["chapters"]
    }
    assert named <= {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


@pytest.mark.slow
def test_the_chapter_runs_under_a_profile_that_nobody_ran(tmp_path):
    (tmp_path / "nobody.yml").write_text("extends: gpt2-small\nname: nobody\n")
    runner.run(["12"], str(tmp_path / "nobody.yml"), out=tmp_path / "out")
    values = json.loads((tmp_path / "out/results/12_scoreboard.json").read_text())["values"]
    assert {values[f"{key}_{sae}"]["text"] for key in MEASURES for sae in ROLES} == {NOT_RUN}
    assert values["n_not_run"]["value"] == values["n_claims"]["value"] == 18
