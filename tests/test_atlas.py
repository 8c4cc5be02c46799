"""The atlas says what a slow and obvious computation says, and its page works in a browser whatever the text holds."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_browser import PROGRAM, browser, serve  # noqa: F401 (fixtures)

from saelib import atlas, book, sparsity, study
from saelib.damage import origins
from saelib.metrics import activations
from saelib.sae import SAE
from saelib.text import Document, contexts

N, LENGTH = 32, 64


def in_a_browser(test):
    """Where there is one."""
    return pytest.mark.browser(pytest.mark.skipif(PROGRAM is None, reason="no Chromium found")(test))


@pytest.fixture(scope="module")
def text(profile, model):
    tokens = contexts(profile, model.tokenizer, "validation", N)
    documents, which = origins(profile, model.tokenizer, "validation", tokens)
    return atlas.Text(model.tokenizer, tokens.numpy(), documents, which.numpy())


@pytest.fixture(scope="module")
def saes(profile, model):
    return study.at_hand(profile, ["small", "small-seed-1", "no such"], model)


@pytest.fixture(scope="module")
def fired(profile, model, saes, text):
    return atlas.firings(profile, model, torch.from_numpy(text.tokens), saes)


@pytest.fixture(scope="module")
def dense(profile, model, saes, text):
    """The slow reference: values of all latents of small at all tokens."""
    x = torch.cat([*activations(profile, model, torch.from_numpy(text.tokens))])
    return saes["small"].encode(x, dense=True).values.detach().numpy()


@pytest.fixture(scope="module")
def some(fired):
    """Latents drawn at random from the living ones."""
    return np.random.default_rng(3).choice(atlas.alive(fired["small"]), 12, replace=False).tolist()


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_facts_equal_a_direct_recomputation(fired, dense, some):
    table, flat = atlas.facts(fired["small"]), dense.reshape(-1, dense.shape[-1])
    assert table.index.tolist() == np.flatnonzero((flat > 0).any(0)).tolist()
    for latent in some:
        values = flat[:, latent]
        assert table.times[latent] == (values > 0).sum()
        assert table.density[latent] == pytest.approx((values > 0).mean())
        assert table.highest[latent] == pytest.approx(values.max(), rel=1e-5)
        on = values[values > 0]
        assert atlas.histogram(fired["small"], latent).tolist() == np.histogram(on, atlas.BINS)[0].tolist()


def test_moments_are_the_top_contexts_and_others(fired, dense, some):
    seen = atlas.moments(fired["small"], LENGTH, n=4)
    for latent in some:
        best = dense[:, :, latent].max(1)
        order = [i for i in np.argsort(-best, kind="stable") if best[i] > 0]
        assert [at // LENGTH for at in seen.top[latent]] == order[:4]
        assert all(dense[at // LENGTH, at % LENGTH, latent] == best[at // LENGTH] for at in seen.top[latent])
        others = [at // LENGTH for at in seen.sampled.get(latent, [])]
        assert len(others) == min(4, max(0, len(order) - 4)) == len(set(others))
        assert set(others) <= set(order[4:])


def test_sampled_contexts_are_drawn_evenly():
    """A latent that fires in ten contexts, ever weaker: those behind the top two come up equally often."""
    ten = atlas.csr_array(np.linspace(1, 0.1, 10)[:, None]).tocsc()
    times = np.zeros(10)
    for seed in range(200):
        times[atlas.moments(ten, 1, n=2, seed=seed).sampled[0]] += 1
    assert not times[:2].any() and abs(times[2:] - 50).max() < 28


def test_excerpts_are_short_and_stay_in_their_document(fired, dense, text, some):
    seen = atlas.moments(fired["small"], LENGTH)
    for latent in some:
        at = seen.top[latent][0]
        row, column = divmod(at, LENGTH)
        document, place, ids, digits = atlas.excerpt(text, fired["small"], latent, at)
        start = column - place
        assert ids == text.tokens[row, start : start + len(ids)].tolist() and len(ids) == len(digits) <= 40
        assert set(text.which[row, start : start + len(ids)]) == {document}
        values = dense[row, start : start + len(ids), latent]
        assert [int(digit) for digit in digits] == np.ceil(9 * values / dense[..., latent].max() - 1e-5).tolist()
        assert digits[place] == "9"


def test_logit_effects_are_those_of_a_nudge_at_the_end(model, saes):
    """The last layer norm, linearised at a vector of its own scale, and the unembedding."""
    sae, latent = saes["small"], 5
    tokens, values = atlas.logit_effects(model, sae, np.array([latent]), 6)
    norm, row = model.ln_final, sae.W_dec[latent].detach()
    logits = ((row - row.mean()) * norm.weight) @ model.W_U
    logits = logits - logits.mean()
    order = logits.argsort(descending=True)
    assert tokens[0].tolist() == [*order[:6].tolist(), *order.flip(0)[:6].tolist()]
    assert torch.allclose(values[0], logits[tokens[0]], atol=1e-5)
    assert atlas.raised(model, sae, [latent])[0].startswith("5: ")


def test_ablated_is_the_mean_over_firings_of_switching_off_one_by_one(profile, model, saes, fired, text, monkeypatch):
    """However the runs are cut into batches; a latent that is never on with a window after is left out."""
    tokens, sae = torch.from_numpy(text.tokens), saes["small"]
    monkeypatch.setattr(atlas, "SUB_BATCH", {"cpu": 2 * LENGTH})
    rare = atlas.facts(fired["small"]).query("times <= 3").index[:12]
    found = atlas.ablated(profile, model, tokens, sae, fired["small"], rare, n=3)
    last = LENGTH - sparsity.WINDOW
    for latent in rare:
        at = fired["small"].indices[fired["small"].indptr[latent] : fired["small"].indptr[latent + 1]]
        at = [divmod(int(token), LENGTH) for token in at if token % LENGTH <= last]
        assert (latent in found.index) == bool(at)
        if at:
            rows, columns = map(torch.tensor, zip(*at, strict=True))
            each = sparsity.of_sae(model, profile.hook, tokens[rows], columns, sae)
            alone = each.sparsity()[(each.ids == latent) & each.on]
            assert found.times[latent] == len(at) == len(alone)
            assert found.sparsity[latent] == pytest.approx(float(alone.mean()), rel=1e-4)


def test_ablated_takes_only_so_many_and_draws_them(profile, model, saes, fired, text):
    often = atlas.facts(fired["small"]).sort_values("times").index[-2:]
    given = profile, model, torch.from_numpy(text.tokens), saes["small"], fired["small"], often
    one, again, other = (atlas.ablated(*given, n=4, seed=seed) for seed in (0, 0, 1))
    assert one.times.tolist() == [4, 4] and one.equals(again) and not one.sparsity.equals(other.sparsity)


def test_stored_reads_what_the_sweep_left():
    found = atlas.stored("docstring-gpt", "small")
    assert len(found) > 2000 and found.between(0, 1).all()
    assert atlas.stored("docstring-gpt", "no such") is None


def test_matched_finds_a_permuted_twin_and_no_chance_partner():
    ours = SAE(300, 64, 4, seed=0)
    twin, other = SAE(300, 64, 4, seed=1), SAE(300, 64, 4, seed=2)
    twin.W_dec.data = -3 * ours.W_dec.data.flip(0)  # another order and length; the sign counts
    assert atlas.matched(ours, twin).max() < atlas.MATCH
    twin.W_dec.data *= -1
    assert torch.allclose(atlas.matched(ours, twin), torch.ones(300), atol=1e-5)
    assert (atlas.matched(ours, other) < atlas.MATCH).all()


def test_neighbours_are_the_nearest_others(saes):
    shown = np.arange(0, 2048, 16)
    near = atlas.neighbours(saes["small"], shown, 3)
    unit = torch.nn.functional.normalize(saes["small"].W_dec.detach(), dim=1)[shown]
    cosines = (unit @ unit.T).fill_diagonal_(-1)
    for row in (0, 7, 100):
        found = near[int(shown[row])]
        assert [one for one, _ in found] == shown[cosines[row].topk(3).indices].tolist()
        assert [value for _, value in found] == pytest.approx(cosines[row].topk(3).values.tolist(), abs=1e-5)


def test_partners_equal_a_direct_recomputation(fired, saes, some):
    names = "small", "small-seed-1"
    table = atlas.partners(*(saes[name] for name in names), *(fired[name] for name in names))
    a, b = (fired[name].toarray() > 0 for name in names)
    unit = [torch.nn.functional.normalize(saes[name].W_dec.detach(), dim=1).numpy() for name in names]
    for latent in some:
        cosine = np.where(b.any(0), unit[1] @ unit[0][latent], -2)
        together = (a[:, [latent]] & b).sum(0) / np.sqrt(a[:, latent].sum() * b.sum(0).clip(1))
        row = table.loc[latent]
        assert row.by_cosine == cosine.argmax() and row.cosine == pytest.approx(cosine.max(), abs=1e-5)
        assert row.together == pytest.approx(together.max()) == together[int(row.by_together)]
        assert row.there == pytest.approx(together[int(row.by_cosine)])
        assert row.agree == (0 < together[int(row.by_cosine)] >= together.max() - 1e-6)


def test_a_planted_split_is_found_from_both_sides():
    """Large latents 0 and 1 halve small 0, by direction and text; 2 points at small 1 and fires with small 0."""
    small, large = SAE(2, 8, 1), SAE(3, 8, 1)
    small.W_dec.data = torch.eye(8)[:2]
    large.W_dec.data = torch.eye(8)[[0, 0, 1]] + 0.1 * torch.eye(8)[[2, 3, 4]]
    times = np.arange(8)
    fires = [atlas.csr_array(np.stack(columns, 1).astype(float)).tocsc() for columns in (
        [times < 6, times > 6], [times < 3, (times >= 3) & (times < 5), times == 5])]  # fmt: skip
    up = atlas.partners(large, small, *fires[::-1])
    assert atlas.parents(up)[2] == [(1, pytest.approx(up.cosine[2]), 0.0, False),
                                    (0, None, pytest.approx(6**-0.5), False)]  # fmt: skip
    tree = atlas.children(up)
    assert {row[0] for row in tree[0]} == {0, 1} and all(row[3] for row in tree[0])
    assert [row[0] for row in tree[1]] == [2] and not tree[1][0][3]


def test_a_tie_of_company_is_no_disagreement_and_no_company_no_agreement():
    a, b = SAE(2, 8, 1), SAE(3, 8, 1)
    a.W_dec.data, b.W_dec.data = torch.eye(8)[:2], torch.eye(8)[[2, 0, 1]]
    once, times = np.arange(4) == 0, np.arange(4)
    fires = [atlas.csr_array(np.stack(columns, 1).astype(float)).tocsc() for columns in (
        [once, times == 3], [once, once, times == 2])]  # fmt: skip
    found = atlas.partners(a, b, *fires)
    assert found.by_together[0] == 0 and found.by_cosine.tolist() == [1, 2] and found.agree.tolist() == [True, False]
    assert len(atlas.parents(found)[1]) == 1


def test_by_share_and_rank():
    x = pd.Series(np.arange(80.0), index=np.arange(80)[::-1])
    at, means = atlas.by_share(x, x >= 40, 4)
    assert at == [9.5, 29.5, 49.5, 69.5] and [point.value for point in means] == [0, 0, 1, 1]
    assert atlas.rank(x, -(x**3)).value == pytest.approx(-1)
    assert atlas.rank(x, x.where(x < 20)) is None


def test_what_is_not_there_is_none(fired):
    assert fired["no such"] is None


# --- the page ---------------------------------------------------------------------------------------------------------

HOSTILE = 'x</script><script>document.title = "broken"</script><img src=x onerror=nope()><!--<script>'


@pytest.fixture(scope="module")
def page(model, saes, fired, text) -> str:
    """The page of small on a little text, with a hostile document, token and explanation."""
    tokenizer = SimpleNamespace(
        all_special_ids=model.tokenizer.all_special_ids,
        decode=lambda ids: HOSTILE if ids == [int(text.tokens[0, 0])] else model.tokenizer.decode(ids),
    )
    documents = [Document(d.text, d.package, f"{HOSTILE} {i}", d.kind) for i, d in enumerate(text.documents)]
    table = atlas.facts(fired["small"]).assign(sparsity=np.nan, precision=0.5, recall=np.nan)
    table["partner"] = atlas.matched(saes["small"], saes["small-seed-1"])[table.index].numpy()
    kin = {int(latent): [(latent + 1, 0.9, 0.5, True), (latent + 2, 0.4, 0.1, False)] for latent in table.index[::2]}
    latents = atlas.Latents(saes["small"], fired["small"], table, kin, {int(table.index[3]): f"zebra {HOSTILE}"})
    head = {"profile": "a<b", "name": "small", "hook": "h", "other": "large", "splits": True}
    return atlas.page(head, model, text._replace(tokenizer=tokenizer, documents=documents), latents)


def test_nothing_breaks_out_of_the_page(page):
    assert HOSTILE not in page and page.count("</script>") == 3 and "a&lt;b" in page
    assert len(page.encode()) < atlas.LARGEST


def test_a_page_holds_as_many_as_fit(model, saes, fired, text, monkeypatch):
    table = atlas.facts(fired["small"]).assign(sparsity=0.1, precision=0.5, recall=0.5, partner=0.5)[:200]
    latents = atlas.Latents(saes["small"], fired["small"], table, {}, {})
    head = {"profile": "p", "name": "small", "hook": "h", "other": None, "splits": True}
    monkeypatch.setattr(atlas, "LARGEST", 60_000)
    assert 40_000 < len(atlas.page(head, model, text, latents)) <= 60_000


@pytest.fixture(scope="module")
def loaded(browser, serve, page, tmp_path_factory):  # noqa: F811
    """The page, opened once for all that follows; its address."""
    folder = tmp_path_factory.mktemp("atlas")
    for name in ("small", "large"):
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    browser.resize(1280, 900)
    address = serve(folder)
    browser.visit(f"{address}/small.html")
    browser.wait_for("document.documentElement.dataset.ready")
    return browser


@pytest.fixture
def opened(loaded):
    """The page with empty fields."""
    for field, value in {"query": "", "kind": "all", "package": ""}.items():
        put(loaded, field, value)
    return loaded


ROWS = "[...document.querySelectorAll('#rows tr')].map(row => row.children[0].innerText)"


def put(page, field: str, value: str) -> list[str]:
    """Numbers of the latents listed after a field was filled in."""
    page.evaluate(f"(() => {{ const f = document.getElementById({field!r}); f.value = {json.dumps(value)}; "
                  "f.dispatchEvent(new Event('input')); f.dispatchEvent(new Event('change')); })()")  # fmt: skip
    page.evaluate("new Promise(done => setTimeout(() => done(true), 150))")
    return page.evaluate(ROWS)


@in_a_browser
def test_search_finds(opened, fired):
    living = atlas.alive(fired["small"])
    assert put(opened, "query", "ZEBRA") == [str(living[3])]
    assert put(opened, "query", str(living[10]))[0] == str(living[10])
    assert put(opened, "query", "no such word anywhere") == []
    assert opened.evaluate("document.getElementById('count').innerText").startswith("0 of ")
    assert opened.problems() == []


@in_a_browser
def test_filters_filter_and_columns_sort(opened, fired):
    assert put(opened, "kind", "explained") == [str(atlas.alive(fired["small"])[3])]
    split = put(opened, "kind", "split")
    assert split and set(split) <= {str(i) for i in atlas.alive(fired["small"])[::2]}
    put(opened, "kind", "all")
    table = atlas.facts(fired["small"])
    for up in (False, True):
        opened.evaluate("document.querySelector('th[data-key=highest] button').click()")
        head = opened.evaluate("document.querySelector('th[data-key=highest]').getAttribute('aria-sort')")
        assert head == ("ascending" if up else "descending")
        shown = [table.highest[int(i)] for i in opened.evaluate(ROWS)]
        assert np.allclose(shown, sorted(shown, reverse=not up), rtol=0.011)
    assert not opened.evaluate("[...document.querySelectorAll('th')].some(head => head.innerText.startsWith('Recall'))")
    assert opened.problems() == []


@in_a_browser
def test_links_and_keys_lead_from_latent_to_latent(opened, fired):
    def shown() -> str:
        opened.evaluate("new Promise(done => setTimeout(() => done(true), 60))")
        return opened.evaluate("document.querySelector('#detail h2').innerText")

    first, second = opened.evaluate(ROWS)[:2]
    opened.evaluate(f"location.hash = '{first}'")
    assert shown() == f"Latent {first}"
    opened.call("Input.dispatchKeyEvent", type="keyDown", key="j", text="j")
    assert shown() == f"Latent {second}"
    opened.evaluate("document.querySelector('.near a').click()")
    assert shown() == "Latent " + opened.evaluate("location.hash.slice(1)") != f"Latent {second}"
    living = atlas.alive(fired["small"])
    opened.evaluate(f"location.hash = '{living[2]}'")
    assert shown() == f"Latent {living[2]}"
    assert opened.evaluate("document.querySelector('.kin a').getAttribute('href')") == f"large.html#{living[2] + 1}"
    opened.evaluate("document.querySelector('.kin a').click()")
    opened.wait_for("location.pathname === '/large.html' && document.documentElement.dataset.ready")
    opened.evaluate("location.hash = '999999'")
    assert shown() == "Latent 999999" and opened.problems() == []


@in_a_browser
def test_hostile_text_shows_as_text(opened, fired):
    opened.evaluate(f"location.hash = '{atlas.alive(fired['small'])[3]}'")
    opened.wait_for("document.querySelector('.explanation')")
    assert "</script><script>" in opened.evaluate("document.querySelector('.explanation').innerText")
    assert "<img src=x" in opened.evaluate("document.querySelector('.from').innerText")
    assert opened.evaluate("document.querySelectorAll('img').length") == 0
    assert opened.evaluate("document.title") != "broken" and opened.problems() == []


@in_a_browser
def test_it_is_labelled_and_works_on_a_telephone(opened, fired):
    assert opened.evaluate("[...document.querySelectorAll('input, select')].every(f => f.labels.length === 1)")
    assert opened.evaluate("document.querySelector('svg[role=img]').getAttribute('aria-label')")
    opened.resize(390, 844)
    assert opened.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    heads = "[...document.querySelectorAll('#heads th')].filter(head => head.offsetParent)"
    ends = dict(opened.evaluate(f"{heads}.map(head => [head.dataset.key, head.getBoundingClientRect().right])"))
    assert {"id", "precision", "partner"} <= ends.keys() and max(ends.values()) <= 390
    living = atlas.alive(fired["small"])
    assert put(opened, "query", "zebra") == put(opened, "kind", "explained") == [str(living[3])]
    put(opened, "kind", "all")
    put(opened, "query", "")
    opened.evaluate("document.querySelector('th[data-key=id] button').click()")
    assert opened.evaluate(ROWS)[:3] == [str(latent) for latent in living[:3]]
    assert opened.problems() == []


# --- in the book ------------------------------------------------------------------------------------------------------


def test_the_book_takes_the_pages_that_its_run_made(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "SITE", tmp_path / "site")
    (tmp_path / "site").mkdir()
    made = tmp_path / "atlas"
    made.mkdir()
    (made / "small.html").write_text("<p>ours</p>")
    book._stage_atlas(made)
    assert (tmp_path / "site/atlas/small.html").read_text() == "<p>ours</p>"
    assert "saelib run 10" in (tmp_path / "site/atlas/large.html").read_text()
