"""Greedy decoding of one action chunk: the prompt in one pass, then as few passes over the weights as possible.

A step decodes one action. With n = 3 tokens (translation t, rotation r, gripper g) and a gripper of two values, both
gripper values are put into the cache side by side:

             prompt, past actions        slots of this action
    slot     0 …                base  │  base+0  base+1  base+2  base+3
    token    image  prompt  t r g g'  │    t       r       g       g'      g and g' see t and r, not each other
    position 1 …                      │    p      p+1     p+2     p+2

    pass 1   feeds t                  →  r
    pass 2   feeds r, g and g'        →  which gripper, and the next action's t after either

The gripper value that was not chosen stays in the cache; `visible` hides it from all later tokens.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from spatialvla_jax.inference.decoder import Cache, Matrix, Quantized, forward, linear
from spatialvla_jax.inference.kernels import BLOCK
from spatialvla_jax.inference.weights import Weights, embed_image
from spatialvla_jax.models import SpatialVLA, SpatialVLAConfig
from spatialvla_jax.models.attention import position_ids, prefix_lm_mask, sliding_window_mask, soft_cap
from spatialvla_jax.models.spatialvla import last_of_prompt

TokenRanges = tuple[tuple[int, int], ...] | None


class Generated(NamedTuple):
    """The result of `generate`."""

    tokens: Int[Array, "B A"]  # ids of the whole vocabulary
    passes: Int[Array, ""]  # over the weights, not counting the prompt's
    finite: Bool[Array, " B"]  # False: the logits were not finite, so the tokens are meaningless


def generate(
    model: SpatialVLA,
    weights: Weights,
    token_ranges: TokenRanges,
    image: Float[Array, "B S S 3"],
    prompt_ids: Int[Array, "B Q"],
    prompt_mask: Bool[Array, "B Q"],
    *,
    depth: Float[Array, "B S S"] | None = None,
    intrinsics: Float[Array, "B 3 3"] | None = None,
    draft: Int[Array, "B A"] | None = None,
) -> Generated:
    """The A action tokens of a chunk.

    `weights` come from `prepare_weights`. `token_ranges` (the grid's (first id, count) for each token of an action)
    restricts each token to its kind. The result is therefore always a valid action, and no `<eos>` is needed. None
    chooses from the whole vocabulary, as the release does. A `draft` of the chunk only affects the number of passes,
    never the tokens. Q may be any length that fits the prompts.
    """
    decoder = Decoder(model.config, weights, token_ranges)
    prefix, valid = _prefix(decoder, image, prompt_ids, prompt_mask, depth, intrinsics)
    return _one_by_one(decoder, prefix, valid) if draft is None else _from_draft(decoder, prefix, valid, draft)


def token_probabilities(
    model: SpatialVLA,
    weights: Weights,
    token_ranges: TokenRanges,
    image: Float[Array, "B S S 3"],
    prompt_ids: Int[Array, "B Q"],
    prompt_mask: Bool[Array, "B Q"],
    tokens: Int[Array, "B A"],
    *,
    depth: Float[Array, "B S S"] | None = None,
    intrinsics: Float[Array, "B 3 3"] | None = None,
    top: int,
) -> tuple[Int[Array, "B A {top}"], Float[Array, "B A {top}"]]:
    """The `top` most likely ids for each token of the chunk, and their probabilities f32, highest first. Each
    prediction sees the earlier `tokens`; one pass computes them all. Arguments are as for `generate`, which chose these
    tokens.

    The probabilities sum to 1 over the ids that are allowed for the token. If fewer than `top` are allowed, the rest
    have probability 0.
    """
    decoder = Decoder(model.config, weights, token_ranges)
    prefix, valid = _prefix(decoder, image, prompt_ids, prompt_mask, depth, intrinsics)
    hidden, *_ = _feed_all(decoder, prefix, valid, tokens)
    scores, _ = decoder.scores(hidden, tuple(range(tokens.shape[1])))
    logits = soft_cap(scores, model.config.llm.final_softcap)
    found, ids = jax.lax.top_k(jax.nn.softmax(logits, where=jnp.isfinite(scores)), top)
    return ids + (model.config.action_offset if token_ranges is not None else 0), found


def _prefix(
    decoder: "Decoder",
    image: Float[Array, "B S S 3"],
    prompt_ids: Int[Array, "B Q"],
    prompt_mask: Bool[Array, "B Q"],
    depth: Float[Array, "B S S"] | None,
    intrinsics: Float[Array, "B 3 3"] | None,
) -> tuple[Float[Array, "B P D"], Bool[Array, "B P"]]:
    """Embeddings of image and prompt, and which of them are not padding."""
    tokens = embed_image(decoder.cfg, decoder.weights, image, depth, intrinsics)
    prefix = jnp.concatenate([tokens, _rows(decoder.weights.text, prompt_ids, tokens.dtype)], axis=1)
    return prefix, jnp.concatenate([jnp.ones(tokens.shape[:2], bool), prompt_mask], axis=1)


@dataclass(frozen=True)
class Decoder:
    """State shared by all passes."""

    cfg: SpatialVLAConfig
    weights: Weights
    ranges: TokenRanges

    @property
    def grippers(self) -> tuple[int, ...]:
        """The two values of an action's last token, fed together; () if that token has another number of values."""
        if self.ranges is None or len(self.ranges) == 1 or self.ranges[-1][1] != 2:
            return ()
        closed = self.cfg.action_offset + self.ranges[-1][0]
        return closed, closed + 1

    def mask(self, valid: Bool[Array, "B S"], prompt_slots: int) -> Bool[Array, "B S S"]:
        return prefix_lm_mask(valid, prompt_slots if self.cfg.mask == "prefix" else 0)

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Action tokens use the spatial table. Others (unconstrained decoding only) use the text table."""
        action, spatial = ids - self.cfg.action_offset, self.weights.spatial
        if self.ranges is not None:
            return jnp.take(spatial, action, axis=0, mode="clip")
        rows = jnp.take(spatial, jnp.maximum(action, 0), axis=0)
        text = _rows(self.weights.text, jnp.minimum(ids, self.cfg.text_vocab), rows.dtype)
        return jnp.where((action >= 0)[..., None], rows, text)

    def forward(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        key_positions: Int[Array, "B S"],
        cache: Cache | None = None,
        at: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """`decoder.forward` with the sliding-window mask added."""
        local = sliding_window_mask(mask, positions, key_positions, self.cfg.llm.sliding_window)
        return forward(self.cfg.llm, self.weights.llm, embeddings, positions, mask, local, cache, at)

    def scores(
        self, hidden: Float[Array, "B T D"], kinds: tuple[int, ...]
    ) -> tuple[Float[Array, "B T V"], Bool[Array, " B"]]:
        """→ (logits of all tokens or of the action tokens alone, -inf where not of the place's kind; whether all logits
        of a row are finite).

        The soft cap is left out: it would hide infinite logits.
        """
        scores = linear(hidden, self.weights.head, jnp.float32)
        if self.ranges is not None:
            scores = scores[..., -self.cfg.spatial_tokens :]  # without the scores of text tokens, if any
        # NaN and infinity anywhere reach the logits through later tokens' attention and through norms. The one
        # exception is a norm whose mean square overflows: it gives zeros.
        total = jnp.sum(jnp.abs(scores), axis=-1)
        finite = jnp.all(jnp.isfinite(total) & (total > 0), axis=1)
        if self.ranges is None:
            return scores, finite
        ids = jnp.arange(self.cfg.spatial_tokens)
        spans = [self.ranges[kind % len(self.ranges)] for kind in kinds]
        allowed = jnp.stack([(ids >= start) & (ids < start + size) for start, size in spans])
        return jnp.where(allowed, scores, -jnp.inf), finite

    def best(
        self, hidden: Float[Array, "B T D"], kinds: tuple[int, ...]
    ) -> tuple[Int[Array, "B T"], Bool[Array, " B"]]:
        """→ (the best token at each of T places, of that place's kind; whether all logits of a row are finite).

        argmax alone would hide NaN. The soft cap keeps the order.
        """
        scores, finite = self.scores(hidden, kinds)
        best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        return best if self.ranges is None else self.cfg.action_offset + best, finite


class DecodeState(NamedTuple):
    """State between two actions. S: slots of the prompt and the whole chunk, padded to the kernel's block size."""

    cache: Cache
    visible: Bool[Array, "B S"]  # slots visible to later tokens: no padding, no rejected gripper value
    positions: Int[Array, "B S"]
    token: Int[Array, " B"]  # first token of the next action
    finite: Bool[Array, " B"]  # whether all logits so far are finite


def _one_by_one(decoder: Decoder, prefix: Float[Array, "B P D"], valid: Bool[Array, "B P"]) -> Generated:
    """One pass per token. With a two-valued gripper, one fewer per action: its values are fed together before either is
    chosen. A chunk of 4 × 3 tokens takes 8 passes."""
    cfg, P = decoder.cfg, valid.shape[1]
    n, branch = cfg.tokens_per_action, bool(decoder.grippers)
    slots = cfg.action_chunk * (n + branch)
    slots += -(P + slots) % BLOCK
    positions = position_ids(valid)
    with jax.named_scope("prompt"):
        hidden, written = decoder.forward(prefix, positions, decoder.mask(valid, P), positions)
    first, finite = decoder.best(last_of_prompt(hidden, valid), (0,))
    room = ((0, 0), (0, slots), (0, 0), (0, 0))
    state = DecodeState(
        cache=tuple((jnp.pad(k, room), jnp.pad(v, room)) for k, v in written),
        visible=jnp.pad(valid, room[:2]),
        positions=jnp.pad(positions, room[:2]),
        token=first[:, 0],
        finite=finite,
    )
    step = partial(_decode_action, decoder, P, jnp.sum(valid, axis=1))
    with jax.named_scope("tokens"):
        state, ids = jax.lax.scan(step, state, jnp.arange(cfg.action_chunk))
    passes = jnp.asarray(cfg.action_chunk * (n - branch))
    return Generated(rearrange(ids, "actions B n -> B (actions n)"), passes, state.finite)


def _decode_action(
    decoder: Decoder, prompt_slots: int, prompt_length: Int[Array, " B"], state: DecodeState, step: Int[Array, ""]
) -> tuple[DecodeState, Int[Array, "B n"]]:
    """One step of the diagram above: → (the state after the action, its tokens)."""
    cache, visible, positions, token, finite = state
    B, n, grippers = len(token), decoder.cfg.tokens_per_action, decoder.grippers
    branch = bool(grippers)
    base = prompt_slots + step * (n + branch)
    new = (prompt_length + 1 + step * n)[:, None] + jnp.minimum(jnp.arange(n + branch), n - 1)
    positions = jax.lax.dynamic_update_slice(positions, new, (0, base))
    tokens = [token]
    for k in range(n - branch):
        feed, kinds = tokens[-1][:, None], ((k + 1) % n,)
        both = branch and k == n - 2
        if both:
            options = jnp.broadcast_to(jnp.array(grippers), (B, 2))
            feed, kinds = jnp.concatenate([feed, options], axis=1), (k + 1, 0, 0)
        T = feed.shape[1]
        causal = jnp.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)[:T, :T]  # which new tokens each one sees
        mask = jnp.repeat(visible[:, None], T, axis=1)
        mask = jax.lax.dynamic_update_slice(mask, jnp.repeat(causal[None], B, axis=0), (0, 0, base + k))
        hidden, cache = decoder.forward(decoder.embed(feed), new[:, k : k + T], mask, positions, cache, base + k)
        best, sound = decoder.best(hidden, kinds)
        finite &= sound
        chosen = jnp.ones((B, 1), bool)
        if both:
            closed = best[:, :1] == grippers[0]
            chosen = jnp.concatenate([chosen, closed, ~closed], axis=1)
            best = jnp.concatenate([best[:, :1], jnp.where(closed, best[:, 1:2], best[:, 2:])], axis=1)
        visible = jax.lax.dynamic_update_slice(visible, chosen, (0, base + k))
        tokens += list(best.T)
    return DecodeState(cache, visible, positions, tokens[n], finite), jnp.stack(tokens[:n], axis=1)


class DraftState(NamedTuple):
    """State between two passes over all A tokens."""

    draft: Int[Array, "B A"]  # the last pass's input
    tokens: Int[Array, "B A"]  # the last pass's prediction
    cache: Cache
    passes: Int[Array, ""]
    finite: Bool[Array, " B"]  # whether the last pass's logits are finite


def _from_draft(
    decoder: Decoder, prefix: Float[Array, "B P D"], valid: Bool[Array, "B P"], draft: Int[Array, "B A"]
) -> Generated:
    """Jacobi decoding (Santilli et al. 2023): every pass predicts each token from the draft's tokens before it, and the
    predictions become the next draft. Each pass fixes at least one more token of the greedy result, and a draft that
    predicts itself is that result. The first draft is fed with the prompt. At most A - 1 further passes are needed;
    only non-finite numbers could need more, so the loop is bounded."""
    P, A = valid.shape[1], decoder.cfg.num_action_tokens
    hidden, cache, positions, mask = _feed_all(decoder, prefix, valid, draft)
    first = hidden[:, :1]

    def predict(hidden: Float[Array, "B A D"]) -> tuple[Int[Array, "B A"], Bool[Array, " B"]]:
        return decoder.best(hidden, tuple(range(A)))

    def settled(state: DraftState) -> Bool[Array, " B"]:
        return jnp.all(state.draft[:, :-1] == state.tokens[:, :-1], axis=1)

    def unfinished(state: DraftState) -> Bool[Array, ""]:
        return ~jnp.all(settled(state)) & (state.passes < A)

    def refine(state: DraftState) -> DraftState:
        embedded = decoder.embed(state.tokens[:, :-1])
        hidden, cache = decoder.forward(embedded, positions[:, P:], mask[:, P:], positions, state.cache, P)
        tokens, finite = predict(jnp.concatenate([first, hidden], axis=1))
        return DraftState(state.tokens, tokens, cache, state.passes + 1, finite)

    tokens, finite = predict(hidden)
    state = DraftState(draft, tokens, cache, jnp.asarray(0), finite)
    with jax.named_scope("tokens"):
        state = jax.lax.while_loop(unfinished, refine, state)
    return Generated(state.tokens, state.passes, state.finite & settled(state))


def _feed_all(
    decoder: Decoder, prefix: Float[Array, "B P D"], valid: Bool[Array, "B P"], tokens: Int[Array, "B A"]
) -> tuple[Float[Array, "B A D"], Cache, Int[Array, "B S"], Bool[Array, "B S S"]]:
    """One pass over the prompt and all tokens of a chunk but the last. Returns what predicts each token, and the cache
    of S slots with their positions and mask."""
    (B, P), A = valid.shape, tokens.shape[1]
    slots = jnp.concatenate([valid, jnp.ones((B, A - 1), bool)], axis=1)
    positions, mask = position_ids(slots), decoder.mask(slots, P)
    inputs = jnp.concatenate([prefix, decoder.embed(tokens[:, :-1])], axis=1)
    with jax.named_scope("prompt"):
        hidden, cache = decoder.forward(inputs, positions, mask, positions)
    first = last_of_prompt(hidden[:, :P], valid)
    return jnp.concatenate([first, hidden[:, P:]], axis=1), cache, positions, mask


def _rows(table: Matrix, ids: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
    if isinstance(table, Quantized):
        rows = jnp.take(table.values, ids, axis=0).astype(jnp.float32) * jnp.take(table.scale, ids)[..., None]
        return rows.astype(dtype)
    return jnp.take(table, ids, axis=0)
