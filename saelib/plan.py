"""What a profile takes before it is run: downloads, disk, memory, arithmetic, hours; and a refusal of what cannot fit.

`costs.py` has the formulas. Here they meet a machine: its memory as it is found or given, its speed as short bursts of
the real work measure it, or as the user gives it. The numbers of a data sheet make every hour a lower bound.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import psutil
import torch
from transformers import AutoModelForCausalLM

from saelib import UserError, costs, hub, runner
from saelib.activations import SUB_BATCH
from saelib.costs import Cost, Memory, Shape, Speed, Work
from saelib.models import pick_device
from saelib.profile import BUILD, Profile, Recipe, override
from saelib.train import Trainer, there

BASE = {"cpu": 1.0e9, "mps": 1.5e9, "cuda": 1.0e9}
"""Bytes that are taken before anything of ours is there: on a CPU by libraries, on a GPU by the driver and by them."""
HOST = 4.0e9
"""Bytes that a process beside a GPU takes of the machine's memory, apart from weights that pass through it."""
SLACK = 1.1
"""An allocator's: what is free lies scattered."""


class Machine(NamedTuple):
    """Where it is to run."""

    device: str
    name: str
    memory: float
    """Bytes of the device."""
    host: float
    """Bytes of the machine."""


def machine(profile: Profile, device_memory: float | None = None) -> Machine:
    """The device found; or a GPU with so many GB, wherever it is."""
    host = float(psutil.virtual_memory().total)
    if device_memory is not None:
        return Machine("cuda", f"a GPU of {device_memory:g} GB", device_memory * 1e9, host)
    device = pick_device(profile)
    if device != "cuda":
        return Machine(device, f"this machine ({device}, threads: {torch.get_num_threads()})", host, host)
    found = torch.cuda.get_device_properties(0)
    return Machine(device, found.name, float(found.total_memory), host)


# --- speed ------------------------------------------------------------------------------------------------------------


def probe(profile: Profile, of: Shape, device: str, seconds: float = 8.0) -> Speed:
    """Bursts of the real work with random weights, scaled down: two blocks, a short step, a product, a copy."""
    context, d = profile.context_length, of.d_model
    config = costs.config_of(profile)
    config.num_hidden_layers, config.vocab_size = 2, 256
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(device).eval().base_model
    tokens = torch.randint(256, (max(1, SUB_BATCH[device] // context), context), device=device)
    recipe = probed(profile.recipe, device)
    x = torch.randn(recipe.batch, d, device=device)
    trainer, wide = Trainer(recipe, d, 0, x), torch.randn(8192, d, device=device)
    block, copied = torch.ones(2, 2**25, device=device)
    works = {
        "blocks": (lambda: model(tokens), tokens.numel() * 2 * of.per_token(context)),
        "step": (lambda: trainer.step(x), len(x) * costs.flops(recipe.n_latents, recipe.k, d)),
        "dense": (lambda: x @ wide.T, 2 * len(x) * len(wide) * d),
        "copy": (lambda: copied.copy_(block), 2 * block.nbytes),
    }
    with torch.no_grad():
        return Speed(**{kind: size / _best(run, seconds / 4, device) for kind, (run, size) in works.items()})


def bound(tera: float, giga: float) -> Speed:
    """A data sheet's numbers, TFLOP/s and GB/s, taken at their word."""
    return Speed(*[tera * 1e12] * 3, giga * 1e9)


def probed(recipe: Recipe, device: str) -> Recipe:
    """The recipe of a short step: a small batch would weigh Adam too much, a large one takes too long on a CPU."""
    n, batch = (32768, 16384) if device == "cuda" else (4096, 4096)
    sizes = {"n_latents": min(n, recipe.n_latents), "batch": min(batch, recipe.batch)}
    return recipe.model_copy(update=sizes | {"k_aux": 0})


def _best(run: Callable[[], object], seconds: float, device: str) -> float:
    """Seconds of the fastest of several runs, the first of them left out."""
    finished = torch.cuda.synchronize if device == "cuda" else lambda: None
    best, until = math.inf, time.perf_counter() + seconds
    run()
    while best == math.inf or time.perf_counter() < until:
        finished()
        started = time.perf_counter()
        run()
        finished()
        best = min(best, time.perf_counter() - started)
    return best


# --- what is to be done, and whether it fits --------------------------------------------------------------------------


class Activity(NamedTuple):
    """A training run, or a chapter."""

    name: str
    work: Work
    memory: Memory
    """Of the device."""
    passing: float
    """Bytes of weights that pass through the machine's memory on their way to a GPU."""
    settings: dict[str, int]
    """What can be halved if memory is short, in this order, and what it is now."""
    smaller: Callable[[dict[str, int]], Memory]
    """The memory with some of these set to other values."""
    note: str = ""

    def needs(self, device: str) -> tuple[float, float]:
        """Bytes of the device, and of the machine."""
        own = BASE[device] + SLACK * sum(self.memory.values())
        return own, HOST + self.passing if device == "cuda" else own


def trainings(c: Cost) -> Iterator[Activity]:
    """One for every SAE of the profile."""
    for name, entry in c.profile.saes.items():
        recipe = c.profile.recipe_of(name)
        settings = {"activations.block": c.profile.activations.block, "recipe.batch": recipe.batch}
        settings["recipe.n_latents"] = recipe.n_latents

        def smaller(changes: dict[str, int], name: str = name) -> Memory:
            own = {f"saes.{name}.{key}" if key.startswith("recipe.") else key: changes[key] for key in changes}
            changed = override(c.profile, own)
            return costs.training(c._replace(profile=changed), changed.recipe_of(name))

        note = "is there" if there(c.profile, name) else "to be fetched" if entry.openai else ""
        passing = 5 * 4 * costs.sae_parameters(recipe, c.of.d_model)
        work = c.fit(recipe, recipe.tokens)
        yield Activity(f"train {name}", work, costs.training(c, recipe), passing, settings, smaller, note)


def chapters(c: Cost, names: Sequence[str]) -> Iterator[Activity]:
    """Notebooks, as they are without `-p`."""
    for chapter in runner.select(names, runner.chapters()):
        number, given = chapter.name[:2], chapter.parameters
        counted = {key: value for key, value in given.items() if key.startswith("n_") and value}

        def smaller(changes: dict[str, int], number: str = number, given: dict = given) -> Memory:
            own = {key: changes[key] for key in changes if key not in given}
            return costs.chapter(c._replace(profile=override(c.profile, own)), number, given | changes)

        block = {"activations.block": c.profile.activations.block} if number == "06" else {}
        settings = block | counted | {"context_length": c.profile.context_length}
        memory, passing = costs.chapter(c, number, given), 8 * c.of.parameters
        work = costs.CHAPTERS[number](c, given) + Work(host=costs.HOST)
        yield Activity(chapter.name, work, memory, passing, settings, smaller)


def refused(activity: Activity, on: Machine) -> str:
    """Why it cannot be run there, and the setting to change; empty where it fits."""
    needed, host = activity.needs(on.device)
    if needed > on.memory:
        largest = sorted(activity.memory, key=activity.memory.get, reverse=True)[:3]
        most = ", ".join(f"{_gb(activity.memory[part])} for {part}" for part in largest)
        short = f"{activity.name} needs {_gb(needed)} GB and {on.name} has {_gb(on.memory)} ({most})"
        return f"{short}: {_cure(activity, on)}"
    if host > on.host:
        short = f"{activity.name} needs {_gb(host)} GB beside the GPU and this machine has {_gb(on.host)}"
        return f"{short}: lower recipe.n_latents, or take a larger machine"
    return ""


def _cure(activity: Activity, on: Machine) -> str:
    """The first settings that, halved up to three times each, make room."""

    def fits(changes: dict[str, int]) -> bool:
        smaller = activity._replace(memory=activity.smaller(changes))
        return smaller.needs(on.device)[0] <= on.memory

    changes: dict[str, int] = {}
    halved = ((key, value >> by) for key, value in activity.settings.items() for by in (1, 2, 3) if value >> by)
    for key, lower in halved:
        changes[key] = lower
        if fits(changes):
            for earlier in list(changes)[:-1]:
                rest = {other: changes[other] for other in changes if other != earlier}
                changes = rest if fits(rest) else changes
            steps = (f"{key} from {activity.settings[key]:,} to {new:,}" for key, new in changes.items())
            return f"lower {' and '.join(steps)}"
    return "even an eighth of every setting is too much; take a larger device, several (--shards), or a smaller model"


def disk(profile: Profile, of: Shape, items: Sequence, activities: Sequence[Activity]) -> tuple[float, float]:
    """Bytes to download, and bytes that runs write below `_build`: activations kept, and the states of one training."""
    downloads = sum(item.bytes or 0 for item in items if not item.there)
    states = [2 * activity.passing * 4 / 5 for activity in activities if activity.name.startswith("train")]
    kept = profile.activations.limit or profile.recipe.tokens
    cache = 2 * of.d_model * kept if states and profile.activations.cache else 0
    return downloads, cache + max(states, default=0)


# --- the table --------------------------------------------------------------------------------------------------------


def report(
    profile: Profile, names: Sequence[str] = (), device_memory: float | None = None, speed: Speed | None = None
) -> Iterator[str]:
    """The lines that `saelib plan` prints.

    Args:
        names: of chapters; none: all of them, and the trainings.
        device_memory: GB of a GPU that is not here.
        speed: of a device that is not to be measured: the hours are lower bounds.

    Raises:
        UserError: something does not fit, no such chapter, or the model's shape is not known here.
    """
    of, on = costs.shape(profile), machine(profile, device_memory)
    items = hub.needs(profile)
    c = Cost(profile, of, on.device)
    activities = [*([] if names else trainings(c)), *chapters(c, names)]
    yield f"{profile.name}: {profile.model.name}, {of.parameters:,} parameters; {on.name}, {_gb(on.memory)} GB"
    yield hub.table(items)
    downloads, written = disk(profile, of, items, activities)
    free = shutil.disk_usage(BUILD if BUILD.exists() else BUILD.parent).free
    some = f"{'at least ' if any(item.bytes is None for item in items) else ''}{_gb(downloads)} GB"
    yield f"disk: {some} to download, up to {_gb(written)} GB written by runs, {_gb(free)} GB free\n"
    refusal = refused(max(activities, key=lambda one: one.needs(on.device)[0]), on)
    if downloads + written > free and not refusal:
        cure = "free some, or point HF_HOME and SAELIB_BUILD to another disk"
        refusal = f"{_gb(downloads + written)} GB of disk are needed, {_gb(free)} are free: {cure}"
    bound = "at least " if speed else ""
    if not (speed or refusal or device_memory):
        speed = probe(profile, of, on.device)
    yield f"{'':<22}{'device GB':>10}{'host GB':>9}{'TFLOP':>12}{bound + 'hours':>16}"
    yield from _rows(activities, on, speed)
    if refusal:
        raise UserError(refusal)
    if not speed:
        yield "hours: give --flops and --bandwidth of that card, or run saelib plan where it is"


def _rows(activities: Sequence[Activity], on: Machine, speed: Speed | None) -> Iterator[str]:
    hours = 0.0
    for activity in activities:
        own, host = activity.needs(on.device)
        took = activity.work.seconds(speed) / 3600 if speed else None
        hours += 0 if activity.note or not speed else took
        sizes = f"{_gb(own):>10}{_gb(host):>9}{activity.work.flops / 1e12:>12,.0f}"
        shown = "not known" if took is None else f"{took:,.2f}"
        yield f"{activity.name:<22}{sizes}{shown:>16}  {activity.note}".rstrip()
    if speed:
        yield f"{'left to do':<53}{hours:>16,.2f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"
