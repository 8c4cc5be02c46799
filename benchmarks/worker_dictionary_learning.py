"""dictionary_learning: `TopKTrainer.update`, everything at its defaults.

Its step: forward, loss with AuxK (d / 2 dead latents), backward, projection of the decoder's gradient, clipping at
norm 1, Adam and its schedule, unit norm of the decoder. Step 0, which finds the geometric median, is in the warm-up.
"""

from itertools import count

from common import System, dead_latents, quieten, serve


def build(config, _):
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=1_000_000,
        activation_dim=config["d"],
        dict_size=config["n"],
        k=config["k"],
        layer=0,
        lm_name="none",
        seed=0,
        device="cpu",
    )
    dead, number = dead_latents(config), count()

    def bury():
        quieten(trainer.ae.encoder.weight, dead)
        trainer.num_tokens_since_fired[dead] = 2 * trainer.dead_feature_threshold

    return System(
        lambda x: trainer.update(next(number), x),
        lambda: {"dead": int((trainer.num_tokens_since_fired >= trainer.dead_feature_threshold).sum())},
        bury,
    )


if __name__ == "__main__":
    serve(build, ("dictionary-learning",))
