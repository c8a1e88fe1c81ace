"""Fields of the published config.json: their counterparts in ours, their defaults, and those with one supported value.

Every field that affects what the model computes is in one of these tables. Fields in none of them, such as those for
training and text generation, are ignored.
"""

from typing import Any

from spatialvla_jax.models.ego3d import NUM_FREQUENCIES, SUB_GRID
from spatialvla_jax.text import BOS, EOS, PAD

# Our fields → published ones, for reading and writing.
ENCODER = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}
VISION = ENCODER | {"image_size": "image_size", "patch_size": "patch_size"}  # SigLIP's and BEiT's
GEMMA2 = {
    "vocab_size": "vocab_size",
    **ENCODER,
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "sliding_window": "sliding_window",
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "rope_base": "rope_theta",
}
ZOEDEPTH = {
    "neck_widths": "neck_hidden_sizes",
    "fusion_width": "fusion_hidden_size",
    "relative_features": "num_relative_features",
    "bottleneck_width": "bottleneck_features",
    "bin_embedding_dim": "bin_embedding_dim",
    "min_temperature": "min_temp",
    "max_temperature": "max_temp",
    "classifier_width": "patch_transformer_hidden_size",
    "classifier_depth": "num_patch_transformer_layers",
    "classifier_heads": "patch_transformer_num_attention_heads",
    "classifier_mlp_dim": "patch_transformer_intermediate_size",
}
PARTS = {
    "img": ("vision_config", VISION),
    "llm": ("text_config", GEMMA2),
    "zoe": ("vision_zoe_config", ZOEDEPTH),
    "zoe.backbone": ("vision_zoe_config.backbone_config", VISION),
}
NAMES = {  # our fields' names in a published config
    **{
        f"{ours}.{field}": f"{theirs}.{name}"
        for ours, (theirs, names) in PARTS.items()
        for field, name in names.items()
    },
    **{"text_vocab": "image_token_index", "spatial_tokens": "spatial_token_num"},
}

# The defaults of transformers' configs.
VISION_DEFAULTS = {
    **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    **{"image_size": 224, "patch_size": 16},
}
GEMMA2_DEFAULTS = {
    **{"vocab_size": 256_000, "hidden_size": 2304, "num_hidden_layers": 26, "intermediate_size": 9216},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256},
    **{"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "rope_theta": 10_000.0,
}
ZOEDEPTH_DEFAULTS = {
    **{"neck_hidden_sizes": [96, 192, 384, 768], "fusion_hidden_size": 256, "num_relative_features": 32},
    **{"bottleneck_features": 256, "bin_embedding_dim": 128, "min_temp": 0.0212, "max_temp": 50.0},
}

BEIT_LARGE = {
    **{"image_size": 384, "num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096},
    **{"num_attention_heads": 16, "out_features": ["stage6", "stage12", "stage18", "stage24"]},
}

# Published fields for which our model supports one value, the first listed. The other values mean the same.
Fixed = dict[str, tuple[Any, ...]]
TANH_GELU = ("gelu_pytorch_tanh",)
SPATIALVLA_FIXED: Fixed = {
    "model_type": ("spatialvla",),
    "ego3d_patch_reso": (SUB_GRID,),
    "n_freqs": (NUM_FREQUENCIES,),
    "use_spatial_token": (True,),
    **{"bos_token_id": (BOS, None), "eos_token_id": (EOS, None), "pad_token_id": (PAD, None)},
    **{"tie_word_embeddings": (False,), "quantization_config": (None,)},
}
PALIGEMMA_FIXED: Fixed = {"model_type": ("paligemma",), "quantization_config": (None,)}
SIGLIP_FIXED: Fixed = {
    "model_type": ("siglip_vision_model",),
    "num_channels": (3,),
    "hidden_act": TANH_GELU,
    "layer_norm_eps": (1e-6,),
    "attention_dropout": (0.0,),
    "vision_use_head": (False,),
}
GEMMA2_FIXED: Fixed = {
    "model_type": ("gemma2",),
    "hidden_act": TANH_GELU,
    "hidden_activation": TANH_GELU,
    "rms_norm_eps": (1e-6,),
    "attention_bias": (False,),
    "attention_dropout": (0.0, None),
    "sliding_window_pattern": (2,),
    "use_bidirectional_attention": (None, False),
}
ROPE_FIXED: Fixed = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0,)}
# transformers' model ignores the attractors' alpha and gamma, and uses only the length of their numbers. Its weights
# have 16 attractors everywhere, and its code an alpha of 300.
ZOEDEPTH_FIXED: Fixed = {
    "model_type": ("zoedepth",),
    **{"backbone": (None,), "use_pretrained_backbone": (False, None), "use_timm_backbone": (False, None)},
    "hidden_act": ("gelu",),
    "readout_type": ("project",),
    "reassemble_factors": ([4, 2, 1, 0.5],),
    "head_in_index": (-1,),
    **{"use_batch_norm_in_fusion_residual": (False,), "use_bias_in_fusion_residual": (None, True)},
    "add_projection": (False,),
    **{"attractor_alpha": (1000,), "attractor_gamma": (2,), "attractor_kind": ("mean",)},
    "bin_centers_type": ("softplus",),
    "num_patch_transformer_layers": (4,),
}
BEIT_FIXED: Fixed = {
    "model_type": ("beit",),
    "num_channels": (3,),
    "hidden_act": ("gelu",),
    "layer_norm_eps": (1e-12,),
    **{"hidden_dropout_prob": (0.0,), "attention_probs_dropout_prob": (0.0,)},
    **{"use_relative_position_bias": (True,), "use_shared_relative_position_bias": (False,)},
    **{"use_absolute_position_embeddings": (False,), "use_mask_token": (False,)},
    **{"reshape_hidden_states": (False,), "add_fpn": (False,)},
}
# Fields of the image processor (preprocessor_config.json), whose work the policy does here. Null disables conversion to
# RGB, which the policy's images are anyway.
IMAGES_FIXED: Fixed = {
    "do_resize": (True,),
    "resample": (3,),  # bicubic
    "do_rescale": (True,),
    "rescale_factor": (1 / 255,),
    "do_normalize": (False,),  # done by the model
    "do_convert_rgb": (None, True, False),
}
# Fields of the release's processor (processor_config.json).
PROCESSOR_FIXED: Fixed = {"num_obs_steps": (1,), "obs_delta": (1,)}
ACTIONS_FIXED: Fixed = {"use_spherical": (True,)}
