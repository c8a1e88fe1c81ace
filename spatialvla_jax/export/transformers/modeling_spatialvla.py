"""SpatialVLA in PyTorch. This file and the other `*_spatialvla.py` files are shipped with a checkpoint.

They only need torch, transformers 5, sentencepiece and numpy. In the checkpoint's directory:

    model = AutoModel.from_pretrained(directory, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    inputs = processor(images=image, text="put the bowl on the plate")
    actions = processor.decode_actions(model.predict_action(inputs))["actions"]  # f[T, 7] in robot units

Axis letters: B batch, T query, S key, P image tokens, D width, V vocabulary.
"""

import hashlib
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Gemma2ForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    SiglipVisionModel,
    ZoeDepthForDepthEstimation,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_spatialvla import SpatialVLAConfig
from .ego3d_spatialvla import Ego3D, metric_depth, side_by_side
from .generation_spatialvla import ActionTokens, Graphs, check_ranges, run_graph

IGNORED = -100  # label of positions without a loss
DEPTH_PAD = 31  # pixels mirrored around the image for ZoeDepth
# Options of transformers' `generate` that make no sense for action chunks or that this model does not support.
NOT_GENERATED = (
    "assistant_model",
    "cache_implementation",
    "custom_generate",
    "guidance_scale",
    "inputs_embeds",
    "labels",
    "negative_prompt_ids",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "token_healing",
)


class Projector(nn.Module):
    def __init__(self, config: SpatialVLAConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class SpatialVLAForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """SigLIP + Ego3D → Gemma 2 → action tokens. The sequence is image tokens, prompt, actions."""

    config_class = SpatialVLAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # for Trainer: the loss is always a mean over this batch
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["Gemma2DecoderLayer", "SiglipEncoderLayer", "ZoeDepthForDepthEstimation"]

    def __init__(self, config: SpatialVLAConfig) -> None:
        super().__init__(config)
        config.text_config._attn_implementation = "eager"  # other implementations omit the soft cap
        self._inspected: tuple[list[tuple[int, int]], bool] = [], True
        self._graphs = Graphs()
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

    def __setattr__(self, name: str, value: Any) -> None:
        """`peft` sets `peft_config` when it adds adapters. Adapters trained on another base are refused."""
        if name == "peft_config":
            for config in value.values():
                expected = (getattr(config, "auto_mapping", None) or {}).get("base_fingerprint")
                if expected is not None and base_fingerprint(self) != expected:
                    raise ValueError(
                        "these adapters belong to another base: load "
                        f"{config.base_model_name_or_path} without changing its dtype"
                    )
        super().__setattr__(name, value)

    def get_input_embeddings(self) -> nn.Module:
        """The text embedding; action tokens use `spatial_embed_tokens`."""
        return self.language_model.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        if new_num_tokens not in (None, self.config.text_config.vocab_size):
            raise ValueError("resize_token_embeddings is not supported: the last rows are those of the action tokens")
        return self.get_input_embeddings()

    @torch.no_grad()
    def estimate_depth(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """RGB [B, 3, S, S] in [0, 1] → metric depth f32[B, S, S] in metres."""
        Z = self.config.vision_zoe_config.backbone_config.image_size
        padded = F.pad(pixel_values.float(), (DEPTH_PAD,) * 4, mode="reflect")
        images = F.interpolate(padded, (Z, Z), mode="bicubic", align_corners=True) * 2 - 1
        depth = metric_depth(self.vision_zoe_model, images.to(self.vision_zoe_model.dtype))
        depth = F.interpolate(depth.float()[:, None], padded.shape[-2:], mode="bicubic", align_corners=True)
        return depth[:, 0, DEPTH_PAD:-DEPTH_PAD, DEPTH_PAD:-DEPTH_PAD]

    def get_image_features(
        self, pixel_values: torch.Tensor, intrinsic: torch.Tensor | None = None, depth: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens at the language model's width [B, P, D], divided by sqrt(D). `depth` f32[B, S, S] in metres is used
        only with `depth_source` "dataset"; `intrinsic` f32[B, 3, 3] is in pixels of the S×S image."""
        source = self.config.depth_source
        pixels = (pixel_values.float() * 2 - 1).to(self.vision_tower.dtype)
        tokens, depth = side_by_side(
            lambda: self.vision_tower(pixel_values=pixels).last_hidden_state,
            lambda: self.estimate_depth(pixel_values) if source == "zoedepth" else depth,
            pixels.device,
        )
        if source != "none":
            if intrinsic is None or depth is None:
                needed = f"intrinsic{' and depth' if source == 'dataset' else ''}"
                raise ValueError(f"this model needs {needed} with an image")
            B, _, *size = pixel_values.shape
            if intrinsic.shape != (B, 3, 3) or depth.shape != (B, *size):
                found = f"got {list(intrinsic.shape)} and {list(depth.shape)}"
                raise ValueError(f"{B} images need intrinsic [{B}, 3, 3] and depth {[B, *size]}, {found}")
            tokens = tokens + self.position_embedding_3d(depth, intrinsic)
        return self.multi_modal_projector(tokens) / self.config.text_config.hidden_size**0.5

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, T, D]: text rows from the language model's table, action rows from the spatial embedding."""
        action = input_ids - self.config.action_token_begin_idx
        text = F.embedding(input_ids, self.language_model.model.embed_tokens.weight)
        spatial = self.spatial_embed_tokens(action.clamp(min=0))
        return torch.where((action >= 0)[..., None], spatial, text)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        intrinsic: torch.Tensor | None = None,
        depth: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        token_ranges: Any = None,
        **unsupported: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [B, T, V], or those of the last `logits_to_keep` positions. With `labels` [B, T], also the mean
        cross-entropy of labels that are not −100, each predicted at the position before. Without labels, logits that
        are infinite before the soft cap become NaN; all do if a weight is not finite.

        `attention_mask` [B, S] covers `past_key_values` and the T new tokens. `token_type_ids` [B, S] is 0 for image
        and prompt, which attend to each other in both directions, and 1 for causal action tokens. By default, tokens
        with labels are causal, as are tokens after a prompt in `past_key_values`. `token_ranges` only matters for
        generation. Raises ValueError for unsupported arguments, and if images and image tokens do not match.
        """
        if given := [name for name, value in unsupported.items() if value is not None]:
            raise ValueError(f"this model does not support {', '.join(given)}")
        if input_ids is None:
            raise ValueError("this model needs input_ids")
        if self.config.text_config._attn_implementation != "eager":
            raise ValueError("the language model needs attn_implementation='eager': others leave its soft cap out")
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past_key_values is not None and (
            type(past_key_values) is not DynamicCache or any(past_key_values.is_sliding)
        ):
            raise ValueError("past_key_values must be a DynamicCache() that keeps all tokens in every layer")
        checkpointed = self.training and any(x.gradient_checkpointing for x in self.language_model.model.layers)
        if past_key_values is not None and checkpointed:
            raise ValueError(
                "gradient checkpointing keeps no past_key_values: call eval() before actions are predicted"
            )
        asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        B, T = input_ids.shape
        attention_mask = input_ids.new_ones(B, past + T) if attention_mask is None else attention_mask
        if labels is not None:
            token_type_ids = _check_labels(labels, input_ids, token_type_ids, bool(past or logits_to_keep))
        for name, x in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if x is not None and x.shape != (B, past + T):
                raise ValueError(f"{name} must have shape {[B, past + T]}, got {list(x.shape)}")

        if pixel_values is not None or not past:
            self._check_images(input_ids, pixel_values, past)
        embeddings = self.embed_inputs(input_ids, pixel_values, intrinsic, depth)
        positions = attention_mask.cumsum(1)  # from 1, as in PaliGemma
        out = self.language_model.model(
            inputs_embeds=embeddings,
            attention_mask=self.attention_masks(attention_mask.bool(), positions, token_type_ids, T, embeddings.dtype),
            position_ids=positions[:, -T:],
            past_key_values=DynamicCache() if use_cache and past_key_values is None else past_key_values,
            use_cache=bool(use_cache or past_key_values is not None),
            return_dict=True,
            **{name: getattr(self.config, name) if value is None else value for name, value in asked.items()},
        )
        scores = self.language_model.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        logits, cap = scores, self.config.text_config.final_logit_softcapping
        if cap is not None:
            logits = torch.tanh(scores / cap) * cap
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
        else:
            sound = pixel_values is None or self.has_finite_weights()
            logits = logits.masked_fill(~scores.isfinite(), torch.nan) if sound else logits * torch.nan
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def has_finite_weights(self) -> bool:
        """Whether all weights are finite; checked again only after one was written. Most non-finite weights show in the
        logits, but a ReLU, ZoeDepth's choice of head or the attention's soft cap may hide one."""
        weights = [x for x in self.parameters() if x.is_floating_point() and x.element_size() > 1 and not x.is_meta]
        versions = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in weights]
        if self._inspected[0] != versions:
            self._inspected = versions, all(bool(x.isfinite().all()) for x in weights)
        return self._inspected[1]

    def embed_inputs(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        intrinsic: torch.Tensor | None = None,
        depth: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The language model's inputs [B, T, D], with image features in place of the image tokens."""
        embeddings = self.embed_input_ids(input_ids)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, intrinsic, depth).to(embeddings.dtype)
            places = input_ids == self.config.image_token_index
            embeddings = embeddings.masked_scatter(places[..., None], features)
        if hasattr(self.language_model.model.embed_tokens, "embed_scale"):
            # transformers 5.0 scales all inputs of the language model, later versions only embedded tokens.
            embeddings = embeddings * self.config.text_config.hidden_size**0.5
        return embeddings

    def _check_images(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, past: int) -> None:
        """Raises ValueError if images and their tokens do not match."""
        found = (input_ids == self.config.image_token_index).sum(1).tolist()
        if pixel_values is not None:
            vision = self.config.vision_config
            count = (vision.image_size // vision.patch_size) ** 2
            if len(pixel_values) != len(found) or any(number != count for number in found):
                raise ValueError(
                    f"{len(found)} prompts need an image each and {count} image tokens, got {len(pixel_values)} "
                    f"images and {found} tokens"
                )
        elif not past and any(found):
            raise ValueError("input_ids hold image tokens, and there are no pixel_values")

    def attention_masks(
        self, valid: torch.Tensor, positions: torch.Tensor, types: torch.Tensor | None, T: int, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """What to add to the scores of the last T of S positions, for global and for local layers: [B, 1, T, S]."""
        order = torch.arange(valid.shape[1], device=valid.device)
        visible = (order <= order[-T:, None]).expand(len(valid), -1, -1)
        if self.config.prefix_lm and types is not None:
            visible = visible | (types == 0)[:, None]
        elif self.config.prefix_lm and len(order) == T:
            visible = torch.ones_like(visible)
        visible = visible & valid[:, None]
        local = visible & (positions[:, -T:, None] - positions[:, None] < self.config.text_config.sliding_window)
        return {
            name: torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]
            for name, mask in (("full_attention", visible), ("sliding_attention", local))
        }

    @torch.no_grad()
    def predict_action(self, model_inputs: Any) -> torch.Tensor:
        """The processor's inputs → token ids of one greedily decoded action chunk: i64[B, action tokens].

        If the inputs contain `token_ranges` (the processor's do), every token is the best of its kind, otherwise the
        best of the whole vocabulary. Raises ValueError for prompts padded on the right, for labels, and if the model's
        outputs are NaN or infinite.
        """
        _check_prompt(model_inputs.get("input_ids"), model_inputs)
        given = {name: x for name, x in model_inputs.items() if name != "token_ranges"}
        ranges = check_ranges(model_inputs.get("token_ranges"))
        inputs = {name: x.to(self.device, non_blocking=True) for name, x in given.items()}
        self._check_images(given["input_ids"], given.get("pixel_values"), 0)
        if (tokens := run_graph(self, self._graphs, inputs, ranges)) is not None:
            return tokens
        choose = ActionTokens(ranges, 0, self.config.num_action_tokens)
        ids, cache = inputs["input_ids"], DynamicCache()
        mask = inputs.pop("attention_mask", torch.ones_like(ids))
        tokens = ids[:, :0]
        logits = self(**inputs, attention_mask=mask, past_key_values=cache, logits_to_keep=1, return_dict=True).logits
        while True:
            best = choose(tokens, logits[:, -1]).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], 1)
            if tokens.shape[1] == self.config.num_action_tokens:
                return tokens
            mask = F.pad(mask, (0, 1), value=1)
            logits = self(best, mask, past_key_values=cache, logits_to_keep=1, return_dict=True).logits

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        token_ranges: Any = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`: returns the prompt and a chunk i64[B, T + action tokens], or `max_new_tokens`.

        With `token_ranges` (from the processor) every token has its kind and `<eos>` follows the chunk, so greedy
        tokens equal those of `predict_action`. Raises ValueError as `predict_action` does, and for unsupported
        arguments.
        """
        settings = generation_config or self.generation_config
        values = {name: kwargs.get(name, getattr(settings, name, None)) for name in NOT_GENERATED}
        if given := [name for name, value in values.items() if value is not None and value is not False]:
            raise ValueError(f"generate does not support {', '.join(given)} for this model")
        if kwargs.get("use_cache") is False:
            raise ValueError("generate does not support use_cache=False for this model")
        prompt = _check_prompt(kwargs.get("input_ids") if inputs is None else inputs, kwargs)
        if kwargs.get("max_new_tokens", settings.max_new_tokens) is None and kwargs.get("max_length") is None:
            kwargs["max_new_tokens"] = self.config.num_action_tokens
        kwargs.setdefault("past_key_values", DynamicCache())
        choose = ActionTokens(token_ranges, prompt.shape[1], self.config.num_action_tokens)
        base: Any = super()
        return base.generate(
            inputs, generation_config, LogitsProcessorList([*(logits_processor or []), choose]), **kwargs
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """First the prompt with its image, then only the new token."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        outputs = ("logits_to_keep", "output_attentions", "output_hidden_states")
        names = outputs if past else (*outputs, "pixel_values", "intrinsic", "depth", "token_type_ids")
        inputs = {name: kwargs[name] for name in names if name in kwargs}
        inputs |= {"input_ids": input_ids[:, past:], "attention_mask": attention_mask}
        return inputs | {"past_key_values": past_key_values, "use_cache": True}


def base_fingerprint(model: nn.Module) -> str:
    """A hash of 64 evenly spaced values of each parameter that belongs neither to an adapter nor to ZoeDepth."""
    found = {}
    for name, x in model.named_parameters():
        if ".lora_" not in name and ".modules_to_save." not in name and not name.startswith("vision_zoe_model."):
            for wrapper in (".base_layer", ".original_module"):
                name = name.replace(wrapper, "")
            values = x.detach().flatten()
            samples = values[:: max(1, len(values) // 64)][:64].float().cpu().numpy()
            found[name.replace("vision_tower.vision_model.", "vision_tower.")] = samples
    total = hashlib.sha256()
    for name in sorted(found):
        total.update(name.encode() + found[name].astype("<f4").tobytes())
    return total.hexdigest()


def _check_labels(
    labels: torch.Tensor, input_ids: torch.Tensor, types: torch.Tensor | None, partial: bool
) -> torch.Tensor:
    """→ token types. Raises ValueError for labels without a target or at positions that cannot have one."""
    if labels.shape != input_ids.shape or partial:
        raise ValueError("labels must have the shape of input_ids, and need the logits of all their places")
    counted = labels != IGNORED
    if not counted[:, 1:].any():
        raise ValueError(f"labels hold no target: all are {IGNORED}")
    if types is not None and types.shape == labels.shape and (counted & (types == 0)).any():
        raise ValueError("token_type_ids must be 1 where labels count: a token of type 0 is seen by those before it")
    return counted.long() if types is None else types


def _check_prompt(input_ids: torch.Tensor | None, inputs: dict[str, Any]) -> torch.Tensor:
    if input_ids is None or inputs.get("labels") is not None:
        raise ValueError("actions are predicted from a prompt: give input_ids, and leave out labels")
    mask = inputs.get("attention_mask")
    if mask is not None and not mask[:, -1].all():
        raise ValueError("prompts must be padded on the left")
    return input_ids
