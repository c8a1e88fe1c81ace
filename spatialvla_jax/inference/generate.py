"""Greedy decoding of one action chunk: the prompt once, then as few passes over the weights as the result allows."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spatialvla_jax.inference.decoder import (
    Cache,
    Matrix,
    Quantized,
    forward,
    linear,
    narrow,
    quantize,
    to_decode_layout,
)
from spatialvla_jax.inference.kernels import BLOCK
from spatialvla_jax.models import SpatialVLA, SpatialVLAConfig
from spatialvla_jax.models.attention import position_ids, prefix_lm_mask
from spatialvla_jax.models.beit import bias_ahead


class Filters(NamedTuple):
    """A convolution's kernel, outputs first, which is how a GPU takes it: any other it transposes at every call."""

    values: Float[Array, "D p q C"]


Ranges = tuple[tuple[int, int], ...] | None
SLAB = 16_384  # rows of a table that are quantised at once
MATRIX = 2**16  # elements from which a layer's array is worth being an array of its own
WIDTH = 128  # of which a vision layer's hidden units become a multiple


def prepare(model: SpatialVLA, params: Any, *, int8: bool = False, whole_vocabulary: bool = True) -> dict[str, Any]:
    """Parameters as `generate` takes them, in the model's dtype: the language model laid out for it.

    `int8` keeps its matrices and tables in 8 bits; the vision and depth models stay as they are. Without
    `whole_vocabulary` the LM head has its action rows alone, which is all that constrained decoding reads. Arrays of
    NumPy are cast on the host, layer by layer, and tables quantised in slabs, which their scales by rows allow, the
    largest before anything else is there: the device never holds much more than the result.
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
    vision = {k: v for k, v in params.items() if k in ("img", "ego3d", "zoe")}
    layers, norms = to_decode_layout(llm["layers"], place, finish)
    vision = jax.tree_util.tree_map_with_path(lambda path, x: unstack_layers(x, _stacked(path), place), vision)
    blocks = vision["img"]["Transformer"]["encoderblock"]
    blocks["MlpBlock_0"] = _widen(blocks["MlpBlock_0"], -cfg.img.mlp_dim % WIDTH)
    if "zoe" in vision:
        attention = vision["zoe"]["backbone"]["stages"]["layers"]["attention"]
        ahead = jax.jit(lambda table: bias_ahead(cfg.zoe.backbone, table).astype(dtype))
        for part in ("neck", "relative_head"):
            vision["zoe"][part] = jax.tree.map(_filters, vision["zoe"][part])
        attention["bias"] = [[ahead(table) for table in stage] for stage in attention.pop("relative_position_bias")]
    return {
        "vision": vision,
        "layers": layers,
        "norms": norms,
        "final_norm": place(llm["final_norm"]["scale"]),
        "text": text,
        "spatial": place(params["spatial_embedding"]),
        "head": table(head),
    }


def _filters(kernel: Array) -> Array | Filters:
    """A kernel of one pixel is a matrix, and stays as it is."""
    return Filters(jnp.moveaxis(kernel, -1, 0)) if kernel.ndim == 4 and kernel.shape[0] > 1 else kernel


def _widen(mlp: dict[str, Any], spare: int) -> dict[str, Any]:
    """SigLIP's 4,304 hidden units and `spare` ones that are always 0: a GPU pads what its tiles don't divide, the whole
    matrix at every call."""

    def pad(x: Any, axis: int) -> Any:
        if isinstance(x, list):
            return [pad(layer, axis) for layer in x]
        width = [(0, 0)] * x.ndim
        width[axis] = (0, spare)
        return jnp.pad(x, width)

    first, last = mlp["Dense_0"], mlp["Dense_1"]
    first = {"kernel": pad(first["kernel"], -1), "bias": pad(first["bias"], -1)}
    return {"Dense_0": first, "Dense_1": last | {"kernel": pad(last["kernel"], -2)}}


def _stacked(path: tuple[Any, ...]) -> int:
    """Over how many leading axes a parameter of the vision and depth models is stacked."""
    names = [key.key for key in path]
    return 2 if "stages" in names else int("encoderblock" in names)


def unstack_layers(stack: Any, axes: int, place: Callable[[Any], Array]) -> Any:
    """An array a layer, in lists, so that a GPU does not copy a slice of the stack before it multiplies by it. Biases
    and scales stay stacked: the fewer arrays a call is given, the sooner it starts."""
    if not axes or math.prod(stack.shape[axes:]) < MATRIX:
        return place(stack)
    return [unstack_layers(stack[i], axes - 1, place) for i in range(len(stack))]


def restack_layers(stored: Any) -> Any:
    """The stack again, of which a compiler keeps nothing: the unrolled model slices it apart."""
    if isinstance(stored, Filters):
        return jnp.moveaxis(stored.values, 0, -1)
    return jnp.stack([restack_layers(layer) for layer in stored]) if isinstance(stored, list) else stored


def generate(
    model: SpatialVLA,
    weights: dict[str, Any],
    token_ranges: Ranges,
    image: Float[Array, "B S S 3"],
    prompt_ids: Int[Array, "B Q"],
    prompt_mask: Bool[Array, "B Q"],
    *,
    depth: Float[Array, "B S S"] | None = None,
    intrinsics: Float[Array, "B 3 3"] | None = None,
    draft: Int[Array, "B A"] | None = None,
) -> tuple[Int[Array, "B A"], Int[Array, ""]]:
    """→ (the A action tokens of a chunk as ids of the whole vocabulary, passes over the weights after the prompt's).

    `weights` come from `prepare`. `token_ranges` (a grid's: first id and number of each token kind of one action)
    restricts every step to tokens of its kind, so that the result is always a valid action and `<eos>` is not waited
    for; None takes the best of the whole vocabulary, as the release does. A `draft` of the chunk changes how many
    passes it takes, never the tokens. Q is any length that holds the prompts.
    """
    cfg = model.config
    vision = jax.tree.map(restack_layers, weights["vision"], is_leaf=lambda x: isinstance(x, list | Filters))
    vision["spatial_embedding"] = weights["spatial"]
    img = replace(cfg.img, mlp_dim=-(-cfg.img.mlp_dim // WIDTH) * WIDTH)
    unrolled: Any = SpatialVLA(replace(cfg, unroll=True, img=img, zoe=replace(cfg.zoe, unroll=True)))
    tokens = unrolled.apply({"params": vision}, image, depth, intrinsics, method="embed_image")
    prefix = jnp.concatenate([tokens, _rows(weights["text"], prompt_ids, tokens.dtype)], axis=1)
    valid = jnp.concatenate([jnp.ones(tokens.shape[:2], bool), prompt_mask], axis=1)
    if draft is None:
        return _one_by_one(cfg, weights, token_ranges, prefix, valid)
    return _from_draft(cfg, weights, token_ranges, prefix, valid, draft)


def _one_by_one(cfg: SpatialVLAConfig, weights: Any, ranges: Ranges, prefix: Any, valid: Any):
    """A pass for each token, less one an action where its last token, the gripper, has two values: both are fed in the
    pass that decides between them, and the pass after it is done too. A chunk of 4 × 3 tokens takes 8 passes."""
    B, P, n = *valid.shape, cfg.tokens_per_action
    branch = ranges is not None and n > 1 and ranges[-1][1] == 2
    slots = cfg.action_chunk * (n + branch)
    spare = -(P + slots) % BLOCK
    mask = prefix_lm_mask(valid, P if cfg.mask == "prefix" else 0)
    with jax.named_scope("prompt"):
        hidden, written = _forward(cfg, weights, prefix, position_ids(valid), mask, position_ids(valid))
    room = ((0, 0), (0, slots + spare), (0, 0), (0, 0))
    cache: Cache = tuple((jnp.pad(k, room), jnp.pad(v, room)) for k, v in written)
    first = _best(cfg, weights, ranges, _last(hidden, valid), (0,))[:, 0]
    count = jnp.sum(valid, axis=1)
    gripper = cfg.action_offset + (ranges[-1][0] if ranges is not None else 0)
    # Places of an action's slots after the prompt's last: with two grippers side by side, both have the same.
    place = jnp.minimum(jnp.arange(n + branch), n - 1)
    keys = jnp.pad(position_ids(valid), ((0, 0), (0, slots + spare)))

    def action(carry: Any, step: Any) -> Any:
        cache, seen, keys, token = carry
        base, out = P + step * (n + branch), [token]
        start = count + 1 + step * n
        places = start[:, None] + place
        keys = jax.lax.dynamic_update_slice(keys, places, (0, base))
        for k in range(n - branch):
            both = branch and k == n - 2
            feed = out[-1][:, None]
            if both:
                options = jnp.broadcast_to(gripper + jnp.arange(2), (B, 2))
                feed = jnp.concatenate([feed, options], axis=1)
            T = feed.shape[1]
            # Each new token sees what came before, itself and, a gripper, the token that both follow.
            own = jnp.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)[:T, :T]
            visible = jnp.repeat(seen[:, None], T, axis=1)
            visible = jax.lax.dynamic_update_slice(visible, jnp.repeat(own[None], B, axis=0), (0, 0, base + k))
            embedded, at = _embed(cfg, weights, feed, ranges), places[:, k : k + T]
            hidden, cache = _forward(cfg, weights, embedded, at, visible, keys, cache, base + k)
            kinds = (k + 1, 0, 0) if both else ((k + 1) % n,)
            best = _best(cfg, weights, ranges, hidden, kinds)
            chosen = jnp.ones((B, 1), bool)
            if both:
                closed = best[:, :1] == gripper
                chosen = jnp.concatenate([chosen, closed, ~closed], axis=1)
                best = jnp.concatenate([best[:, :1], jnp.where(closed, best[:, 1:2], best[:, 2:])], axis=1)
            seen = jax.lax.dynamic_update_slice(seen, chosen, (0, base + k))
            out += list(best.T)
        return (cache, seen, keys, out[n]), jnp.stack(out[:n], axis=1)

    seen = jnp.pad(valid, ((0, 0), (0, slots + spare)))
    with jax.named_scope("tokens"):
        _, ids = jax.lax.scan(action, (cache, seen, keys, first), jnp.arange(cfg.action_chunk))
    return ids.swapaxes(0, 1).reshape(B, -1), jnp.asarray(cfg.action_chunk * (n - branch))


def _from_draft(cfg: SpatialVLAConfig, weights: Any, ranges: Ranges, prefix: Any, valid: Any, draft: Any):
    """All tokens in every pass (Jacobi decoding, Santilli et al. 2023): each is predicted from the draft's tokens
    before it, and the predictions are the next draft. At least one more of them is greedy decoding's each time, and a
    draft that predicts itself is its result. The first draft rides along with the prompt."""
    (B, P), A = valid.shape, cfg.num_action_tokens
    slots = jnp.concatenate([valid, jnp.ones((B, A - 1), bool)], axis=1)
    positions, kinds = position_ids(slots), tuple(range(A))
    mask = prefix_lm_mask(slots, P if cfg.mask == "prefix" else 0)
    inputs = jnp.concatenate([prefix, _embed(cfg, weights, draft[:, :-1], ranges)], axis=1)
    with jax.named_scope("prompt"):
        hidden, cache = _forward(cfg, weights, inputs, positions, mask, positions)
    first = _last(hidden[:, :P], valid)

    def predict(hidden: Any) -> Any:
        return _best(cfg, weights, ranges, jnp.concatenate([first, hidden], axis=1), kinds)

    def unsettled(state: Any) -> Any:
        draft, tokens, *_ = state
        return jnp.any(draft[:, :-1] != tokens[:, :-1])

    def refine(state: Any) -> Any:
        _, draft, cache, passes = state
        embedded, at = _embed(cfg, weights, draft[:, :-1], ranges), positions[:, P:]
        hidden, cache = _forward(cfg, weights, embedded, at, mask[:, P:], positions, cache, P)
        return draft, predict(hidden), cache, passes + 1

    state = (draft, predict(hidden[:, P:]), cache, jnp.asarray(0))
    with jax.named_scope("tokens"):
        _, tokens, _, passes = jax.lax.while_loop(unsettled, refine, state)
    return tokens, passes


def _forward(cfg: SpatialVLAConfig, weights: Any, x: Any, positions: Any, mask: Any, keys: Any, *cache: Any):
    window = narrow(cfg.llm, mask, positions, keys)
    layers, norms, last = (weights[name] for name in ("layers", "norms", "final_norm"))
    return forward(cfg.llm, layers, norms, last, x, positions, mask, window, *cache)


def _best(
    cfg: SpatialVLAConfig, weights: Any, ranges: Ranges, hidden: Float[Array, "B T D"], kinds: tuple[int, ...]
) -> Int[Array, "B T"]:
    """The best token at each of T places, of that place's kind. The soft cap keeps the order and is left out."""
    scores = linear(hidden, weights["head"], jnp.float32)
    if ranges is None:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    scores = scores[..., -cfg.spatial_tokens :]  # of a head with all rows, those of actions
    ids = jnp.arange(cfg.spatial_tokens)
    spans = [ranges[kind % len(ranges)] for kind in kinds]
    allowed = jnp.stack([(ids >= start) & (ids < start + size) for start, size in spans])
    return cfg.action_offset + jnp.argmax(jnp.where(allowed, scores, -jnp.inf), axis=-1).astype(jnp.int32)


def _embed(cfg: SpatialVLAConfig, weights: Any, ids: Int[Array, "B T"], ranges: Ranges) -> Float[Array, "B T D"]:
    """Action rows from the spatial table, any other token that a free choice may bring from the text's."""
    action = ids - cfg.action_offset
    if ranges is not None:
        return jnp.take(weights["spatial"], action, axis=0, mode="clip")
    spatial = jnp.take(weights["spatial"], jnp.maximum(action, 0), axis=0)
    text = _rows(weights["text"], jnp.minimum(ids, cfg.text_vocab), spatial.dtype)
    return jnp.where((action >= 0)[..., None], spatial, text)


def _rows(table: Matrix, ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    if isinstance(table, Array):
        return jnp.take(table, ids, axis=0)
    rows = jnp.take(table.values, ids, axis=0).astype(jnp.float32) * jnp.take(table.scale, ids)[..., None]
    return rows.astype(dtype)


def _last(hidden: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> Float[Array, "B 1 D"]:
    """The hidden state at the last position that is not padding."""
    last = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)
