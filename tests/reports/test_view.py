"""Recordings for Rerun, read back."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.environments import Counter
from jaxtyping import TypeCheckError

from spatialvla_jax import Policy
from spatialvla_jax.actions import PRETRAIN_GAUSSIANS, gaussian_grid, linear_grid
from spatialvla_jax.actions.normalization import unnormalize
from spatialvla_jax.cli import main
from spatialvla_jax.config import load_config
from spatialvla_jax.data import open_data
from spatialvla_jax.evaluation.rollouts import Episode, Settings, rollouts
from spatialvla_jax.reports.view import RolloutRecorder, cell_edges, point_cloud, record_episode, recording


@pytest.fixture
def rerun() -> Any:
    return pytest.importorskip("rerun", reason="the extra [view] is not installed")


def read(path: Path) -> dict[str, dict[int | None, dict[str, Any]]]:
    """{entity: {step (None: static): {component: values}}}."""
    from rerun.chunk import RrdReader

    found: dict[str, dict[int | None, dict[str, Any]]] = {}
    for chunk in RrdReader(path).stream():
        entity = found.setdefault(chunk.entity_path, {})
        batch = chunk.to_record_batch()
        batch = batch.select(
            [name for name in batch.schema.names if not name.startswith("log_t")]
        )  # Rerun's own timelines
        for row in batch.to_pylist():
            values = {k.rpartition(":")[2]: v for k, v in row.items() if v is not None}
            entity.setdefault(row.get("step"), {}).update(values)
    return found


@pytest.mark.slow
def test_an_episode_and_the_policy_s_predictions_on_it(rerun, trained, config_file, tmp_path, capsys) -> None:
    out = tmp_path / "seen.rrd"
    assert main(["view", "policy", "--checkpoint", str(trained), "--episode", "1", "--out", str(out)]) == 0
    assert f"wrote {out}: " in capsys.readouterr().out
    policy = Policy.load(trained)
    loader = open_data(load_config(config_file), policy.processor.statistics, policy.processor.tokenizer)
    _, episode = loader.episodes("val")
    ids, actions = policy.predict(episode.frames)
    statistics, found = policy.processor.statistics["toy"]["action"], read(out)
    steps = range(len(ids))
    for kind, column in zip(policy.processor.grid.kinds, ids[:, 0].T, strict=True):
        assert [found[f"/token/{kind}"][i]["scalars"] for i in steps] == [[x] for x in column]
    for name, normalised in (("expert", episode.frames.actions), ("predicted", actions)):
        robot = unnormalize(np.asarray(normalised), statistics)
        shown = np.array(
            [found[f"/action/{name}"][i]["scalars"] + found[f"/gripper/{name}"][i]["scalars"] for i in steps]
        )
        np.testing.assert_allclose(shown, robot[:, 0], rtol=1e-6)
        path = np.array(found[f"/robot/chunk/{name}"][0]["strips"][0])
        count = int(episode.frames.action_mask[0].sum()) if name == "expert" else len(robot[0])
        np.testing.assert_allclose(path[1:] - path[:-1], robot[0, :count, :3], rtol=1e-5, atol=1e-6)
    frame = {key: np.asarray(getattr(episode.frames, key)[0]) for key in ("image", "depth", "intrinsics")}
    points, _ = point_cloud(**frame)
    np.testing.assert_allclose(found["/camera/points"][0]["positions"], points)
    assert found["/instruction"][None]["text"] == [episode.instruction]
    assert {"/depth", "/camera/image", "/grid/cell", "/robot/path"} <= found.keys()
    # The command may replace its own recording, but no other file.
    assert main(["view", "data", "--config", str(config_file), "--out", str(out)]) == 0
    assert not {"/token/gripper", "/action/predicted"} & read(out).keys()
    (tmp_path / "other.rrd").write_bytes(b"RRF2")
    assert main(["view", "data", "--config", str(config_file), "--out", str(tmp_path / "other.rrd")]) == 2


def test_pictures_of_some_steps_lie_where_these_steps_are(rerun, config_file, tmp_path: Path) -> None:
    loader = open_data(load_config(config_file))
    whole = next(loader.episodes("val"))
    some = whole._replace(
        frames=jax.tree.map(lambda x: x[::3], whole.frames),
        steps=whole.steps[::3],
        actions=whole.actions[: whole.steps[::3][-1] + 1],
    )
    found = {}
    for name, episode in (("whole", whole), ("some", some)):
        with recording(tmp_path / f"{name}.rrd") as stream:
            record_episode(stream, episode, loader.statistics["toy"])
        chunks = read(tmp_path / f"{name}.rrd")["/robot/chunk/expert"]
        found[name] = {step: np.array(chunk["strips"][0]) for step, chunk in chunks.items() if "strips" in chunk}
    assert list(found["some"]) == list(whole.steps[::3]) and len(found["some"]) > 1
    for step, path in found["some"].items():
        np.testing.assert_array_equal(path, found["whole"][step])


def test_a_rollout_is_recorded(rerun, tmp_path: Path) -> None:
    """Records every observation that the policy gets. Each chunk starts where the previous one ended."""
    grid = gaussian_grid(PRETRAIN_GAUSSIANS, (4, 4, 2, 4, 4, 4))
    chunk = np.zeros((2, 7), np.float32)
    chunk[:, 0] = 0.25
    result = {"actions": chunk, "action_ids": np.asarray(grid.encode(chunk))}
    episode, settings = Episode("toy", 1, 0, 0), Settings({"toy": 4})
    with recording(tmp_path / "rollout.rrd") as stream:
        infer = RolloutRecorder(stream, lambda seen, _: [result for _ in seen], grid, sys.maxsize)
        (rollout,) = rollouts(partial(Counter, 16, True, False), infer, [episode], settings)
    assert rollout.record["steps"] == 4
    found = read(tmp_path / "rollout.rrd")
    paths = found["/robot/chunk/predicted"]
    assert {step: [p[0] for p in row["strips"][0]] for step, row in paths.items()} == {
        0: [0, 0.25, 0.5],
        2: [0.5, 0.75, 1],
    }
    assert found["/instruction"][None]["text"] == ["pick up object 1"]


def test_bad_arguments_are_one_sentence(config_file: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rerun", object())
    for arguments, message in [
        (["--dataset", "bridge"], "--dataset 'bridge' is not in the data: choose one of toy"),
        (["--episode", "2"], "--episode 2: split 'val' of 'toy' has 2, counted from 0"),
        (["--split", "test"], "'test'"),
    ]:
        out = tmp_path / "out.rrd"
        assert main(["view", "data", "--config", str(config_file), "--out", str(out), *arguments]) == 2
        assert message in capsys.readouterr().err and not out.exists()
    monkeypatch.setitem(sys.modules, "rerun", None)
    assert main(["view", "data", "--config", str(config_file)]) == 2
    assert "pip install 'spatialvla-jax[view]'" in capsys.readouterr().err


def test_a_cloud_is_in_metres() -> None:
    depth = np.full((4, 6), 2.0, np.float32)
    depth[0, 0] = 0
    image = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    points, colours = point_cloud(image, depth, np.array([[10, 0, 3], [0, 5, 2], [0, 0, 1]], np.float32))
    assert len(points) == 23 and (points[:, 2] == 2).all()
    np.testing.assert_allclose(points[0], [2 * (1.5 - 3) / 10, 2 * (0.5 - 2) / 5, 2], rtol=1e-6)
    np.testing.assert_array_equal(colours[0], image[0, 1])
    with pytest.raises(TypeCheckError):
        point_cloud(image.astype(np.float32), depth, np.eye(3, dtype=np.float32))


@pytest.mark.parametrize("grid", [gaussian_grid(PRETRAIN_GAUSSIANS, (4, 4, 2, 4, 4, 4)), linear_grid(9)])
def test_an_action_lies_in_its_cell(grid) -> None:
    action = np.array([0.3, -0.2, 0.25, 0, 0, 0, 1], np.float32)
    edges = np.stack(cell_edges(grid, np.asarray(grid.encode(action))))
    assert edges.shape == (12, 8, 3)
    x, y, z = action[:3]
    spherical = lambda p: np.stack([np.arctan2(np.hypot(p[..., 0], p[..., 1]), p[..., 2]), np.linalg.norm(p, axis=-1)])  # noqa: E731
    if hasattr(grid, "levels"):
        assert (edges.min((0, 1)) <= action[:3]).all() and (action[:3] <= edges.max((0, 1))).all()
    else:
        low, high, (theta, r) = (
            spherical(edges).min((1, 2)),
            spherical(edges).max((1, 2)),
            spherical(np.array([x, y, z])),
        )
        assert (low <= [theta, r]).all() and ([theta, r] <= high).all()
