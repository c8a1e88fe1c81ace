"""The progress of a training run as text: its step, and how its wall time was spent."""

import time
from typing import Any

from spatialvla_jax.checkpoints.types import read_json
from spatialvla_jax.errors import InputError
from spatialvla_jax.training.goodput import FOLDER, account, read_processes
from spatialvla_jax.training.loop import CONFIG
from spatialvla_jax.utils.storage import AnyPath, is_file
from spatialvla_jax.utils.tables import text_table

MEANS = {
    "steps": "made steps that were kept",
    "start": "imports, the data's index, the restore",
    "compile": "the first step of each process",
    "data": "waiting for batches",
    "save": "stalled by checkpoints",
    "eval": "validation",
    "lost": "steps that were made again",
    "idle": "no process ran",
}


def run_report(run: AnyPath) -> dict[str, Any]:
    """The report on the run in the directory `run`: {"run", "step", "steps", "wall_seconds", "goodput", "seconds" (by
    cause) and "processes" (each with "began", "seconds", "first_step" and "last_step")}. Raises InputError if the
    directory does not hold a run, or if the run recorded nothing."""
    if is_file(run / "sweep.json"):
        raise InputError(
            f"{run} holds a sweep, not a run: `sweep report {run}` reports it, `report` one of its trials/*"
        )
    if not is_file(run / CONFIG):
        raise InputError(f"{run} holds no {CONFIG}: expected the --workdir of a training run")
    try:
        steps = read_json(run / CONFIG)["train"]["steps"]
    except (KeyError, TypeError):
        raise InputError(f"{run / CONFIG} has no train.steps: expected the config of a training run") from None
    records = read_processes(run)
    if not records:
        raise InputError(f"{run / FOLDER} holds no record: the run was made by a version that kept none")
    seconds = account(records)
    processes = []
    for record in records:
        made = [mark["step"] for mark in record["marks"] if mark["step"] is not None]
        ends = {"first_step": made[0] if made else None, "last_step": made[-1] if made else None}
        processes.append({"began": record["began"], "seconds": record["marks"][-1]["seconds"]["total"], **ends})
    wall = sum(seconds.values())
    last = [process["last_step"] for process in processes if process["last_step"] is not None]
    return {
        "run": str(run),
        "step": last[-1] if last else 0,
        "steps": steps,
        "wall_seconds": wall,
        "goodput": seconds["steps"] / wall,
        "seconds": seconds,
        "processes": processes,
    }


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    wall, processes = report["wall_seconds"], report["processes"]
    rows = [["", "seconds", "share", ""]]
    rows += [[cause, f"{s:,.1f}", f"{s / wall:.1%}", MEANS[cause]] for cause, s in report["seconds"].items()]
    rows.append(["wall time", f"{wall:,.1f}", "100.0%", "from the first process's start to the last one's last sign"])
    runs = [["process", "began (UTC)", "seconds", "from step", "to step"]]
    for number, process in enumerate(processes, 1):
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(process["began"]))
        steps = ["-" if process[key] is None else str(process[key]) for key in ("first_step", "last_step")]
        runs.append([str(number), began, f"{process['seconds']:,.1f}", *steps])
    count = f"{len(processes)} process{'es' * (len(processes) > 1)}"
    return (
        f"{report['run']}: step {report['step']} of {report['steps']}, {count}, goodput {report['goodput']:.1%}\n\n"
        f"{text_table(rows, '<>><')}\n\n{text_table(runs, '>')}"
    )
