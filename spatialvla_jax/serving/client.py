"""A policy as a robot or simulator sees it: `reset(instruction)` and `step(observation) → action`.

agent = Agent(Policy.load("runs/demo/run").infer)            # in this process
agent = Agent(Client("ws://127.0.0.1:8000").infer)           # or on a server, ours or any with openpi's protocol
agent.reset("pick up the black bowl")
while not done:
    observation = robot.observe()                            # {"image": u8[H, W, 3], …} as for `Policy.infer`
    robot.act(agent.step(observation))                       # f32[7]: dx dy dz droll dpitch dyaw gripper
"""

import math
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from jaxtyping import Float

from spatialvla_jax.errors import InputError
from spatialvla_jax.inference.action_chunking import chunk_of, executor

REPLY_BYTES = 16 << 20  # largest accepted reply; a chunk takes a few hundred bytes


class Agent:
    """One robot's side of a policy: holds the instruction and the chunks being executed.

    `infer` is `Policy.infer` or `Client.infer`. `execute` says how chunks become actions (`action_chunking.executor`).
    `unnorm_key` names the dataset whose action units the robot uses, if the policy knows several. `action_dim` is the
    number of dimensions of an action.
    """

    def __init__(
        self,
        infer: Callable[[dict], dict],
        execute: str = "adaptive",
        unnorm_key: str | None = None,
        action_dim: int = 7,
    ) -> None:
        self.infer, self.executor, self.unnorm_key = infer, executor(execute), unnorm_key
        self.action_dim, self.instruction, self.planned = action_dim, "", None

    def reset(self, instruction: Any) -> None:
        """Start an episode. Raises InputError if the instruction is not a str or is blank."""
        self.executor.reset()
        self.instruction, self.first = "", True
        if not isinstance(instruction, str) or not instruction.strip():
            raise InputError(f"an instruction must be a non-empty string, got {instruction!r}")
        self.instruction = instruction

    def step(self, observation: Any) -> Float[np.ndarray, " A"]:
        """The action of this control step in robot units; the gripper goes from 0 (closed) to 1 (open).

        The policy is called only when a chunk is due, so an open loop ignores most observations. Chunks are dropped
        when the instruction or `unnorm_key` that they were planned for changes. Raises InputError before the first
        `reset`, and for observations that the policy or replies that `chunk_of` refuses.
        """
        if not self.instruction:
            raise InputError("an agent needs an instruction before its first step: call reset(instruction)")
        if not isinstance(observation, dict):
            raise InputError(f"an observation must be a dict, got {type(observation).__name__}")
        request = {**observation, "prompt": self.instruction, "reset": self.first}
        if self.unnorm_key is not None:
            request["unnorm_key"] = self.unnorm_key
        planned = request["prompt"], request.get("unnorm_key")
        if planned != self.planned:
            self.executor.reset()
            self.planned = planned
        chunk = None
        if self.executor.due:
            chunk = chunk_of(self.infer(request), self.action_dim)
            self.first = False
        return self.executor.step(chunk)


class Client:
    """A policy on a server with openpi's protocol at `address` (ws://host:port). `metadata` is the server's.

    Raises InputError with the address if there is no server, if it does not reply within `timeout` seconds, if it
    closes the connection, or if it refuses an observation. A reply that is not a map in openpi's encoding, or whose
    "actions" `chunk_of` refuses, raises it too. `infer` may be called again after any of these. During the first `wait`
    seconds the server may still be starting: its port may be closed, and replies may take that long.
    """

    def __init__(self, address: str, token: str = "", timeout: float = 60.0, wait: float = 0.0) -> None:
        self.address, self.timeout, self.started = address, timeout, time.monotonic() + wait
        self.headers = {"Authorization": f"Api-Key {token}"} if token else {}
        self.connection: Any = None
        self.metadata = self._connect()

    def infer(self, observation: Any) -> dict[str, Any]:
        from spatialvla_jax.serving.protocol import pack

        if not isinstance(observation, dict):
            raise InputError(f"an observation must be a dict, got {type(observation).__name__}")
        message = pack(observation)
        if self.connection is None:
            self.metadata = self._connect()
        reply = self._receive(message)
        if observation.keys() != {"reset"}:
            try:
                chunk_of(reply)
            except InputError as error:
                raise InputError(f"{self.address}: {error}") from None
        return reply

    def close(self) -> None:
        """Close the connection; `infer` opens a new one."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _connect(self) -> dict[str, Any]:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        options = {"additional_headers": self.headers, "max_size": REPLY_BYTES, "compression": None, "close_timeout": 1}
        while self.connection is None:
            try:
                self.connection = connect(self.address, **options)
            except (OSError, ValueError, WebSocketException) as error:
                if not isinstance(error, ConnectionRefusedError) or time.monotonic() >= self.started:
                    raise InputError(f"there is no policy server at {self.address}: {error}") from error
                time.sleep(0.2)
        # websockets sends without a time limit, and a server that no longer reads would stop the robot forever.
        patience = struct.pack("ll", math.ceil(max(1.0, self.timeout)), 0)
        with suppress(OSError):  # the server has closed already, and reading the first reply reports it
            self.connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        try:
            return self._receive()
        except InputError:
            self.close()
            raise

    def _receive(self, message: bytes | None = None) -> dict[str, Any]:
        """Send `message`, if any, and return the next reply."""
        from websockets.exceptions import ConnectionClosed

        from spatialvla_jax.serving.protocol import unpack_reply

        try:
            if message is not None:
                self.connection.send(message)
            reply = self.connection.recv(max(self.timeout, self.started - time.monotonic()))
        except BaseException as error:
            self.close()  # otherwise a late reply would be taken for the next one
            if isinstance(error, TimeoutError) or isinstance(error.__cause__, BlockingIOError):
                raise InputError(f"{self.address}: no reply in {self.timeout:g} s") from None
            if isinstance(error, ConnectionClosed):
                raise InputError(f"{self.address} closed the connection: {error}") from None
            raise
        if isinstance(reply, str):
            raise InputError(f"{self.address}: {' '.join(reply.split())[:500] or 'an empty message'}")
        try:
            return unpack_reply(reply)
        except InputError as error:
            raise InputError(f"{self.address}: {error}") from None
