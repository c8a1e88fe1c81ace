"""Random transformers modules, and their weights in our layout."""

import jax
import numpy as np
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from spatialvla_jax.checkpoints.mapping import Rule, flatten, slots, unflatten
from spatialvla_jax.models.siglip import SiglipConfig


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random unit-gain matrices; scales, biases and tables differ from zero and one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / np.sqrt(p[0].numel()) if p.ndim >= 2 else 0.3 * noise + 0.1)
    return module.eval()


def hf_siglip(config: SiglipConfig) -> SiglipVisionModel:
    sizes = dict(hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.num_heads)
    sizes |= dict(image_size=config.image_size, patch_size=config.patch_size, intermediate_size=config.mlp_dim)
    return SiglipVisionModel(SiglipVisionConfig(vision_use_head=False, **sizes))


def our_params(module: torch.nn.Module, shapes: dict, rules: list[Rule], prefix: str) -> dict:
    """The module's weights in our tree, whose abstract leaves are `shapes`."""
    return arrange({f"{prefix}.{key}": tensor.numpy() for key, tensor in module.state_dict().items()}, shapes, rules)


def arrange(tensors: dict[str, np.ndarray], shapes: dict, rules: list[Rule]) -> dict:
    """Published tensors in our tree, whose abstract leaves are `shapes`; all tensors must be used."""
    tensors = dict(tensors)
    leaves = {path: np.full(leaf.shape, np.nan, np.float32) for path, leaf in flatten(shapes).items()}
    for slot in slots({path: leaf.shape for path, leaf in leaves.items()}, rules):
        slot.to_ours(tensors.pop(slot.key), leaves[slot.path])
    assert not tensors, sorted(tensors)
    return jax.tree.map(np.asarray, unflatten(leaves))
