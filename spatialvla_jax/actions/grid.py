"""The spherical action grid and its token ids (paper III-B, "Adaptive Action Grids")."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from spatialvla_jax.actions.linear import LinearGrid
from spatialvla_jax.actions.tokenizer import DIMENSIONS, ActionTokenizer
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.schema import Field, check_stored, shown

VARIABLES = ("theta", "phi", "r", "roll", "pitch", "yaw")
RANGES = ((0.0, np.pi), (-np.pi, np.pi), (0.0, 3**0.5), (-1.0, 1.0), (-1.0, 1.0), (-1.0, 1.0))


@struct.dataclass
class ActionGrid(ActionTokenizer):
    """Bin edges of the six action variables, each f32[bins + 1] and strictly increasing.

    theta in [0, pi] from the z axis, phi in [-pi, pi] around it, r in [0, sqrt 3]; roll, pitch, yaw in [-1, 1].
    A bin includes its lower edge; the last bin also includes its upper edge. An action is three ids: translation (theta
    * bins_phi + phi) * bins_r + r, then rotation likewise, then gripper (closed, open), in consecutive ranges.
    """

    theta: Float[Array, " n_theta"]
    phi: Float[Array, " n_phi"]
    r: Float[Array, " n_r"]
    roll: Float[Array, " n_roll"]
    pitch: Float[Array, " n_pitch"]
    yaw: Float[Array, " n_yaw"]

    @property
    def edges(self) -> tuple[Float[Array, " _"], ...]:
        """The six edge vectors in the order of `VARIABLES`."""
        return self.theta, self.phi, self.r, self.roll, self.pitch, self.yaw

    @property
    def num_bins(self) -> tuple[int, ...]:
        return tuple(edges.shape[-1] - 1 for edges in self.edges)

    @property
    def dimensions(self) -> tuple[str, ...]:
        return DIMENSIONS

    @property
    def kinds(self) -> tuple[str, ...]:
        return "translation", "rotation", "gripper"

    @property
    def token_ranges(self) -> tuple[tuple[int, int], ...]:
        """(first id, count) for the translation, rotation and gripper token."""
        theta, phi, r, roll, pitch, yaw = self.num_bins
        translations, rotations = theta * phi * r, roll * pitch * yaw
        return (0, translations), (translations, rotations), (translations + rotations, 2)

    @property
    def axes(self) -> tuple[tuple[tuple[int, bool], ...], ...]:
        theta, phi, r, *rotation = self.num_bins
        return ((theta, False), (phi, True), (r, False)), tuple((bins, False) for bins in rotation), ()

    def encode(self, actions: Float[Array, "*B 7"]) -> Int[Array, "*B 3"]:
        actions = actions.astype(jnp.float32)
        values = jnp.concatenate([to_spherical(actions[..., :3]), actions[..., 3:6]], -1)
        bins = [_bin_of(edges, values[..., i]) for i, edges in enumerate(self.edges)]
        _, (rotation_start, _), (gripper_start, _) = self.token_ranges
        translation = _ravel(bins[:3], self.num_bins[:3])
        rotation = _ravel(bins[3:], self.num_bins[3:])
        opened = (actions[..., 6] >= 0.5).astype(jnp.int32)
        return jnp.stack([translation, rotation_start + rotation, gripper_start + opened], -1)

    def decode(self, ids: Int[Array, "*B 3"]) -> Float[Array, "*B 7"]:
        # Clip ids outside their token's range to the nearest valid id: greedy decoding may emit anything.
        translation, rotation, gripper = (
            jnp.clip(ids[..., i] - start, 0, size - 1) for i, (start, size) in enumerate(self.token_ranges)
        )
        bins = [*jnp.unravel_index(translation, self.num_bins[:3]), *jnp.unravel_index(rotation, self.num_bins[3:])]
        theta, phi, r, *angles = (bin_centers(edges)[i] for edges, i in zip(self.edges, bins, strict=True))
        xyz = jnp.stack([r * jnp.sin(theta) * jnp.cos(phi), r * jnp.sin(theta) * jnp.sin(phi), r * jnp.cos(theta)], -1)
        return jnp.concatenate([jnp.clip(xyz, -1, 1), jnp.stack([*angles, gripper.astype(jnp.float32)], -1)], -1)


def to_spherical(xyz: Any) -> Any:
    """Cartesian f32[*B, 3], clipped to [-1, 1] → (theta, phi, r) f32[*B, 3], in the library of `xyz` (JAX or NumPy).
    Undefined angles (at the origin and the poles) are 0."""
    xp = xyz.__array_namespace__()
    x, y, z = xp.moveaxis(xp.clip(xyz, -1, 1), -1, 0)
    radius = xp.hypot(x, y)  # not a sum of squares, which would underflow for tiny actions and lose their direction
    r = xp.hypot(radius, z)
    # Zeros of both signs must give the same angle, but atan2(0, -0.0) is pi.
    theta = xp.where(r == 0, 0, xp.atan2(radius, z))
    phi = xp.where(radius == 0, 0, xp.atan2(y, x))
    return xp.stack([theta, phi, r], -1)


def bin_centers(edges: Float[Array | np.ndarray, " n"]) -> Float[Array, " bins"]:
    """The middle of each bin, to which the bin decodes."""
    edges = jnp.asarray(edges)
    return (edges[:-1] + edges[1:]) / 2


def _bin_of(edges: Float[Array, " n"], values: Float[Array, "*B"]) -> Int[Array, "*B"]:
    # Counting inner edges at or below a value beats binary search at these sizes, and cannot leave the range.
    return jnp.sum(values[..., None] >= edges[1:-1], -1, dtype=jnp.int32)


def _ravel(index: list[Int[Array, "*B"]], shape: tuple[int, ...]) -> Int[Array, "*B"]:
    i, j, k = index
    return (i * shape[1] + j) * shape[2] + k


def grid_to_dict(grid: ActionTokenizer) -> dict[str, Any]:
    """The grid as plain lists for JSON; `grid_from_dict` restores every float32 exactly."""
    kind = {name for name, cls in _KINDS.items() if isinstance(grid, cls)}.pop()
    return {"kind": kind, **{name: np.asarray(edges).tolist() for name, edges in vars(grid).items()}}


def grid_from_dict(data: Any, where: str = "") -> ActionGrid | LinearGrid:
    """The inverse of `grid_to_dict`.

    Raises InputError for an unknown kind and for edges that are missing, not finite, not increasing (as float32) or
    outside their variable's range. `where` prefixes the field's name in the message.
    """
    kind = check_stored(data, {"kind": Field("", "", choices=tuple(_KINDS))}, where)["kind"]
    spherical: dict[str, tuple[float, float]] = dict(zip(VARIABLES, RANGES, strict=True))
    ranges = spherical if kind == "spherical" else {"levels": (-1.0, 1.0)}
    lists = check_stored(data, dict.fromkeys(ranges, Field([], "", items=Field(0.0, ""))), where)
    arrays = {name: np.asarray(edges, np.float32) for name, edges in lists.items()}
    for name, edges in arrays.items():
        if len(edges) < 2 or not np.all(np.diff(edges) > 0):
            raise InputError(f"{where}{name}={shown(lists[name])} must be at least two increasing numbers")
        low, high = ranges[name]
        if edges[0] < low - 1e-5 or edges[-1] > high + 1e-5:  # float32 has no pi
            raise InputError(f"{where}{name}={shown(lists[name])} leaves the range of {name}, {low:.7g} to {high:.7g}")
    return _KINDS[kind](**{name: jnp.asarray(edges) for name, edges in arrays.items()})


_KINDS = {"spherical": ActionGrid, "linear": LinearGrid}
