"""The scoreboard of chapter 12: everything that was published, side by side, and a verdict for every claim.

Nothing is measured here. Figures are read from the results of the other chapters; verdicts follow from them by the
rules in `book/claims.yml`. What was not run is None, and shown as "not run".
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from saelib import UserError
from saelib.profile import ROOT
from saelib.report import Report, all_reported, read, result_file

NOT_RUN = "not run"
VERDICTS = ("reproduced", "explained", "undecided", "refuted", NOT_RUN)
ROLES = {"chapter": "home 32k", "small": "openai 32k", "chapter_large": "home 128k", "large": "openai 128k"}
"""Our autoencoders, as chapters name them, and those in the journal's table whose part they play."""
DAYS = {
    "readme": "journal, earlier", "0630": "journal, 30 June", "0708": "journal, 8 July", "0716": "journal, 16 July",
}  # fmt: skip

Found = Mapping[str, Mapping[str, dict]]
"""Results files: profile -> chapter -> values and provenance."""


class Measure(NamedTuple):
    """One kind of figure: where ours are published, and whose may stand beside them."""

    title: str
    way: str
    """How it is measured, where there is more than one way."""
    chapter: str
    fmt: str = ".4f"
    unit: str = ""
    journal: tuple[str, ...] = ()
    """Day and name, as in `book/reported.yml`, of the journal's figures that were measured this way."""
    paper: str = ""
    """Key of the paper's figure in `book/reported.yml`."""


TABLES = {name: (f"0708_{name}", f"0716_{name}") for name in ("mse", "delta_loss", "sparsity")}
MEASURES = {
    "mse": Measure("normalised MSE", "the paper's formula", "02_reconstruction"),
    "mse_journal": Measure("normalised MSE", "the journal's formula", "02_reconstruction", journal=TABLES["mse"]),
    "mse_readme": Measure("normalised MSE", "the README's formula", "02_reconstruction", journal=("readme_mse",)),
    "dead": Measure("latents that never fire", "", "02_reconstruction", ".1f", "%"),
    "l0": Measure("latents that fire, per token", "", "02_reconstruction", ".1f"),
    "delta": Measure("loss added", "", "03_delta_loss", ".4f", "nats", ("0630_delta_loss", *TABLES["delta_loss"])),
    "recovered": Measure("loss recovered", "", "03_delta_loss", ".1f", "%"),
    "agree": Measure("same first guess", "", "03_delta_loss", ".1f", "%"),
    "equivalent": Measure("worth of the training", "", "04_checkpoints", ".1f", "%", ("0630_equivalent",)),
    "sparsity": Measure(
        "ablation sparsity", "at random tokens", "05_sparsity", ".1f", "%", paper="paper_sparsity_latents"
    ),
    "sparsity_index0": Measure("ablation sparsity", "at token 0", "05_sparsity", ".1f", "%", TABLES["sparsity"]),
    "probe": Measure("probe loss", "of the label's entropy", "08_probes", ".3f"),
    "precision": Measure("N2G precision", "", "09_n2g", ".1f", "%"),
    "recall": Measure("N2G recall", "", "09_n2g", ".1f", "%"),
}
"""By the name under which a chapter publishes it, followed by `_` and the autoencoder."""


# --- what was published -----------------------------------------------------------------------------------------------


def results(report: Report) -> dict[str, dict[str, dict]]:
    """Results files as profile -> chapter -> content: of all profiles ever published, the report's own first.

    The report's own profile comes with the chapters of the same run, if these had their own parameters. What is read
    of it is entered into the report's provenance.
    """
    from saelib import runner  # here, because it imports papermill, and figures import this module

    own, chapters = report.profile.name, [chapter for chapter in runner.chapters() if chapter.name != runner.SUMMARY]
    folders = sorted(folder.name for folder in (ROOT / "results").glob("*/") if folder.name != own)
    found = {}
    for profile in (own, *folders):
        fresh = report.fresh if profile == own else None
        files = {one.name: result_file(profile, one.name, fresh, one.parameters) for one in chapters}
        found[profile] = {name: read(file) for name, file in files.items() if file}
    report.stands_on(found[own].values())
    return {profile: files for profile, files in found.items() if files or profile == own}


def values_of(files: Mapping[str, dict], *names: str) -> dict[str, dict]:
    """What these chapters published under one profile, together; where names are equal, the first chapter's."""
    there = [files[chapter]["values"] for chapter in names if chapter in files]
    return {name: entry for values in reversed(there) for name, entry in values.items()}


class Reading(NamedTuple):
    """One figure in the units shown, with the ends of its 95 % interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


def reading(files: Mapping[str, dict], name: str, sae: str) -> Reading | None:
    """Our figure of a measure for one autoencoder; None: not run. The interval is its chapter's own, or 1.96 se."""
    measure = MEASURES[name]
    published, scale = values_of(files, measure.chapter), 100 if measure.unit == "%" else 1

    def at(key: str, field: str = "value") -> float | None:
        found = published.get(f"{key}_{sae}", {}).get(field)
        return math.inf if found == "open" else None if found is None else found * scale

    value, se, low = at(name), at(name, "se"), at(f"{name}_low")
    if value is None:
        return None
    if low is not None or se is None:
        return Reading(value, low, at(f"{name}_high"))
    return Reading(value, value - 1.96 * se, value + 1.96 * se)


def sources(found: Found, name: str) -> dict[str, dict[str, Reading | float | None]]:
    """For one measure, profile or entry of the journal -> autoencoder -> figure.

    Of the profiles, those under which a chapter of `MEASURES` was run, and the first in any case. None: not run; what
    an entry of the journal does not have is not there.
    """
    asked = {measure.chapter for measure in MEASURES.values()}
    rows = {
        profile: {sae: reading(files, name, sae) for sae in ROLES}
        for rank, (profile, files) in enumerate(found.items())
        if not rank or asked & files.keys()
    }
    for stem in MEASURES[name].journal:
        keys = {sae: f"journal_{stem}_{role.replace(' ', '_')}" for sae, role in ROLES.items()}
        figures = {sae: all_reported()[key]["value"] for sae, key in keys.items() if key in all_reported()}
        rows[DAYS[stem.split("_")[0]]] = figures
    return rows


def groups(found: Found, names: Iterable[str]) -> dict[str, dict[str, Reading | float | None]]:
    """For `plot.board`, the rows of `sources` for several measures, each named with the way it was measured."""
    rows = ((name, *row) for name in names for row in sources(found, name).items())
    return {"\n".join(filter(None, (source, MEASURES[name].way))): figures for name, source, figures in rows}


# --- verdicts ---------------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """A claim under one profile."""

    claim: str
    verdict: str
    why: str
    """One line: what came out, or what is missing."""
    chapters: list[str]


CLAIMS = ROOT / "book" / "claims.yml"
"""Claim -> what it says, its rule, and the chapters whose values the rule names."""


def judge(entry: Mapping, files: Mapping[str, dict]) -> Judged:
    """Apply a claim's rule to what was published under one profile.

    The verdict is the first whose conditions all hold; `undecided` where none of them fails, but one is within the
    noise; `refuted` where for every verdict one fails. Raises UserError: a condition is none.
    """
    judged_by = entry["chapters"]
    quoted = {key: np.mean(one["value"]) / 100 for key, one in all_reported().items() if one["unit"] == "%"}
    published = values_of(files, *judged_by)
    known = {key: {"value": float(middle)} for key, middle in quoted.items()} | published
    rule = {word: entry[word] for word in VERDICTS if word in entry}
    named = {name for conditions in rule.values() for condition in conditions for name in names(condition)}
    missing = sorted(name for name in named if known.get(name, {}).get("value") is None)
    if missing:
        return Judged(entry["claim"], NOT_RUN, f"missing: {', '.join(missing)}", judged_by)
    facts = re.sub(r"\{(\w+)\}", lambda hole: published.get(hole[1], {}).get("text") or NOT_RUN, entry["facts"])
    return Judged(entry["claim"], _verdict(rule, known), facts, judged_by)


def _verdict(rule: Mapping[str, list[str]], known: Mapping[str, dict]) -> str:
    for word, conditions in rule.items():
        outcomes = [holds(condition, known) for condition in conditions]
        if False not in outcomes:
            return word if all(outcomes) else "undecided"
    return "refuted"


def names(condition: str) -> set[str]:
    """The values that a condition names. Raises UserError: it is not two terms with < or > between them."""
    try:
        tree = ast.parse(condition, mode="eval")
    except SyntaxError:
        tree = None
    if tree is None or not re.fullmatch(r"[^<>=]+[<>][^<>=]+", condition):
        raise UserError(f"book/claims.yml: {condition!r} is no condition: write one like 'x + y < 0.1 * z'")
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {"abs"}


def holds(condition: str, known: Mapping[str, dict]) -> bool | None:
    """Whether a term is above (>) or below (<) another; None: the 95 % interval of their difference contains zero.

    Standard errors are propagated to first order as if independent, and multiplied by Student's t for the smallest
    number of observations among them, so that three seeds count as three.
    """
    above, below = condition.split(">") if ">" in condition else reversed(condition.split("<"))
    values = {name: known[name]["value"] for name in names(condition)}

    def margin(**moved: float) -> float:  # our own file, and nothing else in reach
        return eval(f"({above}) - ({below})", {"__builtins__": {"abs": abs}}, values | moved)

    noisy = {name: known[name] for name in values if known[name].get("se")}
    ends = [[margin(**{name: values[name] + by * one["se"]}) for by in (-1, 1)] for name, one in noisy.items()]
    n = min((one["n"] for one in noisy.values() if one["n"]), default=math.inf)
    reach = stats.t.ppf(0.975, n - 1) * math.hypot(*((high - low) / 2 for low, high in ends))
    return None if abs(margin()) <= reach else margin() > 0


# --- tables -----------------------------------------------------------------------------------------------------------


class Markup(str):
    """A cell that is Markdown already."""


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, for `IPython.display.Markdown`. Cells show what they hold, whatever characters it has."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(content: object) -> str:
    if content is None or content == NOT_RUN:
        return f"*{NOT_RUN}*"
    if isinstance(content, Markup):
        return content
    return re.sub(r"([\\`*_{}\[\]<>|$&~])", r"\\\1", re.sub(r"\s*\n\s*", " ", str(content)))


def link(chapter: str) -> Markup:
    """The number of a chapter, linked from another."""
    there = (ROOT / "notebooks" / f"{chapter}.ipynb").is_file()
    return Markup(f"[{chapter[:2]}]({chapter}.ipynb)" if there else chapter[:2])


def shown(found: Reading | float | None, fmt: str) -> str | None:
    """A figure as the tables show it, ours with its interval: `0.0731 [0.0724, 0.0738]`; None: not run."""
    if not isinstance(found, Reading):
        return None if found is None else f"{found:g}"
    value, low, high = (None if end is None else format(end, fmt).replace("inf", "open") for end in found)
    return value if low is None or high is None else f"{value} [{low},\N{NO-BREAK SPACE}{high}]"


def board(found: Found, measures: Iterable[str]) -> str:
    """The scoreboard in Markdown, laid out as the journal's: a column per autoencoder, a row per measure and source.

    Sources are our profiles, the journal's entries and the paper, those of them that measured this.
    """
    lines = []
    for name, measure in ((name, MEASURES[name]) for name in measures):
        title, place = ", ".join(filter(None, (measure.title, measure.way, measure.unit))), link(measure.chapter)
        for source, figures in sources(found, name).items():
            cells = (shown(figures[sae], measure.fmt) if sae in figures else "" for sae in ROLES)
            lines.append([title, source, *cells, place])
            title = place = ""  # in the first row of a measure only
        if measure.paper:
            low, high = all_reported()[measure.paper]["value"]
            lines.append(["", "paper", *(f"{low}–{high}" if "openai" in role else "" for role in ROLES.values()), ""])
    return table(["", "", *(f"{sae.replace('_', '-')} / {role}" for sae, role in ROLES.items()), "chapter"], lines)


def verdict_table(judged: Mapping[str, Judged]) -> str:
    """Every claim with its verdict, what came out, and the chapters that it rests on."""
    rows = [
        [name, one.claim, Markup(f"**{one.verdict}**"), one.why, Markup(", ".join(map(link, one.chapters)))]
        for name, one in judged.items()
    ]
    return table(["", "the journal says", "verdict", "what came out", "chapter"], rows)
