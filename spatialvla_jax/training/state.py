"""The whole state of training: what a checkpoint holds and the jitted step maps to its successor."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from spatialvla_jax.batch import example_inputs
from spatialvla_jax.models import SpatialVLA
from spatialvla_jax.training.optimizer import split_frozen
from spatialvla_jax.training.sharding import like_params, param_shardings


@struct.dataclass
class TrainState:
    """`opt_state` covers the trainable parameters only. Randomness is a function of the seed and `step`."""

    step: Int[Array, ""]
    params: dict[str, Any]
    opt_state: Any


def init_params(model: SpatialVLA, seed: Int[Array, ""] | int) -> dict[str, Any]:
    """Random parameters, float32."""

    def init(seed: Any) -> Any:
        return model.init(jax.random.key(seed), **example_inputs(model.config))["params"]

    return jax.jit(init)(jnp.asarray(seed, jnp.uint32))


def init_state(
    model: SpatialVLA,
    optimizer: optax.GradientTransformation,
    frozen: tuple[str, ...],
    seed: int,
    mesh: Mesh,
    params: dict[str, Any] | None = None,
) -> tuple[TrainState, TrainState]:
    """→ (state on the mesh, its shardings). Parameters are random unless given; they are made in their shards."""
    _, shardings = abstract_state(model, optimizer, frozen, mesh, params)

    def create(params: dict[str, Any]) -> TrainState:
        return new_state(params, optimizer, frozen)

    if params is None:
        random = jax.jit(lambda seed: create(init_params(model, seed)), out_shardings=shardings)
        return random(np.uint32(seed)), shardings
    # Every process holds all of them and gives its devices their parts.
    parts = jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), params, shardings.params
    )
    return jax.jit(create, out_shardings=shardings)(parts), shardings


def new_state(params: dict[str, Any], optimizer: optax.GradientTransformation, frozen: tuple[str, ...]) -> TrainState:
    trainable, _ = split_frozen(params, frozen)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trainable))


def abstract_state(
    model: SpatialVLA,
    optimizer: optax.GradientTransformation,
    frozen: tuple[str, ...],
    mesh: Mesh,
    params: dict[str, Any] | None = None,
) -> tuple[TrainState, TrainState]:
    """→ (shapes and dtypes of the state, its shardings): nothing is allocated. Those of `params` where they are given,
    as arrays or shapes."""
    params = params or jax.eval_shape(lambda: init_params(model, 0))
    state = jax.eval_shape(lambda params: new_state(params, optimizer, frozen), params)
    replicated: Any = NamedSharding(mesh, P())
    return state, TrainState(
        step=replicated,
        params=param_shardings(state.params, mesh),
        opt_state=like_params(state.opt_state, state.params, mesh),
    )
