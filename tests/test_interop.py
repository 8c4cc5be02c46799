"""The peers judge: their packages load what we export, we load what they write, and both reconstruct the same.

Each peer lives in an environment of its own (`python -m venv _build/peers/sae-lens`, then `pip install sae-lens` in
it); its Python is found there, or named by `$SAELIB_PEER_SAE_LENS`, `$SAELIB_PEER_EAI_SPARSIFY` and
`$SAELIB_PEER_DICTIONARY_LEARNING`.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saelib.formats import export, load
from saelib.profile import BUILD
from saelib.sae import SAE

pytestmark = pytest.mark.interop

N, D, K = 96, 32, 8
PEERS = {"sae-lens": "saelens", "eai-sparsify": "sparsify", "dictionary-learning": "dictionary_learning"}
NORMALIZE = ("unit", "layer_norm", "none")
JUDGE = Path(__file__).parent / "interop" / "judge.py"


def raw_activations():
    """Activations as residual streams are: far from the origin, some dimensions larger than others."""
    generator = torch.Generator().manual_seed(2)
    return 20 * torch.randn(256, D, generator=generator) + 60 * torch.randn(D, generator=generator) + 300


def trained(normalize):
    """An SAE with nothing at its start value."""
    torch.manual_seed(3)
    sae = SAE(N, D, K, latent_bias=True, normalize=normalize).eval()
    for parameter in sae.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    sae.facts = {"model": "docstring-gpt", "hook": "blocks.2.hook_resid_post", "recipe": {"k": K}}
    return sae


def inputs(peer, normalize):
    """What the peer is given for an SAE of ours: SAELens normalises by itself, the others get it done."""
    x = raw_activations() / (100 if normalize == "none" else 1)
    return x if peer == "sae-lens" else trained(normalize).normalized(x)[0]


@pytest.fixture(scope="module", params=PEERS)
def judged(request, tmp_path_factory):
    """A peer, and the folder where it has loaded our SAEs and written its own, by one start of its Python."""
    peer, work = request.param, tmp_path_factory.mktemp("judge")
    name = f"SAELIB_PEER_{peer.replace('-', '_').upper()}"
    python = Path(os.environ.get(name, BUILD / "peers" / peer / "bin" / "python"))
    if not python.is_file():
        pytest.skip(f"no environment with {peer}: install it in _build/peers/{peer}, or set {name}")
    jobs = ["writes", "training_writes"] if peer == "sae-lens" else ["writes"]
    own = raw_activations() if peer == "sae-lens" else raw_activations() / 100
    for normalize in NORMALIZE:
        export(trained(normalize), work / normalize, PEERS[peer])
        save_file({"x": inputs(peer, normalize)}, work / f"{normalize}.inputs")
    for job in jobs:
        save_file({"x": own}, work / f"{job}.inputs")
    arguments = [f"loads={work / normalize}" for normalize in NORMALIZE] + [f"{job}={work / job}" for job in jobs]
    environment = {**os.environ, "SPARSIFY_DISABLE_TRITON": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([python, "-P", JUDGE, peer, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return peer, work


def check_equal(theirs, ours, record_property):
    """To 1e-5 of the largest value, which is what float32 leaves of sums over d_model and n_latents."""
    difference = ((theirs - ours).abs().max() / ours.abs().max()).item()
    record_property("difference", difference)
    assert difference < 1e-5


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_the_peer_reconstructs_what_we_export(judged, normalize, record_property):
    peer, work = judged
    sae, x = trained(normalize), inputs(peer, normalize)
    if peer != "sae-lens":
        sae.normalize = "none"  # x is normalised
    check_equal(load_file(work / f"{normalize}.outputs")["x"], sae(x).detach(), record_property)


@pytest.mark.parametrize("job", ["writes", "training_writes"])
def test_we_reconstruct_what_the_peer_writes(judged, job, record_property):
    peer, work = judged
    if not (work / job).is_dir():
        pytest.skip(f"{peer} writes in one way only")
    sae = load(work / job)
    assert (sae.n_latents, sae.d_model, sae.k) == (N, D, K)
    assert sae.normalize == ("layer_norm" if peer == "sae-lens" else "none")
    x = load_file(work / f"{job}.inputs")["x"]
    check_equal(load_file(work / f"{job}.outputs")["x"], sae(x).detach(), record_property)
    hooks = {"sae-lens": "blocks.8.hook_resid_post", "dictionary-learning": "resid_post", "eai-sparsify": None}
    assert job != "writes" or sae.facts.get("hook") == hooks[peer]
