"""Stacks of equal layers: the scan over them, and what its backward pass keeps or computes again."""

from typing import Any

import flax.linen as nn
import jax

from spatialvla_jax.models.fused_attention import SAVED

POLICIES = ("none", "full", "dots")


def rematerialise(block: type[nn.Module], policy: str, unroll: bool = False) -> type[nn.Module]:
    """Wrap a scanned block: `none` keeps all activations, `full` only the block's input, `dots` matrix products too.

    A fused attention counts as a matrix product. `unroll`: the scan will be; what is computed again must then be kept
    apart from what was computed before, which the scan's loop does otherwise.
    """
    if policy == "none":
        return block
    policies = jax.checkpoint_policies
    dots = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(*SAVED)
    )
    return nn.remat(block, prevent_cse=unroll, policy={"full": None, "dots": dots}[policy])


def scan_layers(block: type[nn.Module], length: int, unroll: bool = False, in_axes: Any = nn.broadcast):
    """`length` blocks in a row, their parameters stacked on the first axis; `in_axes` are those of the arguments after
    the carry. `unroll` compiles layer by layer instead of a loop over them."""
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        unroll=length if unroll else 1,
    )
