"""Low-rank adapters: the published layers, each by itself; nothing changed at the start."""

from math import prod

import jax
import numpy as np
import pytest

from spatialvla_jax.checkpoints.mapping import flatten, param_shapes, slots, unflatten
from spatialvla_jax.checkpoints.peft import adapter_rules
from spatialvla_jax.errors import InputError
from spatialvla_jax.models import preset
from spatialvla_jax.models.lora import LINEAR, adapter_shapes, init_adapters, merge_adapters

NANO = preset("nano")
SHAPES = param_shapes(NANO)
ALL = ("llm", "img", "ego3d")


@pytest.fixture(scope="module")
def params() -> dict:
    rng = np.random.default_rng(0)
    return unflatten({path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()})


def test_fresh_adapters_change_nothing(params) -> None:
    adapters = jax.jit(lambda key: init_adapters(SHAPES, 4, ALL, key))(jax.random.key(0))
    merged = flatten(merge_adapters(params | {"lora": adapters}, 8.0))
    assert merged.keys() == flatten(params).keys()
    for path, x in flatten(params).items():
        np.testing.assert_array_equal(merged[path], x)
    assert merge_adapters(params, 8.0).keys() == params.keys()
    a = np.concatenate([np.ravel(x) for path, x in flatten(adapters).items() if path.endswith("/a")])
    assert np.std(a) == pytest.approx(1 / 4, rel=0.05)  # the release's: a normal with deviation 1 / rank


def test_every_published_layer_gets_its_own_product(params) -> None:
    """W + scale · B A on the PyTorch side's tensors, one layer at a time; keys and values, gate and up apart."""
    rng = np.random.default_rng(1)
    adapters = {p: rng.normal(size=s).astype(np.float32) for p, s in adapter_shapes(SHAPES, 3, ALL).items()}
    merged = flatten(jax.jit(lambda p: merge_adapters(p, 0.5))(params | {"lora": unflatten(adapters)}))
    table = slots({f"lora/{p}": x.shape for p, x in adapters.items()}, adapter_rules())
    low_rank = {slot.key: slot.to_published(adapters[slot.path.removeprefix("lora/")]) for slot in table}
    assert len(low_rank) == 2 * (2 * 7 + 2 * 6 + 1 + 2)
    for slot in slots(SHAPES):
        name = slot.key.removesuffix(".weight")
        w = slot.to_published(flatten(params)[slot.path])
        if (a := low_rank.pop(f"{name}.lora_A.weight", None)) is not None:
            b = low_rank.pop(f"{name}.lora_B.weight")
            assert a.shape == (3, w.shape[1]) and b.shape == (w.shape[0], 3)
            w = w + 0.5 * b @ a
        np.testing.assert_allclose(slot.to_published(np.asarray(merged[slot.path])), w, atol=1e-5, err_msg=slot.key)
    assert not low_rank


def test_parameters_at_full_size_are_those_of_the_published_targets() -> None:
    """rank · (in + out) of every linear layer, as `peft` counts them, from the sizes in the paper."""
    config = preset("spatialvla-4b-224")
    D, F, Q, KV, S, M = 2304, 9216, 8 * 256, 4 * 256, 1152, 4304
    gemma = (D + Q) + 2 * (D + KV) + (Q + D) + 2 * (D + F) + (F + D)
    siglip = 4 * (S + S) + 2 * (S + M)
    layers = 26 * gemma + 27 * siglip + (S + D) + (204 + S) + (S + S)
    shapes = param_shapes(config)
    adapters = jax.eval_shape(lambda: init_adapters(shapes, 32, ALL, jax.random.key(0)))
    assert sum(prod(x.shape) for x in jax.tree.leaves(adapters)) == 32 * layers == 59_151_744
    assert prod(shapes["spatial_embedding"]) == 18_878_976  # trained in full


def test_targets_are_patterns() -> None:
    attention = adapter_shapes(SHAPES, 4, ("llm/layers/attn/q", "img/.*/(query|value)"))
    assert {path.rpartition("/")[0] for path in attention} == {
        "llm/layers/attn/q_einsum/w",
        *(f"img/Transformer/encoderblock/MultiHeadDotProductAttention_0/{x}/kernel" for x in ("query", "value")),
    }
    for pattern in ("llm/lm_head", "vision", "zoe"):
        with pytest.raises(InputError, match=f"lora.targets pattern '{pattern}' matches no linear layer"):
            adapter_shapes(SHAPES, 4, (pattern,))
    zoe = param_shapes(preset("nano", depth_source="zoedepth"))
    assert adapter_shapes(zoe, 4, ALL) == adapter_shapes(SHAPES, 4, ALL) and len(LINEAR) == 11
