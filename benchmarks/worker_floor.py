"""What a step cannot do without, at the speeds this machine shows in the same round. A model, not a bound:

    seconds = 2 B n d / G           encoder: one dense product [B, d] x [d, n]
            + 4 * 4 B k d / M       sparse rest: decode, activation gradient, decoder gradient and encoder gradient
                                    each touch the rows of B k latents, d floats of 4 bytes
            + 7 * 4 * 2 n d / M     Adam on both matrices: read p, m, v, g; write p, m, v
            + 4 * 2 B D d / G       AuxK with D dead latents, dense: decode, activation gradient, decoder gradient
                                    and encoder gradient (their pre-activations are part of the first product)

B tokens, d = d_model, n latents, k active. G: the rate in FLOP/s of the encoder product itself, into a preallocated
output; M: the bandwidth in byte/s of a triad c = a + s b on arrays larger than any cache, 3 * 4 bytes a number; both
the best of three. Top-k, unit norm, projection, clipping and the weight average are free in this model. A configuration
whose rows stay in cache (C3) can beat its second and third term.
"""

import torch
from common import System, dead_latents, serve, stopwatch

TRIES = 3
TRIAD = 2**26
"""Numbers in one array of the triad: 268 MB."""


def build(config, sample):
    tokens, d, n, k = (config[key] for key in ("batch", "d", "n", "k"))
    weights, out = torch.randn(n, d), torch.empty(tokens, n)
    a, b, c = torch.ones(TRIAD), torch.ones(TRIAD), torch.zeros(TRIAD)
    rates: dict[str, float] = {}

    def seconds(x):
        product = min(stopwatch(lambda x: torch.mm(x, weights.T, out=out), x) for _ in range(TRIES))
        triad = min(stopwatch(lambda _: torch.add(a, b, alpha=2.0, out=c), x) for _ in range(TRIES))
        flops, bandwidth = 2 * tokens * n * d / product, 12 * TRIAD / triad
        rates.update(gflop_s=flops / 1e9, gb_s=bandwidth / 1e9)
        auxk = 8 * tokens * len(dead_latents(config)) * d
        return product + auxk / flops + (16 * tokens * k * d + 56 * n * d) / bandwidth

    return System(seconds, lambda: rates)


if __name__ == "__main__":
    serve(build, clock=lambda step, x: step(x))
