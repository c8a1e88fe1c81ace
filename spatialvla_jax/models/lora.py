"""LoRA (Hu et al. 2021): low-rank updates of linear layers, as a tree of arrays beside the model's own parameters.

The adapters of the kernel "llm/layers/mlp/linear" are "lora/llm/layers/mlp/linear/a" and "…/b". W + scale · B A, with
scale = alpha / rank, replaces W before the model is applied, so there is no second model. In training, a and b are
passed beside W and get their gradients without W's (`linear.adapted`). Where one of our kernels stacks several
published layers, such as all depths or keys and values, each layer has its own adapters.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from spatialvla_jax.errors import InputError
from spatialvla_jax.models.linear import BESIDE

ADAPTERS = "lora"

# Kernels of linear layers: (path, axes, contracted axes). L and C stack separate layers. The published recipe adapts
# exactly these: every linear layer of Gemma 2, SigLIP, projector and Ego3D. Its name patterns also match one layer in
# ZoeDepth, which gets no gradient. It freezes the LM head.
LINEAR: tuple[tuple[str, str, str], ...] = (
    ("llm/layers/attn/q_einsum/w", "LNDH", "D"),
    ("llm/layers/attn/kv_einsum/w", "LCKDH", "D"),
    ("llm/layers/attn/attn_vec_einsum/w", "LNHD", "NH"),
    ("llm/layers/mlp/gating_einsum", "LCDF", "D"),
    ("llm/layers/mlp/linear", "LFD", "F"),
    ("img/Transformer/encoderblock/.*/(query|key|value)/kernel", "LDNH", "D"),
    ("img/Transformer/encoderblock/.*/out/kernel", "LNHD", "NH"),
    ("img/Transformer/encoderblock/.*/Dense_0/kernel", "LDF", "D"),
    ("img/Transformer/encoderblock/.*/Dense_1/kernel", "LFD", "F"),
    ("img/head/kernel", "DO", "D"),
    ("ego3d/dense_./kernel", "DO", "D"),
)


def is_linear(path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern, _, _ in LINEAR)


def axes_of(path: str) -> tuple[str, str, str]:
    """The axes of a linear layer's kernel, of its a and of its b, such as ("LNDH", "LrD", "LNHr")."""
    axes, inputs = next((axes, inputs) for pattern, axes, inputs in LINEAR if re.fullmatch(pattern, path))
    stack = "".join(x for x in axes if x in "LC")
    outputs = "".join(x for x in axes if x not in stack + inputs)
    return axes, f"{stack}r{inputs}", f"{stack}{outputs}r"


def adapter_shapes(
    shapes: Mapping[str, tuple[int, ...]], rank: int, targets: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """{"llm/layers/mlp/linear/a": shape, "…/b": shape, …}, given the model's {path: shape}. Covers linear layers whose
    path matches a pattern of `targets` from its start. Raises InputError for a pattern that matches none."""
    found: dict[str, tuple[int, ...]] = {}
    for pattern in targets:
        paths = [path for path in shapes if re.match(pattern, path) and is_linear(path)]
        if not paths:
            raise InputError(f"lora.targets pattern {pattern!r} matches no linear layer's kernel")
        for path in paths:
            axes, *parts = axes_of(path)
            sizes = dict(zip(axes, shapes[path], strict=True)) | {"r": rank}
            found |= {f"{path}/{name}": tuple(sizes[x] for x in part) for name, part in zip("ab", parts, strict=True)}
    if not found:
        raise InputError("lora.targets names no linear layer that this model has")
    return {path: found[path] for path in sorted(found)}


def init_adapters(
    shapes: Mapping[str, tuple[int, ...]], rank: int, targets: Sequence[str], key: Array
) -> dict[str, Any]:
    """Initial adapters, f32, that change nothing: a ~ normal with deviation 1 / rank, as in the release, and b = 0."""
    adapters = adapter_shapes(shapes, rank, targets)
    keys = jax.random.split(key, len(adapters))
    flat = {
        path: jax.random.normal(k, shape) / rank if path.endswith("/a") else jnp.zeros(shape)
        for k, (path, shape) in zip(keys, adapters.items(), strict=True)
    }
    return unflatten_dict(flat, sep="/")


def merge_adapters(params: Mapping[str, Any], scale: float, dtype: Any = None) -> dict[str, Any]:
    """`params` without "lora": every adapted W becomes W + scale · B A, in `dtype` or else W's own.

    Without "lora" in `params`, returns them unchanged.
    """
    if ADAPTERS not in params:
        return dict(params)
    flat: dict[str, Any] = flatten_dict({k: v for k, v in params.items() if k != ADAPTERS}, sep="/")
    adapters: dict[str, Any] = flatten_dict(params[ADAPTERS], sep="/")
    with jax.default_matmul_precision("highest"):
        for path in [path.removesuffix("/a") for path in adapters if path.endswith("/a")]:
            w = flat[path]
            change = scale * product(path, adapters[f"{path}/a"], adapters[f"{path}/b"])
            flat[path] = (w.astype(jnp.float32) + change).astype(dtype or w.dtype)
    return unflatten_dict(flat, sep="/")


def put_beside(params: Mapping[str, Any], scale: float, dtype: Any = None) -> dict[str, Any]:
    """`merge_adapters` for training: the sums get no gradient; a and scale · b are stored beside them for
    `models.linear`."""
    if ADAPTERS not in params:
        return dict(params)
    flat: dict[str, Any] = flatten_dict(merge_adapters(params, scale, dtype), sep="/")
    for name, x in flatten_dict(params[ADAPTERS], sep="/").items():
        path, _, part = name.rpartition("/")
        flat[path] = jax.lax.stop_gradient(flat[path])
        flat[f"{path}{BESIDE}/{part}"] = scale * jnp.asarray(x) if part == "b" else x
    return unflatten_dict(flat, sep="/")


def product(path: str, a: Float[Any, "..."], b: Float[Any, "..."]) -> Float[Any, "..."]:
    """B A in the shape of the kernel at `path`, in the library of a and b (JAX or NumPy)."""
    axes, a_axes, b_axes = (" ".join(letters) for letters in axes_of(path))
    stack, inputs = a_axes.split("r")
    outputs = b_axes.removeprefix(stack).removesuffix("r")
    # Not a single einsum: it may sum in another order and would change the last bits of every adapted run.
    change = rearrange(b, f"{b_axes} -> {stack} ({outputs}) r") @ rearrange(a, f"{a_axes} -> {stack} r ({inputs})")
    sizes = dict(zip((a_axes + " " + b_axes).split(), a.shape + b.shape, strict=True))
    return rearrange(change, f"{stack} ({outputs}) ({inputs}) -> {axes}", **{x: sizes[x] for x in axes.split()})
