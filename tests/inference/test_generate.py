from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from helpers.batches import GRID, random_inputs

from spatialvla_jax.inference.generate import generate
from spatialvla_jax.inference.weights import prepare_weights
from spatialvla_jax.models import SpatialVLA, preset
from spatialvla_jax.training.state import init_params
from spatialvla_jax.training.step import constrained_argmax


@pytest.fixture(scope="module")
def nano():
    """(model, its parameters, inputs of three observations with prompts of several lengths)."""
    model = SpatialVLA(preset("nano", spatial_tokens=GRID.vocab_size))
    return model, init_params(model, 0), random_inputs(model, 3)


@cache
def compiled(model: Any, constrained: bool):
    ranges = GRID.token_ranges if constrained else None
    return jax.jit(lambda weights, x, draft: generate(model, weights, ranges, **x, draft=draft))


def run(model: Any, params, inputs, *, constrained=True, draft=None, **layout):
    """(tokens, passes) through the jitted path."""
    weights = prepare_weights(model, params, **layout)
    tokens, passes, finite = compiled(model, constrained)(weights, inputs.model_inputs(), draft)
    assert finite.all()
    return np.asarray(tokens), int(passes)


def row(inputs: Any, i: int):
    return jax.tree.map(lambda x: x[i : i + 1], inputs)


@pytest.mark.parametrize(("mask", "constrained"), [("prefix", True), ("prefix", False), ("causal", True)])
def test_tokens_are_greedy_on_the_full_forward_pass(nano, mask: str, constrained: bool) -> None:
    """Every generated token is the best one in the training-time forward pass without a cache."""
    model, params, inputs = nano
    model = SpatialVLA(replace(model.config, mask=mask))
    tokens, _ = run(model, params, inputs, constrained=constrained)
    assert tokens.shape == (3, 12)
    offset, fed = model.config.action_offset, np.maximum(tokens - model.config.action_offset, 0)
    logits = jax.jit(lambda p: model.apply({"params": p}, **inputs.model_inputs(), action_ids=fed))(params)
    if constrained:
        np.testing.assert_array_equal(constrained_argmax(logits[:, :-1], GRID, offset), fed)
        return
    # Random weights may emit text, which the training-time forward pass does not accept: compare up to there.
    count = int(np.argmin(np.append((tokens >= offset).all(axis=0), False)))
    best = np.asarray(logits).argmax(-1)[:, : count + 1][:, :12]
    np.testing.assert_array_equal(best, tokens[:, : count + 1])


def test_two_grippers_at_once_save_a_third_of_the_passes(nano) -> None:
    """Four actions of three tokens take 8 passes after the prompt, whichever gripper value is chosen."""
    tokens, passes = run(*nano)
    assert passes == 8
    assert len(set(tokens[:, 2::3].ravel())) == 2  # both values occur, otherwise this tests nothing


@pytest.mark.parametrize("constrained", [True, False])
def test_a_draft_changes_the_passes_and_never_the_tokens(nano, constrained: bool) -> None:
    expected, _ = run(*nano, constrained=constrained)
    same, none = run(*nano, constrained=constrained, draft=expected)
    np.testing.assert_array_equal(same, expected)
    assert none == 0
    wrong = expected.copy()
    wrong[:, 7] = nano[0].config.action_offset  # one wrong token: all before it are kept
    again, few = run(*nano, constrained=constrained, draft=wrong)
    np.testing.assert_array_equal(again, expected)
    assert 1 <= few <= 5
    noise, many = run(*nano, constrained=constrained, draft=np.full_like(expected, nano[0].config.action_offset))
    np.testing.assert_array_equal(noise, expected)
    assert few <= many <= 12


def test_batch_and_prompt_length_change_nothing(nano) -> None:
    """A prompt alone, padded no further than necessary, gives the same tokens as in the batch."""
    model, params, inputs = nano
    expected, _ = run(model, params, inputs)
    longest = int(np.asarray(inputs.prompt_mask).sum(1).max())
    assert longest < model.config.prompt_length
    short = replace(inputs, prompt_ids=inputs.prompt_ids[:, :longest], prompt_mask=inputs.prompt_mask[:, :longest])
    for i in range(3):
        alone, _ = run(model, params, row(short, i))
        np.testing.assert_array_equal(alone[0], expected[i])


def test_int8_with_the_head_s_action_rows_alone(nano) -> None:
    expected, _ = run(*nano)
    tokens, _ = run(*nano, int8=True, whole_vocabulary=False)
    assert tokens.shape == expected.shape and (tokens[:, ::3] == expected[:, ::3]).mean() > 0.5


def test_32_at_once_get_the_tokens_that_each_gets_alone(nano) -> None:
    model, params, _ = nano
    inputs = random_inputs(model, 32)
    expected, _ = run(model, params, inputs)
    assert len(np.unique(expected, axis=0)) > 16, "they can be told apart"
    weights = prepare_weights(model, params)
    for i in range(32):
        alone = compiled(model, True)(weights, row(inputs, i).model_inputs(), None).tokens
        np.testing.assert_array_equal(alone[0], expected[i])


@pytest.mark.parametrize("drafted", [False, True], ids=["", "draft"])
@pytest.mark.parametrize("kind", ["constrained", "free", "int8"])
def test_a_row_without_finite_logits_is_told_and_its_neighbours_are_as_before(nano, kind: str, drafted: bool) -> None:
    model, params, inputs = nano
    run = compiled(model, kind != "free")
    weights = prepare_weights(model, params, int8=kind == "int8", whole_vocabulary=kind != "int8")
    expected = run(weights, inputs.model_inputs(), None)
    draft = expected.tokens if drafted else None
    depth, intrinsics = np.array(inputs.depth), np.array(inputs.intrinsics)
    depth[1, 3, 4], intrinsics[1] = np.nan, 0
    for broken in (replace(inputs, depth=depth), replace(inputs, intrinsics=intrinsics)):
        tokens, _, finite = run(weights, broken.model_inputs(), draft)
        np.testing.assert_array_equal(finite, [True, False, True])
        np.testing.assert_array_equal(tokens[::2], expected.tokens[::2])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_array_of_weights_hides_what_is_not_finite(nano, value: float) -> None:
    """Checks every array, with greedy steps and with drafts; argmax alone would return the first token of each kind."""
    model, params, inputs = nano
    run, (arrays, structure) = compiled(model, True), jax.tree.flatten(prepare_weights(model, params))
    draft = run(jax.tree.unflatten(structure, arrays), inputs.model_inputs(), None).tokens
    for i, array in enumerate(arrays):
        broken = jax.tree.unflatten(structure, [*arrays[:i], jax.numpy.full_like(array, value), *arrays[i + 1 :]])
        for given in (None, draft):
            assert not run(broken, inputs.model_inputs(), given).finite.any(), i


def test_a_norm_that_overflows_is_not_finite_either(nano) -> None:
    """The mean square is infinite, so the norm gives zeros and equal logits."""
    model, params, inputs = nano
    weights = prepare_weights(model, params)
    norms = weights.llm.norms | {"post_ffw_norm": 0 * weights.llm.norms["post_ffw_norm"] + 1e30}
    broken = weights._replace(llm=weights.llm._replace(norms=norms))
    assert not compiled(model, True)(broken, inputs.model_inputs(), None).finite.any()


def test_drafts_end_where_one_token_s_row_is_not_finite(nano) -> None:
    """A non-finite token spoils every prediction of the pass that reads it, so the next pass repeats it, forever."""
    model, params, inputs = nano
    weights, offset = prepare_weights(model, params), model.config.action_offset
    chosen = compiled(model, True)(weights, inputs.model_inputs(), None).tokens[0, 1]
    broken = weights._replace(spatial=weights.spatial.at[chosen - offset].set(np.nan))
    draft = np.tile([offset + start for start, _ in GRID.token_ranges], (3, 4))
    _, passes, finite = compiled(model, True)(broken, inputs.model_inputs(), draft.astype(np.int32))
    assert not finite[0] and passes <= 12
