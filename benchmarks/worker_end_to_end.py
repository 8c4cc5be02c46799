"""Harvest and training together: a GPT-2 of random weights, `activations.Streamed` on random tokens, `Trainer.step`.

One step times three things, tokens per second each: batches drawn with nobody training, training on one batch again
and again, and both, the next block being harvested while the SAE trains. `share` is the last over the slower of the
first two. All begin with a block ready, so a turn is at least four blocks.
"""

import contextlib
import itertools
import tempfile

import torch
from common import System, serve, stopwatch

BLOCKS = 4


def source(config):
    """Batches as a run gets them, of tokens that are drawn and not read."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from saelib import activations, models
    from saelib.profile import load_profile, override

    class Drawn(activations.Streamed):
        def _contexts(self, *_):
            generator = torch.Generator().manual_seed(0)
            while True:
                yield torch.randint(4096, (self.block, self.profile.context_length), generator=generator)

    with tempfile.TemporaryDirectory() as folder:
        sizes = {"n_layer": config["layers"], "n_embd": config["d"], "n_head": max(1, config["d"] // 64)}
        GPT2LMHeadModel(GPT2Config(vocab_size=4096, **sizes)).save_pretrained(folder)
        hook = f"blocks.{2 * config['layers'] // 3}.hook_resid_post"
        changes = {"model.name": folder, "hook": hook, "activations.block": config["block"]}
        profile = override(load_profile("docstring-gpt"), {**changes, "activations.cache": False})
        return Drawn(profile, models.load_model(profile))


def build(config, _):
    from saelib import profile, train

    drawn = source(config)
    recipe = profile.Recipe(
        n_latents=config["n"], k=config["k"], batch=config["batch"], precision=config["precision"], ema=0.999
    )
    trainer = train.Trainer(recipe, config["d"], seed=0, sample=drawn.sample(config["batch"], 0))
    steps = max(2, -(-BLOCKS * config["block"] * drawn.per_context // config["batch"]))
    facts = {}

    def speed(batches, use):
        with contextlib.closing(batches):
            x = next(batches)  # a block is ready
            use(x)
            seconds = stopwatch(lambda _: [use(x) for x in itertools.islice(batches, steps)], x)
            return steps * config["batch"] / seconds

    def step(x):
        def again():
            while True:
                yield x.clone()

        facts["harvest"] = speed(drawn.batches(config["batch"], 0), lambda x: None)
        facts["train"] = speed(again(), trainer.step)
        facts["both"] = speed(drawn.batches(config["batch"], 0), trainer.step)
        facts["share"] = facts["both"] / min(facts["harvest"], facts["train"])
        return config["batch"] / facts["both"]

    return System(step, lambda: facts)


if __name__ == "__main__":
    serve(build, ("saelib", "transformer-lens"), clock=lambda step, x: step(x))
