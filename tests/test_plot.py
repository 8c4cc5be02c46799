"""Figures: each draws what it is given, says so where there is nothing, and keeps to the style."""

import math
from itertools import pairwise

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from saelib import plot
from saelib.checkpoints import Equivalent
from saelib.induction import Head, History, looks
from saelib.metrics import Estimate
from saelib.reconstruction import Groups, Norms
from saelib.scaling import Power
from saelib.scoreboard import Reading

SCORES = torch.tensor([[0.01, 0.02], [0.03, 0.8]])
HISTORY = History(
    [0, 1000, 100_000, 10_000_000],
    torch.linspace(0, 0.9, 16).view(4, 2, 2), torch.linspace(0, 0.5, 16).view(4, 2, 2),
    torch.tensor([0.0, 0.1, 0.2, 5.0]), torch.tensor([8.3, 6.0, 4.0, 3.0]),
)  # fmt: skip
TOKENS = ["Return", "s", " the", " $x_1$", ".\n", "\n", "The", " longer", " line", " of", " the", " text"]
ATTENTION = torch.zeros(12, 12)
ATTENTION[10, 3], ATTENTION[9, 1] = 0.9, 0.2


@pytest.fixture(autouse=True)
def style():
    with plt.style.context("default"):
        plot.use_style()
        yield
    plt.close("all")


@pytest.fixture
def ax():
    return plt.subplots()[1]


def words(ax):
    ax.figure.canvas.draw()
    found = [ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel(), *(text.get_text() for text in ax.texts)]
    ticks = [*ax.get_xticklabels(), *ax.get_yticklabels()]
    return " ".join([*found, *(tick.get_text() for tick in ticks)])


def test_the_style_is_the_book_s():
    assert plt.rcParams["axes.titlelocation"] == "left" and plt.rcParams["figure.dpi"] >= 150
    assert plt.rcParams["figure.facecolor"] == "white"
    cycle = [to_hex(color) for color in plt.rcParams["axes.prop_cycle"].by_key()["color"]]
    assert cycle[:3] == [plot.OURS.lower(), plot.POINTED.lower(), plot.SECOND.lower()]


def test_every_figure_returns_nothing_and_names_its_axes(ax):
    assert plot.residual_norms(ax, torch.rand(3, 16) + 1) is None
    assert "length of the residual stream" in words(ax) and "after layer 2" in words(ax)


def test_many_layers_carry_no_label_each(ax):
    plot.residual_norms(ax, torch.rand(12, 16) + 1)
    assert "after layer 11" in words(ax) and "after layer 5" not in words(ax)


@pytest.mark.parametrize("untrained", [None, torch.rand(3, 19) + 8])
def test_loss_by_position(ax, untrained):
    plot.loss_by_position(ax, torch.rand(5, 19) + 3, 10, 8.3, untrained)
    assert "nats" in words(ax) and ("untrained" in words(ax)) == (untrained is not None)
    assert ax.get_xticks()[2] == 10, "the first repeated token"


def test_labels_at_line_ends_do_not_touch(ax):
    ax.set(xlim=(0, 10), ylim=(0, 10))
    plot._end_labels(ax, 5, {"one": (3.0, "k"), "two": (3.01, "k"), "three": (2.99, "k")})
    ax.figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))


def test_emergence_shows_step_zero(ax):
    axes = plt.subplots(3, 1, sharex=True)[1]
    plot.emergence(axes, HISTORY, Head(1, 1), Head(0, 1), (3e6, 100_000, 10_000_000), 16e6)
    assert [tick.get_text() for tick in axes[2].get_xticklabels()][:2] == ["0", "1 k"]
    assert "published law" in words(axes[0]) and "L1H1" in words(axes[0]) and "half way" in words(axes[1])
    assert "plain" not in words(axes[1]), "no control, no line"
    line = axes[1].lines[0]
    assert line.get_xdata()[0] == 0 and axes[1].get_xlim()[0] < 0, "0 is on the axis"


def test_emergence_shows_the_control():
    axes = plt.subplots(3, 1, sharex=True)[1]
    plot.emergence(axes, HISTORY, Head(1, 1), Head(0, 1), None, 16e6, ([0, 1000, 16_000_000], [0.0, 0.1, 0.4]))
    assert "plain text only" in words(axes[1]) and "with repeats" in words(axes[1])
    assert list(axes[1].lines[-1].get_ydata()) == [0.0, 0.1, 0.4]


def test_emergence_without_law_or_moment():
    plot.emergence(plt.subplots(3, 1)[1], HISTORY, Head(1, 1), Head(0, 1), None, None)


def test_what_was_not_run_says_so(ax):
    axes = plt.subplots(3, 1)[1]
    plot.emergence(axes, None, Head(1, 1), Head(0, 1), None, None)
    assert "not run" in words(axes[0]) and not axes[2].axison
    plot.head_strips(ax, {"ours": SCORES, "second seed": None, "untrained": SCORES / 10}, 0.02)
    assert "not run" in words(ax) and "L1H1" in words(ax) and "L1H0" not in words(ax)


@pytest.mark.parametrize("signed", [False, True])
def test_maps_write_their_numbers(ax, signed):
    plot.head_map(ax, SCORES, "score", [Head(1, 1)], signed)
    assert {".01", ".02", ".03", ".80"} <= set(words(ax).split()) and len(ax.patches) == 1
    assert ax.patches[0].get_xy() == (0.5, 0.5), "the frame is around layer 1, head 1"


def test_numbers_in_cells(ax):
    plot.head_map(ax, torch.tensor([[0.613, -0.05, 1.0, -0.001, 1.06]]), "recovered", signed=True)
    assert [text.get_text() for text in ax.texts] == [".61", "-.05", "1.00", ".00", "1.06"]


def test_large_maps_have_a_colour_bar(ax):
    plot.head_map(ax, torch.rand(12, 12), "score")
    assert not ax.texts and len(ax.figure.axes) == 2


def test_patch_map_names_the_positions_that_matter(ax):
    plot.patch_map(ax, torch.tensor([[0.0, 1.0, 0.0, 0.01]] * 2), ["·", "A/X", "B", "A"])
    assert "A/X" in words(ax) and "1.00" in words(ax) and ".01" not in words(ax)


def test_ablation_points_at_the_head(ax):
    effects = {Head(0, 0): {"value": 0.1, "se": 0.01, "n": 9}, Head(0, 1): {"value": 0.5, "se": 0.01, "n": 9}}
    plot.ablation(ax, 0.52, effects, Head(0, 0), Head(1, 1))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["without L0H0", "without L0H1"]
    assert ax.get_yticklabels()[0].get_color() == plot.POINTED and "L1H1" in words(ax)


@pytest.mark.parametrize("untrained", [None, SCORES / 10])
def test_copying(ax, untrained):
    plot.copying(ax, 2 * SCORES - 1, SCORES, untrained, Head(1, 1), "by embeddings")
    assert "L1H1" in words(ax) and ("untrained" in words(ax)) == (untrained is not None)


def test_an_excerpt_is_readable_text(ax):
    plot.attention_arrows(ax, looks(ATTENTION, TOKENS, [""] * 12), width=30)
    lines = {}
    for letter in ax.texts:
        lines.setdefault(letter.get_position()[1], []).append((letter.get_position()[0], letter.get_text()))
    shown = ["".join(text for _, text in sorted(line)) for _, line in sorted(lines.items(), reverse=True)]
    assert shown == ["Returns the $x_1$.⏎", "⏎", "The longer line of the text"]
    assert len(ax.patches) == 2 * 3, "two boxes and an arrow for each look"
    ax.figure.canvas.draw()


def test_long_text_is_wrapped():
    places, lines = plot._typeset(["abcd", " efgh", " ij", "\n"], 8)
    assert places == [(0, 0), (-1, 1), (4, 1), (7, 1)] and lines == 2


# --- training ---------------------------------------------------------------------------------------------------------

NAN = float("nan")
COLUMNS = ["seeds", "mse", "l0", "dead", "refined_mse", "refined_norm", "difference", "half"]
ROWS = {
    "whole": [3, 0.08, 16, 0.01, 0.07, 1.008, 0.0, 0.0], "same": [3, 0.081, 16, 0.02, 0.07, 1.0, 0.001, 0.002],
    "worse": [3, 0.18, 30, 0.4, 0.15, 1.2, 0.1, 0.01], "better": [3, 0.07, 16, 0.0, 0.06, 1.0, -0.01, 0.001],
    "never": [0, NAN, NAN, NAN, NAN, NAN, NAN, NAN],
}  # fmt: skip
SWEEP = pd.DataFrame.from_dict(ROWS, orient="index", columns=COLUMNS)
NAMES = {name: f"{name} one" for name in ROWS if name != "whole"}


@pytest.mark.parametrize("free", [None, ([2000, 8_000_000], [0.8, 1.3])])
def test_training(free):
    axes = plt.subplots(1, 3)[1]
    log = [{"tokens": n * 10**6, "mse": 1 / n, "dead": n / 100, "decoder_norm": 1.0} for n in (1, 2, 4)]
    plot.training(axes, log, free)
    assert list(axes[0].lines[0].get_xdata()) == [1, 2, 4] and axes[0].get_yscale() == "log"
    assert list(axes[1].lines[0].get_ydata()) == [1, 2, 4], "in per cent"
    assert ("not held at 1" in words(axes[2])) == (free is not None)


def test_learning_rates_point_at_the_best():
    axes = plt.subplots(1, 2)[1]
    curves = {0.01: ([50, 100], [0.4, 0.3]), 0.001: ([50, 100], [0.5, 0.2])}
    plot.learning_rates(axes, curves, {0.01: [0.31, 0.3], 0.001: [0.2, 0.21]}, quoted=4e-4)
    colors = {tuple(line.get_xdata()): line.get_color() for line in axes[1].lines}
    assert colors[(0.001, 0.001)] == plot.POINTED != colors[(0.01, 0.01)]
    assert {"0.01", "0.001"} <= set(words(axes[0]).split()) and "the journal's" in words(axes[1])


def test_forest_tells_better_from_worse_from_the_same():
    axes = plt.subplots(1, 2)[1]
    plot.forest(axes, SWEEP, NAMES, 0.01)
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == list(NAMES.values())
    assert [bar.lines[0].get_color() for bar in axes[0].containers] == [plot.INK, plot.POINTED, plot.SECOND]
    assert [text.get_text() for text in axes[0].texts] == ["not run"] and axes[0].texts[0].get_position()[1] == 3
    assert [line.get_xdata()[0] for line in axes[1].lines] == pytest.approx([1, 2, 40, 0])


def test_frontier_leaves_out_what_was_not_run(ax):
    families = {"TopK": SWEEP.loc[["worse", "whole", "never"]], "ReLU": SWEEP.loc[["never"]]}
    plot.frontier(ax, families, 16)
    assert "TopK" in words(ax) and "ReLU" not in words(ax)
    assert list(ax.lines[0].get_xdata()) == [16, 30], "in the order of L0"


def test_other_k(ax):
    plot.other_k(ax, [1, 4, 16], {"TopK": [0.9, 0.3, 0.1], "MultiTopK": None}, trained=4)
    assert "TopK" in words(ax).split() and "MultiTopK" not in words(ax) and "trained for" in words(ax)


def test_refinement(ax):
    plot.refinement(ax, SWEEP, {"worse": "ReLU", "never": "Gated"})
    assert "× 1.200" in words(ax) and "not run" in words(ax) and "× 1.008" not in words(ax)


def test_deaths_are_sorted_by_severity(ax):
    plot.deaths(ax, {"mild": (0.1, 0.0, 0.02), "severe": (9.0, 0.7, NAN)})
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["severe\nseverity 9.00", "mild\nseverity 0.10"]
    assert ax.lines[1].get_xdata()[0] == pytest.approx(70)


def test_ladder_sets_the_home_made_apart(ax):
    plot.ladder(ax, {"ours": {"home": 0.08, "small": 0.07}, "journal": {"home 32k": None}})
    assert {text.get_text(): text.get_color() for text in ax.texts} == {
        "home": plot.POINTED, "small": plot.OURS, "not run": plot.CONTROL,
    }  # fmt: skip


def test_sweeps_that_were_not_run_say_so(ax):
    two = plt.subplots(1, 2)[1]
    plot.learning_rates(two, {}, {}, 4e-4)
    assert words(two[0]).split()[:2] == ["not", "run"] and not two[1].axison
    for draw, nothing in ((plot.frontier, {"TopK": SWEEP.loc[["never"]]}), (plot.other_k, {"TopK": None})):
        ax = plt.subplots()[1]
        draw(*((ax, nothing, 16) if draw is plot.frontier else (ax, [1, 2], nothing, 16)))
        assert "not run" in words(ax)


# --- chapter 02 -------------------------------------------------------------------------------------------------------


def test_position_norms_mark_position_0():
    axes = plt.subplots(1, 2)[1]
    plot.position_norms(axes, Norms(torch.tensor([[30.0, 1, 2], [50, 3, 4]]), torch.tensor([1.0, 0.5, 0.4])))
    for ax, first in zip(axes, (40, 1), strict=True):
        assert ax.lines[1].get_ydata()[0] == pytest.approx(first) and ax.lines[1].get_color() == plot.POINTED


def test_walk_has_a_dot_and_a_ring_per_row(ax):
    plot.walk(ax, {"a": Estimate(0.2, 0.01), "b": Estimate(0.1, 0.01)}, dict.fromkeys("ab", Estimate(0.3, 0.0)), ["b"])
    assert [bar.lines[0].get_xdata()[0] for bar in ax.containers] == [0.2, 0.3, 0.1, 0.3]
    assert [tick.get_fontweight() for tick in ax.get_yticklabels()] == ["normal", "bold"]


def test_planted_shows_where_we_are(ax):
    falling = [Estimate(0.1, 0.001), Estimate(0.01, 0.001)]
    plot.planted(ax, [1, 30], {"journal": falling}, {"journal": plot.POINTED}, ours=5.0)
    assert ax.get_xscale() == ax.get_yscale() == "log" and "our position 0" in words(ax) and "journal" in words(ax)
    assert ax.lines[-1].get_xdata()[0] == 5


def test_error_by_takes_a_logarithm_where_told():
    axes = plt.subplots(1, 2)[1]
    groups = Groups([1.0, 100.0], [Estimate(0.2, 0.01), Estimate(0.1, 0.01)])
    plot.error_by(axes, {"often": {"small": groups}, "place": {"small": groups}}, {"small": plot.OURS}, "often")
    assert [ax.get_xscale() for ax in axes] == ["log", "linear"]
    assert all(list(ax.lines[0].get_ydata()) == [0.2, 0.1] and ax.get_ylim()[0] == 0 for ax in axes)


def test_densities_set_the_dead_apart():
    axes = plt.subplots(1, 2)[1]
    plot.densities(axes, {"small": torch.tensor([0.0, 0.1, 0.1, 0.001]), "large": None})
    assert "25.0%" in words(axes[0]) and "not run" in words(axes[1])
    assert sum(bar.get_height() for bar in axes[0].patches) == pytest.approx(100), "in per cent of all latents"


def test_without_an_sae_chapter_02_says_so(ax):
    plot.walk(ax, None, None, [])
    assert "not run" in words(ax)
    for draw in (lambda ax: plot.planted(ax, [1, 3], {"journal": None}, {}, 5.0),
                 lambda ax: plot.error_by([ax], {"place": {}}, {}, "often")):  # fmt: skip
        draw(other := plt.subplots()[1])
        assert "not run" in words(other)


# --- chapter 03 -------------------------------------------------------------------------------------------------------


def test_damage_points_at_those_that_owe_more_than_their_share(ax):
    plot.damage(ax, {"a": 0.2, "b": 0.5, "c": 0.3}, {"a": Estimate(0.5, 0.05), "b": Estimate(0.5, 0.05), "c": None})
    dots = [line for line in ax.lines if line.get_markersize() == 5]
    assert [line.get_color() for line in dots] == [plot.POINTED, plot.OURS]
    assert [line.get_xdata()[0] for line in ax.lines if line.get_markersize() == 7] == pytest.approx([20, 50, 30])


def test_concentration_ends_at_the_whole_and_counts_the_worst_first(ax):
    plot.concentration(ax, {"small": torch.tensor([[-1.0, 3.0], [1.0, 1.0]])}, {"small": plot.OURS})
    line = ax.lines[-1]
    assert line.get_xdata()[-1] == 100 and line.get_ydata()[-1] == pytest.approx(100)
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True))[25] == pytest.approx(75)
    plot.concentration(nothing := plt.subplots()[1], {}, {})
    assert "not run" in words(nothing)


def test_grafts_show_hosts_and_the_other_seed_or_say_that_there_are_none():
    axes = plt.subplots(1, 2)[1]
    series = {"small": [Estimate(0.1, 0.01)] * 3, "mean": [Estimate(2.0, 0.1)] * 3}
    colors = dict.fromkeys(series, plot.OURS)
    plot.grafts(axes, [0, 100, 9000], series, {"small": Estimate(4.0, 0.1), "mean": None}, 0.1, colors)
    assert "mean" in words(axes[0]) and "4.00" in words(axes[1]) and "not run" in words(axes[1])
    assert "at home" in words(axes[1])
    axes = plt.subplots(1, 2)[1]
    plot.grafts(axes, [], {"small": []}, {"small": None}, None, colors)
    assert "not run" in words(axes[0]) and "not run" in words(axes[1])


# --- chapter 04 -------------------------------------------------------------------------------------------------------

FOUND = Equivalent(0.4, 0.3, math.inf, "", {1: Estimate(0.5, 0.01), 2: Estimate(-0.1, 0.01)}, -9.0)


def test_visits_are_numbered_in_their_order(ax):
    plot.visits(ax, [0, 100, 400, 1000], FOUND)
    assert [text.get_text() for text in ax.texts] == ["1", "2"] and "nats" in words(ax)
    assert ax.patches[0].get_x() == pytest.approx(30), "the band ends with the training"
    assert ax.patches[0].get_x() + ax.patches[0].get_width() == pytest.approx(100)
    empty = plt.subplots()[1]
    plot.visits(empty, None, None)
    assert "not run" in words(empty)


def test_run_of_losses():
    axes, points = plt.subplots(1, 2)[1], [Estimate(x, 0.01) for x in (8.0, 4.0, 3.0)]
    plot.run_of_losses(axes, [0, 1000, 100_000], points, points[1:], {"small": 3.2})
    assert "small" in words(axes[0]) and "nats" in words(axes[0]) and "training tokens" in words(axes[1])
    assert len(axes[0].lines[0].get_xdata()) == 1, "only what is near the target"
    axes = plt.subplots(1, 2)[1]
    plot.run_of_losses(axes, [], [], [], {})
    assert "not run" in words(axes[0])


def test_shares_end_in_an_arrow_where_they_are_open(ax):
    plot.shares(ax, {"small": (0.4, 0.3, 0.45), "twin": (0.9, 0.8, math.inf), "large": None})
    assert {"small", "twin", "large", "40.0", "90.0"} <= set(words(ax).split()) and "not run" in words(ax)
    assert [line.get_marker() for line in ax.lines].count(">") == 1


# --- chapter 07 -------------------------------------------------------------------------------------------------------

RUNS = pd.DataFrame(
    {"n": [128, 256] * 2, "k": [4, 4, 8, 8], "mse": [0.4, 0.3, 0.3, 0.2], "converged": [True, False] * 2}
)
POINTS = pd.DataFrame({"n": [128, 128, 256], "seed": 0, "tokens": [1e5, 1e6, 1e6], "mse": [0.5, 0.4, 0.3]})


def test_learning_curves_name_their_sizes_and_show_the_live_run(ax):
    plot.learning_curves(ax, POINTS, "tokens", RUNS[RUNS.k == 4], live=POINTS[:1], laws=[Power(0.0, 0.1)])
    assert {"128", "256", "live"} <= set(words(ax).split())
    rings = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert [line.get_ydata()[0] for line in rings] == [0.3]


def test_error_by_size_keeps_a_vanishing_floor_out_of_the_picture(ax):
    plot.error_by_size(ax, RUNS, {8: Power(0.0, 0.2, -60.0)})
    assert "k = 8" in words(ax) and ax.get_ylim()[0] > 0.01


def test_without_a_sweep_scaling_figures_say_so(ax):
    plot.learning_curves(ax, POINTS[:0], "flops", RUNS[:0])
    plot.error_by_size(ax, RUNS[:0], {})
    assert "not run" in words(ax)


# --- chapter 10 -------------------------------------------------------------------------------------------------------


def test_cosines_fall_from_all_to_none(ax):
    plot.cosines(ax, {"seed": [0.9, 0.5, 0.7, 0.3], "large": None}, {"seed": plot.SECOND}, 0.7)
    curve = ax.lines[-1]
    assert list(curve.get_xdata()) == [0.3, 0.5, 0.7, 0.9] and list(curve.get_ydata()) == [100, 75, 50, 25]
    assert ax.lines[0].get_xdata()[0] == 0.7 and curve.get_color() == plot.SECOND
    plot.cosines(nothing := plt.subplots()[1], {"seed": None}, {}, 0.7)
    assert "not run" in words(nothing)


def test_split_tree_has_a_branch_for_each_and_colours_agreement(ax):
    rows = [("7: of $x$", 0.9, 0.5, True), ("9: in", 0.4, 0.0, False)]
    plot.split_tree(ax, "3: by", pd.DataFrame(rows, columns=["label", "cosine", "together", "agree"]))
    assert [line.get_color() for line in ax.lines] == [plot.OURS, plot.CONTROL]
    assert ax.lines[0].get_linewidth() > ax.lines[1].get_linewidth() > 0
    said = [text.get_text() for text in ax.texts]
    assert {"3: by", "9: in", "cosine 0.90, together 0.50"} <= set(said)
    plot.split_tree(nothing := plt.subplots()[1], "", None)
    assert "not run" in words(nothing)


def test_shaded_tokens_are_as_deep_as_their_digits_and_end_at_the_edge(ax):
    plot.shaded(ax, {"latent 5": [(["By", " $a_1$", "\n", " too long for it"], "0950")]}, width=12)
    assert [text.get_text() for text in ax.texts] == ["latent 5", "By", " $a_1$", "⏎"]
    assert [box.get_alpha() or 0 for box in ax.patches] == pytest.approx([0, 0.71, 0.43])
    assert [box.get_x() for box in ax.patches] == [0, 2, 8]
    ax.figure.canvas.draw()  # dollars are no formula
    plot.shaded(plt.subplots()[1], {})


# --- chapter 12 -------------------------------------------------------------------------------------------------------


def test_board_shows_each_autoencoder_once_and_open_or_missing_ends_not_at_all(ax):
    ours = {"chapter": Reading(3.0, 2.0, 4.0), "small": Reading(2.0, 1.5, math.inf), "chapter_large": None}
    groups = {"ours": ours, "theirs": {"chapter": 9.0, "large": 1.0}, "nobody's": dict.fromkeys(plot.MARKS)}
    plot.board(ax, groups, "error", log=False, band=("paper", [5, 6]))
    said = [text.get_text() for text in ax.texts]
    assert sorted(said) == ["chapter-large: not run", "not run", "paper"], "what an entry does not have is not missing"
    marks = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "None"]
    assert sorted(marks) == [1.0, 2.0, 3.0, 9.0]
    assert [2.0, 4.0] in [list(line.get_xdata()) for line in ax.lines]
    assert len({line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "None"}) == 4, "none hides another"


def test_verdicts_have_their_colours(ax):
    plot.verdicts(ax, {"ours": {"J1": "refuted", "J2": "not run"}, "theirs": {"J1": "explained", "J2": "reproduced"}})
    tiles = [to_hex(tile.get_facecolor()).lower() for tile in ax.patches]
    assert tiles == [plot.TILES[word].lower() for word in ("refuted", "not run", "explained", "reproduced")]
    assert {"J1", "J2", "ours", "theirs", "ref", "exp", "rep", "–"} <= set(words(ax).split())


def estimates(*values):
    return [Estimate(value, 0.01) for value in values]


def test_two_questions_have_a_dot_a_bar_and_a_ring(ax):
    plot.two_questions(ax, {"latents": estimates(0.1, 0.2, 0.6), "channels": None}, gaussian=0.64)
    drawn = [(line.get_marker(), line.get_xdata()[0]) for line in ax.lines if line.get_marker() != "None"]
    assert drawn == [("|", 20), ("o", 10), ("o", 60)] and ax.lines[3].get_markerfacecolor() == "white"
    assert "not run" in words(ax) and "2/π" in words(ax)


def test_decay_is_relative_to_the_ablated_token(ax):
    plot.decay(ax, {"latents": estimates(2.0, 0.5), "channels": None, "random": estimates(4.0, 1.0)})
    assert [list(line.get_ydata()) for line in ax.lines] == [[1, 0.25], [1, 0.25]]
    assert [line.get_color() for line in ax.lines] == [plot.KINDS[0], plot.KINDS[2]], "colours do not move up"
    plot.decay(nothing := plt.subplots()[1], {"latents": None})
    assert "not run" in words(nothing)


def test_sparsity_curves_begin_at_zero(ax):
    series = {"latents": estimates(0.3, 0.2, 0.1), "channels": None}
    plot.sparsity_curves(ax, [0, 1, 32], series, "index", "sparsity", mark=16, reference=[0.6, 0.6, 0.6])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "32"]
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] == pytest.approx(0.648)
    assert len(ax.lines) == 3 and "latents" in words(ax) and "channels" not in words(ax)


def test_against_random_marks_what_is_no_better(ax):
    random = torch.linspace(-1, 1, 21)[:, None].expand(21, 3)
    plot.against_random(ax, torch.tensor([2.0, 0.5, 3.0]), random, "gain")
    assert [round(y, 6) for _, y in ax.collections[1].get_offsets().tolist()] == [0.5, 2.0, 3.0], "in order"
    assert [to_hex(c).lower() for c in ax.collections[1].get_facecolors()] == [
        plot.POINTED.lower(), plot.OURS.lower(), plot.OURS.lower(),
    ]  # fmt: skip
    assert ax.collections[0].get_segments()[0][:, 1].tolist() == pytest.approx([-0.9, 0.9])
    plot.against_random(nothing := plt.subplots()[1], None, None, "gain")
    assert "not run" in words(nothing)


def test_probe_tasks_are_in_order_of_the_first_list(ax):
    values = {"latent": [0.8, 0.2], "channel": [0.9, 0.7], "token": None, "all": [0.5, 0.1]}
    plot.probe_tasks(ax, ["URL", "number"], values)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["number", "URL"]
    assert [list(line.get_xdata()) for line in ax.lines[1:]] == [[0.2, 0.8], [0.7, 0.9], [0.1, 0.5]]


def test_probe_tasks_that_were_not_run_say_so(ax):
    plot.probe_tasks(ax, ["URL", "number"], {"latent": [0.8, 0.2], "a": None, "b": None, "c": None}, ["German"])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["number", "URL", "German"]
    assert [text.get_position()[1] for text in ax.texts if text.get_text() == "not run"] == [2]
    plot.probe_tasks(none := plt.subplots()[1], [], dict.fromkeys("abcd"), ["German"])
    assert "not run" in words(none)


def test_probe_sweep_has_a_line_per_k_and_one_along_the_run():
    rows = [(n, k, 0, 9, 1 / n, 0.01, True, k == 4) for n in (128, 256) for k in (4, 8)]
    rows += [(256, 8, 0, 3, 0.9, 0.01, False, False)]
    table = pd.DataFrame(rows, columns=["n", "k", "seed", "tokens", "value", "se", "end", "alone"]).query(
        "n + k != 136"
    )
    axes = plt.subplots(1, 2)[1]
    plot.probe_sweep(axes, table)
    assert [list(line.get_xdata()) for line in axes[0].lines] == [[128, 256], [256]]
    assert list(axes[1].lines[0].get_ydata()) == [0.9, 1 / 256] and "k = 8" in words(axes[0])
    assert axes[1].get_ylim()[0] < 1 / 256 - 2 * 0.01
    plot.probe_sweep(axes := plt.subplots(1, 2)[1], table.iloc[:0])
    assert "not run" in words(axes[0])
