"""Our training step: `saelib.train.Trainer.step` with the paper's recipe, gradient clipping and the weight average."""

from math import log2

from common import System, dead_latents, quieten, serve


def build(config, sample):
    from saelib import profile, train

    k_aux = 2 ** round(log2(config["d"] / 2))
    recipe = profile.Recipe(
        n_latents=config["n"], k=config["k"], batch=config["batch"], clip=1.0, ema=0.999, k_aux=k_aux,
        precision=config.get("precision", "float32"),
    )  # fmt: skip
    trainer = train.Trainer(recipe, config["d"], seed=0, sample=sample)
    dead = dead_latents(config)

    def bury():
        quieten(trainer.sae.W_enc, dead)
        trainer.since_fired[dead] = 2 * recipe.dead_after

    return System(trainer.step, lambda: {"dead": int(trainer.dead.sum())}, bury)


if __name__ == "__main__":
    serve(build, ("saelib",))
