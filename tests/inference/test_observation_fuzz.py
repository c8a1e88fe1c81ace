"""Random observations become finite arrays of sensible cameras and depth, or an error in a sentence."""

import string
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.batches import observation
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax import Policy
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.camera import intrinsics_problem

SIZE = (48, 64)
DTYPES = ("?", "u1", "u2", "i1", "i4", "u8", "f2", "f4", "f8", "c8", "O", "S3", "U3", "M8[s]", "f4,f4")
FACTORS = (0, -1, 1e-3, 1e-2, 0.5, 3, 64, 1e3, 1e5, 1e30, 1e300, np.nan, np.inf)
ODD = (
    *(None, True, 0, -1, 0.001, 1, 2.5, np.nan, 10**400, 1j, Fraction(1, 1000), "", "toy", "toy/1.0.0", "a/b/c", "\0"),
    *(
        "\ud800",
        "word " * 500,
        b"bytes",
        [],
        {},
        {"a": 1},
        {1, 2},
        [[1, 2], [3]],
        [[[0]]],
        object(),
        len,
        np.array(None),
    ),
    *(np.zeros((0, 0, 3), np.uint8), np.ma.masked_all(SIZE), np.float32(0.001), np.array(0.001), np.array("0.001")),
)
KEYS = ("image", "prompt", "intrinsics", "depth", "depth_unit", "unnorm_key", "draft", "reset", "state", 3)


@st.composite
def changes(draw: st.DrawFn) -> dict[Any, Any]:
    """One or two keys of an observation, each replaced by something odd or by a damaged form of what it was."""
    good, changed = observation(), {}
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=2, unique=True)):
        array = good.get(key)
        if not isinstance(array, np.ndarray) or draw(st.booleans()):
            changed[key] = draw(st.sampled_from(ODD) | st.text(string.printable, max_size=20))
            continue
        place = tuple(draw(st.integers(0, n - 1)) for n in array.shape)
        scaled = np.array(array, draw(st.sampled_from(("f4", "f8"))))
        with np.errstate(all="ignore"):
            match draw(st.sampled_from(("cell", "scale", "cast", "cut", "turn", "list"))):
                case "cell":
                    scaled[place] *= draw(st.sampled_from(FACTORS))
                    array = scaled
                case "scale":
                    array = scaled * draw(st.sampled_from(FACTORS))
                case "cast":
                    array = array.astype(draw(st.sampled_from(DTYPES)))
                case "cut":
                    array = array[draw(st.sampled_from((0, slice(1), slice(1, None), None)))]
                case "turn":
                    array = np.swapaxes(array, *draw(st.permutations(range(array.ndim)))[:2])
                case _:
                    array = array.tolist()
        changed[key] = array
    return changed


@pytest.fixture(scope="module")
def policy(trained: Path) -> Policy:
    return Policy.load(trained)


def prepare(policy: Policy, changed: dict[Any, Any]) -> bool:
    """Whether the observation is accepted."""
    try:
        arrays = policy.prepare(observation() | changed)
    except InputError as error:
        assert 0 < len(str(error)) < 500 and "\n" not in str(error), str(error)
        return False
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert arrays["image"].dtype == np.uint8 and arrays["intrinsics"].dtype == arrays["depth"].dtype == np.float32
    assert intrinsics_problem(arrays["intrinsics"], arrays["image"].shape[:2]) == ""
    assert arrays["depth"].shape == arrays["image"].shape[:2]
    assert arrays["depth"].min() >= 0 and 0 < arrays["depth"].max() <= 1000
    return True


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_observation_is_taken_or_refused(policy: Policy, examples: int) -> None:
    taken = []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(changes())
    def one(changed: dict[Any, Any]) -> None:
        taken.append(prepare(policy, changed))

    one()
    assert len(taken) >= examples and sum(taken) >= 0.05 * len(taken)
