"""Names and layouts of all parameters, ours and the published ones, in one table that serves both directions.

Our tree stacks a transformer's layers on the first axis and follows big_vision. The published checkpoints (Hugging
Face) hold one tensor per layer. A `Rule` connects one of our arrays with published keys:

- `layout` names the axes of one published tensor, published -> ours, as in "(N H) D -> N D H";
- `{layer}` in a key runs over the preceding axes of our array: one, or [stage, layer] in row-major order;
- several keys are stacked along the axis just before the layout's.

Layouts only move numbers, so a conversion and its inverse are bit-exact. `slots` describes single tensors, so that
checkpoints can be streamed in either direction.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from einops import rearrange

from spatialvla_jax.batch import example_inputs
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.spatialvla import SpatialVLA, SpatialVLAConfig

VECTOR = "D -> D"
TABLE = "V D -> V D"
DENSE = "O I -> I O"
CONV = "O I h w -> h w I O"  # also transposed convolutions, with O and I swapped
HEADS_IN, HEADS_BIAS, HEADS_OUT = "(N H) D -> D N H", "(N H) -> N H", "D (N H) -> N H D"


@dataclass(frozen=True)
class Rule:
    path: str
    layout: str
    keys: tuple[str, ...]


def _rule(path: str, layout: str, *keys: str) -> list[Rule]:
    return [Rule(path, layout, keys)]


def _dense(path: str, key: str, kernel: str = DENSE, bias: str | None = VECTOR) -> list[Rule]:
    rules = _rule(f"{path}/kernel", kernel, f"{key}.weight")
    return rules if bias is None else rules + _rule(f"{path}/bias", bias, f"{key}.bias")


def _norm(path: str, key: str) -> list[Rule]:
    return _rule(f"{path}/scale", VECTOR, f"{key}.weight") + _rule(f"{path}/bias", VECTOR, f"{key}.bias")


def _attention(path: str, keys: Sequence[str], key_bias: str | None = HEADS_BIAS) -> list[Rule]:
    query, key, value, out = keys
    return [
        *_dense(f"{path}/query", query, HEADS_IN, HEADS_BIAS),
        *_dense(f"{path}/key", key, HEADS_IN, key_bias),
        *_dense(f"{path}/value", value, HEADS_IN, HEADS_BIAS),
        *_dense(f"{path}/out", out, HEADS_OUT),
    ]


def siglip(theirs: str = "vision_tower.vision_model") -> list[Rule]:
    block, layer = "img/Transformer/encoderblock", f"{theirs}.encoder.layers.{{layer}}"
    return [
        *_dense("img/embedding", f"{theirs}.embeddings.patch_embedding", CONV),
        *_rule("img/pos_embedding", "P D -> 1 P D", f"{theirs}.embeddings.position_embedding.weight"),
        *_norm(f"{block}/LayerNorm_0", f"{layer}.layer_norm1"),
        *_norm(f"{block}/LayerNorm_1", f"{layer}.layer_norm2"),
        *_attention(
            f"{block}/MultiHeadDotProductAttention_0",
            [f"{layer}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")],
        ),
        *_dense(f"{block}/MlpBlock_0/Dense_0", f"{layer}.mlp.fc1"),
        *_dense(f"{block}/MlpBlock_0/Dense_1", f"{layer}.mlp.fc2"),
        *_norm("img/Transformer/encoder_norm", f"{theirs}.post_layernorm"),
    ]


def gemma2(theirs: str = "language_model.model") -> list[Rule]:
    block, layer = "llm/layers", f"{theirs}.layers.{{layer}}"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    return [
        *_rule("llm/embedder/input_embedding", TABLE, f"{theirs}.embed_tokens.weight"),
        *_rule(f"{block}/attn/q_einsum/w", "(N H) D -> N D H", f"{attention}.q_proj.weight"),
        *_rule(
            f"{block}/attn/kv_einsum/w", "(K H) D -> K D H", f"{attention}.k_proj.weight", f"{attention}.v_proj.weight"
        ),
        *_rule(f"{block}/attn/attn_vec_einsum/w", HEADS_OUT, f"{attention}.o_proj.weight"),
        *_rule(f"{block}/mlp/gating_einsum", DENSE, f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
        *_rule(f"{block}/mlp/linear", DENSE, f"{mlp}.down_proj.weight"),
        *_rule(f"{block}/pre_attention_norm/scale", VECTOR, f"{layer}.input_layernorm.weight"),
        *_rule(f"{block}/post_attention_norm/scale", VECTOR, f"{layer}.post_attention_layernorm.weight"),
        *_rule(f"{block}/pre_ffw_norm/scale", VECTOR, f"{layer}.pre_feedforward_layernorm.weight"),
        *_rule(f"{block}/post_ffw_norm/scale", VECTOR, f"{layer}.post_feedforward_layernorm.weight"),
        *_rule("llm/final_norm/scale", VECTOR, f"{theirs}.norm.weight"),
    ]


def zoedepth() -> list[Rule]:
    theirs = "vision_zoe_model"
    return [
        *_beit("zoe/backbone", f"{theirs}.backbone"),
        *_zoedepth_neck("zoe/neck", f"{theirs}.neck"),
        *_convs("zoe/relative_head", f"{theirs}.relative_head.conv{{}}", numbers=(1, 2, 3)),
        *_zoedepth_metric_head("zoe/metric_head", f"{theirs}.metric_head"),
    ]


def _beit(ours: str, theirs: str) -> list[Rule]:
    block, layer = f"{ours}/stages/layers", f"{theirs}.encoder.layer.{{layer}}"
    attention = f"{layer}.attention.attention"
    return [
        *_rule(f"{ours}/cls_token", "A B D -> A B D", f"{theirs}.embeddings.cls_token"),
        *_dense(f"{ours}/patch_embedding", f"{theirs}.embeddings.patch_embeddings.projection", CONV),
        *_attention(
            f"{block}/attention",
            [*(f"{attention}.{name}" for name in ("query", "key", "value")), f"{layer}.attention.output.dense"],
            key_bias=None,
        ),
        *_rule(
            f"{block}/attention/relative_position_bias",
            TABLE,
            f"{attention}.relative_position_bias.relative_position_bias_table",
        ),
        *_norm(f"{block}/norm1", f"{layer}.layernorm_before"),
        *_norm(f"{block}/norm2", f"{layer}.layernorm_after"),
        *_dense(f"{block}/mlp_in", f"{layer}.intermediate.dense"),
        *_dense(f"{block}/mlp_out", f"{layer}.output.dense"),
        *_rule(f"{block}/layer_scale1", VECTOR, f"{layer}.lambda_1"),
        *_rule(f"{block}/layer_scale2", VECTOR, f"{layer}.lambda_2"),
    ]


def _zoedepth_neck(ours: str, theirs: str) -> list[Rule]:
    rules = []
    for i in range(4):
        reassemble, fusion = f"{theirs}.reassemble_stage", f"{theirs}.fusion_stage.layers.{i}"
        rules += _dense(f"{ours}/reassemble_{i}/readout", f"{reassemble}.readout_projects.{i}.0")
        rules += _dense(f"{ours}/reassemble_{i}/projection", f"{reassemble}.layers.{i}.projection", CONV)
        rules += _dense(f"{ours}/reassemble_{i}/resize", f"{reassemble}.layers.{i}.resize", CONV)
        rules += _dense(f"{ours}/conv_{i}", f"{theirs}.convs.{i}", CONV, bias=None)
        rules += _dense(f"{ours}/fusion_{i}/projection", f"{fusion}.projection", CONV)
        for j in (1, 2):
            rules += _convs(f"{ours}/fusion_{i}/residual{j}", f"{fusion}.residual_layer{j}.convolution{{}}")
    return rules


def _zoedepth_metric_head(ours: str, theirs: str) -> list[Rule]:
    rules = _dense(f"{ours}/bottleneck", f"{theirs}.conv2", CONV)
    rules += _convs(f"{ours}/seed_projector", f"{theirs}.seed_projector.conv{{}}")
    for i in range(4):
        rules += _convs(f"{ours}/projector_{i}", f"{theirs}.projectors.{i}.conv{{}}")
    for domain in ("nyu", "kitti"):
        rules += _convs(f"{ours}/{domain}/seed_bins", f"{theirs}.seed_bin_regressors.{domain}.conv{{}}")
        for i in range(4):
            rules += _convs(f"{ours}/{domain}/attractor_{i}", f"{theirs}.attractors.{domain}.{i}.conv{{}}")
        mlp = f"{theirs}.conditional_log_binomial.{domain}.mlp.{{}}"
        rules += _convs(f"{ours}/{domain}/log_binomial", mlp, numbers=(0, 2))
    ours, patch = f"{ours}/classifier", f"{theirs}.patch_transformer"
    block, layer = f"{ours}/layers", f"{patch}.transformer_encoder.{{layer}}"
    return [
        *rules,
        *_dense(f"{ours}/embedding", f"{patch}.embedding_convPxP", CONV),
        *_dense(f"{ours}/hidden", f"{theirs}.mlp_classifier.linear1"),
        *_dense(f"{ours}/logits", f"{theirs}.mlp_classifier.linear2"),
        *_attention(
            f"{block}/attention", [f"{layer}.self_attn.{name}" for name in ("query", "key", "value", "out_proj")]
        ),
        *_norm(f"{block}/norm1", f"{layer}.norm1"),
        *_norm(f"{block}/norm2", f"{layer}.norm2"),
        *_dense(f"{block}/mlp_in", f"{layer}.linear1"),
        *_dense(f"{block}/mlp_out", f"{layer}.linear2"),
    ]


def _convs(path: str, key: str, numbers: Sequence[int] = (1, 2)) -> list[Rule]:
    """Our names are conv1, conv2, …; the published ones have these `numbers`."""
    named = enumerate(numbers, start=1)
    return [rule for i, theirs in named for rule in _dense(f"{path}/conv{i}", key.format(theirs), CONV)]


_EGO3D = "position_embedding_3d.position_embedding_head"

SPATIALVLA = (
    *siglip(),
    *_dense("img/head", "multi_modal_projector.linear"),
    *gemma2(),
    *_rule("llm/lm_head", TABLE, "language_model.lm_head.weight"),
    *_rule("spatial_embedding", TABLE, "spatial_embed_tokens.weight"),
    *_dense("ego3d/dense_0", f"{_EGO3D}.0"),
    *_norm("ego3d/norm", f"{_EGO3D}.1"),
    *_dense("ego3d/dense_1", f"{_EGO3D}.3"),
    *zoedepth(),
)


# Alternative spellings, replaced in this order: prefixes that transformers 5 adds or drops, and its BEiT in memory.
_BEIT_5 = r"(?<=backbone\.)beit\.layers\.(\d+)\."
SPELLINGS = (
    (r"^model\.", ""),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^vision_model\.", "vision_tower.vision_model."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (_BEIT_5 + r"attention\.q_proj\.", r"encoder.layer.\1.attention.attention.query."),
    (_BEIT_5 + r"attention\.k_proj\.", r"encoder.layer.\1.attention.attention.key."),
    (_BEIT_5 + r"attention\.v_proj\.", r"encoder.layer.\1.attention.attention.value."),
    (_BEIT_5 + r"attention\.o_proj\.", r"encoder.layer.\1.attention.output.dense."),
    (_BEIT_5 + r"relative_position_bias\.", r"encoder.layer.\1.attention.attention.relative_position_bias."),
    (_BEIT_5 + r"mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (_BEIT_5 + r"mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (_BEIT_5, r"encoder.layer.\1."),
    (r"(?<=backbone\.)beit\.", ""),
)
# Buffers that transformers computes from its config, but some versions save.
BUFFERS = ("position_ids", "inv_freq", "original_inv_freq", "relative_position_index", "k_idx", "k_minus_1")


def published_name(key: str) -> str:
    """The spelling of a key used in the rules."""
    for pattern, name in SPELLINGS:
        key = re.sub(pattern, name, key)
    return key


def is_buffer(key: str) -> bool:
    return key.rpartition(".")[2] in BUFFERS


@dataclass(frozen=True)
class Slot:
    """A published tensor `key` [shape] and its place in our tree: array `path`, `index` into its leading axes."""

    key: str
    shape: tuple[int, ...]
    path: str
    index: tuple[int, ...]
    layout: str

    def to_ours(self, tensor: np.ndarray, array: np.ndarray) -> None:
        """Write the published tensor into its part of our array."""
        part = array[self.index]
        part[...] = rearrange(tensor, self.layout, **axis_sizes(self.layout, part.shape))

    def to_published(self, array: np.ndarray) -> np.ndarray:
        """The published tensor taken from our array, contiguous; the inverse of `to_ours`."""
        return np.ascontiguousarray(rearrange(array[self.index], reverse(self.layout)))


def slots(shapes: Mapping[str, tuple[int, ...]], rules: Iterable[Rule] = SPATIALVLA) -> list[Slot]:
    """All published tensors for arrays of these shapes, in their order. Raises KeyError for an array without a rule."""
    by_path = {rule.path: rule for rule in rules}
    return [slot for path, shape in shapes.items() for slot in _slots_of(by_path[path], shape)]


def _slots_of(rule: Rule, shape: tuple[int, ...]) -> Iterator[Slot]:
    source, target = axes_of_layout(rule.layout)
    sizes = axis_sizes(rule.layout, shape[-len(target) :])
    published = tuple(prod(sizes[axis] for axis in group) for group in source)
    parts = len(rule.keys) > 1
    stacked = shape[: len(shape) - len(target) - parts]
    for layer, index in enumerate(np.ndindex(*stacked)):
        for part, key in enumerate(rule.keys):
            yield Slot(
                key=key.format(layer=layer),
                shape=published,
                path=rule.path,
                index=(*index, part) if parts else index,
                layout=rule.layout,
            )


@cache
def param_shapes(config: SpatialVLAConfig) -> dict[str, tuple[int, ...]]:
    """Our parameters as {"img/embedding/kernel": shape, …}, without allocating them."""

    def init() -> Any:
        return SpatialVLA(config).init(jax.random.key(0), **example_inputs(config))["params"]

    return {path: array.shape for path, array in flatten(jax.eval_shape(init)).items()}


def flatten(tree: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def unflatten(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(dict(arrays), sep="/")


def check_names(what: object, problem: str, names: Iterable[str]) -> None:
    """Raises InputError with the first ten names and their number, if there are any."""
    names = sorted(names)
    if names:
        first = ", ".join(map(printable, names[:10])) + (", …" if len(names) > 10 else "")
        raise InputError(f"{what}: {len(names)} {'tensor' if len(names) == 1 else 'tensors'} {problem}: {first}")


def printable(name: str) -> str:
    """A name from a file, made fit for a message: on one line and not too long."""
    name = name if name.isprintable() else ascii(name)
    return name if len(name) <= 200 else f"{name[:200]}…"


def check_arrays(what: object, arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError if arrays of our tree are missing, unknown, or shaped differently than the config says."""
    check_names(what, "missing for its config", shapes.keys() - arrays.keys())
    check_names(what, "not in its config", arrays.keys() - shapes.keys())
    wrong = [f"{p} {tuple(arrays[p].shape)} instead of {s}" for p, s in shapes.items() if tuple(arrays[p].shape) != s]
    check_names(what, "with a shape other than its config says", wrong)


def axes_of_layout(layout: str) -> tuple[list[list[str]], list[str]]:
    """A layout "(N H) D -> N D H" as ([["N", "H"], ["D"]], ["N", "D", "H"])."""
    left, right = layout.split("->")
    groups = [(grouped or single).split() for grouped, single in re.findall(r"\(([^)]*)\)|(\S+)", left)]
    return groups, right.split()


def axis_sizes(layout: str, shape: tuple[int, ...]) -> dict[str, int]:
    """The size of each named axis of a layout, given the shape on our side."""
    _, axes = axes_of_layout(layout)
    return {axis: size for axis, size in zip(axes, shape, strict=True) if axis != "1"}


def reverse(layout: str) -> str:
    """Reverse a layout, from published -> ours to ours -> published; possible because layouts only move numbers."""
    left, right = layout.split(" -> ")
    return f"{right} -> {left}"
