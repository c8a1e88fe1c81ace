"""LoRA with the published recipe, on your own dataset.

Rank 32 and alpha 32 on every linear layer of Gemma 2, SigLIP, projector and Ego3D; linear decay from 5e-4 after a 0.5 %
warm-up. The action grid is fitted to the new data (min_sigma 0), the spatial table adapted to it and trained in full.
Everything else, including the LM head, stays as in the checkpoint.

    spatialvla-jax train --config lora --workdir DIR --config.init=CHECKPOINT \\
        --config.data.datasets="[{'name': 'mine', 'spec': 'libero', 'path': 'DIR/1.0.0'}]"

`init` is a SpatialVLA in any format that `load_pretrained` reads. It must stay where it is, because the run stores only
adapters. Its weights keep their stored dtype: bfloat16 as published; `convert --dtype` changes it. Without spatial
embedding adaption the release does not train the spatial table either: --config.grid.kind=checkpoint
--config.optimizer.frozen="('zoe', 'spatial_embedding')". It used 4-8 A100 and 200 epochs on LIBERO: set `train.steps`.
"""

from spatialvla_jax.config import default_config


def get_config():
    config = default_config()
    config.lora.update(rank=32, alpha=32.0)
    config.adapt.embedding = True
    config.grid.min_sigma = 0.0
    config.optimizer.learning_rate = 5e-4
    config.train.update(steps=20_000, batch_size=128, eval_every=1_000)
    config.checkpoint.update(every=1_000)
    return config
