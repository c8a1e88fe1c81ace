"""Parameters in the layout that decodes fastest on a GPU; `models/` is independent of it.

Training stacks layers for a scan, from which a GPU would copy a slice at every step. Here every large matrix is a
separate array. Norms, biases and other small arrays stay stacked: slicing them is free, while each argument of a call
costs a microsecond or two. `prepare_weights` creates this layout; `decoder.forward` and `embed_image` use it.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from spatialvla_jax.inference.decoder import DecoderWeights, Layer, Matrix, Quantized, quantize
from spatialvla_jax.models import Params, SpatialVLA, SpatialVLAConfig
from spatialvla_jax.models.beit import TOKENS, BeitConfig, relative_position_bias
from spatialvla_jax.models.zoedepth import estimate_depth

SLAB = 16_384  # table rows quantised at once
LARGE = 2**16  # minimum elements per layer of an array that is unstacked
HIDDEN_MULTIPLE = 128  # SigLIP's hidden units are padded to a multiple; otherwise the GPU pads at every call


class Weights(NamedTuple):
    """The weights for `generate`. A: action tokens; `head` has rows for all V tokens or only those A."""

    vision: Params  # parameters of img, ego3d and zoe; large layers in lists, see `restack_layers`
    llm: DecoderWeights
    text: Matrix
    spatial: Float[Array, "A D"]
    head: Matrix


class OutputsFirst(NamedTuple):
    """A convolution kernel in the layout GPUs use; any other would be transposed at every call."""

    values: Float[Array, "D p q C"]


def prepare_weights(model: SpatialVLA, params: Params, *, int8: bool = False, whole_vocabulary: bool = True) -> Weights:
    """Convert parameters for `generate`, in the model's dtype.

    `int8` stores the language model's matrices and tables in 8 bits; vision and depth models are not quantised. Without
    `whole_vocabulary` the LM head keeps only its action rows, all that constrained decoding needs. NumPy arrays are
    cast on the host layer by layer. Tables are quantised in slabs of rows, the largest table first. The device
    therefore never holds much more than the result.
    """
    cfg, dtype = model.config, jnp.dtype(model.config.dtype)

    def place(x: Any) -> Array:
        return jnp.asarray(x.astype(dtype))

    def finish(x: Array) -> Matrix:
        return quantize(x) if int8 else x

    def table(rows: Any) -> Matrix:
        if not int8:
            return place(rows)
        slabs = [quantize(place(rows[i : i + SLAB])) for i in range(0, len(rows), SLAB)]
        return Quantized(*map(jnp.concatenate, zip(*slabs, strict=True)))

    llm = params["llm"]
    text = table(llm["embedder"]["input_embedding"][: cfg.action_offset])
    head = llm["lm_head"] if whole_vocabulary else llm["lm_head"][cfg.action_offset :]
    decoder = to_decode_layout(llm, place, finish)
    vision = {k: v for k, v in params.items() if k in ("img", "ego3d", "zoe")}
    vision = jax.tree_util.tree_map_with_path(lambda path, x: unstack_layers(x, _stacked_axes(path), place), vision)
    blocks = vision["img"]["Transformer"]["encoderblock"]
    blocks["MlpBlock_0"] = _pad_hidden(blocks["MlpBlock_0"], -cfg.img.mlp_dim % HIDDEN_MULTIPLE)
    if "zoe" in vision:
        attention = vision["zoe"]["backbone"]["stages"]["layers"]["attention"]
        fixed = jax.jit(lambda table: fixed_bias(cfg.zoe.backbone, table).astype(dtype))
        for part in ("neck", "relative_head"):
            vision["zoe"][part] = jax.tree.map(_outputs_first, vision["zoe"][part])
        attention["bias"] = [[fixed(table) for table in stage] for stage in attention.pop("relative_position_bias")]
    return Weights(vision, decoder, text, place(params["spatial_embedding"]), table(head))


def to_decode_layout(
    llm: dict[str, Any], place: Callable[[Any], Array], finish: Callable[[Array], Matrix]
) -> DecoderWeights:
    """Convert `gemma2.Gemma2`'s parameters for `decoder.forward`. `place` moves an array to the device; `finish`
    converts each matrix there (`quantize` or the identity). At most one layer is held twice."""
    stacked = llm["layers"]
    norms = {name: place(stacked[name]["scale"]) for name in stacked if name.endswith("_norm")}
    matrices = {name: stacked[name] for name in ("attn", "mlp")}
    depth = len(stacked["mlp"]["linear"])
    layers = [_layer(jax.tree.map(lambda x, i=i: place(x[i]), matrices), finish) for i in range(depth)]
    return DecoderWeights(layers, norms, place(llm["final_norm"]["scale"]))


def _layer(w: dict[str, Any], finish: Callable[[Array], Matrix]) -> Layer:
    q, kv, out = (w["attn"][name]["w"] for name in ("q_einsum", "kv_einsum", "attn_vec_einsum"))
    qkv = jnp.concatenate([rearrange(q, "N D H -> (N H) D"), rearrange(kv, "two K D H -> (two K H) D")])
    return Layer(
        qkv=finish(qkv),
        out=finish(rearrange(out, "N H D -> D (N H)")),
        gate_up=finish(rearrange(w["mlp"]["gating_einsum"], "two D F -> (two F) D")),
        down=finish(w["mlp"]["linear"].T),
    )


def embed_image(
    cfg: SpatialVLAConfig,
    weights: Weights,
    image: Float[Array, "B S S 3"],
    depth: Float[Array, "B S S"] | None,
    intrinsics: Float[Array, "B 3 3"] | None,
) -> Float[Array, "B P D"]:
    """`SpatialVLA.embed_image` with these weights."""
    model, variables = _vision_model(cfg, weights)
    return model.apply(variables, image, depth, intrinsics, method="embed_image")


def image_depth(cfg: SpatialVLAConfig, weights: Weights, image: Float[Array, "B S S 3"]) -> Float[Array, "B S S"]:
    """The depth in metres that a model with `depth_source="zoedepth"` estimates of images in [0, 1]."""
    model, variables = _vision_model(cfg, weights)
    return model.apply(
        variables, image, method=lambda model, image: estimate_depth(model.zoe, image, cfg.zoe.backbone.image_size)
    )


def _vision_model(cfg: SpatialVLAConfig, weights: Weights) -> tuple[Any, dict[str, Params]]:
    """The model and its variables without the language model."""
    vision = jax.tree.map(restack_layers, weights.vision, is_leaf=lambda x: isinstance(x, list | OutputsFirst))
    vision["spatial_embedding"] = weights.spatial  # the model declares it, though embedding an image does not use it
    img = replace(cfg.img, mlp_dim=cfg.img.mlp_dim + -cfg.img.mlp_dim % HIDDEN_MULTIPLE)
    return SpatialVLA(replace(cfg, unroll=True, img=img, zoe=replace(cfg.zoe, unroll=True))), {"params": vision}


def unstack_layers(stack: Any, axes: int, place: Callable[[Any], Array]) -> Any:
    """Split the `axes` leading axes into nested lists, one array per layer; small arrays stay stacked."""
    if not axes or math.prod(stack.shape[axes:]) < LARGE:
        return place(stack)
    return [unstack_layers(stack[i], axes - 1, place) for i in range(len(stack))]


def restack_layers(stored: Any) -> Array:
    """Restack for the Linen modules; the model is unrolled, so XLA slices each layer out and never materialises the
    stack."""
    if isinstance(stored, OutputsFirst):
        return rearrange(stored.values, "D p q C -> p q C D")
    return jnp.stack([restack_layers(layer) for layer in stored]) if isinstance(stored, list) else stored


def _stacked_axes(path: tuple[Any, ...]) -> int:
    """The number of leading axes over which a parameter of the vision or depth model is stacked."""
    names = [key.key for key in path]
    return 2 if "stages" in names else int("encoderblock" in names)


def _pad_hidden(mlp: dict[str, Any], spare: int) -> dict[str, Any]:
    """SigLIP's MLP with `spare` more hidden units, which are always 0."""

    def pad(x: Any, axis: int) -> Any:
        if isinstance(x, list):
            return [pad(layer, axis) for layer in x]
        width = [(0, 0)] * x.ndim
        width[axis] = (0, spare)
        return jnp.pad(x, width)

    first, last = mlp["Dense_0"], mlp["Dense_1"]
    first = {"kernel": pad(first["kernel"], -1), "bias": pad(first["bias"], -1)}
    return {"Dense_0": first, "Dense_1": last | {"kernel": pad(last["kernel"], -2)}}


def _outputs_first(kernel: Array) -> Array | OutputsFirst:
    """Convert a convolution kernel; a 1×1 kernel is a matrix and is returned unchanged."""
    convolution = kernel.ndim == 4 and kernel.shape[0] > 1
    return OutputsFirst(rearrange(kernel, "p q C D -> D p q C")) if convolution else kernel


def fixed_bias(config: BeitConfig, table: Float[Array, "R N"]) -> Float[Array, "N T T"]:
    """The bias of a layer for images of the pretraining size, which `BeitAttention` accepts as its parameter "bias" in
    place of the table. It never changes, and gathering it takes longer than reading it."""
    side = config.patches_per_side
    return relative_position_bias(table.astype(jnp.float32), side, (side, side), -(side**2 + 1) % TOKENS)
