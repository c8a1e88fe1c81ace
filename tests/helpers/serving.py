"""A server in this process, its clients, and a stub policy."""

import asyncio
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from helpers.batches import GRID
from helpers.batches import observation as random_observation
from spatialvla_jax import Policy
from spatialvla_jax.errors import InputError
from spatialvla_jax.serving.protocol import Limits
from spatialvla_jax.serving.server import Server

LIMITS = Limits(message_bytes=200_000, image_sizes=((48, 64),), clients=32, batch=2)


@contextmanager
def serving(policy: Any, limits: Limits = LIMITS, compiled: bool = True, **options: Any) -> Iterator[Server]:
    """Run a server in a thread of this process; by default wait until everything is `compiled`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = Server(policy if callable(policy) else lambda: policy, "127.0.0.1", 0, limits=limits, **options)
    asyncio.run_coroutine_threadsafe(server.start(), loop).result()
    if compiled:
        eventually(server.prepared.done)
        server.prepared.result()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.drain(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def client_of(server: Server, token: str | None = None) -> WebsocketClientPolicy:
    return WebsocketClientPolicy("127.0.0.1", server.port, token)


def get(server: Server, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def eventually(condition: Any, seconds: float = 600) -> None:
    """Wait for it. The limit only catches what never comes, however slow the machine is."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def observations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [random_observation(seed + i) for i in range(count)]


def asks(prompt: str) -> dict[str, Any]:
    """An observation for the stub."""
    return {"image": np.zeros((48, 64, 3), np.uint8), "prompt": prompt}


class Stub(Policy):
    """A policy whose actions are the number in the prompt, and whose ids are `ids` if given. The prompt "slow" waits
    for `go`, "bad" makes its batch fail, "nan" gives NaN. Compiling calls `compiling(prompt, batch size)`."""

    def __init__(
        self, ids: np.ndarray | None = None, compiling: Callable[[str, int], Any] = lambda *_: None, steps: int = 1
    ) -> None:
        self.ids, self.compiling = ids, compiling
        config = SimpleNamespace(
            img=SimpleNamespace(image_size=8), depth_source="none", action_chunk=4, prompt_length=16 * steps
        )

        def encode_prompt(prompt: str, *, length: int, **_: Any) -> tuple[np.ndarray, np.ndarray]:
            """One token per word, plus one."""
            return np.zeros(length, np.int32), np.arange(length) <= len(prompt.split())

        tokenizer = SimpleNamespace(encode_prompt=encode_prompt)
        self.model = SimpleNamespace(config=config)
        self.processor = SimpleNamespace(statistics={"toy": {}}, tokenizer=tokenizer, prompt_template="", grid=GRID)
        self.go, self.batches = threading.Event(), []

    def prepare(self, observation: dict) -> dict:
        if "prompt" not in observation:
            raise InputError("observation 'prompt' must be a string, got NoneType")
        _, mask = self.processor.tokenizer.encode_prompt(observation["prompt"], length=self.model.config.prompt_length)
        return observation | {"prompt_mask": mask}

    def act(self, observations: list[dict]) -> list[dict]:
        prompts = [o["prompt"] for o in observations]
        if threading.current_thread().name.startswith("compiler"):
            self.compiling(prompts[0], len(prompts))
        self.batches.append(observations)
        if "slow" in prompts:
            assert self.go.wait(120)
        if "bad" in prompts:
            raise ZeroDivisionError
        numbers = [float(prompt) if prompt.isdecimal() else np.nan if prompt == "nan" else 0.0 for prompt in prompts]
        ids = [np.full((4, 3), np.nan_to_num(n), np.int32) if self.ids is None else self.ids for n in numbers]
        return [{"actions": np.full((4, 7), n, np.float32), "action_ids": i} for n, i in zip(numbers, ids, strict=True)]
