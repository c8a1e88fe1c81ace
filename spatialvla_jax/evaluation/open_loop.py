"""Open-loop evaluation: the policy's actions on recorded frames, compared with two baselines."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from spatialvla_jax.actions import decode, encode
from spatialvla_jax.actions.normalization import unnormalize
from spatialvla_jax.batch import Batch
from spatialvla_jax.data import Loader
from spatialvla_jax.errors import InputError, NonFiniteError
from spatialvla_jax.inference.policy import Policy
from spatialvla_jax.utils.tables import text_table


def predict(
    policy: Policy, frames: Batch, batch_size: int
) -> tuple[Int[np.ndarray, "L T n"], Float[np.ndarray, "L T A"]]:
    """Greedy chunks for every frame of an episode: (ids, normalised actions). Frames for which the policy's outputs are
    not finite get -1 and NaN."""
    length = len(frames.image)
    parts = []
    for start in range(0, length, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), length - 1)  # padded, so that one shape is compiled
        parts.append(_predict(policy, jax.tree.map(lambda x, rows=rows: x[rows], frames)))
    ids, actions = (np.concatenate(p)[:length] for p in zip(*parts, strict=True))
    return ids, actions


def _predict(policy: Policy, batch: Batch) -> tuple[Int[np.ndarray, "B T n"], Float[np.ndarray, "B T A"]]:
    try:
        return policy.predict(batch)
    except NonFiniteError as error:
        finite = np.array(error.finite)
    cfg = policy.model.config
    shape = len(finite), cfg.action_chunk
    ids = np.full((*shape, cfg.tokens_per_action), -1, np.int32)
    actions = np.full((*shape, policy.processor.grid.action_dim), np.nan, np.float32)
    if finite.any():  # retry, replacing the failed rows with copies of a good one
        rows = np.where(finite, np.arange(len(finite)), np.argmax(finite))
        retried = policy.predict(jax.tree.map(lambda x: x[rows], batch))
        ids[finite], actions[finite] = (x[finite] for x in retried)
    return ids, actions


def evaluate(
    policy: Policy, loader: Loader, split: str, *, batch_size: int = 32, progress: Callable[[int], Any] | None = None
) -> dict[str, Any]:
    """Token accuracies and L1 of greedy chunks over every frame of a split; steps past an episode's end don't count.

    Two baselines are evaluated with the policy. `mean` is the training split's mean action. `repeat` holds the previous
    step's action for the whole chunk (in an episode's first frame, the mean action). L1 is averaged over all dimensions
    in normalised units. `*_per_dimension` gives it for each of `dimensions`, `*_robot` in the robot's units.
    `l1_quantisation` is the L1 that the grid alone leaves: of the recorded actions, encoded and decoded. Frames
    without an action only count as `faults`. `progress(frames)` is called after each episode. Raises InputError for a
    dataset unknown to the policy, and when no frame has an action.
    """
    grid = policy.processor.grid
    mean_action = loader.actions().mean(axis=0)
    names = ("policy", "mean", "repeat")
    errors: dict[str, list[np.ndarray]] = {k: [] for k in (*names, *(f"{k}_robot" for k in names))}
    chosen: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    frames = episodes = faults = 0
    for episode in loader.episodes(split):
        statistics = policy.processor.find_statistics(episode.dataset)
        target = np.asarray(episode.frames.actions)
        ids, predicted = predict(policy, episode.frames, batch_size)
        answered = np.asarray(np.isfinite(predicted).all(axis=(1, 2)))
        faults += int((~answered).sum())
        mask = np.asarray(episode.frames.action_mask) & answered[:, None]
        previous = np.concatenate([mean_action[None], episode.previous_action[1:]])
        guesses = {
            "policy": predicted,
            "mean": np.broadcast_to(mean_action, target.shape),
            "repeat": np.broadcast_to(previous[:, None], target.shape),
        }
        for name, guess in guesses.items():
            errors[name].append(np.abs(guess - target)[mask])
            robot = unnormalize(guess, statistics["action"]) - unnormalize(target, statistics["action"])
            errors[f"{name}_robot"].append(np.abs(robot)[mask])
        chosen.append(ids[mask])
        targets.append(target[mask])
        frames, episodes = frames + len(target), episodes + 1
        if progress is not None:
            progress(len(target))
    if not frames:
        raise InputError(f"split {split!r} has no frames")
    if faults == frames:
        raise InputError(
            f"the policy has no action for any of the {frames} frames of split {split!r}: its numbers are NaN or "
            "infinite; check the checkpoint's weights, and the data's depth and intrinsics"
        )
    recorded = np.concatenate(targets)
    true = np.asarray(encode(grid, recorded))  # in one call, so that one shape is compiled
    hit = (np.concatenate(chosen) == true).mean(axis=0)
    per_dimension = {k: np.concatenate(v).mean(axis=0) for k, v in errors.items()}
    quantisation = np.abs(np.asarray(decode(grid, true)) - recorded).mean(axis=0)
    result: dict[str, Any] = {
        "split": split,
        "episodes": episodes,
        "frames": frames,
        "faults": faults,
        "dimensions": grid.dimensions,
        "token_accuracy": float(hit.mean()),
    }
    kinds = np.asarray(grid.kinds)
    for kind in dict.fromkeys(grid.kinds):
        result[f"token_accuracy_{kind}"] = float(hit[kinds == kind].mean())
    for name, label in zip(names, ("l1", "l1_mean_baseline", "l1_repeat_baseline"), strict=True):
        result[label] = float(per_dimension[name].mean())
        result[f"{label}_per_dimension"] = [float(v) for v in per_dimension[name]]
        result[f"{label}_per_dimension_robot"] = [float(v) for v in per_dimension[f"{name}_robot"]]
    result["l1_quantisation"] = float(quantisation.mean())
    result["l1_quantisation_per_dimension"] = [float(v) for v in quantisation]
    return result


def table(result: dict[str, Any]) -> str:
    """The result as text: L1 per dimension for policy and baselines, normalised and in robot units."""
    rows: list[tuple[str, ...]] = [("", *result["dimensions"], "all")]
    labels = {"l1": "policy", "l1_mean_baseline": "mean action", "l1_repeat_baseline": "last action"}
    for key, name in labels.items():
        rows.append((name, *(f"{v:.3f}" for v in result[f"{key}_per_dimension"]), f"{result[key]:.3f}"))
    for key, name in labels.items():
        rows.append((f"{name}, robot units", *(f"{v:.3f}" for v in result[f"{key}_per_dimension_robot"]), ""))
    text = text_table(rows, "<>")
    if result["faults"]:
        text += f"\n{result['faults']} of {result['frames']} frames got no action (NaN or infinity) and are excluded"
    return text
