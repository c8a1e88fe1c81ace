"""Full fine-tuning with the published recipe, on your own dataset.

Linear decay from 2e-5 after a 0.5 % warm-up; text embeddings and depth model are frozen. The action grid is fitted to
the new data (min_sigma 0), and the spatial table adapted to it. Without adaption: --config.grid.kind=checkpoint.

    spatialvla-jax train --config finetune --workdir DIR --config.init=CHECKPOINT \\
        --config.data.datasets="[{'name': 'mine', 'spec': 'libero', 'path': 'DIR/1.0.0'}]"

`init` is any checkpoint that `load_pretrained` reads. The release states 8 GPUs but no length: set `train.steps`.
"""

from spatialvla_jax.config import default_config


def get_config():
    config = default_config()
    config.adapt.embedding = True
    config.grid.min_sigma = 0.0
    config.train.update(steps=20_000, batch_size=128, eval_every=1_000)
    config.checkpoint.update(every=1_000)
    return config
