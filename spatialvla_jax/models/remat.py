"""Scans over identical layers, and which activations they save for the backward pass."""

from typing import Any

import flax.linen as nn
import jax

from spatialvla_jax.models.fused_attention import SAVED

POLICIES = ("none", "full", "dots")


def rematerialise(block: type[nn.Module], policy: str, unroll: bool = False) -> type[nn.Module]:
    """Wrap a scanned block: `none` saves all activations, `full` only the block's input, `dots` matrix products too.

    Fused attention counts as a matrix product. `unroll` says that the scan will be unrolled: recomputation must then be
    protected from common-subexpression elimination, which a loop does by itself.
    """
    if policy == "none":
        return block
    policies = jax.checkpoint_policies
    dots = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(*SAVED)
    )
    return nn.remat(block, prevent_cse=unroll, policy={"full": None, "dots": dots}[policy])


def scan_layers(block: type[nn.Module], length: int, unroll: bool = False, in_axes: Any = nn.broadcast):
    """`length` blocks in sequence, their parameters stacked on the first axis. `in_axes` applies to the arguments after
    the carry. `unroll` compiles each layer separately instead of a loop over them."""
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        unroll=length if unroll else 1,
    )
