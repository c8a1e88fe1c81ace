"""The interface of action tokenizers, and `encode` and `decode` for any of them."""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DIMENSIONS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")  # of catalogue datasets and of both grids


@runtime_checkable
class ActionTokenizer(Protocol):
    """Maps actions of A numbers to n tokens each and back. An instance is a pytree of arrays, passed to jitted
    functions; everything static follows from the arrays' shapes."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The A names of an action's dimensions. The last is the gripper, 0 closed to 1 open."""
        ...

    @property
    def token_ranges(self) -> tuple[tuple[int, int], ...]:
        """(first id, number of ids) for each of an action's n tokens."""
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each of the n tokens encodes. Accuracies are reported for each kind."""
        ...

    @property
    def axes(self) -> tuple[tuple[tuple[int, bool], ...], ...]:
        """How the ids of each of the n tokens lie in space: (cells, whether the last is next to the first) along each
        axis, the last axis varying fastest; () for ids without neighbours."""
        return ((),) * len(self.token_ranges)

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
    """Normalised actions f[*B, A], such as [x, y, z, roll, pitch, yaw, gripper] → i32[*B, n] in [0, grid.vocab_size).

    Values are clipped to [-1, 1] first, so every finite action has valid ids; callers must reject NaN. A gripper of 0.5
    or more is open. The gradient with respect to the actions is zero.
    """
    return grid.encode(jnp.asarray(actions))


@jax.jit
def decode(grid: ActionTokenizer, ids: Int[Array, "*B n"]) -> Float[Array, "*B A"]:
    """Ids i32[*B, n] → f32[*B, A] actions at the bin centres: x, y, z clipped to [-1, 1], gripper 0 closed or 1 open.

    An id outside its token's range decodes as the nearest valid id. Re-encoding gives the same ids if the centre lies
    in the cube [-1, 1]^3. A centre outside, which needs r > 1, is clipped and may land in another bin.
    """
    return grid.decode(jnp.asarray(ids))
