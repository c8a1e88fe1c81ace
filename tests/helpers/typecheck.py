"""The type checker of jaxtyping's import hook: beartype, extended by what JAX accepts in place of an array."""

import functools
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeCallHintViolation
from jax.sharding import PartitionSpec, Sharding

ABSTRACT = (jax.ShapeDtypeStruct, Sharding, PartitionSpec)
JAX = str(Path(jax.__file__).parent)


def check(function: Callable) -> Callable:
    """`function` with its annotations checked at every call. An int may stand for a float, as everywhere in Python, and
    a NumPy array for a JAX array of the same shape, as in JAX's own functions.

    Two kinds of calls are exempt: those with abstract values or shardings among their arguments, and JAX's own to the
    constructor of a struct, whose leaves are then anything (tree_map) or parts of arrays (vmap).
    """
    checked = beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
    first = int(function.__name__ == "__init__")  # `self` has no fields yet

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return checked(*args, **kwargs)
        except BeartypeCallHintViolation:
            leaves, structure = jax.tree.flatten((args[first:], kwargs))
            if any(isinstance(leaf, ABSTRACT) for leaf in leaves) or (first and called_by_jax()):
                return function(*args, **kwargs)
            moved = [jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves]
            rest, kwargs = structure.unflatten(moved)
            with suppress(BeartypeCallHintViolation):
                return checked(*args[:first], *rest, **kwargs)
            raise

    return call


def called_by_jax() -> bool:
    """Whether JAX called the checked function; jaxtyping's frames lie in between."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_filename.endswith("jaxtyping/_decorator.py"):
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(JAX)
