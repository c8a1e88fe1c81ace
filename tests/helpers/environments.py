"""Toy environments for closed loops. Each runs in its own process, so this module must be quick to import."""

import os
import time
from pathlib import Path

import numpy as np

from spatialvla_jax.errors import InputError
from spatialvla_jax.sim.motions import Motion

STEP = 0.02  # metres that an action of 1 moves the hand of `Reach`


class Point:
    """Done when |position - goal| < 0.05; all pixels are 100 + 100·(goal - position). Task 2's goal cannot be reached
    within the step limit. The folder `marks` records, across processes, whether one has crashed or hung."""

    def __init__(self, marks: Path | None = None, crash: str = "", hang: str = "") -> None:
        self.marks, self.crash, self.hang = marks, crash, hang

    def reset(self, episode):
        rng = np.random.default_rng((episode.task, episode.number, episode.seed))
        self.name = f"{episode.task}-{episode.number}-{episode.seed}"
        self.position, self.goal, self.steps = 0.0, rng.uniform(0.3, 0.6), 0
        if episode.task == 2:
            self.goal = 1.5
        return f"go to {episode.task}", self.look()

    def step(self, action, look):
        self.steps += 1
        if self.steps == 3 and self.once(self.crash, "crash"):
            os._exit(7)
        if self.steps == 3 and self.once(self.hang, "hang"):
            time.sleep(3600)
        if self.crash == "always":
            raise ValueError("no such joint")
        if self.crash == "input":
            raise InputError("the simulator is not installed")
        self.position += float(np.clip(action[0], -0.1, 0.1))
        return self.look() if look else {}, abs(self.position - self.goal) < 0.05

    def look(self):
        value = round(100 + 100 * (self.goal - self.position))
        return {"image": np.full((6, 8, 3), value, np.uint8), "pid": os.getpid()}

    def once(self, which: str, mark: str) -> bool:
        if which != self.name or self.marks is None or (self.marks / mark).exists():
            return False
        (self.marks / mark).touch()
        return True


class Waiting:
    """Task 1 begins after the policy is asked for task 0. Task 0 takes its second step after the policy is asked for
    task 1. Files in `marks`: ask-TASK, by the policy, and TASK-STEP."""

    def __init__(self, marks: Path) -> None:
        self.marks = marks

    def reset(self, episode):
        self.task, self.steps = episode.task, 0
        if self.task == 1:
            self.until("ask-0")
        return "wait", {"task": self.task}

    def step(self, action, look):
        self.steps += 1
        if (self.task, self.steps) == (0, 2):
            self.until("ask-1")
        (self.marks / f"{self.task}-{self.steps}").touch()
        return {"task": self.task} if look else {}, False

    def until(self, mark: str) -> None:
        while not (self.marks / mark).exists():
            time.sleep(0.01)


class Counter:
    """Stands in for LIBERO: an episode of task 0 ends after two steps, one of task 1 never ends."""

    def __init__(self, image_size: int, depth: bool, mirrored: bool) -> None:
        self.size, self.depth, self.mirrored = image_size, depth, mirrored

    def reset(self, episode):
        self.steps, self.task = 0, episode.task
        return f"pick up object {episode.task}", self.look()

    def step(self, action, look):
        self.steps += 1
        return self.look() if look else {}, self.task == 0 and self.steps == 2

    def look(self):
        image = np.full((self.size, self.size, 3), 9 * self.steps, np.uint8)
        image[0, 0] = self.size, self.mirrored, 0
        depth = {"depth": np.ones((self.size, self.size), np.float32)} if self.depth else {}
        intrinsics = np.array([[9, 0, 2], [0, 9, 2], [0, 0, 1]], np.float32)
        return {"image": image, "intrinsics": intrinsics, "state": np.arange(8, dtype=np.float32), **depth}


class Line:
    """Done once ten centimetres are covered; the tokenizer may round the expert's steps."""

    def reset(self, episode):
        self.left = 0.1
        return "move on", self.look()

    def step(self, action, look):
        self.left -= action[0]
        return self.look(), bool(abs(self.left) < 0.02)

    def look(self):
        return {"expert": np.array([np.clip(self.left, -0.01, 0.01), 0, 0, 0, 0, 0, 1], np.float32)}


class Reach:
    """Done when the hand is within a centimetre of the bowl; `direction` is 1 along every axis."""

    def reset(self, episode):
        self.bowl, self.hand, self.task = np.array([0.1, -0.05, 0.02 * episode.number]), np.zeros(3), episode.task
        return "reach", self.look()

    def step(self, action, look):
        self.hand = self.hand + STEP * action[:3]
        return self.look(), bool(np.linalg.norm(self.bowl - self.hand) < 0.01)

    def look(self):
        seen = {"qpos": coordinates(self.bowl), "state": state(self.hand)}
        return seen | {"task": self.task, "direction": np.ones(3, np.float32)}


def coordinates(bowl: np.ndarray) -> np.ndarray:
    """Simulator coordinates in which the other objects do not move."""
    qpos = np.zeros(44, np.float32)
    qpos[9:13] = [*bowl, 1]
    return qpos


def state(hand: np.ndarray) -> np.ndarray:
    return np.append(hand, [0, 0, 0, 0.04, -0.04]).astype(np.float32)


class Handover:
    """Stands in for `Takeover`. In every third episode, the policy finishes the first two attempts itself. In every
    second, the expert then fails one. The process dies once in episode 4. A motion encodes attempt and actions."""

    def __init__(self, marks: Path) -> None:
        self.marks = marks

    def reset(self, episode):
        self.episode, self.actions = episode, []
        return f"task {episode.task}", {"image": np.full((2, 2, 3), episode.number, np.uint8)}

    def step(self, action, look):
        self.actions.append(action)
        if len(self.actions) < 4:
            return {"image": np.full((2, 2, 3), 10, np.uint8)}, False
        number, attempt = self.episode.number, self.episode.seed
        if number == 4 and not (self.marks / "died").exists():
            (self.marks / "died").touch()
            os._exit(7)
        solved = 2 * (number % 3 == 0)
        if attempt < solved:
            return {"record": {"outcome": "solved"}}, True
        if attempt < solved + (number % 2 == 0):
            return {"record": {"outcome": "failed"}}, True
        arrays = (np.full((4, width), attempt, np.float32) for width in (9, 8))
        what = (self.episode.suite, self.episode.task, "train", number, -1, f"task {self.episode.task}")
        return {"record": {"outcome": "kept", "motion": Motion(*what, *arrays, np.stack(self.actions))}}, True


def double(marks: Path, number: int) -> int:
    """Doubles the number, but the process dies at the first call with 3."""
    if number == 3 and not (marks / "died").exists():
        (marks / "died").touch()
        os._exit(7)
    return 2 * number


def never(job: int) -> None:
    """Never returns."""
    print("begun", flush=True)
    while True:
        time.sleep(60)
