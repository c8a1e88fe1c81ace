"""What a config means on a mesh: the model, the optimizer and the jitted training step with the places of all that goes
in and out. The training loop runs this step, `training/topology.py` compiles it ahead of time: there is one."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from spatialvla_jax.models import SpatialVLA, preset
from spatialvla_jax.models.lora import ADAPTERS, init_adapters
from spatialvla_jax.training.augment import Augmentation
from spatialvla_jax.training.optimizer import learning_rate, make_optimizer, merge, split_frozen
from spatialvla_jax.training.sharding import BATCH, on_mesh
from spatialvla_jax.training.state import TrainState, init_params
from spatialvla_jax.training.step import make_train_step

# Weights are gathered whole, as latency hiding can then do ahead of their use. By default the compiler sends large ones
# around the ring in parts, each followed by its part of the product.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}


def make_model(config: ConfigDict, grid: Any, text_vocab: int = 0) -> SpatialVLA:
    """The model that the config names, its vocabulary fitted to the grid and to a tokenizer of `text_vocab` tokens."""
    fields = {k: v for k, v in config.model.to_dict().items() if k != "preset"}
    return SpatialVLA(
        preset(
            config.model.preset,
            text_vocab=max(preset(config.model.preset).text_vocab, text_vocab),
            spatial_tokens=grid.vocab_size,
            tokens_per_action=grid.tokens_per_action,
            prompt_length=config.data.prompt.length,
            **fields,
        )
    )


def frozen_patterns(config: ConfigDict, model: SpatialVLA) -> tuple[str, ...]:
    """The config's patterns, less the depth model's where this model has none; with adapters, whatever is none and not
    the spatial table, too."""
    has_zoe = model.config.depth_source == "zoedepth"
    patterns = tuple(p for p in config.optimizer.frozen if p != "zoe" or has_zoe)
    return (r"(?!lora/|spatial_embedding$)", *patterns) if config.lora.rank else patterns


def lora_targets(config: ConfigDict, model: SpatialVLA) -> tuple[str, ...]:
    """The config's patterns, less Ego3D's where this model has none."""
    return tuple(p for p in config.lora.targets if p != "ego3d" or model.config.depth_source != "none")


def lora_scale(config: ConfigDict) -> float:
    return config.lora.alpha / config.lora.rank if config.lora.rank else 0.0


def abstract_params(config: ConfigDict, model: SpatialVLA) -> dict[str, Any]:
    """Shapes and dtypes of all parameters. What adapters are added to is taken to be stored as it is computed with."""
    params = jax.eval_shape(lambda: init_params(model, 0))
    if not config.lora.rank:
        return params
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    targets, frozen = lora_targets(config, model), frozen_patterns(config, model)
    adapters = jax.eval_shape(lambda: init_adapters(shapes, config.lora.rank, targets, jax.random.key(0)))
    trainable, fixed = split_frozen(params, frozen)
    fixed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(model.config.dtype)), fixed)
    return merge(trainable, fixed) | {ADAPTERS: adapters}


def augmentation_of(config: ConfigDict) -> Augmentation | None:
    fields = config.augment.to_dict()
    return Augmentation(**fields) if fields.pop("enabled") else None


def jit_train_step(
    config: ConfigDict, model: SpatialVLA, mesh: Mesh, shardings: TrainState, num_datasets: int = 0
) -> Any:
    """→ jitted `step(state, batch, grid, seed) -> (state, metrics)`: the state in `shardings`, donated; batch split."""
    step = make_train_step(
        model,
        make_optimizer(config.optimizer, config.train.steps),
        schedule=learning_rate(config.optimizer, config.train.steps),
        frozen=frozen_patterns(config, model),
        augmentation=augmentation_of(config),
        grad_accum_steps=config.train.grad_accum_steps,
        num_datasets=num_datasets,
        lora_scale=lora_scale(config),
    )
    replicated = NamedSharding(mesh, P())
    return jax.jit(
        on_mesh(step, mesh),
        in_shardings=(shardings, NamedSharding(mesh, BATCH), replicated, replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None,
    )
