"""What all workers share. A worker is one process with one system, which answers lines of JSON on its stdin:

    {"config": {...}}   build the system              -> {"versions": {...}}
    {"steps": 5}        time five training steps      -> {"seconds": [...], "peak_mb": ..., "facts": {...}}

or {"error": "..."} to either. Between two lines it sleeps. Imports only the standard library and torch, because it runs
in the peers' environments.
"""

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

BATCHES = 4
"""Different batches that are cycled, so that no system sees one twice in a row."""
QUIET = 0.1
"""Norm of a dead latent's encoder row over the mean norm: it never reaches the top k, and half of its pre-activations
are still positive, so that AuxK finds something to do whether or not a system puts a ReLU before it."""


class System(NamedTuple):
    """A system under test."""

    step: Callable[[Tensor], object]
    """One full training step on raw activations [batch, d]."""
    facts: Callable[[], dict]
    """What it says about itself after a turn; `dead`, the latents it counts as dead, must be what was asked for."""
    bury: Callable[[], None] = lambda: None
    """Makes the dead latents dead, before every step (AuxK revives them within a few), outside of the time taken."""


def dead_latents(config: dict) -> Tensor:
    """Indices of the latents that are to be dead, evenly spread."""
    share = config.get("dead")
    return torch.arange(0, config["n"], round(1 / share)) if share else torch.arange(0)


@torch.no_grad()
def quieten(rows: Tensor, dead: Tensor) -> None:
    """Keep latents from firing; `rows` is the encoder as [n, d], a view of the parameter."""
    if len(dead):
        norms = rows.norm(dim=1, keepdim=True)
        rows[dead] *= QUIET * norms.mean() / norms[dead]


def activations(config: dict) -> list[Tensor]:
    """Gaussian activations, the same for every system: `BATCHES` times [batch, d], float32."""
    generator = torch.Generator().manual_seed(2**20)  # not a seed of weights: tokens would be the rows of the encoder
    device = config.get("device", "cpu")
    return [torch.randn(config["batch"], config["d"], generator=generator).to(device) for _ in range(BATCHES)]


def stored(config: dict) -> list[Tensor]:
    """The tensor in the file that `inputs` names."""
    return [torch.load(config["inputs"], weights_only=True)]


def peak_mb(device: str = "cpu") -> float:
    """Peak resident memory of this process in MB (10^6 bytes), imports included; of a GPU what PyTorch has taken."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / 1e6
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss may have been inherited from the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def stopwatch(step: Callable[[Tensor], object], x: Tensor) -> float:
    """Seconds that one step takes, until a GPU has finished it."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    step(x)
    wait()
    return time.perf_counter() - start


def serve(
    build: Callable[[dict, Tensor], System],
    distributions: tuple[str, ...] = (),
    clock: Callable[[Callable, Tensor], float] = stopwatch,
    inputs: Callable[[dict], list[Tensor]] = activations,
) -> None:
    """Answer until stdin closes.

    Args:
        build: makes the system from a configuration (d, n, k, batch, dead, threads) and a first batch.
        distributions: installed packages whose versions the answer names, besides torch.
        clock: what gives the seconds of a step.
        inputs: what the steps are given in turn, from a configuration.
    """
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # some peers print when they are imported
    state: dict = {}
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), state, build, distributions, clock, inputs)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(answer) + "\n")


def _answer(request: dict, state: dict, build, distributions, clock, inputs) -> dict:
    if config := request.get("config"):
        torch.set_num_threads(config["threads"])
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = config.get("tf32", False)
        batches = inputs(config)
        state.update(config=config, batches=cycle(batches), system=build(config, batches[0]))
        return {"versions": {name: version(name) for name in ("torch", *distributions)}}
    system, seconds = state["system"], []
    for _ in range(request["steps"]):
        system.bury()
        seconds.append(clock(system.step, next(state["batches"])))
    facts, asked = system.facts(), len(dead_latents(state["config"]))
    if facts.get("dead", asked) != asked:
        raise RuntimeError(f"{facts['dead']} latents count as dead, not {asked}")
    return {"seconds": seconds, "peak_mb": peak_mb(state["config"].get("device", "cpu")), "facts": facts}
