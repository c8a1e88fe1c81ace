"""AdamW with linear warm-up and decay, clipping, and freezing by path pattern."""

import re
from typing import Any

import optax
from flax.traverse_util import flatten_dict, unflatten_dict

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


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW, on the trainable parameters."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config, steps), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
        ),
    )


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
