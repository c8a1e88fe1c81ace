"""The two methods that a robot or a simulator needs of a policy: `reset(instruction)` and `step(observation) → action`.

agent = Agent(Policy.load("runs/demo/run").infer)            # in this process
agent = Agent(Client("ws://127.0.0.1:8000").infer)           # or at a server, ours or any of openpi's protocol
agent.reset("pick up the black bowl")
while not done:
    observation = robot.observe()                            # {"image": u8[H, W, 3], …} as for `Policy.infer`
    robot.act(agent.step(observation))                       # f32[7]: dx dy dz droll dpitch dyaw gripper
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from spatialvla_jax.errors import InputError
from spatialvla_jax.inference.action_chunking import executor


class Agent:
    """One robot's side of a policy: keeps the instruction and the chunks that are being executed.

    `infer` is `Policy.infer` or `Client.infer`; `execute` says how chunks become actions (`action_chunking.executor`);
    `unnorm_key` names the dataset whose action units the robot has, where the policy knows several.
    """

    def __init__(self, infer: Callable[[dict], dict], execute: str = "adaptive", unnorm_key: str | None = None) -> None:
        self.infer, self.executor, self.unnorm_key = infer, executor(execute), unnorm_key

    def reset(self, instruction: str) -> None:
        """Begins an episode."""
        self.executor.reset()
        self.instruction, self.first = instruction, True

    def step(self, observation: dict[str, Any]) -> Float[np.ndarray, " 7"]:
        """The action of this control step, in robot units, gripper 0 closed .. 1 open. The policy is only called where
        a chunk is due, so an open loop ignores most observations."""
        chunk = None
        if self.executor.due:
            full = {**observation, "prompt": self.instruction, "reset": self.first}
            chunk = self.infer(full if self.unnorm_key is None else full | {"unnorm_key": self.unnorm_key})["actions"]
            self.first = False
        return self.executor.step(chunk)


class Client:
    """A policy at `address` (ws://host:port), behind a server of openpi's protocol. Raises InputError where there is
    none, and with the server's message for an observation that it refuses."""

    def __init__(self, address: str, token: str = "", timeout: float = 60.0) -> None:
        from websockets.exceptions import InvalidHandshake, InvalidURI
        from websockets.sync.client import connect

        self.address, self.timeout = address, timeout
        headers = {"Authorization": f"Api-Key {token}"} if token else {}
        try:
            self.connection = connect(address, additional_headers=headers, max_size=None, compression=None)
            self.metadata = self._receive()  # what the server says about its policy
        except (OSError, InvalidHandshake, InvalidURI) as error:
            raise InputError(f"there is no policy server at {address}: {error}") from error

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        from spatialvla_jax.serving.protocol import pack

        self.connection.send(pack(observation))
        return self._receive()

    def close(self) -> None:
        self.connection.close()

    def _receive(self) -> dict[str, Any]:
        reply = self.connection.recv(self.timeout)
        if isinstance(reply, str):
            raise InputError(f"{self.address}: {reply}")
        import msgpack  # of the extra [serve], as websockets is

        return msgpack.unpackb(reply, object_hook=_array, strict_map_key=False)


def _array(value: dict[Any, Any]) -> Any:
    """An array of a server's reply, out of openpi's map."""
    if b"__ndarray__" not in value:
        return value.get(b"data") if b"__npgeneric__" in value else value
    return np.frombuffer(value[b"data"], np.dtype(value[b"dtype"])).reshape(value[b"shape"])
