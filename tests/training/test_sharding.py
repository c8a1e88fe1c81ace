import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.batches import GRID, random_batch
from helpers.setups import setup_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spatialvla_jax.errors import InputError
from spatialvla_jax.models import SpatialVLA, preset
from spatialvla_jax.models.activation_sharding import constrain_batch
from spatialvla_jax.training.sharding import BATCH, cast_split, check_batch, like_params, make_mesh, on_mesh
from spatialvla_jax.training.state import init_params, init_state
from spatialvla_jax.training.step import jit_train_step, loss_and_metrics, prepare


def losses(mesh_shape: dict[str, int], devices: int, *, steps: int = 20, **train: int) -> list[float]:
    mesh = make_mesh(mesh_shape, jax.devices()[:devices])
    setup = setup_of(mesh, augment=True, train={"steps": steps} | train, learning_rate=1e-3)
    model = setup.model
    state, shardings = init_state(setup)
    step, batch_sharding = jit_train_step(setup, shardings), NamedSharding(mesh, BATCH)
    out = []
    for i in range(steps):
        state, metrics = step(state, jax.device_put(random_batch(model, 8, i), batch_sharding), GRID, setup.scalars)
        out.append(float(metrics["loss"]))
    return out


@pytest.fixture(scope="module")
def one_device() -> list[float]:
    return losses({"data": 1, "fsdp": 1, "tensor": 1}, 1)


def test_eight_devices_give_the_losses_of_one(one_device: list[float]) -> None:
    eight = losses({"data": 2, "fsdp": 2, "tensor": 2}, 8)
    np.testing.assert_allclose(eight, one_device, atol=1e-4)
    assert one_device[-1] < one_device[0]


@pytest.mark.slow
def test_accumulation_gives_the_losses_of_the_whole_batch(one_device: list[float]) -> None:
    np.testing.assert_allclose(losses({"data": 2}, 2, grad_accum_steps=4, steps=20), one_device, atol=1e-4)


@pytest.mark.slow
def test_gathering_once_gives_the_losses_of_one_device(one_device: list[float]) -> None:
    once = losses({"fsdp": 2, "tensor": 2}, 4, gather_once=True, grad_accum_steps=2)
    np.testing.assert_allclose(once, one_device, atol=1e-4)


def test_casting_once_gives_the_gradients_of_casting_every_layer() -> None:
    """In bfloat16 on one device: either way, each matrix's gradient is a product's result in bfloat16."""

    def gradients(once: bool) -> dict[str, np.ndarray]:
        mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
        setup = setup_of(mesh, train={"steps": 1, "gather_once": once})
        model = SpatialVLA(replace(setup.model.config, dtype="bfloat16", remat="dots"))
        params, batch = init_params(model, 0), prepare(random_batch(model, 4, 0), None, None)

        def loss(params):
            params = cast_split(params, "bfloat16", setup.gather_once)
            return loss_and_metrics(model, params, batch, GRID)[0].mean()

        return flatten_dict(jax.jit(jax.grad(on_mesh(loss, mesh)))(params), sep="/")

    every, once = gradients(False), gradients(True)
    for name, gradient in every.items():
        assert once[name].dtype == gradient.dtype == np.float32
        np.testing.assert_array_equal(once[name], gradient, name)


def test_the_heads_gradient_is_row_major_on_gpus() -> None:
    """Without replicas, and without gathering the gradient for it."""
    head = jax.ShapeDtypeStruct((6, 8), jnp.float32)

    def lowered(platform: str, **shape: int) -> str:
        mesh = make_mesh(shape)
        loss = on_mesh(lambda p: cast_split({"llm": {"lm_head": p}}, jnp.bfloat16)["llm"]["lm_head"].sum(), mesh)
        return jax.jit(jax.grad(loss)).trace(head).lower(lowering_platforms=(platform,)).as_text()

    assert lowered("cuda", fsdp=8).count("LayoutConstraint") == 1
    assert "LayoutConstraint" not in lowered("tpu", fsdp=8) + lowered("cuda", data=2, fsdp=4)


def test_full_size_parameters_are_split() -> None:
    """On fsdp 4 × tensor 2, a device holds an eighth of everything but the published model's norms and biases."""
    model = SpatialVLA(preset("spatialvla-4b-224", depth_source="dataset"))
    params = jax.eval_shape(lambda: init_params(model, 0))
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    flat = flatten_dict(like_params(params, params, mesh), sep="/")
    whole = {k: v.size for k, v in flatten_dict(params, sep="/").items()}
    held = {k: np.prod(flat[k].shard_shape(v.shape)) for k, v in flatten_dict(params, sep="/").items()}
    tables = ("llm/embedder/input_embedding", "llm/lm_head", "spatial_embedding")  # split only over fsdp
    layers = [k for k in whole if whole[k] > 5e6 and k not in tables and k != "img/head/kernel"]
    assert layers and all(held[k] * 8 == whole[k] for k in layers)
    assert all(held[k] * 4 == whole[k] for k in tables)
    assert sum(held.values()) < 0.22 * sum(whole.values())


def test_split_matrices_alone_are_cast() -> None:
    """Matrices are gathered in the computation's dtype. Lookup tables, norms and biases stay float32. On one device,
    the same matrices are cast if casting happens once per step."""
    model = SpatialVLA(preset("nano", spatial_tokens=GRID.vocab_size))
    params = jax.eval_shape(lambda: init_params(model, 0))

    def dtypes(fsdp: int, gather: bool = False) -> dict[str, str]:
        mesh = make_mesh({"fsdp": fsdp}, jax.devices()[:fsdp])
        cast = jax.eval_shape(on_mesh(lambda p: cast_split(p, jnp.bfloat16, gather), mesh), params)
        return {k: str(v.dtype) for k, v in flatten_dict(cast, sep="/").items()}

    assert set(dtypes(1).values()) == {"float32"}
    assert dtypes(1, gather=True) == dtypes(4) == dtypes(4, gather=True)
    cast = {k for k, v in dtypes(4).items() if v == "bfloat16"}
    assert {"llm/lm_head", "img/head/kernel", "llm/layers/mlp/linear", "llm/layers/attn/q_einsum/w"} <= cast
    assert not any(re.search("norm|Norm|bias|input_embedding|spatial_embedding|ego3d|pos_embedding", k) for k in cast)


def test_the_batch_is_pinned_on_a_mesh_alone() -> None:
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    x = jnp.zeros((8, 3))

    def sharding(*extra: str, rows: int = 8):
        pinned = jax.jit(on_mesh(lambda x: constrain_batch(x, *extra), mesh), in_shardings=NamedSharding(mesh, P()))
        return pinned(x[:rows]).sharding.shard_shape((rows, 3))

    assert sharding() == (2, 3) and sharding("tensor") == (1, 3)
    assert sharding("tensor", rows=4) == (1, 3)  # does not divide by 8: only the batch axes
    assert constrain_batch(x, "tensor") is x


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 3}, "does not fit 8 devices"),
        ({"data": 3, "fsdp": -1}, "does not fit 8 devices"),
        ({"data": 0, "fsdp": -1}, "does not fit 8 devices"),
        ({"pipeline": 8}, "has no axis 'pipeline'"),
    ],
)
def test_bad_mesh(shape: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_mesh(shape)


def test_bad_batch() -> None:
    mesh = make_mesh({"data": 2, "fsdp": 4})
    check_batch(16, 2, mesh)
    with pytest.raises(InputError, match="batch_size 12 does not divide"):
        check_batch(12, 1, mesh)
