"""Convolutions over non-overlapping patches, for `nn.Conv(conv_general_dilated=multiply_patches)`."""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float


def multiply_patches(
    images: Float[Array, "B _ _ C"], kernel: Float[Array, "p q C D"], strides: tuple[int, int], *unused, **options
) -> Float[Array, "B h w D"]:
    """A convolution as one matrix product over patches (or pixels). On a GPU at batch 1 a real convolution is dominated
    by launch cost. It also transposes its kernel at every call and cannot be captured in a CUDA graph."""
    p, q = strides
    patches = rearrange(images, "B (h p) (w q) C -> B h p w q C", p=p, q=q)
    return jnp.einsum("bhpwqc,pqcd->bhwd", patches, kernel)
