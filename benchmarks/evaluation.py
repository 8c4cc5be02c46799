"""Downstream loss of an SAE, ours and SAELens's, side by side: `make bench`, or

    python benchmarks/evaluation.py [--quick] [--threads N] [--peers FOLDER]

Same model (docstring-gpt), same SAE (its small one), same tokens of its test text, same threads; workers, rounds and
files as in `training.py`. What counts as one evaluation, and how many variants are in it, is in worker_*_evaluation.py.
"""

import argparse
import sys
from pathlib import Path

import torch
from setup_peers import PEERS, ROOT
from summary import evaluation
from training import QUICK_ROUNDS, ROUNDS, Entry, cores, measure, provenance, store

from saelib import formats, models, profile, text

HERE = Path(__file__).resolve().parent
OURS, THEIRS = "worker_ours_evaluation.py", "worker_sae_lens_evaluation.py"


def ours(saes: int, ablations: int) -> Entry:
    """`ablations`: how many of zero, mean, resample."""
    also = ["", " and zero ablation", "", " and three ablations"][ablations]
    title = f"saelib, {saes} SAE{'s' * (saes > 1)}{also}"
    return Entry(title, OURS, options={"saes": saes, "ablations": ablations, "variants": saes + ablations})


def theirs(wrapper: str, prompts: int) -> Entry:
    model = {"hooked": "TransformerLens", "bridge": "bridge", "proxy": "Hugging Face"}[wrapper]
    options = {"wrapper": wrapper, "prompts": prompts, "variants": 2}
    return Entry(f"SAELens, {model}, {prompts} contexts at a time", THEIRS, "sae-lens", options)


PEER_SETTINGS = [("hooked", 8), ("hooked", 16), ("bridge", 8), ("proxy", 4), ("proxy", 8)]
"""Its three ways to see a model, each with the contexts at a time that were fastest."""
SYSTEMS = {
    "ours": ours(1, 3),
    "ours-4-saes": ours(4, 0),
    "ours-2": ours(1, 1),
    **{f"{wrapper}-{prompts}": theirs(wrapper, prompts) for wrapper, prompts in PEER_SETTINGS},
}
CONTEXTS, QUICK_CONTEXTS = 256, 32
AGREE = 1e-3
"""Most that the systems' numbers may be apart."""


def inputs(folder: Path, contexts: int) -> dict:
    """Writes what all are given, and says where."""
    scale = profile.load_profile("docstring-gpt")
    sae = ROOT / scale.saes["small"].path
    tokens = text.contexts(scale, models.load_tokenizer(scale), "test", contexts)
    torch.save(tokens, folder / "tokens.pt")
    formats.export(formats.load(sae), folder / "small-sae-lens", "saelens")
    paths = {"inputs": folder / "tokens.pt", "sae": sae, "sae_lens": folder / "small-sae-lens"}
    model = models.main_model(scale).name
    return {"profile": scale.name, "batch": tokens.numel(), "model": model, **{k: str(v) for k, v in paths.items()}}


def check(measured: dict) -> None:
    """What is computed is the same.

    Raises:
        SystemExit: two systems differ.
    """
    facts = {name: system["rounds"][-1]["facts"] for name, system in measured["systems"].items()}
    for key in ("ce", "delta_ce", "kl"):
        values = [found[key] for found in facts.values()]
        if max(values) - min(values) > AGREE:
            sys.exit(f"error: the systems do not agree on {key}: {dict(zip(facts, values, strict=True))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CONTEXTS} contexts, {QUICK_ROUNDS} rounds")
    parser.add_argument("--threads", type=int, default=cores(), help="threads of every system")
    parser.add_argument("--peers", type=Path, default=PEERS, help="folder with the peers' environments")
    args = parser.parse_args()
    build = ROOT / "_build" / "benchmarks"
    folder = build if args.quick else HERE / "results"
    for path in (build, folder):
        path.mkdir(parents=True, exist_ok=True)
    config = {**inputs(build, QUICK_CONTEXTS if args.quick else CONTEXTS), "threads": args.threads}
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    result = {**provenance(args.threads), **measure("evaluation", config, SYSTEMS, rounds, args.peers, build)}
    check(result)
    result["variants"] = {name: entry.options["variants"] for name, entry in SYSTEMS.items()}
    result["config"] = {key: config[key] for key in ("profile", "batch", "threads")}  # paths are nobody's business
    store(folder, "evaluation", result, evaluation(result))


if __name__ == "__main__":
    main()
