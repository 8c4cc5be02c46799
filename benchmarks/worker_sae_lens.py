"""SAELens: `SAETrainer.step` on a `TopKTrainingSAE`, everything at its defaults but sizes and the sparse option.

Its step: forward, loss with AuxK (d / 2 dead latents), firing statistics, backward, clipping at norm 1, Adam, schedule.
Instead of keeping decoder rows at norm 1 it multiplies pre-activations by their norms. The sparse option goes without
that: its backward does not exist for sparse tensors in torch 2.13 ("Could not run 'aten::view'" on SparseCPU).
"""

from common import System, dead_latents, quieten, serve


def build(config, _):
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sparse = config.get("sparse", False)
    variant = {"use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": not sparse}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=config["d"], d_sae=config["n"], k=config["k"], **variant))
    steps = 1_000_000
    settings = SAETrainerConfig(
        total_training_samples=steps * config["batch"], train_batch_size_samples=config["batch"], lr_end=3e-5
    )
    trainer = SAETrainer(settings, sae, data_provider=iter(()))
    dead = dead_latents(config)

    def bury():
        quieten(sae.W_enc.T, dead)
        trainer.n_forward_passes_since_fired[dead] = steps

    def step(x):
        trainer.step(x)
        trainer.n_training_steps += 1

    return System(step, lambda: {"dead": int(trainer.dead_neurons.sum())}, bury)


if __name__ == "__main__":
    serve(build, ("sae-lens",))
