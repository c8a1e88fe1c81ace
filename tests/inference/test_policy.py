from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.batches import observation as random_observation
from helpers.toy_rlds import INTRINSICS

from spatialvla_jax import Policy, load_pretrained
from spatialvla_jax.actions import decode, encode
from spatialvla_jax.actions.normalization import unnormalize
from spatialvla_jax.config import load_config
from spatialvla_jax.data import open_data
from spatialvla_jax.errors import InputError, NonFiniteError
from spatialvla_jax.models.resize import resize_observation


@pytest.fixture(scope="module")
def policy(trained: Path) -> Policy:
    return Policy.load(trained)


@pytest.fixture
def observation() -> dict:
    return random_observation(1)


def test_actions_are_the_decoded_ids_in_robot_units(policy: Policy, observation: dict) -> None:
    out = policy.infer(observation)
    assert out["actions"].shape == (4, 7) and out["action_ids"].shape == (4, 3)
    grid = policy.processor.grid
    for i, (start, size) in enumerate(grid.token_ranges):
        assert ((out["action_ids"][:, i] >= start) & (out["action_ids"][:, i] < start + size)).all()
    expected = unnormalize(np.asarray(decode(grid, out["action_ids"])), policy.processor.statistics["toy"]["action"])
    np.testing.assert_allclose(out["actions"], expected, rtol=1e-6, atol=1e-7)
    # The actions are encoded to their own cells again (unless clipped at the cube).
    again = np.asarray(encode(grid, np.asarray(decode(grid, out["action_ids"]))))
    inside = (np.abs(np.asarray(decode(grid, out["action_ids"]))[:, :3]) < 1).all(axis=1)
    np.testing.assert_array_equal(again[inside], out["action_ids"][inside])


def test_infer_sees_what_training_saw(policy: Policy, config_file: Path) -> None:
    """A stored frame through `prepare` (resized by JAX) and the loader (resized by TensorFlow) gives the model the same
    inputs; pixels agree within one level. The loader's own pixels give the same tokens through both."""
    import tensorflow_datasets as tfds

    path = load_config(config_file).data.datasets[0]["path"]
    loader = open_data(load_config(config_file), policy.processor.statistics, policy.processor.tokenizer)
    total = 0
    for recorded, episode in zip(
        loader.episodes("val"), tfds.builder_from_directory(path).as_dataset("val"), strict=True
    ):
        frames = recorded.frames
        expected, _ = policy.predict(frames)
        for row, step in enumerate(tfds.as_numpy(episode["steps"])):
            seen, prompt = step["observation"], step["language_instruction"].decode()
            depth = {"depth": seen["depth"][..., 0], "depth_unit": 0.001}
            ready = policy.prepare({"image": seen["image"], "intrinsics": seen["intrinsics"], "prompt": prompt} | depth)
            resized = resize_observation(ready["image"], ready["depth"], ready["intrinsics"], size=56)
            assert np.abs(np.asarray(resized["image"], int) - frames.image[row]).max() <= 1
            np.testing.assert_array_equal(resized["depth"], frames.depth[row])
            np.testing.assert_allclose(resized["intrinsics"], frames.intrinsics[row], rtol=1e-6)
            for key in ("prompt_ids", "prompt_mask"):
                np.testing.assert_array_equal(ready[key], getattr(frames, key)[row])
            stored = {key: getattr(frames, key)[row] for key in ("image", "depth", "intrinsics")}
            np.testing.assert_array_equal(policy.infer(stored | {"prompt": prompt})["action_ids"], expected[row])
            total += 1
    assert total > 5


def test_intrinsics_default_to_the_training_camera(policy: Policy, observation: dict) -> None:
    given = policy.infer(observation)["action_ids"]
    for key in ("intrinsics", "unnorm_key"):
        del observation[key]
    np.testing.assert_array_equal(policy.infer(observation)["action_ids"], given)
    np.testing.assert_allclose(policy.intrinsics({}, (48, 64)), INTRINSICS, rtol=1e-6)


def test_inputs_that_stay_are_kept_and_those_that_change_are_not(
    policy: Policy, trained: Path, observation: dict, monkeypatch
) -> None:
    """Also if the caller writes into the array that it passed before."""
    expected = policy.infer(observation)
    sent, put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x: sent.append(x.shape) or put(x))
    again = policy.infer(observation)
    assert not sent
    np.testing.assert_array_equal(again["actions"], expected["actions"])
    observation["intrinsics"][:] = [[10, 0, 50], [0, 10, 5], [0, 0, 1]]
    moved = policy.infer(observation)
    assert sent == [(1, 3, 3)]
    monkeypatch.undo()
    np.testing.assert_array_equal(moved["actions"], Policy.load(trained).infer(observation)["actions"])


def test_batched_and_single_calls_agree(policy: Policy, config_file: Path) -> None:
    batch = next(
        open_data(load_config(config_file), policy.processor.statistics, policy.processor.tokenizer).epoch(4, "val")
    )
    ids, actions = policy.predict(batch)
    for i in range(4):
        one, action = policy.predict(jax.tree.map(lambda x, i=i: x[i : i + 1], batch))
        np.testing.assert_array_equal(one[0], ids[i])
        np.testing.assert_allclose(action[0], actions[i], atol=1e-6)


def test_many_observations_get_what_each_gets_alone(policy: Policy) -> None:
    """Images of several sizes, large and small, in a number for which no batch was compiled."""
    sizes = [(48, 64), (120, 160), (48, 64), (120, 160), (120, 160)]
    seen = [{**random_observation(i, size), "intrinsics": None} for i, size in enumerate(sizes)]
    for together, one in zip(policy.infer_batch(seen), seen, strict=True):
        alone = policy.infer(one)
        np.testing.assert_array_equal(together["action_ids"], alone["action_ids"])
        np.testing.assert_allclose(together["actions"], alone["actions"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, r"'image' must be uint8\[H, W, 3\]"),
        ({"image": np.zeros((4, 4, 3))}, r"got float64\[4, 4, 3\]"),
        ({"prompt": None}, "'prompt' must be a string, got NoneType"),
        ({"unnorm_key": "bridge"}, "unnorm_key 'bridge' is not a dataset of this policy; choose one of toy"),
        ({"intrinsics": np.eye(4)}, r"'intrinsics' must have the shape \[3, 3\], got float64\[4, 4\]"),
        ({"depth": None}, r"'depth' must be metres of shape \[48, 64\], got nothing: this model takes depth"),
        ({"image": [[1, 2], [3]]}, r"'image' must be uint8\[H, W, 3\], got object"),
        ({"unnorm_key": 3}, "unnorm_key 3 is not a dataset"),
        ({"intrinsics": np.zeros((3, 3))}, "'intrinsics' must have the last row"),
        ({"intrinsics": INTRINSICS / [[64], [48], [1]]}, "'intrinsics' looks relative to the image"),
        ({"depth": np.full((48, 64), 1500, np.uint16)}, "'depth' must be metres .*'depth_unit'"),
        ({"depth": np.full((48, 64), 1e30)}, "'depth' cannot be metres"),
        ({"depth": np.zeros((48, 64))}, "'depth' holds no reading"),
        ({"depth": np.zeros((24, 32))}, "'depth' must be metres of shape .* size of its image"),
        ({"depth_unit": "mm"}, "'depth_unit' must be metres per count, above 0 and at most 1"),
    ],
)
def test_bad_observations(policy: Policy, observation: dict, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        policy.infer(observation | change)


@pytest.mark.parametrize("draft", [[[1, 2], [3]], [[1, 2, 3]], np.zeros((4, 3)), "1 2 3"])
def test_bad_drafts(policy: Policy, draft) -> None:
    with pytest.raises(InputError, match=r"'draft' must be action ids of shape \[4, 3\], got "):
        policy.draft(draft)


@pytest.mark.parametrize(("key", "value"), [("intrinsics", 0), ("depth", np.nan), ("bounds", np.inf)])
def test_numbers_that_are_not_finite_are_no_action(policy: Policy, key: str, value: float) -> None:
    """`prepare` accepts the input, but the model or the action is not finite. The error names the observations."""
    good, bad = (policy.prepare(random_observation(seed)) for seed in (1, 2))
    bad[key] = np.full_like(bad[key], value)
    with pytest.raises(NonFiniteError, match="for 1 of 2 observations are NaN or infinite") as raised:
        policy.act([good, bad])
    assert raised.value.finite == [True, False]


def test_damaged_weights_are_no_action(policy: Policy, observation: dict, config_file: Path, monkeypatch) -> None:
    batch = open_data(load_config(config_file), policy.processor.statistics, policy.processor.tokenizer).epoch(4, "val")
    monkeypatch.setattr(policy, "weights", jax.tree.map(lambda x: x * np.nan, policy.weights))
    for ask in (policy.infer, lambda one: policy.infer_batch([one]), lambda one: policy.act([policy.prepare(one)])):
        with pytest.raises(NonFiniteError, match=r"for this observation are NaN .* checkpoint's weights"):
            ask(observation)
    with pytest.raises(NonFiniteError, match="4 of 4"):
        policy.predict(next(batch))


def test_a_policy_of_the_model_s_next_weights_compiles_nothing(
    policy: Policy, observation: dict, trained: Path
) -> None:
    """As after each validation of a run that films its rollouts."""
    model, params, processor = load_pretrained(trained)
    assert processor
    before, programs = policy.infer(observation), policy._act._cache_size()
    other = Policy(model, jax.tree.map(lambda x: -x, params), processor)
    assert (other.infer(observation)["action_ids"] != before["action_ids"]).any()
    assert other._act is policy._act and policy._act._cache_size() == programs
    assert Policy(model, params, processor, constrained=False)._act is not policy._act


def test_one_damaged_weight_is_no_action(trained: Path, observation: dict) -> None:
    """Even if a ReLU hides it from the logits."""
    model, params, processor = load_pretrained(trained)
    assert processor
    params["ego3d"]["norm"]["bias"][0] = -np.inf
    with pytest.raises(NonFiniteError, match="for this observation"):
        Policy(model, params, processor).infer(observation)
