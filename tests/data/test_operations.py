import numpy as np
import pytest

from spatialvla_jax.data.oxe import CATALOGUE, make_spec
from spatialvla_jax.data.oxe.operations import apply_operations
from spatialvla_jax.errors import InputError


def grippers(*values):
    action = np.zeros((len(values), 7), np.float32)
    action[:, 6] = values
    return {"action": action, "step": np.arange(len(values))}


@pytest.mark.parametrize(
    ("operations", "before", "after"),
    [
        # LIBERO: -1 open, +1 close
        (CATALOGUE["libero"].operations, (-1, 1, -0.5, 0.25), (1, 0, 1, 0.75)),
        ((("invert_gripper",),), (0, 1, 0.25), (1, 0, 0.75)),
        # a value between becomes what is reached after it
        ((("binarize_gripper",),), (1, 0.5, 0.2, 0, 0.6, 0.96), (1, 0, 0, 0, 1, 1)),
        # … and at the end, where nothing is reached, the last value
        ((("binarize_gripper",),), (0, 0.5, 0.3), (0, 0.3, 0.3)),
        # relative: +1 closes, -1 opens
        ((("absolute_gripper",),), (0, 1, 0, 0, -1, 0), (1, 0, 0, 0, 1, 1)),
        ((("absolute_gripper",),), (0, 0, -1, 0), (0, 0, 1, 1)),
        ((("absolute_gripper",),), (0, 0.05, 0), (1, 1, 1)),
    ],
)
def test_grippers(operations, before, after):
    result = apply_operations(grippers(*before), operations)["action"]
    np.testing.assert_allclose(result[:, 6], after, atol=1e-7)
    assert result.dtype == np.float32 and not result[:, :6].any()


def test_bridge():
    """First step dropped, gripper binarised, movement from the reached states, last step dropped."""
    rng = np.random.default_rng(0)
    state = rng.normal(size=(5, 7)).astype(np.float32)
    action = rng.normal(size=(5, 7)).astype(np.float32)
    action[:, 6] = [1, 0.5, 1, 0.5, 0]
    episode = {"action": action, "observation/state": state, "step": np.arange(5)}
    result = apply_operations(episode, CATALOGUE["bridge_orig"].operations)
    np.testing.assert_array_equal(result["step"], [1, 2, 3])
    np.testing.assert_allclose(result["action"][:, :6], state[2:, :6] - state[1:4, :6], atol=1e-6)
    np.testing.assert_array_equal(result["action"][:, 6], [1, 1, 0])


def test_specs_from_fields():
    spec = make_spec({"image": "observation/front", "operations": [["clip_gripper", 0, 1]]}, CATALOGUE, "mine")
    assert spec.operations == (("clip_gripper", 0, 1),) and spec.image == "observation/front"
    assert make_spec("libero", CATALOGUE, "mine") is CATALOGUE["libero"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("libro", "unknown spec 'libro': known are .*libero"),
        ({"images": "x"}, "unknown field 'images'"),
        ({"operations": [["flip"]]}, "unknown operation 'flip'"),
    ],
)
def test_bad_specs(value, message):
    with pytest.raises(InputError, match=f"'mine'.*{message}"):
        make_spec(value, CATALOGUE, "mine")
