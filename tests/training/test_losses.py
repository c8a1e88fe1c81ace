"""The optional parts of the loss."""

import shutil
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.batches import GRID
from helpers.recordings import write_recording
from jax.sharding import SingleDeviceSharding

from spatialvla_jax.actions import ActionTokenizer, encode, linear_grid, uniform_grid
from spatialvla_jax.checkpoints import read_checkpoint
from spatialvla_jax.checkpoints.mapping import param_shapes
from spatialvla_jax.config import check_together, default_config
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.convert import convert
from spatialvla_jax.inference.policy import Policy
from spatialvla_jax.planning.topology import parse_topology
from spatialvla_jax.training.augment import crop_intrinsics
from spatialvla_jax.training.loop import train
from spatialvla_jax.training.losses import Loss, soft_cross_entropy, target_error
from spatialvla_jax.training.metrics import read_metrics

OFFSET = 5


def cells_of(grid: ActionTokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each token: (indices of each cell along the axes, cells per axis, 0 for axes that are not rings)."""
    if len(grid.token_ranges) == 7:
        return [(np.arange(grid.vocab_size)[:, None], np.zeros(1))] * 6
    theta, phi, r, *rotation = grid.num_bins
    grids = [np.array(list(product(*map(range, bins)))) for bins in ((theta, phi, r), rotation)]
    return list(zip(grids, (np.array([0, phi, 0]), np.zeros(3)), strict=True))


def dense_targets(grid: ActionTokenizer, ids: np.ndarray, sigma: float) -> np.ndarray:
    """f64[B, A + 1, V], with every weight written out."""
    flat, n = ids.reshape(len(ids), -1), len(grid.token_ranges)
    targets = np.zeros((len(ids), flat.shape[1] + 1, OFFSET + grid.vocab_size))
    targets[:, -1, 1] = 1
    for row, place in np.ndindex(flat.shape):
        start, size = grid.token_ranges[place % n]
        true = flat[row, place] - start
        if place % n == n - 1:
            weights = np.eye(size)[true]
        else:
            cells, rings = cells_of(grid)[place % n]
            distance = np.abs(cells - cells[true])
            distance = np.where(rings > 0, np.minimum(distance, rings - distance), distance)
            weights = np.exp(-(distance**2).sum(axis=1) / (2 * sigma**2))
        targets[row, place, OFFSET + start : OFFSET + start + size] = weights / weights.sum()
    return targets


@pytest.mark.parametrize(
    ("grid", "sigma"),
    [(GRID, 1.5), (uniform_grid((2, 5, 1, 3, 2, 4)), 0.4), (linear_grid(9), 1.0)],
    ids=["spatial", "uneven", "linear"],
)
def test_soft_targets_are_gaussians_over_neighbouring_cells(grid, sigma) -> None:
    """Loss and gradient compared with targets written out in float64."""
    rng = np.random.default_rng(0)
    ids = np.asarray(encode(grid, rng.uniform(-1, 1, (3, 2, 7)).astype(np.float32)))
    shape = (3, ids[0].size + 1, OFFSET + grid.vocab_size)
    logits = rng.normal(0, 3, shape).astype(np.float32)
    total = lambda x: soft_cross_entropy(x, jnp.asarray(ids), grid, OFFSET, sigma).sum()  # noqa: E731
    loss, gradient = jax.jit(jax.value_and_grad(total))(logits)
    z = logits.astype(np.float64)
    log_p = z - z.max(axis=-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
    targets = dense_targets(grid, ids, sigma)
    np.testing.assert_allclose(loss, -(targets * log_p).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.exp(log_p) - targets, atol=2e-6)


@pytest.mark.slow
def test_soft_targets_take_no_more_memory_than_the_plain_loss() -> None:
    """Compiled for a TPU with the full vocabulary, loss and gradient need one array of the logits' size."""
    (device, *_), V, offset = parse_topology("v5e:2x2").devices(), 257_153 + 8194, 257_153
    grid = uniform_grid()

    def shape(dtype, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=SingleDeviceSharding(device))

    def plain(logits, ids):
        targets = jnp.append(ids.reshape(len(ids), -1) + offset, jnp.ones((len(ids), 1), int), axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def soft(logits, ids):
        return soft_cross_entropy(logits, ids, grid, offset, 1.0).mean()

    def memory(loss) -> float:
        def through(x, w, ids):
            return loss(x @ w, ids)

        arguments = shape(jnp.float32, 4, 13, 64), shape(jnp.float32, 64, V), shape(jnp.int32, 4, 4, 3)
        program = jax.jit(jax.grad(through, argnums=(0, 1))).lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes / (4 * 13 * V * 4)

    assert memory(soft) < 1.05 * memory(plain)


def test_the_target_is_learned_in_metres_or_where_it_is_in_the_cropped_picture() -> None:
    """The error by hand, for a head that predicts its bias; a crop moves pixels but not metres."""
    rng = np.random.default_rng(0)
    state = rng.normal(size=(4, 8)).astype(np.float32)
    target = (rng.uniform(-0.3, 0.3, (4, 3)) + np.eye(3)[2]).astype(np.float32)
    intrinsics = np.tile(np.array([[60, 0, 28], [0, 50, 30], [0, 0, 1]], np.float32), (4, 1, 1))
    offset, scale = np.array([[3.0, 5.0]] * 4, np.float32), np.full(4, 1.25, np.float32)
    cropped = np.asarray(crop_intrinsics(jnp.asarray(intrinsics), jnp.asarray(offset), jnp.asarray(scale)))
    x, y, z = target.astype(np.float64).T
    u, v = (60 * x / z + 28 - 5) * 1.25 / 56, (50 * y / z + 30 - 3) * 1.25 / 56
    hand = rng.uniform(-0.5, 0.5, (4, 4)).astype(np.float32)
    metres, pixels = np.stack([x, y, z], axis=1), np.stack([u, v], axis=1)
    reach = np.concatenate([metres, metres - hand[:, :3], hand[:, 3:]], axis=1)
    wanted = {"metres": metres, "pixels": pixels, "reach": reach}
    for kind, expected in wanted.items():
        bias = np.arange(expected.shape[1], dtype=np.float32)
        head = {"kernel": jnp.full((8, len(bias)), 0.5), "bias": jnp.asarray(bias)}
        places = jnp.asarray(target), jnp.asarray(hand), jnp.asarray(cropped)
        error = target_error(Loss(target=kind), head, state, *places, 56)
        guess = 0.5 * state.sum(axis=1, keepdims=True) / np.sqrt(8) + bias
        np.testing.assert_allclose(error, np.abs(guess - expected).mean(axis=1), rtol=1e-5)


@pytest.mark.parametrize("width", [16, 4096])
def test_the_gradient_of_the_head_does_not_grow_with_the_model(width: int) -> None:
    """By hand: a third of the features times the error's sign, for each of three coordinates."""
    state = np.random.default_rng(width).normal(size=(1, width)).astype(np.float32)
    state /= np.sqrt(np.mean(state**2))
    head = {"kernel": jnp.zeros((width, 3)), "bias": jnp.zeros(3)}
    arguments = jnp.asarray(state), jnp.ones((1, 3)), None, jnp.eye(3)[None], 56
    slope = jax.grad(lambda head: target_error(Loss(target="metres"), head, *arguments)[0])(head)
    assert jnp.linalg.norm(slope["kernel"]) == pytest.approx(np.sqrt(3) / 3, rel=1e-5)
    assert jnp.linalg.norm(slope["bias"]) == pytest.approx(np.sqrt(3) / 3, rel=1e-5)


def test_pixels_need_intrinsics_that_follow_the_crop() -> None:
    config = default_config()
    config.loss.target, config.augment.move_intrinsics = "pixels", False
    with pytest.raises(InputError, match=r"^loss\.target=pixels needs the intrinsics"):
        check_together(config)
    config.augment.crop_area = 1.0
    check_together(config)


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    return write_recording(tmp_path_factory.mktemp("recording") / "set.pack")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_learns_the_target_and_its_policy_does_not_have_the_head(recording, trained, tmp_path, lora) -> None:
    config = default_config()
    config.model.update(preset="nano", depth_source="dataset", dtype="float32", remat="none")
    config.data.packed, config.data.prompt.length = str(recording), 32
    config.train.update(steps=30, batch_size=16, log_every=1, eval_every=30)
    config.checkpoint.update(every=10, keep_last=4)
    config.grid.num_bins, config.optimizer.learning_rate = (4, 4, 2, 4, 4, 4), 1e-2
    config.loss.target, config.loss.target_weight = "metres" if lora else "reach", 10.0
    config.loss.soft_sigma = 0.0 if lora else 0.5
    if lora:
        config.init, config.lora.rank, config.grid.kind = str(trained), 4, "checkpoint"
    workdir = tmp_path / "run"
    made = train(config, workdir)
    records = read_metrics(workdir / "metrics.jsonl")
    errors = [record["target_error"] for record in records if "target_error" in record]
    assert errors[0] > 0.3 and errors[-1] < 0.15 and records[-1]["val/target_error"] < 0.15

    policy = read_checkpoint(workdir)
    names = set(policy.arrays)
    assert names == set(param_shapes(policy.config)), "the head is not the policy's"
    if not lora:
        assert made["params"] == 7 * (32 + 1) + sum(x.size for x in jax.tree.leaves(policy.params()))
    Policy.load(workdir)
    convert(workdir, tmp_path / "export", "pytorch", merge=lora)
    assert set(read_checkpoint(tmp_path / "export").arrays) == names

    shutil.copytree(workdir / "checkpoints" / "10", tmp_path / "again" / "checkpoints" / "10")
    shutil.copy(workdir / "config.json", tmp_path / "again")
    train(config, tmp_path / "again")
    last = read_metrics(tmp_path / "again" / "metrics.jsonl")[-1]
    assert last == records[-1], "a resumed run has the head's values again"

    config.init, config.grid.kind, config.train.steps = str(workdir), "checkpoint", 1
    for target, continues in ((config.loss.target, True), ("pixels", False)):
        config.loss.target = target
        train(config, tmp_path / target)
        first = read_metrics(tmp_path / target / "metrics.jsonl")[0]["target_error"]
        assert (first < 0.15) == continues, "a run that starts from another keeps its head, if the targets are the same"
