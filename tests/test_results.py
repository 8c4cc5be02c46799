"""The numbers of the last `pytest --nbval notebooks`, which `make test` runs before, against the committed ones."""

import json

import pytest

from saelib.profile import ROOT

COMMITTED = ROOT / "results" / "docstring-gpt"
RERUN = ROOT / "_build" / "check" / "docstring-gpt"


def values(path):
    return json.loads(path.read_text(encoding="utf-8"))["values"]


def close(found, expected, absolute):
    """Equal but for what differs between machines: a thousandth, or `absolute`."""
    if isinstance(expected, list) and isinstance(found, list):
        return len(found) == len(expected) and all(close(*pair, absolute) for pair in zip(found, expected, strict=True))
    if isinstance(expected, int | float) and isinstance(found, int | float):
        return found == pytest.approx(expected, rel=1e-3, abs=absolute)
    return found == expected


def agrees(found, committed):
    """Whether two entries agree; a difference below the value's own standard error says nothing."""
    return close(found["value"], committed["value"], max(1e-4, committed["se"] or 0.0))


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.json")), ids=lambda path: path.stem)
def test_a_rerun_gives_the_committed_numbers(path):
    if not RERUN.is_dir():
        pytest.skip("no re-run to compare with: `pytest --nbval notebooks` makes it")
    committed, found = values(path), values(RERUN / path.name)
    assert found.keys() == committed.keys()
    different = {
        name: (found[name]["value"], entry["value"])
        for name, entry in committed.items()
        if not agrees(found[name], entry)
    }
    assert not different, "re-run, committed"


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.json")), ids=lambda path: path.stem)
def test_committed_numbers_say_where_they_come_from(path):
    provenance = json.loads(path.read_text(encoding="utf-8"))["provenance"]
    for key in ("date", "commit", "versions", "device", "dtype", "text", "weights", "wall_seconds"):
        assert provenance[key], f"{key}: run and publish again from a commit"


def test_every_chapter_has_committed_numbers():
    chapters = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert chapters == {path.stem for path in COMMITTED.glob("*.json")}


@pytest.mark.parametrize(
    ("found", "committed", "se", "same"),
    [
        (0.5001, 0.5, None, True), (0.51, 0.5, None, False), (0.51, 0.5, 0.02, True), (0.00005, 0.0, None, True),
        (None, None, None, True), (1.0, None, None, False), (None, 1.0, None, False), ("L1.H3", "L1.H2", None, False),
        ([1.0, [2.0, None]], [1.0, [2.0001, None]], None, True), ([1.0], [1.0, 2.0], None, False),
    ],
)  # fmt: skip
def test_what_counts_as_the_same(found, committed, se, same):
    assert agrees({"value": found}, {"value": committed, "se": se}) is same
