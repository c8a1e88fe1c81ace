"""`benchmarks/sight.py` on an environment of our own."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
from helpers.environments import STEP, Reach, coordinates, state

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
