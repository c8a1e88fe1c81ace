"""BEiT compared with transformers, with random weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.zoe_reference import TINY, layer_params, published_names, random_hf_model, randomise, zoedepth_params
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BeitConfig as HfBeitConfig
from transformers.models.beit.modeling_beit import BeitLayer as HfLayer
from transformers.models.beit.modeling_beit import BeitRelativePositionBias as HfBias

from spatialvla_jax.errors import InputError
from spatialvla_jax.models.beit import HIDDEN, Beit, BeitConfig, BeitLayer, relative_position_bias

SMALL = st.integers(1, 6)


@settings(deadline=None, max_examples=5)
@given(pretrained=st.integers(1, 8), grid=st.tuples(SMALL, SMALL), heads=st.integers(1, 3))
def test_relative_position_bias(pretrained, grid, heads):
    hf = HfBias(HfBeitConfig(image_size=pretrained, patch_size=1, num_attention_heads=heads))
    randomise(hf, seed=0)
    table = jnp.asarray(hf.relative_position_bias_table.detach())
    expected = hf(grid)[0].detach()

    @jax.jit
    def biases(table):
        return relative_position_bias(table, pretrained, grid), relative_position_bias(table, pretrained, grid, 3)

    bias, padded = biases(table)
    np.testing.assert_allclose(bias, expected, atol=1e-6)
    np.testing.assert_array_equal(padded[:, :-3, -3:], np.full_like(padded[:, :-3, -3:], HIDDEN))
    with pytest.MonkeyPatch.context() as patch:  # the form for GPUs, on which no test runs
        patch.setattr(jax, "default_backend", lambda: "gpu")
        biases.clear_cache()
        for one, other in zip(biases(table), (expected, padded), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def compare_layer(config, grid, batch, seed):
    hf = HfLayer(
        HfBeitConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_size=config.width,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_dim,
            use_relative_position_bias=True,
        )
    ).eval()
    randomise(hf, seed)
    x = np.random.default_rng(seed).normal(size=(batch, 1 + grid[0] * grid[1], config.width)).astype(np.float32)
    resolution = (grid[0] * config.patch_size, grid[1] * config.patch_size)
    with torch.no_grad():
        expected = hf(torch.from_numpy(x), resolution=resolution).numpy()
    layer = BeitLayer(config, grid, jnp.float32)
    ours, _ = jax.jit(layer.apply)({"params": layer_params(hf, layer, x)}, x)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@settings(deadline=None, max_examples=3)
@given(
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([4, 8]),
    mlp_dim=st.integers(5, 40),
    pretrained=st.integers(2, 5),
    grid=st.tuples(SMALL, SMALL),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_layer(heads, head_dim, mlp_dim, pretrained, grid, batch, seed):
    config = BeitConfig(16 * pretrained, 16, width=heads * head_dim, num_heads=heads, mlp_dim=mlp_dim)
    compare_layer(config, grid, batch, seed)


def test_layer_of_the_published_width():
    compare_layer(BeitConfig(), (24, 24), batch=1, seed=0)


@pytest.mark.parametrize(("depth", "size"), [(8, (64, 64)), (4, (48, 80))])
def test_taps(depth, size):
    config = replace(TINY, backbone=replace(TINY.backbone, depth=depth))
    hf = random_hf_model(config, seed=1)
    images = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = hf.backbone(torch.from_numpy(images).permute(0, 3, 1, 2)).feature_maps
    model = Beit(config.backbone, jnp.float32)
    params = zoedepth_params(published_names(hf.state_dict()), config)["backbone"]
    taps = jax.jit(model.apply)({"params": params}, images)
    assert taps.shape == (4, *expected[0].shape)
    for ours, theirs in zip(taps, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_depth_must_divide_into_taps():
    with pytest.raises(InputError, match="depth 10"):
        BeitConfig(depth=10)
