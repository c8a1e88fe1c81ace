"""The decoding layout has the same values, whatever is stored separately, padded or precomputed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.batches import random_inputs
from helpers.zoe_reference import TINY

from spatialvla_jax.checkpoints.mapping import param_shapes, unflatten
from spatialvla_jax.inference import weights as layout
from spatialvla_jax.inference.decoder import quantize
from spatialvla_jax.inference.weights import embed_image, image_depth, prepare_weights
from spatialvla_jax.models import SpatialVLA, preset
from spatialvla_jax.models.zoedepth import ZoeDepth, estimate_depth


def random_model(**changes) -> tuple[SpatialVLA, dict]:
    model, rng = SpatialVLA(preset("nano", **changes)), np.random.default_rng(0)
    shapes = param_shapes(model.config)
    return model, unflatten({path: 0.2 * rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()})


@pytest.mark.parametrize("large", [1, 2**30])
def test_an_image_gives_the_tokens_of_the_model(large: int, monkeypatch) -> None:
    """With every layer a separate array or all stacked, BEiT's bias precomputed, and SigLIP's units padded."""
    monkeypatch.setattr(layout, "LARGE", large)
    model, params = random_model(depth_source="zoedepth", zoe=TINY)
    x = random_inputs(model, 2)
    expected = jax.jit(lambda p: model.apply({"params": p}, x.image, None, x.intrinsics, method="embed_image"))(params)
    got = jax.jit(lambda w: embed_image(model.config, w, x.image, None, x.intrinsics))(prepare_weights(model, params))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_the_depth_is_that_which_the_model_estimates() -> None:
    model, params = random_model(depth_source="zoedepth", zoe=TINY)
    image, size = random_inputs(model, 2).image, TINY.backbone.image_size
    zoedepth = partial(ZoeDepth(TINY, jnp.float32).apply, {"params": params["zoe"]})
    expected = jax.jit(lambda image: estimate_depth(zoedepth, image, size))(image)
    got = jax.jit(lambda w: image_depth(model.config, w, image))(prepare_weights(model, params))
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_a_call_makes_no_copy_of_the_stacked_layers(monkeypatch) -> None:
    """The modules see restacked layers, but the compiled program must not copy the weights to stack them."""
    monkeypatch.setattr(layout, "LARGE", 1)
    model, params = random_model()
    weights, x = prepare_weights(model, params), random_inputs(model, 1)
    run = jax.jit(lambda w: embed_image(model.config, w, x.image, x.depth, x.intrinsics))
    memory = run.lower(weights).compile().memory_analysis()
    encoder = weights.vision["img"]["Transformer"]["encoderblock"]
    assert memory.temp_size_in_bytes < sum(y.nbytes for y in jax.tree.leaves(encoder))


def test_tables_are_quantised_in_slabs_to_the_same_bits(monkeypatch) -> None:
    """Only a slab of a table is held in full precision at a time, and the first table is done before any layer."""
    model, params = random_model()
    seen = []
    monkeypatch.setattr(layout, "SLAB", 100)
    monkeypatch.setattr(layout, "quantize", lambda x: seen.append(x.shape) or quantize(x))
    weights = prepare_weights(model, params, int8=True)
    text, head = params["llm"]["embedder"]["input_embedding"][: model.config.action_offset], params["llm"]["lm_head"]
    for table, got in ((text, weights.text), (head, weights.head)):
        assert len(table) > 100
        jax.tree.map(np.testing.assert_array_equal, got, quantize(jax.numpy.asarray(table)))
    first, last = (-(-len(table) // 100) for table in (text, head))
    assert sum(rows for rows, _ in seen[:first]) == len(text)
    assert max(seen[:first] + seen[-last:])[0] == 100
