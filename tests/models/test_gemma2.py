"""Gemma 2 compared with transformers, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from helpers.torch_reference import our_params, randomise
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.checkpoints.mapping import TABLE, Rule, gemma2
from spatialvla_jax.models.attention import prefix_lm_mask
from spatialvla_jax.models.gemma2 import Gemma2, Gemma2Config, unembed

RULES = [*gemma2("m.model"), Rule("llm/lm_head", TABLE, ("m.lm_head.weight",))]
FLOAT32 = jnp.dtype("float32")


def build(config: Gemma2Config, seed: int):
    """(transformers model, our model, our variables) with one set of random weights."""
    reference = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            query_pre_attn_scalar=int(config.query_pre_attn_scalar),
            sliding_window=config.sliding_window,
            attn_logit_softcapping=config.attn_softcap,
            final_logit_softcapping=config.final_softcap,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=False,
            attn_implementation="eager",  # the others drop the soft cap
        )
    )
    randomise(reference, seed)
    model = Gemma2(config, FLOAT32)
    return reference, model, {"params": our_params(reference, {"llm": param_shapes(model)}, RULES, "m")["llm"]}


def param_shapes(model: Gemma2):
    x, one = jnp.zeros((1, 1, model.config.width)), jnp.ones((1, 1), int)

    def everything(m):
        return m.embed(one), m(x, one, one[None] > 0), m.logits(x)

    return jax.eval_shape(lambda: model.init(jax.random.key(0), method=everything))["params"]


def ours(model, variables, ids, positions, mask):
    def run(m, ids, positions, mask):
        hidden = m(m.embed(ids), positions, mask)
        return m.logits(hidden)

    return jax.jit(lambda *x: model.apply(*x, method=run))(variables, ids, positions, mask)


def small_config(kv_heads, groups, head_dim, width, mlp_dim, depth, window, softcap) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=37,
        width=width * kv_heads * groups,  # transformers requires a multiple of the number of heads
        depth=depth,
        mlp_dim=mlp_dim,
        num_heads=kv_heads * groups,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim + 3.0,
        sliding_window=window,
        attn_softcap=softcap,
        rope_base=500.0,
    )


CONFIGS = st.builds(
    small_config,
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
    width=st.integers(3, 8),
    mlp_dim=st.integers(5, 40),
    depth=st.integers(1, 4),
    window=st.integers(1, 6),
    softcap=st.sampled_from([0.5, 5.0, 50.0]),
)


@settings(deadline=None, max_examples=3)
@given(config=CONFIGS, batch=st.integers(1, 3), length=st.integers(1, 9), seed=st.integers(0, 99))
def test_causal_with_a_sliding_window(config, batch, length, seed):
    """Small shapes, a window shorter than the sequence in every second layer, and both soft caps in effect."""
    reference, model, variables = build(config, seed)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))
    positions = np.broadcast_to(np.arange(length), ids.shape)
    mask = np.broadcast_to(np.tri(length, dtype=bool), (batch, length, length))
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).logits
    np.testing.assert_allclose(ours(model, variables, ids, positions, mask), expected, rtol=0, atol=1e-4)


def test_a_layer_at_full_width():
    """One layer of width 2304 with a prefix mask, one padded token and positions from 1, as SpatialVLA calls it."""
    config = Gemma2Config(vocab_size=64, depth=1)
    reference, model, variables = build(config, seed=0)
    ids = np.random.default_rng(0).integers(0, 64, (2, 12))
    valid = np.ones((2, 12), bool)
    valid[1, 5:8] = False
    positions = np.cumsum(valid, axis=1)
    mask = np.asarray(prefix_lm_mask(valid, 8))
    additive = torch.from_numpy(np.where(mask, 0, np.finfo(np.float32).min).astype(np.float32))[:, None]
    with torch.no_grad():
        expected = reference(
            torch.from_numpy(ids),
            attention_mask={"full_attention": additive, "sliding_attention": additive},
            position_ids=torch.from_numpy(positions),
        ).logits
    result = ours(model, variables, ids, positions, mask)
    np.testing.assert_allclose(np.asarray(result)[valid], expected.numpy()[valid], rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=4)
@given(shape=st.tuples(*[st.integers(1, 9)] * 4), seed=st.integers(0, 99))
def test_gradients_of_the_head_are_those_of_its_product(shape: tuple[int, ...], seed: int) -> None:
    """Exact in float32; in bfloat16, as exact as its digits allow."""
    B, T, V, D = shape
    rng = np.random.default_rng(seed)
    hidden, head, weight = (rng.standard_normal(s).astype(np.float32) for s in ((B, T, D), (V, D), (B, T, V)))

    def gradients(product, dtype) -> list[jax.Array]:
        def loss(x, w):
            return (jnp.tanh(product(x, w)) * weight).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(hidden, dtype), jnp.asarray(head, dtype))

    expected = gradients(lambda x, w: jnp.einsum("btd,vd->btv", x, w), jnp.float32)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.05)):
        for result, exact in zip(gradients(unembed, dtype), expected, strict=True):
            assert result.dtype == dtype
            assert np.linalg.norm(result.astype(jnp.float32) - exact) <= tolerance * np.linalg.norm(exact) + tolerance
