"""SpatialVLA in PyTorch: configuration, model and processor in one file that travels with a checkpoint.

Needs torch, transformers 5, sentencepiece and numpy, and nothing else. In the checkpoint's directory:

    model = AutoModel.from_pretrained(directory, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    inputs = processor(images=image, text="put the bowl on the plate")
    actions = processor.decode_actions(model.predict_action(inputs))["actions"]  # f[T, 7] in robot units

Axis letters: B batch, T query, S key, P image tokens, D width.
"""

import base64
import json
import os
from typing import Any, ClassVar

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PretrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.hub import cached_file

BOS = 2
DEPTH_PAD = 31  # pixels mirrored around the image for ZoeDepth
SUB_GRID = 2  # 3-D points along one side of a patch
NUM_FREQUENCIES = 8


class SpatialVLAConfig(PretrainedConfig):
    """The published fields; `spatialvla_jax` holds those that the published config has no place for."""

    model_type = "spatialvla"
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": Gemma2Config,
        "vision_config": SiglipVisionConfig,
        "vision_zoe_config": ZoeDepthConfig,
    }

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        vision_zoe_config: Any = None,
        image_token_index: int = 257_152,
        action_token_begin_idx: int = 257_153,
        spatial_token_num: int = 8194,
        use_vision_zoe: bool = True,
        spatialvla_jax: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        parts = {"text_config": text_config, "vision_config": vision_config, "vision_zoe_config": vision_zoe_config}
        for name, part in parts.items():
            made = part if isinstance(part, PretrainedConfig) else self.sub_configs[name](**(part or {}))
            setattr(self, name, made)
        self.image_token_index = image_token_index
        self.action_token_begin_idx = action_token_begin_idx
        self.spatial_token_num = spatial_token_num
        self.use_vision_zoe = use_vision_zoe
        self.spatialvla_jax = spatialvla_jax or {}
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def depth_source(self) -> str:
        """`zoedepth` (estimated in the model), `dataset` (the caller's) or `none` (no Ego3D)."""
        return self.spatialvla_jax.get("depth", "zoedepth" if self.use_vision_zoe else "none")

    @property
    def prefix_lm(self) -> bool:
        """Whether image and prompt see each other both ways; otherwise every token is causal."""
        return self.spatialvla_jax.get("mask", "prefix") == "prefix"

    @property
    def num_action_tokens(self) -> int:
        return self.spatialvla_jax.get("action_chunk", 4) * self.spatialvla_jax.get("tokens_per_action", 3)


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


class SpatialVLAProcessor:
    """Image and sentence → inputs of the model; its token ids → actions in robot units.

    `config` and `data` are the checkpoint's config.json and processor.json.
    """

    def __init__(self, config: dict[str, Any], data: dict[str, Any]) -> None:
        extra, vision = config.get("spatialvla_jax", {}), config["vision_config"]
        self.image_size = vision.get("image_size", 224)
        self.image_seq_length = (self.image_size // vision.get("patch_size", 16)) ** 2
        self.image_token_id = config["image_token_index"]
        self.action_offset = config["action_token_begin_idx"]
        self.action_chunk_size = extra.get("action_chunk", 4)
        self.statistics, self.prompt_template = data["statistics"], data["prompt_template"]
        self.intrinsics = {name: np.asarray(camera, np.float32) for name, camera in data["intrinsics"].items()}
        self.grid = {name: np.asarray(x, np.float32) for name, x in data["grid"].items() if name != "kind"}
        self.tokenizer = sentencepiece.SentencePieceProcessor()
        self.tokenizer.LoadFromSerializedProto(base64.b64decode(data["tokenizer"]))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs: Any) -> "SpatialVLAProcessor":
        known = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
        options = {name: kwargs[name] for name in known if name in kwargs}
        parts = []
        for name in ("config.json", "processor.json"):
            with open(str(cached_file(path, name, **options)), encoding="utf-8") as file:
                parts.append(json.load(file))
        return cls(*parts)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """AutoProcessor asks for it; there is nothing to note, as the directory names this class already."""

    def __call__(
        self,
        images: Any,
        text: str | list[str],
        unnorm_key: str | None = None,
        intrinsics: Any = None,
        depth: Any = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """One example or a list of them: `images` PIL or u8[H, W, 3], `text` the bare instruction.

        `intrinsics` [3, 3] are in pixels of the given image and default to those of the dataset `unnorm_key`; `depth`
        [H, W] in metres is for a model that takes depth from its data. Sentences are padded on the left.
        """
        if isinstance(text, str):
            images = images[0] if isinstance(images, (list, tuple)) else images
            one = (images, text, intrinsics, depth)
            images, text, intrinsics, depth = (None if x is None else [x] for x in one)  # type: ignore[assignment]
        count = len(text)
        if len(images) != count:
            raise ValueError(f"there are {len(images)} images for {count} sentences")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}; the model takes 'pt'")
        pixels = [np.asarray(image.convert("RGB") if hasattr(image, "convert") else image) for image in images]
        cameras = [None] * count if intrinsics is None else list(intrinsics)
        ids = [[self.image_token_id] * self.image_seq_length + self.encode(sentence) for sentence in text]
        longest = max(map(len, ids))
        data = {
            "input_ids": torch.tensor([[0] * (longest - len(x)) + x for x in ids]),
            "attention_mask": torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in ids]),
            "pixel_values": torch.from_numpy(np.stack([self.resize(x) for x in pixels])),
            "intrinsic": torch.from_numpy(
                np.stack([self.camera(k, x.shape, unnorm_key) for k, x in zip(cameras, pixels, strict=True)])
            ),
            "token_ranges": torch.tensor([[self.action_offset + first, size] for first, size in self.token_ranges]),
        }
        if depth is not None:
            data["depth"] = torch.from_numpy(np.stack([nearest(np.asarray(x), self.image_size) for x in depth]))
        return BatchFeature(data)

    def encode(self, sentence: str) -> list[int]:
        prompt = self.prompt_template.replace("{instruction}", sentence.strip().lower())
        return [BOS, *self.tokenizer.EncodeAsIds(prompt), self.tokenizer.PieceToId("\n")]

    def resize(self, image: np.ndarray) -> np.ndarray:
        """u8[H, W, 3] → f32[3, S, S] in [0, 1]: antialiased Lanczos to whole levels, as in training."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"an image is uint8[H, W, 3], not {image.dtype}{list(image.shape)}")
        rows, columns = (lanczos(n, self.image_size) for n in image.shape[:2])
        resized = np.einsum("yh,hwc,xw->cyx", rows, image.astype(np.float32), columns, optimize=True)
        return resized.round().clip(0, 255).astype(np.float32) / 255

    def camera(self, intrinsics: Any, shape: tuple[int, ...], unnorm_key: str | None) -> np.ndarray:
        """f32[3, 3] in pixels of the S×S image."""
        if intrinsics is None:
            default = next(iter(self.intrinsics))
            size, matrix = (1, 1), self.intrinsics.get(unnorm_key or default, self.intrinsics[default])
        else:
            size, matrix = shape[:2], np.asarray(intrinsics, np.float32)
        S = self.image_size
        return (matrix * np.array([[S / size[1]], [S / size[0]], [1.0]])).astype(np.float32)

    @property
    def token_ranges(self) -> list[tuple[int, int]]:
        """(first id, count) of each token of one action, counted from the first action token."""
        if "levels" in self.grid:
            return [(0, len(self.grid["levels"]))] * 7
        theta, phi, r, roll, pitch, yaw = self._bins()
        translations, rotations = theta * phi * r, roll * pitch * yaw
        return [(0, translations), (translations, rotations), (translations + rotations, 2)]

    def decode_actions(self, generation_outputs: torch.Tensor, unnorm_key: str | None = None) -> dict[str, np.ndarray]:
        """Token ids [tokens] or [1, tokens] of one example → {"actions": f64[T, 7] in robot units, "action_ids": their
        token ids i64[T, tokens of an action]}. The gripper is 0 closed … 1 open."""
        ids = generation_outputs.detach().cpu().numpy()
        ranges = self.token_ranges
        if ids.size != self.action_chunk_size * len(ranges):
            raise ValueError(f"one chunk has {self.action_chunk_size} × {len(ranges)} tokens, got {list(ids.shape)}")
        if unnorm_key is None and len(self.statistics) == 1:
            unnorm_key = next(iter(self.statistics))
        if unnorm_key not in self.statistics:
            raise ValueError(f"unnorm_key {unnorm_key!r} is none of {', '.join(self.statistics)}")
        ids = ids.reshape(self.action_chunk_size, len(ranges))
        actions = self.from_grid(ids - self.action_offset)
        rows = self.statistics[unnorm_key]["action"]
        low, high = np.asarray(rows["q01"]), np.asarray(rows["q99"])
        mask = np.asarray(rows.get("mask", [True] * 6 + [False]), bool)
        return {"actions": np.where(mask, (actions + 1) / 2 * (high - low) + low, actions), "action_ids": ids}

    def from_grid(self, ids: np.ndarray) -> np.ndarray:
        """Ids counted from the first action token, i[T, tokens] → normalised actions f32[T, 7] at the bins' middles."""
        kinds = zip(ids.T, self.token_ranges, strict=True)
        ids = np.stack([np.clip(x - first, 0, size - 1) for x, (first, size) in kinds], -1)
        if "levels" in self.grid:
            return self.grid["levels"][ids]
        bins = self._bins()
        bins = [*np.unravel_index(ids[:, 0], bins[:3]), *np.unravel_index(ids[:, 1], bins[3:])]
        edges = [self.grid[name] for name in ("theta", "phi", "r", "roll", "pitch", "yaw")]
        theta, phi, r, *angles = (((e[:-1] + e[1:]) / 2)[i] for e, i in zip(edges, bins, strict=True))
        xyz = np.stack([r * np.sin(theta) * np.cos(phi), r * np.sin(theta) * np.sin(phi), r * np.cos(theta)], -1)
        return np.concatenate([xyz.clip(-1, 1), np.stack([*angles, ids[:, 2].astype(np.float32)], -1)], -1)

    def _bins(self) -> list[int]:
        return [len(self.grid[name]) - 1 for name in ("theta", "phi", "r", "roll", "pitch", "yaw")]


def lanczos(n: int, m: int) -> np.ndarray:
    """Weights f32[m, n] that resize n samples to m: Lanczos with radius 3, widened where it shrinks."""
    position = (np.arange(m) + 0.5) * n / m - 0.5
    x = (position[:, None] - np.arange(n)) / max(n / m, 1)
    weights = np.where(np.abs(x) <= 3, np.sinc(x) * np.sinc(x / 3), 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def nearest(depth: np.ndarray, size: int) -> np.ndarray:
    """f32[H, W] → f32[size, size]."""
    rows, columns = (((np.arange(size) + 0.5) * n / size).astype(int) for n in depth.shape)
    return depth[rows[:, None], columns].astype(np.float32)
