"""SpatialVLA in PyTorch. This file and its two neighbours, configuration and processor, travel with a checkpoint.

They need torch, transformers 5, sentencepiece and numpy, and nothing else. In the checkpoint's directory:

    model = AutoModel.from_pretrained(directory, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    inputs = processor(images=image, text="put the bowl on the plate")
    actions = processor.decode_actions(model.predict_action(inputs))["actions"]  # f[T, 7] in robot units

Axis letters: B batch, T query, S key, P image tokens, D width.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma2ForCausalLM, PreTrainedModel, SiglipVisionModel, ZoeDepthForDepthEstimation
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_spatialvla import SpatialVLAConfig

DEPTH_PAD = 31  # pixels mirrored around the image for ZoeDepth
SUB_GRID = 2  # 3-D points along one side of a patch
NUM_FREQUENCIES = 8


class Projector(nn.Module):
    def __init__(self, config: SpatialVLAConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Ego3D(nn.Module):
    """Depth f32[B, S, S] in metres and intrinsics f32[B, 3, 3] in pixels → position embedding [B, P, width]."""

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        numbers = SUB_GRID**2 * 3 * (1 + 2 * NUM_FREQUENCIES)
        first, last = nn.Linear(numbers, width), nn.Linear(width, width)
        self.position_embedding_head = nn.Sequential(first, nn.LayerNorm(width), nn.ReLU(), last)

    def forward(self, depth: torch.Tensor, intrinsics: torch.Tensor) -> torch.Tensor:
        encoding = frequency_encoding(back_project(depth, intrinsics, self.grid))
        return self.position_embedding_head(encoding.to(next(self.parameters()).dtype))


def back_project(depth: torch.Tensor, intrinsics: torch.Tensor, grid: int) -> torch.Tensor:
    """Camera-frame points in metres at the centres of a 2×2 sub-grid in each patch: f32[B, P, 12]."""
    n = grid * SUB_GRID
    step = depth.shape[-1] // n
    cells = F.avg_pool2d(depth.float()[:, None], step)[:, 0]
    centre = torch.arange(n, dtype=torch.float32, device=depth.device) * step + step / 2
    v, u = torch.meshgrid(centre, centre, indexing="ij")
    rays = torch.linalg.inv(intrinsics.float()) @ torch.stack([u, v, torch.ones_like(u)]).reshape(3, -1)
    points = rays.reshape(-1, 3, n, n) * cells[:, None]
    points = points.reshape(-1, 3, grid, SUB_GRID, grid, SUB_GRID).permute(0, 2, 4, 3, 5, 1)
    return points.reshape(len(depth), grid**2, -1)


def frequency_encoding(points: torch.Tensor) -> torch.Tensor:
    """(p − [0, 0, 2]) / 2, then per number: itself, sin and cos at 2^0 … 2^7: f32[B, P, 204]."""
    x = ((points - points.new_tensor([0.0, 0.0, 2.0]).repeat(SUB_GRID**2)) / 2)[..., None]
    angle = x * 2.0 ** torch.arange(NUM_FREQUENCIES, device=x.device)
    return torch.cat([x, angle.sin(), angle.cos()], -1).flatten(-2)


class SpatialVLAForConditionalGeneration(PreTrainedModel):
    """SigLIP + Ego3D → Gemma 2 → action tokens. Image tokens, prompt and actions follow each other; padding is left."""

    config_class = SpatialVLAConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["Gemma2DecoderLayer", "SiglipEncoderLayer", "ZoeDepthForDepthEstimation"]

    def __init__(self, config: SpatialVLAConfig) -> None:
        super().__init__(config)
        config.text_config._attn_implementation = "eager"  # the others leave the soft cap out
        vision = config.vision_config
        self.vision_tower = SiglipVisionModel(vision)
        self.multi_modal_projector = Projector(config)
        self.language_model = Gemma2ForCausalLM(config.text_config)
        self.spatial_embed_tokens = nn.Embedding(config.spatial_token_num, config.text_config.hidden_size)
        if config.depth_source != "none":
            self.position_embedding_3d = Ego3D(vision.hidden_size, vision.image_size // vision.patch_size)
        if config.depth_source == "zoedepth":
            self.vision_zoe_model = ZoeDepthForDepthEstimation(config.vision_zoe_config)
        self.post_init()

    @torch.no_grad()
    def estimate_depth(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """RGB [B, 3, S, S] in [0, 1] → metric depth f32[B, S, S] in metres."""
        Z = self.config.vision_zoe_config.backbone_config.image_size
        padded = F.pad(pixel_values.float(), (DEPTH_PAD,) * 4, mode="reflect")
        images = F.interpolate(padded, (Z, Z), mode="bicubic", align_corners=True) * 2 - 1
        # One image at a time: ZoeDepth sums its indoor/outdoor vote over a batch.
        images = images.to(self.vision_zoe_model.dtype).split(1)
        depth = torch.cat([self.vision_zoe_model(pixel_values=image).predicted_depth for image in images])
        depth = F.interpolate(depth.float()[:, None], padded.shape[-2:], mode="bicubic", align_corners=True)
        return depth[:, 0, DEPTH_PAD:-DEPTH_PAD, DEPTH_PAD:-DEPTH_PAD]

    def get_image_features(
        self, pixel_values: torch.Tensor, intrinsic: torch.Tensor | None = None, depth: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens at the language model's width [B, P, D], divided by sqrt(D). `depth` f32[B, S, S] in metres is read by
        a model that takes it from its data alone; `intrinsic` f32[B, 3, 3] in pixels of the S×S image."""
        pixels = (pixel_values.float() * 2 - 1).to(self.vision_tower.dtype)
        tokens = self.vision_tower(pixel_values=pixels).last_hidden_state
        source = self.config.depth_source
        if source != "none":
            if intrinsic is None or (source == "dataset" and depth is None):
                raise ValueError(
                    f"this model needs intrinsic{' and depth' if source == 'dataset' else ''} with an image"
                )
            depth = self.estimate_depth(pixel_values) if source == "zoedepth" else depth
            tokens = tokens + self.position_embedding_3d(depth, intrinsic)
        return self.multi_modal_projector(tokens) / self.config.text_config.hidden_size**0.5

    def embed_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Text rows from the language model's table, action rows from the spatial embedding: [B, T, D]."""
        action = input_ids - self.config.action_token_begin_idx
        text = F.embedding(input_ids, self.language_model.model.embed_tokens.weight)
        spatial = self.spatial_embed_tokens(action.clamp(min=0))
        return torch.where((action >= 0)[..., None], spatial, text)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        intrinsic: torch.Tensor | None = None,
        depth: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], or of the last `logits_to_keep` positions.

        `attention_mask` [B, S] covers what lies in `past_key_values` and the T new tokens. `token_type_ids` [B, S] is 0
        for image and prompt, which see each other both ways, and 1 for causal action tokens (all 0 by default).
        """
        B, T = input_ids.shape
        if attention_mask is None:
            attention_mask = input_ids.new_ones(B, T + (past_key_values.get_seq_length() if past_key_values else 0))
        embeddings = self.embed_tokens(input_ids)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, intrinsic, depth).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter((input_ids == self.config.image_token_index)[..., None], features)
        if hasattr(self.language_model.model.embed_tokens, "embed_scale"):
            # transformers 5.0 scales all inputs of the language model, later versions only what they look up.
            embeddings = embeddings * self.config.text_config.hidden_size**0.5
        positions = attention_mask.cumsum(1)  # from 1, as PaliGemma counts
        return self.language_model(
            inputs_embeds=embeddings,
            attention_mask=self._masks(attention_mask.bool(), positions, token_type_ids, T, embeddings.dtype),
            position_ids=positions[:, -T:],
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            logits_to_keep=logits_to_keep,
        )

    def _masks(
        self, valid: torch.Tensor, positions: torch.Tensor, types: torch.Tensor | None, T: int, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """What to add to the scores of the last T of S positions, in global and in local layers: [B, 1, T, S]."""
        order = torch.arange(valid.shape[1], device=valid.device)
        visible = (order <= order[-T:, None]).expand(len(valid), -1, -1)
        if self.config.prefix_lm:
            visible = torch.ones_like(visible) if types is None else visible | (types == 0)[:, None]
        visible = visible & valid[:, None]
        local = visible & (positions[:, -T:, None] - positions[:, None] < self.config.text_config.sliding_window)
        return {
            name: torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]
            for name, mask in (("full_attention", visible), ("sliding_attention", local))
        }

    @torch.no_grad()
    def predict_action(self, model_inputs: Any) -> torch.Tensor:
        """The processor's inputs → the token ids of one action chunk, greedily: i64[B, action tokens].

        Every token is the best of its kind where the inputs hold `token_ranges` (the processor's do); without them it
        is the best of the whole vocabulary.
        """
        inputs = {name: x.to(self.device) for name, x in model_inputs.items()}
        ranges = inputs.pop("token_ranges", None)
        mask, cache, ids = inputs["attention_mask"], DynamicCache(), []
        logits = self(**inputs, past_key_values=cache, logits_to_keep=1).logits
        for step in range(self.config.num_action_tokens):
            if step:
                mask = F.pad(mask, (0, 1), value=1)
                logits = self(ids[-1], mask, past_key_values=cache, logits_to_keep=1).logits
            first, count = (0, logits.shape[-1]) if ranges is None else ranges[step % len(ranges)].tolist()
            ids.append(first + logits[..., first : first + count].argmax(-1))
        return torch.cat(ids, 1)
