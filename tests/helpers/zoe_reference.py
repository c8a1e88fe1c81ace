"""ZoeDepth's names in transformers ↔ in our parameter tree, and random transformers models to compare with.

`TABLE` holds one row a tensor: (our path, published key without the `vision_zoe_model.` prefix, layout of LAYOUTS).
`{layer}` in a key runs over what our tree stacks in front: one axis each for `stages` and `layers` in our path.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import ZoeDepthConfig as HfConfig
from transformers import ZoeDepthForDepthEstimation

from spatialvla_jax.models.beit import BeitConfig, BeitLayer
from spatialvla_jax.models.zoedepth import DOMAINS, ZoeDepth, ZoeDepthConfig

# layout: (PyTorch tensor, shape of our leaf without stacked axes) → our tensor
LAYOUTS = {
    "same": lambda x, shape: x.reshape(shape),  # vectors, tables, biases split into heads
    "dense": lambda x, shape: x.T.reshape(shape),  # [out, in] → [in, out], either side split into heads
    "conv": lambda x, shape: x.transpose(2, 3, 1, 0),  # OIHW → HWIO; transposed IOHW → HWOI
}


def _rows(path, key, layout, bias=True):
    rows = [(f"{path}/kernel", f"{key}.weight", layout)]
    return [*rows, (f"{path}/bias", f"{key}.bias", "same")] if bias else rows


def _norm(path, key):
    return [(f"{path}/scale", f"{key}.weight", "same"), (f"{path}/bias", f"{key}.bias", "same")]


def _mlp(path, key, first="conv1", second="conv2"):
    return _rows(f"{path}/conv1", f"{key}.{first}", "conv") + _rows(f"{path}/conv2", f"{key}.{second}", "conv")


def _backbone():
    ours, key = "backbone/stages/layers", "backbone.encoder.layer.{layer}"
    attention = f"{key}.attention.attention"
    return [
        ("backbone/cls_token", "backbone.embeddings.cls_token", "same"),
        *_rows("backbone/patch_embedding", "backbone.embeddings.patch_embeddings.projection", "conv"),
        *_rows(f"{ours}/attention/query", f"{attention}.query", "dense"),
        *_rows(f"{ours}/attention/key", f"{attention}.key", "dense", bias=False),
        *_rows(f"{ours}/attention/value", f"{attention}.value", "dense"),
        *_rows(f"{ours}/attention/out", f"{key}.attention.output.dense", "dense"),
        (
            f"{ours}/attention/relative_position_bias",
            f"{attention}.relative_position_bias.relative_position_bias_table",
            "same",
        ),
        *_norm(f"{ours}/norm1", f"{key}.layernorm_before"),
        *_norm(f"{ours}/norm2", f"{key}.layernorm_after"),
        *_rows(f"{ours}/mlp_in", f"{key}.intermediate.dense", "dense"),
        *_rows(f"{ours}/mlp_out", f"{key}.output.dense", "dense"),
        (f"{ours}/layer_scale1", f"{key}.lambda_1", "same"),
        (f"{ours}/layer_scale2", f"{key}.lambda_2", "same"),
    ]


def _neck():
    rows = []
    for i in range(4):
        ours, key = f"neck/reassemble_{i}", "neck.reassemble_stage"
        rows += _rows(f"{ours}/readout", f"{key}.readout_projects.{i}.0", "dense")
        rows += _rows(f"{ours}/projection", f"{key}.layers.{i}.projection", "conv")
        if i != 2:  # the third map keeps its size
            rows += _rows(f"{ours}/resize", f"{key}.layers.{i}.resize", "conv")
        rows += _rows(f"neck/conv_{i}", f"neck.convs.{i}", "conv", bias=False)
        ours, key = f"neck/fusion_{i}", f"neck.fusion_stage.layers.{i}"
        rows += _rows(f"{ours}/projection", f"{key}.projection", "conv")
        for j in (1, 2):
            rows += _mlp(f"{ours}/residual{j}", f"{key}.residual_layer{j}", "convolution1", "convolution2")
    return rows


def _heads():
    rows = [row for i in (1, 2, 3) for row in _rows(f"relative_head/conv{i}", f"relative_head.conv{i}", "conv")]
    rows += _rows("metric_head/bottleneck", "metric_head.conv2", "conv")
    rows += _mlp("metric_head/seed_projector", "metric_head.seed_projector")
    for i in range(4):
        rows += _mlp(f"metric_head/projector_{i}", f"metric_head.projectors.{i}")
    for domain in DOMAINS:
        rows += _mlp(f"metric_head/{domain}/seed_bins", f"metric_head.seed_bin_regressors.{domain}")
        for i in range(4):
            rows += _mlp(f"metric_head/{domain}/attractor_{i}", f"metric_head.attractors.{domain}.{i}")
        rows += _mlp(
            f"metric_head/{domain}/log_binomial", f"metric_head.conditional_log_binomial.{domain}.mlp", "0", "2"
        )
    ours, key = "metric_head/classifier", "metric_head.patch_transformer"
    rows += _rows(f"{ours}/embedding", f"{key}.embedding_convPxP", "conv")
    rows += _rows(f"{ours}/hidden", "metric_head.mlp_classifier.linear1", "dense")
    rows += _rows(f"{ours}/logits", "metric_head.mlp_classifier.linear2", "dense")
    ours, key = f"{ours}/layers", f"{key}.transformer_encoder.{{layer}}"
    for name, theirs in (("query", "query"), ("key", "key"), ("value", "value"), ("out", "out_proj")):
        rows += _rows(f"{ours}/attention/{name}", f"{key}.self_attn.{theirs}", "dense")
    rows += _norm(f"{ours}/norm1", f"{key}.norm1") + _norm(f"{ours}/norm2", f"{key}.norm2")
    return (
        rows + _rows(f"{ours}/mlp_in", f"{key}.linear1", "dense") + _rows(f"{ours}/mlp_out", f"{key}.linear2", "dense")
    )


TABLE = [*_backbone(), *_neck(), *_heads()]

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
        out[key] = tensor.numpy()
    return out


def to_params(tensors: dict[str, np.ndarray], template: dict, table=TABLE) -> dict:
    """Published tensors → a tree with the structure and shapes of `template`. Every tensor must be used."""
    tensors, shapes, flat = dict(tensors), dict[str, Any](flatten_dict(template, sep="/")), {}
    for path, key, layout in table:
        shape = shapes.pop(path).shape
        stacked = len({"stages", "layers"} & set(path.split("/")))
        count = np.prod(shape[:stacked], dtype=int)
        parts = [LAYOUTS[layout](tensors.pop(key.format(layer=i)), shape[stacked:]) for i in range(count)]
        flat[path] = np.stack(parts).reshape(shape)
    assert not tensors and not shapes, (sorted(tensors), sorted(shapes))
    return unflatten_dict(flat, sep="/")


def zoedepth_params(tensors: dict[str, np.ndarray], config: ZoeDepthConfig) -> dict:
    """Published tensors → the parameters of `ZoeDepth(config)`."""
    images = jnp.zeros((1, 64, 64, 3))
    template = jax.eval_shape(ZoeDepth(config, jnp.float32).init, jax.random.key(0), images)
    return to_params(tensors, template["params"])


def layer_params(hf_layer: torch.nn.Module, layer: BeitLayer, x: np.ndarray) -> dict:
    """The weights of one transformers BEiT layer as ours."""
    ours = "backbone/stages/layers/"
    table = [(path.removeprefix(ours), key, layout) for path, key, layout in TABLE if path.startswith(ours)]
    tensors = published_names({f"backbone.layers.0.{key}": value for key, value in hf_layer.state_dict().items()})
    return to_params(tensors, jax.eval_shape(layer.init, jax.random.key(0), x)["params"], table)


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
    """A transformers model in which no weight is left at its initial value and depth varies over the image."""
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
