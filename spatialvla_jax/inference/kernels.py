"""Kernels of a decode pass for NVIDIA GPUs, through Pallas and Triton.

A pass over one to four tokens is as fast as its weights are read and as its small kernels are few; XLA needs about ten
a layer besides the products. `decoder.forward` takes these where `available` says so, and the plain formulas, which
they are tested against, elsewhere. Outside a GPU they run in Pallas's interpreter.

Triton's arrays have powers of two for sizes: what is larger than an axis is masked, or clamped and not written.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

MAX_TOKENS = 4  # of an `attend_cached`, and rows of an `int8_linear`: more are better served by XLA's products
BLOCK = 32  # slots of the cache that are read at once; its length is a multiple
PROGRAMS = 64  # a layer with fewer (batch, head) pairs than this spreads its cache over programs, too


def available(dtype: Any, head_dim: int) -> bool:
    """Whether a model of this computation dtype is decoded by these kernels by default."""
    return jax.default_backend() == "gpu" and dtype == jnp.bfloat16 and head_dim >= 32 and not head_dim & (head_dim - 1)


def attend_cached(
    qkv: Float[Array, "B T N+2*K H"],
    angles: tuple[Float[Array, "B T 1 H/2"], Float[Array, "B T 1 H/2"]],
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

    Rotary, attention and the update in one kernel, in place. The soft cap bounds the logits, so that the softmax needs
    no maximum: e^50 is far from the end of float32. `splits` parts of the cache, by default as many as fill the GPU,
    are combined in a second kernel. S is a multiple of `BLOCK`.
    """
    (B, T, _, H), (_, S, K, _) = qkv.shape, cache[0].shape
    N = qkv.shape[2] - 2 * K
    G, half, dtype = N // K, H // 2, qkv.dtype
    rows = max(16, pl.next_power_of_2(T * G))  # a matrix unit takes no fewer
    splits = splits or (S // BLOCK if B * K < PROGRAMS else 1)
    blocks = S // BLOCK // splits
    assert blocks * splits * BLOCK == S, f"a cache of {S} slots is not {splits} times blocks of {BLOCK}"

    def rotate(x1: Any, x2: Any, sin: Any, cos: Any) -> tuple[Any, Any]:
        x1, x2 = x1.astype(jnp.float32), x2.astype(jnp.float32)
        return (x1 * cos - x2 * sin).astype(dtype), (x2 * cos + x1 * sin).astype(dtype)

    def weigh(logits: Any, visible: Any) -> Any:
        logits = softcap * jnp.tanh(logits * (scale / softcap))
        return jnp.where(visible, jnp.exp(logits), 0.0)

    def attend_kernel(qkv_ref, sin_ref, cos_ref, mask_ref, at_ref, k_ref, v_ref, *out_refs):
        b, head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        *result_refs, k_out, v_out = out_refs
        start = at_ref[0]
        row, column = jnp.arange(rows), jnp.arange(half)
        token = jnp.minimum(row // G, T - 1)  # rows past the last repeat it and are not written
        query = head * G + row % G
        sin, cos = (ref[b, token[:, None], column[None]] for ref in (sin_ref, cos_ref))
        q1, q2 = (qkv_ref[b, token[:, None], query[:, None], column[None] + i] for i in (0, half))
        q1, q2 = rotate(q1, q2, sin, cos)

        def block(i: Any, carry: Any) -> Any:
            total, out = carry
            first = (split * blocks + i) * BLOCK
            slots = first + jnp.arange(BLOCK)
            k1, k2 = (k_ref[b, pl.ds(first, BLOCK), head, pl.ds(j, half)] for j in (0, half))
            logits = plgpu.dot(q1, k1.T) + plgpu.dot(q2, k2.T)
            # The slots to be written now are read below, from `qkv`: another program may be writing them.
            old = (slots < start) | (slots >= start + T)
            p = weigh(logits, mask_ref[b, token[:, None], slots[None]] & old[None])
            v = v_ref[b, pl.ds(first, BLOCK), head, pl.ds(0, H)]
            return total + jnp.sum(p, axis=1), out + plgpu.dot(p.astype(dtype), v)

        empty = jnp.zeros((rows,), jnp.float32), jnp.zeros((rows, H), jnp.float32)
        total, out = jax.lax.fori_loop(0, blocks, block, empty)
        for t in range(T):
            k1, k2 = (qkv_ref[b, t, N + head, pl.ds(i, half)] for i in (0, half))
            k1, k2 = rotate(k1, k2, sin_ref[b, t, pl.ds(0, half)], cos_ref[b, t, pl.ds(0, half)])
            v = qkv_ref[b, t, N + K + head, pl.ds(0, H)]
            products = q1.astype(jnp.float32) * k1.astype(jnp.float32) + q2.astype(jnp.float32) * k2.astype(jnp.float32)
            visible = mask_ref[b, token, jnp.full((rows,), start + t)] & (split == 0)
            p = weigh(jnp.sum(products, axis=1), visible)
            total += p
            out += p.astype(dtype).astype(jnp.float32)[:, None] * v.astype(jnp.float32)
            for ref, i, value in ((k_out, 0, k1), (k_out, half, k2), (v_out, 0, v)):
                place = ref.at[b, start + t, head, pl.ds(i, len(value))]
                plgpu.store(place, value, mask=jnp.full(value.shape, split == 0))
        if splits > 1:
            totals, partial = result_refs
            totals[split, b, head, :] = total
            partial[split, b, head, :, :] = out
        else:
            (y_ref,) = result_refs
            place = y_ref.at[b, row[:, None] // G, query[:, None], jnp.arange(H)[None]]
            value = (out / jnp.maximum(total, 1e-30)[:, None]).astype(dtype)
            plgpu.store(place, value, mask=jnp.broadcast_to((row < T * G)[:, None], value.shape))

    def combine_kernel(totals, partial, y_ref):
        b, t, n = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        part, column, row = jnp.arange(pl.next_power_of_2(splits)), jnp.arange(H), t * G + n % G
        exists = part < splits
        index = jnp.minimum(part, splits - 1)
        out = partial[index[:, None], b, n // G, row, column[None]]
        total = jnp.sum(jnp.where(exists, totals[index, b, n // G, row], 0.0))
        y = jnp.sum(jnp.where(exists[:, None], out, 0.0), axis=0) / jnp.maximum(total, 1e-30)
        y_ref[b, t, n, :] = y.astype(dtype)

    new = jax.ShapeDtypeStruct((B, T, N, H), dtype)
    parts = [jax.ShapeDtypeStruct((splits, B, K, rows, *end), jnp.float32) for end in ((), (H,))]
    first = parts if splits > 1 else [new]
    *y, k, v = pl.pallas_call(
        attend_kernel,
        grid=(B, K, splits),
        out_shape=[*first, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache)],
        input_output_aliases={5: len(first), 6: len(first) + 1},
        **_options(interpret, 4),
    )(qkv, *(x[:, :, 0] for x in angles), mask, jnp.reshape(jnp.asarray(at, jnp.int32), 1), *cache)
    if splits > 1:
        y = [pl.pallas_call(combine_kernel, grid=(B, T, N), out_shape=new, **_options(interpret, 4))(*y)]
    return y[0], (k, v)


def norm_add_norm(
    x: Float[Array, "*B D"],
    y: Float[Array, "*B D"],
    inner: Float[Array, " D"],
    outer: Float[Array, " D"],
    *,
    interpret: bool | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """→ (sum = x + rms_norm(y, inner), rms_norm(sum, outer)), a program a row, rounded where the plain formula is."""
    D, dtype = x.shape[-1], x.dtype
    width = pl.next_power_of_2(D)

    def norm_kernel(x_ref, y_ref, inner_ref, outer_ref, sum_ref, normed_ref):
        row, column = pl.program_id(0), jnp.arange(width)
        exists = column < D

        def read(ref: Any, *index: Any) -> Any:
            return plgpu.load(ref.at[(*index, column)], mask=exists, other=0.0).astype(jnp.float32)

        def norm(z: Any, scale: Any) -> Any:
            return (z * jax.lax.rsqrt(jnp.sum(z * z) / D + 1e-6) * (1 + scale)).astype(dtype)

        added = norm(read(y_ref, row), read(inner_ref)).astype(jnp.float32)
        total = (read(x_ref, row) + added).astype(dtype)
        normed = norm(total.astype(jnp.float32), read(outer_ref))
        plgpu.store(sum_ref.at[row, column], total, mask=exists)
        plgpu.store(normed_ref.at[row, column], normed, mask=exists)

    rows = x.size // D
    total, normed = pl.pallas_call(
        norm_kernel,
        grid=(rows,),
        out_shape=[jax.ShapeDtypeStruct((rows, D), dtype)] * 2,
        **_options(interpret, 8),
    )(x.reshape(rows, D), y.reshape(rows, D), inner, outer)
    return total.reshape(x.shape), normed.reshape(x.shape)


def int8_linear(
    x: Float[Array, "*B in"],
    values: Int[Array, "out in"],
    scale: Float[Array, " out"],
    dtype: Any,
    *,
    gated: bool = False,
    interpret: bool | None = None,
) -> Float[Array, "*B out"]:
    """x · (values · scale)ᵀ in `dtype` for up to `MAX_TOKENS` rows of x, `in` a multiple of 16, summed in float32.

    With `gated` the rows of `values` are those of a gate, then as many of what it gates: → gelu(gate) · up, half as
    wide. Every thread reads 16 bytes at a time along a row; the loop over a row is written out, so that several such
    reads are on their way at once.
    """
    (out, width), M = values.shape, x.size // x.shape[-1]
    assert width % 16 == 0 and M <= MAX_TOKENS
    made = out // 2 if gated else out
    chunk = min(width & -width, 1024)
    while chunk > 256 and width // chunk < 8:
        chunk //= 2
    # 32 values a thread and step; half of them where there is a gate, whose rows are read along.
    tall = max(1, (2048 if gated else 4096) // chunk)
    tall = min(tall, pl.next_power_of_2(made))

    def int8_kernel(x_ref, values_ref, scale_ref, y_ref):
        target = pl.program_id(0) * tall + jnp.arange(tall)
        row = jnp.minimum(target, made - 1)
        halves = (row, row + made) if gated else (row,)
        sums = [[jnp.zeros((tall, chunk // 16), jnp.float32) for _ in range(M)] for _ in halves]
        for start in range(0, width, chunk):
            column = start + jnp.arange(chunk)
            inputs = [x_ref[m, pl.ds(start, chunk)].astype(jnp.float32)[None] for m in range(M)]
            for i, place in enumerate(halves):
                read = values_ref[place[:, None], column[None]].astype(jnp.float32)
                for m in range(M):
                    # The 16 values of one thread are summed there.
                    products = (read * inputs[m]).reshape(tall, chunk // 16, 16)
                    sums[i][m] += jnp.sum(products, axis=2)
        for m in range(M):
            y = [jnp.sum(s[m], axis=1) * scale_ref[place] for s, place in zip(sums, halves, strict=True)]
            if gated:
                # Rounded as the plain formula is, between its two products and the gate.
                gate, up = (part.astype(dtype).astype(jnp.float32) for part in y)
                y = [jax.nn.gelu(gate, approximate=True) * up]
            plgpu.store(y_ref.at[jnp.full((tall,), m), target], y[0].astype(dtype), mask=target < made)

    y = pl.pallas_call(
        int8_kernel,
        grid=(pl.cdiv(made, tall),),
        out_shape=jax.ShapeDtypeStruct((M, made), dtype),
        **_options(interpret, 4),
    )(x.reshape(M, width), values, scale)
    return y.reshape(*x.shape[:-1], made)


def _options(interpret: bool | None, warps: int) -> dict[str, Any]:
    if interpret is None:
        interpret = jax.default_backend() != "gpu"
    return {"interpret": interpret, "compiler_params": plgpu.CompilerParams(num_warps=warps, num_stages=3)}
