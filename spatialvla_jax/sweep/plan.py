"""Sweep files: their trials, checked before any of them runs.

There is a trial for every combination of axis values or, around a `reference`, for every value of one axis at a time.
Each is run with every seed. All trials with the first seed come before those with the next, so a sweep that is cut
short still fills the table. Parallel processes then also compile different programs, which the other seeds' trials
reuse.

A sweep file defines `get_sweep()`, which returns

    {
        "base": "demo",                                # a config file by name or path, or a config
        "axes": {
            "model.depth_source": ["dataset", "none"],        # a config key and its values
            "grid": {"coarse": {"grid.num_bins": (8, 16, 4, 8, 8, 8)}, "fine": {}},  # or named values
        },
        "reference": {"model.depth_source": "dataset", "grid": "fine"},  # one axis at a time; default: all combinations
        "seeds": [0, 1],
        "closed_loop": {"episodes": 7},                # also evaluate in simulation, see CLOSED_LOOP; default: not
        "keep_checkpoints": False,                     # default: True
    }
"""

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from spatialvla_jax.actions import ActionGrid, ActionTokenizer, linear_grid, uniform_grid
from spatialvla_jax.checkpoints import read_checkpoint
from spatialvla_jax.checkpoints.hub import find_checkpoint
from spatialvla_jax.checkpoints.paligemma import is_paligemma
from spatialvla_jax.checkpoints.regrid import adapt_checkpoint
from spatialvla_jax.config import (
    KEYS,
    call_function,
    check_together,
    checked,
    completed,
    decisive,
    find_config,
    flatten,
    load_config,
    make_config,
)
from spatialvla_jax.data import DataConfig
from spatialvla_jax.data.resolve_datasets import make_entries
from spatialvla_jax.errors import InputError
from spatialvla_jax.sim.libero_env import MAX_STEPS, NUM_TASKS
from spatialvla_jax.training.setup import check_patterns, make_setup
from spatialvla_jax.utils.renames import CONFIG_KEYS
from spatialvla_jax.utils.schema import Field, check
from spatialvla_jax.utils.storage import exists, is_file, to_path

SEED = KEYS["seed"]
SWEEP = {
    "base": Field("", "a config file by name or path, or a config", kinds=(str, dict, ConfigDict)),
    "axes": Field({}, "config keys with their values, or axis names with {value's name: {config key: value}}"),
    "reference": Field({}, "{axis: one of its values}: vary one axis at a time around these"),
    "seeds": Field([0], "of the trials", items=SEED, problem=lambda seeds: "" if seeds else "must have at least one"),
    "closed_loop": Field({}, "evaluate each trial in simulation as well"),
    "keep_checkpoints": Field(True, "False: keep only results"),
}


def _suite(name: str) -> str:
    return "" if name in ("", *MAX_STEPS) else f"is not a suite: there are {', '.join(MAX_STEPS)}"


def _distinct(values: list[int]) -> str:
    return "" if len({*values}) == len(values) else "has a value twice"


CLOSED_LOOP = {
    "suite": Field("", "of LIBERO; empty: the one that the trial's dataset is named after", problem=_suite),
    "episodes": Field(50, "of each task and seed", low=1, high=1000),
    "seeds": Field([], "of the episodes; empty: the trial's own", items=SEED, problem=_distinct),
    "tasks": Field([], "ids; empty: all", items=Field(0, "", low=0, high=NUM_TASKS - 1), problem=_distinct),
}


@dataclass(frozen=True)
class Trial:
    """`name` is also the directory's name; `values` is {axis: name of its value}. `closed_loop` has the keys of
    CLOSED_LOOP, or is empty."""

    name: str
    values: dict[str, str]
    seed: int
    config: ConfigDict
    closed_loop: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hash of what the config computes (16 hex digits). It does not depend on where the data is."""
        return hashlib.sha256(json.dumps(decisive(self.config.to_dict()), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sweep:
    """`axes` is {axis: names of its values}, in the order of the file and the report. `reference` is {axis: name}, or
    empty if the axes are crossed. `config` and `overrides` are what it was loaded with."""

    name: str
    axes: dict[str, tuple[str, ...]]
    reference: dict[str, str]
    seeds: tuple[int, ...]
    keep_checkpoints: bool
    trials: tuple[Trial, ...]
    config: str = ""
    overrides: dict[str, str] = field(default_factory=dict)

    def select(self, pattern: str) -> tuple[Trial, ...]:
        """The trials whose names match a shell pattern. Raises InputError if none does."""
        if chosen := tuple(trial for trial in self.trials if fnmatchcase(trial.name, pattern)):
            return chosen
        raise InputError(f"no trial of sweep {self.name} matches {pattern!r}; the first is {self.trials[0].name}")


def load_sweep(path: str | Path, overrides: Mapping[str, str] | None = None, only: str = "*") -> Sweep:
    """Load a sweep by file (as for `find_config`), applying `overrides` to its base config first.

    Raises InputError for every problem that is detectable without data. Files are checked only for trials whose names
    match the shell pattern `only`.
    """
    asked, path = str(path), find_config(path)
    given = call_function(path, "get_sweep")
    if not isinstance(given, dict) or not {"base", "axes", "seeds"} <= given.keys() <= SWEEP.keys():
        raise InputError(f"get_sweep() of {path} must return a dict with the keys {', '.join(SWEEP)}")
    given = {name: check(value, SWEEP[name], f"{path}: {name}") for name, value in given.items()}
    overrides = {CONFIG_KEYS.get(key, key): text for key, text in (overrides or {}).items()}
    base, seeds = _base(path, given["base"], overrides), tuple(given["seeds"])
    axes = _named(f"axes of {path}", {key: _values(path, str(key), values) for key, values in given["axes"].items()})
    for axis, values in axes.items():
        for key in sorted({key for changes in values.values() for key in changes}):
            if key == "seed" or any(f"{other}.".startswith(f"{key}.") for other in overrides):
                whose = f"axis {axis!r} of {path}" if key != "seed" else "the seeds"
                raise InputError(f"config key {key} is set by {whose} and can't also be set elsewhere")

    reference = _reference(path, given.get("reference", {}), axes)
    simulated = _closed_loop(path, given["closed_loop"]) if "closed_loop" in given else {}
    trials = []
    for chosen in _combinations(axes, reference):
        changes = [(axis, key, value) for axis, name in chosen.items() for key, value in axes[axis][name].items()]
        varied = {axis: name for axis, name in chosen.items() if reference.get(axis) != name}
        label = "_".join(f"{_slug(axis.rsplit('.')[-1])}-{_slug(name)}" for axis, name in varied.items())
        label = label or ("reference" if reference else "")
        named = [(seed, f"{label}_seed-{seed}".lstrip("_")) for seed in seeds]
        try:
            config = _changed(base, changes)
            _check(config, {key for axis, key, _ in changes if axis in varied})
            if any(fnmatchcase(name, only) for _, name in named):
                _check_files(config)
        except InputError as error:
            raise InputError(f"{path}: trial {label or 'of the base'}: {error}") from None
        values = flatten(config.to_dict())
        for seed, name in named:
            closed_loop = simulated and simulated | {"seeds": simulated["seeds"] or [seed]}
            trials.append(Trial(name, chosen, seed, make_config(values | {"seed": seed}), closed_loop))
    trials.sort(key=lambda trial: seeds.index(trial.seed))
    _check_distinct(path, trials)
    names = {axis: tuple(values) for axis, values in axes.items()}
    keep = given.get("keep_checkpoints", True)
    return Sweep(path.stem, names, reference, seeds, keep, tuple(trials), asked, overrides)


def _reference(path: Path, given: dict[Any, Any], axes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    reference = {str(axis): _name_of(value, axes.get(str(axis), {})) for axis, value in given.items()}
    if unknown := [axis for axis in reference if axis not in axes]:
        there = f"there are {', '.join(axes)}" if axes else "there are none"
        raise InputError(f"reference of {path} names {unknown[0]!r}, which is not an axis: {there}")
    for axis, values in axes.items() if reference else ():
        if (value := reference.get(axis)) not in values:
            found = "has no value" if value is None else f"has {value!r}"
            raise InputError(f"reference of {path} {found} for axis {axis!r}: choose one of {', '.join(values)}")
    return {axis: reference[axis] for axis in axes if reference}


def _name_of(value: Any, values: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of an axis's value that is given by name or, as in a list of values, as itself: 1 for 1.0."""
    value = tuple(value) if isinstance(value, list) else value
    same = (name for name, changes in values.items() if [*changes.values()] == [value])
    return str(value) if str(value) in values else next(same, str(value))


def _combinations(axes: Mapping[str, Mapping[str, Any]], reference: dict[str, str]) -> Iterator[dict[str, str]]:
    """{axis: value's name} of each trial: the reference and what differs from it in one axis, or all combinations."""
    if not reference:
        yield from (dict(zip(axes, names, strict=True)) for names in itertools.product(*axes.values()))
        return
    yield reference
    yield from (reference | {axis: name} for axis in axes for name in axes[axis] if name != reference[axis])


def _closed_loop(path: Path, given: dict[Any, Any]) -> dict[str, Any]:
    if unknown := [key for key in given if key not in CLOSED_LOOP]:
        raise InputError(f"closed_loop of {path} has no key {unknown[0]!r}: its keys are {', '.join(CLOSED_LOOP)}")
    return {
        key: check(given[key], field, f"{path}: closed_loop.{key}") if key in given else field.default
        for key, field in CLOSED_LOOP.items()
    }


def _base(path: Path, base: Any, overrides: Mapping[str, str]) -> ConfigDict:
    if isinstance(base, str):
        return load_config(base, overrides)
    return completed(base, overrides, f"base of {path}")


def _values(path: Path, axis: str, values: Any) -> dict[str, dict[str, Any]]:
    """An axis in its long form: {name: {config key: value}}."""
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, dict | list | tuple | range):
        raise InputError(f"axis {axis!r} of {path} must be a list of values or a dict of named ones")
    if not values:
        raise InputError(f"axis {axis!r} of {path} has no values")
    if isinstance(values, dict):
        if bad := [name for name, changes in values.items() if not isinstance(changes, dict)]:
            raise InputError(f"value {bad[0]!r} of axis {axis!r} of {path} must be a dict of config keys")
        return {
            name: _named(f"value {name!r} of axis {axis!r} of {path}", changes, CONFIG_KEYS)
            for name, changes in _named(f"axis {axis!r} of {path}", values).items()
        }
    if (key := CONFIG_KEYS.get(axis, axis)) not in KEYS:
        near = difflib.get_close_matches(axis, KEYS, 1, 0)[0]
        raise InputError(
            f"axis {axis!r} of {path} is not a config key ({near} is one), so its values must be a dict of named ones"
        )
    values = [check(value, KEYS[key], f"axis {axis!r} of {path}: {key}") for value in values]
    if len({str(value) for value in values}) < len(values):
        raise InputError(f"axis {axis!r} of {path} has a value twice: {values}")
    return _named(f"axis {axis!r} of {path}", {str(value): {key: value} for value in values})


def _named(where: str, given: Mapping[Any, Any], renames: Mapping[str, str] | None = None) -> dict[str, Any]:
    """`given` with its names as text, which the report must be able to show. Raises InputError."""
    named = {(renames or {}).get(str(name), str(name)): value for name, value in given.items()}
    if len(named) < len(given):
        raise InputError(f"{where} has a name twice: {', '.join(map(repr, given))}")
    if unseen := next((name for name in named if not name.isprintable()), None):
        raise InputError(f"{where} has {unseen!r}: a name is one line of characters that can be printed")
    return named


def _changed(base: ConfigDict, changes: list[tuple[str, str, Any]]) -> ConfigDict:
    values, seen = flatten(base.to_dict()), dict[str, str]()
    for axis, key, value in changes:
        if key in seen:
            raise InputError(f"axes {seen[key]!r} and {axis!r} both set {key}")
        seen[key] = axis
        values |= checked({key: value})
    return make_config(values)


def _check(config: ConfigDict, changed: set[str]) -> None:
    """Raises InputError for a config that can't be trained, and for changed keys that would have no effect."""
    grid, problem = config.grid, None
    if grid.kind == "linear" and "grid.num_bins" in changed:
        problem = "a linear grid has 256 bins a dimension, so grid.num_bins would change nothing"
    elif grid.kind == "checkpoint" and (config.adapt.embedding or "grid.num_bins" in changed):
        problem = "grid.kind=checkpoint keeps the grid of init, so neither adapt.embedding nor grid.num_bins fits it"
    elif config.loss.target == "none" and "loss.target_weight" in changed:
        problem = "loss.target=none has no weight, so loss.target_weight would change nothing"
    elif config.loss.target != "none" and not config.data.packed:
        problem = f"loss.target={config.loss.target} needs packed recordings, and data.packed is empty"
    elif config.model.depth_source == "zoedepth" and not config.init:
        problem = (
            "model.depth_source=zoedepth takes the depth model of init, and init is empty: its depth would be random"
        )
    if problem:
        raise InputError(problem)
    check_together(config)
    make_setup(config, _grid(config))
    check_patterns(make_setup(config, uniform_grid((1,) * 6)))


def _grid(config: ConfigDict) -> ActionTokenizer:
    """A grid of the config's size, if that is known in advance."""
    return linear_grid() if config.grid.kind == "linear" else uniform_grid(config.grid.num_bins)


def _check_files(config: ConfigDict) -> None:
    """Raises InputError for a missing file, or if the checkpoint in `init` can't be adapted to the grid."""
    data, problem = config.data.to_dict(), None
    depth = config.model.depth_source == "dataset"
    entries = () if data["packed"] else make_entries(DataConfig.from_config(config.data), depth)
    init = config.init and find_checkpoint(config.init, "init")
    if init and not exists(init):
        problem = f"init is {config.init}, which does not exist"
    elif lacking := [path for path in DataConfig.from_config(config.data).packed_files if not is_file(to_path(path))]:
        problem = f"data.packed names {lacking[0]}, which does not exist"
    elif missing := [entry.path for entry in entries if not exists(to_path(entry.path))]:
        problem = f"data.datasets has {missing[0]}, which does not exist"
        if data["precomputed_depth"]:
            problem += ": make it with `spatialvla-jax data depth`, or leave the trials that need it out with --only"
    if problem:
        raise InputError(problem)
    if not config.init or config.grid.kind == "checkpoint" or is_paligemma(init):
        return
    start = read_checkpoint(init)
    old = start.processor.grid if start.processor else None
    # A grid fitted to the data may equal the checkpoint's if the bin counts agree.
    same_bins = isinstance(old, ActionGrid) and old.num_bins == tuple(config.grid.num_bins)
    if not (same_bins and config.grid.kind == "gaussian"):
        adapt_checkpoint(config.init, start, _grid(config), **config.adapt.to_dict())


def _check_distinct(path: Path, trials: list[Trial]) -> None:
    names, configs = set[str](), dict[str, str]()
    for trial in trials:
        if trial.name in names:
            raise InputError(f"{path}: two trials would be named {trial.name}; rename values or seeds")
        config = json.dumps(trial.config.to_dict(), sort_keys=True)
        if (other := configs.setdefault(config, trial.name)) != trial.name:
            raise InputError(f"{path}: trials {other} and {trial.name} have the same config")
        names.add(trial.name)
        if len(trial.name.encode()) > 200:
            raise InputError(f"{path}: a trial's name is too long for a directory, {trial.name[:80]}…: name its values")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+]+", "-", text).strip("-")
