"""Rollouts: environments in separate processes share one policy, in batches, until each episode has a result.

An episode's result depends only on its fields and the policy, because policy batches always have one size. An
episode restarts if its environment crashes or hangs, or if the policy has no action; each fault is recorded.
"""

import contextlib
import multiprocessing
import time
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from spatialvla_jax.errors import FaultsError, InputError, NonFiniteError
from spatialvla_jax.inference.action_chunking import chunk_of, executor
from spatialvla_jax.serving.client import Client

ATTEMPTS = 3  # failed attempts after which an episode counts as failed
BATCH = 16  # observations of each call of a policy in this process, however many workers there are
PATIENCE = 10  # per worker: stop the run when faults exceed fault-free episodes by more than this


class Episode(NamedTuple):
    """One rollout. `number` counts episodes within the task."""

    suite: str
    task: int
    number: int
    seed: int


@runtime_checkable
class Environment(Protocol):
    """A simulator, running in its own process."""

    def reset(self, episode: Episode) -> tuple[str, dict[str, Any]]:
        """The instruction and the first observation: the input of `Policy.infer` without the prompt."""
        ...

    def step(self, action: Float[np.ndarray, " A"], look: bool) -> tuple[dict[str, Any], bool]:
        """The observation after the action, and whether the task is done, which ends the episode. The observation may
        be empty if `look` is False: rendering takes longer than physics. The last one may have "record", a dict that is
        added to the episode's record."""
        ...


# Maps observations and their worker numbers to results with "actions" f32[T, A], like `Policy.infer_batch`.
# Observations also have "prompt" and "reset", true in an episode's first step. An InputError replaces missing actions.
Infer = Callable[[list[dict[str, Any]], list[int]], list[dict[str, Any] | InputError]]


@dataclass(frozen=True)
class Settings:
    """The settings of a rollout. `max_steps` is per suite."""

    max_steps: dict[str, int]
    execute: str = "open_loop"  # see `action_chunking.executor`
    workers: int = 1
    timeout: float = 300.0  # seconds without an answer after which an environment counts as hung
    film: bool = False  # observe every step, not only those where a chunk is due
    action_dim: int = 7  # dimensions of the environment's actions


class Rollout(NamedTuple):
    """The result of an episode. `record` is plain data; `frames` are the observations' images."""

    episode: Episode
    record: dict[str, Any]
    frames: list[np.ndarray]


def rollouts(
    environment: Callable[[], Environment], infer: Infer, episodes: Sequence[Episode], settings: Settings
) -> Iterator[Rollout]:
    """Run the episodes and yield each one as it ends.

    `environment` is called in every worker process (spawned, so it must pickle). A worker executes the chunk's actions
    up to the next prediction on its own: a round trip per step would wait for the policy's calls for other workers.

    A record has "success", "steps", "instruction", "actions" (a checksum of all executed actions) and "faults", each
    with its "reason" and "step", the number of steps before the chunk. A fault is a crash or hang of the environment,
    an observation that the policy or its server refuses, or a reply without finite actions. After a fault no action is
    executed and the episode restarts. It fails after `ATTEMPTS` faults, or at once if the policy's outputs are not
    finite, since they would be again. Raises the environment's InputError, and FaultsError when too many episodes fail.
    If `episodes` is a deque, the caller may append to it after each rollout.
    """
    waiting, finished, faults = episodes if isinstance(episodes, deque) else deque(episodes), 0, 0
    workers = [_Worker(environment, settings, i) for i in range(min(settings.workers, len(episodes)))]
    try:
        for worker in workers:
            worker.begin(waiting.popleft())
        while running := [worker for worker in workers if worker.episode]:
            deadline = min(worker.deadline for worker in running)
            wait([worker.connection for worker in running], max(0.0, deadline - time.monotonic()))
            due = []
            for worker in running:
                ended = worker.listen()
                faults += worker.failed
                if faults > finished + PATIENCE * len(workers):  # one worker's bad task is not a general cause
                    raise FaultsError(f"episodes keep failing; the last reason: {worker.faults[-1]['reason']}")
                if ended is not None:
                    finished += not worker.failed
                    yield ended
                    if waiting:
                        worker.begin(_following(ended.episode, waiting))
                    else:
                        worker.stop()
                elif worker.observed:
                    due.append(worker)
            results = infer([w.observation for w in due], [w.number for w in due]) if due else []
            for worker, result in zip(due, results, strict=True):
                worker.act(result)
    finally:
        for worker in workers:
            worker.stop()


def _following(episode: Episode, waiting: deque[Episode]) -> Episode:
    """A worker's next episode: one of the same task if there is any, because much of that scene is still loaded."""
    following = next((one for one in waiting if one[:2] == episode[:2]), waiting[0])
    waiting.remove(following)
    return following


class _Worker:
    """One environment's process and its current episode."""

    def __init__(self, environment: Callable[[], Environment], settings: Settings, number: int) -> None:
        self.environment, self.settings, self.number = environment, settings, number
        self.executor = executor(settings.execute)
        self.episode: Episode | None = None
        self.process: Any = None

    def begin(self, episode: Episode) -> None:
        self.episode, self.faults, self.refused = episode, [], None
        self._start()

    def _start(self) -> None:
        assert self.episode is not None
        self.steps, self.checksum, self.frames, self.instruction = 0, 0, [], ""
        self.actions: list[np.ndarray] = []  # sent, without an answer yet
        self.executor.reset()
        if self.process is None:
            # Fresh processes: the simulator's renderer conflicts with the policy's libraries in one process.
            context = multiprocessing.get_context("spawn")
            self.connection, child = context.Pipe()
            self.process = context.Process(target=_serve, args=(child, self.environment), daemon=True)
            self.process.start()
            child.close()
        self._send(self.episode)

    def act(self, reply: dict[str, Any] | InputError) -> None:
        """Send the environment the actions until the next chunk is due. A reply without actions is a fault, which
        `listen` counts."""
        assert self.episode is not None
        try:
            if isinstance(reply, InputError):
                raise reply
            chunk = chunk_of(reply, self.settings.action_dim)
        except InputError as error:
            self.refused, self.deadline = error, 0.0
            return
        left = self.settings.max_steps[self.episode.suite] - self.steps
        self.actions = [self.executor.step(chunk)]
        while not self.executor.due and len(self.actions) < left:
            self.actions.append(self.executor.step())
        looks = [self.settings.film] * (len(self.actions) - 1) + [self.settings.film or self.executor.due]
        self._send(list(zip(self.actions, looks, strict=True)))

    def _send(self, message: Any) -> None:
        self.deadline = time.monotonic() + self.settings.timeout
        with contextlib.suppress(OSError):  # the process died: `listen` handles it
            self.connection.send(message)

    def listen(self) -> Rollout | None:
        """Read the environment's answer, if any, and return the rollout if it ended. Sets `observed` if there is a new
        observation, `failed` if there was a fault."""
        self.observed = self.failed = False
        if error := self.refused:
            self.refused = None
            return self._fail(str(error), last=isinstance(error, NonFiniteError))
        reason = ""
        if self.connection.poll():
            try:
                answer = self.connection.recv()
            except (EOFError, OSError):
                self.process.join(10)
                reason = f"the process died with exit code {self.process.exitcode}"
            else:
                if isinstance(answer, InputError):
                    raise answer
                if isinstance(answer, str):
                    reason = answer
                else:
                    return self._observe(*answer)
        elif time.monotonic() > self.deadline:
            reason = f"no answer in {self.settings.timeout:g} s"
        if not reason:
            return None
        self.stop(keep=True)
        return self._fail(reason)

    def _observe(self, instruction: str | None, observations: list[dict[str, Any]], done: bool) -> Rollout | None:
        assert self.episode is not None
        for action in self.actions[: len(observations)]:
            self.steps += 1
            self.checksum = zlib.crc32(np.asarray(action, "<f4").tobytes(), self.checksum)
        self.actions = []
        self.instruction = instruction or self.instruction
        self.frames += [observation["image"] for observation in observations if "image" in observation]
        self.observation = observations[-1] | {"prompt": self.instruction, "reset": self.steps == 0}
        if done or self.steps == self.settings.max_steps[self.episode.suite]:
            return self._end(done, self.observation.get("record", {}))
        self.observed = True
        return None

    def _fail(self, reason: str, last: bool = False) -> Rollout | None:
        self.failed = True
        self.faults.append({"step": self.steps, "reason": reason})
        if last or len(self.faults) == ATTEMPTS:
            return self._end(False)
        self._start()
        return None

    def _end(self, success: bool, more: dict[str, Any] | None = None) -> Rollout:
        assert self.episode is not None
        record = {
            "instruction": self.instruction,
            "success": success,
            "steps": self.steps,
            "actions": f"{self.checksum:08x}",
            "faults": self.faults,
        }
        return Rollout(self.episode, record | (more or {}), self.frames)

    def stop(self, keep: bool = False) -> None:
        """End the process. Also end the episode, unless `keep`: then it will be retried."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None
        if not keep:
            self.episode = None


def _serve(connection: Connection, make: Callable[[], Environment]) -> None:
    """The worker process. Receives episodes or [(action, look), …]; sends (instruction or None, observations, done)."""
    try:
        environment = make()
        while True:
            message = connection.recv()
            if isinstance(message, Episode):
                instruction, observation = environment.reset(message)
                connection.send((instruction, [observation], False))
                continue
            observations, done = [], False
            for action, look in message:
                observation, done = environment.step(action, look)
                observations.append(observation)
                if done:
                    break
            connection.send((None, observations, done))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        pass  # the parent is gone
    except InputError as error:
        connection.send(error)
    except Exception:
        connection.send(traceback.format_exc(limit=-3))


def padded(infer_batch: Callable[[list[dict]], list[dict]], size: int = BATCH, **extra: Any) -> Infer:
    """A policy in this process, always called with `size` observations. So there is one compiled program, and its
    answer depends neither on the rest of the batch nor on the number of workers. `extra` is added to each observation.
    Refused observations, and those with non-finite outputs, get the InputError; the others are asked again."""

    def infer(observations: list[dict], workers: list[int]) -> list[dict | InputError]:
        full = [{key: value for key, value in one.items() if key != "reset"} | extra for one in observations]
        return [result for start in range(0, len(full), size) for result in ask(full[start : start + size])]

    def ask(full: list[dict]) -> list[dict | InputError]:
        if not full:
            return []
        try:
            return [*infer_batch(full + full[-1:] * (size - len(full)))[: len(full)]]
        except NonFiniteError as error:
            answered = iter(ask([one for one, finite in zip(full, error.finite, strict=False) if finite]))
            return [next(answered) if finite else error for finite in error.finite[: len(full)]]
        except InputError as error:  # does not say which observation it refers to
            return [error] if len(full) == 1 else [ask([one])[0] for one in full]

    return infer


def served(
    address: str, token: str = "", *, keys: dict[str, str] | None = None, gripper_closes: bool = False, **extra: Any
) -> Infer:
    """A policy server that speaks openpi's protocol, asked in parallel over one connection per worker.

    `keys` maps the observations' keys to the server's, {"image": "observation/image", …}. Only these and the prompt are
    sent; by default everything except "state". `gripper_closes`: the server uses LIBERO's gripper, -1 open and 1
    closed. `extra` is added to each observation. If a server returns no actions (see `Client`), the result is the
    InputError. Raises InputError for a key that the environment does not provide.
    """
    clients: dict[int, Client] = {}
    threads = ThreadPoolExecutor(128, "client")

    def ask(observation: dict, worker: int) -> dict | InputError:
        full = observation | extra
        if missing := [key for key in keys or () if key not in full]:
            raise InputError(f"observations have no {missing[0]!r}, only {', '.join(full)}")
        sent = {k: full[k] for k in full if k != "state"} if keys is None else {n: full[k] for k, n in keys.items()}
        try:
            if worker not in clients:
                clients[worker] = Client(address, token)
            actions = chunk_of(clients[worker].infer({"prompt": full["prompt"]} | sent))
        except InputError as error:
            return error
        if gripper_closes:
            actions = np.concatenate([actions[:, :-1], (1 - actions[:, -1:]) / 2], axis=1)
        return {"actions": actions}

    return lambda observations, workers: list(threads.map(ask, observations, workers))
