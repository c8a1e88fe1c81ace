"""Only the tokenizer says how wide an action is: data, training step and policy follow it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from helpers.toy_rlds import data_config, libero_features, make_episodes, make_rlds

from spatialvla_jax import Policy
from spatialvla_jax.actions import ActionTokenizer, decode, encode, linear_grid
from spatialvla_jax.actions.normalization import unnormalize
from spatialvla_jax.batch import Batch
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.config import default_config
from spatialvla_jax.data import Loader
from spatialvla_jax.errors import InputError
from spatialvla_jax.evaluation.open_loop import evaluate, table
from spatialvla_jax.training.setup import make_setup
from spatialvla_jax.training.state import init_params, new_state
from spatialvla_jax.training.step import make_train_step


@struct.dataclass
class JointGrid(ActionTokenizer):
    """Seven joints on evenly spaced levels, and a gripper: eight tokens per action."""

    levels: Any

    @property
    def dimensions(self) -> tuple[str, ...]:
        return *(f"joint {i}" for i in range(7)), "gripper"

    @property
    def kinds(self) -> tuple[str, ...]:
        return *("joint",) * 7, "gripper"

    @property
    def token_ranges(self) -> tuple[tuple[int, int], ...]:
        count = self.levels.shape[0]
        return *((0, count),) * 7, (count, 2)

    def encode(self, actions):
        joints = jnp.abs(actions[..., :7, None] - self.levels).argmin(-1)
        gripper = len(self.levels) + (actions[..., 7:] >= 0.5)
        return jnp.concatenate([joints, gripper], -1).astype(jnp.int32)

    def decode(self, ids):
        joints = self.levels[jnp.clip(ids[..., :7], 0, len(self.levels) - 1)]
        return jnp.concatenate([joints, ids[..., 7:] > len(self.levels)], -1)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [linear_grid(16), JointGrid(jnp.linspace(-1, 1, 16))], ids=["7", "8"])
def test_loader_step_and_policy_follow_the_tokenizer(grid: ActionTokenizer, tmp_path) -> None:
    A = grid.action_dim
    splits = {"train": make_episodes(4, action_dim=A), "val": make_episodes(2, seed=1, action_dim=A)}
    path = make_rlds(tmp_path, splits, step_features=libero_features(A))
    data = data_config(path, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match=rf"'toy0' .* has an action {A} wide .*; {A + 1} is expected"):
        Loader(data, image_size=56, action_dim=A + 1)
    loader = Loader(data, image_size=56, action_dim=A, depth=True)
    with pytest.raises(InputError, match=rf"'toy0' .* has an action {A} wide .*; {A + 1} is expected"):
        Loader(data, image_size=56, action_dim=A + 1, depth=True)  # although an index of the other width exists there

    config = default_config()
    config.model.update(preset="nano", depth_source="dataset", dtype="bfloat16", remat="none")
    config.data.prompt.length, config.augment.enabled = 24, False
    config.optimizer.update(learning_rate=1e-2, warmup=0.0, frozen=())
    config.train.update(steps=100, batch_size=8, grad_accum_steps=2)
    setup = make_setup(config, grid, text_vocab=loader.tokenizer.vocab_size)
    model = setup.model
    batch = next(loader.batches(8)).replace(sample_id=None)
    expected = Batch.abstract(model.config, 8, A)
    assert jax.tree.structure(batch) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), batch, expected))
    past, gripper = ~batch.action_mask, batch.actions[..., -1]
    assert past.any() and not batch.actions[past, :-1].any()
    last = np.take_along_axis(gripper, batch.action_mask.sum(1, keepdims=True) - 1, axis=1)
    assert np.array_equal(gripper[past], np.broadcast_to(last, past.shape)[past])

    step, state, losses = jax.jit(make_train_step(setup)), new_state(setup, init_params(model, 0)), []
    for _ in range(4):
        state, metrics = step(state, batch, grid, setup.scalars)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("float32")}  # only computation is bfloat16
    assert {key for key in metrics if key.startswith("accuracy/")} == {f"accuracy/{kind}" for kind in grid.kinds}

    policy = Policy(model, state.params, Processor(loader.tokenizer, grid, loader.statistics, loader.intrinsics))
    seen = next(loader.episodes("val")).frames
    observation = {"image": seen.image[0], "depth": seen.depth[0], "intrinsics": seen.intrinsics[0]}
    out = policy.infer(observation | {"prompt": "pick up object 0"})
    ids = np.asarray(out["action_ids"])
    np.testing.assert_array_equal(encode(grid, decode(grid, ids)), ids)
    robot = unnormalize(np.asarray(decode(grid, ids)), loader.statistics["toy0"]["action"])
    assert robot.shape == (4, A)
    np.testing.assert_allclose(out["actions"], robot, atol=1e-5)
    result = evaluate(policy, loader, "val", batch_size=4)
    assert len(result["l1_per_dimension"]) == A and f"token_accuracy_{grid.kinds[0]}" in result
    assert all(name in table(result) for name in grid.dimensions)
