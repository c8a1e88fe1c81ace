"""Small data in Bridge, Fractal and LIBERO format gives the actions, chunks, masks and statistics of the release.

Its rules, from SpatialVLA/SpatialVLA (data/oxe/transforms.py, data/utils/data_utils.py, data/traj_transforms.py), are
written here again, one step after the other in plain Python: standardise, take statistics over all steps of all
episodes, normalise, cut chunks. One thing is left out: the release draws a random later step of the episode as a goal,
and its chunks become neutral after that one already, not only after the last.
"""

import itertools
import math

import numpy as np
import pytest
from helpers.oxe_features import FEATURES, random_steps, tfds_features
from helpers.toy_rlds import data_config, encode_image, make_rlds

from spatialvla_jax.data import Loader

CHUNK = 4
LENGTHS = (9, 3, 14, 4, 22)


def bridge_action(steps):
    """[x, y, z, roll, pitch, yaw, gripper] of every step that is kept: all but the first and the last."""
    gripper = [float(step["action"][6]) for step in steps[1:]]
    carried = gripper[-1]
    for number in reversed(range(len(gripper))):
        if gripper[number] > 0.95:
            carried = 1.0
        elif gripper[number] < 0.05:
            carried = 0.0
        gripper[number] = carried
    poses = [step["observation"]["state"][:6] for step in steps[1:]]
    moves = [(after - before).tolist() for before, after in itertools.pairwise(poses)]
    return [[*move, gripper[number]] for number, move in enumerate(moves)]


def fractal_action(steps):
    relative = [float(step["action"]["gripper_closedness_action"][0]) for step in steps]
    commands = [1 if value < -0.1 else -1 if value > 0.1 else 0 for value in relative]
    first = next((command for command in commands if command != 0), 0)
    carried = -first if first else 1
    actions = []
    for step, command in zip(steps, commands, strict=True):
        carried = command if command else carried
        move = [*step["action"]["world_vector"].tolist(), *step["action"]["rotation_delta"].tolist()]
        actions.append([*move, 1.0 if carried == 1 else 0.0])
    return actions


def libero_action(steps):
    return [[*step["action"][:6].tolist(), 1.0 - min(max(float(step["action"][6]), 0.0), 1.0)] for step in steps]


def bridge_inputs(values, rng):
    length = len(values["action"])
    values["observation"]["state"] = (rng.normal(size=(length, 7)) * 0.3).astype(np.float32)
    values["action"][:, 6] = rng.choice([0, 0.03, 0.2, 0.6, 0.9, 0.97, 1], length)


def fractal_inputs(values, rng):
    length = len(values["is_first"])
    values["action"]["gripper_closedness_action"][:, 0] = rng.choice([-1, -0.05, 0, 0, 0, 0.05, 1], length)


def libero_inputs(values, rng):
    values["action"][:, 6] = rng.choice([-1, 1], len(values["action"]))
    values["action"][:, 4] = 0.25  # a dimension that never changes


FORMATS = {
    "bridge_orig": (bridge_inputs, bridge_action, "image_0"),
    "fractal20220817_data": (fractal_inputs, fractal_action, "image"),
    "libero_spatial_no_noops": (libero_inputs, libero_action, "image"),
}


def make_steps(name, length, rng):
    inputs, _, camera = FORMATS[name]
    values = random_steps(FEATURES[name], length, rng)
    inputs(values, rng)
    pixels = rng.integers(0, 256, (length, 8, 8, 3)).astype(np.uint8)
    values["observation"][camera] = [encode_image(image) for image in pixels]
    return [slice_step(values, number) for number in range(length)]


def slice_step(values, number):
    return {key: slice_step(v, number) if isinstance(v, dict) else v[number] for key, v in values.items()}


def quantile(values, fraction):
    """By linear interpolation between the sorted values, numpy's default."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def reference_statistics(episodes):
    columns = list(zip(*[action for actions in episodes for action in actions], strict=True))
    means = [sum(column) / len(column) for column in columns]
    return {
        "mean": means,
        "std": [
            math.sqrt(sum((value - mean) ** 2 for value in column) / len(column))
            for column, mean in zip(columns, means, strict=True)
        ],
        "min": [min(column) for column in columns],
        "max": [max(column) for column in columns],
        "q01": [quantile(column, 0.01) for column in columns],
        "q99": [quantile(column, 0.99) for column in columns],
    }


def reference_normalised(action, rows):
    result = []
    for dimension, value in enumerate(action):
        low, high = rows["q01"][dimension], rows["q99"][dimension]
        if dimension == 6:
            result.append(value)
        elif rows["min"][dimension] == rows["max"][dimension]:
            result.append(0.0)
        else:
            result.append(min(max(2 * (value - low) / (high - low + 1e-8) - 1, -1.0), 1.0))
    return result


def reference_chunks(actions):
    """For every step, the next four normalised actions and which of them the episode has."""
    last = len(actions) - 1
    for step in range(len(actions)):
        ahead = range(step, step + CHUNK)
        yield (
            [actions[t] if t <= last else [0.0] * 6 + [actions[last][6]] for t in ahead],
            [t <= last for t in ahead],
        )


@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_release(name, tmp_path):
    rng = np.random.default_rng(7)
    episodes = [make_steps(name, length, rng) for length in LENGTHS]
    path = make_rlds(tmp_path, {"train": episodes}, step_features=tfds_features(FEATURES[name]), name=name)
    config = data_config(path, cache_dir=tmp_path / "cache")
    config["datasets"] = [{"name": name, "path": str(path), "spec": name}]
    config["prompt"] = {"length": 64, "vocab_size": 300}
    loader = Loader(config, image_size=8, action_chunk=CHUNK)

    standard = [FORMATS[name][1](steps) for steps in episodes]
    rows = reference_statistics(standard)
    found = loader.statistics[name]
    for row, values in rows.items():
        np.testing.assert_allclose(found["action"][row], values, atol=1e-6, err_msg=row)
    assert found["num_trajectories"] == len(LENGTHS)
    assert found["num_transitions"] == sum(map(len, standard))
    assert found["action"]["mask"] == [True] * 6 + [False]

    read = list(loader.episodes("train"))
    assert len(read) == len(standard)
    clipped = past = 0
    for episode, actions in zip(read, standard, strict=True):
        normalised = [reference_normalised(action, rows) for action in actions]
        chunks, masks = zip(*reference_chunks(normalised), strict=True)
        np.testing.assert_allclose(episode.frames.actions, chunks, atol=1e-6)
        np.testing.assert_array_equal(episode.frames.action_mask, masks)
        clipped += np.sum(np.abs(np.asarray(normalised)[:, :6]) == 1)
        past += np.sum(~np.asarray(masks))
    assert clipped >= 10 and past >= 20  # the rules have been exercised
    if name == "libero_spatial_no_noops":
        assert not any(episode.frames.actions[..., 4].any() for episode in read)
