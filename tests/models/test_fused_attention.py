"""Fused attention, interpreted, compared with XLA's: values, gradients, remat, meshes; and whether it lowers for a
GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gpu import h100
from jax.sharding import NamedSharding

from spatialvla_jax.models import fused_attention
from spatialvla_jax.models.attention import attend
from spatialvla_jax.models.fused_attention import Tile, Tiles, attend_fused, can_fuse
from spatialvla_jax.models.gemma2 import Gemma2, Gemma2Config
from spatialvla_jax.training.sharding import BATCH, make_mesh, on_mesh

SMALL = Tiles(Tile(16, 32, 4, 2), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1))


def draw(B, T, S, N, K, H, *, seed=0, dtype=jnp.float32):
    """Queries, keys, values, a mask whose first row sees nothing in every example, and an output gradient."""
    rng = np.random.default_rng(seed)
    q, k, v, dout = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in [(B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)]
    )
    mask = rng.random((B, T, S)) < 0.6
    mask[:, :, 0] = True
    mask[:, 0] = False
    return q, k, v, jnp.asarray(mask), dout


@partial(jax.jit, static_argnums=0)
def values(function, q, k, v, mask, dout):
    """The output and the gradients in q, k and v."""
    out, vjp = jax.vjp(lambda *x: function(*x, mask), q, k, v)
    return out, *vjp(dout)


def plain(q, k, v, mask, **options):
    """XLA's attention in float32; 0 for rows that see nothing."""
    out = attend(*(x.astype(jnp.float32) for x in (q, k, v)), mask, **options)
    return jnp.where(mask.any(axis=2)[:, :, None, None], out, 0)


def assert_alike(inputs, tolerance, *, tiles=SMALL, **options):
    fused = values(partial(attend_fused, tiles=tiles, **options), *inputs)
    expected = values(partial(plain, **options), *inputs[:-1], inputs[-1].astype(jnp.float32))
    for name, x, y in zip(("out", "dq", "dk", "dv"), fused, expected, strict=True):
        assert x.dtype == inputs[0].dtype
        error = np.abs(np.asarray(x, np.float32) - np.asarray(y, np.float32)).max() / np.abs(np.asarray(y)).max()
        assert error < tolerance, (name, error)
    assert not np.any(np.asarray(fused[0][:, 0], np.float32)) and not np.any(np.asarray(fused[1][:, 0], np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "S", "N", "K", "strength", "softcap"),
    [(40, 33, 2, 1, 1.0, 50.0), (16, 32, 4, 2, 30.0, 5.0), (7, 50, 3, 1, 0.1, 0.5)],
)
def test_values_and_gradients(T, S, N, K, strength, softcap):
    """Lengths that fill blocks and others that do not, grouped heads, logits from far below to far above the cap."""
    assert_alike(draw(2, T, S, N, K, 16), 3e-5, scale=strength / 4, softcap=softcap)


@pytest.mark.gpu
def test_bfloat16():
    """Within the products' rounding errors, with the tiles of Gemma 2 2B."""
    tiles = fused_attention.tiles_for(256)
    assert_alike(draw(1, 70, 70, 2, 1, 256, dtype=jnp.bfloat16), 2e-2, tiles=tiles, scale=1 / 16, softcap=50.0)


@pytest.mark.gpu
def test_logits_at_the_cap():
    """All logits are at ±cap: nothing overflows, and the weights are right."""
    q, k, v, mask, dout = draw(1, 20, 20, 1, 1, 16)
    inputs = (1e3 * q, 1e3 * k, v, mask, dout)
    fused = values(partial(attend_fused, tiles=SMALL, scale=1.0, softcap=80.0), *inputs)
    expected = values(partial(plain, scale=1.0, softcap=80.0), *inputs)
    for x, y in zip(fused, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


def count(jaxpr, name: str) -> int:
    """Kernel calls in a jaxpr and its inner ones, without those whose results are unused: XLA removes them."""
    used = {id(x) for x in [*jaxpr.outvars, *(x for eqn in jaxpr.eqns for x in eqn.invars)]}
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            total += eqn.params["name"] == name and any(id(x) in used for x in eqn.outvars)
        else:
            inner = [getattr(p, "jaxpr", p) for p in eqn.params.values()]
            total += sum(count(j, name) for j in inner if hasattr(j, "eqns"))
    return total


@pytest.mark.gpu
@pytest.mark.parametrize(("remat", "forwards"), [("none", 1), ("dots", 1), ("full", 2)])
def test_a_rematerialised_layer(monkeypatch, remat, forwards):
    """The policy `dots` saves the forward kernel's outputs, and `full` reruns it; both give XLA's gradients."""
    config = Gemma2Config(11, width=16, depth=2, mlp_dim=8, num_heads=2, num_kv_heads=1, head_dim=16)
    model = Gemma2(config, jnp.dtype("float32"), remat)
    x, positions = (
        jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 16)), jnp.float32),
        jnp.arange(9)[None].repeat(2, axis=0),
    )
    mask = jnp.tri(9, dtype=bool)[None].repeat(2, axis=0)
    variables = jax.jit(model.init)(jax.random.key(0), x, positions, mask)

    def gradient(variables):
        return jax.grad(lambda v: jnp.sum(jnp.square(model.apply(v, x, positions, mask)) * x))(variables)

    expected = jax.jit(gradient)(variables) if remat == "dots" else None
    monkeypatch.setattr("spatialvla_jax.models.attention.can_fuse", lambda *_: True)
    fused = lambda variables: gradient(variables)  # noqa: E731  (traced anew)
    jaxpr = jax.make_jaxpr(fused)(variables).jaxpr
    assert [count(jaxpr, f"attention_{name}") for name in ("forward", "dq", "dkv")] == [forwards, 1, 1]
    if remat == "dots":
        got = jax.jit(fused)(variables)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)


def test_on_a_mesh():
    """Every device runs only its part of the batch."""
    mesh = make_mesh({"data": 2, "fsdp": 4})
    inputs = draw(8, 6, 6, 2, 1, 16)
    options = {"scale": 0.25, "softcap": 50.0, "tiles": SMALL}
    expected = values(partial(attend_fused, **options), *inputs)
    split = jax.device_put(inputs, NamedSharding(mesh, BATCH))
    compiled = jax.jit(on_mesh(partial(values, partial(attend_fused, **options)), mesh)).lower(*split).compile()
    assert "all-gather" not in compiled.as_text() and "all-reduce" not in compiled.as_text()
    for x, y in zip(compiled(*split), expected, strict=True):
        assert x.sharding.shard_shape(x.shape)[0] == 1
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_when_it_is_used(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def used(B=8, T=9, H=64, dtype=jnp.bfloat16, softcap=50.0, **mesh):
        q, k = jax.ShapeDtypeStruct((B, T, 8, H), dtype), jax.ShapeDtypeStruct((B, T, 4, H), dtype)
        check = lambda: can_fuse(q, k, softcap)  # noqa: E731
        return on_mesh(check, make_mesh(mesh))() if mesh else check()

    assert used() and used(H=256) and used(data=2, fsdp=4)
    assert not (used(T=1) or used(H=72) or used(H=8) or used(dtype=jnp.float32) or used(softcap=100.0))
    assert not (used(B=4, fsdp=8) or used(fsdp=4, tensor=2))


@pytest.mark.parametrize(("B", "T", "H"), [(32, 320, 256), (128, 301, 64)])
def test_lowers_for_a_gpu(B, T, H):
    """Both model sizes compile to Triton code; benchmarks/attention.py shows what the GPU makes of it."""
    q, k = jax.ShapeDtypeStruct((B, T, 8, H), jnp.bfloat16), jax.ShapeDtypeStruct((B, T, 4, H), jnp.bfloat16)
    run = partial(values, partial(attend_fused, scale=1 / 16, softcap=50.0, interpret=False))
    args = (q, k, k, jax.ShapeDtypeStruct((B, T, T), bool), q)
    with jax.sharding.use_abstract_mesh(h100()):
        text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 3, "forward, dq, dkv"
