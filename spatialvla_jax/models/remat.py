"""Rematerialisation: what the backward pass keeps of a scanned block, and what it computes again."""

import flax.linen as nn
import jax

POLICIES = ("none", "full", "dots")


def rematerialise(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """Wrap a scanned block: `none` keeps all activations, `full` only the block's input, `dots` matrix products too."""
    if policy == "none":
        return block
    keep = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[policy]
    return nn.remat(block, prevent_cse=False, policy=keep)
