"""The `saelib` command: thin calls of the module's functions.

A user's mistake ends in one line, `error: …`, and exit code 2; a failing chapter in exit code 1. Heavy modules are
imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from saelib import UserError, __version__

DEFAULT = "docstring-gpt"


class OneLineErrors(click.Group):
    """The one place where errors become exit codes."""

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except UserError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            context.exit(2)


profile_option = click.option(
    "--profile", default=DEFAULT, show_default=True, metavar="NAME",
    help="A shipped profile, or the path of your own .yml file.",
)  # fmt: skip
pairs_option = click.option(
    "-p", "pairs", multiple=True, metavar="KEY=VALUE", help="Set one value (JSON, or a word); may be repeated."
)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="saelib")
def main() -> None:
    """Run the chapters of the book, build it, and train the model and the autoencoders it ships with.

    \b
    The whole book, as `make book` does it:
      saelib run all
      saelib book
    """


@main.command(short_help="Run chapters headless, skipping what is done.")
@click.argument("chapters", nargs=-1, metavar="[01 04 …|all]")
@profile_option
@pairs_option
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Executed notebooks go here, numbers to DIR/results."
)
@click.option("--list", "only_list", is_flag=True, help="Show the chapters and their state; run nothing.")
@click.option("--force", is_flag=True, help="Run also what is done.")
@click.option("--sweep", is_flag=True, help="Run the long sweeps of the chapters, whose stored results they show.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Of a sweep, at a time.")
def run(
    chapters: tuple[str, ...], profile: str, pairs: tuple[str, ...], out: Path | None, only_list: bool, force: bool,
    sweep: bool, jobs: int,
) -> None:  # fmt: skip
    """Run chapters headless, in order; without arguments all of them.

    A chapter that is done and whose notebook, parameters, profile, model and code have not changed is skipped, so a run
    that was stopped goes on where it was. The executed notebook is kept also when a cell fails.

    \b
    Examples:
      saelib run                            all chapters, on the small model that ships with the book
      saelib run --list                     which chapters there are, and which are done
      saelib run 01 --profile gpt2-small    the same chapter on another model
      saelib run 01 -p seed=1 --out trial   another seed; notebook and numbers in trial/
      saelib run 01 --profile my.yml        your own model and text
      saelib run 06 --sweep --jobs 2        what chapter 06 shows and does not run: 40 minutes on 2 cores

    \b
    Exit codes: 0 all done, 1 a cell failed, 2 something given is wrong.
    """
    from saelib import runner

    if only_list:
        plans, _ = runner.plan(chapters, profile, pairs, out)
        for item in plans:
            click.echo(f"{runner.line(item.chapter, item.state, item.seconds)}   {item.chapter.title}")
        return
    try:
        if sweep:
            runner.sweep(chapters, profile, pairs, out, jobs, force)
        else:
            runner.run(chapters, profile, pairs, out, force)
    except runner.ChapterFailed as error:
        click.echo(str(error), err=True)
        sys.exit(1)


@main.command(short_help="Run a notebook over a grid of values, here or on a cluster.")
@click.argument("notebook", metavar="NB")
@click.option("-g", "grid", multiple=True, metavar="KEY=V1,V2", help="Values of one key; the grid is their product.")
@profile_option
@click.option("--scheduler", metavar="ADDRESS", help="A dask.distributed scheduler.  [default: local processes]")
@click.option("--jobs", type=click.IntRange(min=1), help="Local processes.  [default: 1]")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="[default: _build/sweeps/PROFILE/NB]")
def sweep(
    notebook: str, grid: tuple[str, ...], profile: str, scheduler: str | None, jobs: int | None, out: Path | None
) -> None:
    """Run NB, a chapter or the path of a notebook with a parameters cell, once for every point of a grid.

    A plain KEY is a parameter of the notebook, a dotted one a value of the profile. DIR/rows.csv gets one row a point:
    its values, how it ended, and the numbers that it published. A point that fails is tried once more and holds up no
    other. Points that are done are skipped, so a sweep that was stopped goes on where it was.

    The workers of a cluster need this checkout and DIR under the same paths, on a file system that they share.

    \b
    Examples:
      saelib sweep 06 -g recipe.lr=1e-3,2e-3,4e-3 -g seed=0,1 --jobs 2
      saelib sweep my.ipynb -g activations.block=512,4096 --profile my.yml
      saelib sweep 06 -g recipe.lr=1e-4,2e-4 --profile gpt2-small --scheduler tcp://10.0.0.1:8786

    \b
    Exit codes: 0 all done, 1 a point failed, 2 something given is wrong.
    """
    from saelib.sweep import sweep as run_grid

    table, rows = run_grid(notebook, grid, profile, scheduler, jobs, out)
    failed = [row for row in rows if row["state"] != "done"]
    for row in failed:
        click.echo(", ".join(f"{pair.split('=')[0]} {row[pair.split('=')[0]]}" for pair in grid) + f": {row['error']}")
    click.echo(f"{len(rows) - len(failed)} of {len(rows)} points done: {os.path.relpath(table)}")
    sys.exit(1 if failed else 0)


@main.command(short_help="Train the profile's model from scratch.")
@profile_option
@pairs_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights and of the order of the text.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="[default: _build/pretrain/PROFILE/seed-N]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all cores you may use, at most 4]")
def pretrain(profile: str, pairs: tuple[str, ...], seed: int, out: Path | None, threads: int | None) -> None:
    """Train the profile's model from scratch, by the `pretrain` section of the profile.

    Resumes by itself: stop it whenever you like and type the same command again. DIR becomes an ordinary Hugging Face
    folder; so does DIR/checkpoints/step-NNNNNN for every checkpoint of the schedule. DIR/log.jsonl holds the losses.

    \b
    Examples:
      saelib pretrain             the model that ships with the book
      saelib pretrain --seed 1    its second seed
      saelib pretrain -p pretrain.steps=100 -p pretrain.checkpoints=[0,100] --out trial    a short trial
    """
    import torch

    from saelib.models import pick_device
    from saelib.pretrain import pretrain as train
    from saelib.profile import BUILD, load_profile, override
    from saelib.report import cores
    from saelib.runner import parse_pairs

    torch.set_num_threads(threads or min(4, cores() or 1))
    chosen = override(load_profile(profile), parse_pairs(pairs))
    out = out or BUILD / "pretrain" / chosen.name / f"seed-{seed}"
    train(chosen, out, seed, pick_device(chosen))
    click.echo(f"model, checkpoints and log: {os.path.relpath(out)}")


@main.command(short_help="Train a sparse autoencoder of the profile.")
@click.argument("name")
@profile_option
@pairs_option
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="[default: _build/sae/PROFILE/NAME]")
@click.option("--resume", is_flag=True, help="Go on with the run in DIR, if there is one.")
@click.option("--tensorboard", is_flag=True, help="Write the log to DIR/tensorboard, too.")
@click.option(
    "--shards", type=click.IntRange(min=1), default=1, help="Under torchrun: processes that share the latents."
)
def train(
    name: str, profile: str, pairs: tuple[str, ...], out: Path | None, resume: bool, tensorboard: bool, shards: int
) -> None:
    """Train NAME, one of the profile's `saes`, by its `recipe`.

    DIR gets the SAE (sae.safetensors, config.json), a line of log.jsonl every 50 steps, and every 500 steps a state
    from which --resume goes on after any kind of stop, to the same weights.

    \b
    Examples:
      saelib train small                                     the small SAE that ships with the book
      saelib train small -p recipe.lr=4e-4 --out trial       another learning rate
      saelib train small --resume                            go on after a stop
      torchrun --nproc-per-node=4 -m saelib.cli train large --shards 2
                                                             two groups share the tokens, two processes each the latents
    """
    from saelib import train as trainer
    from saelib.profile import BUILD, load_profile, override
    from saelib.ranks import processes
    from saelib.runner import parse_pairs

    chosen = load_profile(profile)
    values = parse_pairs(pairs)
    chosen.recipe_of(name)
    recipe = {key: values.pop(key) for key in list(values) if key.startswith("recipe.")}
    values |= {f"saes.{name}.{key}": value for key, value in recipe.items()}  # what NAME's own section says yields
    chosen = override(chosen, values)
    out = out or BUILD / "sae" / chosen.name / name
    with processes():
        sae = trainer.train(chosen, name, out, resume=resume, tensorboard=tensorboard, shards=shards)
    metrics = sae.facts["metrics"]
    if trainer.World.first():
        click.echo(
            f"normalised MSE {metrics['normalized_mse']:.4f} ± {metrics['se']:.4f} on validation text, "
            f"L0 {metrics['l0']:.1f}, dead {metrics['dead_fraction']:.1%}: {os.path.relpath(out)}"
        )


@main.command(short_help="Write an SAE in another system's format.")
@click.argument("source", metavar="SAE")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--format", "layout", required=True, metavar="FORMAT", help="openai, saelens, sparsify, dictionary_learning, ours."
)
@profile_option
def export(source: str, target: Path, layout: str, profile: str) -> None:
    """Write SAE, a name of the profile or a path in any of the formats, to TARGET.

    \b
    Examples:
      saelib export small small-saelens --format saelens
      saelib export small small.pt --format openai
    """
    from saelib import formats
    from saelib.profile import load_profile
    from saelib.train import load_sae

    chosen = load_profile(profile)
    formats.export(load_sae(chosen, source) if source in chosen.saes else formats.load(source), target, layout)
    click.echo(f"{layout}: {os.path.relpath(target)}")


@main.command(name="import", short_help="Read an SAE of any format, write it in ours.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def import_(source: Path, target: Path) -> None:
    """Read the SAE at SOURCE, whose system is recognised by its content, and write it to the folder TARGET in ours.

    \b
    Example:
      saelib import v5_32k/8.pt sae/oai-32k
    """
    from saelib import formats

    sae = formats.load(source)
    formats.save(sae, target)
    size = f"{sae.n_latents:,} latents on {sae.d_model} dimensions, k {sae.k}"
    biased = "with" if sae.latent_bias is not None else "without"
    place = os.path.relpath(target)
    click.echo(f"{sae.architecture}, {size}, {biased} latent bias, normalises {sae.normalize}: {place}")


@main.command(short_help="Say what a profile takes, before anything is fetched or run.")
@click.argument("chapters", nargs=-1, metavar="[01 04 …]")
@profile_option
@pairs_option
@click.option(
    "--device-memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Plan for a GPU of this memory, not for the device here.",
)
def plan(chapters: tuple[str, ...], profile: str, pairs: tuple[str, ...], device_memory: float | None) -> None:
    """Say what chapters, and the training of the profile's SAEs, take: downloads, disk, memory, arithmetic, hours.

    Hours are estimates: they follow from formulas and from ten seconds of measuring the device found, so with
    --device-memory there are none. What cannot fit is refused, with the setting to change.

    \b
    Examples:
      saelib plan                                              the default profile, on this machine
      saelib plan --profile gpt2-small                         GPT-2 small, on this machine
      saelib plan --profile gpt2-small --device-memory 24      the same on a GPU of 24 GB
      saelib plan --profile gpt2-small -p activations.block=8192 --device-memory 16
      saelib plan 02 05 --profile my.yml                       two chapters on your own model

    \b
    Exit codes: 0 it fits, 2 it does not, or something given is wrong.
    """
    from saelib import plan as planner
    from saelib.profile import load_profile, override
    from saelib.runner import parse_pairs

    for line in planner.report(override(load_profile(profile), parse_pairs(pairs)), chapters, device_memory):
        click.echo(line)


@main.command(short_help="Download what a profile needs, so that it runs offline.")
@profile_option
@click.option("--dry-run", is_flag=True, help="Say what is needed, how large it is and where it goes; get nothing.")
@click.option(
    "--only", type=click.Choice(["model", "text", "saes", "checkpoints"]), help="One kind; of checkpoints, then all."
)
def fetch(profile: str, dry_run: bool, only: str | None) -> None:
    """Download the models, text, SAEs and training checkpoints that the profile names, and check them.

    Sizes are said first. What is there is not fetched again, and what was cut short goes on where it was. Afterwards
    the profile runs with HF_HUB_OFFLINE=1, but for two chapters. 08 streams its labelled data sets when it runs, and
    does without them where it cannot. Without --only, the checkpoints are those that chapters look at in any case: the
    search of chapter 04 loads others as it goes.

    \b
    Examples:
      saelib fetch --profile gpt2-small --dry-run
      saelib fetch --profile gpt2-small
      saelib fetch --profile stanford-gpt2-small-a --only checkpoints

    \b
    Mirrors and proxies: HF_ENDPOINT, SAELIB_OPENAI_URL, HTTPS_PROXY. The hub's cache is in HF_HOME.
    """
    from saelib import hub
    from saelib.profile import load_profile

    chosen = load_profile(profile)
    items = hub.needs(chosen, only)
    click.echo(hub.table(items))
    if not dry_run:
        hub.fetch(chosen, items)


@main.command(short_help="Build the book from executed notebooks.")
@profile_option
@click.option(
    "--committed", is_flag=True, help="Only from the outputs that came with the checkout; run nothing before."
)
def book(profile: str, committed: bool) -> None:
    """Build the book as HTML and say where it is.

    Notebooks that `saelib run` has executed for the profile take the place of the committed ones.

    \b
    Examples:
      saelib book               after `saelib run`
      saelib book --committed   straight after cloning
    """
    from saelib import book as builder

    builder.stage(profile, committed)
    click.echo(f"the book: {os.path.relpath(builder.build())}")


@main.command(short_help="Copy results and executed outputs into the checkout.")
@profile_option
def publish(profile: str) -> None:
    """Copy the profile's numbers to results/ and, for the default profile, executed outputs to notebooks/.

    The one way to refresh what is committed; `git diff` shows what became of it.

    \b
    Example:
      saelib run all && saelib publish
    """
    from saelib import book as builder

    for path in builder.publish(profile):
        click.echo(os.path.relpath(path))


if __name__ == "__main__":
    main()
