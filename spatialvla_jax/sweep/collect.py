"""Copies finished trials as small files, without weights, to continue a sweep that began on another machine."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spatialvla_jax.checkpoints.types import read_json
from spatialvla_jax.errors import InputError
from spatialvla_jax.evaluation.closed_loop import read_summary
from spatialvla_jax.sweep.run import claim
from spatialvla_jax.training.init_from import check_planned
from spatialvla_jax.utils.atomic import replacing, write_json

RESULT = "result.json"  # copied last, because it marks a trial as finished
FILES = ("config.json", "metrics.jsonl", "times.jsonl", "grid.json", "data.npz")
CLOSED_LOOP = ("closed_loop/settings.json", "closed_loop/episodes.jsonl", "closed_loop/result.json")
PLAN = ("name", "axes", "reference", "seeds", "trials")  # keys of sweep.json that identify the sweep
SAME = ("config_digest", "packed")  # keys of result.json that are equal for the same trial


def collect(sources: Sequence[Path], workdir: Path) -> dict[str, int]:
    """Copy the results of all finished trials in the workdirs `sources` of one sweep to `workdir`, which may already
    hold trials of it. Finished trials there are unchanged, except that a trial with a closed loop replaces the same one
    without.

    Returns {"trials" (of the sweep), "finished" (in `workdir`), "copied"}. Raises InputError, before anything is
    copied, for other sweeps and for missing files. Also raises it if a trial's config differs from its plan, or if
    results of one trial differ in config or data.
    """
    others = [path for path in workdir.iterdir() if path.name != "compiled"] if workdir.is_dir() else []
    if others and not _is_sweep(workdir):
        raise InputError(f"{workdir} is not empty and holds no sweep: it has no sweep.json")
    plans = {
        place: _plan(place) for place in dict.fromkeys((workdir, *sources)) if place in sources or _is_sweep(place)
    }
    (first, plan), *others = sorted(plans.items(), key=lambda item: "config_of_all" not in item[1])
    for place, other in others:
        if key := next((key for key in PLAN if other.get(key, {}) != plan.get(key, {})), None):
            raise InputError(f"{place} and {first} hold different sweeps: their {key} differ in sweep.json")
    chosen: dict[str, Path] = {}
    for name in plan["trials"]:
        found = [place / "trials" / name for place in plans if (place / "trials" / name / RESULT).is_file()]
        for folder in found:
            _check(folder, found[0])
            check_planned(folder, plan, str(first / "sweep.json"))
        simulated = [folder for folder in found if (folder / CLOSED_LOOP[-1]).is_file()]
        for folder in simulated:
            _check_episodes(folder, simulated[0])
        chosen |= {name: (simulated or found)[0]} if found else {}
    if not chosen:
        raise InputError(f"no trial in {', '.join(map(str, sources))} is finished")
    new = {name: folder for name, folder in chosen.items() if folder.parents[1] != workdir}
    workdir.mkdir(parents=True, exist_ok=True)
    if not _is_sweep(workdir):
        write_json(workdir / "sweep.json", plan)
    copied = sum(_copy(folder, workdir, name) for name, folder in new.items())
    taken = len(new) - copied  # that another process is running there
    return {"trials": len(plan["trials"]), "finished": len(chosen) - taken, "copied": copied}


def _is_sweep(place: Path) -> bool:
    return (place / "sweep.json").is_file()


def _plan(place: Path) -> dict[str, Any]:
    if not _is_sweep(place):
        raise InputError(f"{place} holds no sweep: it has no sweep.json")
    plan = read_json(place / "sweep.json")
    trials = plan.get("trials")
    if not isinstance(trials, dict) or not all(
        isinstance(t, dict) and {"values", "seed"} <= {*t} for t in trials.values()
    ):
        raise InputError(f"{place / 'sweep.json'} has no good 'trials': it is not the plan of a sweep")
    return plan


def _check(folder: Path, other: Path) -> None:
    result, first = read_json(folder / RESULT), read_json(other / RESULT)
    for key in SAME:
        if result.get(key) != first.get(key):
            raise InputError(f"{folder} and {other} are not the same trial: {key} differs in their {RESULT}")
    for name in (*FILES, *(CLOSED_LOOP if (folder / "closed_loop" / RESULT).exists() else ())):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is finished, but its {name} is missing")


def _check_episodes(folder: Path, other: Path) -> None:
    result, first = (
        {"episodes": one["episodes"], "seeds": one["seeds"]}
        | {"tasks": ", ".join(f"{suite} {' '.join(of['tasks'])}" for suite, of in one["suites"].items())}
        for one in (read_summary(place / CLOSED_LOOP[-1]) for place in (folder, other))
    )
    for key, value in result.items():
        if value != first[key]:
            raise InputError(f"{folder} and {other} have closed loops of different {key}: {value} and {first[key]}")


def _copy(folder: Path, workdir: Path, name: str) -> bool:
    """Copy a trial's small files, unless another process is running the trial there."""
    target = workdir / "trials" / name
    target.mkdir(parents=True, exist_ok=True)
    with claim(target) as claimed:
        if claimed:  # a mixture of two results' files is no finished trial
            (target / RESULT).unlink(missing_ok=True)
        for file in (*FILES, *CLOSED_LOOP, RESULT) if claimed else ():
            if (folder / file).exists():
                (target / file).parent.mkdir(exist_ok=True)
                with replacing(target / file) as temporary:
                    shutil.copyfile(folder / file, temporary)
    return claimed
