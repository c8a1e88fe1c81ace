"""Training setups of the nano model."""

from typing import Any

import optax
from jax.sharding import Mesh

from helpers.batches import GRID
from spatialvla_jax.config import default_config
from spatialvla_jax.training.optimizer import AdamW, make_optimizer
from spatialvla_jax.training.setup import TrainSetup, make_setup

FROZEN = ("llm/embedder",)


def setup_of(mesh: Mesh | None = None, *, augment: bool = False, train: dict[str, int], **optimizer: Any) -> TrainSetup:
    """Uses GRID; `train` and `optimizer` change those parts of the config."""
    config = default_config()
    config.model.update(preset="nano", depth_source="dataset", dtype="float32", remat="none")
    config.data.prompt.length = 32
    config.augment.enabled = augment
    config.optimizer.update(frozen=FROZEN, **optimizer)
    config.train.update(batch_size=8, **train)
    return make_setup(config, GRID, mesh, num_datasets=3)


def adamw(steps: int, **changes: Any) -> AdamW:
    return setup_of(train={"steps": steps}, **changes).adamw


def optimizer_of(steps: int, **changes: Any) -> optax.GradientTransformation:
    hyperparameters = adamw(steps, **changes)
    return make_optimizer(hyperparameters, hyperparameters.schedule)
