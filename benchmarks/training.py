"""Training steps of our SAE and its peers, side by side: `make bench`, or

    python benchmarks/training.py [--quick] [--only ours,sparsify] [--configs C1,C3] [--threads N] [--peers FOLDER]

Every system runs in a process and an environment of its own (worker_*.py; setup_peers.py makes the environments). For
one configuration all are built, warmed up, and then timed in turn, in a new order every round, while the others sleep:
same threads, same float32 batches. A full run writes benchmarks/results/, any other run _build/benchmarks/.

Random weights and Gaussian activations: all latents fire equally often, which no trained SAE does. The dead latents of
the configurations with 10 % dead are made so (`common.quieten`) and every system is told that they are.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from setup_peers import PEERS, ROOT
from summary import markdown

HERE = Path(__file__).resolve().parent


class Entry(NamedTuple):
    """How to start a system."""

    title: str
    script: str
    environment: str | None = None
    """Folder below the peers' environments; None: the project's own."""
    options: dict | None = None
    """What the worker is told besides the configuration."""
    variables: dict | None = None
    """Its environment's, besides `QUIET`."""


SYSTEMS = {
    "ours": Entry("saelib (ours)", "worker_ours.py"),
    "saelens": Entry("SAELens, default", "worker_sae_lens.py", "sae-lens"),
    "saelens-sparse": Entry("SAELens, sparse option", "worker_sae_lens.py", "sae-lens", {"sparse": True}),
    "sparsify": Entry("sparsify (Adam)", "worker_sparsify.py", "eai-sparsify"),
    "dictionary_learning": Entry("dictionary_learning", "worker_dictionary_learning.py", "dictionary-learning"),
    "floor": Entry("floor (model)", "worker_floor.py"),
}
CONFIGS = {
    "C1": {"d": 768, "n": 8192, "k": 32, "batch": 2048},
    "C2": {"d": 768, "n": 32768, "k": 32, "batch": 1024},
    "C3": {"d": 128, "n": 4096, "k": 16, "batch": 4096},
}
DEAD = {"": 0.0, ", 10 % dead": 0.1}
ROUNDS, QUICK_ROUNDS = 5, 3
TURN, MOST_STEPS = 1.0, 10
"""A turn is as many steps as fit into so many seconds, but at least one and at most so many."""
QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads sleep at once: whoever waits must not slow down whoever is timed
    "KMP_BLOCKTIME": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "SPARSIFY_DISABLE_TRITON": "1",
    "WANDB_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
}
"""Environment of every worker."""


class Worker:
    """A system in its process, and what was measured of it; its stderr goes to a log file."""

    def __init__(self, entry: Entry, config: dict, peers: Path, log: Path):
        self.entry, self.log, self.steps = entry, log, 2
        self.record: dict = {"title": self.entry.title, "rounds": []}
        script, environment = HERE / self.entry.script, self.entry.environment
        python = peers / environment / "bin" / "python" if environment else Path(sys.executable)
        if not python.is_file():
            raise FileNotFoundError(f"{python} does not exist: python benchmarks/setup_peers.py makes it")
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(config["threads"]))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log.open("w")}
        variables = {**os.environ, **QUIET, **threads, **(entry.variables or {})}
        self.process = subprocess.Popen([python, script], **pipes, text=True, env=variables)
        self.send({"config": config | (entry.options or {})})  # answered when it is built: see `ready`

    def send(self, message: dict) -> None:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict:
        """Its answer.

        Raises:
            RuntimeError: the worker failed or is gone.
        """
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"process ended, code {self.process.wait()}"}
        if "error" in answer:
            raise RuntimeError(f"{answer['error'].splitlines()[0][:120]} (see {self.log.name})")
        return answer

    def ready(self) -> None:
        self.record["versions"] = self.receive()["versions"]

    def turn(self) -> dict:
        self.send({"steps": self.steps})
        return self.receive()

    def warm_up(self) -> None:
        """Two steps, the second of which says how many make a turn."""
        self.steps = max(1, min(MOST_STEPS, round(TURN / self.turn()["seconds"][-1])))

    def one_round(self) -> None:
        self.record["rounds"].append(self.turn())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(label: str, config: dict, systems: dict[str, Entry], rounds: int, peers: Path, logs: Path) -> dict:
    """All rounds of one configuration; a system that fails is left out, and `notes` says why."""
    names = list(systems)
    workers: dict[str, Worker] = {}
    notes: dict[str, str] = {}

    def in_turn(act: Callable[[str], None]) -> None:
        for name in random.sample(names, len(names)):
            if name not in notes:
                _attempt(act, name, notes)

    def start(name: str) -> None:
        workers[name] = Worker(systems[name], config, peers, logs / f"{slug(label)}-{name}.log")

    try:
        in_turn(start)
        for act in (Worker.ready, Worker.warm_up, *[Worker.one_round] * rounds):
            in_turn(lambda name, act=act: act(workers[name]))
    finally:
        for worker in workers.values():
            worker.close()
    records = {name: workers[name].record for name in names if name not in notes}
    return {"config": config, "systems": records, "notes": notes}


def _attempt(act: Callable[[str], None], name: str, notes: dict[str, str]) -> None:
    """Do something with a system; if it fails, note why."""
    try:
        act(name)
    except (OSError, RuntimeError) as error:
        notes[name] = str(error).replace(f"{ROOT}/", "")
        print(f"  {name} left out: {notes[name]}", file=sys.stderr)


def cpu() -> str:
    """Name of the processor."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.is_file() else None
    return " ".join(found[1].split()) if found else platform.processor() or platform.machine()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def commit() -> str | None:
    """Commit of the checkout, with "-dirty" if files differ from it; None outside of git."""
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or None


def slug(text: str) -> str:
    """A text as a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def provenance(threads: int) -> dict:
    """When, of which commit and on what the timings were taken."""
    hardware = {"cpu": cpu(), "cores": cores(), "threads": threads}
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit(), "hardware": hardware}


def store(folder: Path, name: str, result: dict, page: str) -> None:
    """The raw rounds and the page."""
    machine = result["hardware"]
    where = slug(f"{machine['cpu']} {machine['cores']} cores")
    write(folder / f"{name}-{where}.json", json.dumps(result, indent=1) + "\n")
    write(folder / f"{name}.md", page)
    print(page)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"C3 only, {QUICK_ROUNDS} rounds")
    parser.add_argument("--only", default=",".join(SYSTEMS), help="systems; the floor is always measured")
    parser.add_argument("--configs", default=",".join(CONFIGS), help="configurations")
    parser.add_argument("--threads", type=int, default=cores(), help="threads of every system")
    parser.add_argument("--peers", type=Path, default=PEERS, help="folder with the peers' environments")
    args = parser.parse_args()
    args.whole = not args.quick and all(getattr(args, key) == parser.get_default(key) for key in ("only", "configs"))
    args.only, args.configs = args.only.split(","), ["C3"] if args.quick else args.configs.split(",")
    if unknown := [name for name in args.only if name not in SYSTEMS] + [x for x in args.configs if x not in CONFIGS]:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join([*SYSTEMS, *CONFIGS])}")
    return args


def main() -> None:
    args = arguments()
    build = ROOT / "_build" / "benchmarks"
    folder = HERE / "results" if args.whole else build
    for path in (build, folder):
        path.mkdir(parents=True, exist_ok=True)
    systems = {name: entry for name, entry in SYSTEMS.items() if name in args.only or name == "floor"}
    result = {**provenance(args.threads), "configurations": {}}
    for suffix, dead in DEAD.items():
        for label in (f"{key}{suffix}" for key in args.configs):
            print(f"{label} …", file=sys.stderr)
            config = {**CONFIGS[label[:2]], "dead": dead, "threads": args.threads}
            rounds = QUICK_ROUNDS if args.quick else ROUNDS
            result["configurations"][label] = measure(label, config, systems, rounds, args.peers, build)
    store(folder, "training", result, markdown(result))


if __name__ == "__main__":
    main()
