"""Linear layers as einsums, with optional low-rank adapters for LoRA training.

An equation's letters are the axes of x, w and y, such as "btd,ndh->btnh". Axis `c` of a weight stacks separate layers.
"""

from functools import partial
from math import prod

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

BESIDE = "_adapter"  # the adapters {"a", "b"} of the weight "w" are stored as "w_adapter" (`lora.put_beside`)
Adapter = dict[str, Array]


def adapter_of(module: nn.Module, weight: str) -> Adapter | None:
    """The adapter stored beside the module's parameter `weight`, if any."""
    name = weight + BESIDE
    return module.get_variable("params", name) if module.has_variable("params", name) else None


def linear(
    equation: str, x: Float[Array, "..."], w: Float[Array, "..."], adapter: Adapter | None = None
) -> Float[Array, "..."]:
    """The einsum of `x` and `w`. With an adapter, `w` is W + B A, and only a and b get gradients."""
    return jnp.einsum(equation, x, w) if adapter is None else adapted(equation, x, w, adapter["a"], adapter["b"])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def adapted(equation: str, x: Array, w: Array, a: Array, b: Array) -> Array:
    """One product with W + B A in the forward pass and for the gradient of x, as without adapters. Gradients of a and b
    are products of rank r: deriving them from W's gradient would cost half as much work again."""
    return jnp.einsum(equation, x, w)


def _forward(equation: str, x: Array, w: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    # Keep the plain einsum here: remat policies recognise it as a matrix product.
    return jnp.einsum(equation, x, w), (x, w, a, b)


def _backward(equation: str, saved: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
    (x, w, a, b), (operands, y_axes) = saved, equation.split("->")
    x_axes, w_axes = operands.split(",")
    inputs = "".join(i for i in w_axes if i not in y_axes)
    stack, outputs = ("".join(i for i in w_axes if i not in inputs and (i == "c") == c) for c in (True, False))
    a_axes, b_axes = f"{stack}r{inputs}", f"{stack}{outputs}r"
    low = "".join(i for i in x_axes if i not in inputs) + stack + "r"
    xa = jnp.einsum(f"{x_axes},{a_axes}->{low}", x, a.astype(x.dtype))
    dyb = jnp.einsum(f"{y_axes},{b_axes}->{low}", dy, b.astype(dy.dtype))
    return (
        jnp.einsum(f"{y_axes},{w_axes}->{x_axes}", dy, w),
        jnp.zeros_like(w),
        jnp.einsum(f"{low},{x_axes}->{a_axes}", dyb, x, preferred_element_type=a.dtype),
        jnp.einsum(f"{low},{y_axes}->{b_axes}", xa, dy, preferred_element_type=b.dtype),
    )


adapted.defvjp(_forward, _backward)


class Dense(nn.Module):
    """`nn.DenseGeneral` specified by an equation: a kernel of `shape` and a bias."""

    equation: str
    shape: tuple[int, ...]
    dtype: DTypeLike
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        axes, y_axes = self.equation.split(",")[1].split("->")
        sizes = dict(zip(axes, self.shape, strict=True))
        outputs = tuple(size for axis, size in sizes.items() if axis in y_axes)

        def init(key, shape, dtype=jnp.float32):
            return self.kernel_init(key, (prod(shape) // prod(outputs), prod(outputs)), dtype).reshape(shape)

        kernel = self.param("kernel", init, self.shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, outputs).astype(self.dtype)
        return linear(self.equation, x.astype(self.dtype), kernel, adapter_of(self, "kernel")) + bias
