"""SigLIP compared with transformers, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.torch_reference import hf_siglip, our_params, randomise
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.checkpoints.mapping import siglip
from spatialvla_jax.models.attention import encoder_attention
from spatialvla_jax.models.siglip import Siglip, SiglipConfig


def compare(config: SiglipConfig, batch: int, seed: int) -> None:
    reference = randomise(hf_siglip(config), seed)
    image = np.random.default_rng(seed).uniform(-1, 1, (batch, config.image_size, config.image_size, 3))
    image = image.astype(np.float32)
    model = Siglip(config, head_width=8, dtype=jnp.dtype("float32"))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    head = shapes.pop("head")
    params = our_params(reference, {"img": shapes}, siglip("v"), "v")["img"]
    params["head"] = jax.tree.map(lambda x: np.ones(x.shape, np.float32), head)
    _, tokens = jax.jit(model.apply)({"params": params}, image)
    with torch.no_grad():
        expected = reference(torch.from_numpy(image.transpose(0, 3, 1, 2))).last_hidden_state
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=3)
@given(
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([4, 8]),
    mlp_dim=st.integers(5, 40),
    depth=st.integers(1, 3),
    patch=st.integers(2, 14),
    grid=st.integers(1, 4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_small_shapes(heads, head_dim, mlp_dim, depth, patch, grid, batch, seed):
    compare(SiglipConfig(patch * grid, patch, heads * head_dim, depth, heads, mlp_dim), batch, seed)


def test_a_layer_at_full_width():
    compare(SiglipConfig(image_size=56, depth=1), batch=1, seed=0)


def test_extra_is_added_before_the_head():
    config = SiglipConfig(28, 14, 16, 1, 2, 24)
    model = Siglip(config, head_width=8, dtype=jnp.dtype("float32"))
    image, extra = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 28, 28, 3), (2, 4, 16)]))
    variables = jax.jit(model.init)(jax.random.key(2), image)
    apply = jax.jit(model.apply)
    (plain, tokens), (fused, same) = apply(variables, image), apply(variables, image, extra)
    np.testing.assert_array_equal(tokens, same)
    np.testing.assert_allclose(fused - plain, extra @ variables["params"]["head"]["kernel"], atol=1e-5)


@pytest.mark.parametrize(
    ("length", "kernel"),
    [(256, "cudnn"), (81, "xla")],  # images of 224 and 126 px
)
def test_odd_lengths_do_without_the_fused_kernel(length: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, JAX refuses the gradient of cuDNN's kernel for odd lengths."""
    used = []

    def attention(q, k, v, bias, implementation):
        used.append(implementation)
        return q

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    q = jnp.zeros((1, length, 2, 8), jnp.bfloat16)
    encoder_attention(q, q, q)
    assert used == [kernel]
