"""Train sparse autoencoders: the paper's recipe (`saelib.profile.Recipe`) as one loop.

Batch number i and every random choice follow from the seed and the number of processes, and the state that is saved
holds everything else. So a run that was killed at any moment, and started again, ends on a CPU with the same bits as
one that was not. Started again with another number of processes it goes on, too, with other batches from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from saelib import UserError, ops
from saelib.objective import Sparse, Terms, World, dense
from saelib.profile import BUILD, ROOT, Profile, Recipe, text_fingerprint
from saelib.sae import SAE, TINY

VALIDATION = 2048
"""Contexts that a finished SAE is judged by."""
SAMPLE = 32_768
"""Activations from which the pre-bias and the constant of the loss are computed."""
LOG_EVERY = 50
"""Steps that one line of the log sums up."""
SAVE_EVERY = 10 * LOG_EVERY
"""Steps between saved states."""
UNSHARED = {"pre_bias", "threshold"}
"""What every shard of an SAE has whole; of the rest it has the part that belongs to its latents."""


class Source(Protocol):
    """Where activations come from (`saelib.activations`)."""

    d_model: int
    identity: str
    """Changes when the activations would."""

    def batches(
        self, batch: int, seed: int, start: int = 0, rank: int = 0, size: int = 1
    ) -> Iterator[Float[Tensor, "part d_model"]]:
        """Endless: of each batch the part, batch / size rows, of process `rank` of `size`; number `start` comes first.

        Number i is a function of (seed, i, rank, size) alone.
        """

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_model"]: ...


def geometric_median(
    x: Float[Tensor, "n d_model"], tolerance: float = 1e-7, most: int = 1000
) -> Float[Tensor, "d_model"]:
    """The point with the least sum of distances, to `tolerance` of the data's spread.

    Weiszfeld's iteration; data points where it stands hold it back as Vardi and Zhang (2000) have it.
    """
    x = x.double()
    point = x.mean(0)
    spread = (x - point).norm(dim=1).mean()
    for _ in range(most):
        distance = (x - point).norm(dim=1)
        here = distance <= tolerance * spread
        weights = torch.where(here, 0, 1 / distance)
        others = (weights[:, None] * x).sum(0) / weights.sum().clamp_min(TINY)
        pull = weights.sum() * (others - point).norm()
        moved = torch.lerp(others, point, (here.sum() / pull.clamp_min(TINY)).clamp_max(1))
        if (moved - point).norm() <= tolerance * spread:
            return moved
        point = moved
    return point


def start(recipe: Recipe, d_model: int, seed: int, sample: Float[Tensor, "n d_model"]) -> tuple[SAE, float]:
    """A fresh SAE with its pre-bias, and the constant that the squared error is divided by."""
    sae = SAE(
        recipe.n_latents, d_model, recipe.k,
        architecture=recipe.architecture, latent_bias=recipe.latent_bias, normalize=recipe.normalize, seed=seed,
    )  # fmt: skip
    normalized, _, _ = sae.normalized(sample)
    match recipe.pre_bias:
        case "median":
            sae.pre_bias.data.copy_(geometric_median(normalized))
        case "mean":
            sae.pre_bias.data.copy_(normalized.mean(0))
        case "raw_median":
            sae.pre_bias.data.copy_(geometric_median(sample))
    if not recipe.tied_init:
        sae.W_enc.data.copy_(SAE(recipe.n_latents, d_model, seed=seed + 2**31).W_dec)
    judged = sample.double() if recipe.loss_space == "raw" else normalized.double()
    constant = (judged - judged.mean(0)).square().sum(1).mean().item() if recipe.mse_constant else float(d_model)
    return sae, constant


class Trainer:
    """One training run: the SAE, its optimizer, its average, and its count of what is dead.

    `sample`, raw activations, sets the pre-bias and the loss's constant. With `world`, the other processes of a
    distributed run, this one holds its part of the latents only.
    """

    def __init__(
        self, recipe: Recipe, d_model: int, seed: int, sample: Float[Tensor, "n d_model"], world: World | None = None
    ):
        self.recipe, self.world, self.n_steps = recipe, world or World(), 0
        whole, self.constant = start(recipe, d_model, seed, sample)
        self.sae = part_of(whole, self.world).to(sample.device).train()
        self.sparse = Sparse(self.sae, recipe, self.constant, self.world) if self.sae.sparse else None
        named = {name: p for name, p in self.sae.named_parameters() if not (recipe.tied and name == "W_enc")}
        self.names, self.trained = list(named), list(named.values())
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.trained]
        self.average = [torch.zeros_like(p) for p in self.trained]
        self.since_fired = torch.zeros(self.sae.n_latents, dtype=torch.int64, device=sample.device)
        """Tokens since each latent was last active."""

    @property
    def dead(self) -> Tensor:
        """Bool[Tensor, "n_latents"]: latents that have not fired for the recipe's `dead_after` tokens."""
        return self.since_fired > self.recipe.dead_after

    def step(self, x: Float[Tensor, "batch d_model"]) -> Terms:
        """One step on raw activations (of this process's tokens): the whole recipe."""
        terms = self.gradients(x)
        recipe, sae = self.recipe, self.sae
        if recipe.tied:
            sae.W_dec.grad += sae.W_enc.grad
        self.n_steps += 1
        rate = recipe.rate * min(1.0, self.n_steps / max(1, recipe.warmup))
        scale = self._clip(recipe.clip) if recipe.clip is not None else 1.0
        adam = ops.Adam(rate, recipe.beta1, recipe.beta2, recipe.eps, recipe.ema, self.n_steps, scale)
        for p, moments, average in zip(self.trained, self.moments, self.average, strict=True):
            decoder = p is sae.W_dec
            ops.update(p, *moments, average, adam, decoder and recipe.project, decoder and recipe.unit_norm)
        if recipe.tied:
            sae.W_enc.data.copy_(sae.W_dec)
        self.since_fired += len(x) * self.world.parts
        self.since_fired[terms.fired] = 0
        return terms

    def gradients(self, x: Float[Tensor, "batch d_model"]) -> Terms:
        """The loss and the gradients of one batch."""
        if self.sparse:
            return self.sparse(x, self.dead)
        self.sae.zero_grad()
        return dense(self.sae, x, self.recipe, self.constant, self.dead)

    @torch.no_grad()
    def _clip(self, most: float) -> float:
        """What to multiply gradients by so that their norm, over the latents of all processes, is at most `most`."""
        sae = self.sae
        squares = [
            ops.across(p.grad, p).sum()
            if p is sae.W_dec and self.recipe.project
            else p.grad.flatten().dot(p.grad.flatten())
            for p in self.trained
        ]  # what the update takes out of the decoder's gradient does not count
        squares = torch.stack(squares).sum()
        shared = self.sae.pre_bias.grad.norm().square()  # every shard has it whole
        norm = (self.world.over_latents(squares - shared) + shared).sqrt()
        return min(1.0, float(most / norm.clamp_min(TINY)))

    @torch.no_grad()
    def averaged(self) -> SAE:
        """The SAE to keep, gathered from all shards: bias-corrected average of the weights, decoder rows of norm 1."""
        values, share = (self.average, 1 - self.recipe.ema**self.n_steps) if self.n_steps else (self.trained, 1.0)
        averages = dict(zip(self.names, values, strict=True))
        averages.setdefault("W_enc", averages["W_dec"])  # tied
        sae = whole_of(self.sae, averages, share, self.world)
        if self.recipe.unit_norm:
            sae.W_dec /= torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True)
        if self.recipe.tied:
            sae.W_enc.copy_(sae.W_dec)
        return sae.eval()

    def finite(self) -> bool:
        """Whether all weights and their averages are, those of the other shards too."""
        bad = sum((~value.isfinite()).sum() for value in (*self.trained, *self.average))
        return not self.world.over_latents(bad)

    def state(self) -> dict:
        """Everything that the rest of the run depends on, of this shard."""
        return {
            "steps": self.n_steps, "constant": self.constant, "sae": self.sae.state_dict(),
            "moments": self.moments, "average": self.average, "since_fired": self.since_fired,
        }  # fmt: skip

    def restore(self, states: Sequence[dict]) -> None:
        """Go on from the states of all shards of a run, in order, however many shards there are now."""
        n, device = self.sae.n_latents, self.since_fired.device

        def own(name: str, parts: Sequence) -> Tensor | tuple[Tensor, ...]:
            if isinstance(parts[0], tuple):
                return tuple(own(name, some) for some in zip(*parts, strict=True))
            value = parts[0] if name in UNSHARED else torch.cat(list(parts))[self.world.shard * n :][:n]
            return value.to(device, copy=True)

        def trained(key: str) -> list:
            every = zip(*(state[key] for state in states), strict=True)
            return [own(name, parts) for name, parts in zip(self.names, every, strict=True)]

        self.n_steps, self.constant = states[0]["steps"], states[0]["constant"]
        saes = [state["sae"] for state in states]
        self.sae.load_state_dict({name: own(name, [sae[name] for sae in saes]) for name in saes[0]})
        self.moments, self.average = trained("moments"), trained("average")
        self.since_fired = own("since_fired", [state["since_fired"] for state in states])


# --- several processes ------------------------------------------------------------------------------------------------


@torch.no_grad()
def part_of(whole: SAE, world: World) -> SAE:
    """The SAE with only this process's latents. Raises UserError where they cannot be shared out."""
    if world.shards * world.parts == 1:
        return whole
    if not whole.sparse:
        raise UserError(f"{whole.architecture} trains in one process only: start it without torchrun")
    n, rest = divmod(whole.n_latents, world.shards)
    if rest:
        raise UserError(f"{whole.n_latents} latents cannot be shared out over {world.shards} shards: choose a divisor")
    part = SAE(n, whole.d_model, whole.k, latent_bias=whole.latent_bias is not None, normalize=whole.normalize)
    for name, parameter in part.named_parameters():
        value = getattr(whole, name)
        parameter.copy_(value if name in UNSHARED else value[world.shard * n :][:n])
    return part


@torch.no_grad()
def whole_of(part: SAE, values: dict[str, Tensor], divisor: float, world: World) -> SAE:
    """The SAE of all shards, with `values` / `divisor` as its parameters."""
    whole = SAE(
        part.n_latents * world.shards, part.d_model, part.k,
        architecture=part.architecture, latent_bias=part.latent_bias is not None, normalize=part.normalize,
    ).to(part.W_dec.device)  # fmt: skip
    for name, value in values.items():
        parts = [value] if name in UNSHARED else world.gather(value)
        getattr(whole, name).copy_(torch.cat(parts) / divisor)
    for name, value in part.named_buffers():
        getattr(whole, name).copy_(value)
    return whole


# --- by name: only here are models read, and only here is what reads them imported ------------------------------------


def where(profile: Profile, name: str) -> Path:
    """Where an SAE of the profile is: in the folder it names, or else where `saelib train` leaves it."""
    profile.recipe_of(name)
    shipped, trained = profile.saes[name].path, BUILD / "sae" / profile.name / name
    return ROOT / shipped if shipped and (ROOT / shipped).exists() else trained


def there(profile: Profile, name: str) -> bool:
    """Whether somebody has put it there; a training run that has not ended yet leaves no `.json`."""
    path = where(profile, name)
    return path.is_file() or any(path.glob("*.json"))


def load_sae(profile: Profile, name: str, model=None) -> SAE:
    """An SAE of the profile; with `model`, checked against it and on its device.

    Raises:
        UserError: no such SAE, or not trained yet.
    """
    from saelib.formats import load

    path = where(profile, name)
    if not there(profile, name):
        cure = "fetch" if profile.saes[name].openai else f"train {name}"
        raise UserError(f"SAE {name!r} of {profile.name!r} is not there: saelib {cure} --profile {profile.name}")
    return load(path, model).to("cpu" if model is None else model.cfg.device)


def source_of(profile: Profile, model) -> Source:
    """Training activations of a model, from the cache if the profile asks for one."""
    from saelib.activations import Cached, Streamed

    asked = profile.activations
    return Cached(profile, model, tokens=asked.limit) if asked.cache else Streamed(profile, model)


def train(profile: Profile, name: str, out: Path, shards: int = 1, **how) -> SAE:
    """Train one of the profile's SAEs by `fit`, and leave it in `out` (our format, float16) with its log.

    Its facts say which model, text and recipe it comes from, and how well it does on the validation text.
    """
    from saelib.formats import save
    from saelib.metrics import activations, evaluate
    from saelib.models import checkpoints, fingerprint, load_model, load_tokenizer
    from saelib.text import contexts

    recipe, entry = profile.recipe_of(name), profile.saes[name]
    steps = {checkpoint.step: checkpoint for checkpoint in checkpoints(profile)}
    if entry.checkpoint is not None and entry.checkpoint not in steps:
        raise UserError(f"no checkpoint of step {entry.checkpoint}; there are {', '.join(map(str, steps))}")
    model = load_model(profile, None if entry.checkpoint is None else steps[entry.checkpoint])
    held_out = contexts(profile, load_tokenizer(profile), "validation", VALIDATION)  # if too few, say so before hours
    sae, log = fit(source_of(profile, model), recipe, entry.seed, out=out, shards=shards, **how)
    facts = {
        "name": name, "model": profile.model.name, "checkpoint": entry.checkpoint, "fingerprint": fingerprint(model),
        "hook": profile.hook, "context_length": profile.context_length, "prepend_bos": profile.prepend_bos,
        "text": text_fingerprint(profile), "seed": entry.seed, "recipe": recipe.model_dump(mode="json"),
        "activations": profile.activations.model_dump(mode="json"), "trained_tokens": log[-1]["tokens"],
        "metrics": evaluate(sae, activations(profile, model, held_out)),
    }  # fmt: skip
    sae.facts = {key: value for key, value in facts.items() if value is not None}
    if World.first():
        save(sae, out, torch.float16)
    return sae


# --- the loop ---------------------------------------------------------------------------------------------------------


def fit(
    source: Source, recipe: Recipe, seed: int = 0, *, out: Path | None = None, resume: bool = False,
    tensorboard: bool = False, shards: int | None = None,
) -> tuple[SAE, list[dict]]:  # fmt: skip
    """Train one SAE. Returns it (the averaged weights) with its log, one line for every `LOG_EVERY` steps.

    Args:
        seed: of the weights, of the sample, and of the order of the data.
        out: folder for `log.jsonl` and the states that a run resumes from; None keeps everything in memory.
        resume: go on with the run in `out`, where there is one.
        tensorboard: write the log there too, to `out/tensorboard`.
        shards: processes that share the latents, of those that torchrun started, whose groups share out the tokens;
            None: this process trains by itself.

    Raises:
        UserError: `out` holds an SAE, another run, or one not to be resumed; a loss or weights are not finite.
    """
    if out is not None:
        _refuse_taken(out, resume)
    world = World(shards)
    if recipe.batch % world.size:
        raise UserError(f"a batch of {recipe.batch} tokens cannot be shared out over {world.size} processes")
    trainer = Trainer(recipe, source.d_model, seed, source.sample(SAMPLE, seed), world)
    made = {"recipe": recipe.model_dump(mode="json"), "seed": seed, "data": source.identity}
    record = Record(out, made, trainer, tensorboard)
    if resume:
        record.resume()
    record.begin()
    shown = {"disable": True} if world.rank else {}  # left alone, $TQDM_DISABLE decides
    with (
        contextlib.closing(source.batches(recipe.batch, seed, trainer.n_steps, world.rank, world.size)) as batches,
        tqdm(total=recipe.steps, initial=trainer.n_steps, unit="step", mininterval=1, **shown) as bar,
    ):
        while trainer.n_steps < recipe.steps:
            x = next(batches)
            terms = trainer.step(torch.cat(world.gather(x)) if world.shards > 1 else x)
            record.add(terms, bar)
    return trainer.averaged(), record.lines


def _refuse_taken(out: Path, resume: bool) -> None:
    """A folder with a run is for `resume` only; one with an SAE and no state (it was imported, say) is for nothing."""
    if any(out.glob("state-*.pt")):
        if not resume:
            raise UserError(f"{out} holds a run already: go on with --resume, choose another --out, or remove it")
    elif (out / "sae.safetensors").exists():
        raise UserError(f"{out} holds an SAE already: choose another --out, or remove it")


class Record:
    """The log of a run, and the states it can be resumed from."""

    def __init__(self, out: Path | None, made: dict, trainer: Trainer, tensorboard: bool):
        self.out, self.made, self.trainer = out, made, trainer
        self.lines: list[dict] = []
        self.seconds, self.since = 0.0, time.perf_counter()
        self.sums = {"loss": 0.0, "mse": 0.0, "aux": 0.0, "l0": 0.0}
        self.first = trainer.world.rank == 0
        self.board = _board(out) if tensorboard and self.first else None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)

    def add(self, terms: Terms, bar: tqdm) -> None:
        """Take in one step; write what is due."""
        trainer, recipe = self.trainer, self.trainer.recipe
        found = torch.stack([getattr(terms, name) for name in self.sums]).tolist()  # a GPU is waited for once
        self.sums = {name: total + value for (name, total), value in zip(self.sums.items(), found, strict=True)}
        self._insist("the loss is", math.isfinite(self.sums["loss"]))
        bar.update()
        if trainer.n_steps % LOG_EVERY == 0 or trainer.n_steps == recipe.steps:
            self._line(bar)
            if trainer.n_steps % SAVE_EVERY == 0 or trainer.n_steps == recipe.steps:
                self._insist("the weights are", trainer.finite())  # the last update comes after the last loss
                self._save()

    def _insist(self, what: str, finite: bool) -> None:
        if finite:
            return
        saved, now, rate = self.saved(), self.trainer.n_steps, self.trainer.recipe.rate
        last = f"the last good state is {saved[-1][0]}" if saved else "no state was saved before it"
        cure = f"lower recipe.lr (now {rate:.2g}), or set recipe.clip=1"
        raise UserError(f"{what} not finite at step {now} (batch {now - 1}); {last}: {cure}")

    def _line(self, bar: tqdm) -> None:
        trainer = self.trainer
        steps = trainer.n_steps - (self.lines[-1]["step"] if self.lines else 0)
        now = time.perf_counter()
        took, self.since = now - self.since, now
        self.seconds += took
        dead = trainer.world.over_latents(trainer.dead.sum()).item() / trainer.recipe.n_latents
        norm = torch.linalg.vector_norm(trainer.sae.W_dec.detach(), dim=1).mean().item()
        means = {name: float(f"{total / steps:.6g}") for name, total in self.sums.items()}
        line = {"step": trainer.n_steps, "tokens": trainer.n_steps * trainer.recipe.batch, **means}
        line |= {"dead": dead, "decoder_norm": float(f"{norm:.6g}"), "seconds": round(self.seconds, 2)}
        self.lines.append(line)
        self.sums = dict.fromkeys(self.sums, 0.0)
        speed = steps * trainer.recipe.batch / took
        bar.set_postfix_str(f"MSE {line['mse']:.4f}, L0 {line['l0']:.1f}, dead {dead:.1%}, {speed:,.0f} tokens/s")
        if self.board:
            for name, value in {**means, "dead": dead, "tokens_per_second": speed}.items():
                self.board.add_scalar(name, value, line["tokens"])
        if self.out and self.first:
            with (self.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        """One state per shard. Older ones go when all shards have written theirs: a kill leaves one that is whole."""
        if self.out is None:
            return
        world = self.trainer.world
        name = f"state-{self.trainer.n_steps:08d}-{{}}of{world.shards}.pt"
        if world.part == 0:  # the other groups have the same
            state = {"made": self.made, "lines": self.lines, "seconds": self.seconds, **self.trainer.state()}
            path = self.out / name.format(world.shard)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            torch.save(state, partial)
            partial.replace(path)
        world.barrier()
        self._forget([self.out / name.format(shard) for shard in range(world.shards)])

    def _forget(self, kept: Sequence[Path]) -> None:
        """Remove all other states."""
        for path in set(self.out.glob("state-*.pt")) - set(kept) if self.first else ():
            path.unlink()

    def saved(self) -> list[list[Path]]:
        """States that are whole, in the order of steps: the files of all shards."""
        found: dict[tuple[int, int], dict[int, Path]] = defaultdict(dict)
        for path in self.out.glob("state-*.pt") if self.out else ():
            step, shard, shards = map(int, re.fullmatch(r"state-(\d+)-(\d+)of(\d+)", path.stem).groups())
            found[step, shards][shard] = path
        return [[of[shard] for shard in sorted(of)] for (_, shards), of in sorted(found.items()) if len(of) == shards]

    def resume(self) -> None:
        """Load the newest state, if there is one."""
        states = []
        for path in self.saved()[-1] if self.saved() else ():
            try:
                states.append(torch.load(path, weights_only=True, map_location="cpu", mmap=True))
            except Exception as error:  # whatever a damaged file provokes
                raise UserError(f"{path} is damaged: remove it, and start again") from error
        if states:
            if others := _others(states[0], self.made):
                raise UserError(f"{self.out} was made with another {others}: choose another --out, or remove it")
            self.lines, self.seconds = states[0]["lines"], states[0]["seconds"]
            self.trainer.restore(states)

    def begin(self) -> None:
        """Forget what a killed run left behind: lines logged after its last state, and files it had not finished."""
        if self.out is None or not self.first:
            return
        self._forget(next(reversed(self.saved()), []))
        for partial in self.out.glob("*.partial"):
            partial.unlink()
        partial = self.out / "log.partial"
        partial.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        partial.replace(self.out / "log.jsonl")


def _others(state: dict, made: dict) -> str:
    """What a state was made with and this run is not, in words; empty where they agree."""
    recipe = Recipe(**made["recipe"])
    if "made" not in state:  # by one process of an earlier version, which kept a hash, and knew of no precision
        known = recipe.model_dump_json(exclude={"precision"} if recipe.precision == "float32" else None)
        whole = f"{known} {made['seed']} {made['data']} 1 1"
        same = state["identity"] == hashlib.sha256(whole.encode()).hexdigest()[:16]
        return "" if same else "recipe, seed, data or number of processes"
    then, now = (
        {"data": one["data"], "seed": one["seed"]}
        | {f"recipe.{key}": value for key, value in Recipe(**one["recipe"]).model_dump(mode="json").items()}
        for one in (state["made"], made)
    )
    differ = [key for key in now if then[key] != now[key]]
    return ", ".join("data" if key == "data" else f"{key} ({then[key]}, now {now[key]})" for key in differ)


def _board(out: Path | None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(out / "tensorboard")
