"""Random transformers modules, and their weights in our layout."""

import jax
import numpy as np
import torch

from spatialvla_jax.checkpoints.mapping import Rule, flatten, slots, unflatten


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Unit-gain matrices; scales, biases and tables all away from zero and one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / np.sqrt(p[0].numel()) if p.ndim >= 2 else 0.3 * noise + 0.1)
    return module.eval()


def our_params(module: torch.nn.Module, shapes: dict, rules: list[Rule], prefix: str) -> dict:
    """The module's weights as our tree with these (abstract) leaves."""
    return arrange({f"{prefix}.{key}": tensor.numpy() for key, tensor in module.state_dict().items()}, shapes, rules)


def arrange(tensors: dict[str, np.ndarray], shapes: dict, rules: list[Rule]) -> dict:
    """Published tensors as our tree with these (abstract) leaves; every one of them must have a place."""
    tensors = dict(tensors)
    leaves = {path: np.full(leaf.shape, np.nan, np.float32) for path, leaf in flatten(shapes).items()}
    for slot in slots({path: leaf.shape for path, leaf in leaves.items()}, rules):
        slot.to_ours(tensors.pop(slot.key), leaves[slot.path])
    assert not tensors, sorted(tensors)
    return jax.tree.map(np.asarray, unflatten(leaves))
