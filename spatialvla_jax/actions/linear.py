"""The baseline tokenizer: each action dimension on the same evenly spaced levels (as in RT-2 and OpenVLA)."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from spatialvla_jax.actions.tokenizer import DIMENSIONS, ActionTokenizer
from spatialvla_jax.errors import InputError


@struct.dataclass
class LinearGrid(ActionTokenizer):
    """`levels` f32[bins] rises from -1 to 1 and serves all seven dimensions: 7 ids per action from one vocabulary."""

    levels: Float[Array, " bins"]

    @property
    def dimensions(self) -> tuple[str, ...]:
        return DIMENSIONS

    @property
    def kinds(self) -> tuple[str, ...]:
        return *("translation",) * 3, *("rotation",) * 3, "gripper"

    @property
    def token_ranges(self) -> tuple[tuple[int, int], ...]:
        return ((0, self.levels.shape[-1]),) * self.action_dim

    @property
    def axes(self) -> tuple[tuple[tuple[int, bool], ...], ...]:
        return *(((self.levels.shape[-1], False),),) * 6, ()  # the gripper is only open or closed

    def encode(self, actions: Float[Array, "*B 7"]) -> Int[Array, "*B 7"]:
        # Rounds up to the next level, as the published baseline does, so the error is up to a whole step, not half.
        # Clipping to the levels keeps every id in range.
        values = jnp.clip(actions.astype(jnp.float32), self.levels[0], self.levels[-1])
        return jnp.searchsorted(self.levels, values, side="left").astype(jnp.int32)

    def decode(self, ids: Int[Array, "*B 7"]) -> Float[Array, "*B 7"]:
        return self.levels[jnp.clip(ids, 0, self.vocab_size - 1)]


def linear_grid(bins: int = 256) -> LinearGrid:
    """`bins` levels from -1 to 1. Raises InputError for fewer than two."""
    if bins < 2:
        raise InputError(f"A linear grid needs at least 2 bins, not {bins}.")
    return LinearGrid(jnp.linspace(-1, 1, bins, dtype=jnp.float32))
