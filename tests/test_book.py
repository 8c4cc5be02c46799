"""The book's sources keep its rules, its pages are whole, and `saelib.book` puts together what it should."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup, Tag
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from saelib import UserError, book
from saelib.profile import ROOT, load_profile

PAGES = sorted((ROOT / "book").glob("[!_]*.md"))
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def prose() -> Iterator[tuple[str, str]]:
    """(where, text) of all our Markdown: pages and Markdown cells."""
    for page in PAGES:
        yield page.name, page.read_text(encoding="utf-8")
    for chapter in CHAPTERS:
        for index, cell in enumerate(nbformat.read(chapter, 4).cells):
            if cell.cell_type == "markdown":
                yield f"{chapter.name}, cell {index}", cell.source


# --- sources ----------------------------------------------------------------------------------------------------------

ROLE = re.compile(r"\{([\w:]+)\}(`+)[^`]+?\2")
VERBATIM = re.compile(r"(`+)[^`]+?\1|https?://\S+|\]\([^)\s]*\)")
"""Inline code and addresses."""
NAMED = "Python|sections?|§|chapters?|parts?|Figures?|Tables?|arXiv:?|Apache|BSL|CC0|CC BY|OFL"
NOT_RESULTS = re.compile(rf"({NAMED})\s+\d+\.\d+(\s*(,|and|or|to|–)\s*\d+\.\d+)*")
DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?!\.?\d)")


def without_code(text: str) -> str:
    """The text without code blocks. Directives, which are fenced alike, keep their content."""
    lines, open_directives, code = [], 0, ""
    for line in text.splitlines():
        fence = re.match(r"\s*(`{3,}|:{3,})\s*(.*)", line)
        if code:
            code = "" if line.strip() == code else code
        elif not fence:
            lines.append(line)
        elif fence[2].startswith("{") and not fence[2].startswith("{code"):
            open_directives += 1
            lines.append(line)
        elif fence[2] or not open_directives:
            code = fence[1]
        else:
            open_directives -= 1
    return "\n".join(lines)


def typed_results(text: str) -> list[str]:
    """Decimals in paragraphs that neither compute nor cite."""
    found = []
    for paragraph in re.split(r"\n\s*\n", without_code(text)):
        paragraph = VERBATIM.sub(" ", ROLE.sub(r"{\1}", " ".join(paragraph.split())))
        if "{glue" not in paragraph and "{cite" not in paragraph:
            found += DECIMAL.findall(NOT_RESULTS.sub(" ", paragraph))
    return found


def test_no_typed_result():
    assert {where: found for where, text in prose() if (found := typed_results(text))} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The loss is 3.14 nats.", ["3.14"]),
        ("The loss is 3.14 nats {cite}`gao2024scaling`.", []),
        ("It is {glue:text}`loss`, not 3.14.", []),
        ("A cited {cite}`a` one.\n\nThen 0.5 of it.", ["0.5"]),
        ("Head `2.1`, section 4.5 and Python 3.11 or 3.12.", []),
        ("```python\nlr = 0.5\n```\n\nIt is 50.5 %.", ["50.5"]),
        ("```{admonition} Reality\n:class: reality\nIt fell by 0.25.\n```", ["0.25"]),
        ("```{note}\nOne.\n```\n\nIt is 0.5.\n\n```{note}\nTwo.\n```", ["0.5"]),
        ("A {term}`token` of 0.5 `nats`.", ["0.5"]),
        ("Version 1.2.3 of [it](https://x.org/1.5).", []),
    ],
)
def test_typed_results_are_found(text, found):
    assert typed_results(text) == found


def glossary() -> list[str]:
    body = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8").split("{glossary}\n")[1]
    return re.findall(r"^(?=[^\s:])(.+)$", body, re.M)


def test_glossary_terms_used_exist_and_stand_in_order():
    terms = glossary()
    assert terms == sorted(terms, key=str.lower)
    roles = [(where, role) for where, text in prose() for role in re.findall(r"\{term\}`([^`]+)`", text)]
    used = {(where, re.sub(r".*<(.+)>", r"\1", role, flags=re.S)) for where, role in roles}
    assert {pair for pair in used if pair[1] not in terms} == set()


def bibliography() -> set[str]:
    return set(re.findall(r"^@\w+\{(.+),$", (ROOT / "book" / "references.bib").read_text(encoding="utf-8"), re.M))


def test_citations_exist():
    roles = [keys for _, text in prose() for keys in re.findall(r"\{cite[:\w]*\}`([^`]+)`", text)]
    cited = {key.strip() for keys in roles for key in keys.split(",")}
    reported = yaml.safe_load((ROOT / "book" / "reported.yml").read_text(encoding="utf-8"))
    assert cited | {figure["source"] for figure in reported.values()} <= bibliography()


def test_contents_list_every_page_and_chapter():
    listed = set(re.findall(r"(?:file|root): (\S+)", (ROOT / "_toc.yml").read_text(encoding="utf-8")))
    assert listed == {path.relative_to(ROOT).with_suffix("").as_posix() for path in PAGES + CHAPTERS}


def test_every_claim_links_its_chapters():
    page = (ROOT / "book" / "journal.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (J\d+) \|.*\| (.+) \|$", page, re.M)
    assert [row[0] for row in rows] == [f"J{number}" for number in range(1, 19)]
    names = {path.stem[:2]: path.name for path in CHAPTERS}
    for claim, chapters in rows:
        numbers = set(re.findall(r"\b\d\d\b(?!_)", chapters))
        assert numbers, f"{claim} names no chapter"
        for number in numbers:
            assert f"[{number}](../notebooks/{names[number]})" in chapters, f"{claim} does not link its chapter"


def test_third_party_page_lists_the_corpus():
    page = (ROOT / "book" / "third_party.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(.+?)` \| `(.+?)` \|.*\|$", page, re.M))
    packages = load_profile(book.DEFAULT).text.packages
    assert rows == {(pinned.distribution or name): pinned.version for name, pinned in packages.items()}
    evaluated = set(re.findall(r"^\| `(.+?)` \|.*\| training, validation, test \|$", page, re.M))
    assert evaluated == {(pinned.distribution or name) for name, pinned in packages.items() if pinned.fingerprint}


def test_method_page_describes_the_shipped_model():
    """Its sizes are typed, for they are no results; so they are checked against the model."""
    facts = json.loads((ROOT / "models" / "docstring-gpt" / "config.json").read_text())
    page = " ".join((ROOT / "book" / "method.md").read_text(encoding="utf-8").split())
    profile = load_profile(book.DEFAULT)
    assert f"{facts['n_layer']} blocks, {facts['n_head']} {{term}}`heads" in page
    assert f"of {facts['n_embd']} dimensions" in page and f"of {facts['vocab_size']:,} tokens" in page
    assert facts["n_positions"] >= profile.induction_context
    assert f"{profile.induction_context} tokens in chapter 1, {profile.context_length} wherever" in page
    assert ("one training context in ten repeats" in page) == (profile.pretrain.repeat_share == 0.1)


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pages(site) -> dict[Path, BeautifulSoup]:
    files = [file for file in site.rglob("*.html") if "_static" not in file.parts]
    return {file.resolve(): BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser") for file in files}


def articles(pages) -> Iterator[tuple[str, Tag]]:
    """(page, its article without code) of the pages that we wrote."""
    for file, soup in pages.items():
        if article := soup.select_one("article.bd-article"):
            article = copy.copy(article)
            for code in article.select("pre, code, script, div.cell_output"):
                code.decompose()
            yield file.name, article


def test_every_source_has_its_page(pages):
    assert {path.stem for path in PAGES + CHAPTERS} <= {file.stem for file in pages}


def test_no_broken_link_or_anchor(pages):
    ids = {file: {tag["id"] for tag in soup.select("[id]")} for file, soup in pages.items()}
    broken = []
    for file, soup in pages.items():
        for link in soup.select("a[href]"):
            parts = urlsplit(link["href"])
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            lacks_anchor = parts.fragment and target in pages and unquote(parts.fragment) not in ids[target]
            if not target.is_file() or lacks_anchor:
                broken.append(f"{file.name}: {link['href']}")
    assert broken == []


def test_every_image_is_there_and_described(pages):
    for file, soup in pages.items():
        for image in soup.select("img"):
            alt = image.get("alt", "").strip()
            assert alt and not alt.startswith(("../", "_images", "_static")), f"{file.name}: {image} has no alt text"
            if not image["src"].startswith("data:"):
                assert (file.parent / unquote(urlsplit(image["src"]).path)).is_file(), f"{file.name}: {image['src']}"


FETCHED = (
    ("script", "src"), ("link:not([rel=canonical])", "href"), ("img", "src"), ("img", "srcset"), ("source", "src"),
    ("iframe", "src"), ("video", "src"), ("audio", "src"), ("embed", "src"), ("object", "data"), ("use", "href"),
)  # fmt: skip


def test_no_page_needs_the_network(pages, site):
    for file, soup in pages.items():
        for tag, attribute in FETCHED:
            for found in soup.select(f"{tag}[{attribute}]"):
                assert not re.match(r"(\w+:)?//", found[attribute]), f"{file.name} fetches {found[attribute]}"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"@import\s+(url\()?[\"']?(https?:)?//|url\([\"']?(https?:)?//", text), sheet.name


def test_figures_and_tables_are_numbered(pages):
    for file, soup in pages.items():
        for figure in soup.select("article figure"):
            assert figure.select_one(".caption-number") and figure.select_one(".caption-text"), f"{file.name}: {figure}"
        for image in soup.select("article div.cell_output img"):
            assert image.find_parent("figure"), f"{file.name}: a figure without caption and number"


def test_nothing_is_left_unrendered(pages):
    """Roles and directives that the parser did not know stay in the text without any warning."""
    marks = re.compile(r"\{(glue|cite|term|numref|ref|doc|eq|math|table|figure|admonition)\b[^}]*\}|`{3}|:{3,}")
    for name, article in articles(pages):
        assert not marks.search(article.get_text()), f"{name}: {marks.search(article.get_text())[0]}"
        assert not article.select(".system-message, .problematic"), name


def test_numbers_reach_the_title_page(pages):
    intro = next(soup for file, soup in pages.items() if file.name == "intro.html")
    values = [span.get_text() for span in intro.select("article .sd-card .value .pasted-text")]
    assert len(values) == 3 and all(values)
    table = next(table for table in intro.select("article table") if "docstring-gpt" in table.get_text())
    assert len(table.select("tbody tr")) == len(CHAPTERS)
    assert "not run" in table.get_text()


def test_pages_are_in_english_and_titled(pages):
    for file, soup in pages.items():
        if soup.select_one("article.bd-article"):
            assert soup.html["lang"] == "en" and soup.title.get_text(strip=True), file.name
            assert len(soup.select("article h1")) <= 1, file.name


def test_search_index_knows_the_chapters(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert all(f"notebooks/{path.stem}" in index for path in CHAPTERS)
    assert '"induct"' in index


# --- saelib.book ------------------------------------------------------------------------------------------------------


def notebook(outputs: bool = False, injected: str = "") -> nbformat.NotebookNode:
    """A chapter of three cells; `outputs`: as a run leaves it."""
    cells = [
        new_markdown_cell("# A chapter", id="a"),
        new_code_cell('profile = "docstring-gpt"\nn = 4', id="b", metadata={"tags": ["parameters"]}),
        new_code_cell("print(n)", id="c"),
    ]
    if injected:
        cells.insert(2, new_code_cell(f"# Parameters\n{injected}", id="d", metadata={"tags": ["injected-parameters"]}))
    if outputs:
        for count, cell in enumerate(cells[1:], start=1):
            cell.execution_count = count
            cell.metadata["papermill"] = {"duration": 1.0}
        streams = [("stderr", "100%"), ("stdout", "4\n")]
        cells[-1].outputs = [new_output("stream", name=name, text=text) for name, text in streams]
    return new_notebook(cells=cells, metadata={"papermill": {"input_path": "x"}} if outputs else {})


def test_merge_is_the_source_with_outputs():
    merged = book.merge(notebook(), notebook(outputs=True), "01_noun")
    assert [cell.source for cell in merged.cells] == [cell.source for cell in notebook().cells]
    assert [cell.execution_count for cell in merged.cells[1:]] == [1, 2]
    assert [output.text for output in merged.cells[2].outputs] == ["4\n"]
    assert "papermill" not in json.dumps(merged)


def test_merge_keeps_changed_parameters_in_sight():
    merged = book.merge(notebook(), notebook(outputs=True, injected='profile = "gpt2-small"'), "01_noun")
    assert [cell.source for cell in merged.cells][2] == '# Parameters\nprofile = "gpt2-small"'


def test_merge_refuses_an_edited_chapter():
    source = notebook()
    source.cells[2].source = "print(n + 1)"
    with pytest.raises(UserError, match="chapter 01_noun was edited after its run: `saelib run 01`"):
        book.merge(source, notebook(outputs=True), "01_noun")


@pytest.mark.parametrize("how", ["error", "cut short"])
def test_merge_refuses_a_failed_run(how):
    run = notebook(outputs=True)
    if how == "error":
        run.cells[2].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]
    else:
        run.cells[2].execution_count = None
    with pytest.raises(UserError, match="the last run of chapter 01_noun failed"):
        book.merge(notebook(), run, "01_noun")


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout of one chapter and a run of it."""
    monkeypatch.setattr(book, "ROOT", tmp_path)
    monkeypatch.setattr(book, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(book, "SITE", tmp_path / "_build" / "site")
    for folder in ("notebooks", "book", "_build/runs/docstring-gpt", "_build/results/docstring-gpt"):
        (tmp_path / folder).mkdir(parents=True)
    nbformat.write(notebook(), tmp_path / "notebooks" / "01_noun.ipynb")
    nbformat.write(notebook(outputs=True), tmp_path / "_build" / "runs" / "docstring-gpt" / "01_noun.ipynb")
    provenance = {"date": "2026-01-02", "wall_seconds": 41.7, "hardware": {"cores": 2, "gpu": None}}
    result = {"chapter": "01_noun", "profile": "docstring-gpt", "values": {}, "provenance": provenance}
    (tmp_path / "_build" / "results" / "docstring-gpt" / "01_noun.json").write_text(json.dumps(result))
    (tmp_path / "_config.yml").write_text('title: x\nonly_build_toc_files: true\nexecute: {execute_notebooks: "off"}\n')
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/intro\n")
    (tmp_path / "book" / "intro.md").write_text("# Title\n\nText.\n")
    return tmp_path


def test_stage_puts_executed_over_committed(checkout):
    site = book.stage("docstring-gpt")
    assert "4\\n" in (site / "notebooks" / "01_noun.ipynb").read_text()
    assert "**2026-01-02, 42 s, 2 CPU cores**" in (site / "book" / "_ran.md").read_text()
    site = book.stage("docstring-gpt", committed=True)
    assert "4\\n" not in (site / "notebooks" / "01_noun.ipynb").read_text()
    row = (site / "book" / "_ran.md").read_text().splitlines()[2]
    assert row.count("[not run]{.not-run}") == row.count("|") - 2


def test_build_shows_the_warnings_and_fails(checkout, capfd):
    (checkout / "book" / "intro.md").write_text("# Title\n\nSee [nothing](nowhere.md).\n")
    book.stage("docstring-gpt", committed=True)
    with pytest.raises(UserError, match="the book was not built"):
        book.build()
    shown = capfd.readouterr().err
    assert re.search(r"book/intro.md:3: .*WARNING.*nowhere.md", shown)


def test_publish_copies_numbers_and_outputs(checkout, monkeypatch):
    _last_run_is(monkeypatch, "done")
    written = [path.relative_to(checkout).as_posix() for path in book.publish("docstring-gpt")]
    assert written == ["notebooks/01_noun.ipynb", "results/docstring-gpt/01_noun.json"]
    published = nbformat.read(checkout / "notebooks" / "01_noun.ipynb", 4)
    assert [cell.execution_count for cell in published.cells[1:]] == [1, 2]
    assert published.cells[2].outputs[0].text == "4\n" and "papermill" not in json.dumps(published)
    again = (checkout / "notebooks" / "01_noun.ipynb").read_bytes()
    book.publish("docstring-gpt")
    assert (checkout / "notebooks" / "01_noun.ipynb").read_bytes() == again


def test_publish_of_another_profile_leaves_the_notebooks_alone(checkout, monkeypatch):
    _last_run_is(monkeypatch, "done")
    for folder in ("runs", "results"):
        (checkout / "_build" / folder / "docstring-gpt").rename(checkout / "_build" / folder / "gpt2-small")
    written = [path.relative_to(checkout).as_posix() for path in book.publish("gpt2-small")]
    assert written == ["results/gpt2-small/01_noun.json"]


def test_publish_refuses(checkout, monkeypatch):
    """A run that is out of date, a run of something else, no run: nothing is written."""

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            book.publish("docstring-gpt")
        assert not (checkout / "results").exists()

    for state in ("changed", "failed", "not run"):
        _last_run_is(monkeypatch, state)
        refused("01_noun: the last run is out of date, or used other parameters: `saelib run")
    (checkout / "_build" / "runs" / "docstring-gpt" / "01_noun.ipynb").unlink()
    refused("no chapter was run")


def test_a_rehearsal_is_neither_shown_nor_published(checkout, monkeypatch):
    _last_run_is(monkeypatch, "done")
    file = checkout / "_build" / "results" / "docstring-gpt" / "01_noun.json"
    content = json.loads(file.read_text())
    content["provenance"]["rehearsal"] = True
    file.write_text(json.dumps(content))
    for refuse in (book.publish, book.stage):
        with pytest.raises(UserError, match="01_noun of docstring-gpt: only rehearsed against a local hub"):
            refuse("docstring-gpt")
    assert not (checkout / "results").exists()


def _last_run_is(monkeypatch, state: str) -> None:
    from saelib import runner

    chapter = runner.Chapter(Path("01_noun.ipynb"), "A chapter", {}, [])
    plans = [runner.Plan(chapter, {}, "", state)]
    monkeypatch.setattr(runner, "plan", lambda names, profile: (plans, Path()))
