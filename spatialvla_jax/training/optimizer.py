"""AdamW with linear warm-up and decay, gradient clipping, freezing by path pattern, and a parameter average (EMA)."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, Integer

from spatialvla_jax.errors import InputError
from spatialvla_jax.models import Params


class Schedule(NamedTuple):
    """The learning rate: linear from 0 to `peak` over `warmup` updates, then linear to 0 after `steps` updates. It
    is a PyTree of numbers, so a jitted step can take it as an argument."""

    peak: Float[Array, ""] | np.float32
    warmup: Int[Array, ""] | np.int32  # at least 1
    steps: Int[Array, ""] | np.int32

    def __call__(self, count: Integer[Array, ""] | int) -> Float[Array, ""]:
        """The rate after `count` updates."""
        down = (self.steps - count) / jnp.maximum(1, self.steps - self.warmup)
        return self.peak * jnp.maximum(0, jnp.minimum(count / self.warmup, down))


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Hyperparameters for a run of `steps` updates. `mu_dtype` applies to the first moment. The second moment stays
    float32: at b2 = 0.999 it changes by a thousandth per step, less than bfloat16 resolves."""

    steps: int
    learning_rate: float
    warmup: float  # fraction of all steps
    b1: float
    b2: float
    eps: float
    weight_decay: float
    grad_clip_norm: float
    mu_dtype: str
    ema: float  # decay of the parameter average; 0: no average

    @property
    def schedule(self) -> Schedule:
        """The learning rate of this run. The warm-up takes at least one update."""
        warmup = max(1, round(self.warmup * self.steps))
        return Schedule(np.float32(self.learning_rate), np.int32(warmup), np.int32(self.steps))


class EmaState(NamedTuple):
    params: Params


def params_ema(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the updated parameters; leaves the updates unchanged."""

    def update(updates: Any, state: EmaState, params: Any) -> tuple[Any, EmaState]:
        new: Any = optax.apply_updates(params, updates)
        return updates, EmaState(jax.tree.map(lambda a, x: decay * a + (1 - decay) * x, state.params, new))

    return optax.GradientTransformation(lambda params: EmaState(jax.tree.map(jnp.copy, params)), update)  # pyright: ignore[reportArgumentType]


def make_optimizer(adamw: AdamW, schedule: Schedule) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW, on the trainable parameters; with `ema`, also their average. `schedule` is
    `adamw.schedule`, or the argument of a jitted function that stands for it."""
    return optax.chain(
        optax.clip_by_global_norm(adamw.grad_clip_norm),
        optax.adamw(
            schedule,
            b1=adamw.b1,
            b2=adamw.b2,
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
            mu_dtype=adamw.mu_dtype,
        ),
        *([params_ema(adamw.ema)] if adamw.ema else []),
    )


def update_if_finite(
    optimizer: optax.GradientTransformation,
    grads: Params,
    opt_state: optax.OptState,
    params: Params,
    *,
    loss: Float[Array, ""],
    gradient_norm: Float[Array, ""],
) -> tuple[Params, optax.OptState]:
    """→ (parameters, optimizer state) after an update, or unchanged if loss or gradient norm is not finite.

    `optax.apply_if_finite` is not enough. It only checks gradients, not the loss. If the norm of finite gradients
    overflows, it applies the update that clipping has made zero. And after several bad steps it applies the next.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    updates, new_state = optimizer.update(grads, opt_state, params)
    new: Any = (optax.apply_updates(params, updates), new_state)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (params, opt_state))


def adam_state(opt_state: optax.OptState) -> optax.ScaleByAdamState:
    return optax.tree_utils.tree_get(opt_state, "ScaleByAdamState")


def num_updates(opt_state: optax.OptState) -> Int[Array, ""]:
    """The number of updates: all steps so far except skipped ones."""
    return jnp.asarray(adam_state(opt_state).count)


def update_norms(
    adamw: AdamW, schedule: Schedule, params: Params, opt_state: optax.OptState
) -> dict[str, Float[Array, ""]]:
    """Norms of the last update, in total and per part of the model, recomputed from the resulting state. Steps that
    don't report them therefore don't compute them.

    `params` are the trainable parameters after that update, `opt_state` belongs to `make_optimizer`.
    """
    adam = adam_state(opt_state)
    rate = schedule(jnp.asarray(adam.count) - 1)

    def update(p: Array, mu: Array, nu: Array) -> Array:
        mean = mu.astype(jnp.float32) / (1 - adamw.b1**adam.count)
        direction = mean / (jnp.sqrt(nu / (1 - adamw.b2**adam.count)) + adamw.eps)
        before = (p + rate * direction) / (1 - rate * adamw.weight_decay)
        return rate * (direction + adamw.weight_decay * before)

    return part_norms(jax.tree.map(update, params, adam.mu, adam.nu), "update_norm")


def part_norms(tree: Params, name: str) -> dict[str, Float[Array, ""]]:
    """{name: norm of the tree, name/part: norm of each top-level part}."""
    parts = {part: optax.global_norm(value) for part, value in tree.items()}
    whole = jnp.sqrt(jnp.sum(jnp.stack([norm**2 for norm in parts.values()])))
    return {name: whole} | {f"{name}/{part}": norm for part, norm in parts.items()}


def swap_ema(params: Params, opt_state: optax.OptState) -> tuple[Params, optax.OptState]:
    """Swap trained and averaged parameters between `params` and `opt_state`. It is its own inverse, and does nothing if
    there is no average."""
    ema = optax.tree_utils.tree_get(opt_state, "EmaState")
    if ema is None:
        return params, opt_state
    trained, averaged = flatten_dict(params, sep="/"), flatten_dict(ema.params, sep="/")
    kept = EmaState(unflatten_dict({k: trained[k] for k in averaged}, sep="/"))
    is_ema = lambda x: isinstance(x, EmaState)  # noqa: E731
    swapped = jax.tree.map(lambda x: kept if is_ema(x) else x, opt_state, is_leaf=is_ema)
    return unflatten_dict({**trained, **averaged}, sep="/"), swapped


def split_frozen(params: Params, patterns: tuple[str, ...]) -> tuple[Params, Params]:
    """→ (trainable, frozen): a parameter is frozen if a pattern matches the start of its path.

    Raises InputError for a pattern that matches nothing: it is probably a typo.
    """
    flat = flatten_dict(params, sep="/")
    frozen = {k for k in flat if any(re.match(p, k) for p in patterns)}
    for pattern in patterns:
        if not any(re.match(pattern, k) for k in flat):
            raise InputError(f"optimizer.frozen pattern {pattern!r} matches no parameter")
    pick = lambda keys: unflatten_dict({k: flat[k] for k in flat if k in keys}, sep="/")  # noqa: E731
    return pick(set(flat) - frozen), pick(frozen)


def merge(trainable: Params, frozen: Params) -> Params:
    """Inverse of `split_frozen`."""
    return unflatten_dict({**flatten_dict(trainable, sep="/"), **flatten_dict(frozen, sep="/")}, sep="/")
