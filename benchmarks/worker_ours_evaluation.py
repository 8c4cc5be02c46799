"""Our evaluation: `saelib.splice.downstream`.

It computes: the cross-entropy of the untouched model and of every variant, KL divergence and top-1 agreement for every
variant, all token by token, and the normalised MSE with its standard error. Variants are the SAE (`saes` times; the
code does not know that they are the same) and so many `ablations`: zero, mean, resample.
"""

import torch
from common import System, serve, stored


def build(config, _):
    from saelib import formats, models, profile, splice
    from saelib.metrics import mean

    scale = profile.load_profile(config["profile"])
    model, sae = models.load_model(scale), formats.load(config["sae"])
    sample = torch.randn(4096, sae.d_model, generator=torch.Generator().manual_seed(0))
    ablations = {"zero": splice.zero, "mean": splice.constant(sample.mean(0)), "resample": splice.resample(sample, 0)}
    variants = {f"sae {number}": sae for number in range(config["saes"])}
    variants |= dict(list(ablations.items())[: config["ablations"]])
    numbers = {}

    def evaluate(tokens):
        clean, found = splice.downstream(model, scale.hook, tokens, variants)
        first = found["sae 0"]
        numbers.update(ce=mean(clean).value, delta_ce=mean(first.ce - clean).value, kl=mean(first.kl).value)

    return System(evaluate, lambda: numbers)


if __name__ == "__main__":
    serve(build, ("saelib",), inputs=stored)
