"""The parts of the training loss that a config may add to the plain cross-entropy."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spatialvla_jax.actions import ActionTokenizer
from spatialvla_jax.models import Params, SpatialVLAConfig
from spatialvla_jax.models.spatialvla import TARGET_HEAD
from spatialvla_jax.text import EOS


@dataclass(frozen=True)
class Loss:
    """`soft_sigma`: standard deviation, in cells, of the targets around the true cell; 0 for only the true cell.

    `target`: what else to learn, see `target_error`. "pixels" or "metres": where the task's object is. "reach": also
    where it is relative to the hand, and how far the fingers are open. "none": nothing.
    """

    soft_sigma: float = 0.0
    target: str = "none"
    target_weight: float = 1.0

    @property
    def recorded(self) -> tuple[str, ...]:
        """The fields of `Batch` that it needs, which only recordings have."""
        return {"none": (), "reach": ("target", "hand")}.get(self.target, ("target",))


PLAIN = Loss()
FAR = 1e9  # cells


def soft_cross_entropy(
    logits: Float[Array, "B L V"], ids: Int[Array, "B T n"], grid: ActionTokenizer, offset: int, sigma: float
) -> Float[Array, "B L"]:
    """Cross-entropy of each action token with a Gaussian over the cells of its kind, and of `<eos>` with itself.

    The Gaussian is centred on the true cell, and `sigma` and distances are in cells along each axis of the grid. It is
    normalised over the cells that exist. Ids without neighbours, such as the gripper's, are their own target. `offset`
    is the first action token's. L is T·n + 1.
    """
    _, L, V = logits.shape
    coordinates, rings = cell_coordinates(grid)
    actions = np.s_[:, :-1, offset : offset + grid.vocab_size]

    def targets(ids: Int[Array, "B T n"]) -> Float[Array, "B A V"]:
        squared = 0.0
        for place, ring in zip(coordinates, rings, strict=True):
            true = jnp.asarray(place)[np.arange(len(place)), ids]
            distance = jnp.abs(place - true[..., None])
            squared += jnp.minimum(distance, jnp.abs(ring[:, None] - distance)) ** 2
        weights = jnp.exp(-0.5 / sigma**2 * squared)
        return (weights / weights.sum(axis=-1, keepdims=True)).reshape(len(ids), -1, grid.vocab_size)

    # The gradient is written out as one sum. JAX would store the targets for it, and add one array of the vocabulary's
    # size after another.
    @jax.custom_vjp
    def loss(logits: Float[Array, "B L V"], ids: Int[Array, "B T n"]) -> Float[Array, "B L"]:
        return forward(logits, ids)[0]

    def forward(logits: Any, ids: Any) -> Any:
        log_z = jax.nn.logsumexp(logits, axis=-1)
        wanted = (targets(ids) * logits[actions]).sum(axis=-1)
        return log_z - jnp.append(wanted, logits[:, -1:, EOS], axis=1), (logits, ids, log_z)

    def backward(kept: Any, g: Any) -> Any:
        logits, ids, log_z = kept
        eos = (jnp.arange(L)[:, None] == L - 1) & (jnp.arange(V) == EOS)
        others = ((0, 0), (0, 1), (offset, V - offset - grid.vocab_size))
        return (jnp.exp(logits - log_z[..., None]) - jnp.pad(targets(ids), others) - eos) * g[..., None], None

    loss.defvjp(forward, backward)
    return loss(logits, ids)


def cell_coordinates(grid: ActionTokenizer) -> tuple[Float[np.ndarray, "3 n V"], Float[np.ndarray, "3 n"]]:
    """For each kind of token: where every id lies along up to three axes, in cells, and how many cells go around each
    axis. That number is infinite for axes that are not rings. Ids of other kinds, and ids without neighbours, are far
    away."""
    n = len(grid.token_ranges)
    places, rings = np.zeros((3, n, grid.vocab_size), np.float32), np.full((3, n), np.inf, np.float32)
    places[0] = -FAR
    for kind, (axes, (start, size)) in enumerate(zip(grid.axes, grid.token_ranges, strict=True)):
        indices = np.unravel_index(np.arange(size), tuple(bins for bins, _ in axes) or (size,))
        for axis, index in enumerate(indices):
            places[axis, kind, start : start + size] = index if axes else FAR * index
        rings[: len(axes), kind] = [bins if ring else np.inf for bins, ring in axes]
    return places, rings


def new_head(loss: Loss, config: SpatialVLAConfig) -> Params:
    """{TARGET_HEAD: zeros} if the loss needs it: the only parameters that a policy does not have."""
    size = {"none": 0, "pixels": 2, "metres": 3, "reach": 7}[loss.target]
    return {TARGET_HEAD: {"kernel": jnp.zeros((config.llm.width, size)), "bias": jnp.zeros(size)}} if size else {}


def target_error(
    loss: Loss,
    head: Params,
    state: Float[Array, "B D"],
    target: Float[Array, "B 3"],
    hand: Float[Array, "B 4"] | None,
    intrinsics: Float[Array, "B 3 3"],
    image_size: int,
) -> Float[Array, " B"]:
    """Mean absolute error of a linear map to where the task's object is: metres in the camera's frame, as Ego3D's
    points are, or sides of the image from its upper left corner. For "reach", the map also predicts the vector from the
    hand to the object and how far the fingers are open, in metres. It reads the language model's `state` after the
    prompt, divided by sqrt(D).

    `intrinsics` are those of the image after its crop. The object may lie outside the image.
    """
    if loss.target == "pixels":
        # Written as a sum: a matrix product would run in reduced precision on accelerators.
        target = (intrinsics[:, :2] * (target / target[:, 2:])[:, None]).sum(axis=-1) / image_size
    elif loss.target == "reach":
        assert hand is not None, "the loader was not asked for the hand"
        target = jnp.concatenate([target, target - hand[:, :3], hand[:, 3:]], axis=1)
    # The state comes from an RMS norm, so its length is about sqrt(D). Undivided, it would make the kernel's gradient
    # dominate the norm that `grad_clip_norm` limits, and clipping would shrink all other gradients.
    features = state.astype(jnp.float32) / math.sqrt(state.shape[1])
    guess = (features[:, :, None] * head["kernel"]).sum(axis=1) + head["bias"]
    return jnp.abs(guess - target).mean(axis=1)
