"""Random batches in the shapes of a model, and a small action grid."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from helpers.toy_rlds import INTRINSICS
from spatialvla_jax.actions import PRETRAIN_GAUSSIANS, gaussian_grid
from spatialvla_jax.batch import Batch
from spatialvla_jax.models import SpatialVLA

GRID = gaussian_grid(PRETRAIN_GAUSSIANS, (4, 4, 2, 4, 4, 4))


def random_batch(model: SpatialVLA, size: int, seed: int, action_dim: int = 7) -> Batch:
    """A batch like the loader's, from one dataset, always with depth."""
    cfg, rng = model.config, np.random.default_rng(seed)
    S, Q, T = cfg.img.image_size, cfg.prompt_length, cfg.action_chunk
    length = rng.integers(3, Q + 1, size)
    return Batch(
        image=rng.integers(0, 256, (size, S, S, 3), dtype=np.uint8),
        depth=rng.uniform(0.3, 3, (size, S, S)).astype(np.float32),
        intrinsics=np.tile(np.array([[60, 0, 28], [0, 60, 28], [0, 0, 1]], np.float32), (size, 1, 1)),
        prompt_ids=rng.integers(3, cfg.text_vocab, (size, Q)).astype(np.int32),
        prompt_mask=np.arange(Q) < length[:, None],
        actions=rng.uniform(-1, 1, (size, T, action_dim)).astype(np.float32),
        action_mask=np.ones((size, T), bool),
        dataset_id=np.zeros(size, np.int32),
    )


def random_inputs(model: SpatialVLA, size: int, seed: int = 0) -> Batch:
    """`random_batch` with images in [0, 1], as in the training step."""
    batch = random_batch(model, size, seed)
    return replace(batch, image=batch.image / np.float32(255))


def observation(seed: int = 0, size: tuple[int, int] = (48, 64)) -> dict[str, Any]:
    """A random observation from the toy dataset's camera, as a client sends it."""
    rng = np.random.default_rng(seed)
    image, depth = rng.integers(0, 256, (*size, 3), dtype=np.uint8), rng.uniform(0.5, 2, size).astype(np.float32)
    prompt = {"prompt": f"pick up object {seed}", "unnorm_key": "toy"}
    return {"image": image, "depth": depth, "intrinsics": INTRINSICS.copy()} | prompt


def assert_equal(one: Any, two: Any) -> None:
    """Check that two structures (batches, episodes) have the same values and dtypes."""
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path), strict=True)


def concatenate(parts: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
