"""Rollouts: environments in processes of their own, served in batches by one policy, until each episode has a result.

An episode's result depends on its fields and the policy alone, because the policy's batches are always padded to one
size. An environment that crashes or hangs is recorded and restarted, and so is an episode for which the policy has no
action. Results are appended to a file, one line an episode, so that the same call continues after an interruption.
"""

import contextlib
import json
import multiprocessing
import os
import time
import traceback
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from spatialvla_jax.errors import FaultsError, InputError, NonFiniteError
from spatialvla_jax.evaluation.video import write_video
from spatialvla_jax.inference.action_chunking import chunk_of, executor
from spatialvla_jax.serving.client import Client
from spatialvla_jax.utils.atomic import write_json
from spatialvla_jax.utils.tables import text_table

ATTEMPTS = 3  # of an episode whose environment or server fails; then it has failed
PATIENCE = 10  # the run ends once there are so many more faults than episodes without: something is wrong with all


class Episode(NamedTuple):
    """One rollout. `number` counts within the task."""

    suite: str
    task: int
    number: int
    seed: int


@runtime_checkable
class Environment(Protocol):
    """A simulator, in a process of its own."""

    def reset(self, episode: Episode) -> tuple[str, dict[str, Any]]:
        """The instruction and the first observation: what `Policy.infer` takes, less the prompt."""
        ...

    def step(self, action: Float[np.ndarray, " A"], look: bool) -> tuple[dict[str, Any], bool]:
        """The observation after the action, and whether the task is done, which ends the episode. The observation may
        be empty where `look` is False: rendering takes longer than physics."""
        ...


# Observations -> results with "actions" f32[T, A], as `Policy.infer_batch`. Added to the environment's keys are
# "prompt" and "reset", true in an episode's first step. The second argument is each observation's worker number. An
# InputError in the place of a result says why there is none.
Infer = Callable[[list[dict[str, Any]], list[int]], list[dict[str, Any] | InputError]]


@dataclass(frozen=True)
class Settings:
    """What a rollout depends on besides the policy and its episode. `max_steps` by suite."""

    max_steps: dict[str, int]
    execute: str = "open_loop"  # see `action_chunking.executor`
    workers: int = 1
    timeout: float = 300.0  # seconds without an answer after which an environment hangs
    film: bool = False  # observe every step, not only those where a chunk is due
    action_dim: int = 7  # numbers of an action that the environment takes


class Rollout(NamedTuple):
    """The result of an episode. `record` is plain data; `frames` are the images of its observations."""

    episode: Episode
    record: dict[str, Any]
    frames: list[np.ndarray]


def rollouts(
    environment: Callable[[], Environment], infer: Infer, episodes: Sequence[Episode], settings: Settings
) -> Iterator[Rollout]:
    """Runs the episodes and yields each one as it ends.

    `environment` is called in every worker process (spawned, so it must pickle). A record has "success", "steps",
    "instruction", "actions" (a checksum of all that were executed) and "faults": what went wrong with the environment
    or the policy, and at which step: a crash, a hang, an observation that the policy or its server refuses, a reply
    without finite actions. No fault leads to an action. The episode begins anew; after `ATTEMPTS` faults, or one where
    the policy's numbers are not finite and would be so again, it has failed. Raises the environment's InputError, and
    FaultsError when faults are the rule.
    """
    waiting, finished, faults = deque(episodes), 0, 0
    workers = [_Worker(environment, settings, i) for i in range(min(settings.workers, len(episodes)))]
    try:
        for worker in workers:
            worker.begin(waiting.popleft())
        while running := [worker for worker in workers if worker.episode]:
            deadline = min(worker.deadline for worker in running)
            wait([worker.connection for worker in running], max(0.0, deadline - time.monotonic()))
            acting = []
            for worker in running:
                ended = worker.listen()
                faults += worker.failed
                if faults > finished + PATIENCE:
                    raise FaultsError(f"episodes keep failing, the last one so: {worker.faults[-1]['reason']}")
                if ended is not None:
                    finished += not worker.failed
                    yield ended
                    if waiting:
                        worker.begin(waiting.popleft())
                    else:
                        worker.stop()
                elif worker.observed:
                    acting.append(worker)
            due = [worker for worker in acting if worker.executor.due]
            results = infer([w.observation for w in due], [w.number for w in due]) if due else []
            replies = {worker.number: result for worker, result in zip(due, results, strict=True)}
            for worker in acting:
                worker.act(replies.get(worker.number))
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One environment's process and the episode that it is in."""

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
        self.executor.reset()
        if self.process is None:
            # Fresh processes: the simulator's renderer and the policy's libraries do not get along in one.
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs, self.environment), daemon=True)
            self.process.start()
            theirs.close()
        self._send(self.episode)

    def act(self, reply: dict[str, Any] | InputError | None) -> None:
        """Sends the environment the next action: of the policy's reply where a chunk is due. A reply without actions is
        a fault of the episode, which `listen` counts."""
        try:
            if isinstance(reply, InputError):
                raise reply
            chunk = None if reply is None else chunk_of(reply, self.settings.action_dim)
        except InputError as error:
            self.refused, self.deadline = error, 0.0
            return
        action = self.executor.step(chunk)
        self.steps += 1
        self.checksum = zlib.crc32(np.asarray(action, "<f4").tobytes(), self.checksum)
        self._send((action, self.executor.due or self.settings.film))

    def _send(self, message: Any) -> None:
        self.deadline = time.monotonic() + self.settings.timeout
        with contextlib.suppress(OSError):  # it has died: `listen` sees that
            self.connection.send(message)

    def listen(self) -> Rollout | None:
        """Reads the environment's answer if there is one; returns the episode if that ends it. Sets `observed` where
        there is a new observation and `failed` where something went wrong."""
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

    def _observe(self, instruction: str | None, observation: dict[str, Any], done: bool) -> Rollout | None:
        assert self.episode is not None
        self.instruction = instruction or self.instruction
        self.observation = observation | {"prompt": self.instruction, "reset": self.steps == 0}
        if "image" in observation:
            self.frames.append(observation["image"])
        if done or self.steps == self.settings.max_steps[self.episode.suite]:
            return self._end(done)
        self.observed = True
        return None

    def _fail(self, reason: str, last: bool = False) -> Rollout | None:
        self.failed = True
        self.faults.append({"step": self.steps, "reason": reason})
        if last or len(self.faults) == ATTEMPTS:
            return self._end(False)
        self._start()
        return None

    def _end(self, success: bool) -> Rollout:
        assert self.episode is not None
        record = {
            "instruction": self.instruction,
            "success": success,
            "steps": self.steps,
            "actions": f"{self.checksum:08x}",
            "faults": self.faults,
        }
        return Rollout(self.episode, record, self.frames)

    def stop(self, keep: bool = False) -> None:
        """Ends the process, and the episode unless it is to be tried again."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None
        if not keep:
            self.episode = None


def _serve(connection: Connection, make: Callable[[], Environment]) -> None:
    """The worker process: episodes or (action, look) in, (instruction or None, observation, done) out."""
    try:
        environment = make()
        while True:
            message = connection.recv()
            if isinstance(message, Episode):
                connection.send((*environment.reset(message), False))
            else:
                connection.send((None, *environment.step(*message)))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        pass  # nobody listens any more
    except InputError as error:
        connection.send(error)
    except Exception:
        connection.send(traceback.format_exc(limit=-3))


def evaluate(
    environment: Callable[[], Environment],
    infer: Infer,
    episodes: Sequence[Episode],
    settings: Settings,
    out: Path,
    *,
    policy: str,
    videos: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """Runs those of the episodes that `out` does not hold yet and returns the `summary` of all.

    `out` gets settings.json, episodes.jsonl (one line an episode, synced to disk), result.json and in videos/ up to
    `videos` successes and as many failures of every task. `policy` names what is evaluated. Raises InputError where
    `out` holds results of another policy or other settings. `progress(finished, successes)` is called meanwhile.
    """
    values = {"policy": policy, "execute": settings.execute, "max_steps": settings.max_steps}
    (out / "videos").mkdir(parents=True, exist_ok=True)
    results = _resume(out, values)
    log, kept = out / "episodes.jsonl", Counter[tuple[str, int, bool]]()
    for episode, record in results.items():
        kept[episode.suite, episode.task, record["success"]] += "video" in record

    def report() -> None:
        if progress:
            mine = [results[episode]["success"] for episode in episodes if episode in results]
            progress(len(mine), sum(mine))

    report()
    settings, missing = replace(settings, film=videos > 0), [episode for episode in episodes if episode not in results]
    for episode, record, frames in rollouts(environment, infer, missing, settings):
        kind = (episode.suite, episode.task, record["success"])
        if frames and kept[kind] < videos:
            kept[kind] += 1
            name = f"{episode.suite}-task{episode.task}-seed{episode.seed}-episode{episode.number}"
            path = out / "videos" / f"{name}-{'success' if record['success'] else 'failure'}"
            record["video"] = write_video(path, frames).name
        with open(log, "a") as file:
            file.write(json.dumps(episode._asdict() | record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        results[episode] = record
        report()
    result = summary({episode: results[episode] for episode in episodes})
    write_json(out / "result.json", result)
    return result


def _resume(out: Path, values: dict[str, Any]) -> dict[Episode, dict[str, Any]]:
    """The results in `out`, all of the same policy and settings."""
    path, log = out / "settings.json", out / "episodes.jsonl"
    if path.exists() and (before := json.loads(path.read_text())) != values:
        key = next(key for key in values if before.get(key) != values[key])
        raise InputError(
            f"{out} holds results with {key} = {before.get(key)!r}, now it is {values[key]!r}: use another directory"
        )
    write_json(path, values)
    if not log.exists():
        return {}
    text = log.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):  # killed while it was writing
        os.truncate(log, whole)
    results = {}
    for line in text[:whole].splitlines():
        record = json.loads(line)
        results[Episode(*(record.pop(key) for key in Episode._fields))] = record
    return results


def summary(results: dict[Episode, dict[str, Any]]) -> dict[str, Any]:
    """{"success", "standard_error", "episodes", "faults", "suites": {suite: {the same, "tasks": {task: …}}}}.

    The mean over all suites is that of the suites' means. With two seeds or more the standard error is that of the mean
    over the seeds, as in the paper; with one it is that of a proportion, √(p(1 − p)/n).
    """

    def rates(chosen: dict[Episode, dict[str, Any]]) -> dict[str, Any]:
        done = {episode: record["success"] for episode, record in chosen.items()}
        by_seed = [np.mean([s for e, s in done.items() if e.seed == seed]) for seed in sorted({e.seed for e in done})]
        mean = float(np.mean(list(done.values())))
        if len(by_seed) > 1:
            error = float(np.std(by_seed, ddof=1) / np.sqrt(len(by_seed)))
        else:
            error = float(np.sqrt(mean * (1 - mean) / len(done)))
        faults = sum(len(record["faults"]) for record in chosen.values())
        return {"success": mean, "standard_error": error, "episodes": len(done), "faults": faults}

    suites = {}
    for suite in dict.fromkeys(episode.suite for episode in results):
        own = {episode: record for episode, record in results.items() if episode.suite == suite}
        tasks = {}
        for task in sorted({episode.task for episode in own}):
            of_task = {episode: record for episode, record in own.items() if episode.task == task}
            instruction = next((r["instruction"] for r in of_task.values() if r["instruction"]), "")
            tasks[task] = rates(of_task) | {"instruction": instruction}
        suites[suite] = rates(own) | {"tasks": tasks}
    errors = [suite["standard_error"] for suite in suites.values()]
    return {
        "success": float(np.mean([suite["success"] for suite in suites.values()])),
        "standard_error": float(np.sqrt(np.sum(np.square(errors))) / len(errors)),
        "episodes": len(results),
        "faults": sum(suite["faults"] for suite in suites.values()),
        "seeds": sorted({episode.seed for episode in results}),
        "suites": suites,
    }


def table(result: dict[str, Any]) -> str:
    """The summary for a reader, as the paper's Table III: success ± standard error in percent."""
    rows = []
    for name, suite in result["suites"].items():
        rows.append((name, suite))
        rows += [(f"  {task} {values['instruction']}", values) for task, values in suite["tasks"].items()]
    if len(result["suites"]) > 1:
        rows.append(("average", result))
    cells = [["", "  success (%)", "episodes"]]
    for name, values in rows:
        rate = f"{100 * values['success']:5.1f} ± {100 * values['standard_error']:4.1f}"
        cells.append([name, rate, str(values["episodes"])])
    lines = [text_table(cells, "<>")]
    count = len(result["seeds"])
    lines.append(
        f"± is the standard error {f'over {count} seeds' if count > 1 else 'of a proportion: there is one seed'}"
    )
    if result["faults"]:
        what = "times an environment crashed or hung, or the policy had no action; reasons are in episodes.jsonl"
        lines.append(f"{result['faults']} {what}")
    return "\n".join(lines)


def padded(infer_batch: Callable[[list[dict]], list[dict]], size: int, **extra: Any) -> Infer:
    """A policy in this process, always called with `size` observations: one compiled program, whose answer to an
    observation does not depend on the rest of the batch. `extra` is added to each. Observations that the policy refuses
    or for which its numbers are not finite get the InputError, and the others are asked again."""

    def infer(observations: list[dict], workers: list[int]) -> list[dict | InputError]:
        full = [{key: value for key, value in one.items() if key != "reset"} | extra for one in observations]
        return ask(full)

    def ask(full: list[dict]) -> list[dict | InputError]:
        if not full:
            return []
        try:
            return [*infer_batch(full + full[-1:] * (size - len(full)))[: len(full)]]
        except NonFiniteError as error:
            answered = iter(ask([one for one, finite in zip(full, error.finite, strict=False) if finite]))
            return [next(answered) if finite else error for finite in error.finite[: len(full)]]
        except InputError as error:  # which does not say whose it is
            return [error] if len(full) == 1 else [ask([one])[0] for one in full]

    return infer


def served(
    address: str, token: str = "", *, keys: dict[str, str] | None = None, gripper_closes: bool = False, **extra: Any
) -> Infer:
    """The policy at a server of openpi's protocol, asked over one connection a worker, in parallel.

    `keys` maps the observations' keys to the server's, {"image": "observation/image", …}; these and the prompt are
    sent, by default all but "state" unchanged. `gripper_closes`: the server's gripper is LIBERO's own, -1 open and 1
    closed. `extra` is added to each observation. Where a server has no actions (see `Client`), the InputError is in
    the place of the result. Raises InputError for a key that the environment does not give.
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
