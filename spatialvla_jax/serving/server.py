"""Serves a policy by websocket in openpi's protocol, so the published `openpi-client` works unchanged.

The server first sends its metadata. Then each binary message is one observation and each binary reply its actions, both
msgpack with openpi's encoding of arrays. A text reply describes an error in one sentence; the connection stays open. A
message above the size limit, or no answer to a ping for 20 s, ends the connection. The same port serves GET /healthz,
/metadata (JSON), /metrics (Prometheus) and a web page, / (`page`).

The port opens before the policy is loaded. Until an observation can be answered, /healthz returns 503 "compiling" and
connected clients wait.

Asyncio handles the connections. One thread calls the policy on the observations that arrived since its last call, and
another loads and compiles it (`programs`).
"""

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import numpy as np
import prometheus_client as prometheus
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from spatialvla_jax.errors import InputError, NonFiniteError
from spatialvla_jax.inference.action_chunking import ChunkExecutor, executor, shift
from spatialvla_jax.serving.access import is_loopback
from spatialvla_jax.serving.page import Page
from spatialvla_jax.serving.protocol import KEYS, LIMITS, Limits, check, pack, room_for_images, unpack

if TYPE_CHECKING:  # JAX takes seconds to import; the port opens first
    from spatialvla_jax.inference.policy import Policy
    from spatialvla_jax.serving.programs import Programs

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]  # of `Policy.prepare`


class Busy(Exception):
    """The queue is full."""


class Batcher:
    """Calls `act` in one thread on the prepared observations that arrived since its last call.

    A batch smaller than the number of clients waits for the others for up to `limits.wait` seconds.
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
                if future.done():  # its client disconnected
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def call(self, prepared: list[Arrays]) -> list[dict | Exception]:
        """The result or exception for each observation. If a batch fails, its observations are retried one by one, so
        that only the faulty ones fail."""
        try:
            return list(self.act(prepared))
        except Exception as error:
            if len(prepared) == 1:
                return [error]
            return [result for one in prepared for result in self.call([one])]


class Metrics:
    """The Prometheus metrics of GET /metrics."""

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
    """`start` opens the port, then loads and compiles; `drain` answers the requests in flight and stops.

    With `execute` "chunk", replies are whole chunks f32[T, A]. With a mode of `executor`, each reply is one action
    f32[1, A], and the policy is called only when a chunk is due. `report` is called with a sentence for each compiled
    program, and one when clients can be answered. The metadata has what `identify` returns, by which a client knows the
    policy again. Raises InputError if other machines can reach `host` and there is no token.
    """

    def __init__(
        self,
        load: Callable[[], "Policy"],
        host: str,
        port: int,
        *,
        token: str = "",
        execute: str = "chunk",
        limits: Limits = LIMITS,
        report: Callable[[str], Any] = log.info,
        identify: Callable[[], str] = str,
    ) -> None:
        if not token and not is_loopback(host):
            raise InputError(f"host {host} can be reached from other machines: serving on it needs a token")
        self.load, self.host, self.port, self.token, self.limits = load, host, port, token, room_for_images(limits)
        self.execute, self.report, self.identify, self.clients = execute, report, identify, set[Client]()
        self.busy, self.explaining, self.draining = 0, 0, False
        Client(execute)  # raises now for an unknown mode, not for the first client
        self.batcher = Batcher(self._call_policy, limits, self._expected)
        self.metrics = Metrics(lambda: len(self.clients), self.batcher.waiting.qsize)
        self.compiler, self._compiling = ThreadPoolExecutor(1, "compiler"), set[Future]()
        self.page = Page(token)
        self.policy: Policy
        self.programs: Programs
        self._loaded = asyncio.Event()  # `policy` and `programs` exist

    async def start(self) -> None:
        """Open the port; the task `prepared` does the rest. Raises InputError if the port cannot be opened."""
        try:
            self._listener = await serve(
                self._talk,
                self.host,
                self.port,
                process_request=self._get,
                max_size=self.limits.message_bytes,
                max_queue=1,
                close_timeout=5,
                compression=None,
            )
        except (OSError, OverflowError, UnicodeError) as error:
            raise InputError(f"the port {self.port} of host {self.host} cannot be opened: {_reason(error)}") from error
        self.port = next(iter(self._listener.sockets)).getsockname()[1]
        self._worker = asyncio.create_task(self.batcher.run())
        self.prepared = asyncio.create_task(self._prepare())

    async def _prepare(self) -> None:
        """Load the policy, then compile while already serving. Raises what loading or compiling raises."""
        from spatialvla_jax.serving.programs import Programs

        self.policy = policy = await self._in_compiler(self.load)
        config = policy.model.config
        self.limits = limits = replace(
            self.limits, image_sizes=self.limits.image_sizes or ((config.img.image_size,) * 2,)
        )
        self.metadata = {
            "fingerprint": await self._in_compiler(self.identify),
            "observation": list(KEYS),
            "image_sizes": limits.image_sizes,
            "model_image_size": config.img.image_size,
            "needs_depth": config.depth_source == "dataset",
            "unnorm_keys": list(policy.processor.statistics),
            "tokens": policy.processor.grid.kinds,
            "dimensions": policy.processor.grid.dimensions,
            "action_chunk": config.action_chunk,
            "execute": self.execute,
            "limits": asdict(limits),
        }
        self.programs = Programs(policy, limits)
        self._loaded.set()
        compiling = self.programs.compile(self._in_compiler)
        self.report(await anext(compiling))
        self.report(f"serving on ws://{self.host}:{self.port}")
        async for compiled in compiling:
            self.report(compiled)

    async def _in_compiler(self, call: Callable[..., Any], *arguments: Any) -> Any:
        future = self.compiler.submit(call, *arguments)
        self._compiling.add(future)
        future.add_done_callback(self._compiling.discard)
        return await asyncio.wrap_future(future)

    @property
    def compiling(self) -> bool:
        """Whether a thread is loading, compiling or explaining, which cannot be interrupted."""
        return any(future.running() for future in list(self._compiling))

    async def drain(self, seconds: float = 20) -> None:
        """Refuse new connections, answer pending requests for at most `seconds`, and close all connections."""
        self.draining = True
        self._listener.close(close_connections=False)
        deadline = time.monotonic() + seconds
        await asyncio.sleep(0.05)
        while self.busy and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(connection.close(1001) for connection in self._listener.connections))
        with suppress(TimeoutError):  # the policy did not return in time
            async with asyncio.timeout(5):
                await self._listener.wait_closed()
        self._worker.cancel()
        self.prepared.cancel()
        self.batcher.thread.shutdown(wait=False)
        self.compiler.shutdown(wait=False)

    def _expected(self) -> int:
        """How many observations a batch waits for: one from each client, except those waiting for explanations."""
        return min(len(self.clients) - self.explaining, self.programs.largest)

    def _call_policy(self, prepared: list[Arrays]) -> list[dict]:
        start = time.perf_counter()
        results = self.policy.act(prepared)
        timing = {"infer_ms": 1000 * (time.perf_counter() - start), "batch": len(prepared)}
        self.metrics.batch.observe(len(prepared))
        return [{**result, "server_timing": timing} for result in results]

    def _get(self, connection: ServerConnection, request: Request) -> Response | None:
        """The response to a plain GET, or None to open a websocket."""
        if request.path == "/healthz":
            if self._loaded.is_set() and self.programs.compiled:
                return connection.respond(HTTPStatus.OK, "OK\n")
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "compiling\n")
        admitted = self.page.admits(request)
        if not admitted and (refused := self.page.refuse(connection, request)):
            return refused
        if request.path == "/metrics":
            response = connection.respond(HTTPStatus.OK, prometheus.generate_latest(self.metrics.registry).decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = prometheus.CONTENT_TYPE_LATEST
            return response
        if request.path == "/metadata":
            if not self._loaded.is_set():
                return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "loading\n")
            return connection.respond(HTTPStatus.OK, json.dumps(self.metadata) + "\n")
        if request.path != "/" and not admitted:
            return connection.respond(HTTPStatus.NOT_FOUND, "choose /, /healthz, /metadata or /metrics\n")
        if "Upgrade" not in request.headers:
            return self.page.respond(connection)
        if len(self.clients) >= self.limits.clients:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{len(self.clients)} clients are connected\n")
        return None

    async def _talk(self, connection: ServerConnection) -> None:
        """Serve one client until it disconnects. It has at most one observation in the queue."""
        client = Client(self.execute)
        self.clients.add(client)
        try:
            waits = [asyncio.create_task(wait) for wait in (self._loaded.wait(), connection.wait_closed())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
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
        if observation.pop("explain", False):
            return await self._explain(observation)
        # A chunk and the draft of the next one are valid only for the prompt and unnorm_key they were planned for.
        # Compare these as sent: a new spelling only causes an unnecessary new chunk.
        planned = observation.get("prompt"), observation.get("unnorm_key")
        if planned != client.planned:
            client.reset()
            client.planned = planned
        if client.draft is not None:
            observation["draft"] = client.draft
        prepared = self._prepare_observation(observation)
        if client.executor and not client.executor.due:
            return {"actions": client.executor.step()[None]}
        result = await self._infer(prepared)
        # Clients that get whole chunks are assumed to execute all of them, as openpi's does.
        ids = result["action_ids"]
        client.draft = shift(ids, client.executor.every if client.executor else len(ids))
        if client.executor:
            result["actions"] = client.executor.step(result["actions"])[None]
        return result

    def _prepare_observation(self, observation: dict[str, Any]) -> Arrays:
        prepared = self.policy.prepare(observation)
        size = prepared["image"].shape[:2]
        if size not in self.limits.image_sizes:
            known = " or ".join(f"{height}x{width}" for height, width in self.limits.image_sizes)
            raise InputError(f"observation 'image' is {size[0]}x{size[1]}: this server is compiled for {known}")
        return prepared

    async def _infer(self, prepared: Arrays) -> dict[str, Any]:
        await self.programs.wait_for(prepared)
        result = await self.batcher.infer(prepared)
        if not np.isfinite(result["actions"]).all():
            raise NonFiniteError([False])
        return result

    async def _explain(self, observation: dict[str, Any]) -> dict[str, Any]:
        """A whole chunk with the result of `explain` and the latency of each part.

        The chunk comes from a common batch. The explanation is computed in the compiler's thread, so that robots are
        answered while its program is compiled.
        """
        from spatialvla_jax.inference.explain import explain

        self.explaining += 1
        try:
            times = [time.perf_counter()]
            prepared = self._prepare_observation(observation)
            times.append(time.perf_counter())
            result = await self._infer(prepared)
            times.append(time.perf_counter())
            result |= await self._in_compiler(explain, self.policy, prepared, result["action_ids"])
            times.append(time.perf_counter())
        finally:
            self.explaining -= 1
        prepare, answer, explained = (1000 * float(seconds) for seconds in np.diff(times))
        timing = result["server_timing"]
        parts = {"prepare_ms": prepare, "wait_ms": answer - timing["infer_ms"], "explain_ms": explained}
        return result | {"server_timing": timing | parts}


def _reason(error: Exception) -> str:
    """Briefly, why a port cannot be opened."""
    if isinstance(error, OSError) and not isinstance(error, socket.gaierror) and error.errno:
        return os.strerror(error.errno)  # asyncio's own message repeats the address
    return str(getattr(error, "strerror", error))


async def run(server: Server, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT, then drain; `ready` is called when the port is open. Raises what loading and
    compiling raise."""
    await server.start()
    stop = asyncio.Event()

    def prepared(task: asyncio.Task) -> None:
        if not task.cancelled() and task.exception():
            stop.set()
        gc.collect()
        gc.freeze()  # so that the collector does not scan compilation's objects during requests

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server.prepared.add_done_callback(prepared)
    ready()
    await stop.wait()
    await server.drain()
    with suppress(asyncio.CancelledError):
        await server.prepared
