from math import prod

import hypothesis.strategies as st
import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from safetensors.numpy import load_file

from spatialvla_jax.checkpoints.mapping import (
    SPATIALVLA,
    Rule,
    axes_of_layout,
    axis_sizes,
    param_shapes,
    reverse,
    slots,
)
from spatialvla_jax.checkpoints.peft import adapter_rules
from spatialvla_jax.checkpoints.published_config import read_config
from spatialvla_jax.models import preset


def test_every_golden_tensor_comes_back_byte_for_byte(golden):
    """All 380 tensors, ZoeDepth's included, convert into our arrays and back. Every number of our arrays is written."""
    published = load_file(golden / "model.safetensors")
    shapes = param_shapes(read_config(golden / "config.json"))
    table = slots(shapes)
    assert {slot.key: slot.shape for slot in table} == {key: tensor.shape for key, tensor in published.items()}
    arrays = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
    for slot in table:
        slot.to_ours(published[slot.key], arrays[slot.path])
    assert all(np.isfinite(array).all() for array in arrays.values())
    for slot in table:
        assert slot.to_published(arrays[slot.path]).tobytes() == published[slot.key].tobytes(), slot.key


def test_full_size_has_the_published_number_of_parameters():
    table = slots(param_shapes(preset("spatialvla-4b-224")))
    assert sum(prod(slot.shape) for slot in table) == 4_027_854_731
    assert len({slot.key for slot in table}) == len(table)


@settings(max_examples=100, deadline=None)
@given(
    left=st.permutations("ABCD"),
    right=st.permutations("ABCD"),
    group=st.integers(1, 3),
    sizes=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    several_keys=st.booleans(),
    stacks=st.integers(0, 2),
)
def test_any_layout_inverts(left, right, group, sizes, several_keys, stacks):
    """Random permutations with a grouped axis, stacked keys and up to two layer axes convert back bit for bit."""
    layout = f"({' '.join(left[:group])}) {' '.join(left[group:])} -> {' '.join(right)}"
    keys = ("a.{layer}", "b.{layer}")[: 1 + several_keys]
    shape = (3, 2)[:stacks] + (2,) * several_keys + tuple(sizes)
    table = slots({"array": shape}, [Rule("array", layout, keys)])
    array = np.arange(prod(shape)).reshape(shape)
    published = {slot.key: slot.to_published(array) for slot in table}
    assert len(published) == len(table) == prod(shape[:-4])
    again = np.full_like(array, -1)
    for slot in table:
        assert published[slot.key].shape == slot.shape
        slot.to_ours(published[slot.key], again)
    np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize("layout", sorted({rule.layout for rule in (*SPATIALVLA, *adapter_rules())}))
def test_the_reverse_of_a_layout_is_its_inverse(layout):
    """A layout moves every number to a distinct place, and its reverse moves it back."""
    _, axes = axes_of_layout(layout)
    shape = tuple(1 if axis == "1" else 2 + i for i, axis in enumerate(axes))
    ours = np.arange(prod(shape)).reshape(shape)
    published = rearrange(ours, reverse(layout))
    assert sorted(published.ravel()) == sorted(ours.ravel())
    np.testing.assert_array_equal(rearrange(published, layout, **axis_sizes(layout, shape)), ours)


def test_layout_against_einsum():
    """ "(N H) D -> N D H" gives the same product from the published matrix and from ours."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 6)), rng.normal(size=(2 * 3, 6))
    (slot,) = slots({"q": (2, 6, 3)}, [Rule("q", "(N H) D -> N D H", ("q",))])
    ours = np.empty((2, 6, 3))
    slot.to_ours(w, ours)
    np.testing.assert_allclose(np.einsum("td,ndh->tnh", x, ours).reshape(5, 6), x @ w.T)


def test_a_leaf_without_a_rule_is_named():
    with pytest.raises(KeyError, match="img/new"):
        slots({"img/new": (3,)})
