"""What a GPU reaches, and from that the floor of a training step. A model, not a bound:

    seconds = 2 B n d / G + 7 * 4 * 2 n d / M

The encoder's product [B, d] x [d, n] at the rate G (FLOP/s) that bfloat16 factors reach in it, and Adam on both
matrices (read p, m, v, g; write p, m, v) at the rate M (byte/s) of a copy. All else is free: decoder, gradients, top-k,
unit norm, the average. `with_rows` adds the rows of the latents that fire, read from memory: 4 * 4 B k d / M.
The product is timed in tiles of at most 2^28 outputs, so that it fits beside the factors.
"""

import torch
from common import System, serve, stopwatch

TRIES = 5
OUTPUTS = 2**28


def build(config, sample):
    tokens, d, n, k = (config[key] for key in ("batch", "d", "n", "k"))
    rows = min(tokens, max(1, OUTPUTS // n))
    weight = torch.randn(n, d, device=sample.device)
    a = torch.ones(config["copied"], device=sample.device)
    b, facts = torch.empty_like(a), {}

    def rate(dtype):
        left, right = sample[:rows].to(dtype), weight.to(dtype).T
        out = torch.empty(rows, n, dtype=dtype, device=sample.device)
        return 2 * rows * n * d / min(stopwatch(lambda _: torch.mm(left, right, out=out), sample) for _ in range(TRIES))

    def seconds(x):
        torch.backends.cuda.matmul.allow_tf32 = True
        product, tf32 = rate(torch.bfloat16), rate(torch.float32)
        copy = 8 * len(a) / min(stopwatch(lambda _: b.copy_(a), x) for _ in range(TRIES))
        floor = 2 * tokens * n * d / product + 56 * n * d / copy
        facts.update(bf16_tflop_s=product / 1e12, tf32_tflop_s=tf32 / 1e12, copy_gb_s=copy / 1e9)
        facts.update(with_rows=floor + 16 * tokens * k * d / copy)
        return floor

    return System(seconds, lambda: facts)


if __name__ == "__main__":
    serve(build, clock=lambda step, x: step(x))
