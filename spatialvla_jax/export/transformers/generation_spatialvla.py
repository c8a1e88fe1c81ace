"""Chooses the tokens of a chunk. On a GPU, the whole chunk runs as one CUDA graph.

A chunk at batch 1 takes more than 20,000 small kernels, and PyTorch takes longer to launch them than the GPU to run
them. A graph launches them all at once. In it, Gemma's layers keep keys and values in arrays of fixed size and are
compiled by `torch.compile` where that works. Only rows of the output layer that belong to allowed tokens are
multiplied. Nothing waits for the GPU between tokens.

Axis letters: B batch, T query, S key, N heads, K kv-heads, H head dim, D width.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor

from .ego3d_spatialvla import constant_position_bias

EOS = 1  # the token that ends a chunk
PROMPT_STEP = 32  # prompts are padded to a multiple, because each length needs its own graph
MAX_GRAPHS = 4  # per model; the oldest is dropped
NO_ACTION = (
    "the model's numbers for {} of {} examples are NaN or infinite, so there is no action: check the depth, the "
    "intrinsics and the weights"
)
# With a single query a layer's time is that of reading its weights; tuned tiles read them at memory bandwidth.
TUNED: dict[str, Any] = {"combo_kernels": True, "coordinate_descent_tuning": True}
GRAPH_INPUTS = {"input_ids", "attention_mask", "pixel_values", "intrinsic", "depth"}


def check_ranges(token_ranges: Any) -> list[list[int]] | None:
    """(first id, count) for each token of an action, as a list; None for None. Raises ValueError."""
    if token_ranges is None:
        return None
    ranges = torch.as_tensor(token_ranges, device="cpu")
    if ranges.ndim != 2 or ranges.shape[1] != 2 or (ranges < torch.tensor([0, 1])).any():
        raise ValueError(f"token_ranges are (first id, count) of each token of an action, got {ranges.tolist()}")
    return ranges.tolist()


def check_scores(failed: torch.Tensor) -> None:
    """Raises ValueError if any entry of `failed` bool[B] is set: no token could be chosen."""
    if count := int(failed.sum()):
        raise ValueError(NO_ACTION.format(count, len(failed)))


class ActionTokens(LogitsProcessor):
    """Restricts token k of a chunk, counted from position `start`, to its kind, and forces `<eos>` after the chunk.

    `token_ranges` gives (first id, count) for each token of an action; without it all tokens are allowed. Raises
    ValueError for NaN logits, from which no token can be chosen.
    """

    def __init__(self, token_ranges: Any, start: int, chunk: int) -> None:
        self.ranges = check_ranges(token_ranges)
        self.start, self.chunk = start, chunk

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # All zeros mean that the mean square in a norm has overflowed.
        check_scores(scores.isnan().any(-1) | (scores == 0).all(-1))
        if self.ranges is None:
            return scores
        step = input_ids.shape[1] - self.start
        first, count = self.ranges[step % len(self.ranges)] if step < self.chunk else (EOS, 1)
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, first : first + count] = scores[:, first : first + count] if step < self.chunk else 0
        return allowed


class Graphs(dict[Any, Any]):
    """A model's graphs. They are tied to its memory, so copies and pickles of the model have none."""

    def __reduce__(self) -> Any:
        return Graphs, ()


class ChunkGraph:
    """`predict_action` for inputs of one shape, recorded once and replayed."""

    def __init__(self, model: Any, inputs: Mapping[str, torch.Tensor], ranges: Any, layers: Any) -> None:
        self.inputs = {name: x.clone() for name, x in inputs.items()}
        # The graph reads the memory it was recorded with, so keep those weights and constants alive.
        self.weights = list(model.parameters())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with constant_position_bias(getattr(model, "vision_zoe_model", None)) as self.constants:
            # The compiler prints its attempts.
            with torch.cuda.stream(stream), contextlib.redirect_stderr(io.StringIO()):
                for _ in range(2):  # compiles, and lets libraries allocate workspaces
                    greedy_chunk(model, self.inputs, ranges, *layers)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.tokens, self.failed = greedy_chunk(model, self.inputs, ranges, *layers)

    def start(self, inputs: Mapping[str, torch.Tensor]) -> None:
        for name, x in inputs.items():
            self.inputs[name].copy_(x)
        self.graph.replay()

    def has_weights_of(self, model: Any) -> bool:
        weights = list(model.parameters())
        return len(weights) == len(self.weights) and all(
            x is y and x.data_ptr() == y.data_ptr() for x, y in zip(weights, self.weights, strict=True)
        )

    def finish(self) -> torch.Tensor:
        check_scores(self.failed)
        return self.tokens.clone()


def run_graph(model: Any, graphs: dict[Any, Any], inputs: Mapping[str, torch.Tensor], ranges: Any) -> Any:
    """The tokens i64[B, action tokens] from the graph for these shapes, which the first call records.

    None if no graph can be used: without an NVIDIA GPU, with unknown inputs, with non-finite weights, or if recording
    fails. A failure is warned about once.
    """
    if model.device.type != "cuda" or torch.version.hip or graphs.get("failed") or inputs.keys() - GRAPH_INPUTS:
        return None
    inputs = pad_prompt(inputs)
    key = tuple((name, x.shape, x.dtype) for name, x in sorted(inputs.items())), str(ranges)
    graph = graphs.get(key)
    if graph is not None:
        graph.start(inputs)  # the GPU works while the host checks the weights
    if graph is None or not graph.has_weights_of(model):
        graph = graphs[key] = record(model, inputs, ranges)
        if graph is None:
            graphs.clear()
            graphs["failed"] = True
            return None
        while len(graphs) > MAX_GRAPHS:
            del graphs[next(iter(graphs))]
        graph.start(inputs)
    return graph.finish() if model.has_finite_weights() else None


def record(model: Any, inputs: Mapping[str, torch.Tensor], ranges: Any) -> ChunkGraph | None:
    """The graph, with compiled layers if possible; None if recording fails. Warns about either failure."""
    reasons = []
    compiled = torch.compile(decoder_layer, dynamic=False), torch.compile(decoder_layer, dynamic=False, options=TUNED)
    for layers in (compiled, (decoder_layer, decoder_layer)):
        try:
            graph = ChunkGraph(model, inputs, ranges, layers)
        except ValueError:  # bad inputs, not a failed recording
            raise
        except Exception as error:  # the compiler and CUDA may raise anything; the plain loop needs neither
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        if reasons:
            warnings.warn(f"actions are predicted without torch.compile, more slowly: {reasons[0]}", stacklevel=4)
        return graph
    warnings.warn(f"actions are predicted without a CUDA graph, several times slower: {reasons[-1]}", stacklevel=4)
    return None


def pad_prompt(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs with prompts left-padded to the next multiple of PROMPT_STEP."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    missing = -ids.shape[1] % PROMPT_STEP
    return {**inputs, "input_ids": F.pad(ids, (missing, 0)), "attention_mask": F.pad(mask, (missing, 0))}


def greedy_chunk(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    ranges: Any,
    layer_of_prompt: Callable[..., torch.Tensor] | None = None,
    layer_of_token: Callable[..., torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens i64[B, action tokens], bool[B] which examples failed) without waiting for the device. The layers are
    `decoder_layer`, possibly compiled."""
    layer = layer_of_prompt or decoder_layer
    text, gemma, count = model.config.text_config, model.language_model.model, model.config.num_action_tokens
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    B, T = ids.shape
    x = model.embed_inputs(ids, *(inputs.get(name) for name in ("pixel_values", "intrinsic", "depth")))
    valid = F.pad(mask, (0, count - 1), value=1)
    positions = valid.cumsum(1)  # from 1, as in PaliGemma
    types = F.pad(torch.zeros_like(mask), (0, count - 1), value=1)
    masks = model.attention_masks(valid.bool(), positions, types, T + count - 1, x.dtype)
    shape = (B, text.num_key_value_heads, T + count - 1, text.head_dim)
    cache = [(x.new_zeros(shape), x.new_zeros(shape)) for _ in gemma.layers]
    cos, sin = (table[:, None] for table in gemma.rotary_emb(x, positions))
    ranges = ranges or [(0, text.vocab_size)]
    tokens: list[torch.Tensor] = []
    failed, places = valid.new_zeros(B, dtype=torch.bool), torch.arange(T + count - 1, device=ids.device)
    first, stop = 0, T
    while True:
        seen = {kind: mask[:, :, first:stop] for kind, mask in masks.items()}
        angles = cos[:, :, first:stop], sin[:, :, first:stop]
        for one, kind, (keys, values) in zip(gemma.layers, text.layer_types, cache, strict=True):
            x = layer(one, x, *angles, seen[kind], keys, values, places[first:stop])
        row, size = ranges[len(tokens) % len(ranges)]
        scores = F.linear(gemma.norm(x[:, -1]), model.language_model.lm_head.weight[row : row + size])
        failed = failed | ~scores.isfinite().all(-1) | (scores == 0).all(-1)
        if (cap := text.final_logit_softcapping) is not None:
            scores = torch.tanh(scores / cap) * cap
        tokens.append(scores.argmax(-1, keepdim=True) + row)
        if len(tokens) == count:
            return torch.cat(tokens, 1), failed
        first, stop, layer = stop, stop + 1, layer_of_token or decoder_layer
        x = model.embed_inputs(tokens[-1])


def decoder_layer(layer: Any, x: torch.Tensor, *places_and_cache: torch.Tensor) -> torch.Tensor:
    """One of transformers' Gemma 2 layers, applied to x [B, T, D]; other arguments are passed to `attend`."""
    x = x + layer.post_attention_layernorm(attend(layer.self_attn, layer.input_layernorm(x), *places_and_cache))
    return x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))


def attend(
    attention: Any,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
) -> torch.Tensor:
    """Attention of x [B, T, D], whose keys and values are written to `places` i64[T] of `keys` and `values` [B, K, S,
    H]. `cos` and `sin` are [B, 1, T, H]; `mask` [B, 1, T, S] is added to the logits."""
    B, T, _ = x.shape
    _, K, S, H = keys.shape

    def heads(project: Any) -> torch.Tensor:
        return project(x).view(B, T, -1, H).transpose(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    keys.index_copy_(2, places, rotate(heads(attention.k_proj)))
    values.index_copy_(2, places, heads(attention.v_proj))
    q = rotate(heads(attention.q_proj)).reshape(B, K, -1, H)  # groups the queries of each kv-head
    # For a single query, sums that the compiler fuses are faster than matrix products.
    products = q @ keys.transpose(2, 3) if T > 1 else weighted_sum(q[:, :, :, None], keys[:, :, None], -1)
    logits = products * attention.scaling
    if (cap := attention.attn_logit_softcapping) is not None:
        logits = torch.tanh(logits / cap) * cap
    logits = logits.view(B, -1, T, S) + mask
    weights = logits.softmax(-1, dtype=torch.float32).to(q.dtype).view(B, K, -1, S)
    out = weights @ values if T > 1 else weighted_sum(weights[..., None], values[:, :, None], 3)
    return attention.o_proj(out.view(B, -1, T, H).transpose(1, 2).reshape(B, T, -1))


def weighted_sum(x: torch.Tensor, y: torch.Tensor, axis: int) -> torch.Tensor:
    return (x.float() * y.float()).sum(axis).to(x.dtype)
