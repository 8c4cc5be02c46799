"""sparsify with `optimizer="adam"` and AuxK at 1/32 (it is off by default).

Its trainer has no method for one step and wants a language model, so what its `fit` does to a batch is called here in
the same order: unit norm of the decoder, forward with AuxK (d / 2 dead latents), who fired, both losses read for the
log, backward, projection of the decoder's gradient, Adam and its schedule, tokens since each fired. It does not clip,
and its AuxK has no gradient for the encoder: the backward of its fused encoder leaves that of pre-activations out.
"""

import torch
from common import System, dead_latents, quieten, serve

ALPHA, DEAD_AFTER = 1 / 32, 10_000_000


def build(config, sample):
    from sparsify import SparseCoder, SparseCoderConfig
    from transformers import get_linear_schedule_with_warmup

    sizes = SparseCoderConfig(num_latents=config["n"], k=config["k"])
    sae = SparseCoder(config["d"], sizes, sample.device, torch.float32)
    sae.b_dec.data = sample.mean(0)
    adam = torch.optim.Adam(sae.parameters(), lr=2e-4 / (config["n"] / 2**14) ** 0.5)
    schedule = get_linear_schedule_with_warmup(adam, 1000, 1_000_000)
    since_fired = torch.zeros(config["n"], dtype=torch.long, device=sample.device)
    fired = torch.zeros(config["n"], dtype=torch.bool, device=sample.device)
    dead = dead_latents(config)

    def bury():
        quieten(sae.encoder.weight, dead)
        since_fired[dead] = 2 * DEAD_AFTER

    def step(x):
        sae.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        out = sae(x=x, y=x, dead_mask=since_fired > DEAD_AFTER, total_variance=variance)
        fired[out.latent_indices.flatten()] = True
        for loss in (out.fvu, out.auxk_loss):
            float(loss.detach())
        (out.fvu + ALPHA * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        schedule.step()
        since_fired.add_(len(x))
        since_fired[fired] = 0
        fired.zero_()

    return System(step, lambda: {"dead": int((since_fired > DEAD_AFTER).sum())}, bury)


if __name__ == "__main__":
    serve(build, ("eai-sparsify",))
