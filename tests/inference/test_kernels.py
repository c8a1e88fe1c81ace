"""The decode kernels, interpreted, compared with the plain formulas; and whether they lower for a GPU at full size."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.batches import GRID, random_inputs
from helpers.gpu import h100

from spatialvla_jax.checkpoints.mapping import param_shapes, unflatten
from spatialvla_jax.inference import kernels
from spatialvla_jax.inference.decoder import attend_and_write, gated, linear, linear_and_add, quantize
from spatialvla_jax.inference.generate import generate
from spatialvla_jax.inference.kernels import Tile, attend_cached, multiply, multiply_and_add
from spatialvla_jax.inference.weights import prepare_weights
from spatialvla_jax.models import SpatialVLA, preset
from spatialvla_jax.models.attention import rotary_angles
from spatialvla_jax.models.gemma2 import Gemma2Config

# Interpreted kernels take longer to compile than to run.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "batch", "tokens", "splits"), [("float32", 3, 3, 3), ("float32", 1, 1, 1), ("bfloat16", 1, 3, 1)]
)
def test_attention_rotates_attends_and_writes(dtype: str, batch: int, tokens: int, splits: int) -> None:
    """Some slots are unused, in the middle and after the new tokens, which do not all see each other."""
    N, K, H, S, at, rng = 4, 2, 32, 96, 61, np.random.default_rng(tokens)  # the smallest H that `can_attend` allows
    config = Gemma2Config(num_heads=N, num_kv_heads=K, head_dim=H, query_pre_attn_scalar=H)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    qkv, cache = 3 * draw(batch, tokens, N + 2 * K, H), (draw(batch, S, K, H), draw(batch, S, K, H))
    angles = rotary_angles(jnp.asarray(rng.integers(1, 300, (batch, tokens))), H)
    mask = rng.random((batch, tokens, S)) < 0.7
    mask[..., at:] = False
    mask[..., at : at + tokens] = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)[:tokens, :tokens]
    args = (qkv, angles, jnp.asarray(mask), cache, at)
    got = jit(partial(attend_cached, scale=H**-0.5, softcap=50.0, splits=splits))(*args)
    expected = jax.jit(partial(attend_and_write, config))(*args)
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "gate", "tile"),
    [((64, 256), False, Tile(16, 64, 2)), ((48, 128), False, Tile(16, 64)), ((96, 128), True, Tile(16, 128))],
    ids=["in parts", "whole", "gated"],
)
def test_products(dtype: str, shape: tuple[int, int], gate: bool, tile: Tile) -> None:
    """For one row and for three."""
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=shape), dtype)
    for rows in (1, 3):
        x = jnp.asarray(rng.normal(size=(1, rows, shape[1])), dtype)
        got = jit(partial(multiply, gated=gate, tile=tile))(x, matrix)
        expected = np.asarray((gated if gate else linear)(x, matrix), np.float32)
        assert got.dtype == x.dtype and got.shape == expected.shape
        tolerance = {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
        np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "splits"), [("float32", 2), ("bfloat16", 2), ("bfloat16", 1)])
def test_product_added_and_normed(dtype: str, splits: int) -> None:
    """A width that is not a power of two, norm scales in the middle of a stack, three rows."""
    rng, D = np.random.default_rng(0), 48

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    y, matrix, x, post, pre = draw(1, 3, 128), draw(D, 128), draw(1, 3, D), (draw(3, D), 1), (draw(2, D), 1)
    got = jit(lambda y, x: multiply_and_add(y, matrix, None, x, post, pre, tile=Tile(16, 64, splits)))(y, x)
    expected = jax.jit(lambda y, x: linear_and_add(y, matrix, x, post, pre))(y, x)
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.gpu
def test_generation_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a small model with and without the kernels, for two prompt lengths. A third observation has NaN in its
    depth, and is reported."""
    config = preset("nano", spatial_tokens=GRID.vocab_size)
    model = SpatialVLA(replace(config, llm=replace(config.llm, depth=1)))
    rng, shapes = np.random.default_rng(0), param_shapes(model.config)
    params = {path: 0.2 * rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    weights, inputs = prepare_weights(model, unflatten(params)), random_inputs(model, 3)
    depth = np.array(inputs.depth)
    depth[2, 3, 4] = np.nan
    given = replace(inputs, depth=depth).model_inputs()

    def tokens() -> Any:
        tokens, _, finite = jit(lambda x: generate(model, weights, GRID.token_ranges, **x))(given)
        np.testing.assert_array_equal(finite, [True, True, False])
        return tokens

    expected, tried = tokens(), []
    monkeypatch.setattr(kernels, "can_attend", lambda qkv, *_: tried.append(qkv.shape[1]) or True)
    np.testing.assert_array_equal(tokens(), expected)
    assert tried == [1, 3]
    monkeypatch.setattr(kernels, "can_multiply", lambda x, matrix: x.shape[1] <= 3 and len(matrix) % 32 == 0)
    shapes: set[tuple[int, int]] = set()
    monkeypatch.setattr(kernels, "tile_of", lambda *shape: shapes.add(shape) or Tile(16, 16))
    np.testing.assert_array_equal(tokens(), expected)
    assert len(shapes) == 4, "a layer's matrices"


@pytest.mark.parametrize(("batch", "tokens"), [(1, 3), (32, 1)])
def test_lowers_for_a_gpu(batch: int, tokens: int) -> None:
    """At full size, with the cache split and whole."""
    cache = (jax.ShapeDtypeStruct((batch, 320, 4, 256), jnp.bfloat16),) * 2
    args = (
        jax.ShapeDtypeStruct((batch, tokens, 16, 256), jnp.bfloat16),
        (jax.ShapeDtypeStruct((batch, tokens, 1, 128), jnp.float32),) * 2,
        jax.ShapeDtypeStruct((batch, tokens, 320), bool),
        cache,
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    run = jax.jit(partial(attend_cached, scale=1 / 16, softcap=50.0, interpret=False))
    with jax.sharding.use_abstract_mesh(h100()):
        text = run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == (2 if batch == 1 else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_with_int8(rows: int, gate: bool) -> None:
    """The kernel rounds once, after the scale; the plain formula also rounds before it."""
    rng, shape = np.random.default_rng(rows), (96, 128)
    matrix = quantize(jnp.asarray(rng.normal(size=shape) * rng.uniform(0.1, 3, (96, 1)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(1, rows, shape[1])), jnp.bfloat16)
    got = jit(partial(multiply, gated=gate, tile=Tile(16, 64, 1 if gate else 2)))(x, *matrix)
    expected = np.asarray((gated if gate else linear)(x.astype(jnp.float32), matrix))
    assert got.dtype == x.dtype and got.shape == expected.shape
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=4e-3 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(4096, 2304), (2304, 2048), (18_432, 2304), (2304, 9216)])
def test_products_lower_for_a_gpu(shape: tuple[int, int], dtype: str) -> None:
    """At full size, with the tiles used there."""
    x, matrix = jax.ShapeDtypeStruct((1, 3, shape[1]), jnp.bfloat16), jax.ShapeDtypeStruct(shape, dtype)
    scale = jax.ShapeDtypeStruct(shape[:1], jnp.float32) if dtype == "int8" else None
    run = jax.jit(partial(multiply, gated=shape[0] > 10_000, interpret=False))
    with jax.sharding.use_abstract_mesh(h100()):
        text = run.trace(x, matrix, scale).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 1
    if shape[0] < 3000:
        residual = jax.ShapeDtypeStruct((1, 3, shape[0]), jnp.bfloat16)
        stack = jax.ShapeDtypeStruct((26, shape[0]), jnp.bfloat16)
        run = jax.jit(lambda x, m, s, r, n: multiply_and_add(x, m, s, r, (n, 1), (n, 2), interpret=False))
        with jax.sharding.use_abstract_mesh(h100()):
            text = run.trace(x, matrix, scale, residual, stack).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("xla.gpu.triton") == 2
