"""The decode kernel, interpreted, against the plain formula; and whether it lowers for a GPU at full size."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fused_attention import h100
from test_step import GRID, inputs_of

from spatialvla_jax.inference import kernels
from spatialvla_jax.inference.decoder import attend_and_write
from spatialvla_jax.inference.generate import generate, prepare
from spatialvla_jax.inference.kernels import attend_cached
from spatialvla_jax.interop.mapping import param_shapes, unflatten
from spatialvla_jax.models import SpatialVLA, preset
from spatialvla_jax.models.attention import rotary_angles
from spatialvla_jax.models.gemma2 import Gemma2Config

# Interpreted kernels take longer to compile than to run.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(
    ("dtype", "batch", "tokens", "splits"), [("float32", 3, 3, 3), ("float32", 1, 1, 1), ("bfloat16", 1, 3, 1)]
)
def test_attention_rotates_attends_and_writes(dtype: str, batch: int, tokens: int, splits: int) -> None:
    """Over slots of which some are unused, in the middle and after the new tokens, which don't all see each other."""
    N, K, H, S, at, rng = 4, 2, 16, 96, 61, np.random.default_rng(tokens)
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


def test_generation_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a small model with the kernel and without, for prompts of two lengths."""
    config = preset("nano", spatial_tokens=GRID.vocab_size)
    model = SpatialVLA(replace(config, llm=replace(config.llm, depth=1)))
    rng, shapes = np.random.default_rng(0), param_shapes(model.config)
    params = {path: 0.2 * rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    weights, inputs = prepare(model, unflatten(params)), inputs_of(model, 2)
    given = {k: inputs[k] for k in ("image", "prompt_ids", "prompt_mask", "depth", "intrinsics")}

    def tokens() -> Any:
        return jit(lambda x: generate(model, weights, GRID.token_ranges, **x)[0])(given)

    expected, tried = tokens(), []
    monkeypatch.setattr(kernels, "can_attend", lambda qkv, *_: tried.append(qkv.shape[1]) or True)
    np.testing.assert_array_equal(tokens(), expected)
    assert tried == [1, 3]


@pytest.mark.parametrize(("batch", "tokens"), [(1, 3), (32, 1)])
def test_lowers_for_a_gpu(batch: int, tokens: int) -> None:
    """At full size, with the cache in parts and whole."""
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
