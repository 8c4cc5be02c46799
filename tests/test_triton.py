"""The Triton kernels against float64 and against the plain forms, in Triton's interpreter.

With a GPU, `TRITON_INTERPRET=0 pytest tests/test_triton.py` runs the same tests on it, kernels compiled.
"""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelib import kernels_triton, ops
from saelib.objective import Sparse
from saelib.profile import ROOT, Recipe
from saelib.sae import SAE

pytestmark = pytest.mark.skipif(
    kernels_triton.triton is None, reason="no Triton here: it comes with PyTorch's builds for GPUs on Linux"
)
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
seeds = st.integers(0, 2**31)
kept = kernels_triton.kept


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """`ops` uses the kernels, with tiles so small that little shapes have several."""
    if DEVICE == "cpu":
        monkeypatch.setenv("SAELIB_NATIVE", "triton")
        small(monkeypatch)


def small(monkeypatch):
    few = {"COLUMNS": 16, "PAIRS": 4, "SEGMENT": 8, "CHUNK": 8, "DEPTH": 64}
    few["TILE"] = {"ROWS": 16, "LATENTS": 32, "GROUP": 2}
    few["kept"] = lambda k, n: 2 if k <= math.ceil(n / 8) else None  # so few that rows are in doubt all the time
    for name, value in few.items():
        monkeypatch.setattr(kernels_triton, name, value)


def numbers(seed, *shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def same(found, expected, tolerance=1e-5):
    found, expected = found.double(), expected.double()
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * max(scale, 1e-30))


few = settings(max_examples=8, deadline=None)


# --- decoder and gradients --------------------------------------------------------------------------------------------


@few
@given(seeds, st.integers(0, 4), st.integers(1, 10), st.integers(1, 40), st.integers(1, 40))
def test_decode_is_a_product_with_a_sparse_matrix(seed, rows, k, n, d):
    scores, weight = numbers(seed, (rows, n), (n, d))
    values, indices = scores.topk(min(k, n))
    expected = torch.zeros_like(scores).scatter(1, indices, values).double() @ weight.double()
    same(ops.decode(values, indices, weight), expected)
    half = ops.decode(values[None, :, :k], indices[None, :, :k], weight.bfloat16())  # batch shapes, other floats
    assert half.dtype == torch.bfloat16 and half.shape == (1, rows, d)
    same(half[0], expected, 0.02)


def pairs(seed, tokens, n, k, how):
    """Which latents fire: at random; all tokens choose the same; or one that every token chooses among others."""
    scores = numbers(seed, (tokens, n))[0]
    if how == "same":
        scores[:] = scores[:1].clone()
    elif how == "always":
        scores[:, n // 2] = 10
    return scores.topk(k)


@few
@given(
    seeds, st.integers(1, 12), st.integers(1, 8), st.integers(1, 6), st.integers(1, 24), st.integers(1, 2),
    st.sampled_from(["random", "same", "always"]),
)  # fmt: skip
def test_gradients_equal_dense_products(seed, tokens, n, k, d, sets, how):
    values, indices = pairs(seed, tokens, n, min(k, n), how)
    z = torch.stack([values.relu(), 0.5 * (values - 0.3).relu()][:sets])
    g, factors, x, weight = numbers(seed + 1, (sets, tokens, d), (sets, tokens), (tokens, d), (n, d))
    dense = [torch.zeros(tokens, n, device=DEVICE).scatter(1, indices, one).double() for one in z]
    scaled = g.double() * factors.double()[..., None]
    d_pre = sum((grad @ weight.double().T) * (active > 0) for grad, active in zip(scaled, dense, strict=True))
    found = [torch.full((n, d), torch.nan, device=DEVICE) for _ in range(2)]
    latent = ops.gradients(indices, z, g, factors, x, weight, *found)
    same(found[0], sum(active.T @ grad for grad, active in zip(scaled, dense, strict=True)))
    same(found[1], d_pre.T @ x.double())
    same(latent, d_pre.sum(0))


def test_bits_repeat_and_a_latent_of_every_token_is_cut_into_segments():
    tokens, n, k, d = 30, 4, 2, 20
    values, indices = pairs(0, tokens, n, k, "always")
    z, (g, factors, x, weight) = values.relu()[None], numbers(1, (1, tokens, d), (1, tokens), (tokens, d), (n, d))
    latents = indices.reshape(-1).to(torch.int32).sort().values
    starts = torch.searchsorted(latents, torch.arange(n + 2, dtype=torch.int32, device=DEVICE))
    owner, place = kernels_triton._work(starts, tokens * k)
    most = starts.diff()[:n].max().item()
    assert most >= tokens and place[owner == n // 2].tolist() == list(range(math.ceil(most / kernels_triton.SEGMENT)))
    runs = []
    for _ in range(2):
        to_dec, to_enc = (torch.empty(n, d, device=DEVICE) for _ in range(2))
        latent = ops.gradients(indices, z, g, factors, x, weight, to_dec, to_enc)
        runs.append((to_dec, to_enc, latent, ops.decode(z[0], indices, weight)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


# --- encoder ----------------------------------------------------------------------------------------------------------


def exact(x, weight, bias, k):
    """`encode`, checked to the bit against the whole product. Factors are small integers: no product is rounded."""
    encoder = ops.Encoder(weight, bias)
    pre = encoder(x)
    values, indices, _ = ops.encode(x, encoder, k, torch.arange(0), 0)
    expected = pre.topk(k).values
    assert values.dtype == torch.float32 and indices.dtype == torch.int64
    assert torch.equal(values.nan_to_num(1e30), expected.nan_to_num(1e30))
    assert torch.equal(pre.gather(1, indices).nan_to_num(1e30), values.nan_to_num(1e30))
    assert all(len(set(row)) == k for row in indices.tolist())


def integers(seed, *shapes, most=3):
    return [x.mul(most).round().clamp(-most, most) for x in numbers(seed, *shapes)]


@settings(max_examples=60, deadline=None)
@given(
    seeds, st.integers(1, 20), st.sampled_from([1, 8, 32, 64, 77]), st.integers(1, 40), st.floats(0, 1),
    st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["random", "constant", "clustered", "nan", "infinite"]),
)  # fmt: skip
def test_encode_is_exact(seed, rows, n, d, share, biased, dtype, how):
    x, weight, bias = integers(seed, (rows, d), (n, d), (n,))
    match how:
        case "constant":  # every chunk is full of ties
            weight[:] = weight[:1].clone()
            bias.zero_()
        case "clustered":  # all of the top k in neighbouring latents
            x, weight = x.abs() + 1, weight.sort(0).values
        case "nan":
            x[::2, 0] = torch.nan
        case "infinite":
            bias[::3], bias[1::3] = torch.inf, -torch.inf
            biased = True
    k = max(1, min(n, round(share**3 * n)))
    exact(x, weight.to(dtype), bias if biased else None, k)


def test_rows_are_in_doubt_where_a_chunk_may_hide_more_and_nowhere_else():
    n, d, k = 64, 3, 4
    weight = torch.zeros(n, d, device=DEVICE)
    weight[:, 0] = torch.arange(n, device=DEVICE)  # the largest are neighbours
    weight[::8, 1] = 100 + torch.arange(8, device=DEVICE)  # one of every chunk is large
    weight[::4, 2] = 100  # two are, and equal
    x = torch.eye(3, device=DEVICE)
    assert kernels_triton.encode_topk(x, weight, None, k)[2].tolist() == [True, False, False]
    exact(x, weight, None, k)
    assert not kernels_triton.encode_topk(x, torch.ones_like(weight), None, k)[2].any()  # ties hide nothing larger
    assert kernels_triton.encode_topk(x, weight, None, n) is None
    exact(x, weight, None, n)


def test_chunks_keep_so_many_that_doubt_is_rare(monkeypatch):
    monkeypatch.setattr(kernels_triton, "CHUNK", 32)
    found = {(k, n): kept(k, n) for k in (16, 32, 128) for n in (8192, 32768, 131072)}
    assert found[32, 32768] == 4 and found[32, 131072] == 3 and found[128, 32768] == 5
    for (k, n), some in found.items():
        generator = torch.Generator().manual_seed(n + k)
        chunk = torch.randint(n // 32, (20_000, k), generator=generator).sort(1).values
        crowded = (chunk[:, some - 1 :] == chunk[:, : k - some + 1]).any(1)
        assert crowded.double().mean() < 2e-3
    assert kept(300, 8192) is None


def test_encode_in_the_tiles_of_a_real_run(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("SAELIB_NATIVE", "triton" if DEVICE == "cpu" else "1")
    x, weight, bias = integers(3, (150, 100), (300, 100), (300,))
    for dtype in (torch.float32, torch.bfloat16):
        exact(x, weight.to(dtype), bias, 3)
    x, weight, bias = numbers(4, (150, 100), (300, 100), (300,))
    for factors in (weight, weight.bfloat16()):
        values, indices, _ = ops.encode(x, ops.Encoder(factors, bias), 3, torch.arange(0), 0)
        pre = x.to(factors.dtype).double() @ factors.double().T + bias.double()
        same(values, pre.topk(3).values)
        same(pre.gather(1, indices), pre.topk(3).values)


def test_large_batches_are_cut_into_tiles_of_rows(monkeypatch):
    x, weight = integers(5, (50, 8), (64, 8))
    whole = kernels_triton.encode_topk(x, weight, None, 2)
    monkeypatch.setattr(kernels_triton, "CANDIDATES", 1)
    assert all(
        torch.equal(one, other)
        for one, other in zip(whole, kernels_triton.encode_topk(x, weight, None, 2), strict=True)
    )


# --- optimizer --------------------------------------------------------------------------------------------------------


@few
@given(seeds, st.integers(1, 4), st.integers(2, 40), st.booleans(), st.booleans(), st.booleans())
def test_update_and_across_equal_the_plain_forms(seed, n, d, project, unit, flat):
    shape = (n,) if flat else (n, d)
    project, unit = project and not flat, unit and not flat
    weight, gradient, average, first, second = numbers(seed, *[shape] * 5)
    runs = []
    for dtype in (torch.float32, torch.float64):  # the kernel, and the plain form
        parameter = torch.nn.Parameter(weight.to(dtype, copy=True))
        parameter.grad = gradient.to(dtype)
        others = [x.to(dtype, copy=True) for x in (first, second.square(), average)]
        if not flat:
            own, row = gradient.double(), weight.double()
            expected = own - (own * row).sum(1, keepdim=True) / row.square().sum(1, keepdim=True) * row
            squares = ops.across(parameter.grad, parameter)
            torch.testing.assert_close(
                squares.double(), expected.square().sum(1), rtol=1e-5, atol=1e-5 * own.square().sum(1).max().item()
            )
        ops.update(parameter, *others, ops.Adam(0.01, 0.9, 0.999, 1e-8, 0.9, 3, 0.5), project=project, unit=unit)
        runs.append((parameter.data, *others))
    for one, other in zip(*runs, strict=True):
        same(one, other)


def test_rows_too_wide_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(kernels_triton, "WIDEST", 8)
    test_update_and_across_equal_the_plain_forms.hypothesis.inner_test(0, 3, 20, True, True, False)


# --- which forms are used ---------------------------------------------------------------------------------------------


def test_kernels_are_left_alone_where_they_do_not_fit(monkeypatch):
    (x,) = numbers(0, (6, 8))
    assert kernels_triton.usable(x)
    assert not kernels_triton.usable(x, x.T) and not kernels_triton.usable(x.double())
    learned = x.clone().requires_grad_()
    assert not kernels_triton.usable(learned)
    values, indices = x.topk(2)
    ops.decode(values, indices % 6, learned).sum().backward()  # autograd sees the plain form
    assert learned.grad is not None
    with torch.no_grad():
        assert kernels_triton.usable(learned)
    monkeypatch.setenv("SAELIB_NATIVE", "0")
    assert not kernels_triton.usable(x)
    if DEVICE == "cpu":
        monkeypatch.delenv("SAELIB_NATIVE")
        assert not kernels_triton.usable(x)  # the interpreter has to be asked for


# --- a training step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("latent_bias", [False, True])
def test_a_step_has_the_plain_gradients(monkeypatch, latent_bias, precision):
    n, d, batch = 40, 12, 10
    recipe = Recipe(
        n_latents=n, k=1, batch=batch, k_aux=4, multi_topk=True, latent_bias=latent_bias, precision=precision
    )
    x, bias = numbers(0, (batch, d), (n,))
    dead = torch.arange(n, device=DEVICE) % 9 == 0
    runs = {}
    for forms in ("0", os.environ.get("SAELIB_NATIVE", "1")):
        monkeypatch.setenv("SAELIB_NATIVE", forms)
        sae = SAE(n, d, 1, latent_bias=latent_bias, seed=1).to(DEVICE)
        if latent_bias:
            sae.latent_bias.data.copy_(0.05 * bias)
        step = Sparse(sae, recipe, 0.7)
        terms = [step(x.clone(), dead) for _ in range(2)]
        assert all(torch.equal(one, other) for one, other in zip(*terms, strict=True))
        runs[forms] = (*terms[0], *(p.grad for p in sae.parameters()))
    assert runs["0"][2] > 0  # AuxK took part
    for one, other in zip(*runs.values(), strict=True):
        same(other, one, 1e-4)


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter takes what the compiler does not."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "compiled.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.count("\n") == 14, run.stderr


# --- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    return gpu


def test_the_table_has_what_failed_and_what_is_missing(benchmark):
    failed, other = {"title": "floor", "failed": "out of memory"}, {"title": "ours", "rounds": [], "facts": {}}
    speeds = {"tokens_s": 2000.0, "least": 1000.0, "most": 3000.0, "peak_mb": 5.0}
    rows = {"floor": failed, "ours": other | speeds}
    page = benchmark.page({"plumbing": True, "configurations": {"n 8": {"systems": rows}}})
    assert "| out of memory |" in page and "| 2,000 (1,000–3,000) | 5 |" in page and "not yet" in page


@pytest.mark.long
def test_the_benchmarks_plumbing(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    result = json.loads((tmp_path / "gpu-plumbing.json").read_text())
    assert result["plumbing"] and result["hardware"]["gpu"] is None and result["aims"]["times_sparsify"] == 2.5
    (case,) = result["configurations"].values()
    assert set(case["systems"]) == {"floor", "ours", "ours-plain"} and case["times_sparsify"] is None
    for row in case["systems"].values():
        assert {"tokens_s", "least", "most", "peak_mb", "share_of_floor"} <= set(row), row
    assert {"bf16_tflop_s", "tf32_tflop_s", "copy_gb_s", "with_rows"} <= set(case["systems"]["floor"]["facts"])
    assert {"harvest", "train", "both", "share"} <= set(result["end_to_end"]["facts"])
    assert (tmp_path / "gpu-plumbing.md").read_text().startswith("# Plumbing only, not a measurement")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would measure")
def test_without_a_gpu_the_benchmark_says_so(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    said = capsys.readouterr().err
    assert said.startswith("no GPU here") and said.count("\n") == 1
