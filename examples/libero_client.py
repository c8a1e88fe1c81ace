"""A simulator driven through `Agent`: copy this and put your own robot in LIBERO's place (extras [sim] and [serve]).

    spatialvla-jax serve --checkpoint runs/demo/run &
    python examples/libero_client.py --server ws://127.0.0.1:8000 --task 2

Your robot needs `observe()` and `act(action)`; all about chunks, ensembles and the server is behind `agent.reset`
and `agent.step`. `spatialvla-jax evaluate --closed-loop` does this for many environments at once.
"""

import argparse

import numpy as np

from spatialvla_jax.serving.client import Agent, Client
from spatialvla_jax.sim.libero import camera, frame, set_up_worker, simulate, step

STEPS, SIZE = 220, 128


class Robot:
    """LIBERO's Franka; its actions are controller units in [-1, 1], and its gripper closes at +1."""

    def __init__(self, task: int) -> None:
        set_up_worker()
        self.env, record, states = simulate("libero_spatial", task, seed=0)
        self.env.set_init_state(states[0])
        self.instruction = record.language
        self.intrinsics, _ = camera(self.env, SIZE)

    def observe(self) -> dict:
        image, millimetres = frame(self.env, SIZE)
        return {"image": image, "depth": millimetres / np.float32(1000), "intrinsics": self.intrinsics}

    def act(self, action: np.ndarray) -> None:
        step(self.env, np.append(action[:6], -1.0 if action[6] > 0.5 else 1.0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", default="ws://127.0.0.1:8000")
    parser.add_argument("--task", type=int, default=2)
    args = parser.parse_args()
    agent = Agent(Client(args.server, wait=600).infer, execute="adaptive")
    robot = Robot(args.task)
    agent.reset(robot.instruction)
    for _ in range(STEPS):
        robot.act(agent.step(robot.observe()))
        if robot.env.check_success():
            break
    print(f"{robot.instruction}: {'done' if robot.env.check_success() else 'not done'}")
