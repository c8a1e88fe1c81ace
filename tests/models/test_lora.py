"""Low-rank adapters: the published layers, each adapted separately; no change at initialisation."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatialvla_jax.actions import PRETRAIN_GAUSSIANS, gaussian_grid
from spatialvla_jax.batch import Batch, example_inputs
from spatialvla_jax.checkpoints.mapping import flatten, param_shapes, slots, unflatten
from spatialvla_jax.checkpoints.peft import adapter_rules
from spatialvla_jax.config import default_config
from spatialvla_jax.errors import InputError
from spatialvla_jax.models import SpatialVLA, preset
from spatialvla_jax.models.linear import linear
from spatialvla_jax.models.lora import LINEAR, adapter_shapes, init_adapters, merge_adapters, product, put_beside
from spatialvla_jax.training.flops import product_flops
from spatialvla_jax.training.setup import make_setup
from spatialvla_jax.training.sharding import make_mesh
from spatialvla_jax.training.state import abstract_state
from spatialvla_jax.training.step import make_train_step

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
    assert np.std(a) == pytest.approx(1 / 4, rel=0.05)  # as in the release: a normal with deviation 1 / rank


def test_every_published_layer_gets_its_own_product(params) -> None:
    """W + scale · B A computed on the PyTorch tensors, one layer at a time; keys, values, gate and up separately."""
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
    """rank · (in + out) of every linear layer, as `peft` counts them, with the sizes in the paper."""
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


@pytest.mark.parametrize(
    ("equation", "kernel"),
    [
        ("btd,ndh->btnh", "llm/layers/attn/q_einsum/w"),
        ("btd,ckdh->cbtkh", "llm/layers/attn/kv_einsum/w"),
        ("btnh,nhd->btd", "llm/layers/attn/attn_vec_einsum/w"),
        ("btf,fd->btd", "llm/layers/mlp/linear"),
        ("bpd,dnh->bpnh", "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"),
    ],
)
def test_adapters_get_the_gradients_of_the_sum_without_that_of_the_weight(equation: str, kernel: str) -> None:
    """Compared with autodiff through W + B A."""
    rng = np.random.default_rng(2)
    layer = {path: shape[1:] for path, shape in SHAPES.items() if path == kernel}
    w = rng.normal(size=layer[kernel]).astype(np.float32)
    shapes = {path: shape[1:] for path, shape in adapter_shapes(SHAPES, 3, (kernel,)).items()}
    a, b = (rng.normal(size=shapes[f"{kernel}/{x}"]).astype(np.float32) for x in "ab")
    x_axes, w_axes = equation.split("->")[0].split(",")
    sizes = dict(zip(w_axes, w.shape, strict=True)) | {"b": 2, "t": 5, "p": 5}
    x = rng.normal(size=[sizes[i] for i in x_axes]).astype(np.float32)
    weights = rng.normal(size=jnp.einsum(equation, x, w).shape)

    def beside(x, a, b):
        merged = jax.lax.stop_gradient(w + product(kernel, a[None], b[None])[0])
        return (linear(equation, x, merged, {"a": a, "b": b}) * weights).sum()

    def through_the_sum(x, a, b):
        return (jnp.einsum(equation, x, w + product(kernel, a[None], b[None])[0]) * weights).sum()

    gradients = (jax.jit(jax.grad(f, (0, 1, 2)))(x, a, b) for f in (beside, through_the_sum))
    for got, want in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_a_training_step_of_adapters_has_no_gradient_of_a_frozen_weight() -> None:
    """Counts the FLOPs of products in the traced step, which `dots` saves and `full` recomputes."""
    grid = gaussian_grid(PRETRAIN_GAUSSIANS, (2,) * 6)  # a small head, whose gradient neither step needs

    def flops(rank: int, remat: str) -> float:
        config = default_config()
        config.model.update(preset="nano", depth_source="none", remat=remat)
        config.lora.rank = rank
        setup = make_setup(config, grid, make_mesh({"data": 1}, jax.devices()[:1]), text_vocab=256)
        state, _ = abstract_state(setup)
        batch = Batch.abstract(setup.model.config, 2, grid.action_dim)
        return product_flops(jax.make_jaxpr(make_train_step(setup))(state, batch, grid, setup.scalars).jaxpr)

    whole, low_rank = flops(0, "dots"), flops(1, "dots")
    assert low_rank < 0.85 * whole and low_rank < 0.9 * flops(1, "full")


@pytest.mark.slow
def test_the_model_has_the_same_gradients_with_adapters_beside_its_weights(params) -> None:
    """Loss and gradients of a and b in the whole model, compared with autodiff through the merged weights."""
    model = SpatialVLA(NANO)
    rng = np.random.default_rng(3)
    drawn = {p: 0.1 * rng.normal(size=s).astype(np.float32) for p, s in adapter_shapes(SHAPES, 2, ALL).items()}
    S = NANO.img.image_size
    inputs = example_inputs(NANO) | {"intrinsics": np.array([[[S, 0, S / 2], [0, S, S / 2], [0, 0, 1]]], np.float32)}
    small = jax.tree.map(lambda x: 0.05 * x, params)

    def loss(adapters, how):
        logits = model.apply({"params": how(small | {"lora": unflatten(adapters)}, 0.5)}, **inputs)
        return jax.nn.logsumexp(logits, axis=-1).mean() - logits[..., 7].mean()

    @jax.jit
    def both(adapters):
        return [jax.value_and_grad(loss)(adapters, how) for how in (merge_adapters, put_beside)]

    (value, want), (same, got) = both(drawn)
    assert float(same) == pytest.approx(float(value), rel=1e-6)
    for path, gradient in want.items():
        np.testing.assert_allclose(got[path], gradient, atol=1e-3 * np.abs(gradient).max(), err_msg=path)
        assert np.abs(gradient).max() > 0, path
