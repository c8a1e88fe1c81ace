"""The policy behind a websocket, in openpi's protocol: its published `openpi-client` drives it unchanged.

The server first sends its metadata. Then each binary message is one observation and each binary reply its actions, both
msgpack with openpi's encoding of arrays. A text reply is one sentence about an error; the connection stays open. A
message beyond the size limit, or no answer to a ping for 20 s, ends the connection. GET /healthz, /metadata (JSON) and
/metrics (Prometheus) are on the same port.

Asyncio reads and writes; one thread calls the policy on the observations that arrived since its last call.
"""

import asyncio
import gc
import hmac
import ipaddress
import json
import logging
import signal
import time
from bisect import bisect_left
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from http import HTTPStatus
from typing import Any

import numpy as np
import prometheus_client as prometheus
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from spatialvla_jax.errors import InputError, NonFiniteError
from spatialvla_jax.inference.action_chunking import ChunkExecutor, executor, shift
from spatialvla_jax.inference.policy import BATCH_SIZES, PROMPT_STEP, Policy
from spatialvla_jax.serving.protocol import KEYS, LIMITS, Limits, check, pack, unpack

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]  # of `Policy.prepare`


class Busy(Exception):
    """The queue is full."""


class Batcher:
    """Calls `act` in one thread, on the prepared observations that arrived since its last call.

    A batch that is smaller than the number of clients waits for the rest, but no longer than `limits.wait`.
    """

    def __init__(self, act: Callable[[list[Arrays]], list[dict]], limits: Limits, clients: Callable[[], int]):
        self.act, self.limits, self.clients = act, limits, clients
        self.waiting: asyncio.Queue[tuple[Arrays, asyncio.Future]] = asyncio.Queue(limits.queue)
        self.thread = ThreadPoolExecutor(1, "policy")

    async def infer(self, prepared: Arrays) -> dict[str, Any]:
        future = asyncio.get_running_loop().create_future()
        try:
            self.waiting.put_nowait((prepared, future))
        except asyncio.QueueFull:
            raise Busy from None
        return await future

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.waiting.get()]
            deadline = loop.time() + self.limits.wait
            while len(batch) < min(self.limits.batch, self.clients()):
                try:
                    async with asyncio.timeout_at(deadline):
                        batch.append(await self.waiting.get())
                except TimeoutError:
                    break
            results = await loop.run_in_executor(self.thread, self.call, [prepared for prepared, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():  # its client was cut off
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def call(self, prepared: list[Arrays]) -> list[dict | Exception]:
        """An observation that makes the policy fail costs only itself: the others are repeated one by one."""
        try:
            return list(self.act(prepared))
        except Exception as error:
            if len(prepared) == 1:
                return [error]
            return [result for one in prepared for result in self.call([one])]


class Metrics:
    """The metrics of GET /metrics."""

    def __init__(self, clients: Callable[[], int], waiting: Callable[[], int]) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        about = "by outcome: ok, invalid, busy, failed"
        self.requests = prometheus.Counter("spatialvla_requests", about, ["outcome"], registry=registry)
        about, buckets = "from a message to its reply", [2**i / 1000 for i in range(15)]
        self.seconds = prometheus.Histogram("spatialvla_request_seconds", about, buckets=buckets, registry=registry)
        about, buckets = "observations of one call of the policy", [2**i for i in range(8)]
        self.batch = prometheus.Histogram("spatialvla_batch_size", about, buckets=buckets, registry=registry)
        prometheus.Gauge("spatialvla_clients", "that are connected", registry=registry).set_function(clients)
        prometheus.Gauge("spatialvla_queue", "observations that wait", registry=registry).set_function(waiting)


class Client:
    """The state of one connection."""

    def __init__(self, execute: str) -> None:
        self.executor: ChunkExecutor | None = None if execute == "chunk" else executor(execute)
        self.planned: tuple[Any, Any] = None, None  # prompt and unnorm_key of its chunks
        self.reset()

    def reset(self) -> None:
        self.draft: np.ndarray | None = None  # a guess of the next chunk's ids
        if self.executor:
            self.executor.reset()


class Server:
    """`start` warms up the policy and listens; `drain` answers the requests in flight and stops.

    With `execute` "chunk" it replies with whole chunks f32[T, 7]; with a mode of `executor` it replies with one action
    f32[1, 7] a request and calls the policy only where a chunk is due. Raises InputError where `host` is reachable from
    other machines and there is no token.
    """

    def __init__(
        self, policy: Policy, host: str, port: int, *, token: str = "", execute: str = "chunk", limits: Limits = LIMITS
    ) -> None:
        if not token and not is_loopback(host):
            raise InputError(f"host {host} can be reached from other machines: serving on it needs a token")
        config = policy.model.config
        if not limits.image_sizes:
            limits = replace(limits, image_sizes=((config.img.image_size,) * 2,))
        self.policy, self.host, self.port, self.token, self.limits = policy, host, port, token, limits
        self.execute, self.clients, self.busy, self.draining = execute, set[Client](), 0, False
        Client(execute)  # raises now what it would raise for the first client
        self.batcher = Batcher(self._call_policy, limits, lambda: len(self.clients))
        self.metrics = Metrics(lambda: len(self.clients), self.batcher.waiting.qsize)
        self.metadata = {
            "observation": list(KEYS),
            "image_sizes": limits.image_sizes,
            "needs_depth": config.depth_source == "dataset",
            "unnorm_keys": list(policy.processor.statistics),
            "action_chunk": config.action_chunk,
            "execute": execute,
            "limits": asdict(limits),
        }

    async def start(self) -> None:
        """Compiles, then opens the port: a server that can be reached is ready."""
        await asyncio.get_running_loop().run_in_executor(self.batcher.thread, self._warm_up)
        self._worker = asyncio.create_task(self.batcher.run())
        self._listener = await serve(
            self._talk,
            self.host,
            self.port,
            process_request=self._get,
            max_size=self.limits.message_bytes,
            max_queue=1,
            close_timeout=5,
            compression=None,
            origins=[None],  # no web page may talk to it
        )
        self.port = next(iter(self._listener.sockets)).getsockname()[1]

    async def drain(self, seconds: float = 20) -> None:
        """Refuses new connections, answers pending requests for at most `seconds`, and closes all connections."""
        self.draining = True
        self._listener.close(close_connections=False)
        deadline = time.monotonic() + seconds
        await asyncio.sleep(0.05)
        while self.busy and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(connection.close(1001) for connection in self._listener.connections))
        with suppress(TimeoutError):  # where the policy never came back
            async with asyncio.timeout(5):
                await self._listener.wait_closed()
        self._worker.cancel()
        self.batcher.thread.shutdown(wait=False)

    def _warm_up(self) -> None:
        """Compiles for every image size, prompt length and batch size that a request can have."""
        cfg, processor = self.policy.model.config, self.policy.processor
        prompts = {}  # one for each multiple of PROMPT_STEP
        for words in range(cfg.prompt_length):
            with suppress(InputError):  # beyond the longest
                _, mask = processor.tokenizer.encode_prompt(
                    "a " * words, template=processor.prompt_template, length=cfg.prompt_length
                )
                prompts.setdefault(-(-mask.sum() // PROMPT_STEP), "a " * words)
        for size in self.limits.image_sizes:
            image, depth = np.zeros((*size, 3), np.uint8), np.ones(size, np.float32)
            for prompt in prompts.values():
                one = {"image": image, "depth": depth, "prompt": prompt, "unnorm_key": next(iter(processor.statistics))}
                for count in BATCH_SIZES[: bisect_left(BATCH_SIZES, self.limits.batch) + 1]:
                    self.policy.act([self.policy.prepare(one)] * count)

    def _call_policy(self, prepared: list[Arrays]) -> list[dict]:
        start = time.perf_counter()
        results = self.policy.act(prepared)
        timing = {"infer_ms": 1000 * (time.perf_counter() - start), "batch": len(prepared)}
        self.metrics.batch.observe(len(prepared))
        return [{**result, "server_timing": timing} for result in results]

    def _get(self, connection: ServerConnection, request: Request) -> Response | None:
        """Plain GETs are answered here; None goes on to the websocket."""
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        given = ", ".join(request.headers.get_all("Authorization"))
        if self.token and not hmac.compare_digest(given.encode(), f"Api-Key {self.token}".encode()):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "the header 'Authorization: Api-Key TOKEN' is needed\n")
        if request.path == "/metrics":
            response = connection.respond(HTTPStatus.OK, prometheus.generate_latest(self.metrics.registry).decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = prometheus.CONTENT_TYPE_LATEST
            return response
        if request.path == "/metadata":
            return connection.respond(HTTPStatus.OK, json.dumps(self.metadata) + "\n")
        if request.path != "/":
            return connection.respond(HTTPStatus.NOT_FOUND, "choose /, /healthz, /metadata or /metrics\n")
        if len(self.clients) >= self.limits.clients:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{len(self.clients)} clients are connected\n")
        return None

    async def _talk(self, connection: ServerConnection) -> None:
        """Serves one client until it disconnects. It has at most one observation in the queue."""
        client = Client(self.execute)
        self.clients.add(client)
        try:
            await connection.send(pack(self.metadata))
            async for message in connection:
                self.busy += 1
                try:
                    await connection.send(await self._reply(client, message))
                finally:
                    self.busy -= 1
                if self.draining:
                    break
        except ConnectionClosed:
            pass
        finally:
            self.clients.discard(client)

    async def _reply(self, client: Client, message: bytes | str) -> bytes | str:
        outcome, start = "failed", time.perf_counter()
        try:
            reply = pack(await self._act(client, unpack(message)))
            outcome = "ok"
        except NonFiniteError as error:
            reply = str(error)
        except InputError as error:
            outcome, reply = "invalid", str(error)
        except Busy:
            outcome, reply = "busy", f"busy: {self.limits.queue} observations wait already; try again"
        except Exception as error:
            log.exception("the policy failed")
            reply = f"the policy failed on this observation: {type(error).__name__}"
        self.metrics.requests.labels(outcome).inc()
        self.metrics.seconds.observe(time.perf_counter() - start)
        return reply

    async def _act(self, client: Client, observation: dict[str, Any]) -> dict[str, Any]:
        check(observation, self.limits)
        if observation.pop("reset", False):
            client.reset()
            if not observation:
                return {"reset": True}
        # A chunk, and a guess of the next one, belong to what they were planned for. What counts is the text as it was
        # sent: who sends another one means another one, and planning anew is never wrong.
        planned = observation.get("prompt"), observation.get("unnorm_key")
        if planned != client.planned:
            client.reset()
            client.planned = planned
        if client.draft is not None:
            observation["draft"] = client.draft
        prepared = self.policy.prepare(observation)
        size = prepared["image"].shape[:2]
        if size not in self.limits.image_sizes:
            known = " or ".join(f"{height}x{width}" for height, width in self.limits.image_sizes)
            raise InputError(f"observation 'image' is {size[0]}x{size[1]}: this server is compiled for {known}")
        if client.executor and not client.executor.due:
            return {"actions": client.executor.step()[None]}
        result = await self.batcher.infer(prepared)
        if not np.isfinite(result["actions"]).all():
            raise NonFiniteError([False])
        # A client that gets whole chunks is assumed to execute them to their end, as openpi's does.
        ids = result["action_ids"]
        client.draft = shift(ids, client.executor.every if client.executor else len(ids))
        if client.executor:
            result["actions"] = client.executor.step(result["actions"])[None]
        return result


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def run(server: Server, ready: Callable[[], None] = lambda: None) -> None:
    """Serves until SIGTERM or SIGINT, then drains. `ready` is called when clients can connect."""
    await server.start()
    gc.collect()
    gc.freeze()  # spares the collector the objects that compiling left, in the middle of requests
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    ready()
    await stop.wait()
    await server.drain()
