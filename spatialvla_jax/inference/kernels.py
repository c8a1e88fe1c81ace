"""The kernels of a decode pass for NVIDIA GPUs, in Pallas and Triton.

XLA launches several small kernels for the rotary embedding, cache and softmax of one to four tokens. It launches as
many for two norms and the sum between them. It also multiplies a few rows by a matrix below the memory's full
bandwidth. `decoder.forward` uses `attend_cached` where `can_attend`, and `multiply` and `multiply_and_add` where
`can_multiply`; elsewhere it uses the plain formulas. Without a GPU the kernels run in Pallas's interpreter.

Triton's array sizes are powers of two: elements beyond an axis are masked, or clamped and not written.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from spatialvla_jax.models.attention import Angles
from spatialvla_jax.models.fused_attention import MAX_SOFTCAP, dot

BLOCK = 32  # cache slots read at once; the cache's length is a multiple
PROGRAMS = 64  # a layer with fewer (batch, head) pairs than this also splits its cache over programs


def can_attend(qkv: Array, cache: tuple[Array, Array], softcap: float) -> bool:
    """Whether decoding should use `attend_cached`: bfloat16 on a GPU, up to four tokens, supported shapes."""
    (_, T, _, H), S = qkv.shape, cache[0].shape[1]
    suits = qkv.dtype == jnp.bfloat16 and T <= 4 and H in (32, 64, 128, 256) and S % BLOCK == 0
    return suits and softcap <= MAX_SOFTCAP and jax.default_backend() == "gpu"


def attend_cached(
    qkv: Float[Array, "B T heads H"],
    angles: Angles,
    mask: Bool[Array, "B T S"],
    cache: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]],
    at: Int[Array, ""] | int,
    *,
    scale: float,
    softcap: float,
    splits: int | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T N H"], tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]]:
    """→ (`attend` of the rotated queries on the cache with the T new keys and values, that cache).

    Rotary embedding, attention and the cache update are one in-place kernel. The soft cap, at most MAX_SOFTCAP, bounds
    the logits, so the softmax needs no maximum. A second kernel combines `splits` parts of the cache, by default enough
    to fill the GPU. S is a multiple of `BLOCK`.
    """
    (B, T, heads, H), (_, S, K, _) = qkv.shape, cache[0].shape
    N = heads - 2 * K
    rows = matrix_rows(T * N // K)
    splits = splits or (S // BLOCK if B * K < PROGRAMS else 1)
    assert S % (splits * BLOCK) == 0, f"a cache of {S} slots is not {splits} times blocks of {BLOCK}"
    new = jax.ShapeDtypeStruct((B, T, N, H), qkv.dtype)
    parts = [jax.ShapeDtypeStruct((splits, B, K, rows, *end), jnp.float32) for end in ((), (H,))]
    first = parts if splits > 1 else [new]
    options = call_options(interpret, warps=4, stages=3)
    *y, k, v = pl.pallas_call(
        partial(attend_kernel, scale, softcap, splits),
        grid=(B, K, splits),
        out_shape=[*first, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache)],
        input_output_aliases={5: len(first), 6: len(first) + 1},
        **options,
    )(qkv, *(x[:, :, 0] for x in angles), mask, jnp.reshape(jnp.asarray(at, jnp.int32), 1), *cache)
    if splits > 1:
        y = [pl.pallas_call(combine_kernel, grid=(B, T, N), out_shape=new, **options)(*y)]
    return y[0], (k, v)


def attend_kernel(
    scale: float, softcap: float, splits: int, qkv_ref, sin_ref, cos_ref, mask_ref, at_ref, k_ref, v_ref, *out_refs
) -> None:
    """One split of the cache, for one example's queries that share one key head."""
    (_, T, heads, H), (_, S, K, _), dtype = qkv_ref.shape, k_ref.shape, qkv_ref.dtype
    N = heads - 2 * K
    G, half, blocks, rows = N // K, H // 2, S // BLOCK // splits, matrix_rows(T * N // K)
    b, head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    *result_refs, k_out, v_out = out_refs
    start = at_ref[0]
    row, column = jnp.arange(rows), jnp.arange(half)
    token = jnp.minimum(row // G, T - 1)  # rows past the end repeat the last and are not written
    query = head * G + row % G
    sin, cos = (ref[b, token[:, None], column[None]] for ref in (sin_ref, cos_ref))
    q1, q2 = (qkv_ref[b, token[:, None], query[:, None], column[None] + i] for i in (0, half))
    q1, q2 = rotate(q1, q2, sin, cos)

    def block(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        total, out = sums
        first = (split * blocks + i) * BLOCK
        slots = first + jnp.arange(BLOCK)
        k1, k2 = (k_ref[b, pl.ds(first, BLOCK), head, pl.ds(j, half)] for j in (0, half))
        logits = dot(q1, k1.T) + dot(q2, k2.T)
        # Skip slots that are being written: another program may be writing them. They are read from `qkv` below.
        old = (slots < start) | (slots >= start + T)
        p = weigh(logits, mask_ref[b, token[:, None], slots[None]] & old[None], scale, softcap)
        v = v_ref[b, pl.ds(first, BLOCK), head, pl.ds(0, H)]
        return total + jnp.sum(p, axis=1), out + dot(p.astype(dtype), v)

    empty = jnp.zeros((rows,), jnp.float32), jnp.zeros((rows, H), jnp.float32)
    total, out = jax.lax.fori_loop(0, blocks, block, empty)
    for t in range(T):
        k1, k2 = (qkv_ref[b, t, N + head, pl.ds(i, half)] for i in (0, half))
        k1, k2 = rotate(k1, k2, sin_ref[b, t, pl.ds(0, half)], cos_ref[b, t, pl.ds(0, half)])
        v = qkv_ref[b, t, N + K + head, pl.ds(0, H)]
        products = q1.astype(jnp.float32) * k1.astype(jnp.float32) + q2.astype(jnp.float32) * k2.astype(jnp.float32)
        visible = mask_ref[b, token, jnp.full((rows,), start + t)] & (split == 0)
        p = weigh(jnp.sum(products, axis=1), visible, scale, softcap)
        total += p
        out += p.astype(dtype).astype(jnp.float32)[:, None] * v.astype(jnp.float32)
        for ref, i, value in ((k_out, 0, k1), (k_out, half, k2), (v_out, 0, v)):
            place = ref.at[b, start + t, head, pl.ds(i, len(value))]
            plgpu.store(place, value, mask=jnp.full(value.shape, split == 0))
    if splits > 1:
        totals, partial_sums = result_refs
        totals[split, b, head, :] = total
        partial_sums[split, b, head, :, :] = out
    else:
        (y_ref,) = result_refs
        place = y_ref.at[b, row[:, None] // G, query[:, None], jnp.arange(H)[None]]
        value = (out / jnp.maximum(total, 1e-30)[:, None]).astype(dtype)
        plgpu.store(place, value, mask=jnp.broadcast_to((row < T * G)[:, None], value.shape))


def combine_kernel(totals, partial_sums, y_ref) -> None:
    """One query head of one token: sums over all splits, then normalises."""
    (splits, _, K, _, H), N = partial_sums.shape, y_ref.shape[2]
    G = N // K
    b, t, n = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    part, column, row = jnp.arange(pl.next_power_of_2(splits)), jnp.arange(H), t * G + n % G
    exists = part < splits
    index = jnp.minimum(part, splits - 1)
    out = partial_sums[index[:, None], b, n // G, row, column[None]]
    total = jnp.sum(jnp.where(exists, totals[index, b, n // G, row], 0.0))
    y = jnp.sum(jnp.where(exists[:, None], out, 0.0), axis=0) / jnp.maximum(total, 1e-30)
    y_ref[b, t, n, :] = y.astype(y_ref.dtype)


def matrix_rows(rows: int) -> int:
    """Rows padded to what a matrix unit takes, at least 16."""
    return max(16, pl.next_power_of_2(rows))


def rotate(x1: Array, x2: Array, sin: Array, cos: Array) -> tuple[Array, Array]:
    """`attention.rotary` on the two halves of a head."""
    y1, y2 = x1.astype(jnp.float32), x2.astype(jnp.float32)
    return (y1 * cos - y2 * sin).astype(x1.dtype), (y2 * cos + y1 * sin).astype(x1.dtype)


def weigh(logits: Array, visible: Array, scale: float, softcap: float) -> Array:
    logits = softcap * jnp.tanh(logits * (scale / softcap))
    return jnp.where(visible, jnp.exp(logits), 0.0)


def call_options(interpret: bool | None, warps: int, stages: int) -> dict[str, Any]:
    """Options of `pallas_call`. By default kernels run in the interpreter without a GPU."""
    if interpret is None:
        interpret = jax.default_backend() != "gpu"
    return {"interpret": interpret, "compiler_params": plgpu.CompilerParams(num_warps=warps, num_stages=stages)}


class Tile(NamedTuple):
    """How `multiply` divides a matrix among programs: rows and columns per block, splits of the columns, and Triton's
    warps and pipeline stages."""

    rows: int
    columns: int
    splits: int = 1
    warps: int = 4
    stages: int = 4


ROWS = 16  # rows of x: the minimum of a matrix unit and the maximum of `multiply`


def tile_of(outputs: int, inputs: int, itemsize: int = 2) -> Tile:
    """Among the fastest tiles in benchmarks/matvec.py on an H100, for a matrix [outputs, inputs]."""
    columns = 256 // itemsize
    if inputs > 4096:
        return Tile(32, columns, splits=2, warps=2, stages=5)
    return Tile(32, columns, warps=2, stages=3) if outputs > 8192 else Tile(16, columns, warps=2, stages=5)


def can_multiply(x: Array, values: Array) -> bool:
    """Whether to use `multiply`: a few rows in bfloat16 on a GPU, and a matrix that the tiles divide."""
    (outputs, inputs), rows = values.shape, math.prod(x.shape[:-1])
    suits = x.dtype == jnp.bfloat16 and values.dtype in (jnp.bfloat16, jnp.int8)
    suits &= rows <= ROWS and outputs % 64 == 0 and inputs % 256 == 0
    return suits and jax.default_backend() == "gpu"


def multiply(
    x: Float[Array, "*B in"],
    matrix: Float[Array, "out in"] | Int[Array, "out in"],
    scale: Float[Array, " out"] | None = None,
    *,
    gated: bool = False,
    dtype: DTypeLike | None = None,
    tile: Tile | None = None,
    interpret: bool | None = None,
) -> Float[Array, "*B _"]:
    """x · matrixᵀ with output columns scaled by `scale`, in `dtype` (default: that of x), for at most `ROWS` rows of x.

    With `gated`, returns GELU of the first half of the outputs times the second half: [*B, out/2].
    """
    dtype = dtype or x.dtype
    y = _products(x, matrix, scale, gated, dtype, tile, interpret)
    y = y[0] if len(y) == 1 else jnp.sum(y, axis=0).astype(dtype)
    return y.reshape(*x.shape[:-1], -1)


def multiply_and_add(
    x: Float[Array, "*B in"],
    matrix: Float[Array, "out in"] | Int[Array, "out in"],
    scale: Float[Array, " out"] | None,
    residual: Float[Array, "*B out"],
    post: tuple[Float[Array, "_ out"], int],
    pre: tuple[Float[Array, "_ out"], int],
    *,
    tile: Tile | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "*B out"], Float[Array, "*B out"]]:
    """→ (r, rms_norm of r) with r = residual + rms_norm(`multiply`). Norm scales are given as (stack, row), because
    slicing the stack would copy."""
    dtype, (*_, D) = residual.dtype, residual.shape
    parts = _products(x, matrix, scale, False, dtype, tile, interpret)
    new = jax.ShapeDtypeStruct((parts.shape[1], D), dtype)
    total, y = pl.pallas_call(
        partial(norm_kernel, post[1], pre[1]),
        grid=new.shape[:1],
        out_shape=[new, new],
        **call_options(interpret, warps=8, stages=1),
    )(parts, residual.reshape(new.shape), post[0], pre[0])
    return total.reshape(residual.shape), y.reshape(residual.shape)


def norm_kernel(post: int, pre: int, parts_ref, x_ref, post_ref, pre_ref, sum_ref, y_ref) -> None:
    """One row. `post` and `pre` are the norms' rows in their stacks."""
    (parts, _, D), dtype = parts_ref.shape, sum_ref.dtype
    row, column = pl.program_id(0), jnp.arange(pl.next_power_of_2(D))
    exists = column < D

    def load(place: Any) -> Array:
        return plgpu.load(place, mask=exists, other=0.0).astype(jnp.float32)

    def norm(y: Array, factor: Array) -> Array:
        y = y.astype(jnp.float32)
        return (y * jax.lax.rsqrt(jnp.sum(y * y) / D + 1e-6) * (1 + factor)).astype(dtype)

    # Issue all loads first, so that none waits for a sum.
    y, *others = [load(parts_ref.at[part, row, column]) for part in range(parts)]
    x, factor, then = (load(ref.at[i, column]) for ref, i in ((x_ref, row), (post_ref, post), (pre_ref, pre)))
    for other in others:
        y += other
    total = (x + norm(y.astype(dtype), factor).astype(jnp.float32)).astype(dtype)
    plgpu.store(sum_ref.at[row, column], total, mask=exists)
    plgpu.store(y_ref.at[row, column], norm(total, then), mask=exists)


def _products(
    x: Float[Array, "*B in"],
    matrix: Float[Array, "both in"] | Int[Array, "both in"],
    scale: Float[Array, " both"] | None,
    gated: bool,
    dtype: DTypeLike,
    tile: Tile | None,
    interpret: bool | None,
) -> Float[Array, "splits R out"]:
    """The products of `multiply`, one summand per split; in `dtype` if there is one split, else float32."""
    x = x.reshape(-1, x.shape[-1])
    R, K = x.shape
    out = len(matrix) // (1 + gated)
    tile = tile or tile_of(len(matrix), K, matrix.dtype.itemsize)
    divides = K % (tile.splits * tile.columns) == 0 and out % tile.rows == 0
    assert R <= ROWS and divides and not (gated and tile.splits > 1), (x.shape, matrix.shape, tile)
    return pl.pallas_call(
        partial(multiply_kernel, tile, gated),
        grid=(out // tile.rows, tile.splits),
        out_shape=jax.ShapeDtypeStruct((tile.splits, R, out), dtype if tile.splits == 1 else jnp.float32),
        **call_options(interpret, tile.warps, tile.stages),
    )(x, matrix, *([] if scale is None else [scale]))


def multiply_kernel(tile: Tile, gated: bool, x_ref, matrix_ref, *refs) -> None:
    """All rows of x times one tile's rows and one split's columns of the matrix; with `gated`, also times the matching
    rows of the second half."""
    (*scale_ref, y_ref), (R, K), parts = refs, x_ref.shape, 1 + gated
    out, steps = matrix_ref.shape[0] // parts, K // tile.splits // tile.columns
    first, split = pl.program_id(0) * tile.rows, pl.program_id(1)
    row, column = jnp.arange(ROWS), jnp.arange(tile.columns)
    exists = (row < R)[:, None]

    def step(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        start = split * (K // tile.splits) + i * tile.columns
        mask = jnp.broadcast_to(exists, (ROWS, tile.columns))
        block = plgpu.load(x_ref.at[row[:, None], start + column[None]], mask=mask, other=0.0)
        totals = []
        for part, total in enumerate(sums):
            weights = matrix_ref[pl.ds(part * out + first, tile.rows), pl.ds(start, tile.columns)]
            totals.append(total + dot(block, weights.astype(block.dtype).T))
        return tuple(totals)

    sums = jax.lax.fori_loop(0, steps, step, (jnp.zeros((ROWS, tile.rows), jnp.float32),) * parts)
    for ref in scale_ref:
        sums = tuple(y * ref[pl.ds(i * out + first, tile.rows)][None] for i, y in enumerate(sums))
    y = jax.nn.gelu(sums[0], approximate=True) * sums[1] if gated else sums[0]
    place = y_ref.at[split, row[:, None], first + jnp.arange(tile.rows)[None]]
    plgpu.store(place, y.astype(y_ref.dtype), mask=jnp.broadcast_to(exists, y.shape))
