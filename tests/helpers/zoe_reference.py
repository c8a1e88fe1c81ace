"""Random transformers ZoeDepth models to compare with, and their weights in our parameter tree."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import ZoeDepthConfig as HfConfig
from transformers import ZoeDepthForDepthEstimation

from helpers.torch_reference import arrange
from spatialvla_jax.checkpoints.mapping import zoedepth
from spatialvla_jax.models.beit import BeitConfig, BeitLayer
from spatialvla_jax.models.zoedepth import DOMAINS, ZoeDepth, ZoeDepthConfig

PREFIX = "vision_zoe_model."

# transformers 5 renamed the backbone in memory (files keep the published names): new → published, applied in order.
RENAMED_IN_V5 = (
    ("backbone.beit.", "backbone."),
    ("backbone.layers.", "backbone.encoder.layer."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".relative_position_bias.relative", ".attention.attention.relative_position_bias.relative"),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


def published_names(state_dict: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The state of a live transformers 5 model under the names of the published checkpoint."""
    out = {}
    for key, tensor in state_dict.items():
        if key.startswith("backbone."):
            for new, old in RENAMED_IN_V5:
                key = key.replace(new, old)
        out[PREFIX + key] = tensor.numpy()
    return out


def zoedepth_params(tensors: dict[str, np.ndarray], config: ZoeDepthConfig) -> dict:
    """Published tensors → the parameters of `ZoeDepth(config)`."""
    images = jnp.zeros((1, 64, 64, 3))
    shapes = jax.eval_shape(ZoeDepth(config, jnp.float32).init, jax.random.key(0), images)["params"]
    return arrange(tensors, {"zoe": shapes}, zoedepth())["zoe"]


def layer_params(hf_layer: torch.nn.Module, layer: BeitLayer, x: np.ndarray) -> dict:
    """The weights of one transformers BEiT layer as ours."""
    tensors = published_names({f"backbone.layers.0.{key}": value for key, value in hf_layer.state_dict().items()})
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    tree = arrange(tensors, {"zoe": {"backbone": {"stages": {"layers": shapes}}}}, zoedepth())
    return tree["zoe"]["backbone"]["stages"]["layers"]


def hf_config(config: ZoeDepthConfig) -> HfConfig:
    beit = config.backbone
    every = beit.depth // beit.num_taps
    return HfConfig(
        backbone_config={
            "model_type": "beit",
            "image_size": beit.image_size,
            "patch_size": beit.patch_size,
            "hidden_size": beit.width,
            "num_hidden_layers": beit.depth,
            "num_attention_heads": beit.num_heads,
            "intermediate_size": beit.mlp_dim,
            "use_relative_position_bias": True,
            "reshape_hidden_states": False,
            "out_features": [f"stage{i}" for i in range(every, beit.depth + 1, every)],
        },
        neck_hidden_sizes=list(config.neck_widths),
        fusion_hidden_size=config.fusion_width,
        num_relative_features=config.relative_features,
        bottleneck_features=config.bottleneck_width,
        bin_embedding_dim=config.bin_embedding_dim,
        bin_configurations=[
            {"name": name, "n_bins": config.num_bins, "min_depth": 0.001, "max_depth": depth}
            for name, depth in zip(DOMAINS, (10.0, 80.0), strict=True)
        ],
        num_patch_transformer_layers=config.classifier_depth,
        patch_transformer_hidden_size=config.classifier_width,
        patch_transformer_intermediate_size=config.classifier_mlp_dim,
        patch_transformer_num_attention_heads=config.classifier_heads,
    )


def random_hf_model(config: ZoeDepthConfig, seed: int) -> ZoeDepthForDepthEstimation:
    """A transformers model with all weights random, whose depth varies over the image."""
    model = ZoeDepthForDepthEstimation(hf_config(config)).eval()
    randomise(model, seed)
    return model


def randomise(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "seed_bin" in name or "attractors" in name:
                noise *= 3  # spreads the bins, so that depth depends on everything before them
            if p.ndim >= 2 and "table" not in name and "cls_token" not in name:
                p.copy_(noise / np.sqrt(p[0].numel()))
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(0.3 * noise)


TINY = ZoeDepthConfig(
    backbone=BeitConfig(image_size=64, patch_size=16, width=32, depth=4, num_heads=2, mlp_dim=64),
    neck_widths=(16, 24, 32, 32),
    fusion_width=16,
    relative_features=8,
    bottleneck_width=16,
    bin_embedding_dim=16,
    num_bins=8,
    classifier_mlp_dim=64,
)
