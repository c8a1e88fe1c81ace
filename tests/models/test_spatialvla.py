"""The whole model compared with the published implementation, in float32, imported as users do."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.checkpoints import golden_with_given_depth

from spatialvla_jax.checkpoints import read_huggingface
from spatialvla_jax.checkpoints.mapping import flatten, slots
from spatialvla_jax.inference.generate import generate
from spatialvla_jax.inference.weights import prepare_weights
from spatialvla_jax.models import SpatialVLA
from spatialvla_jax.models.attention import position_ids, prefix_lm_mask
from spatialvla_jax.models.ego3d import back_project, frequency_encoding

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {"rtol": 0, "atol": 2e-4}


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "tiny_model_io.npz")


@pytest.fixture(scope="module")
def model_and_params():
    checkpoint = golden_with_given_depth()
    return SpatialVLA(replace(checkpoint.config, prompt_length=24)), checkpoint.params()


@pytest.fixture(scope="module")
def inputs(golden, model_and_params):
    """Our inputs of the three examples as one batch, with the published depth."""
    config = model_and_params[0].config
    prompts = [golden[f"prompt_ids_{i}"][0, config.img.num_tokens :] for i in range(3)]
    return {
        "image": golden["pixel_values"].transpose(0, 2, 3, 1),
        "prompt_ids": np.stack([np.pad(p, (0, config.prompt_length - len(p))) for p in prompts]),
        "prompt_mask": np.stack([np.arange(config.prompt_length) < len(p) for p in prompts]),
        "depth": stacked(golden, "depth")[:, 0],
        "intrinsics": golden["intrinsic"],
    }


def stacked(golden, name):
    return np.concatenate([golden[f"{name}_{i}"] for i in range(3)])


def test_every_stage_of_the_image_path(golden, model_and_params, inputs):
    model, params = model_and_params

    def stages(m, image, depth, intrinsics):
        return m.ego3d(depth, intrinsics), m.img(image * 2 - 1)[1], m.embed_image(image, depth, intrinsics)

    arguments = (inputs["image"], inputs["depth"], inputs["intrinsics"])
    points = back_project(*arguments[1:], model.config.img.patches_per_side)
    np.testing.assert_allclose(points, stacked(golden, "points"), **TOLERANCE)
    np.testing.assert_allclose(frequency_encoding(points), stacked(golden, "freq"), **TOLERANCE)
    position, tokens, features = jax.jit(lambda *x: model.apply({"params": params}, *x, method=stages))(*arguments)
    np.testing.assert_allclose(position, stacked(golden, "pos_embed_3d"), **TOLERANCE)
    np.testing.assert_allclose(tokens, stacked(golden, "siglip"), **TOLERANCE)
    np.testing.assert_allclose(features, stacked(golden, "image_features"), **TOLERANCE)


def test_logits_at_every_position_of_the_prompt(golden, model_and_params, inputs):
    model, params = model_and_params

    def prefix_logits(m, image, prompt_ids, prompt_mask, depth, intrinsics):
        embeddings, valid = m.embed_prefix(image, prompt_ids, prompt_mask, depth, intrinsics)
        hidden = m.llm(embeddings, position_ids(valid), prefix_lm_mask(valid, valid.shape[1]))
        return m.llm.logits(hidden)

    logits = jax.jit(lambda x: model.apply({"params": params}, **x, method=prefix_logits))(inputs)
    for i in range(3):
        expected = golden[f"prefill_logits_{i}"][0]
        np.testing.assert_allclose(logits[i, : len(expected)], expected, **TOLERANCE)


def test_greedy_tokens_from_images_alone(golden, inputs):
    """The whole published model, ZoeDepth included: all 36 tokens, unconstrained, and the first logits."""
    checkpoint = read_huggingface(GOLDEN / "tiny_model")
    assert checkpoint.config.depth_source == "zoedepth" and checkpoint.config.prompt_length > 24
    model, params = SpatialVLA(replace(checkpoint.config, prompt_length=24)), checkpoint.params()
    observations = {name: x for name, x in inputs.items() if name != "depth"}

    @jax.jit
    def run(params, observations):
        logits = jnp.asarray(model.apply({"params": params}, **observations, action_ids=jnp.zeros((3, 12), int)))
        return logits[:, 0], generate(model, prepare_weights(model, params), None, **observations)[0]

    logits, ids = run(params, observations)
    np.testing.assert_allclose(logits, [golden[f"prefill_logits_{i}"][0, -1] for i in range(3)], **TOLERANCE)
    np.testing.assert_array_equal(ids, stacked(golden, "greedy_ids"))


@pytest.fixture(scope="module")
def training(golden, model_and_params, inputs):
    """(our inputs, targets [3, 13], their positions in the published sequences, where they follow the prompt)."""
    config = model_and_params[0].config
    start = golden["train_token_type_ids"].argmax(axis=1)  # first target
    places = start[:, None] + np.arange(config.num_action_tokens + 1)
    targets = np.take_along_axis(golden["train_input_ids"], places, axis=1)
    assert (np.take_along_axis(golden["train_labels"], places, axis=1) == targets).all()
    assert (golden["train_labels"] != -100).sum() == targets.size
    for i in range(3):
        assert (golden["train_input_ids"][i, : start[i]] == golden[f"prompt_ids_{i}"][0]).all()
    return inputs | {"action_ids": targets[:, :-1] - config.action_offset}, targets, places


def published_logits(model, params, inputs, golden, *, padding_seen):
    """Logits at every position of the published sequences: actions directly after the prompt, padding at the end.

    The release (transformers 4.47) masks padding, and then unmasks all keys of token type 0, padding included. In a
    padded batch every token therefore sees the padding, which sees the targets. `padding_seen` reproduces that.
    """
    ids, valid = golden["train_input_ids"], golden["train_attention_mask"].astype(bool)
    order = np.arange(ids.shape[1])
    mask = (golden["train_token_type_ids"] == 0)[:, None] | (order <= order[:, None])
    mask = mask if padding_seen else mask & valid[:, None]

    def run(m, image, depth, intrinsics):
        tokens = m.embed_image(image, depth, intrinsics)
        rest = ids[:, tokens.shape[1] :]
        action = (rest - model.config.action_offset)[..., None]
        text = m.llm.embed(np.minimum(rest, model.config.text_vocab))
        embedded = jnp.where(action >= 0, m.spatial_embedding[np.maximum(action[..., 0], 0)], text)
        embeddings = jnp.concatenate([tokens, embedded], axis=1)
        hidden = m.llm(embeddings, jnp.broadcast_to(order + 1, ids.shape), jnp.asarray(mask))
        return m.llm.logits(hidden)

    arguments = (inputs["image"], inputs["depth"], inputs["intrinsics"])
    return model.apply({"params": params}, *arguments, method=run)


def test_training_sequence_as_published(golden, model_and_params, training):
    """Logits, loss and six gradients of the published training batch, with its treatment of padding reproduced."""
    model, params = model_and_params
    inputs, targets, places = training

    def loss_of(params):
        logits = published_logits(model, params, inputs, golden, padding_seen=True)
        predicting = jnp.take_along_axis(logits, places[..., None] - 1, axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(predicting, targets).mean(), logits

    (loss, logits), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    np.testing.assert_allclose(logits, golden["train_logits"], **TOLERANCE)
    np.testing.assert_allclose(loss, golden["train_loss"], rtol=1e-5)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(gradients).items()}
    published = {slot.key: slot for slot in slots({path: leaf.shape for path, leaf in leaves.items()})}
    names = [name for name in golden if name.startswith("grad/")]
    assert len(names) == 6
    for name in names:
        slot = published[name.removeprefix("grad/")]
        error = np.abs(slot.to_published(leaves[slot.path]) - golden[name]).max() / np.abs(golden[name]).max()
        assert error < 1e-3, (name, error)


def test_our_fixed_places_change_nothing(golden, model_and_params, training):
    """`__call__`, with its padding between prompt and actions, gives the logits of the published sequence. Example 0
    has no padding and is compared with golden logits, the others with logits that ignore padding."""
    model, params = model_and_params
    inputs, _, places = training
    logits = jax.jit(lambda params: model.apply({"params": params}, **inputs))(params)
    unseen = jax.jit(lambda params: published_logits(model, params, inputs, golden, padding_seen=False))(params)
    expected = np.take_along_axis(np.asarray(unseen), places[..., None] - 1, axis=1)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
    assert golden["train_attention_mask"][0].all()
    np.testing.assert_allclose(logits[0], golden["train_logits"][0, places[0] - 1], **TOLERANCE)
