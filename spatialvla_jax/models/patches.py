"""Convolutions over patches that do not overlap, for `nn.Conv(conv_general_dilated=multiply_patches)`."""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float


def multiply_patches(
    images: Float[Array, "B _ _ C"], kernel: Float[Array, "p q C D"], strides: tuple[int, int], *unused, **options
) -> Float[Array, "B h w D"]:
    """The patches, or pixels, are the rows of one product. On a GPU at batch 1 a convolution costs more to start than
    to do, transposes its kernel at every call, and cannot be part of a recorded graph of kernels."""
    p, q = strides
    patches = rearrange(images, "B (h p) (w q) C -> B h p w q C", p=p, q=q)
    return jnp.einsum("bhpwqc,pqcd->bhwd", patches, kernel)
