"""Other k, shrinkage and outliers on SAEs with known answers; the sweep's tables on results of our own."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from saelib import UserError, report, study, train
from saelib.metrics import NormalizedMse, evaluate
from saelib.profile import Recipe, load_profile
from saelib.sae import SAE

D = 8


def identity(scale=1.0, k=3):
    """Latents for both directions of each axis: as many as are kept are reconstructed exactly, times `scale`."""
    sae = SAE(2 * D, D, k, normalize="none")
    sae.W_dec.data.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
    sae.W_enc.data.copy_(sae.W_dec.data * scale)
    return sae.eval()


def data(n=64, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


# --- one autoencoder --------------------------------------------------------------------------------------------------


def test_at_other_k_keeps_the_largest():
    x = data()
    squares = x.square().sort(dim=1, descending=True).values
    expected = [squares[:, k:].sum() / (x - x.mean(0)).square().sum() for k in (1, 2, 5, 8, 16)]
    found = study.at_other_k(identity(), [x[:32, None], x[32:, None]], [1, 2, 5, 8, 16])
    assert found == pytest.approx([value.item() for value in expected], abs=1e-6)


def test_at_its_own_k_it_is_the_usual_error():
    sae, x = SAE(64, D, 4, seed=1).eval(), data(60).view(15, 4, D)
    assert study.at_other_k(sae, [x], [2, 4])[1] == pytest.approx(evaluate(sae, [x])["normalized_mse"], rel=1e-5)


def test_what_shrinks_is_refined_back():
    """Directions at right angles, all kept, every latent a fifth too small: the best values are a quarter larger."""
    found = study.refined(identity(scale=0.8, k=D), data())
    assert found.norm == pytest.approx(1.25, rel=1e-4) and found.mse == pytest.approx(0, abs=1e-6)


def test_refining_is_non_negative_least_squares_on_the_support():
    """Directions that overlap, against SciPy's solver for each token."""
    from scipy.optimize import nnls

    sae, x = SAE(40, D, 5, seed=3, normalize="none").eval(), data(20, seed=4)
    z, directions = sae.encode(x, dense=True).values.detach(), sae.W_dec.detach()
    residuals = [
        nnls(directions[row > 0].T.double().numpy(), token.numpy())[1] for row, token in zip(z, x, strict=True)
    ]
    expected = np.square(residuals).sum() / (x - x.mean(0)).square().sum().item()
    assert study.refined(sae, x).mse == pytest.approx(expected, rel=1e-3)
    assert study.refined(sae, x).mse <= study.at_other_k(sae, [x[None]], [5])[0]


def test_nothing_to_refine_changes_nothing():
    x = data()
    found = study.refined(identity(), x)
    assert found.norm == pytest.approx(1, rel=1e-5)
    assert found.mse == pytest.approx(study.at_other_k(identity(), [x[None]], [3])[0], rel=1e-4)


def test_contexts_say_how_sure_the_refined_error_is():
    """The error is the same as without them. With nothing to refine, so is its standard error."""
    x, as_it_is = data(320).view(32, 10, D), NormalizedMse()
    as_it_is.add(x, identity()(x))
    found, without = study.refined(identity(), x), study.refined(identity(), x.flatten(0, 1))
    assert found.mse == pytest.approx(without.mse) and found.norm == pytest.approx(without.norm)
    assert found.se == pytest.approx(as_it_is.result().se, rel=1e-3) and without.se == pytest.approx(0)


def test_outlier_severity():
    """The mean over the spread, both as lengths over all dimensions; the pre-bias can take the mean out."""
    sae, x = identity(), data(5000)
    x = (x - x.mean(0)) / x.std(0)
    shift = torch.zeros(D)
    shift[2] = 3 * D**0.5
    assert study.outliers(sae, x) == pytest.approx(0, abs=1e-6)
    assert study.outliers(sae, x + shift) == pytest.approx(3, rel=1e-5)
    sae.pre_bias.data.copy_(shift)
    assert study.outliers(sae, x + shift) == pytest.approx(0, abs=1e-6)


def test_outliers_kill_latents_at_the_start_and_centring_saves_them():
    x = data(2000) + torch.tensor([40.0, *[0.0] * (D - 1)])
    recipe = {"n_latents": 64, "k": 4, "normalize": "none"}
    severity, dead = study.at_start(Recipe(**recipe, pre_bias="zero"), x)
    centred, saved = study.at_start(Recipe(**recipe, pre_bias="mean"), x)
    assert severity > 10 and dead > 0.8
    assert centred < 0.01 and saved < 0.1


# --- the recipe and the sweep -----------------------------------------------------------------------------------------


def test_every_ingredient_is_listed_with_its_source():
    table = study.ingredients(Recipe(n_latents=2**12, lr_anchor=2e-4))
    assert list(table.index) == list(Recipe.model_fields)
    assert table.value["lr"] == "0.0004", "the rate that applies"
    assert (table["what it is"] != "").all() and not table["what it is"].str.contains("\n").any()
    assert "section 2.1" in table["what it is"]["normalize"] and "appendix A" in table["what it is"]["tied_init"]


def test_the_grid_is_of_recipes_that_exist():
    profile, grid = load_profile("docstring-gpt"), study.grid()
    recipes = {variant: study.recipe_of(profile, variant) for variant in grid["variants"]}
    base = recipes["whole"]
    assert base.tokens == grid["base"]["recipe.tokens"]
    same = [variant for variant, recipe in recipes.items() if recipe == base and variant != "whole"]
    assert {variant for variant in same if "activations" not in str(grid["variants"][variant])} == set()


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Stores variants as the sweep does."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    folder = tmp_path / "results" / "small" / "06_sweep"
    folder.mkdir(parents=True)

    def store(variant, errors, without=()):
        lists = dict.fromkeys(study.MEASURES, [2.0] * len(errors)) | {"normalized_mse": errors}
        values = {name: {"value": value} for name, value in lists.items() if name not in without}
        (folder / f"{variant}.json").write_text(json.dumps({"values": values}))

    return store


def test_the_table_pairs_seeds(sweep):
    """Seeds that differ much and a variant that adds about 0.01 to each: the interval is that of the differences."""
    sweep("whole", [0.1, 0.2, 0.3])
    sweep("worse", [0.11, 0.211, 0.312])
    row = study.sweep_table("small", ["whole", "worse"]).loc["worse"]
    assert (row.seeds, row.mse, row.l0) == (3, pytest.approx(0.211), 2)
    assert row.difference == pytest.approx(0.011) and row.se == pytest.approx(0.001 / 3**0.5)
    interval = stats.ttest_1samp([0.01, 0.011, 0.012], 0).confidence_interval(0.95)
    assert (row.difference - row.half, row.difference + row.half) == pytest.approx(tuple(interval))


def test_fewer_seeds_and_another_base(sweep):
    sweep("whole", [0.1, 0.2, 0.3])
    sweep("short", [0.15, 0.26])
    sweep("other", [0.16, 0.28])
    table = study.sweep_table("small", ["short", "other"], against="short")
    assert table.difference["other"] == pytest.approx(0.015) and table.difference["short"] == 0
    assert study.sweep_table("small", ["other"]).difference["other"] == pytest.approx(0.07)
    assert study.sweep_table("small", ["other"]).half["other"] == pytest.approx(12.706 * 0.01, rel=1e-3), "t of 1"


def test_what_was_not_run_is_not_a_number(sweep):
    sweep("whole", [0.1])
    sweep("half-way", [0.1], without=["outliers"])
    table = study.sweep_table("small", ["whole", "half-way", "never"])
    assert list(table.seeds) == [1, 0, 0] and table.mse.isna().tolist() == [False, True, True]
    assert np.isnan(table.half["whole"]), "one seed has no interval"
    assert study.curve("small", "never", "steps") is None
    assert study.curve("small", "whole", "normalized_mse") == [0.1]
    assert study.sweep_table("elsewhere", ["whole"]).seeds["whole"] == 0


def test_rank_agreement():
    curves = {0.1: [3.0, 1.0], 0.2: [2.0, 2.0], 0.3: [1.0, 3.0]}
    assert study.rank_agreement(curves, {0.1: 1.0, 0.2: 2.0, 0.3: 9.0}) == pytest.approx([-1, 1])


def test_matched_l0_is_read_from_a_line_in_logarithms():
    runs = pd.DataFrame({"l0": [40.0, 10.0, np.nan], "mse": [0.1, 0.4, np.nan]})
    assert study.matched(runs, 20) == pytest.approx(0.2)
    assert study.matched(runs, 10) == pytest.approx(0.4) and study.matched(runs, 40.4) == pytest.approx(0.1)
    assert study.matched(runs, 5) is None and study.matched(runs, 41) is None
    assert study.matched(runs.iloc[2:], 20) is None


def test_only_what_is_there_is_at_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "BUILD", tmp_path)
    profile = load_profile("docstring-gpt")
    absent = profile.saes["small"].model_copy(update={"path": tmp_path / "absent"})
    profile = profile.model_copy(update={"saes": {"small": absent}})
    assert study.at_hand(profile, ["small", "unheard-of"], None) == {"small": None, "unheard-of": None}


def test_a_variant_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(study, "grid", lambda: {"base": {}, "variants": {"odd": {"recipe.unheard": 1}}})
    with pytest.raises(UserError, match=r"unknown key 'recipe\.unheard'"):
        study.recipe_of(load_profile("docstring-gpt"), "odd")
