"""Runs inside a peer's own environment: its code loads our SAE, or makes one and writes it, and reconstructs inputs.

    python judge.py sae-lens loads=FOLDER writes=FOLDER ...

Each job reads FOLDER.inputs and writes FOLDER.outputs, both safetensors with one tensor `x`.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

N_LATENTS, D_MODEL, K = 96, 32, 8
ROOT = Path(__file__).resolve().parents[2]
EVALUATED = (
    "ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation", "kl_div_with_sae", "kl_div_with_ablation",
    "mse", "explained_variance", "explained_variance_legacy",
)  # fmt: skip
"""What an evaluation writes, in this order."""


def randomized(sae):
    """The peer's SAE with random biases and matrices that are no transposes of each other."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return sae


def sae_lens_loads(folder):
    from sae_lens import SAE

    return SAE.load_from_disk(folder)


def sae_lens_writes(folder):
    """Off to the side: a decoder whose norms count, and inputs that the pre-bias is not taken from."""
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    config = TopKSAEConfig(
        d_in=D_MODEL, d_sae=N_LATENTS, k=K, normalize_activations="layer_norm",
        rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False,
    )  # fmt: skip
    config.metadata.model_name, config.metadata.hook_name = "gpt2", "blocks.8.hook_resid_post"
    sae = randomized(TopKSAE(config))
    sae.save_model(folder)
    return sae


def sae_lens_training_writes(folder):
    """What its trainer leaves for inference: decoder norms folded in, the switch still on."""
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    config = TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=N_LATENTS, k=K, normalize_activations="layer_norm")
    randomized(TopKTrainingSAE(config)).save_inference_model(folder)
    return sae_lens_loads(folder)


def sae_lens_evaluates(folder, exclude_special_tokens=False):
    """Its `run_evals`, set up as in the benchmark, on our model and SAE; the inputs are tokens [n, context]."""
    sys.path.append(str(ROOT / "benchmarks"))
    from worker_sae_lens_evaluation import evaluator

    def numbers(tokens):
        found = evaluator(ROOT / "models" / "docstring-gpt", folder, tokens, 8, "hooked", exclude_special_tokens)()
        return torch.tensor([found[name] for name in EVALUATED], dtype=torch.float64)

    return numbers


def sae_lens_evaluates_text(folder):
    """The same, with what `run_evals` does unless told otherwise: special tokens are left alone and not counted."""
    return sae_lens_evaluates(folder, exclude_special_tokens=True)


def eai_sparsify_loads(folder):
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)
    return lambda x: sae(x).sae_out


def eai_sparsify_writes(folder):
    from sparsify import SparseCoder, SparseCoderConfig

    sae = randomized(SparseCoder(D_MODEL, SparseCoderConfig(expansion_factor=N_LATENTS // D_MODEL, k=K)))
    sae.save_to_disk(folder)
    return lambda x: sae(x).sae_out


def dictionary_learning_loads(folder):
    from dictionary_learning.utils import load_dictionary

    return load_dictionary(folder, "cpu")[0]


def dictionary_learning_writes(folder):
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=2, warmup_steps=0, activation_dim=D_MODEL, dict_size=N_LATENTS, k=K, layer=8, lm_name="gpt2",
        submodule_name="resid_post", device="cpu",
    )  # fmt: skip
    randomized(trainer.ae)
    folder = Path(folder)
    folder.mkdir()
    torch.save(trainer.ae.state_dict(), folder / "ae.pt")  # as its training loop does
    (folder / "config.json").write_text(json.dumps({"trainer": trainer.config}))
    return trainer.ae


if __name__ == "__main__":
    peer, *jobs = sys.argv[1:]
    for job in jobs:
        action, folder = job.split("=", 1)
        sae = globals()[f"{peer}_{action}".replace("-", "_")](folder)
        with torch.no_grad():
            save_file({"x": sae(load_file(f"{folder}.inputs")["x"]).contiguous()}, f"{folder}.outputs")
