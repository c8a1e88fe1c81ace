"""The decoding layout of Gemma 2 compared with the training model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.inference.decoder import forward, linear, quantize
from spatialvla_jax.inference.weights import to_decode_layout
from spatialvla_jax.models.attention import sliding_window_mask
from spatialvla_jax.models.gemma2 import Gemma2, Gemma2Config

# Several layers of each kind, and a window shorter than the sequence.
CONFIG = Gemma2Config(
    vocab_size=7, width=16, depth=3, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, sliding_window=4
)


@pytest.mark.parametrize(("first", "window"), [(1, 64), (3, 4), (6, 4)])
def test_whole_or_in_parts_it_is_the_model(first: int, window: int) -> None:
    """Hidden states of a sequence: all at once, and with a cache, `first` tokens and then one by one."""
    length, config = 7, CONFIG.__class__(**{**vars(CONFIG), "sliding_window": window})
    model, rng = Gemma2(config, jnp.dtype("float32")), np.random.default_rng(first)
    x = rng.normal(size=(2, length, config.width)).astype(np.float32)
    positions = np.broadcast_to(np.arange(length) + 1, (2, length))
    mask = np.broadcast_to(np.tri(length, dtype=bool), (2, length, length))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, positions, mask))["params"]
    params = jax.tree.map(lambda s: 0.5 * rng.normal(size=s.shape).astype(np.float32), shapes)
    expected = jax.jit(lambda p: model.apply({"params": p}, x, positions, mask))(params)

    weights = to_decode_layout(params, jnp.asarray, lambda m: m)
    run = jax.jit(lambda *args: forward(config, weights, *args))
    whole, cache = run(x, positions, mask, sliding_window_mask(mask, positions, positions, window))
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-4)

    cache, parts = jax.tree.map(jnp.zeros_like, cache), []
    for part in [slice(0, first), *(slice(i, i + 1) for i in range(first, length))]:
        seen = (mask[:, part], sliding_window_mask(mask[:, part], positions[:, part], positions, window))
        hidden, cache = run(x[:, part], positions[:, part], *seen, cache, part.start)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=15)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_int8_is_within_half_a_step_of_every_weight(rows: int, columns: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    matrix[0] = 0
    small = jax.jit(quantize)(matrix)
    assert small.values.dtype == jnp.int8
    restored = np.asarray(small.values, np.float32) * np.asarray(small.scale)[:, None]
    assert (np.abs(restored - matrix) <= np.asarray(small.scale)[:, None] * 0.501).all()
    np.testing.assert_allclose(
        jax.jit(linear)(np.eye(columns, dtype=np.float32), small), restored.T, rtol=1e-6, atol=1e-7
    )
