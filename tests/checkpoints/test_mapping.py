from math import prod

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import load_file

from spatialvla_jax.checkpoints.huggingface import read_config
from spatialvla_jax.checkpoints.mapping import SPATIALVLA, Rule, param_shapes, slots
from spatialvla_jax.models import preset


def test_every_golden_tensor_comes_back_byte_for_byte(golden):
    """All 380, ZoeDepth's too: into our leaves, of which every number is written, and out again."""
    published = load_file(golden / "model.safetensors")
    shapes = param_shapes(read_config(golden / "config.json"))
    table = slots(shapes)
    assert {slot.key: slot.shape for slot in table} == {key: tensor.shape for key, tensor in published.items()}
    leaves = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
    for slot in table:
        slot.to_ours(published[slot.key], leaves[slot.path])
    assert all(np.isfinite(leaf).all() for leaf in leaves.values())
    for slot in table:
        assert slot.to_published(leaves[slot.path]).tobytes() == published[slot.key].tobytes(), slot.key


def test_full_size_has_the_published_number_of_parameters():
    table = slots(param_shapes(preset("spatialvla-4b-224")))
    assert sum(prod(slot.shape) for slot in table) == 4_027_854_731
    assert len({slot.key for slot in table}) == len(table)


def test_no_name_appears_twice():
    keys = [key for rule in SPATIALVLA for key in rule.keys]
    assert len(keys) == len(set(keys)) and len({rule.path for rule in SPATIALVLA}) == len(SPATIALVLA)


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
    """Random permutations with a grouped axis, stacked keys and up to two layer axes: there and back is bit-exact."""
    layout = f"({' '.join(left[:group])}) {' '.join(left[group:])} -> {' '.join(right)}"
    keys = ("a.{layer}", "b.{layer}")[: 1 + several_keys]
    shape = (3, 2)[:stacks] + (2,) * several_keys + tuple(sizes)
    table = slots({"leaf": shape}, [Rule("leaf", layout, keys)])
    leaf = np.arange(prod(shape)).reshape(shape)
    published = {slot.key: slot.to_published(leaf) for slot in table}
    assert len(published) == len(table) == prod(shape[:-4])
    again = np.full_like(leaf, -1)
    for slot in table:
        assert published[slot.key].shape == slot.shape
        slot.to_ours(published[slot.key], again)
    np.testing.assert_array_equal(again, leaf)


def test_layout_against_einsum():
    """What "(N H) D -> N D H" means: the same product from the published matrix and from ours."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 6)), rng.normal(size=(2 * 3, 6))
    (slot,) = slots({"q": (2, 6, 3)}, [Rule("q", "(N H) D -> N D H", ("q",))])
    ours = np.empty((2, 6, 3))
    slot.to_ours(w, ours)
    np.testing.assert_allclose(np.einsum("td,ndh->tnh", x, ours).reshape(5, 6), x @ w.T)


def test_a_leaf_without_a_rule_is_named():
    with pytest.raises(KeyError, match="img/new"):
        slots({"img/new": (3,)})
