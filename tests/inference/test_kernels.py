"""Each kernel, interpreted, against the plain formula; and whether it compiles for a GPU at full size."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import GRID, inputs_of

from spatialvla_jax.inference.decoder import add_and_norm, gated, linear, quantize
from spatialvla_jax.inference.generate import generate, prepare
from spatialvla_jax.inference.kernels import attend_cached, int8_linear, norm_add_norm
from spatialvla_jax.models import SpatialVLA, preset
from spatialvla_jax.models.attention import attend, rotary, rotary_angles
from spatialvla_jax.training.state import init_params

# Interpreted kernels take longer to compile than to run.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def draw(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), dtype)


def assert_close(got: Any, expected: Any, dtype: str) -> None:
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * np.abs(expected).max())


@pytest.mark.parametrize(
    ("dtype", "batch", "tokens", "splits"),
    [("float32", 1, 1, 3), ("float32", 3, 2, 1), ("float32", 3, 3, 3), ("bfloat16", 1, 3, 1), ("bfloat16", 3, 1, 3)],
)
def test_attention_rotates_attends_and_writes(dtype: str, batch: int, tokens: int, splits: int) -> None:
    """Over slots of which some are unused, in the middle and after the new tokens, which don't all see each other."""
    N, K, H, S, at, rng = 4, 2, 16, 96, 61, np.random.default_rng(tokens)
    qkv = 3 * draw(rng, batch, tokens, N + 2 * K, H, dtype=dtype)
    angles = rotary_angles(jnp.asarray(rng.integers(1, 300, (batch, tokens))), H)
    cache = (draw(rng, batch, S, K, H, dtype=dtype), draw(rng, batch, S, K, H, dtype=dtype))
    mask = rng.random((batch, tokens, S)) < 0.7
    mask[..., at:] = False
    mask[..., at : at + tokens] = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)[:tokens, :tokens]

    def plain(qkv: Any, cache: Any) -> Any:
        q, k = rotary(qkv[:, :, :N], angles), rotary(qkv[:, :, N : N + K], angles)
        new = (k, qkv[:, :, N + K :])
        cache = tuple(jax.lax.dynamic_update_slice(o, n, (0, at, 0, 0)) for o, n in zip(cache, new, strict=True))
        return attend(q, *cache, jnp.asarray(mask), scale=0.25, softcap=50.0), cache

    def fused(qkv: Any, cache: Any) -> Any:
        return attend_cached(qkv, angles, jnp.asarray(mask), cache, at, scale=0.25, softcap=50.0, splits=splits)

    (y, written), (expected, kept) = jit(fused)(qkv, cache), jit(plain)(qkv, cache)
    assert_close(y, expected, dtype)
    for got, want in zip(written, kept, strict=True):
        assert_close(got, want, dtype)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 72), ("bfloat16", 32)])
def test_norms(dtype: str, width: int) -> None:
    rng = np.random.default_rng(0)
    arrays = [draw(rng, *shape, dtype=dtype) for shape in ((3, 2, width), (3, 2, width), (width,), (width,))]
    got, expected = jit(norm_add_norm)(*arrays), jit(add_and_norm)(*arrays)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, dtype)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    ("dtype", "batch", "rows", "columns"), [("float32", 3, 50, 48), ("float32", 1, 24, 320), ("bfloat16", 3, 24, 320)]
)
def test_int8(dtype: str, batch: int, rows: int, columns: int, gate: bool) -> None:
    """Rows that no program's share divides; with and without a gate."""
    rng = np.random.default_rng(batch)
    x, matrix = draw(rng, batch, 1, columns, dtype=dtype), quantize(draw(rng, rows, columns) / columns**0.5)
    got = jit(lambda x, matrix: int8_linear(x, *matrix, x.dtype, gated=gate))(x, matrix)
    assert_close(got, (gated if gate else linear)(x, matrix), dtype)


def test_generation_is_the_same() -> None:
    """Tokens of a small model in int8, with every kernel and with none, for prompts of two lengths."""
    model = SpatialVLA(preset("nano", spatial_tokens=GRID.vocab_size))
    weights = prepare(model, init_params(model, 0), int8=True)
    fields, inputs = ("image", "prompt_ids", "prompt_mask", "depth", "intrinsics"), inputs_of(model, 2)

    @partial(jit, static_argnums=1)
    def run(x: Any, fused: bool) -> Any:
        return generate(model, weights, GRID.token_ranges, **{k: x[k] for k in fields}, fused=fused)[0]

    np.testing.assert_array_equal(run(inputs, True), run(inputs, False))


def shaped(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def assert_lowers(f: Callable, *args: Any) -> None:
    lowered = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()


# Later releases compile a kernel while they lower it, which takes the CUDA plugin.
here = pytest.mark.skipif(
    jax.default_backend() != "gpu" and jax.lib.__version__ > "0.10.2", reason="lowering needs JAX's CUDA plugin"
)


@here
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_lowers_at_full_size(batch: int, tokens: int) -> None:
    cache = (shaped(batch, 320, 4, 256), shaped(batch, 320, 4, 256))
    angles = (shaped(batch, tokens, 1, 128, dtype="float32"),) * 2
    mask, at = shaped(batch, tokens, 320, dtype="bool"), shaped(dtype="int32")
    assert_lowers(
        lambda *args: attend_cached(*args, scale=1 / 16, softcap=50.0, interpret=False),
        *(shaped(batch, tokens, 16, 256), angles, mask, cache, at),
    )


@here
def test_norms_lower_at_full_size() -> None:
    row, scale = shaped(3, 2304), shaped(2304)
    assert_lowers(lambda *args: norm_add_norm(*args, interpret=False), row, row, scale, scale)


@here
@pytest.mark.parametrize(
    ("rows", "columns", "gate"),
    [(4096, 2304, False), (2304, 2048, False), (18432, 2304, True), (2304, 9216, False), (8194, 2304, False)],
)
def test_int8_lowers_at_full_size(rows: int, columns: int, gate: bool) -> None:
    x, values, scale = shaped(3, columns), shaped(rows, columns, dtype="int8"), shaped(rows, dtype="float32")
    assert_lowers(lambda *args: int8_linear(*args, jnp.bfloat16, gated=gate, interpret=False), x, values, scale)
