"""Goodput: the share of a run's wall time, over all its restarts, that made steps which were kept.

Every process of a run writes one small file, `WORKDIR/goodput/<when it began>.json`:

    {"began": seconds since 1970, "marks": [{"step": 40, "seconds": {"total": 61.5, "compile": 12.0, …}}, …]}

A mark says what the process had spent since it began, by `Clock` name, when it had made `step`. Marks of saved steps
stay; the others are replaced by the next one. The file is replaced whole, so that it needs no appending, which buckets
don't know, and no more often than every `INTERVAL` seconds where nothing was saved: a killed process loses no more than
these. `account` says where the time went, from all files.
"""

import contextlib
import itertools
import json
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.utils.atomic import write_json
from spatialvla_jax.utils.distributed import is_writer
from spatialvla_jax.utils.progress import warn
from spatialvla_jax.utils.storage import AnyPath, list_names, read_text

FOLDER = "goodput"  # of a run's directory
INTERVAL = 10.0  # seconds between two writes
STARTING = ("imports", "index", "restore", "start")  # names of the clock that count as `start`
CAUSES: tuple[str, ...] = ("steps", "start", "compile", "data", "save", "eval", "lost", "idle")

Process = dict[str, Any]  # {"began", "marks"}, as in its file
NOTHING: dict[str, Any] = {"step": None, "seconds": {"total": 0.0}}  # the mark with which every process begins


class Clock:
    """What this process spent its time on, by name: `with clock("data"): …`. Time within an inner `with` counts there
    alone. The process began `age` seconds ago, which it spent on imports."""

    def __init__(self, age: float = 0.0) -> None:
        self.began = time.perf_counter() - age
        self.spent: defaultdict[str, float] = defaultdict(float, imports=age)
        self.inner = 0.0
        self.reported = {"total": age, **self.spent}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began, outer, self.inner = time.perf_counter(), self.inner, 0.0
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self.spent[name] += seconds - self.inner
            self.inner = outer + seconds

    def totals(self) -> dict[str, float]:
        """Seconds by name, and "total" since the process began."""
        return {"total": time.perf_counter() - self.began, **self.spent}

    def report(self, steps: int) -> dict[str, float]:
        """Seconds a step, of the last `steps`: in all, waiting for data and for devices (which includes compiling, at
        the first step), and stalled by saving. The start and validation do not count."""
        now, before = self.totals(), defaultdict(float, self.reported)
        spent = defaultdict(float, {name: seconds - before[name] for name, seconds in now.items()})
        self.reported = now
        whole = spent["total"] - sum(spent[name] for name in (*STARTING, "eval"))
        spent["compute"] += spent["compile"]
        parts = {"data/wait_seconds": "data", "compute/seconds": "compute", "save/stall_seconds": "save"}
        return {"step/seconds": whole / steps} | {key: spent[name] / steps for key, name in parts.items()}


class Goodput:
    """This process's marks, beside those that earlier processes of the run left. Only the first of several
    processes writes."""

    def __init__(self, folder: LogFolder, clock: Clock) -> None:
        self.folder, self.clock = folder, clock
        self.earlier = read_processes(folder.workdir) if is_writer() else []
        now = time.time()
        # Earlier marks were made in the past: where they say otherwise, this machine's clock is behind theirs.
        ends = [process["began"] + process["marks"][-1]["seconds"]["total"] for process in self.earlier]
        began = now + max(0.0, max(ends, default=now) - now) - clock.totals()["total"]
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(began))}-{secrets.token_hex(3)}.json"
        self.path, self.marks, self.written = folder.path / FOLDER / name, [], -INTERVAL
        self.process: Process = {"began": began, "marks": self.marks}
        self.keeps = True  # whether the next mark leaves the last one in place

    def mark(self, step: int | None, *, keep: bool = False) -> None:
        """The state is that of `step` now, None while it is being made; `keep` where it was saved, or was loaded."""
        if not self.keeps:
            self.marks.pop()
        self.marks.append({"step": step, "seconds": self.clock.totals()})
        self.keeps = keep
        now = time.perf_counter()
        if is_writer() and (keep or now - self.written >= INTERVAL):
            self.path.parent.mkdir(exist_ok=True)
            write_json(self.path, self.process)
            self.written = now
            self.folder.upload_now_and_then()

    def close(self) -> None:
        """The last mark, of a process that ends. Where it cannot be written, the run's own error says why."""
        if self.marks:
            with contextlib.suppress(OSError):
                self.mark(self.marks[-1]["step"], keep=True)

    def shares(self) -> dict[str, float]:
        """{"goodput": of kept steps, "goodput/CAUSE": of each other cause}, of the wall time until the last mark."""
        seconds = account([*self.earlier, self.process])
        wall = sum(seconds.values())
        return {"goodput" if k == "steps" else f"goodput/{k}": v / wall for k, v in seconds.items()} if wall else {}


def read_processes(workdir: AnyPath) -> list[Process]:
    """What the processes of a run recorded, in the order in which they began. A file that holds no record is reported
    and left out."""
    names, processes = list_names(workdir / FOLDER), []
    for file in (workdir / FOLDER / name for name in names if name.endswith(".json")):
        text = read_text(file)
        try:
            process = json.loads(text)
            totals = [
                mark["seconds"]["total"] for mark in process["marks"] if mark["step"] is None or mark["step"] >= 0
            ]
            if process["began"] < 0 or not totals or totals != sorted(totals):
                raise ValueError
            processes.append(process)
        except (ValueError, TypeError, KeyError):
            warn(f"{file} is damaged: expected what a training process recorded; its time counts as idle")
    return sorted(processes, key=lambda process: process["began"])


def account(processes: Sequence[Process]) -> dict[str, float]:
    """Seconds by cause, which add up to the time from the beginning of the first of `processes` to the last one's last
    mark.

    `steps` made steps that were kept. `lost` was spent, on whatever, on steps that a later process, or the same one
    after a loss spike, made again. `idle` is time without a process. Where two overlap, the later one counts.
    """
    seconds = dict.fromkeys(CAUSES, 0.0)
    bound = float("inf")  # steps beyond it were made again
    later = None  # when the next process began
    for process in sorted(processes, key=lambda process: -process["began"]):
        limit = None if later is None else later - process["began"]
        marks = [NOTHING, *_until(process["marks"], limit)]
        if limit is not None:
            seconds["idle"] += limit - marks[-1]["seconds"]["total"]
        for before, after in reversed([*itertools.pairwise(marks)]):
            starting, compiling, rest = _causes(before["seconds"], after["seconds"])
            first, last = before["step"], after["step"]
            kept = 1.0
            if first is None:
                starting, rest = starting + sum(rest.values()), {}
            elif last > first:
                kept = min(max((bound - first) / (last - first), 0.0), 1.0)
            else:  # nothing was made, or the way back
                kept = float(first == last <= bound)
            seconds["start"] += starting
            seconds["compile"] += compiling
            for cause, spent in rest.items():
                seconds[cause] += kept * spent
                seconds["lost"] += (1 - kept) * spent
            if last is not None and (first is None or last < first):
                bound = min(bound, last)
        later = process["began"]
    return seconds


def _causes(before: dict[str, float], after: dict[str, float]) -> tuple[float, float, dict[str, float]]:
    """Seconds of starting, of compiling, and of the other causes between two marks; what none names made steps."""
    spent = {name: seconds - before.get(name, 0.0) for name, seconds in after.items() if name != "compute"}
    total = spent.pop("total")
    spent["steps"] = total - sum(spent.values())
    starting = sum(spent.pop(name, 0.0) for name in STARTING)
    return starting, spent.pop("compile", 0.0), spent


def _until(marks: Sequence[dict[str, Any]], limit: float | None) -> list[dict[str, Any]]:
    """The marks up to `limit` seconds; the first one beyond it is moved there, with its share of what was spent."""
    kept = [mark for mark in marks if limit is None or mark["seconds"]["total"] <= limit]
    if limit is not None and len(kept) < len(marks):
        after, before = marks[len(kept)], kept[-1] if kept else NOTHING
        start = before["seconds"]["total"]
        share = (limit - start) / (after["seconds"]["total"] - start)
        part = {k: v * share + before["seconds"].get(k, 0.0) * (1 - share) for k, v in after["seconds"].items()}
        first, last = before["step"], after["step"]
        step = None if first is None or last is None else first + share * (last - first)
        kept.append({"step": step, "seconds": part | {"total": limit}})
    return kept
