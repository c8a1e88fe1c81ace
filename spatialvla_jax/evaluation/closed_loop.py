"""Success rates from rollouts. Results are appended to a file, one line per episode, so the same call resumes after an
interruption."""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from spatialvla_jax.checkpoints.types import read_json
from spatialvla_jax.errors import InputError
from spatialvla_jax.evaluation.rollouts import Environment, Episode, Infer, Settings, rollouts
from spatialvla_jax.evaluation.video import write_video
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.utils.atomic import Appending, write_json
from spatialvla_jax.utils.process import try_lock
from spatialvla_jax.utils.progress import warn
from spatialvla_jax.utils.storage import AnyPath
from spatialvla_jax.utils.tables import text_table

# What each line of episodes.jsonl has, beside what depends on the environment.
KINDS = {"suite": str, "task": int, "number": int, "seed": int}
KINDS |= {"instruction": str, "success": bool, "steps": int, "faults": list}


def evaluate(
    environment: Callable[[], Environment],
    infer: Infer,
    episodes: Sequence[Episode],
    settings: Settings,
    folder: LogFolder,
    *,
    policy: str,
    videos: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """Run the episodes that `folder` does not hold yet and return the `summary` of all.

    Writes settings.json, episodes.jsonl (one line per episode, synced to disk), result.json, and in videos/ up to
    `videos` successes and as many failures per task. `policy` names the policy. `progress(finished, successes)`
    is called after each episode. Raises InputError if `folder` holds results of another policy or other settings, or if
    another process is filling it.
    """
    values, out = {"policy": policy, "execute": settings.execute, "max_steps": settings.max_steps}, folder.path
    (out / "videos").mkdir(parents=True, exist_ok=True)
    with Appending(folder.fetch("episodes.jsonl")) as log:
        if not try_lock(log):
            raise InputError(f"another process is writing to {folder.workdir}: use another directory")
        results, kept = _resume(folder, values), Counter[tuple[str, int, bool]]()
        for episode, record in results.items():
            kept[episode.suite, episode.task, record["success"]] += "video" in record

        def report() -> None:
            if progress:
                successes = [results[episode]["success"] for episode in episodes if episode in results]
                progress(len(successes), sum(successes))

        report()
        missing = [episode for episode in episodes if episode not in results]
        for episode, record, frames in rollouts(environment, infer, missing, replace(settings, film=videos > 0)):
            kind = (episode.suite, episode.task, record["success"])
            if frames and kept[kind] < videos:
                kept[kind] += 1
                name = f"{episode.suite}-task{episode.task}-seed{episode.seed}-episode{episode.number}"
                path = out / "videos" / f"{name}-{'success' if record['success'] else 'failure'}"
                record["video"] = write_video(path, frames).name
            log.write(json.dumps(episode._asdict() | record).encode() + b"\n")
            os.fsync(log.fileno())
            folder.upload_now_and_then()
            results[episode] = record
            report()
        result = summary({episode: results[episode] for episode in episodes})
        write_json(out / "result.json", result)
        folder.upload()
    return result


def _resume(folder: LogFolder, values: dict[str, Any]) -> dict[Episode, dict[str, Any]]:
    """The results in `folder`. Raises InputError if they are damaged, or belong to another policy or other settings."""
    path, log = folder.fetch("settings.json"), folder.path / "episodes.jsonl"
    text = log.read_bytes()
    if text and not path.exists():
        raise InputError(f"{folder.workdir} holds episodes, but no settings.json that says whose they are")
    kinds, source = {key: type(value) for key, value in values.items()}, f"{folder.workdir / 'settings.json'}"
    before = _record(path.read_bytes(), source, kinds) if path.exists() else values
    if key := next((key for key in values if before[key] != values[key]), None):
        found = f"{folder.workdir} holds results with {key} = {before[key]!r}"
        raise InputError(f"{found}, now it is {values[key]!r}: use another directory")
    write_json(path, values)
    folder.upload()  # before any episode
    whole = text.rfind(b"\n") + 1
    if whole < len(text):  # the process was killed while writing
        os.truncate(log, whole)
    results = {}
    for number, line in enumerate(text[:whole].splitlines(), 1):
        record = _record(line, f"line {number} of {folder.workdir / 'episodes.jsonl'}", KINDS)
        results[Episode(*(record.pop(key) for key in Episode._fields))] = record
    return results


def _record(text: bytes, source: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        record = json.loads(text)
        if isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
            return record
    raise InputError(f"{source} is damaged: expected a JSON object with {', '.join(kinds)}")


def remove_if_of_other_weights(folder: Path, weights: str) -> None:
    """Remove the results in `folder`, with a warning, if their policy is not `weights`, the `fingerprint` of a run."""
    settings = folder / "settings.json"
    if settings.exists() and not str(read_json(settings).get("policy")).startswith(f"{weights}, "):
        warn(f"{folder} holds episodes of other weights than {weights}: evaluating again")
        shutil.rmtree(folder)


def summary(results: dict[Episode, dict[str, Any]]) -> dict[str, Any]:
    """{"success", "standard_error", "episodes", "faults", "suites": {suite: {the same, "tasks": {task: …}}}}.

    The overall mean is the mean of the suites' means. With two or more seeds the standard error is that of the mean
    over seeds, as in the paper. With one seed it is that of a proportion, √(p(1 − p)/n).
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
        in_suite = {episode: record for episode, record in results.items() if episode.suite == suite}
        tasks = {}
        for task in sorted({episode.task for episode in in_suite}):
            of_task = {episode: record for episode, record in in_suite.items() if episode.task == task}
            instruction = next((r["instruction"] for r in of_task.values() if r["instruction"]), "")
            tasks[task] = rates(of_task) | {"instruction": instruction}
        suites[suite] = rates(in_suite) | {"tasks": tasks}
    errors = [suite["standard_error"] for suite in suites.values()]
    return {
        "success": float(np.mean([suite["success"] for suite in suites.values()])),
        "standard_error": float(np.sqrt(np.sum(np.square(errors))) / len(errors)),
        "episodes": len(results),
        "faults": sum(suite["faults"] for suite in suites.values()),
        "seeds": sorted({episode.seed for episode in results}),
        "suites": suites,
    }


def read_summary(path: AnyPath) -> dict[str, Any]:
    """A `summary` in a file. Raises InputError if it is damaged."""
    result = read_json(path)
    try:
        _ = [int(task) for suite in result["suites"].values() for task, _ in suite["tasks"].items()]
        _ = result["episodes"], result["seeds"]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InputError(f"{path} is damaged: expected episodes, seeds and suites, each with its tasks") from None
    return result


def table(result: dict[str, Any]) -> str:
    """The summary as text, like the paper's Table III: success ± standard error in percent."""
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
