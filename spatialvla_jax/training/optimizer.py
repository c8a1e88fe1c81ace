"""AdamW with linear warm-up and decay, clipping, freezing by path pattern, and averaged parameters."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from spatialvla_jax.errors import InputError

Params = dict[str, Any]


def learning_rate(config: Any, steps: int) -> optax.Schedule:
    """Linear from 0 to `peak` over `warmup` (a fraction of all steps), then linear to 0 at the last step."""
    warmup = max(1, round(config.warmup * steps))
    return optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(0.0, config.learning_rate, warmup),
            optax.schedules.linear_schedule(config.learning_rate, 0.0, max(1, steps - warmup)),
        ],
        [warmup],
    )


class EmaState(NamedTuple):
    params: Params


def params_ema(decay: float) -> optax.GradientTransformation:
    """Leaves the updates alone and keeps an exponential moving average of the parameters that they lead to."""

    def update(updates: Any, state: EmaState, params: Any) -> tuple[Any, EmaState]:
        new: Any = optax.apply_updates(params, updates)
        return updates, EmaState(jax.tree.map(lambda a, x: decay * a + (1 - decay) * x, state.params, new))

    return optax.GradientTransformation(lambda params: EmaState(jax.tree.map(jnp.copy, params)), update)  # pyright: ignore[reportArgumentType]


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW, on the trainable parameters; with `ema`, their average.

    `mu_dtype` is the first moment's. The second stays in float32: at b2 = 0.999 it changes by a thousandth a step,
    less than bfloat16 resolves.
    """
    if config.mu_dtype not in ("float32", "bfloat16"):
        raise InputError(f"optimizer.mu_dtype {config.mu_dtype!r} must be float32 or bfloat16")
    if not 0 <= config.ema < 1:
        raise InputError(f"optimizer.ema {config.ema} must be a decay in [0, 1), 0 for none")
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mu_dtype=config.mu_dtype,
        ),
        *([params_ema(config.ema)] if config.ema else []),
    )


def num_updates(opt_state: Any) -> Int[Array, ""]:
    """How often the parameters were updated: the steps so far less those that were skipped."""
    return opt_state[1][0].count


def update_norms(config: Any, steps: int, params: Params, opt_state: Any) -> dict[str, Float[Array, ""]]:
    """Norms of the last update, all and by part of the model, made again from the state that it left behind: a step
    that need not report them does not write them either.

    `params` are the trainable ones after that update, `opt_state` is of `make_optimizer`.
    """
    adam = opt_state[1][0]
    rate = learning_rate(config, steps)(adam.count - 1)

    def update(p: Array, mu: Array, nu: Array) -> Array:
        mean = mu.astype(jnp.float32) / (1 - config.b1**adam.count)
        direction = mean / (jnp.sqrt(nu / (1 - config.b2**adam.count)) + config.eps)
        before = (p + rate * direction) / (1 - rate * config.weight_decay)
        return rate * (direction + config.weight_decay * before)

    return part_norms(jax.tree.map(update, params, adam.mu, adam.nu), "update_norm")


def part_norms(tree: Params, name: str) -> dict[str, Float[Array, ""]]:
    """{name: norm of the tree, name/part: that of each of its top-level parts}."""
    parts = {part: optax.global_norm(value) for part, value in tree.items()}
    whole = jnp.sqrt(jnp.sum(jnp.stack([norm**2 for norm in parts.values()])))
    return {name: whole} | {f"{name}/{part}": norm for part, norm in parts.items()}


def swap_ema(params: Params, opt_state: Any) -> tuple[Params, Any]:
    """The averaged parameters in the place of the trained ones and these in theirs; its own inverse, and nothing where
    no average is kept."""
    if not isinstance(opt_state[-1], EmaState):
        return params, opt_state
    trained, averaged = flatten_dict(params, sep="/"), flatten_dict(opt_state[-1].params, sep="/")
    kept = unflatten_dict({k: trained[k] for k in averaged}, sep="/")
    return unflatten_dict({**trained, **averaged}, sep="/"), (*opt_state[:-1], EmaState(kept))


def split_frozen(params: Params, patterns: tuple[str, ...]) -> tuple[Params, Params]:
    """→ (trainable, frozen): a parameter is frozen when a pattern matches the start of its path.

    Raises InputError for a pattern that matches nothing, for it is surely a typing error.
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
