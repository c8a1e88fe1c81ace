"""The complete training state: saved by checkpoints, and updated by the jitted step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Int, Integer

from spatialvla_jax.batch import example_inputs
from spatialvla_jax.models import Params, SpatialVLA
from spatialvla_jax.models.lora import ADAPTERS, init_adapters
from spatialvla_jax.training.losses import new_head
from spatialvla_jax.training.optimizer import make_optimizer, merge, split_frozen
from spatialvla_jax.training.setup import TrainSetup
from spatialvla_jax.training.sharding import like_params


@struct.dataclass
class TrainState:
    """`opt_state` covers only the trainable parameters. Randomness is a function of the seed and `step`."""

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState


def init_params(model: SpatialVLA, seed: Integer[Array, ""] | int) -> Params:
    """Random parameters, float32."""
    return _init(model, jnp.asarray(seed, jnp.uint32))


@functools.partial(jax.jit, static_argnums=0)  # traced once, for shapes and for values
def _init(model: SpatialVLA, seed: Integer[Array, ""]) -> Any:
    return model.init(jax.random.key(seed), **example_inputs(model.config))["params"]


def abstract_params(setup: TrainSetup) -> Params:
    """Shapes and dtypes of all parameters. With adapters, frozen ones are assumed to be stored in the model's dtype."""
    params = jax.eval_shape(lambda: init_params(setup.model, 0) | new_head(setup.loss, setup.model.config))
    if setup.adapters is None:
        return params
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    rank, targets = setup.adapters.rank, setup.adapters.targets
    adapters = jax.eval_shape(lambda: init_adapters(shapes, rank, targets, jax.random.key(0)))
    trainable, fixed = split_frozen(params, setup.frozen)
    fixed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(setup.model.config.dtype)), fixed)
    return merge(trainable, fixed) | {ADAPTERS: adapters}


def new_state(setup: TrainSetup, params: Params) -> TrainState:
    trainable, _ = split_frozen(params, setup.frozen)
    optimizer = make_optimizer(setup.adamw, setup.adamw.schedule)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trainable))


def abstract_state(setup: TrainSetup, params: Params | None = None) -> tuple[TrainState, TrainState]:
    """→ (shapes and dtypes of the state, its shardings) without allocating it. Uses `params` if given, as arrays or
    shapes."""
    assert setup.mesh is not None
    state = jax.eval_shape(lambda params: new_state(setup, params), params or abstract_params(setup))
    return state, like_params(state, state.params, setup.mesh)


def init_state(setup: TrainSetup, params: Params | None = None) -> tuple[TrainState, TrainState]:
    """→ (state on the mesh, its shardings). Parameters are random unless given, and are created in shards."""
    _, shardings = abstract_state(setup, params)
    if params is None:
        head = new_head(setup.loss, setup.model.config)
        random = jax.jit(lambda seed: new_state(setup, init_params(setup.model, seed) | head), out_shardings=shardings)
        return random(np.uint32(setup.seed)), shardings
    # Every process holds all parameters and gives each of its devices a part.
    parts = jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), params, shardings.params
    )
    return jax.jit(lambda params: new_state(setup, params), out_shardings=shardings)(parts), shardings
