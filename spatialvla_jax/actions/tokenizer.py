"""What every action tokenizer offers; encoding and decoding with any of them."""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DIMENSIONS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")  # of the catalogue's datasets and of both grids


@runtime_checkable
class ActionTokenizer(Protocol):
    """Actions of A numbers as n tokens each and back. An instance is a pytree of arrays, an argument of jitted
    functions; what is not an array follows from their shapes alone."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The A names of an action's dimensions. The last is the gripper, 0 closed to 1 open."""
        ...

    @property
    def token_ranges(self) -> tuple[tuple[int, int], ...]:
        """(first id, number of ids) of each of an action's n tokens."""
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each of the n tokens encodes. Accuracies are reported for each kind."""
        ...

    def encode(self, actions: Float[Array, "*B A"]) -> Int[Array, "*B n"]: ...

    def decode(self, ids: Int[Array, "*B n"]) -> Float[Array, "*B A"]: ...

    @property
    def action_dim(self) -> int:
        return len(self.dimensions)

    @property
    def tokens_per_action(self) -> int:
        return len(self.token_ranges)

    @property
    def vocab_size(self) -> int:
        return max(start + size for start, size in self.token_ranges)


@jax.jit
def encode(grid: ActionTokenizer, actions: Float[Array, "*B A"]) -> Int[Array, "*B n"]:
    """Normalised actions, such as [x, y, z, roll, pitch, yaw, gripper] → ids in [0, grid.vocab_size), i32.

    Values are bounded to [-1, 1] first, so every finite action has valid ids; NaN is the caller's to refuse.
    The gripper is open from 0.5 on. The gradient with respect to the actions is zero.
    """
    return grid.encode(jnp.asarray(actions))


@jax.jit
def decode(grid: ActionTokenizer, ids: Int[Array, "*B n"]) -> Float[Array, "*B A"]:
    """Ids → the actions at the bins' centres, f32, x, y, z bounded to [-1, 1], gripper 0 closed or 1 open.

    An id outside its token's range decodes as the nearest id inside. Encoding the result gives the ids back wherever
    the centre lies in the cube [-1, 1]^3; a centre outside, which takes r > 1, is moved and may change its bin.
    """
    return grid.decode(jnp.asarray(ids))
