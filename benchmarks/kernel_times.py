"""The kernels of `inference/kernels.py` one by one, against the plain formulas: microseconds a call and difference.

    python benchmarks/kernel_times.py [--preset spatialvla-4b-224]

On a GPU; elsewhere the kernels are interpreted, which takes a small preset and says nothing of their speed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatialvla_jax.inference import kernels
from spatialvla_jax.inference.decoder import add_and_norm, gated, linear, quantize
from spatialvla_jax.models import PRESETS, SpatialVLAConfig, preset
from spatialvla_jax.models.attention import attend, rotary, rotary_angles

# Weights of as many layers take turns, so that they come from memory and not from a cache.
LAYERS, ROUNDS = 8, 5


def cases(
    config: SpatialVLAConfig, tokens: int, batch: int = 1
) -> dict[str, tuple[Callable, Callable, tuple[Any, ...]]]:
    """Name → (kernel, plain formula, arguments), at the sizes of one pass over `tokens` tokens in bfloat16."""
    llm, rng = config.llm, np.random.default_rng(0)
    N, K, H, D = llm.num_heads, llm.num_kv_heads, llm.head_dim, llm.width
    slots = -(-(config.prefix_length + 16) // kernels.BLOCK) * kernels.BLOCK
    at, scale, softcap = slots - 20, llm.query_pre_attn_scalar**-0.5, llm.attn_softcap

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)

    def plain(qkv: Any, mask: Any, cache: Any) -> Any:
        angles = rotary_angles(jnp.full((batch, tokens), 300), H)
        new = rotary(qkv[:, :, N : N + K], angles), qkv[:, :, N + K :]
        cache = tuple(jax.lax.dynamic_update_slice(o, n, (0, at, 0, 0)) for o, n in zip(cache, new, strict=True))
        return attend(rotary(qkv[:, :, :N], angles), *cache, mask, scale=scale, softcap=softcap), cache

    def attention(splits: int | None) -> Callable:
        def fused(qkv: Any, mask: Any, cache: Any) -> Any:
            angles = rotary_angles(jnp.full((batch, tokens), 300), H)
            return kernels.attend_cached(qkv, angles, mask, cache, at, scale=scale, softcap=softcap, splits=splits)

        return fused

    mask = jnp.broadcast_to(jnp.arange(slots) <= at, (batch, tokens, slots))
    given = (array(batch, tokens, N + 2 * K, H), mask, (array(batch, slots, K, H), array(batch, slots, K, H)))
    found: dict[str, Any] = {f"attention splits {s or 'auto'}": (attention(s), plain, given) for s in (None, 1)}
    x, small = array(batch, tokens, D), 0.1 * array(D)
    found["norms"] = (kernels.norm_add_norm, add_and_norm, (x, x + 1, small, small))
    sizes = {
        "qkv": ((N + 2 * K) * H, D),
        "out": (D, N * H),
        "gate_up": (2 * llm.mlp_dim, D),
        "down": (D, llm.mlp_dim),
        "head": (config.spatial_tokens, D),
    }
    for name, (rows, columns) in sizes.items() if batch * tokens <= kernels.MAX_TOKENS else ():
        matrix, gate = quantize(array(rows, columns) / columns**0.5), name == "gate_up"
        x = array(batch, tokens, columns)

        def small_product(x: Any, matrix: Any, gate: bool = gate) -> Any:
            return kernels.int8_linear(x, *matrix, x.dtype, gated=gate)

        found[f"int8 {name}"] = (small_product, gated if gate else linear, (x, matrix))
    return found


def microseconds(f: Callable, args: tuple[Any, ...]) -> float:
    """Median time of one call within a jitted loop, on copies of the arguments that take turns."""
    copies = [jax.tree.map(jnp.copy, args) for _ in range(LAYERS)]

    @jax.jit
    def loop(copies: Any) -> Any:
        def turn(_: Any, carry: Any) -> Any:
            total, kept = carry
            following = []
            for first, *rest in kept:
                # The first argument depends on the last result, so that no call is left out or moved.
                made = f(first + (total * 0).astype(first.dtype), *rest)
                total = jax.tree.leaves(made)[0].ravel()[0].astype(jnp.float32)
                # A cache is handed on, as in decoding: one that were kept would have to be copied.
                if isinstance(made, tuple) and isinstance(made[1], tuple):
                    rest[-1] = made[1]
                following.append((first, *rest))
            return total, following

        return jax.lax.fori_loop(0, 20, turn, (jnp.float32(0), copies))[0]

    loop(copies).block_until_ready()
    spent = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        loop(copies).block_until_ready()
        spent.append(time.perf_counter() - began)
    return 1e6 * statistics.median(spent) / (20 * LAYERS)


def check_kernels(config: SpatialVLAConfig, *, timed: bool) -> dict[str, Any]:
    """One line for each kernel, which may fail to compile without ending the others: its error relative to the largest
    result and, if `timed`, microseconds a call."""
    result: dict[str, Any] = {}
    for tokens, batch in ((1, 1), (3, 1), (3, 32)):
        for name, (kernel, plain, args) in cases(config, tokens, batch).items():
            label = f"{name}, {batch} × {tokens} tokens"
            try:
                got, expected = (jax.tree.leaves(jax.jit(f)(*args)) for f in (kernel, plain))
                pairs = [(jnp.float32(a), jnp.float32(b)) for a, b in zip(got, expected, strict=True)]
                off = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)
                took = {}
                if timed:
                    took = {k: round(microseconds(f, args), 1) for k, f in (("us", kernel), ("plain_us", plain))}
                result[label] = took | {"off": round(off, 4)}
                print(f"kernel {label}: " + ", ".join(f"{k} {v}" for k, v in result[label].items()), flush=True)
            except Exception as error:  # a compiler's, of whatever kind: the next kernel may do
                print(f"kernel {label}: FAILED: {type(error).__name__}: {str(error)[:600]}", flush=True)
                result[label] = type(error).__name__
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="spatialvla-4b-224")
    config = replace(preset(parser.parse_args().preset), dtype="bfloat16")
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}")
    check_kernels(config, timed=True)


if __name__ == "__main__":
    main()
