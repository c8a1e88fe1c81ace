"""A sweep's trials and their measurements, read from the small files in each trial's folder: result.json,
metrics.jsonl, grid.json, data.npz, and closed_loop/result.json if it was evaluated in simulation."""

import math
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spatialvla_jax.actions import DIMENSIONS, ActionTokenizer
from spatialvla_jax.checkpoints.load import load_grid
from spatialvla_jax.checkpoints.types import read_json
from spatialvla_jax.errors import InputError
from spatialvla_jax.training.init_from import check_planned
from spatialvla_jax.training.metrics import PLATEAU_GAIN, curve_of, last_gain, plateau, read_metrics

UNITS = "normalised units"
# How a trial was made. Results of earlier versions do not record it.
RECORDED = {"data": list, "train_frames": int, "packed": str | None, "provenance": dict}
MADE = {"commit": str, "versions": dict, "date": str}
PER_DIMENSION = "Open-loop L1 per dimension"
BASELINES = {"mean action": "l1_mean_baseline", "last action held": "l1_repeat_baseline"}


class Quantity(NamedTuple):
    """A measured quantity. Tables, figures and text call it `name`; JSON and CSV call it `key`."""

    name: str
    unit: str
    decimals: int
    meaning: str
    table: str = ""

    @property
    def key(self) -> str:
        return self.name.lower().translate(str.maketrans(" -", "__", ","))

    @property
    def label(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def short(self) -> str:
        return self.name.rpartition(", ")[2]


L1 = Quantity(
    "open-loop L1",
    UNITS,
    4,
    "mean absolute error of greedy chunks on every frame of the unseen episodes, over the steps of a chunk and all "
    "dimensions of the action",
    "Results",
)
QUANTISATION = Quantity(
    "quantisation L1",
    UNITS,
    4,
    "the open-loop L1 that the grid alone leaves: of the recorded actions, encoded and decoded",
    "Results",
)
TEACHER_FORCED = Quantity(
    "teacher-forced L1",
    UNITS,
    4,
    "mean absolute error of the last validation, in which every token is predicted from the recorded ones before it",
    "Results",
)
SUCCESS = Quantity("success", "%", 1, "share of episodes solved in closed loop, in simulation", "Results")
PLATEAU = Quantity(
    "plateau reached",
    "trials",
    0,
    f"trials whose best teacher-forced L1 fell, but by less than {PLATEAU_GAIN:g} % over the last quarter of training",
    "Results",
)
GAIN = Quantity(
    "gain of the last quarter",
    "%",
    1,
    "by how much the best teacher-forced L1 fell over the last quarter of the training",
    "Training",
)
LOSS = Quantity("validation loss", "nats a token", 3, "cross-entropy of the last validation", "Training")
TRAINING_LOSS = Quantity("training loss", "nats a token", 3, "cross-entropy of the last logged step", "Training")


def _evaluated(key: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda result: result["evaluation"][key]


# Quantity → its value in result.json; KeyError if an older result lacks it.
_RESULT: dict[Quantity, Callable[[Mapping[str, Any]], float]] = {
    L1: _evaluated("l1"),
    QUANTISATION: _evaluated("l1_quantisation"),
    TRAINING_LOSS: lambda r: r["loss"],
    Quantity("token accuracy", "", 3, "share of greedy tokens that are the recorded action's", "Tokens"): _evaluated(
        "token_accuracy"
    ),
    **{
        Quantity(f"token accuracy, {kind}", "", 3, f"of the {kind} tokens", "Tokens"): _evaluated(
            f"token_accuracy_{kind}"
        )
        for kind in ("translation", "rotation", "gripper")
    },
    Quantity("tokens used", "", 0, "different tokens that the training data has", "Tokens"): lambda r: r["tokens_used"],
    Quantity("vocabulary", "tokens", 0, "action tokens of the grid", "Tokens"): lambda r: r["grid"]["vocab_size"],
    Quantity("steps", "", 0, "of the training", "Training"): lambda r: r["steps"],
    Quantity("step time", "ms", 1, "median of the training", "Training"): lambda r: 1000 * r["step_seconds_median"],
    Quantity("parameters", "", 0, "of the model", "Training"): lambda r: r["params"],
    Quantity("trained parameters", "", 0, "those that are not frozen", "Training"): lambda r: r["trainable"],
}
ORDER = (
    *(L1, QUANTISATION, TEACHER_FORCED, SUCCESS, PLATEAU),
    *(quantity for quantity in _RESULT if quantity.table == "Tokens"),
    *(LOSS, TRAINING_LOSS, GAIN),
    *(quantity for quantity in _RESULT if quantity.table == "Training" and quantity != TRAINING_LOSS),
)


def of_dimension(name: str) -> Quantity:
    return Quantity(f"{L1.name}, {name}", UNITS, 3, f"of {name} alone", PER_DIMENSION)


@dataclass(frozen=True)
class Trial:
    """A finished trial. `numbers` holds its measurements by `Quantity.key`, and `baselines` those of each baseline.
    `episodes` is the number of closed-loop episodes, 0 if it has none, and `tasks` are their (suite, task)."""

    name: str
    folder: Path
    values: dict[str, str]
    seed: int
    numbers: dict[str, float]
    episodes: int
    tasks: tuple[tuple[str, str], ...]
    baselines: dict[str, dict[str, float]]
    records: tuple[dict[str, Any], ...]
    result: dict[str, Any]
    grid: ActionTokenizer
    arrays: dict[str, np.ndarray]

    @property
    def plateau(self) -> bool | None:
        """Whether it reached its plateau; None if there are too few validations to tell."""
        known = self.numbers.get(PLATEAU.key)
        return None if known is None else known == 1

    @property
    def baseline_key(self) -> tuple[float, ...]:
        """Equal for trials that are evaluated on the same episodes with the same chunk length."""
        return tuple(round(numbers[L1.key], 5) for numbers in self.baselines.values())

    @property
    def label(self) -> str:
        return ", ".join((*(f"{axis} {value}" for axis, value in self.values.items()), f"seed {self.seed}"))

    def curve(self, key: str) -> list[tuple[int, float]]:
        return curve_of(self.records, key)


class Results(NamedTuple):
    """`plan` is sweep.json; `failed` is {trial: reason}, `missing` names the trials that have not ended. `quantities`
    are those that any trial has. `one_axis` says that every trial differs from the reference in one axis at most."""

    plan: dict[str, Any]
    trials: list[Trial]
    failed: dict[str, str]
    missing: list[str]
    quantities: list[Quantity]
    one_axis: bool


def read_sweep(workdir: Path) -> Results:
    """Raises InputError if `workdir` holds no sweep, none of its trials is finished, or a file is damaged."""
    if not (workdir / "sweep.json").is_file():
        raise InputError(f"{workdir} holds no sweep: it has no sweep.json")
    trials, failed, missing = list[Trial](), dict[str, str](), list[str]()
    plan = {"reference": {}, "config": "", "overrides": {}} | read_json(workdir / "sweep.json")
    kinds = {"name": str, "axes": dict, "seeds": list, "trials": dict}
    kinds |= {"reference": dict, "config": str, "overrides": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(plan.get(key), kind)]
    for key, kind in ({} if wrong else {"axes": list, "trials": dict}).items():
        wrong += [key] if not all(value and isinstance(value, kind) for value in plan[key].values()) else []
    if wrong:
        raise InputError(f"{workdir / 'sweep.json'} has no good {wrong[0]!r}: it is not the plan of a sweep")
    plan["reference"] = {axis: values[0] for axis, values in plan["axes"].items()} | plan["reference"]
    for name, planned in {**plan["trials"], "reference": {"values": plan["reference"], "seed": 0}}.items():
        values, axes = planned.get("values", {}), plan["axes"]
        whole = (
            isinstance(values, dict)
            and values.keys() == axes.keys()
            and all(values[axis] in names for axis, names in axes.items())
        )
        if not whole or "seed" not in planned:
            raise InputError(f"{workdir / 'sweep.json'}: {name} must have a seed and one of each axis's values")
    for name, planned in plan["trials"].items():
        folder = workdir / "trials" / name
        if (folder / "result.json").exists():
            trials.append(read_trial(folder, planned["values"], planned["seed"]))
            check_planned(folder, plan, str(workdir / "sweep.json"))
        elif (folder / "failed.json").exists():
            failed[name] = str(read_json(folder / "failed.json").get("reason", "no reason given"))
        else:
            missing.append(name)
    if not trials:
        why = f", and {len(failed)} failed: {next(iter(failed.values()))}" if failed else ""
        raise InputError(f"no trial in {workdir} is finished{why}")
    names = (name for trial in trials for name in trial.result["evaluation"].get("dimensions", DIMENSIONS))
    quantities = [*ORDER, *add_steps_to(trials), *map(of_dimension, dict.fromkeys(names))]
    known = {key for trial in trials for key in trial.numbers}
    planned = [trial["values"].items() - plan["reference"].items() for trial in plan["trials"].values()]
    one_axis = len(plan["axes"]) > 1 and max(map(len, planned)) < 2
    return Results(plan, trials, failed, missing, [q for q in quantities if q.key in known], one_axis)


def add_steps_to(trials: list[Trial]) -> list[Quantity]:
    """Add to `numbers` the step of the first validation at which a trial was as good as every trial became: by
    teacher-forced L1 and, if all vocabularies are equal, by loss. Returns the added quantities."""
    added = []
    for quantity, key in {TEACHER_FORCED: "val/l1", LOSS: "val/loss"}.items():
        curves = [trial.curve(key) for trial in trials]
        if not all(curves) or (quantity == LOSS and len({trial.numbers.get("vocabulary") for trial in trials}) > 1):
            continue
        target = max(min(value for _, value in curve) for curve in curves)
        meaning = "steps after which a trial was as good as all became, as far as validations tell"
        added.append(Quantity(f"steps to {quantity.name} {target:.3f}", "", 0, meaning, "Training"))
        for trial, curve in zip(trials, curves, strict=True):
            trial.numbers[added[-1].key] = next(step for step, value in curve if value <= target)
    return added


def read_trial(folder: Path, values: dict[str, str], seed: int) -> Trial:
    """Raises InputError if a file is missing, damaged, or belongs to another trial."""
    path = folder / "result.json"
    for file in ("metrics.jsonl", "grid.json", "data.npz"):
        if not (folder / file).exists():
            raise InputError(f"{folder} is finished, but its {file} is missing, which the report needs")
    result = read_json(path)
    found = {"values": result.get("values"), "seed": result.get("seed")}
    if found != {"values": values, "seed": seed}:
        raise InputError(f"{path} is of {found}, but sweep.json plans {values} with seed {seed}: was it copied there?")
    numbers = {}
    for quantity, get in _RESULT.items():
        try:
            numbers[quantity.key] = float(get(result))
            if not math.isfinite(numbers[quantity.key]):
                raise ValueError
        except KeyError as error:
            if quantity == L1:
                raise InputError(f"{path} has no {error}: it is not a trial's result") from None
        except (TypeError, ValueError):
            raise InputError(f"{path} has no finite number for {quantity.name}") from None
    try:
        evaluation = result["evaluation"]
        numbers |= errors_of(evaluation, "l1")
        baselines = {name: errors_of(evaluation, key) for name, key in BASELINES.items()}
        steps = int(result["steps"])
        _check_kinds(evaluation, {"split": str, "frames": int, "episodes": int})
        made = {"provenance": {}} | result
        _check_kinds({"data": [], "train_frames": 0, "packed": None} | made, RECORDED)
        _check_kinds({"commit": "", "versions": {}, "date": ""} | made["provenance"], MADE)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{path} is not a whole result of a trial: {type(error).__name__} {error}") from None
    records, arrays = _read(folder / "metrics.jsonl", _records), _read(folder / "data.npz", _arrays)
    for quantity, key in {TEACHER_FORCED: "val/l1", LOSS: "val/loss"}.items():
        if found := curve_of(records, key):
            numbers[quantity.key] = found[-1][1]
    curve = curve_of(records, "val/l1")
    if (gain := last_gain(curve, steps)) is not None:
        numbers |= {GAIN.key: gain, PLATEAU.key: float(bool(plateau(curve, steps)))}
    success, episodes, tasks = read_closed_loop(folder / "closed_loop" / "result.json")
    if episodes and "weights" in result:
        weights, policy = result["weights"], read_json(folder / "closed_loop" / "settings.json").get("policy")
        digest, others = (re.findall(r" \(([0-9a-f]{8})\)", str(text)) for text in (weights, policy))
        if others and others != digest:
            raise InputError(f"{folder}/closed_loop is of {policy}, other weights than the trial's, {weights}")
    numbers |= {SUCCESS.key: success} if episodes else {}
    return Trial(
        name=folder.name,
        folder=folder,
        values=values,
        seed=seed,
        numbers=numbers,
        episodes=episodes,
        tasks=tasks,
        baselines=baselines,
        records=tuple(records),
        result=result,
        grid=load_grid(folder / "grid.json"),
        arrays=arrays,
    )


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def _check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for key, kind in kinds.items():
        if not isinstance(values[key], kind):
            raise TypeError(f"{key} is {values[key]!r}")


def _records(path: Path) -> list[dict[str, Any]]:
    records = read_metrics(path)
    for number, record in enumerate(records, 1):
        numbers = {"loss": 0, "val/loss": 0, "val/l1": 0} | record if isinstance(record, dict) else {}
        for key in ("step", "loss", "val/loss", "val/l1"):
            if not isinstance(numbers.get(key), int | float):
                raise ValueError(f"line {number} has no number for {key}")
    return records


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {"actions": file["actions"]} | dict(file)


def errors_of(evaluation: Mapping[str, Any], key: str) -> dict[str, float]:
    """Open-loop errors by `Quantity.key`: over all dimensions, and of each, from the results `key` and
    `key`_per_dimension."""
    names = evaluation.get("dimensions", DIMENSIONS)
    errors = zip(names, evaluation[f"{key}_per_dimension"], strict=True)
    found = {L1.key: float(evaluation[key])} | {of_dimension(name).key: float(error) for name, error in errors}
    if wrong := next((name for name, error in found.items() if not math.isfinite(error)), None):
        raise ValueError(f"{key} has {found[wrong]} for {wrong}")
    return found


def read_closed_loop(path: Path) -> tuple[float, int, tuple[tuple[str, str], ...]]:
    """(success in percent, episodes, their (suite, task)) from a result of `evaluate --closed-loop`; (0, 0, ()) without
    one."""
    if not path.exists():
        return 0.0, 0, ()
    result = read_json(path)
    success, episodes, suites = result.get("success"), result.get("episodes"), result.get("suites", {})
    if not isinstance(suites, dict) or not all(isinstance(of, dict) and "tasks" in of for of in suites.values()):
        raise InputError(f"{path} has suites {suites!r}: expected a dict of suites, each with its tasks")
    if not isinstance(success, int | float) or not 0 <= success <= 1 or not isinstance(episodes, int) or episodes < 1:
        raise InputError(
            f"{path} has success {success!r} of {episodes!r} episodes: expected a share of 1 or more episodes"
        )
    return 100 * success, episodes, tuple(sorted((suite, task) for suite, of in suites.items() for task in of["tasks"]))
