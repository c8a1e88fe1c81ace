"""Camera in, actions out: a robot that a policy server drives (`pip install openpi-client`).

    spatialvla-jax serve --checkpoint runs/demo/run &
    python examples/robot_loop.py "pick up the black bowl" --steps 50

The WidowX here is simulated; your robot needs the same two methods.
"""

import argparse
import time
from typing import Any

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


class SimulatedWidowX:
    """A gripper above a table, seen from above by one RGB-D camera. Metres, radians, gripper 0 closed to 1 open."""

    low, high = np.array([0.10, -0.25, 0.02]), np.array([0.45, 0.25, 0.35])  # the workspace that it never leaves

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.position, self.rotation, self.gripper = np.array([0.28, 0.0, 0.18]), np.zeros(3), 1.0

    def observe(self) -> dict[str, Any]:
        shape = (self.height, self.width)
        image, depth = np.full((*shape, 3), 180, np.uint8), np.full(shape, 0.8, np.float32)
        row, column = (0.9 * np.array(shape) * ((self.position - self.low) / (self.high - self.low))[:2]).astype(int)
        hand = np.s_[row : row + self.height // 10 + 1, column : column + self.width // 10 + 1]
        image[hand], depth[hand] = (40, 40, int(200 * self.gripper)), 0.8 - self.position[2]
        intrinsics = np.array(
            [[self.width, 0, self.width / 2], [0, self.width, self.height / 2], [0, 0, 1]], np.float32
        )
        return {"image": image, "depth": depth, "intrinsics": intrinsics}

    def act(self, action: np.ndarray | None) -> None:
        """One step of dx, dy, dz, droll, dpitch, dyaw and the gripper; steps above 5 cm are clipped."""
        if action is None or np.shape(action) != (7,) or not np.isfinite(action).all():
            raise SystemExit(f"an action is seven finite numbers, got {action}")
        self.position = np.clip(self.position + np.clip(action[:3], -0.05, 0.05), self.low, self.high)
        self.rotation, self.gripper = self.rotation + action[3:6], float(action[6] > 0.5)


def control(robot: SimulatedWidowX, client: WebsocketClientPolicy, prompt: str, steps: int, hertz: float) -> None:
    """Executes each chunk to its end, then requests the next; a smaller `action_horizon` plans more often."""
    policy = ActionChunkBroker(client, action_horizon=client.get_server_metadata()["action_chunk"])
    client.infer({"reset": True})
    for _ in range(steps):
        due = time.monotonic() + 1 / hertz
        robot.act(policy.infer({**robot.observe(), "prompt": prompt}).get("actions"))
        time.sleep(max(0.0, due - time.monotonic()))


def connected(host: str, port: int, token: str | None, seconds: float = 60) -> WebsocketClientPolicy:
    """openpi's client, as soon as the server has opened its port; the client then waits until the policy is loaded."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return WebsocketClientPolicy(host, port, token)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise SystemExit(f"there is no policy server at {host}:{port}") from None
            time.sleep(0.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--hertz", type=float, default=5)
    args = parser.parse_args()
    client = connected(args.host, args.port, args.token)
    robot = SimulatedWidowX(*client.get_server_metadata()["image_sizes"][0])
    control(robot, client, args.prompt, args.steps, args.hertz)
    print(f"gripper at {robot.position.round(3)} m after {args.steps} steps")
