"""Training steps on a GPU: ours, ours without Triton, sparsify's, and what the card can do.

    python benchmarks/gpu.py [--shapes 32768,131072] [--batches 4096,16384] [--rounds N] [--out FOLDER]
    python benchmarks/gpu.py --quick      # tiny, on a CPU, Triton interpreted: tests the plumbing, measures nothing

Every system runs in a process and an environment of its own (`training.Worker`), alone on the card, for they would
share its memory: one configuration after the other, the systems in a new order each time. Each round is a turn of up to
ten steps. What runs out of memory is a row that says so. Writes JSON and a table to `_build/benchmarks`.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path
from statistics import fmean, median

import torch
from setup_peers import PEERS, ROOT
from summary import table
from training import Entry, Worker, cores, provenance, slug, write

AIMS = {"times_sparsify": 2.5, "share_of_floor": 0.45, "share_end_to_end": 0.6}
SHAPES = {n: {"d": 768, "n": n, "k": 32} for n in (32768, 131072)}
BATCHES = (4096, 8192, 16384, 32768, 65536)
TINY = {"d": 64, "n": 64, "k": 2}
GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"), "SPARSIFY_DISABLE_TRITON": "0"}
INTERPRETED = {"TRITON_INTERPRET": "1", "SAELIB_NATIVE": "triton"}
BF16 = {"precision": "bfloat16"}


def systems(quick: bool) -> dict[str, Entry]:
    """What is measured; the floor first, so that shares can be taken."""
    ours, plain = (INTERPRETED, {"SAELIB_NATIVE": "0"}) if quick else (GPU, {**GPU, "SAELIB_NATIVE": "0"})
    found = {
        "floor": Entry("floor (model)", "worker_ceilings.py", variables=plain),
        "ours": Entry("saelib, bfloat16 products", "worker_ours.py", options=BF16, variables=ours),
        "ours-tf32": Entry("saelib, tf32 products", "worker_ours.py", options={"tf32": True}, variables=ours),
        "ours-plain": Entry("saelib without Triton, bfloat16", "worker_ours.py", options=BF16, variables=plain),
        "sparsify": Entry("sparsify (Adam), its autocast", "worker_sparsify.py", "eai-sparsify", {"tf32": True}, GPU),
    }
    return {name: entry for name, entry in found.items() if not (quick and name in {"ours-tf32", "sparsify"})}


def alone(entry: Entry, config: dict, rounds: int, peers: Path, log: Path) -> dict:
    """One system: its rounds, or in `failed` why there are none."""
    try:
        worker = Worker(entry, config, peers, log)
    except OSError as error:
        return {"title": entry.title, "failed": str(error).replace(f"{ROOT}/", "")}
    try:
        for act in (Worker.ready, Worker.warm_up, *[Worker.one_round] * rounds):
            act(worker)
    except (OSError, RuntimeError) as error:
        reason = "out of memory" if "out of memory" in str(error).lower() else str(error).replace(f"{ROOT}/", "")
        return {"title": entry.title, "failed": reason}
    finally:
        worker.close()
    return worker.record


def summed(record: dict, batch: int, floor: float | None) -> dict:
    """Speeds from a system's rounds."""
    if "failed" in record:
        return record
    rates = [batch / fmean(turn["seconds"]) for turn in record["rounds"]]
    last = record["rounds"][-1]
    found = {"tokens_s": median(rates), "least": min(rates), "most": max(rates), "peak_mb": last["peak_mb"]}
    share = {} if floor is None else {"share_of_floor": median(rates) / floor}
    return {**record, **found, **share, "facts": last["facts"]}


def configuration(label: str, config: dict, args: argparse.Namespace, folder: Path) -> dict:
    """All systems on one shape and batch."""
    entries = systems(args.quick)
    records = {}
    for name in random.sample(list(entries), len(entries)):
        print(f"{label}: {name} …", file=sys.stderr)
        records[name] = alone(entries[name], config, args.rounds, args.peers, folder / f"{slug(label)}-{name}.log")
    floor = summed(records["floor"], config["batch"], None).get("tokens_s")
    rows = {name: summed(records[name], config["batch"], floor) for name in entries}
    speeds = [rows.get(name, {}).get("tokens_s") for name in ("ours", "sparsify")]
    return {"config": config, "systems": rows, "times_sparsify": speeds[0] / speeds[1] if all(speeds) else None}


def together(base: dict, args: argparse.Namespace, folder: Path) -> dict:
    """Harvest and training overlapped."""
    sizes = {**TINY, "layers": 3, "block": 4, "batch": 64} if args.quick else {
        **SHAPES[32768], "layers": 12, "block": 4096, "batch": 16384,
    }  # fmt: skip
    variables = {"SAELIB_DEVICE": base["device"], **({"SAELIB_NATIVE": "0"} if args.quick else GPU)}
    entry = Entry("end to end", "worker_end_to_end.py", options=BF16, variables=variables)
    print("end to end …", file=sys.stderr)
    config = {**base, **sizes}
    record = alone(entry, config, args.rounds, args.peers, folder / "end-to-end.log")
    return {"config": config, **summed(record, config["batch"], None)}


def page(result: dict) -> str:
    """The table, with what it is not."""
    head = ["configuration", "system", "tokens/s (least–most)", "peak MB", "of the floor"]
    rows = []
    for label, found in result["configurations"].items():
        for row in found["systems"].values():
            if "failed" in row:
                rows.append([label, row["title"], row["failed"], "", ""])
                continue
            speed = f"{row['tokens_s']:,.0f} ({row['least']:,.0f}–{row['most']:,.0f})"
            share = f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else ""
            rows.append([label, row["title"], speed, f"{row['peak_mb']:,.0f}", share])
    title = "# Plumbing only, not a measurement" if result["plumbing"] else f"# {result['hardware']['gpu']}"
    overlapped = result.get("end_to_end", {"facts": "not yet"}).get("facts", "failed")
    return "\n\n".join([title, table(head, rows), f"End to end: {overlapped}"]) + "\n"


def keep(result: dict, folder: Path) -> None:
    """Write what there is; so a run that is cut off leaves all configurations that it finished."""
    name = f"gpu-{'plumbing' if result['plumbing'] else slug(result['hardware']['gpu'])}"
    write(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write(folder / f"{name}.md", page(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes on a CPU: the plumbing, not a measurement")
    parser.add_argument("--shapes", default=",".join(map(str, SHAPES)), help="numbers of latents")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="tokens per step")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every system")
    parser.add_argument("--peers", type=Path, default=PEERS, help="folder with the peers' environments")
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "benchmarks", help="folder for the results")
    args = parser.parse_args()
    args.shapes, args.batches = ([int(x) for x in value.split(",")] for value in (args.shapes, args.batches))
    if unknown := set(args.shapes) - set(SHAPES):
        parser.error(f"unknown shapes: {unknown}; choose from {', '.join(map(str, SHAPES))}")
    return args


def main() -> None:
    args = arguments()
    if not args.quick and not torch.cuda.is_available():
        print("no GPU here: nothing is measured (--quick tries the plumbing on a CPU)", file=sys.stderr)
        raise SystemExit(2)
    args.out.mkdir(parents=True, exist_ok=True)
    base = {"threads": cores(), "device": "cuda", "copied": 2**28}
    cases = [{**SHAPES[n], "batch": batch} for n in args.shapes for batch in args.batches]
    if args.quick:
        args.rounds, base, cases = 1, {"threads": 1, "device": "cpu", "copied": 2**10}, [{**TINY, "batch": 4}]
    result = {"plumbing": args.quick, "aims": AIMS, **provenance(base["threads"]), "configurations": {}}
    result["hardware"]["gpu"] = None if args.quick else torch.cuda.get_device_name()
    for case in cases:
        label = f"n {case['n']}, batch {case['batch']}"
        result["configurations"][label] = configuration(label, base | case, args, args.out)
        keep(result, args.out)
    result["end_to_end"] = together(base, args, args.out)
    keep(result, args.out)
    print(page(result))


if __name__ == "__main__":
    main()
