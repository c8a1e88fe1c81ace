"""ZoeDepth compared with transformers on random weights, and the depth path with golden data of the release."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.zoe_reference import PREFIX, TINY, hf_config, published_names, random_hf_model, zoedepth_params
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import ZoeDepthForDepthEstimation

from spatialvla_jax.errors import InputError
from spatialvla_jax.models.zoedepth import ZoeDepth, ZoeDepthConfig, estimate_depth, zoedepth_input

GOLDEN = Path(__file__).parents[1] / "golden"


def random_images(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, (*shape, 3)).astype(np.float32)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def pair(config, seed):
    """The same random weights in transformers and in our layout."""
    hf = random_hf_model(config, seed)
    return hf, zoedepth_params(published_names(hf.state_dict()), config)


def run(config, dtype=jnp.float32):
    model = ZoeDepth(config, dtype)
    return jax.jit(lambda params, images: model.apply({"params": params}, images))


def run_hf(hf, images):
    with torch.no_grad():
        return hf(nchw(images)).predicted_depth.numpy()


@settings(deadline=None, max_examples=2)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    width=st.sampled_from([16, 24]),
    neck=st.tuples(*[st.integers(3, 20)] * 4),
    fusion=st.sampled_from([6, 12]),
    num_bins=st.integers(2, 12),
    bin_embedding=st.sampled_from([8, 14]),
    seed=st.integers(0, 1000),
)
def test_matches_transformers(grid, width, neck, fusion, num_bins, bin_embedding, seed):
    config = replace(
        TINY,
        backbone=replace(TINY.backbone, width=width),
        neck_widths=neck,
        fusion_width=fusion,
        bottleneck_width=fusion,
        num_bins=num_bins,
        bin_embedding_dim=bin_embedding,
    )
    hf, params = pair(config, seed)
    images = random_images(seed, 1, 16 * grid[0], 16 * grid[1])
    np.testing.assert_allclose(run(config)(params, images), run_hf(hf, images), atol=1e-4)


def test_layers_of_the_published_widths():
    """Compares the output of every layer at its published width; the backbone has one layer per tap."""
    config = replace(ZoeDepthConfig(), backbone=replace(ZoeDepthConfig().backbone, depth=4, mlp_dim=1024))
    hf, params = pair(config, seed=0)
    images = random_images(0, 1, 64, 64)

    theirs = {}
    for name, module in hf.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: theirs.update({name: output}))
    depth = run_hf(hf, images)
    domain = ("nyu", "kitti")[int(theirs["metric_head.mlp_classifier"].argmax())]

    model = ZoeDepth(config, jnp.float32)
    apply = jax.jit(partial(model.apply, capture_intermediates=True, mutable="intermediates"))
    ours_depth, state = apply({"params": params}, images)
    ours = state["intermediates"]

    head = "metric_head"
    same = [("neck/reassemble_2/projection", "neck.reassemble_stage.layers.2")]
    same += [(f"neck/reassemble_{i}/resize", f"neck.reassemble_stage.layers.{i}") for i in (0, 1, 3)]
    same += [(f"neck/fusion_{i}", f"neck.fusion_stage.layers.{i}") for i in range(4)]
    same += [("relative_head/conv3", "relative_head.conv3"), (f"{head}/bottleneck", f"{head}.conv2")]
    same += [(f"{head}/classifier/logits", f"{head}.mlp_classifier"), (f"{head}/seed_projector",) * 2]
    same += [(f"{head}/projector_{i}", f"{head}.projectors.{i}") for i in range(4)]
    same += [(f"{head}/{domain}/seed_bins/conv2", f"{head}.seed_bin_regressors.{domain}.conv2")]
    same += [(f"{head}/{domain}/attractor_{i}", f"{head}.attractors.{domain}.{i}.conv2") for i in range(4)]
    same += [(f"{head}/{domain}/log_binomial", f"{head}.conditional_log_binomial.{domain}.mlp.2")]
    for path, name in same:
        node = ours
        for part in path.split("/"):
            node = node[part]
        expected = theirs[name.replace("/", ".")].numpy()
        np.testing.assert_allclose(node["__call__"][0], np.moveaxis(expected, 1, -1), atol=1e-4, err_msg=path)
    np.testing.assert_allclose(ours_depth, depth, atol=1e-4)


@pytest.mark.slow
def test_routes_every_example_by_itself():
    """In a batch with both domains, each depth equals transformers' for that image alone."""
    hf = random_hf_model(TINY, seed=3)
    images = random_images(3, 4, 64, 64)
    with torch.no_grad():
        margin = torch.stack([hf(nchw(image[None])).domain_logits[0] for image in images]).diff(dim=-1)[:, 0]
        hf.get_parameter("metric_head.mlp_classifier.linear2.bias")[1] -= (
            margin.sort().values[1:3].mean()
        )  # two of each
    params = zoedepth_params(published_names(hf.state_dict()), TINY)
    alone = np.concatenate([run_hf(hf, image[None]) for image in images])
    apply = run(TINY)
    together = apply(params, images)
    np.testing.assert_allclose(together, alone, atol=1e-4)
    np.testing.assert_allclose(apply(params, images[::-1]), alone[::-1], atol=1e-4)
    assert np.abs(run_hf(hf, images) - alone).max() > 1e-2  # the summed vote does change some image's depth


def test_golden_depth_path():
    io = np.load(GOLDEN / "tiny_model_io.npz", allow_pickle=False)
    tensors = load_file(GOLDEN / "tiny_model" / "model.safetensors")
    config = replace(TINY, backbone=replace(TINY.backbone, image_size=384))
    params = zoedepth_params({k: v for k, v in tensors.items() if k.startswith(PREFIX)}, config)
    zoedepth = partial(run(config), params)

    images = np.moveaxis(io["pixel_values"], 1, -1)
    expected = {
        key: np.concatenate([io[f"{key}_{i}"] for i in range(3)]) for key in ("zoe_input", "zoe_depth", "depth")
    }
    inputs = np.moveaxis(expected["zoe_input"], 1, -1)
    np.testing.assert_allclose(zoedepth_input(jnp.asarray(images)), inputs, atol=1e-5)
    np.testing.assert_allclose(zoedepth(inputs), expected["zoe_depth"], atol=2e-5)
    np.testing.assert_allclose(estimate_depth(zoedepth, jnp.asarray(images)), expected["depth"][:, 0], atol=2e-5)


def test_bfloat16_loses_no_more_than_transformers():
    hf, params = pair(TINY, seed=4)
    images = random_images(4, 1, 64, 64)
    exact = run_hf(hf, images)
    with torch.no_grad():
        theirs = hf.bfloat16()(nchw(images).to(torch.bfloat16)).predicted_depth.float().numpy()
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    ours = run(TINY, jnp.bfloat16)(half, images)
    assert ours.dtype == jnp.float32
    assert np.abs(ours - exact).mean() < 1.5 * np.abs(theirs - exact).mean()


def test_published_parameter_count():
    config = ZoeDepthConfig()
    params = jax.eval_shape(ZoeDepth(config, jnp.float32).init, jax.random.key(0), jnp.zeros((1, 384, 384, 3)))
    ours = sum(leaf.size for leaf in jax.tree.leaves(params))
    with torch.device("meta"):
        hf = ZoeDepthForDepthEstimation(hf_config(config))
    assert ours == sum(p.numel() for p in hf.parameters())
    assert round(ours / 1e6) == 345


def test_image_smaller_than_its_border():
    with pytest.raises(InputError, match="image_size is 28"):
        estimate_depth(lambda x: x[..., 0], jnp.zeros((1, 28, 28, 3)))
