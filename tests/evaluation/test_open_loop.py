from pathlib import Path

import numpy as np
import pytest

from spatialvla_jax import Policy
from spatialvla_jax.actions import decode, encode
from spatialvla_jax.config import load_config
from spatialvla_jax.data import open_data
from spatialvla_jax.errors import InputError, NonFiniteError
from spatialvla_jax.evaluation.open_loop import evaluate, table


def test_a_perfect_policy_and_both_baselines_by_hand(trained: Path, config_file: Path, monkeypatch) -> None:
    """A policy that replays the tokens of the true actions has accuracy 1, and its L1 is the quantisation's."""
    policy = Policy.load(trained)
    loader = open_data(load_config(config_file), policy.processor.statistics, policy.processor.tokenizer)
    grid = policy.processor.grid

    def replay(batch):
        ids = np.asarray(encode(grid, batch.actions))
        return ids, np.asarray(decode(grid, ids))

    monkeypatch.setattr(policy, "predict", replay)
    result = evaluate(policy, loader, "val", batch_size=4)
    episodes = list(loader.episodes("val"))
    assert result["episodes"] == 2 and result["frames"] == sum(len(e.frames.image) for e in episodes)
    assert result["token_accuracy"] == result["token_accuracy_rotation"] == 1.0

    mean = loader.actions("train").mean(axis=0)
    errors = {"l1": [], "l1_mean_baseline": [], "l1_repeat_baseline": []}
    for episode in episodes:
        actions = episode.frames.actions[:, 0]
        for t in range(len(actions)):
            held = actions[t - 1] if t else mean
            for true in actions[t : t + 4]:
                quantised = np.asarray(decode(grid, encode(grid, true)))
                for name, guess in zip(errors, (quantised, mean, held), strict=True):
                    errors[name].append(np.abs(guess - true))
    for name, values in errors.items():
        np.testing.assert_allclose(result[name], np.mean(values), rtol=1e-5)
        np.testing.assert_allclose(result[f"{name}_per_dimension"], np.mean(values, axis=0), rtol=1e-5)
        if name == "l1":  # this policy's whole L1 is the grid's
            np.testing.assert_allclose(result["l1_quantisation"], np.mean(values), rtol=1e-5)
            np.testing.assert_allclose(result["l1_quantisation_per_dimension"], np.mean(values, axis=0), rtol=1e-5)
    bounds = policy.processor.statistics["toy"]["action"]
    scale = np.append((np.array(bounds["q99"]) - np.array(bounds["q01"]))[:6] / 2, 1)
    robot = np.mean(errors["l1_mean_baseline"], axis=0) * scale
    np.testing.assert_allclose(result["l1_mean_baseline_per_dimension_robot"], robot, rtol=1e-4)
    assert "last action" in table(result)


def test_frames_without_an_action_are_counted_and_left_out(trained: Path, config_file: Path, monkeypatch) -> None:
    """The perfect policy returns non-finite numbers for some frames; the results of the others are unchanged."""
    policy = Policy.load(trained)
    loader = open_data(load_config(config_file), policy.processor.statistics, policy.processor.tokenizer)
    grid, lost = policy.processor.grid, 0

    def replay(batch):
        finite = batch.image[:, 0, 0, 0] % 3 > 0
        if not finite.all():
            raise NonFiniteError(finite.tolist())
        ids = np.asarray(encode(grid, batch.actions))
        return ids, np.asarray(decode(grid, ids))

    monkeypatch.setattr(policy, "predict", replay)
    result = evaluate(policy, loader, "val", batch_size=4)
    errors = []
    for episode in loader.episodes("val"):
        kept = episode.frames.image[:, 0, 0, 0] % 3 > 0
        lost += int((~kept).sum())
        true = episode.frames.actions[kept][episode.frames.action_mask[kept]]
        errors.append(np.abs(np.asarray(decode(grid, encode(grid, true))) - true))
    assert 0 < lost == result["faults"] < result["frames"]
    assert result["token_accuracy"] == 1
    np.testing.assert_allclose(result["l1"], np.concatenate(errors).mean(), rtol=1e-5)
    assert f"{lost} of {result['frames']} frames got no action" in table(result)

    def nothing(batch):
        raise NonFiniteError([False] * len(batch.image))

    monkeypatch.setattr(policy, "predict", nothing)
    with pytest.raises(InputError, match=r"no action for any of the \d+ frames of split 'val'"):
        evaluate(policy, loader, "val", batch_size=4)
