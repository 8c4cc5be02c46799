"""The book's figures: one function per kind. Each draws on the `ax` it is given and returns None.

Where a measurement was not run, its value is None and the figure says so. Colours mean the same everywhere: blue is
the model under study, vermilion what the text points at, grey a control, green a second seed, dashes a published law.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from saelib.checkpoints import Equivalent
from saelib.induction import Head, History
from saelib.metrics import Estimate
from saelib.profile import ROOT
from saelib.reconstruction import Groups, Norms
from saelib.scaling import Power
from saelib.scoreboard import Reading

OURS, POINTED, SECOND, CONTROL, INK = "#0072B2", "#D55E00", "#009E73", "#9a9a9a", "#2b2b2b"
SHARE = LinearSegmentedColormap.from_list("share", ["#f4f6f7", "#cfe3f1", "#6aaed6", "#0072B2", "#003a5d"])
_SIGNED = {0: "#8c3800", 0.25: "#f6cdb0", 0.5: "#f5f5f5", 0.63: "#b5d5ea", 0.86: "#0072B2", 1: "#003a5d"}
RECOVERY = LinearSegmentedColormap.from_list("recovery", list(_SIGNED.items()))
"""`SHARE` is for numbers between 0 and 1, `RECOVERY` for those around 0: vermilion below, blue above."""
DASHED = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3))}


def use_style() -> None:
    """Take the book's style for all figures that follow."""
    plt.style.use(ROOT / "saelib" / "saelib.mplstyle")


def _note(ax: Axes, text: str, at: tuple[float, float], color: str = INK, **keywords) -> None:
    """A label at the data, in place of a legend."""
    ax.annotate(text, at, **{"textcoords": "offset points", "color": color, "fontsize": 8.5, **keywords})


def _end_labels(ax: Axes, x: float, ends: Mapping[str, tuple[float, object]]) -> None:
    """Labels right of the lines' ends, moved apart where they would touch."""
    ax.figure.draw_without_rendering()
    used = -math.inf
    for label, (value, color) in sorted(ends.items(), key=lambda item: item[1][0]):
        height = ax.transData.transform((x, value))[1] * 72 / ax.figure.dpi  # points
        used = max(used + 10.5, height)
        _note(ax, label, (x, value), color, xytext=(7, used - height), va="center")


def _log(axis: Axis, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Plain numbers along a logarithmic axis."""
    axis.set(major_locator=LogLocator(subs=subs), minor_locator=NullLocator(), major_formatter="{x:g}")


def _plain(axis: Axis) -> None:
    """Plain numbers at the ticks that are set."""
    axis.set(minor_locator=NullLocator(), major_formatter="{x:g}")


def _rows(
    ax: Axes, values: Mapping[str, object], above: float = 0.6, below: float = 0.4
) -> Iterator[tuple[int, str, Any]]:
    """A row for each name, downwards. Yields row, name and value; where that is None, the row says "not run"."""
    ax.set_yticks(range(len(values)), values)
    ax.set_ylim(len(values) - below, -above)
    _upright(ax)
    for row, (name, found) in enumerate(values.items()):
        if found is None:
            at = ax.get_yaxis_transform()
            ax.text(0.5, row, "not run", color=CONTROL, ha="center", va="center", transform=at)
        else:
            yield row, name, found


def _upright(ax: Axes) -> None:
    """Grid lines for the x axis only."""
    ax.grid(True, axis="x")
    ax.grid(False, axis="y")


def _interval(ax: Axes, found: Estimate, row: float, color: str, markersize: float, **marker) -> None:
    """A dot with its 95 % interval."""
    marker |= {"color": color, "marker": "o", "markersize": markersize, "linewidth": 1.2}
    ax.errorbar(found.value, row, xerr=1.96 * found.se, **marker)


def residual_norms(ax: Axes, norms: Float[Tensor, "layer pos"]) -> None:
    """Mean length of the residual stream after each layer, by position; position 0 marked."""
    layers, last = len(norms), norms.shape[1] - 1
    shades = [SHARE(0.4 + 0.6 * layer / max(layers - 1, 1)) for layer in range(layers)]
    ax.set(yscale="log", xlabel="position in the context (tokens)", ylabel="length of the residual stream")
    ax.set(xlim=(-2, last * 1.17), xticks=range(0, last + 2, max((last + 1) // 4, 1)))
    _log(ax.yaxis)
    for shade, row in zip(shades, norms.tolist(), strict=True):
        ax.plot(row, color=shade, linewidth=1.4)
        ax.plot(0, row[0], "o", color=POINTED, markersize=4)
    named = range(layers) if layers <= 6 else (0, layers - 1)
    _end_labels(ax, last, {f"after layer {layer}": (norms[layer, -1].item(), shades[layer]) for layer in named})


def loss_by_position(
    ax: Axes, losses: Float[Tensor, "n pos"], segment: int, chance: float, untrained: Float[Tensor, "m pos"] | None
) -> None:
    """Loss on repeated random tokens by position of the predicted token, with a band of one standard error."""
    mean, error = losses.mean(0), losses.std(0) / math.sqrt(len(losses))
    x = range(1, losses.shape[1] + 1)
    last, seam = x[-1], x[-1] + 1 - segment  # the first repeated token stands at the seam
    top = max(mean.max().item(), chance) * 1.06
    ax.set(xlabel="position of the predicted token", ylabel="loss (nats per token)")
    ax.set(xlim=(0, last * 1.19), ylim=(0, top), xticks=[1, seam // 2, seam, seam + segment // 2, last])
    ax.axvspan(seam - 0.5, last + 0.5, color=OURS, alpha=0.06, linewidth=0)
    ax.plot([0, last], [chance, chance], **DASHED)
    ends = {"blind guess, ln V": (chance, INK)}
    if untrained is not None:
        ax.plot(x, untrained.mean(0), color=CONTROL, linewidth=1.2)
        ends["untrained"] = (untrained.mean(0)[-1].item(), CONTROL)
    ax.fill_between(x, mean - error, mean + error, color=OURS, alpha=0.25, linewidth=0)
    ax.plot(x, mean, color=OURS)
    _note(ax, "read for the first time", (seam / 2, top), xytext=(0, 2), ha="center")
    _note(ax, "the same tokens once more", ((seam + last) / 2, top), OURS, xytext=(0, 2), ha="center")
    _end_labels(ax, last, ends)


def emergence(
    axes: Sequence[Axes], history: History | None, head: Head, previous: Head, found: tuple[float, int, int] | None,
    law: float | None, plain: tuple[Sequence[int], Sequence[float]] | None = None,
) -> None:  # fmt: skip
    """Three panels over training tokens: scores of heads, loss gap (and that of a `plain` control), loss on text."""
    scores, gaps, texts = axes
    if history is None:
        for ax in axes:
            ax.set_axis_off()
        scores.figure.set_figheight(1.5)
        return _note(scores, "not run: the profile has no training checkpoints", (0.3, 0.5), CONTROL, xytext=(0, 0))
    x, own, before = history.tokens, history.induction[:, *head], history.previous[:, *previous]
    scores.plot(x, history.induction.flatten(1), color=CONTROL, linewidth=0.6, alpha=0.6)
    scores.plot(x, before, color=POINTED, marker=".")
    scores.plot(x, own, color=OURS, marker=".")
    gaps.plot(x, history.gap, color=OURS, marker=".")
    texts.plot(x, history.text_loss, color=INK, marker=".")
    scores.set(ylabel="score of a head", ylim=(-0.03, 1.03))
    gaps.set(ylabel="loss gap\n(nats)")
    texts.set(ylabel="loss on text\n(nats)", xlabel="training tokens")
    _token_axes(axes, x, found, law)
    _end_labels(scores, x[-1], {f"{previous}, one back": (before[-1], POINTED), f"{head}, induction": (own[-1], OURS)})
    if plain is not None:
        gaps.plot(*plain, color=CONTROL, linewidth=1.2, marker=".", markersize=4)
        _end_labels(gaps, plain[0][-1], {"plain text only": (plain[1][-1], CONTROL)})
        _end_labels(gaps, x[-1], {"with repeats": (history.gap[-1], OURS)})


def _token_axes(
    axes: Sequence[Axes], tokens: Sequence[int], found: tuple[float, int, int] | None, law: float | None
) -> None:
    """Training tokens from 0 on; a band between the checkpoints around the moment found, a line at the law's."""
    first, right = min(filter(None, tokens)), max(tokens[-1], law or 0) * 4.2
    ticks = [0, *(10**i for i in range(round(math.log10(first)), math.ceil(math.log10(right))))]
    for ax in axes:
        ax.set_xscale("symlog", linthresh=first, linscale=0.45)
        ax.set_xlim(-0.3 * first, right)
        if found is not None:
            ax.axvspan(*found[1:], color=OURS, alpha=0.13, linewidth=0)
        if law is not None:
            ax.axvline(law, **DASHED)
    if law is not None:
        _note(axes[0], "published law", (law, 1.03), xytext=(0, 3), ha="center")
    if found is not None:
        _note(axes[1], "half way", (found[0], axes[1].get_ylim()[1]), OURS, xytext=(-6, -3), ha="right", va="top")
    last = axes[-1]
    last.set_xticks(ticks, [EngFormatter().format_eng(count).replace("G", "B") for count in ticks])
    last.text(first / 2, 0, "//", transform=last.get_xaxis_transform(), ha="center", va="center", color=CONTROL)


def head_map(
    ax: Axes, values: Float[Tensor, "layer head"], title: str, marked: Sequence[Head] = (), signed: bool = False
) -> None:
    """One number for every head: layers upwards, heads to the right; `marked` heads framed. `signed`: from -1 to 1."""
    _cells(ax, values, signed)
    for head in marked:
        frame = {"fill": False, "edgecolor": POINTED, "linewidth": 2, "zorder": 3}
        ax.add_patch(Rectangle((head.index - 0.5, head.layer - 0.5), 1, 1, **frame))
    ax.set(title=title, xlabel="head", ylabel="layer", xticks=range(values.shape[1]))


def patch_map(ax: Axes, values: Float[Tensor, "layer pos"], labels: Sequence[str]) -> None:
    """Recovery by layer and position."""
    _cells(ax, values, signed=True, least=0.05)
    ax.set(ylabel="residual stream before layer", xlabel="position")
    ax.set_xticks(range(len(labels)), labels)
    for tick, label in zip(ax.get_xticklabels(), labels, strict=True):
        tick.set(color=POINTED if label != "·" else CONTROL, fontweight="bold" if label != "·" else "normal")


def _cells(ax: Axes, values: Tensor, signed: bool, least: float = 0.0) -> None:
    """Coloured cells with their numbers from `least` on; where there are too many for numbers, a colour bar."""
    rows, columns = (range(size) for size in values.shape)
    ax.grid(False)
    colours = {"cmap": RECOVERY if signed else SHARE, "vmin": -1 if signed else 0, "vmax": 1}
    image = ax.pcolormesh(columns, rows, values, **colours, edgecolors="white", linewidth=1.5)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_yticks(rows)
    if values.numel() > 100:
        ax.figure.colorbar(image, ax=ax, shrink=0.8).outline.set_visible(False)
        return
    for row, column in (values.abs() >= least).nonzero().tolist():
        value = values[row, column].item()
        color, text = "white" if abs(value) > 0.55 else INK, f"{value:z.2f}".replace("0.", ".", 1)
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color=color, zorder=4)


def ablation(
    ax: Axes, untouched: float, effects: Mapping[Head, Mapping[str, float]], pointed: Head, target: Head
) -> None:
    """The target head's score with one other head silenced (`value` and `se` each), beside the `untouched` one."""
    order = sorted(effects, key=lambda head: effects[head]["value"])
    for row, head in enumerate(order):
        value, error, color = effects[head]["value"], effects[head]["se"], POINTED if head == pointed else CONTROL
        ax.plot([untouched, value], [row, row], color=color, linewidth=1.2, alpha=0.7)
        ax.errorbar(value, row, xerr=error, color=color, marker="o", markersize=6, linewidth=1.2)
    ax.axvline(untouched, color=OURS, linewidth=1.4)
    _note(ax, "untouched", (untouched, len(order) - 0.45), OURS, xytext=(0, 2), ha="center", va="bottom")
    ax.set_yticks(range(len(order)), [f"without {head}" for head in order])
    ax.get_yticklabels()[order.index(pointed)].set(color=POINTED, fontweight="bold")
    ax.set(xlabel=f"induction score of {target}", xlim=(0, 1.02), ylim=(-0.6, len(order) - 0.1))
    _upright(ax)


def copying(
    ax: Axes, scores: Float[Tensor, "layer head"], induction: Float[Tensor, "layer head"],
    untrained: Float[Tensor, "layer head"] | None, named: Head, title: str,
) -> None:  # fmt: skip
    """Every head by its OV copying score and its induction score; the untrained model's heads as ticks below."""
    ax.axvline(0, color=CONTROL, linewidth=0.8)
    if untrained is not None:
        ax.plot(untrained.flatten(), [-0.1] * untrained.numel(), "|", color=CONTROL, markersize=8)
        ax.text(-1.03, -0.1, "untrained", color=CONTROL, va="center", fontsize=8.5)
    ax.plot(scores.flatten(), induction.flatten(), "o", color=OURS, alpha=0.6)
    at = scores[named].item(), induction[named].item()
    ax.plot(*at, "o", color=POINTED)
    _note(ax, str(named), at, POINTED, xytext=(5, 7), ha="right" if at[0] > 0 else "center", va="bottom")
    ax.set(title=title, xlabel="OV copying score\nlowers ← the token it looks at → raises", ylabel="induction score")
    ax.set(xlim=(-1.08, 1.08), ylim=(-0.17, 1.05), xticks=[-1, -0.5, 0, 0.5, 1], yticks=[0, 0.25, 0.5, 0.75, 1])
    ax.label_outer()


def head_strips(ax: Axes, groups: Mapping[str, Float[Tensor, "layer head"] | None], reference: float) -> None:
    """One row of dots per model, one dot per head; those from 0.1 on carry their name."""
    ax.axvline(reference, **DASHED | {"color": CONTROL})
    for row, _, scores in _rows(ax, groups):
        color = (OURS, SECOND, CONTROL)[row]
        ax.plot(scores.flatten(), [row] * scores.numel(), "o", color=color, alpha=0.65, markersize=7)
        named = sorted((scores[at].item(), str(Head(*at))) for at in map(tuple, (scores >= 0.1).nonzero().tolist()))
        for rank, (score, name) in enumerate(named):  # neighbours above and below in turn
            _note(ax, name, (score, row), color, xytext=(0, -17 if rank % 2 else 8), ha="center")
    ax.set(xlabel="induction score of each head", xlim=(-0.02, 1.02))


def attention_arrows(ax: Axes, looks: pd.DataFrame, arrows: int = 6, width: int = 64) -> None:
    """`induction.looks` as running text, arrows from the strongest readers to where they look; sets the height."""
    places, lines = _typeset(looks.token, width)
    shown = [token.replace("\n", "⏎") for token in looks.token]
    figure = ax.figure
    figure.set(layout_engine="none", figheight=0.36 * (lines + 1.4))
    ax.set(position=(0, 0, 1, 1), xlim=(-1, width + 1), ylim=(-lines + 0.3, 1.7))
    ax.set_axis_off()
    for query, look in looks[looks.weight > 0].nlargest(arrows, "weight").iterrows():
        ends = [_box(ax, shown[i], places[i], color) for i, color in ((query, POINTED), (look.key, OURS))]
        bend = 0.3 * min(1.0, 14 / max(abs(ends[0][0] - ends[1][0]), 1))  # long arrows rise no higher than short ones
        ax.add_patch(FancyArrowPatch(
            *ends, connectionstyle=f"arc3,rad={bend:.3f}", arrowstyle="-|>", mutation_scale=9, color=POINTED,
            linewidth=0.5 + 1.3 * look.weight, alpha=0.3 + 0.6 * look.weight, shrinkA=1, shrinkB=1, clip_on=False,
        ))  # fmt: skip
    size = figure.get_figwidth() * 72 / (width + 2) / 0.602  # the width of a character, in font sizes
    for token, (column, line) in zip(shown, places, strict=True):
        for offset, letter in enumerate(token):  # one by one: a line of text would not keep to the grid
            ax.text(column + offset + 0.5, -line, letter, family="DejaVu Sans Mono", fontsize=size, ha="center",
                    va="center_baseline", color=CONTROL if letter == "⏎" else INK, parse_math=False)  # fmt: skip


def _typeset(tokens: Sequence[str], width: int) -> tuple[list[tuple[int, int]], int]:
    """Column and line of each token in monospaced text of `width` columns, and the number of lines."""
    places, column, line = [], 0, 0
    for token in tokens:
        if column > 0 and column + len(token.rstrip("\n")) > width:
            column, line = -int(token.startswith(" ")), line + 1  # the space between words hangs over the edge
        places.append((column, line))
        column += len(token)
        if "\n" in token:
            column, line = 0, line + 1
    return places, line + (column > 0)


def _box(ax: Axes, token: str, place: tuple[int, int], color: str) -> tuple[float, float]:
    """Colour behind a token; returns the middle of its upper edge."""
    left = place[0] + len(token) - len(token.lstrip())
    size = max(len(token.strip()), 1)
    ax.add_patch(Rectangle((left + 0.06, -place[1] - 0.36), size - 0.12, 0.72, color=color, alpha=0.2, linewidth=0))
    return left + size / 2, -place[1] + 0.36


def training(
    axes: Sequence[Axes], log: Sequence[Mapping[str, float]], free: tuple[Sequence[int], Sequence[float]] | None
) -> None:
    """Error, dead share and decoder norm over tokens; `free`: tokens and norms of a run that does not hold them."""
    tokens = [line["tokens"] / 1e6 for line in log]
    names = {"mse": "normalised MSE", "dead": "dead latents (%)", "decoder_norm": "mean decoder norm"}
    for ax, (name, label) in zip(axes, names.items(), strict=True):
        values = [line[name] * (100 if name == "dead" else 1) for line in log]
        ax.plot(tokens, values, color=OURS)
        ax.set(title=label, xlabel="million tokens", xlim=(0, None))
    axes[0].set(yscale="log")
    _log(axes[0].yaxis)
    axes[1].set(ylim=(0, None))
    if free is not None:
        counts, norms = [count / 1e6 for count in free[0]], free[1]
        axes[2].plot(counts, norms, color=CONTROL)
        _note(axes[2], "not held at 1", (counts[-1], norms[-1]), CONTROL, xytext=(0, -20), ha="right", va="top")


def learning_rates(
    axes: Sequence[Axes], curves: Mapping[float, tuple[Sequence[int], Sequence[float]]],
    final: Mapping[float, Sequence[float]], quoted: float,
) -> None:  # fmt: skip
    """Left: error while training, one line per rate (darker is larger). Right: error at the end, a dot per seed."""
    if not curves:
        return _not_run(axes)
    ends, best = {}, min(final, key=lambda rate: min(final[rate]))
    for rank, (rate, (steps, errors)) in enumerate(sorted(curves.items())):
        color = POINTED if rate == best else SHARE(0.35 + 0.65 * rank / max(len(curves) - 1, 1))
        axes[0].plot(steps, errors, color=color, linewidth=1.4)
        axes[1].plot([rate] * len(final[rate]), final[rate], "o", color=color, alpha=0.8)
        ends[f"{rate:g}"] = (errors[-1], color)
    for ax in axes:
        ax.set(yscale="log", ylabel="normalised MSE")
        _log(ax.yaxis, (1, 1.5, 2, 3, 5, 7))
    last = max(steps[-1] for steps, _ in curves.values())
    axes[0].set(xlabel="step", xlim=(0, 1.28 * last))
    axes[0].axvline(1000, **DASHED | {"color": CONTROL})
    _end_labels(axes[0], last, ends)
    axes[1].axvline(quoted, **DASHED)
    axes[1].set(xscale="log", xlabel="learning rate")
    _note(axes[1], "the journal's", (quoted, axes[1].get_ylim()[1]), xytext=(4, -2), va="top")


def forest(axes: Sequence[Axes], table: pd.DataFrame, names: Mapping[str, str], base: float) -> None:
    """What each variant adds to the error, with its 95 % interval, and its dead share beside that of the `base`.

    `table` is `study.sweep_table`'s, `names` say what its rows are called. Linear up to 0.002, logarithmic beyond.
    """
    left, right = axes
    for ax, at in ((left, 0), (right, 100 * base)):
        ax.axvline(at, color=OURS, linewidth=1.2)
    _upright(right)
    for row, _, found in _rows(left, _of_table(table, names), 0.5, 0.5):
        color = INK if abs(found.difference) <= found.half else POINTED if found.difference > 0 else SECOND
        left.errorbar(found.difference, row, xerr=found.half, color=color, marker="o", markersize=5, linewidth=1.2)
        right.plot(100 * found.dead, row, "o", color=INK, markersize=5)
    left.set_xscale("symlog", linthresh=2e-3, linscale=1.2)
    left.set(xlabel="added to the normalised MSE")
    _plain(left.xaxis)
    right.set(ylim=(len(names) - 0.5, -0.5), yticks=[], xlabel="dead latents (%)")
    right.set_xmargin(0.08)


def _of_table(table: pd.DataFrame, names: Mapping[str, str]) -> dict[str, pd.Series | None]:
    """Rows of `study.sweep_table` by what they are called; None: not run."""
    return {label: table.loc[name] if table.seeds[name] else None for name, label in names.items()}


def frontier(ax: Axes, families: Mapping[str, pd.DataFrame], l0: float) -> None:
    """Error over active latents per token, one line per architecture; dashed at the `l0` at which they are compared."""
    shown = {name: runs.dropna(subset="mse").sort_values("l0") for name, runs in families.items()}
    shown = {name: runs for name, runs in shown.items() if len(runs)}
    if not shown:
        return _not_run([ax])
    colors = dict(zip(families, (OURS, POINTED, SECOND, INK, "#CC79A7"), strict=False))
    ax.set(xscale="log", yscale="log", xlabel="active latents per token (L0)", ylabel="normalised MSE")
    for name, runs in shown.items():
        ax.plot(runs.l0, runs.mse, color=colors[name], marker="o", markersize=5, linewidth=1.3)
    ax.axvline(l0, **DASHED | {"color": CONTROL})
    low, high = (edge(edge(runs.l0) for runs in shown.values()) for edge in (min, max))
    ax.set_xlim(low / 1.4, high * 2.2)
    for axis in (ax.xaxis, ax.yaxis):
        _log(axis)
    for rank, (name, runs) in enumerate(shown.items()):  # neighbours above and below in turn
        at = runs.l0.iloc[-1], runs.mse.iloc[-1]
        _note(ax, name, at, colors[name], xytext=(7, -6 if rank % 2 else 6), va="center")


def other_k(ax: Axes, ks: Sequence[int], curves: Mapping[str, Sequence[float] | None], trained: int) -> None:
    """Error when another number of latents is kept than the `trained` one; the first curve is the plain one."""
    if not any(curves.values()):
        return _not_run([ax])
    ax.set(xscale="log", yscale="log", xlabel="latents kept per token (k)", ylabel="normalised MSE", xticks=ks)
    ax.axvline(trained, **DASHED | {"color": CONTROL})
    ends = {}
    for (name, values), color in zip(curves.items(), (OURS, POINTED), strict=False):
        if values:
            ax.plot(ks, values, color=color, marker=".")
            ends[name] = (values[-1], color)
    ax.set_xlim(ks[0] / 1.2, ks[-1] * 3)
    _plain(ax.xaxis)
    _log(ax.yaxis)
    _note(ax, "trained for", (trained, ax.get_ylim()[1]), CONTROL, xytext=(4, -2), va="top")
    _end_labels(ax, ks[-1], ends)


def refinement(ax: Axes, table: pd.DataFrame, names: Mapping[str, str]) -> None:
    """From the error with an SAE's own values to that with the best ones, and by how much z W_dec grows."""
    right = table.mse[list(names)].max()
    for row, _, found in _rows(ax, _of_table(table, names), 0.5, 0.5):
        ax.plot([found.mse, found.refined_mse], [row, row], color=CONTROL, linewidth=1.2)
        ax.plot(found.mse, row, "o", color=OURS)
        ax.plot(found.refined_mse, row, "o", color=POINTED)
        _note(ax, f"× {found.refined_norm:.3f}", (right, row), xytext=(12, 0), va="center")
    ax.set_xlabel("normalised MSE: own values (blue), best values (orange)")
    ax.set_xlim(0, 1.15 * right if right > 0 else 1)


def deaths(ax: Axes, rows: Mapping[str, tuple[float, float, float]]) -> None:
    """Share of dead latents before training (ring) and after it (dot; NaN: not run), by outlier severity."""
    order = sorted(rows.items(), key=lambda item: -item[1][0])
    labelled = {f"{name}\nseverity {found[0]:.2f}": found for name, found in order}
    for row, _, (_, before, after) in _rows(ax, labelled, 0.5, 0.5):
        ax.plot([100 * before, 100 * after], [row, row], color=CONTROL, linewidth=1.2)
        ax.plot(100 * before, row, "o", markerfacecolor="white", color=POINTED, markersize=7)
        ax.plot(100 * after, row, "o", color=OURS, markersize=5)
    ax.set_xlabel("dead latents (%): before training (ring), after it (dot)")
    ax.set_xlim(min(ax.get_xlim()[0], -0.5), None)


def ladder(ax: Axes, groups: Mapping[str, Mapping[str, float | None]]) -> None:
    """One row of dots per group on a logarithmic axis, each with its name; a group's first is the home-made one."""
    there = {group: {name: value for name, value in of.items() if value is not None} for group, of in groups.items()}
    for row, _, values in _rows(ax, {group: found or None for group, found in there.items()}):
        for rank, name in enumerate(sorted(values, key=values.get)):
            color = POINTED if name.startswith("home") else OURS
            ax.plot(values[name], row, "o", color=color, markersize=7)
            _note(ax, name, (values[name], row), color, xytext=(0, -17 if rank % 2 else 8), ha="center")
    ax.margins(x=0.12)
    ax.set(xscale="log", xlabel="normalised MSE")
    _log(ax.xaxis)


# --- of every chapter -------------------------------------------------------------------------------------------------

BY_SAE = {
    "small": OURS, "large": INK, "chapter": POINTED, "chapter-large": "#CC79A7",
    "small-seed-1": SECOND, "small-step-0": CONTROL,
}  # fmt: skip
"""The colour that an autoencoder has in every figure."""


def rows(
    ax: Axes, values: Mapping[str, Estimate | None], xlabel: str, references: Mapping[str, float] | None = None,
    fmt: str = ".3f", colors: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """One row per name: a dot with its 95 % interval and its number; None: not run. `references`: dashed lines."""
    for name, at in (references or {}).items():
        ax.axvline(at, **DASHED)
        _note(ax, name, (at, -0.6), xytext=(0, 2), ha="center", va="bottom")
    for row, name, found in _rows(ax, values):
        color = (colors or {}).get(name, OURS)
        _interval(ax, found, row, color, 6)
        blank = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # else a dashed line may strike the number
        _note(ax, format(found.value, fmt), (found.value, row), color, xytext=(0, 7), ha="center", bbox=blank)
    ax.set_xlabel(xlabel)
    ax.margins(x=0.12)


def lines(
    ax: Axes, x: Sequence[float], series: Mapping[str, Sequence[Estimate] | None], colors: Mapping[str, str],
    xlabel: str, ylabel: str,
) -> None:  # fmt: skip
    """Values over x, a band of 95 % around each line, names at the right ends. Set scales and limits before."""
    shown = {name: found for name, found in series.items() if found}
    if not shown:
        return _not_run([ax])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ends = {}
    for name, found in shown.items():
        value = [point.value for point in found]
        low, high = ([point.value + sign * 1.96 * point.se for point in found] for sign in (-1, 1))
        ax.fill_between(x, low, high, color=colors[name], alpha=0.2, linewidth=0)
        ax.plot(x, value, color=colors[name], linewidth=1.4)
        ends[name] = (value[-1], colors[name])
    _end_labels(ax, x[-1], ends)


def _not_run(axes: Sequence[Axes]) -> None:
    for ax in axes:
        ax.set_axis_off()
    axes[0].text(0.5, 0.5, "not run", color=CONTROL, ha="center", va="center", transform=axes[0].transAxes)


# --- chapter 02 -------------------------------------------------------------------------------------------------------


def position_norms(axes: Sequence[Axes], norms: Norms) -> None:
    """Lengths by position (median, middle nine tenths), and how alike the directions are; position 0 marked."""
    low, median, high = (norms.length.quantile(share, dim=0) for share in (0.05, 0.5, 0.95))
    x = range(len(median))
    axes[0].fill_between(x, low, high, color=OURS, alpha=0.2, linewidth=0)
    axes[0].set(yscale="log", ylabel="length of the activation")
    _log(axes[0].yaxis)
    axes[1].set(ylabel="length of the mean unit vector", ylim=(0, 1.04))
    for ax, values in zip(axes, (median, norms.alike), strict=True):
        ax.plot(x, values, color=OURS)
        ax.plot(0, values[0], "o", color=POINTED)
        ax.set(xlabel="position in the context (tokens)")


def walk(
    ax: Axes, everywhere: Mapping[str, Estimate] | None, elsewhere: Mapping[str, Estimate] | None, bold: Sequence[str]
) -> None:  # fmt: skip
    """One SAE's error by one convention per row, over all positions (dot) and without position 0 (ring)."""
    if not everywhere:
        return _not_run([ax])
    for row, name, found in _rows(ax, everywhere, 0.7, 0.5):
        _interval(ax, found, row, OURS, 7)
        _interval(ax, elsewhere[name], row, OURS, 7, markerfacecolor="white")
        _note(ax, f"{found.value:.3f}", (found.value, row), xytext=(0, 8), ha="center")
    for tick, name in zip(ax.get_yticklabels(), everywhere, strict=True):
        tick.set_fontweight("bold" if name in bold else "normal")
    ax.set_xlabel("error: all positions (dot), without position 0 (ring)")
    ax.set_xlim(0, 1.1 * max(found.value for found in everywhere.values()))


def planted(
    ax: Axes, times: Sequence[float], series: Mapping[str, Sequence[Estimate]], colors: Mapping[str, str], ours: float
) -> None:
    """Errors over the length given to position 0, both logarithmic; `ours` is the length that it has by itself."""
    ax.set(xscale="log", yscale="log", xlim=(times[0], times[-1] * 7))
    lines(ax, times, series, colors, "length of the planted vector (1: as long as the others)", "normalised MSE")
    for first in ax.lines[:1]:
        first.set_linewidth(4)  # else the next one covers it
    ax.set_xticks(times)
    _plain(ax.xaxis)
    _log(ax.yaxis)
    ax.set_ylim(None, ax.get_ylim()[1] * 1.8)
    ax.axvline(ours, **DASHED)
    _note(ax, "our position 0", (ours, ax.get_ylim()[0]), xytext=(5, 4))


def error_by(
    axes: Sequence[Axes], panels: Mapping[str, Mapping[str, Groups | None]], colors: Mapping[str, str], logarithmic: str
) -> None:
    """Mean error by one property of the tokens in each panel, one line per SAE; `logarithmic`: which panel's x is."""
    for ax, (label, groups) in zip(axes, panels.items(), strict=True):
        shown = {name: found for name, found in groups.items() if found}
        for name, found in shown.items():
            ax.plot(found.at, [point.value for point in found.values], ".", color=colors[name])
        x = max((found.at for found in shown.values()), key=len, default=[])
        if x and label == logarithmic:
            ax.set(xscale="log", xlim=(x[0] * 0.7, x[-1] * (x[-1] / x[0]) ** 0.35))
            ax.xaxis.set_minor_locator(NullLocator())
        elif x:
            ax.set_xticks([tick for tick in MaxNLocator(8).tick_values(x[0], x[-1]) if x[0] <= tick <= 1.02 * x[-1]])
            ax.set_xlim(x[0] - 0.03 * (x[-1] - x[0]), x[-1] + 0.28 * (x[-1] - x[0]))
        lines(ax, x, {name: found.values for name, found in shown.items()}, colors, label, "normalised MSE")
        ax.set_ylim(0, None)


def densities(axes: Sequence[Axes], rates: Mapping[str, Float[Tensor, "n_latents"] | None]) -> None:
    """How often latents fire, a panel per SAE: a histogram of log10 of the share of tokens; at the left the dead."""
    for ax, (name, rate) in zip(axes, rates.items(), strict=True):
        ax.set_title(name)
        color = BY_SAE.get(name, OURS)
        if rate is None:
            _not_run([ax])
            continue
        never, fires = (rate == 0).double().mean().item(), rate[rate > 0].log10().tolist()
        edges = [-6 + 0.2 * i for i in range(31)]
        ax.hist(fires, edges, weights=[100 / len(rate)] * len(fires), color=color, alpha=0.85)
        ax.bar(-6.6, 100 * never, 0.4, color=color)
        _note(ax, f"{never:.1%}", (-6.6, 100 * never), color, xytext=(0, 2), ha="center")
        ax.axvline(math.log10(rate.mean()), **DASHED)
        ax.set_xticks([-6.6, -5, -4, -3, -2, -1, 0], ["never", *(f"$10^{{{i}}}$" for i in range(-5, 0)), "1"])
        ax.set(xlabel="share of tokens that a latent fires on", ylabel="latents (%)")
        ax.margins(y=0.15)
        ax.label_outer()


# --- chapter 03 -------------------------------------------------------------------------------------------------------


def damage(ax: Axes, common: Mapping[str, float], owed: Mapping[str, Estimate | None]) -> None:
    """Per name the share of tokens (ring) and of the damage (dot, 95 % interval); rows as `rows` has them."""
    for row, name, share in _rows(ax, common):
        ax.plot(100 * share, row, "o", color=CONTROL, markerfacecolor="white", markersize=7)
        if found := owed[name]:
            color = POINTED if found.value - 1.96 * found.se > share else OURS
            _interval(ax, Estimate(100 * found.value, 100 * found.se), row, color, 5)
    ax.set_xlabel("share of the whole (%)")
    ax.label_outer()


def concentration(ax: Axes, deltas: Mapping[str, Float[Tensor, "n pos"]], colors: Mapping[str, str]) -> None:
    """Share of the whole delta that the worst tokens owe, over the share of tokens counted, worst first."""
    if not deltas:
        return _not_run([ax])
    ax.set(xscale="log", xlabel="worst tokens (% of all)", ylabel="share of the whole delta (%)")
    ax.axhline(100, **DASHED)
    for name, delta in deltas.items():
        total = delta.double().flatten().sort(descending=True).values.cumsum(0)
        at = [round(len(total) ** (step / 200)) for step in range(1, 201)]
        ax.plot([100 * n / len(total) for n in at], [100 * (total[n - 1] / total[-1]).item() for n in at],
                color=colors[name], label=name)  # fmt: skip
    _plain(ax.xaxis)
    ax.legend(loc="upper left")


def grafts(
    axes: Sequence[Axes], steps: Sequence[int], series: Mapping[str, Sequence[Estimate]],
    foreign: Mapping[str, Estimate | None], home: float | None, colors: Mapping[str, str],
) -> None:  # fmt: skip
    """Delta of each replacement over the host's training steps (left), and in a model of another seed (right)."""
    left, right = axes
    rows(right, foreign, "in another seed's model (nats)", {"at home": home} if home else {}, ".2f", colors)
    right.set_xlim(0, right.get_xlim()[1])
    if not any(series.values()):
        return _not_run([left])
    first = min(filter(None, steps), default=1)
    left.set_xscale("symlog", linthresh=first, linscale=0.45)
    left.set_xlim(-0.3 * first, steps[-1] * 20)
    ticks = [10**power for power in range(2, 7) if first <= 10**power <= steps[-1]]
    lines(left, steps, series, colors, "training step of the host", "delta cross-entropy (nats)")
    left.set_xticks([0, *ticks], [f"{step:,}" for step in (0, *ticks)])


# --- chapter 04 -------------------------------------------------------------------------------------------------------


def visits(ax: Axes, steps: Sequence[float], found: Equivalent | None) -> None:
    """Checkpoints that a search loaded, numbered in order: loss less the target; the answer's 95 % as a band."""
    if found is None:
        return _not_run([ax])
    at = {index: 100 * steps[index] / steps[-1] for index in found.visited}
    line = sorted(at)
    ax.axhline(0, **DASHED)
    ax.axvspan(100 * found.low, 100 * min(found.high, 1.0), color=POINTED, alpha=0.2, linewidth=0)
    ax.plot([at[index] for index in line], [found.visited[index].value for index in line], color=CONTROL, linewidth=0.8)
    for order, (index, loss) in enumerate(found.visited.items(), start=1):
        ax.errorbar(at[index], loss.value, 1.96 * loss.se, color=OURS, marker="o", markersize=5, linewidth=1.2)
        _note(ax, f"{order}", (at[index], loss.value), OURS, xytext=(5, 4))
    ax.set(xscale="log", xlabel="share of the training (%)", ylabel="loss less the target (nats)")
    _log(ax.xaxis, (1, 2, 3, 4, 5, 7))


def run_of_losses(
    axes: Sequence[Axes], steps: Sequence[float], losses: Sequence[Estimate], drops: Sequence[Estimate],
    targets: Mapping[str, float],
) -> None:  # fmt: skip
    """Left: loss over the training, from half a nat above the targets on. Right: fall from checkpoint to checkpoint."""
    if len(losses) < 2:
        return _not_run(axes)
    left, right = axes
    highest = max(targets.values(), default=math.inf) + 0.5
    near = [(step / 1e6, loss) for step, loss in zip(steps, losses, strict=True) if step and loss.value < highest]
    values, errors = ([getattr(loss, name) for _, loss in near] for name in ("value", "se"))
    left.errorbar([x for x, _ in near], values, [1.96 * se for se in errors], color=CONTROL, marker=".", linewidth=1.2)
    left.set(xscale="log", xlim=(near[0][0] / 1.15, near[-1][0] * 1.9))
    for name, value in targets.items():
        left.plot(left.get_xlim()[:1] + (1.08 * near[-1][0],), [value, value], color=BY_SAE[name], linewidth=0.8)
    left.set(ylabel="loss on text (nats)", xlabel="million training tokens")
    _log(left.xaxis, (1, 2, 3, 4, 5, 7))
    _end_labels(left, near[-1][0] * 1.05, {name: (value, BY_SAE[name]) for name, value in targets.items()})
    values, errors = ([getattr(drop, name) for drop in drops] for name in ("value", "se"))
    right.errorbar(steps[1:], values, [1.96 * se for se in errors], color=OURS, marker="o", markersize=4, linestyle="")
    right.set_yscale("symlog", linthresh=1e-2, linscale=0.6)
    right.axhline(0, color=INK, linewidth=1)
    _token_axes([right], steps, None, None)
    right.set(ylabel="fall since the one before (nats)", xlabel="training tokens", xlim=(None, 3 * steps[-1]))


def shares(
    ax: Axes, values: Mapping[str, tuple[float, float, float] | None], colors: Mapping[str, str] | None = None
) -> None:  # fmt: skip
    """One row per name: a share of the training with its interval; an end that is infinite becomes an arrow."""
    ends = [min(end, 1.0) for found in values.values() if found for end in found]
    right = 100 * max(ends, default=1.0) * 1.12
    for row, name, found in _rows(ax, values):
        color = (colors or {}).get(name, OURS)
        value, low, high = (100 * end for end in found)
        ax.plot([low, min(high, right)], [row, row], color=color, linewidth=1.2)
        ax.plot(value, row, "o", color=color, markersize=6)
        if math.isinf(high):
            ax.plot(right, row, ">", color=color, markersize=6, clip_on=False)
        _note(ax, f"{value:.1f}" if value >= 1 else f"{value:.2f}", (value, row), color, xytext=(0, 7), ha="center")
    ax.set(xlabel="share of the training (%)", xlim=(-0.02 * right, right))


# --- chapter 05 -------------------------------------------------------------------------------------------------------


KINDS = OURS, POINTED, SECOND, CONTROL, INK
"""Colours of the rows and curves of one figure, in order."""


def two_questions(ax: Axes, values: Mapping[str, Sequence[Estimate] | None], gaussian: float) -> None:
    """Per row: sparsity over the window (dot), its reference for uneven effects (bar), over one token (ring)."""
    for row, _, found in _rows(ax, values):
        color = KINDS[row]
        many, uneven, one = (100 * point.value for point in found)
        ax.plot([many, one], [row, row], color=color, linewidth=1, alpha=0.5)
        ax.plot(uneven, row, "|", color=INK, markersize=14, markeredgewidth=1.6)
        ax.plot(many, row, "o", color=color, markersize=6)
        ax.plot(one, row, "o", color=color, markersize=7, markerfacecolor="white")
    ax.axvline(100 * gaussian, **DASHED)
    _note(ax, "2/π", (100 * gaussian, -0.6), xytext=(0, 2), ha="center", va="bottom")
    ax.set(xlabel="sparsity (%)", xlim=(0, None))


def decay(ax: Axes, profiles: Mapping[str, Sequence[Estimate] | None]) -> None:
    """Mean scale of the effect at each token from the ablated one on, over that at the ablated one."""
    shown = {name: found for name, found in profiles.items() if found}
    if not shown:
        return _not_run([ax])
    steps = range(len(next(iter(shown.values()))))
    ax.set(yscale="log", xlim=(0, 1.8 * steps[-1]), xticks=steps[::5])
    relative = {
        name: [Estimate(*(number / found[0].value for number in point)) for point in found]
        for name, found in shown.items()
    }
    lines(ax, steps, relative, dict(zip(profiles, KINDS, strict=False)), "tokens after the ablated one", "effect")
    ax.set_ylim(bottom=0.6 * min(point.value for found in relative.values() for point in found))  # not of the bands
    _log(ax.yaxis, (1, 3))


def sparsity_curves(
    ax: Axes, x: Sequence[int], series: Mapping[str, Sequence[Estimate] | None], xlabel: str, ylabel: str,
    mark: float | None = None, reference: Sequence[float] | None = None,
) -> None:  # fmt: skip
    """Curves over an index (from 0 on) or a count, on an axis of powers of two; `mark` and `reference` are dashed."""
    ax.set_xscale("symlog", base=2, linthresh=1, linscale=0.6)
    ax.set_xlim(x[0] - 0.1, x[-1] * 3.2)
    highest = [point.value + 1.96 * point.se for found in series.values() for point in found or ()]
    ax.set_ylim(0, 1.08 * max([*highest, *(reference or ())], default=1))
    if reference is not None:
        ax.plot(x, reference, **DASHED)
    if mark is not None:
        ax.axvline(mark, **DASHED | {"color": CONTROL})
    lines(ax, x, series, dict(zip(series, KINDS, strict=False)) | BY_SAE, xlabel, ylabel)
    _plain(ax.xaxis)
    ax.set_xticks(x, map(str, x))


# --- chapter 07 -------------------------------------------------------------------------------------------------------


def learning_curves(
    ax: Axes, points: pd.DataFrame, x: str, runs: pd.DataFrame,
    live: pd.DataFrame | None = None, laws: Sequence[Power] = (),
) -> None:  # fmt: skip
    """Error over tokens or FLOPs (`x`), a line per n, a ring at the end of those not converged; laws are dashed."""
    if points.empty:
        return _not_run([ax])
    ax.set(xscale="log", yscale="log", xlabel={"tokens": "tokens", "flops": "FLOPs"}[x], ylabel="normalised MSE")
    sizes = sorted(points.n.unique())
    for n, run in points.groupby(["n", "seed"]):
        color = SHARE(0.45 + 0.55 * sizes.index(n[0]) / max(len(sizes) - 1, 1))
        ax.plot(run[x], run.mse, color=color, linewidth=1.2)
        if n[1] == 0:
            there = runs[runs.n == n[0]].converged.all()
            ax.plot(run[x].iloc[-1], run.mse.iloc[-1], "o", color=color, markerfacecolor=color if there else "white")
            _note(ax, f"{n[0]:,}", (run[x].iloc[-1], run.mse.iloc[-1]), color, xytext=(7, 0), va="center")
    if live is not None:
        ax.plot(live[x], live.mse, "o", color=POINTED, zorder=4)
        _note(ax, "live", (live[x].iloc[0], live.mse.iloc[0]), POINTED, xytext=(0, 8), ha="center")
    span = np.geomspace(points[x].min(), points[x].max(), 64)
    for law in laws:
        ax.plot(span, law(span), **DASHED)
    ax.set_xlim(None, points[x].max() * 2.5)
    _log(ax.yaxis, (1, 1.5, 2, 3, 5))


def error_by_size(ax: Axes, runs: pd.DataFrame, laws: Mapping[int, Power]) -> None:
    """Error over n, a colour per k (a ring: not converged), the law of each k and, dotted, what it leaves."""
    if runs.empty:
        return _not_run([ax])
    ax.set(xscale="log", yscale="log", xlabel="latents", ylabel="normalised MSE")
    reach = np.geomspace(runs.n.min(), runs.n.max(), 64)
    for (k, row), color in zip(runs.groupby("k"), (*KINDS[:3], "#CC79A7", INK), strict=False):
        if k in laws:
            ax.plot(reach, laws[k](reach), color=color, linewidth=1.2)
            ax.axhline(np.exp(laws[k].log_floor), color=color, linewidth=1, linestyle=":")
        for there, some in row.groupby("converged"):
            ax.plot(some.n, some.mse, "o", color=color, markerfacecolor=color if there else "white", markersize=6)
        _note(ax, f"k = {k}", (row.n.iloc[-1], row.mse.iloc[-1]), color, xytext=(9, 0), va="center")
    ax.set(xlim=(None, runs.n.max() * 2.2), ylim=(0.2 * runs.mse.min(), None))
    ax.set_xticks(sorted(runs.n.unique()))
    _plain(ax.xaxis)
    _log(ax.yaxis, (1, 1.5, 2, 3, 5))


# --- chapter 08 -------------------------------------------------------------------------------------------------------


def probe_tasks(
    ax: Axes, names: Sequence[str], values: Mapping[str, Sequence[float] | None], absent: Sequence[str] = ()
) -> None:
    """One row per task, ordered by the first list that is there: latent (dot), channel (dot), token, all (bar)."""
    styles = dict(zip(values, (
        {"marker": "o", "color": OURS, "label": "latent"}, {"marker": "o", "color": POINTED, "label": "channel"},
        {"marker": "o", "color": CONTROL, "markerfacecolor": "white", "label": "token"},
        {"marker": "|", "color": INK, "markersize": 11, "markeredgewidth": 1.8, "label": "all channels"},
    ), strict=True))  # fmt: skip
    shown = {name: found for name, found in values.items() if found}
    if not shown:
        return _not_run([ax])
    order = sorted(range(len(names)), key=next(iter(shown.values())).__getitem__)
    list(_rows(ax, {names[i]: i for i in order} | dict.fromkeys(absent)))
    ax.axvline(1, **DASHED)
    for name, found in shown.items():
        ax.plot([found[i] for i in order], range(len(order)), linestyle="", **styles[name])
    ax.tick_params(axis="y", labelsize=8)
    ax.set(xlabel="loss over label entropy", xlim=(0, None))
    ax.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), handletextpad=0.1, columnspacing=1.4)


def probe_sweep(axes: Sequence[Axes], table: pd.DataFrame) -> None:
    """`probes.sweep`: at the end of the runs over latents, a line per k; along the runs with more than one point."""
    if table.empty:
        return _not_run(axes)
    ends = table[table.end].groupby(["k", "n"], as_index=False)[["value", "se"]].mean()
    ns, ks = sorted(ends.n.unique()), sorted(ends.k.unique())
    axes[0].set(xscale="log", xlim=(ns[0] / 1.2, ns[-1] * 3), xticks=ns)
    axes[0].xaxis.set(minor_locator=NullLocator(), major_formatter="{x:g}")
    axes[0].set(xlabel="latents", ylabel="loss over label entropy")
    last = {}
    for rank, k in enumerate(ks):
        own, color = ends[ends.k == k], SHARE(0.35 + 0.65 * rank / max(len(ks) - 1, 1))
        axes[0].plot(own.n, own.value, ".-", color=color, linewidth=1.4)
        last[f"k = {k}"] = (own.value.iloc[-1], color)
    _end_labels(axes[0], ns[-1], last)
    along = table[~table.alone].sort_values("tokens")
    if along.empty:
        return _not_run(axes[1:])
    axes[1].set(xscale="log")
    series = [Estimate(row.value, row.se) for row in along.itertuples()]
    lines(axes[1], list(along.tokens), {"": series}, {"": OURS}, "training tokens", "")
    axes[0].set_ylim(min(axes[0].get_ylim()[0], (along.value - 2 * along.se).min() - 0.005))  # room for the band
    axes[1].sharey(axes[0])


# --- chapter 10 -------------------------------------------------------------------------------------------------------


def cosines(ax: Axes, groups: Mapping[str, Sequence[float] | None], colors: Mapping[str, str], match: float) -> None:
    """Share of latents whose best decoder cosine is at least x, a curve per group; dashed: what counts as a match."""
    shown = {name: sorted(found) for name, found in groups.items() if found is not None}
    if not shown:
        return _not_run([ax])
    ax.axvline(match, **DASHED)
    for name, found in shown.items():
        share = [100 * (1 - place / len(found)) for place in range(len(found))]
        ax.plot(found, share, color=colors[name], label=name)
    ax.set(xlabel="best decoder cosine at least", ylabel="latents (%)", xlim=(0.2, 1), ylim=(0, 103))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(shown), columnspacing=1, handlelength=1)


def split_tree(ax: Axes, root: str, branches: pd.DataFrame | None) -> None:
    """One latent and those that split it: columns `label`, `cosine`, `together` (width of the branch) and `agree`."""
    if branches is None:
        return _not_run([ax])
    middle = (len(branches) - 1) / 2
    for row, branch in enumerate(branches.itertuples()):
        color = OURS if branch.agree else CONTROL
        width = 0.8 + 8 * branch.together
        ax.plot([0, 0.25, 0.55, 0.8], [middle, middle, row, row], color=color, linewidth=width, zorder=2 + branch.agree)
        numbers = f"cosine {branch.cosine:.2f}, together {branch.together:.2f}"
        _note(ax, branch.label, (0.8, row), xytext=(8, 5), va="center")
        _note(ax, numbers, (0.8, row), color, xytext=(8, -6), va="center", fontsize=7)
    _note(ax, root, (0, middle), xytext=(-6, 0), va="center", ha="right")
    ax.set(xlim=(-0.55, 1.7), ylim=(len(branches) - 0.4, -0.6))
    ax.set_axis_off()


def shaded(ax: Axes, groups: Mapping[str, Sequence[tuple[Sequence[str], str]]], width: int = 92) -> None:
    """Excerpts, a line each, below the name of their latent; a token's digit, 0 to 9, is the depth of its shade."""
    ax.set(xlim=(0, width), ylim=(sum(len(some) + 1.4 for some in groups.values()), -0.8))
    ax.set_axis_off()
    ax.figure.draw_without_rendering()  # places the axes
    size = ax.get_window_extent().width / ax.figure.dpi * 72 / width / 0.602  # of a monospaced letter
    line = 0.0
    for name, excerpts in groups.items():
        ax.text(0, line, name, weight="bold", size=8.5, va="center")
        for tokens, digits in excerpts:
            line, column = line + 1, 0
            for token, digit in zip(tokens, digits, strict=True):
                token = token.replace("\n", "⏎")
                if column + len(token) > width:
                    break
                place = Rectangle((column, line - 0.42), len(token), 0.84, color=POINTED, linewidth=0)
                place.set_alpha(int(digit) and 0.08 + 0.07 * int(digit))
                ax.add_patch(place)
                ax.text(column, line, token, size=size, family="monospace", va="center", parse_math=False)
                column += len(token)
        line += 1.4


# --- chapter 11 -------------------------------------------------------------------------------------------------------


def against_random(
    ax: Axes, gains: Float[Tensor, "m"] | None, random: Float[Tensor, "directions m"] | None, ylabel: str
) -> None:
    """Each latent's gain, in order, on the 5 to 95 % range of random directions; vermilion where not above it."""
    if gains is None:
        return _not_run([ax])
    order = gains.argsort()
    ends = {0.05: "lower", 0.95: "higher"}
    low, high = (random.nanquantile(q, dim=0, interpolation=side)[order] for q, side in ends.items())
    ax.set(xlabel="latents, in order of their gain", ylabel=ylabel, xticks=[])
    ax.vlines(range(len(order)), low, high, color=CONTROL, linewidth=3, alpha=0.6)
    colors = [OURS if beats else POINTED for beats in gains[order] > high]
    ax.scatter(range(len(order)), gains[order], c=colors, s=16, zorder=3)
    above = (0, high[: len(order) // 2 + 1].max())
    _note(ax, "grey: random directions, 5 to 95 %", above, "#6f6f6f", xytext=(0, 6), va="bottom")


# --- chapter 12 -------------------------------------------------------------------------------------------------------


MARKS = {
    "chapter": {"label": "chapter / home 32k", "marker": "o", "color": POINTED, "markersize": 5},
    "chapter_large": {"label": "chapter-large / home 128k", "marker": "D", "color": POINTED, "markersize": 6},
    "small": {"label": "small / openai 32k", "marker": "o", "color": OURS, "markersize": 5},
    "large": {"label": "large / openai 128k", "marker": "D", "color": INK, "markersize": 6},
}
"""Our autoencoders, and those in the journal's table whose part they play: the larger ones as diamonds."""


def board(
    ax: Axes, groups: Mapping[str, Mapping[str, Reading | float | None]], xlabel: str,
    log: bool = True, band: tuple[str, Sequence[float]] | None = None,
) -> None:  # fmt: skip
    """One row per group, one mark per autoencoder with its 95 % interval; `band`: a name and the range it spans."""
    if band is not None:
        ax.axvspan(*band[1], color=SECOND, alpha=0.2, linewidth=1)
        _note(ax, band[0], (band[1][-1], len(groups) - 0.42), SECOND, xytext=(4, 2), va="bottom")
    for row, _, found in _rows(ax, groups):
        if missing := [mark["label"].split(" / ")[0] for name, mark in MARKS.items() if found.get(name, 0) is None]:
            text = "not run" if len(missing) == len(MARKS) else f"{', '.join(missing)}: not run"
            at = ax.get_yaxis_transform()
            ax.text(1, row + 0.37, text, color=CONTROL, ha="right", va="center", size=7, transform=at)
        for place, (name, mark) in enumerate(MARKS.items()):
            at, *ends = found[name] if isinstance(found.get(name), tuple) else (found.get(name),)
            if at is not None:
                height = row + 0.13 * (place - 1.5)
                spanned = [end for end in ends if end is not None and math.isfinite(end)]
                ax.plot(spanned, [height] * len(spanned), color=mark["color"], linewidth=1.2)
                ax.plot(at, height, linestyle="", **mark)
    ax.margins(x=0.08)
    ax.set(xlabel=xlabel, **({"xscale": "log"} if log else {"xlim": (0, None)}))
    if log:
        _log(ax.xaxis)
    keys = [Line2D([], [], linestyle="", **mark) for mark in MARKS.values()]
    ax.legend(handles=keys, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), handletextpad=0.1, columnspacing=1.4)


TILES = {
    "reproduced": SECOND, "explained": OURS, "undecided": "#77608f", "refuted": POINTED, "not run": "#e4e4e4",
}  # fmt: skip


def verdicts(ax: Axes, judged: Mapping[str, Mapping[str, str]]) -> None:
    """A tile per claim (columns) and profile (rows), in the colour of its verdict and with its first letters."""
    for row, words in enumerate(judged.values()):
        for column, word in enumerate(words.values()):
            ax.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, color=TILES[word], linewidth=0))
            letters, ink = ("–", CONTROL) if word == "not run" else (word[:3], "white")
            ax.text(column, row, letters, color=ink, ha="center", va="center", fontsize=7)
    claims = list(next(iter(judged.values())))
    ax.set(xlim=(-0.5, len(claims) - 0.5), ylim=(len(judged) - 0.5, -0.5), aspect="equal")
    ax.set_xticks(range(len(claims)), claims)
    ax.set_yticks(range(len(judged)), judged)
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.spines[:].set_visible(False)
    ax.grid(False)
    keys = [Rectangle((0, 0), 1, 1, color=color) for color in TILES.values()]
    ax.legend(keys, TILES, ncols=5, loc="upper left", bbox_to_anchor=(0, 0), handlelength=0.9, handleheight=0.9)
