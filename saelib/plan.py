"""What a profile takes before it is run: downloads, disk, memory, arithmetic, hours; and a refusal of what cannot fit.

`costs.py` has the formulas. Here they meet a machine: its memory as it is found or given, and its speed as short bursts
of the real work measure it. A device that is not here has no hours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """Bytes of the device: of a GPU that is here those that nobody else holds."""
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
    return Machine(device, torch.cuda.get_device_name(0), float(torch.cuda.mem_get_info(0)[0]), host)


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
    holds: Callable[[Cost, Mapping[str, int]], Memory]
    """On the device, for another profile, or with other parameters of the notebook."""
    passing: float
    """Bytes of weights that pass through the machine's memory on their way to a GPU."""
    settings: Mapping[str, Sequence[int]]
    """What to lower if memory is short, in this order: the value it has, and others."""
    note: str = ""

    def needs(self, c: Cost, changes: Mapping[str, int] | None = None) -> tuple[float, float]:
        """Bytes of the device, and of the machine; with some of `settings` changed."""
        keys = {key: value for key, value in (changes or {}).items() if "." in key}
        changed = c._replace(profile=override(c.profile, keys)) if keys else c
        own = BASE[c.device] + SLACK * sum(self.holds(changed, changes or {}).values())
        return own, HOST + self.passing if c.device == "cuda" else own


def trainings(c: Cost) -> Iterator[Activity]:
    """One for every SAE of the profile that is not fetched."""
    for name in (name for name, entry in c.profile.saes.items() if not entry.openai):
        recipe = c.profile.recipe_of(name)
        passing = 5 * 4 * costs.sae_parameters(recipe, c.of.d_model)
        note = "is there" if there(c.profile, name) else ""

        def holds(c: Cost, _: Mapping[str, int], name: str = name) -> Memory:
            return costs.training(c, c.profile.recipe_of(name))

        yield Activity(f"train {name}", c.fit(recipe, recipe.tokens), holds, passing, _settings(c, name), note)


def _settings(c: Cost, name: str) -> dict[str, list[int]]:
    """Of a training: an SAE's own section is what counts, whether it names the setting or not."""
    recipe, own = c.profile.recipe_of(name), f"saes.{name}.recipe"
    found = {"activations.block": _halved(c.profile.activations.block), f"{own}.batch": _halved(recipe.batch)}
    return found | {f"{own}.k_aux": [recipe.k_aux, 0], f"{own}.n_latents": _halved(recipe.n_latents, 4 * recipe.k)}


def _halved(value: int, least: int = 1) -> list[int]:
    return [value, *(value >> by for by in (1, 2, 3) if value >> by >= least)]


def chapters(c: Cost, names: Sequence[str]) -> Iterator[Activity]:
    """Notebooks, as they are without `-p`."""
    for chapter in runner.select(names, runner.chapters()):
        number, given = chapter.name[:2], chapter.parameters
        settings = {key: _halved(value) for key, value in given.items() if key.startswith("n_")}
        if number == "06" and "chapter" in c.profile.saes:
            settings = _settings(c, "chapter")

        def holds(c: Cost, changes: Mapping[str, int], number: str = number, given: Mapping = given) -> Memory:
            return costs.chapter(c, number, given | changes)

        work = costs.CHAPTERS[number](c, given) + Work(host=costs.HOST)
        yield Activity(chapter.name, work, holds, 8 * c.of.parameters, settings)


def refused(activity: Activity, c: Cost, on: Machine) -> str:
    """Why it cannot be run there, and what to change; empty where it fits."""
    needed, host = activity.needs(c)
    if needed > on.memory:
        largest = sorted(activity.holds(c, {}).items(), key=lambda part: -part[1])[:3]
        most = ", ".join(f"{_gb(size)} for {part}" for part, size in largest)
        short = f"{activity.name} needs {_gb(needed)} GB and {on.name} has {_gb(on.memory)} ({most})"
        return f"{short}: {_cure(activity, c, on)}"
    if host > on.host:
        short = f"{activity.name} needs {_gb(host)} GB beside the GPU and this machine has {_gb(on.host)}"
        return f"{short}: take a larger machine"
    return ""


def _cure(activity: Activity, c: Cost, on: Machine) -> str:
    """The first settings that, lowered one after the other, make room; those that are not needed for it left out."""
    changes: dict[str, int] = {}
    for key, values in activity.settings.items():
        for value in values[1:]:
            changes[key] = value
            if activity.needs(c, changes)[0] <= on.memory:
                for other in [one for one in changes if one != key]:
                    rest = {one: changes[one] for one in changes if one != other}
                    changes = rest if activity.needs(c, rest)[0] <= on.memory else changes
                where = "in the profile" if "." in key else "of the notebook, with -p"
                return f"set {' and '.join(f'{key}={value}' for key, value in changes.items())} {where}"
    return "no setting makes enough room; take a larger device, several (--shards), or a smaller model"


def written(c: Cost, activities: Sequence[Activity]) -> float:
    """Bytes that runs write below `_build`: activations kept, and the states of one training."""
    states = [2 * one.passing * 4 / 5 for one in activities if one.name.startswith("train") and not one.note]
    kept = c.profile.activations.limit or c.profile.recipe.tokens
    return 2 * c.of.d_model * kept * bool(states and c.profile.activations.cache) + max(states, default=0)


# --- the table --------------------------------------------------------------------------------------------------------


def report(profile: Profile, names: Sequence[str] = (), device_memory: float | None = None) -> Iterator[str]:
    """The lines that `saelib plan` prints.

    Args:
        names: of chapters; none: all of them, and the trainings.
        device_memory: GB of a GPU that is not here; its hours are not known then.

    Raises:
        UserError: something does not fit, no such chapter, or the model's shape is not known here.
    """
    of, on = costs.shape(profile), machine(profile, device_memory)
    c = Cost(profile, of, on.device)
    activities = [*([] if names else trainings(c)), *chapters(c, names)]
    items = hub.needs(profile)
    yield f"{profile.name}: {profile.model.name}, {of.parameters:,} parameters; {on.name}, {_gb(on.memory)} GB"
    yield hub.table(items)
    yield f"runs write up to {_gb(written(c, activities))} GB to {BUILD}\n"
    short = [(one.needs(c), one.name, why) for one in activities if not one.note and (why := refused(one, c, on))]
    speed = None if short or device_memory else probe(profile, of, on.device)
    yield f"{'':<22}{'device GB':>10}{'host GB':>9}{'TFLOP':>12}{'hours':>12}"
    yield from _rows(activities, c, speed, {name for _, name, _ in short})
    if short:
        raise UserError(max(short)[2])
    hub.check_space([*hub.to_come(items), (BUILD, written(c, activities))])
    if not speed:
        yield "hours: run saelib plan where that card is"


def _rows(activities: Sequence[Activity], c: Cost, speed: Speed | None, short: set[str]) -> Iterator[str]:
    hours = 0.0
    for one in activities:
        took = one.work.seconds(speed) / 3600 if speed else 0
        hours += 0 if one.note else took
        sizes = "".join(f"{_gb(size):>{width}}" for size, width in zip(one.needs(c), (10, 9), strict=True))
        note = "does not fit" if one.name in short else one.note
        shown = f"{took:,.2f}" if speed else "not known"
        yield f"{one.name:<22}{sizes}{one.work.flops / 1e12:>12,.0f}{shown:>12}  {note}".rstrip()
    if speed:
        yield f"{'left to do':<53}{hours:>12,.2f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"
