"""Goodput: the share of a run's wall time, restarts included, that produced steps which were kept.

Each process of a run writes one small file, `WORKDIR/goodput/<start time>.json`:

    {"began": seconds since 1970, "marks": [{"step": 40, "seconds": {"total": 61.5, "compile": 12.0, …}}, …]}

A mark records the time spent since the process started, by `Clock` name, when it had completed `step`. Marks of saved
steps stay; others are replaced by the next. The file is always rewritten whole, because buckets cannot append. Between
saves this happens at most every `INTERVAL` seconds, which is all that a killed process loses. `account` computes where
the time went, from all files.
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

FOLDER = "goodput"  # in a run's directory
INTERVAL = 10.0  # seconds between writes
STARTING = ("imports", "index", "restore", "start")  # clock names that count as `start`
CAUSES: tuple[str, ...] = ("steps", "start", "compile", "data", "save", "eval", "lost", "idle")

Process = dict[str, Any]  # {"began", "marks"}, the content of its file
NOTHING: dict[str, Any] = {"step": None, "seconds": {"total": 0.0}}  # every process's initial mark


class Clock:
    """Time spent by this process, by name: `with clock("data"): …`. Time in a nested `with` counts only there. The
    process started `age` seconds ago and spent them on imports."""

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
        """Seconds by name, and "total" since the process started."""
        return {"total": time.perf_counter() - self.began, **self.spent}

    def report(self, steps: int) -> dict[str, float]:
        """Seconds per step over the last `steps`: in total, waiting for data, waiting for devices (including
        compilation at the first step), and stalled by saving. Start-up and validation do not count."""
        now, before = self.totals(), defaultdict(float, self.reported)
        spent = defaultdict(float, {name: seconds - before[name] for name, seconds in now.items()})
        self.reported = now
        whole = spent["total"] - sum(spent[name] for name in (*STARTING, "eval"))
        spent["compute"] += spent["compile"]
        parts = {"data/wait_seconds": "data", "compute/seconds": "compute", "save/stall_seconds": "save"}
        return {"step/seconds": whole / steps} | {key: spent[name] / steps for key, name in parts.items()}


class Goodput:
    """This process's marks, and those of the run's earlier processes. Only process 0 writes."""

    def __init__(self, folder: LogFolder, clock: Clock) -> None:
        self.folder, self.clock = folder, clock
        self.earlier = read_processes(folder.workdir) if is_writer() else []
        now = time.time()
        # If earlier marks appear to lie in the future, this machine's clock is behind.
        ends = [process["began"] + process["marks"][-1]["seconds"]["total"] for process in self.earlier]
        began = now + max(0.0, max(ends, default=now) - now) - clock.totals()["total"]
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(began))}-{secrets.token_hex(3)}.json"
        self.path, self.marks, self.written = folder.path / FOLDER / name, [], -INTERVAL
        self.process: Process = {"began": began, "marks": self.marks}
        self.keeps = True  # whether the last mark stays when the next is added

    def mark(self, step: int | None, *, keep: bool = False) -> None:
        """Record that `step` is complete (None while starting); `keep` the mark if that step was saved or restored."""
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
        """Write the last mark when the process ends. If that fails, the run's own error gives the reason."""
        if self.marks:
            with contextlib.suppress(OSError):
                self.mark(self.marks[-1]["step"], keep=True)

    def shares(self) -> dict[str, float]:
        """{"goodput": share of kept steps, "goodput/CAUSE": other shares} of the wall time to the last mark."""
        seconds = account([*self.earlier, self.process])
        wall = sum(seconds.values())
        return {"goodput" if k == "steps" else f"goodput/{k}": v / wall for k, v in seconds.items()} if wall else {}


def read_processes(workdir: AnyPath) -> list[Process]:
    """The records of a run's processes, ordered by start time. Invalid files are skipped with a warning."""
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
            warn(f"{file} is damaged: expected the record of a training process; its time counts as idle")
    return sorted(processes, key=lambda process: process["began"])


def account(processes: Sequence[Process]) -> dict[str, float]:
    """Seconds by cause. Their sum is the time from the start of the first of `processes` to the last one's last mark.

    `steps` is time on steps that were kept. `lost` is all time on steps that were repeated by a later process, or by
    the same one after a loss spike. `idle` is time without a process. If two overlap, the later one counts.
    """
    seconds = dict.fromkeys(CAUSES, 0.0)
    bound = float("inf")  # later steps were repeated
    later = None  # start of the next process
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
            else:  # no progress, or a rewind
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
    """Seconds of starting, of compiling, and of other causes between two marks. Unattributed time counts as `steps`."""
    spent = {name: seconds - before.get(name, 0.0) for name, seconds in after.items() if name != "compute"}
    total = spent.pop("total")
    spent["steps"] = total - sum(spent.values())
    starting = sum(spent.pop(name, 0.0) for name in STARTING)
    return starting, spent.pop("compile", 0.0), spent


def _until(marks: Sequence[dict[str, Any]], limit: float | None) -> list[dict[str, Any]]:
    """The marks up to `limit` seconds. The first mark beyond is interpolated to the limit."""
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
