"""`benchmarks/sight.py` on a toy environment."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.environments import STEP, Reach, coordinates, state
from helpers.recordings import write_recording

from spatialvla_jax.checkpoints import fingerprint
from spatialvla_jax.errors import InputError
from spatialvla_jax.sim import libero_env as libero
from spatialvla_jax.sim.motions import Motion, save_motions

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/sight.py"))


def act(hand: np.ndarray, bowl: np.ndarray) -> np.ndarray:
    return np.append(np.clip((bowl - hand) / STEP, -1, 1), [0, 0, 0, -1]).astype(np.float32)


def motion(rng: np.random.Generator, split: str) -> Motion:
    bowl, hand, rows = rng.uniform(-0.15, 0.15, 3), np.zeros(3), []
    for _ in range(12):
        action = act(hand, bowl)
        rows.append((coordinates(bowl), state(hand), action))
        hand = hand + STEP * np.clip(action[:3] + rng.normal(0, 0.2, 3), -1, 1)
    return Motion(
        "libero_spatial", int(rng.integers(2)), split, 0, -1, "reach", *map(np.stack, zip(*rows, strict=True))
    )


def test_who_sees_the_bowl_elsewhere_goes_elsewhere(monkeypatch, capfd, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    motions = [motion(rng, "train") for _ in range(200)] + [motion(rng, "val") for _ in range(10)]
    save_motions(tmp_path / "motions.npz", motions)
    monkeypatch.setattr(libero, "check_simulator", lambda: None)
    monkeypatch.setattr(libero, "NUM_TASKS", 2)
    for name, value in {"WithState": Reach, "WIDTH": 64}.items():
        monkeypatch.setitem(SCRIPT["main"].__globals__, name, value)
    arguments = ["--motions", tmp_path / "motions.npz", "--out", tmp_path / "out", "--steps", 1000, "--workers", 1]
    arguments += ["--episodes", 2, "--offsets", "0,0.1"]
    monkeypatch.setattr(sys, "argv", ["sight.py", *map(str, arguments)])
    SCRIPT["main"]()
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["val_l1"] < 0.7 * found["val_l1_median_action"]
    assert found["success"]["0"]["success"] == 1 and found["success"]["0"]["episodes"] == 4
    assert found["success"]["0.1"]["success"] == 0
    save_motions(tmp_path / "motions.npz", motions[5:])
    with pytest.raises(SystemExit):
        SCRIPT["main"]()
    assert "holds results with policy = 'from state, " in capfd.readouterr().err, "of other motions of the same name"


def test_ridge_regression_finds_a_linear_map_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(0)
    x, seen, w = rng.normal(size=(200, 30)), rng.normal(size=(50, 30)), rng.normal(size=(30, 3))
    np.testing.assert_allclose(SCRIPT["ridge"](x, x @ w + 5, seen), seen @ w + 5, atol=0.05)
    noise = rng.normal(size=(200, 3))
    assert np.abs(SCRIPT["ridge"](x, noise + 5, seen) - 5).mean() < 0.4


@pytest.mark.slow
def test_what_a_policy_sees_is_read_off_it(trained: Path, monkeypatch, capfd, tmp_path: Path) -> None:
    """Uses pictures that show only the target's depth: the camera's forward axis is the robot's x."""
    arguments = ["--run", trained, "--packed", write_recording(tmp_path / "set.pack", 12), "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["sight.py", *map(str, arguments)])
    SCRIPT["main"]()
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    written = json.loads((tmp_path / "out" / "sight.json").read_text())
    assert {key: written[key] for key in found} == found and "versions" in written
    assert found["run"] == fingerprint(trained), "which may be trained on"
    for name in ("state after the prompt", "image tokens"):
        seen, blind = found[f"{name}, all"], found["instruction alone, all"]
        assert seen["axes"][2] < 0.3 * blind["axes"][2] and seen["axes"][0] > 0.5 * blind["axes"][0]
        np.testing.assert_allclose(seen["robot"], np.roll(seen["axes"], 1))
    assert found["image tokens, all"]["frames"] == 12 and found["image tokens, before the grasp"]["frames"] == 8
    chunk = {name: found[f"translation of a chunk, {name}, all"] for name in ("policy", "grid alone", "mean action")}
    assert 0 < chunk["grid alone"]["distance"] < chunk["mean action"]["distance"] < 40, "four steps of 5 cm at most"
    assert chunk["policy"]["distance"] > chunk["grid alone"]["distance"]


def test_motions_that_do_not_fit_are_told_before_the_fit(tmp_path: Path) -> None:
    rng, file = np.random.default_rng(0), tmp_path / "motions.npz"
    save_motions(file, [motion(rng, "train")])
    assert SCRIPT["examples"]([file], "train")[1].shape == (12, 28)
    with pytest.raises(InputError, match=r"motions\.npz: no val episodes, which are needed too"):
        SCRIPT["examples"]([file], "val")
    save_motions(file, [motion(rng, "train"), replace(motion(rng, "val"), suite="libero_object")])
    with pytest.raises(InputError, match=r"motions\.npz holds motions of libero_object: expected libero_spatial"):
        SCRIPT["examples"]([file], "train")


def test_a_standard_error_needs_two_episodes() -> None:
    """Errors of 3 and 5 cm in two episodes: the mean is 4 ± 1 cm. In one episode there is no standard error."""
    seen = SimpleNamespace(episode=np.array([0, 0, 1, 1]))
    error = np.array([3.0, 3, 5, 5])[:, None] * [1, 0, 0]
    two = SCRIPT["in_cm"](error, seen, np.ones(4, bool), turned=False)
    assert two == {"axes": [4, 0, 0], "distance": 4, "standard_error": pytest.approx(1), "frames": 4}
    one = SCRIPT["in_cm"](error, seen, seen.episode == 1, turned=False)
    assert (one["distance"], one["standard_error"]) == (5, None)
    assert (SCRIPT["distance_of"](two), SCRIPT["distance_of"](one)) == ("4.00 ± 1.00", "5.00")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--run", "nowhere", "--packed", "x.pack"], "nowhere"),
        (["--run", "nowhere", "--packed", "x.pack", "--frames", "0"], "--frames: '0' is not an integer from 1"),
        (["--motions", "nowhere.npz"], "nowhere.npz is not a file of motions"),
        (["--motions", "x.npz", "--offsets", "0,far"], "argument --offsets: '0,far' is not metres, such as 0,0.01"),
        (
            ["--motions", "gs://a/x.npz"],
            "argument --motions: gs://a/x.npz is a URL: only a local path is accepted here",
        ),
        (["--motions", "x.npz", "--offsets", "0,nan"], "argument --offsets: '0,nan' is not metres, such as 0,0.01"),
        (["--motions", "x.npz", "--execute", "sometimes"], "sometimes"),
        (["--motions", "x.npz", "--frames", "9"], "--frames is for --run"),
        (["--run", "nowhere", "--packed", "x.pack", "--offsets", "0"], "--offsets is for --motions"),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, capsys, arguments: list[str], sentence: str) -> None:
    monkeypatch.setattr(libero, "check_simulator", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sight.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        SCRIPT["main"]()
    assert ended.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]
