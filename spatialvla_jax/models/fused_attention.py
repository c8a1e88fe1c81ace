"""Attention with a soft cap in one kernel, for training and prefill on NVIDIA GPUs (Pallas through Triton).

XLA writes the logits, float32[B, N, T, S], to memory several times, and cuDNN has no tanh soft cap. Here, as in flash
attention (Dao 2023), they stay in registers. The cap simplifies this: logits lie in [−cap, cap], so exp needs no
running maximum. With t = tanh(scale / cap · q·k):

    p = exp(cap · t) where the mask is true, else 0;  z = 1 / Σ p;  out = z Σ p v
    delta = dout·out;  ds = z p (dout·v − delta) (1 − t²)
    dv = Σ z p dout;  dq = scale Σ ds k;  dk = scale Σ ds q

Every sum stays in one program and in a fixed order, without atomics: the same inputs give the same bits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from spatialvla_jax.models.activation_sharding import BATCH_AXES, batch_splits

# Outputs of the forward kernel that the backward kernels need; `models.remat` saves them.
SAVED = ("fused_attention_out", "fused_attention_z")
MAX_SOFTCAP = 80.0  # exp(80) and sums of it are finite in float32, and exp(−80) is a normal number


def dot(a: Array, b: Array) -> Array:
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class Tile:
    """Queries × keys per program, and Triton's number of warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """One tile per kernel."""

    forward: Tile
    dkv: Tile
    dq: Tile


def tiles_for(head_dim: int) -> Tiles:
    """Tiles for which several programs share a multiprocessor's 227 KB and accumulators fit in registers (on an
    H100)."""
    if head_dim > 128:
        return Tiles(Tile(64, 32, 4, 2), Tile(64, 64, 8, 2), Tile(64, 32, 4, 1))
    return Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 3))


def can_fuse(q: Array, k: Array, softcap: float) -> bool:
    """Whether `attend` should use `attend_fused`: bfloat16 on a GPU, more than one query, supported shapes.

    On a mesh, the batch must be divisible by the batch axes, and all other axes must have size 1.
    """
    B, T, _, H = q.shape
    suits = q.dtype == k.dtype == jnp.bfloat16 and T > 1 and H in (16, 32, 64, 128, 256)
    mesh = jax.sharding.get_abstract_mesh()
    fits = mesh.empty or (mesh.size == batch_splits(mesh) and B % mesh.size == 0)
    return suits and softcap <= MAX_SOFTCAP and fits and jax.default_backend() == "gpu"


def attend_fused(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float,
    tiles: Tiles | None = None,
    interpret: bool | None = None,
) -> Float[Array, "B T N H"]:
    """`attention.attend` in one kernel, differentiable in q, k and v. Rows without a visible key give 0.

    H is a power of two from 16, `softcap` at most MAX_SOFTCAP, T and S arbitrary. Products are in q's dtype, summed in
    float32. By default the kernels run in interpreter mode where there is no GPU.
    """
    if interpret is None:
        interpret = jax.default_backend() != "gpu"
    call = Call(scale, softcap, tiles or tiles_for(q.shape[-1]), interpret)
    return fused(call, q, k, v, mask.astype(jnp.int8))


@dataclass(frozen=True)
class Call:
    """The static arguments of a call."""

    scale: float
    softcap: float
    tiles: Tiles
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused(call: Call, q: Array, k: Array, v: Array, mask: Array) -> Array:
    return forward(call, q, k, v, mask)[0]


def forward(call: Call, q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    out, z = on_shards(partial(run_forward, call))(q, k, v, mask)
    out, z = checkpoint_name(out, SAVED[0]), checkpoint_name(z, SAVED[1])
    return out, (q, k, v, mask, out, z)


def backward(call: Call, saved: tuple[Array, ...], dout: Array) -> tuple[Array | None, ...]:
    return (*on_shards(partial(run_backward, call))(*saved, dout), None)


fused.defvjp(forward, backward)


def on_shards(run: Callable[..., Any]) -> Callable[..., Any]:
    """On a mesh, run on each device's shard of the batch: the compiler cannot partition a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run
    return jax.shard_map(run, in_specs=P(BATCH_AXES), out_specs=P(BATCH_AXES), check_vma=False)


def specs_by_queries(q: Array, k: Array) -> tuple[pl.BlockSpec, ...]:
    """Specs of queries, keys, mask and numbers per query, for programs (block of queries, head, example)."""
    (_, T, N, H), (_, S, K, _) = q.shape, k.shape
    return (
        pl.BlockSpec((None, T, None, H), lambda t, n, b: (b, 0, n, 0)),
        pl.BlockSpec((None, S, None, H), lambda t, n, b: (b, 0, n // (N // K), 0)),
        pl.BlockSpec((None, T, S), lambda t, n, b: (b, 0, 0)),
        pl.BlockSpec((None, None, T), lambda t, n, b: (b, n, 0)),
    )


def run_forward(call: Call, q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    """(out [B, T, N, H], z float32[B, N, T])"""
    B, T, N, _ = q.shape
    tile, (queries, keys, whole, rows) = call.tiles.forward, specs_by_queries(q, k)
    return pl.pallas_call(
        partial(forward_kernel, call),
        grid=(pl.cdiv(T, tile.queries), N, B),
        in_specs=[queries, keys, keys, whole],
        out_specs=[queries, rows],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        **options(call, tile, "attention_forward"),
    )(q, k, v, mask)


def run_backward(
    call: Call, q: Array, k: Array, v: Array, mask: Array, out: Array, z: Array, dout: Array
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv), shaped like q, k and v."""
    delta = jnp.einsum("btnh,btnh->bnt", dout, out, preferred_element_type=jnp.float32)
    inputs = (q, k, v, mask, z, delta, dout)
    return run_dq(call, *inputs), *run_dkv(call, *inputs)


def run_dq(call: Call, q: Array, k: Array, v: Array, mask: Array, z: Array, delta: Array, dout: Array) -> Array:
    B, T, N, _ = q.shape
    tile, (queries, keys, whole, rows) = call.tiles.dq, specs_by_queries(q, k)
    return pl.pallas_call(
        partial(dq_kernel, call),
        grid=(pl.cdiv(T, tile.queries), N, B),
        in_specs=[queries, keys, keys, whole, rows, rows, queries],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        **options(call, tile, "attention_dq"),
    )(q, k, v, mask, z, delta, dout)


def run_dkv(
    call: Call, q: Array, k: Array, v: Array, mask: Array, z: Array, delta: Array, dout: Array
) -> tuple[Array, Array]:
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    tile, G = call.tiles.dkv, N // K
    keys = pl.BlockSpec((None, S, None, H), lambda s, n, b: (b, 0, n, 0))
    queries = pl.BlockSpec((None, T, G, H), lambda s, n, b: (b, 0, n, 0))  # of all heads that share these keys
    rows = pl.BlockSpec((None, G, T), lambda s, n, b: (b, n, 0))
    whole = pl.BlockSpec((None, T, S), lambda s, n, b: (b, 0, 0))
    return pl.pallas_call(
        partial(dkv_kernel, call),
        grid=(pl.cdiv(S, tile.keys), K, B),
        in_specs=[queries, keys, keys, whole, rows, rows, queries],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        **options(call, tile, "attention_dkv"),
    )(q, k, v, mask, z, delta, dout)


def options(call: Call, tile: Tile, name: str) -> dict[str, Any]:
    params = triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    return {"compiler_params": params, "interpret": call.interpret, "name": name}


def forward_kernel(call: Call, q_ref, k_ref, v_ref, mask_ref, out_ref, z_ref) -> None:
    """Processes one block of queries of one head."""
    (T, H), S, tile = q_ref.shape, k_ref.shape[0], call.tiles.forward
    at = pl.program_id(0) * tile.queries
    q = load(q_ref, (at, tile.queries, T))

    def add(i, sums):
        total, out = sums
        here = (i * tile.keys, tile.keys, S)
        k, v = load(k_ref, here), load(v_ref, here)
        p, _ = weights(call, q, k, load(mask_ref, (at, tile.queries, T), here))
        return total + jnp.sum(p, axis=1), out + dot(p.astype(v.dtype), v)

    zeros = jnp.zeros(tile.queries, jnp.float32), jnp.zeros((tile.queries, H), jnp.float32)
    total, out = jax.lax.fori_loop(0, pl.cdiv(S, tile.keys), add, zeros)
    z = jnp.where(total > 0, 1 / total, 0.0)
    store(out_ref, out * z[:, None], (at, tile.queries, T))
    store(z_ref, z, (at, tile.queries, T))


def dq_kernel(call: Call, q_ref, k_ref, v_ref, mask_ref, z_ref, delta_ref, dout_ref, dq_ref) -> None:
    """Processes one block of queries of one head."""
    (T, H), S, tile = q_ref.shape, k_ref.shape[0], call.tiles.dq
    block = (pl.program_id(0) * tile.queries, tile.queries, T)
    q, dout = load(q_ref, block), load(dout_ref, block)
    z, delta = load(z_ref, block), load(delta_ref, block)

    def add(i, dq):
        here = (i * tile.keys, tile.keys, S)
        k, v = load(k_ref, here), load(v_ref, here)
        p, slope = weights(call, q, k, load(mask_ref, block, here))
        ds = p * z[:, None] * (dot(dout, v.T) - delta[:, None]) * slope
        return dq + dot(ds.astype(k.dtype), k)

    dq = jax.lax.fori_loop(0, pl.cdiv(S, tile.keys), add, jnp.zeros((tile.queries, H), jnp.float32))
    store(dq_ref, call.scale * dq, block)


def dkv_kernel(call: Call, q_ref, k_ref, v_ref, mask_ref, z_ref, delta_ref, dout_ref, dk_ref, dv_ref) -> None:
    """Processes one block of keys of one head, over all queries of the heads that share them.

    Weights are keys × queries here, so that products chain without a transpose.
    """
    (T, G, H), S, tile = q_ref.shape, k_ref.shape[0], call.tiles.dkv
    block = (pl.program_id(0) * tile.keys, tile.keys, S)
    k, v = load(k_ref, block), load(v_ref, block)
    blocks = pl.cdiv(T, tile.queries)

    def add(i, sums):
        dk, dv = sums
        head = jax.lax.div(i, blocks)
        here = (jax.lax.rem(i, blocks) * tile.queries, tile.queries, T)
        q, dout = load(q_ref, here, head), load(dout_ref, here, head)
        z, delta = load(z_ref, head, here), load(delta_ref, head, here)
        p, slope = weights(call, k, q, load(mask_ref, here, block).T)
        p *= z[None, :]
        dv += dot(p.astype(dout.dtype), dout)
        ds = p * (dot(v, dout.T) - delta[None, :]) * slope
        return dk + dot(ds.astype(q.dtype), q), dv

    zeros = jnp.zeros((tile.keys, H), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, G * blocks, add, (zeros, zeros))
    store(dk_ref, call.scale * dk, block)
    store(dv_ref, dv, block)


def weights(call: Call, a: Array, b: Array, mask: Array) -> tuple[Array, Array]:
    """(p, 1 − t²) for the rows of a and b, float32.

    Computes tanh by exp2, as libdevice's tanh is slow. Its error is below 1e-7, so p's is below 1e-5 at a cap of 50.
    """
    rate = 2 * call.scale / call.softcap * math.log2(math.e)
    t = 1 - 2 / (1 + jnp.exp2(rate * dot(a, b.T)))
    return jnp.where(mask != 0, jnp.exp2(call.softcap * math.log2(math.e) * t), 0.0), 1 - t * t


# Each index of `load` and `store` is a block (start, size, length of the axis) or a single position.


def load(ref, *index) -> Array:
    """A block of `ref`, padded with zeros beyond the end."""
    inside = bounds(ref, index)
    return triton.load(ref.at[slices(index)], mask=inside, other=None if inside is None else 0)


def store(ref, x: Array, *index) -> None:
    triton.store(ref.at[slices(index)], x.astype(ref.dtype), mask=bounds(ref, index))


def slices(index):
    return tuple(pl.ds(i[0], i[1]) if isinstance(i, tuple) else i for i in index)


def bounds(ref, index):
    """Which elements of a block exist; None, which loads faster, where blocks divide the axes evenly."""
    spans = [i for i in index if isinstance(i, tuple)]
    rank = len(spans) + ref.ndim - len(index)
    inside = None
    for axis, (start, size, length) in enumerate(spans):
        if length % size:
            shape = [1] * rank
            shape[axis] = size
            exists = (start + jnp.arange(size) < length).reshape(shape)
            inside = exists if inside is None else inside & exists
    return inside
