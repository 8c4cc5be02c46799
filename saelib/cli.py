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
    "--profile",
    default=DEFAULT,
    show_default=True,
    metavar="NAME",
    help="A shipped profile, or the path of your own .yml file.",
)
pairs_option = click.option(
    "-p", "pairs", multiple=True, metavar="KEY=VALUE", help="Set one value (JSON, or a word); may be repeated."
)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="saelib")
def main() -> None:
    """Run the chapters of the book, build it, and make the model it ships with.

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
def run(
    chapters: tuple[str, ...], profile: str, pairs: tuple[str, ...], out: Path | None, only_list: bool, force: bool
) -> None:
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
        runner.run(chapters, profile, pairs, out, force)
    except runner.ChapterFailed as error:
        click.echo(str(error), err=True)
        sys.exit(1)


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
