"""SAELens: `run_evals`, asked for cross-entropy, KL divergence and variance, on all tokens.

It computes, with the model run whole each time: the cross-entropy of the untouched model, of the SAE and of zero
ablation, and the KL divergence of the latter two; then, with the layers up to the hook and the SAE run once more,
MSE, explained variance in two ways and cosine similarity. So its variants are two, the SAE and zero ablation.

`wrapper` is how it sees the model: `hooked`, TransformerLens's own GPT-2, given the weights; `bridge`, the Hugging Face
model behind TransformerLens's hooks; or `proxy`, the Hugging Face model itself, with its fastest attention.
"""

from common import System, serve, stored


def hooked(folder, tokenizer):
    """TransformerLens's own GPT-2; `from_pretrained` of version 3 knows no local folders."""
    import torch
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    said = source.config
    config = HookedTransformerConfig(
        d_model=said.n_embd, n_heads=said.n_head, d_head=said.n_embd // said.n_head, d_mlp=4 * said.n_embd,
        n_layers=said.n_layer, n_ctx=said.n_positions, d_vocab=said.vocab_size, eps=said.layer_norm_epsilon,
        act_fn=said.activation_function, normalization_type="LN", default_prepend_bos=False, device="cpu",
    )  # fmt: skip
    model = HookedSAETransformer(config, tokenizer=tokenizer)
    raw = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    model.load_and_process_state_dict(convert_gpt2_weights(source, config), **dict.fromkeys(raw, False))
    return model.eval()


def bridge(folder, tokenizer):
    """The Hugging Face model behind TransformerLens's hooks."""
    import torch
    from sae_lens import SAETransformerBridge
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return SAETransformerBridge.boot_transformers(folder, hf_model=source, tokenizer=tokenizer, device="cpu").eval()


def proxy(folder, hook):
    """The Hugging Face model, with a hook at one place only."""
    import torch
    from sae_lens.load_model import load_model

    return load_model("AutoModelForCausalLM", folder, "cpu", {"dtype": torch.float32}, hook_names=[hook]).eval()


def evaluator(model_folder, sae_folder, tokens, batch, wrapper="hooked", exclude_special_tokens=False):
    """A function that returns what `run_evals` says about tokens [n, context], by name.

    Args:
        batch: contexts at a time; n must be a multiple of it. Each of its passes then reads all tokens, once.
        exclude_special_tokens: whether the tokenizer's special tokens keep their activations, and are not counted.
    """
    from datasets import Dataset
    from sae_lens import SAE
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore
    from transformers import AutoTokenizer

    sae = SAE.load_from_disk(sae_folder)
    about = sae.cfg.metadata
    about.prepend_bos = False
    layer = about.hook_name.split(".")[1]  # the hook is at a block's end: blocks.L.hook_resid_post
    if wrapper == "proxy":
        about.hook_name = f"transformer.h.{layer}"
        model = proxy(model_folder, about.hook_name)
    else:
        model = globals()[wrapper](model_folder, AutoTokenizer.from_pretrained(model_folder))
    if wrapper == "bridge":  # under the usual name, what a hook returns is ignored there, without a word
        about.hook_name = f"blocks.{layer}.hook_out"

    data = Dataset.from_dict({"tokens": tokens.numpy()})
    store = ActivationsStore.from_sae(model, sae, data, tokens.shape[1], streaming=False, total_tokens=len(tokens))
    batches = dict.fromkeys(("n_eval_reconstruction_batches", "n_eval_sparsity_variance_batches"), len(data) // batch)
    wanted = dict.fromkeys(("compute_kl", "compute_ce_loss", "compute_variance_metrics"), True)
    config = EvalConfig(batch_size_prompts=batch, **batches, **wanted)

    def evaluate():
        found, _ = run_evals(
            sae, store, model, ActivationScaler(), config, exclude_special_tokens=exclude_special_tokens
        )
        return {name: value for group in found.values() for name, value in group.items()}

    return evaluate


def build(config, tokens):
    evaluate = evaluator(config["model"], config["sae_lens"], tokens, config["prompts"], config["wrapper"])
    numbers = {}

    def step(_):
        found = evaluate()
        ce = found["ce_loss_without_sae"]
        numbers.update(ce=ce, delta_ce=found["ce_loss_with_sae"] - ce, kl=found["kl_div_with_sae"])

    return System(step, lambda: numbers)


if __name__ == "__main__":
    serve(build, ("sae-lens", "transformer-lens"), inputs=stored)
