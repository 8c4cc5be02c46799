"""The book's figures: one function per kind. Each draws on the `ax` it is given and returns None.

Where a measurement was not run, its value is None and the figure says so. Colours mean the same everywhere: blue is
the model under study, vermilion what the text points at, grey a control, green a second seed, dashes a published law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor

from saelib.profile import ROOT

if TYPE_CHECKING:
    from saelib.induction import Emergence, Excerpt, Head, History, Look

OURS, POINTED, SECOND, CONTROL, INK = "#0072B2", "#D55E00", "#009E73", "#9a9a9a", "#2b2b2b"
SHARE = LinearSegmentedColormap.from_list("share", ["#f4f6f7", "#cfe3f1", "#6aaed6", "#0072B2", "#003a5d"])
"""For numbers between 0 and 1."""
_SIGNED = ["#8c3800", "#f6cdb0", "#f5f5f5", "#b5d5ea", "#0072B2", "#003a5d"]
RECOVERY = LinearSegmentedColormap.from_list("recovery", list(zip([0, 0.25, 0.5, 0.63, 0.86, 1], _SIGNED, strict=True)))
"""For numbers around 0: vermilion below, blue above."""


MONO_ADVANCE = 0.602
"""Width of a character of DejaVu Sans Mono, in font sizes."""


def use_style() -> None:
    """Take the book's style for all figures that follow."""
    plt.style.use(ROOT / "saelib" / "saelib.mplstyle")


def not_run(ax: Axes, why: str = "the profile has no model for it") -> None:
    """An empty figure that says so."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, f"not run: {why}", ha="center", va="center", color=CONTROL, transform=ax.transAxes)


def _note(ax: Axes, text: str, at: tuple[float, float], color: str = INK, **keywords) -> None:
    """A label at the data, in place of a legend."""
    ax.annotate(text, at, **{"textcoords": "offset points", "color": color, "fontsize": 8.5, **keywords})


# --- lines ------------------------------------------------------------------------------------------------------------


def residual_norms(ax: Axes, norms: Float[Tensor, "layer pos"]) -> None:
    """Mean length of the residual stream after each layer, by position; position 0 marked."""
    shades = [SHARE(0.4 + 0.6 * layer / max(len(norms) - 1, 1)) for layer in range(len(norms))]
    last = norms.shape[1] - 1
    ax.set(yscale="log", xlabel="position in the context (tokens)", ylabel="length of the residual stream")
    ax.set(xlim=(-2, last * 1.17), xticks=range(0, last + 2, max((last + 1) // 4, 1)))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    for shade, row in zip(shades, norms.tolist(), strict=True):
        ax.plot(row, color=shade, linewidth=1.4)
        ax.plot(0, row[0], "o", color=POINTED, markersize=4)
    named = range(len(norms)) if len(norms) <= 6 else (0, len(norms) - 1)
    ends = {f"after layer {layer}": (norms[layer, -1].item(), shades[layer]) for layer in named}
    _end_labels(ax, last, ends)


def _end_labels(ax: Axes, x: float, ends: Mapping[str, tuple[float, object]]) -> None:
    """Labels right of the lines' ends, moved apart where they would touch."""
    to_points = 72 / ax.figure.dpi
    ax.figure.draw_without_rendering()
    used = -math.inf
    for label, (value, color) in sorted(ends.items(), key=lambda item: item[1][0]):
        height = ax.transData.transform((x, value))[1] * to_points
        shift = max(used + 10.5 - height, 0)
        used = height + shift
        _note(ax, label, (x, value), color, xytext=(7, shift), va="center")


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
    ax.plot([0, last], [chance, chance], color=INK, linewidth=1, linestyle=(0, (4, 3)))
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
    axes: Sequence[Axes], history: History | None, head: Head, previous: Head,
    found: Emergence | None, law: float | None,
) -> None:  # fmt: skip
    """Three panels over training tokens (log axis, 0 at its left end): scores of heads, loss gap, loss on text."""
    scores, gaps, texts = axes
    if history is None:
        gaps.set_axis_off()
        texts.set_axis_off()
        return not_run(scores, "the profile has no training checkpoints")
    x, zero = _log_tokens(history.tokens)
    own = history.induction[:, head.layer, head.index].tolist()
    before = history.previous[:, previous.layer, previous.index].tolist()
    scores.plot(x, history.induction.flatten(1), color=CONTROL, linewidth=0.6, alpha=0.6)
    scores.plot(x, before, color=POINTED, marker=".")
    scores.plot(x, own, color=OURS, marker=".")
    gaps.plot(x, history.gap, color=OURS, marker=".")
    texts.plot(x, history.text_loss, color=INK, marker=".")
    scores.set(ylabel="score of a head", ylim=(-0.03, 1.03))
    gaps.set(ylabel="loss gap\n(nats)")
    texts.set(ylabel="loss on text\n(nats)", xlabel="training tokens")
    right = max(x[-1], math.log10(law) if law else 0) + 0.62
    for ax in axes:
        ax.set_xlim(zero - 0.15, right)
        _mark_tokens(ax, found, law)
    _token_ticks(texts, zero)
    ends = {f"{previous}, one back": (before[-1], POINTED), f"{head}, induction": (own[-1], OURS)}
    _end_labels(scores, x[-1], ends)
    if law:
        _note(scores, "published law", (math.log10(law), 1.03), xytext=(0, 3), ha="center")
    if found:
        at = math.log10(found.tokens), gaps.get_ylim()[1]
        _note(gaps, "half way", at, OURS, xytext=(-6, -3), ha="right", va="top")


def _log_tokens(tokens: list[int]) -> tuple[list[float], float]:
    """Places on a log axis, and where 0 stands: a little left of the first checkpoint after it."""
    zero = math.log10(min(count for count in tokens if count)) - 0.45
    return [math.log10(count) if count else zero for count in tokens], zero


def _mark_tokens(ax: Axes, found: Emergence | None, law: float | None) -> None:
    """A band between the checkpoints around our emergence point, a line at the law's."""
    if found is not None:
        low = math.log10(found.low) if found.low else ax.get_xlim()[0]
        ax.axvspan(low, math.log10(found.high), color=OURS, alpha=0.13, linewidth=0)
    if law is not None:
        ax.axvline(math.log10(law), color=INK, linewidth=1, linestyle=(0, (4, 3)))


def _token_ticks(ax: Axes, zero: float) -> None:
    """0, a gap in the axis, and the powers of ten."""
    powers = range(math.ceil(zero + 0.2), math.floor(ax.get_xlim()[1]) + 1)
    ax.set_xticks([zero, *powers], ["0", *(_count(10**power) for power in powers)])
    ax.text(zero + 0.22, 0, "//", transform=ax.get_xaxis_transform(), ha="center", va="center", color="#8a8a8a")


def _count(number: float) -> str:
    """100 k, 10 M, 1 B."""
    for size, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:g}{name}"
    return f"{number:g}"


# --- maps -------------------------------------------------------------------------------------------------------------


def head_map(
    ax: Axes, values: Float[Tensor, "layer head"], title: str, marked: Sequence[Head] = (), signed: bool = False
) -> None:
    """One number for every head: layers upwards, heads to the right; `marked` heads framed. `signed`: from -1 to 1."""
    _cells(ax, values, signed)
    for head in marked:
        corner = head.index - 0.5, head.layer - 0.5
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=POINTED, linewidth=2, zorder=3))
    ax.set(title=title, xlabel="head", ylabel="layer", xticks=range(values.shape[1]), yticks=range(values.shape[0]))


def patch_map(ax: Axes, values: Float[Tensor, "layer pos"], labels: Sequence[str]) -> None:
    """Recovery by layer and position."""
    _cells(ax, values, signed=True, least=0.05)
    ax.set(ylabel="residual stream before layer", xlabel="position", yticks=range(values.shape[0]))
    ax.set_xticks(range(len(labels)), labels)
    for tick, label in zip(ax.get_xticklabels(), labels, strict=True):
        tick.set(color=POINTED if label != "·" else CONTROL, fontweight="bold" if label != "·" else "normal")


def _cells(ax: Axes, values: Tensor, signed: bool, least: float = 0.0) -> None:
    """Coloured cells with their numbers; where there are too many for numbers, a colour bar."""
    image = ax.imshow(
        values, cmap=RECOVERY if signed else SHARE, vmin=-1 if signed else 0, vmax=1, origin="lower", aspect="auto"
    )
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_xticks([i - 0.5 for i in range(values.shape[1] + 1)], minor=True)
    ax.set_yticks([i - 0.5 for i in range(values.shape[0] + 1)], minor=True)
    ax.tick_params(which="minor", length=0)
    ax.grid(True, which="minor", axis="both", color="white", linewidth=1.5)
    ax.set_axisbelow(False)
    if values.numel() > 100:
        ax.figure.colorbar(image, ax=ax, shrink=0.8).outline.set_visible(False)
        return
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            if abs(value) >= least:
                color = "white" if abs(value) > 0.55 else INK
                ax.text(column, row, _short(value), ha="center", va="center", fontsize=8, color=color, zorder=4)


def _short(value: float) -> str:
    """Two decimals without the zero in front: .61, -.05, 1.00."""
    return f"{value:.2f}".replace("-0.00", "0.00").replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.2f}"


# --- dots -------------------------------------------------------------------------------------------------------------


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
    ax.grid(axis="x")
    ax.grid(False, axis="y")


def copying(
    ax: Axes, scores: Float[Tensor, "layer head"], induction: Float[Tensor, "layer head"],
    untrained: Float[Tensor, "layer head"] | None, named: Sequence[Head], title: str,
) -> None:  # fmt: skip
    """Every head by its OV copying score and its induction score; the untrained model's heads as ticks below."""
    ax.axvline(0, color=CONTROL, linewidth=0.8)
    if untrained is not None:
        ax.plot(untrained.flatten(), torch.full((untrained.numel(),), -0.1), "|", color=CONTROL, markersize=8)
        ax.text(-1.03, -0.1, "untrained", color=CONTROL, va="center", fontsize=8.5)
    ax.plot(scores.flatten(), induction.flatten(), "o", color=OURS, alpha=0.6)
    for head in named:
        at = scores[head.layer, head.index].item(), induction[head.layer, head.index].item()
        ax.plot(*at, "o", color=POINTED)
        _note(ax, str(head), at, POINTED, xytext=(5, 7), ha="right" if at[0] > 0 else "center", va="bottom")
    ax.set(title=title, xlabel="OV copying score\nlowers ← the token it looks at → raises", ylabel="induction score")
    ax.set(xlim=(-1.08, 1.08), ylim=(-0.17, 1.05), xticks=[-1, -0.5, 0, 0.5, 1], yticks=[0, 0.25, 0.5, 0.75, 1])
    ax.label_outer()


def head_strips(
    ax: Axes, groups: Mapping[str, Float[Tensor, "layer head"] | None], reference: float, name_from: float = 0.1
) -> None:
    """One row of dots per model, one dot per head; those from `name_from` on carry their name."""
    ax.axvline(reference, color=CONTROL, linewidth=1, linestyle=(0, (4, 3)))
    for row, (scores, color) in enumerate(zip(groups.values(), (OURS, SECOND, CONTROL), strict=False)):
        if scores is None:
            ax.text(0.5, row, "not run", ha="center", va="center", color=CONTROL)
            continue
        ax.plot(scores.flatten(), [row] * scores.numel(), "o", color=color, alpha=0.65, markersize=7)
        high = (scores >= name_from).nonzero().tolist()
        named = sorted((scores[layer, head].item(), f"L{layer}H{head}") for layer, head in high)
        for rank, (score, name) in enumerate(named):  # neighbours above and below in turn
            _note(ax, name, (score, row), color, xytext=(0, -17 if rank % 2 else 8), ha="center")
    ax.set_yticks(range(len(groups)), list(groups))
    ax.set(xlabel="induction score of each head", xlim=(-0.02, 1.02), ylim=(len(groups) - 0.4, -0.6))
    ax.grid(axis="x")
    ax.grid(False, axis="y")


# --- text -------------------------------------------------------------------------------------------------------------


def attention_arrows(ax: Axes, excerpt: Excerpt, arrows: int = 6, width: int = 64) -> None:
    """An excerpt as running text, with an arrow from each of the strongest readers to the token it looks back at.

    Sets the figure's height to the number of lines.
    """
    shown = [token.replace("\n", "⏎") for token in excerpt.tokens]
    places, lines = _typeset(excerpt.tokens, width)
    figure = ax.figure
    figure.set_layout_engine("none")
    figure.set_figheight(0.36 * (lines + 1.4))
    ax.set(position=(0, 0, 1, 1), xlim=(-1, width + 1), ylim=(-lines + 0.3, 1.7))
    ax.set_axis_off()
    for look in excerpt.looks[:arrows]:
        for end, color in ((look.query, POINTED), (look.key, OURS)):
            _box(ax, shown[end], places[end], color)
        ax.add_patch(_arrow(shown, places, look))
    size = figure.get_figwidth() * 72 / (width + 2) / MONO_ADVANCE
    for token, (column, line) in zip(shown, places, strict=True):
        for offset, letter in enumerate(token):  # one by one: a line of text would not keep to the grid
            color = CONTROL if letter == "⏎" else INK
            ax.text(column + offset + 0.5, -line, letter, family="DejaVu Sans Mono", fontsize=size, color=color,
                    ha="center", va="center_baseline", parse_math=False)  # fmt: skip


def _typeset(tokens: Sequence[str], width: int) -> tuple[list[tuple[int, int]], int]:
    """Column and line of each token in monospaced text of `width` columns, and the number of lines."""
    places, column, line = [], 0, 0
    for token in tokens:
        if column and column + len(token.rstrip("\n")) > width:
            column, line = 0, line + 1
        places.append((column, line))
        column += len(token)
        if "\n" in token:
            column, line = 0, line + 1
    return places, line + (column > 0)


def _box(ax: Axes, token: str, place: tuple[int, int], color: str) -> None:
    indent = len(token) - len(token.lstrip())
    size = max(len(token.strip()), 1)
    corner = place[0] + indent + 0.06, -place[1] - 0.36
    ax.add_patch(Rectangle(corner, size - 0.12, 0.72, color=color, alpha=0.2, linewidth=0))


def _arrow(tokens: Sequence[str], places: Sequence[tuple[int, int]], look: Look) -> FancyArrowPatch:
    def top(index: int) -> tuple[float, float]:
        (column, line), token = places[index], tokens[index]
        return column + (len(token) + len(token) - len(token.lstrip())) / 2, -line + 0.36

    (start, line), (end, _) = top(look.query), top(look.key)
    bend = 0.3 * min(1.0, 14 / max(abs(start - end), 1))  # long arrows rise no higher than short ones
    return FancyArrowPatch(
        (start, line), top(look.key), connectionstyle=f"arc3,rad={bend:.3f}", arrowstyle="-|>", mutation_scale=9,
        color=POINTED, linewidth=0.5 + 1.3 * look.weight, alpha=0.3 + 0.6 * look.weight, shrinkA=1, shrinkB=1,
        clip_on=False,
    )  # fmt: skip
