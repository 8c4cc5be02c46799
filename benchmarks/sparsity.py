"""Ablation sparsity, ours against one full forward pass per latent: `make bench`, or

    python benchmarks/sparsity.py [--quick] [--threads N]

docstring-gpt, its small SAE, contexts of 64 tokens of its test text, all active latents at one random token of each,
16 tokens looked at. All ways run in this process, in turn, in a new order every round, on the same contexts, with the
same threads; a new round takes new contexts. Numbers must agree to 1e-5. A full run writes benchmarks/results/, any
other run _build/benchmarks/.
"""

import argparse
import os
import random
import sys
import time
from pathlib import Path
from statistics import median

import plain_sparsity
import torch
from setup_peers import ROOT
from summary import spread, table
from training import QUICK_ROUNDS, ROUNDS, cores, provenance, store

from saelib import sparsity
from saelib.metrics import activations, mean
from saelib.models import load_model
from saelib.profile import load_profile
from saelib.text import contexts
from saelib.train import load_sae

CONTEXTS = 32
"""In a round."""
AGREE = 1e-5
"""Most that the ways may be apart."""
OURS, PLAIN, FAIR = "ours", "one forward pass per latent", "the same, with our median"


def ways(profile, model, sae) -> dict:
    """Each takes contexts and indices and returns the sparsity of every latent, and which are active."""

    def ours(tokens, index):
        found = sparsity.of_sae(model, profile.hook, tokens, index, sae)
        return found.sparsity(), found.on

    def plain(tokens, index, **how):
        x = torch.cat(list(activations(profile, model, tokens)))
        parts = sparsity.latents(sae)(x[torch.arange(len(x)), index])
        return plain_sparsity.sparsity(model, profile.hook, tokens, index.tolist(), parts, **how)[0], parts.on

    def fair(tokens, index):
        return plain(tokens, index, median=lambda x: sparsity.median(x[None])[0])

    return {OURS: ours, PLAIN: plain, FAIR: fair}


def one_round(systems: dict, tokens: torch.Tensor, index: torch.Tensor) -> dict[str, float]:
    """Milliseconds per latent of each way.

    Raises:
        RuntimeError: they do not agree.
    """
    taken, found = {}, {}
    for name in random.sample(list(systems), len(systems)):
        start = time.perf_counter()
        found[name], on = systems[name](tokens, index)
        taken[name] = 1e3 * (time.perf_counter() - start) / int(on.sum())
    for name in systems:
        apart = (found[name] - found[OURS])[on].abs().max().item()
        if not apart <= AGREE or abs(mean(found[name], on).value - mean(found[OURS], on).value) > AGREE:
            raise RuntimeError(f"{name} is {apart:.1e} away from ours")
    return taken


def markdown(rounds: list[dict[str, float]]) -> str:
    """A row per way: time per latent, and how many times ours is as fast, round by round; median (least–most)."""
    rows = []
    for name in rounds[0]:
        ratios = [found[name] / found[OURS] for found in rounds]
        rows.append([name, spread([found[name] for found in rounds], ".2f"), spread(ratios, ".1f")])
    return table(["ablation sparsity", "ms per latent", "times ours"], rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of few contexts")
    parser.add_argument("--threads", type=int, default=cores(), help="threads of all")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(args.threads)
    n_rounds, n = (QUICK_ROUNDS, CONTEXTS // 4) if args.quick else (ROUNDS, CONTEXTS)
    profile = load_profile("docstring-gpt")
    model = load_model(profile)
    systems = ways(profile, model, load_sae(profile, "small", model))
    tokens = contexts(profile, model.tokenizer, "test", (n_rounds + 1) * n)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(profile.context_length - sparsity.WINDOW + 1, (len(tokens),), generator=generator)
    batches = list(zip(tokens.split(n), index.split(n), strict=True))
    one_round(systems, *(some[:2] for some in batches[0]))  # warm-up
    rounds = []
    for batch in batches[1:]:
        rounds.append(one_round(systems, *batch))
        print(", ".join(f"{name} {rounds[-1][name]:.2f} ms" for name in systems), file=sys.stderr)
    ordered = [{name: found[name] for name in systems} for found in rounds]
    ratio = median(found[PLAIN] / found[OURS] for found in rounds)
    setting = {"contexts": n, "context": tokens.shape[1], "window": sparsity.WINDOW, "ratio": ratio}
    result = provenance(args.threads) | {"setting": setting, "ms_per_latent": ordered}
    folder = ROOT / "_build" / "benchmarks" if args.quick else Path(__file__).resolve().parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    store(folder, "sparsity", result, markdown(ordered))


if __name__ == "__main__":
    main()
