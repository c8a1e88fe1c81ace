"""What a sweep file means: one trial for every combination of its axes' values and seeds, checked before any runs.

All combinations with the first seed come before those with the next: a sweep that is cut short has the whole table, and
processes beside each other compile different programs, which the other seeds' trials then find.

A sweep file has `get_sweep()`, which returns

    {
        "base": "demo",                                # a config file by name or path, or a config
        "axes": {
            "model.depth_source": ["dataset", "none"],        # a config key and its values
            "grid": {"coarse": {"grid.num_bins": (8, 16, 4, 8, 8, 8)}, "fine": {}},  # or values with names
        },
        "seeds": [0, 1],
        "keep_checkpoints": False,                     # True where it is left out
    }
"""

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from spatialvla_jax.actions import ActionGrid, ActionTokenizer, linear_grid, uniform_grid
from spatialvla_jax.checkpoints import read_checkpoint
from spatialvla_jax.checkpoints.mapping import param_shapes, unflatten
from spatialvla_jax.checkpoints.paligemma import is_paligemma
from spatialvla_jax.checkpoints.regrid import adapt_checkpoint
from spatialvla_jax.config import (
    call_function,
    check_post_training,
    completed,
    default_config,
    find_config,
    flatten,
    load_config,
    set_keys,
)
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.lora import adapter_shapes
from spatialvla_jax.models.presets import CHOICES as MODEL_CHOICES
from spatialvla_jax.training.optimizer import split_frozen
from spatialvla_jax.training.setup import make_setup

KEYS = ("base", "axes", "seeds", "keep_checkpoints")
CHOICES = {
    "grid.kind": ("gaussian", "uniform", "linear", "checkpoint"),
    **{f"model.{field}": choices for field, choices in MODEL_CHOICES.items()},
}


@dataclass(frozen=True)
class Trial:
    """`name` is its directory's; `values` is {axis: name of its value}."""

    name: str
    values: dict[str, str]
    seed: int
    config: ConfigDict

    @property
    def digest(self) -> str:
        """Of its config."""
        text = json.dumps(self.config.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sweep:
    """`axes` is {axis: names of its values}, in the file's order, which is also that of the report."""

    name: str
    axes: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    keep_checkpoints: bool
    trials: tuple[Trial, ...]

    def select(self, pattern: str) -> tuple[Trial, ...]:
        """The trials whose names match a shell pattern. Raises InputError for none."""
        if chosen := tuple(trial for trial in self.trials if fnmatchcase(trial.name, pattern)):
            return chosen
        raise InputError(f"no trial of sweep {self.name} matches {pattern!r}; the first is {self.trials[0].name}")


def load_sweep(path: str | Path, overrides: Mapping[str, str] | None = None, only: str = "*") -> Sweep:
    """The sweep of a file, given as for `find_config`, the keys `overrides` of its base config changed first.

    Raises InputError for whatever would make a trial fail that can be known without data; files are looked for where
    a trial's name matches the shell pattern `only`.
    """
    path = find_config(path)
    given = call_function(path, "get_sweep")
    if not isinstance(given, Mapping) or not {"base", "axes", "seeds"} <= given.keys() <= set(KEYS):
        raise InputError(f"get_sweep() of {path} must return a dict with the keys base, axes, seeds, keep_checkpoints")
    base = _base(path, given["base"], overrides or {})
    axes = {axis: _values(path, axis, values) for axis, values in given["axes"].items()}
    for axis, values in axes.items():
        for key in sorted({key for changes in values.values() for key in changes}):
            if key in (overrides or {}) or key == "seed":
                whose = f"axis {axis!r} of {path}" if key != "seed" else "the seeds"
                raise InputError(f"config key {key} is set by {whose} and can't be set otherwise as well")
    seeds = tuple(given["seeds"])
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise InputError(f"seeds of {path} must be integers from 0 on, and at least one, got {list(seeds)}")

    trials = []
    for names in itertools.product(*axes.values()):
        chosen = dict(zip(axes, names, strict=True))
        changes = [(axis, key, value) for axis, name in chosen.items() for key, value in axes[axis][name].items()]
        label = "_".join(f"{_slug(axis.rsplit('.')[-1])}-{_slug(name)}" for axis, name in chosen.items())
        named = [(seed, f"{label}_seed-{seed}".lstrip("_")) for seed in seeds]
        try:
            config = _changed(base, changes)
            _check(config, {key for _, key, _ in changes})
            if any(fnmatchcase(name, only) for _, name in named):
                _check_files(config)
        except InputError as error:
            raise InputError(f"{path}: trial {label or 'of the base'}: {error}") from None
        values = config.to_dict()
        trials += [Trial(name, chosen, seed, ConfigDict(values | {"seed": seed})) for seed, name in named]
    trials.sort(key=lambda trial: seeds.index(trial.seed))
    _check_distinct(path, trials)
    keep = bool(given.get("keep_checkpoints", True))
    return Sweep(path.stem, {axis: tuple(names) for axis, names in axes.items()}, seeds, keep, tuple(trials))


def _base(path: Path, base: Any, overrides: Mapping[str, str]) -> ConfigDict:
    if isinstance(base, str):
        return load_config(base, overrides)
    if not isinstance(base, ConfigDict):
        raise InputError(f"base of {path} must be a config file or a config, got {type(base).__name__}")
    return completed(base, overrides)


def _values(path: Path, axis: str, values: Any) -> dict[str, dict[str, Any]]:
    """An axis in its long form: {name: {config key: value}}."""
    if not isinstance(values, Mapping | Sequence) or isinstance(values, str):
        raise InputError(f"axis {axis!r} of {path} must be a list of values or a dict of named ones")
    if not values:
        raise InputError(f"axis {axis!r} of {path} has no values")
    if isinstance(values, Mapping):
        if bad := [name for name, changes in values.items() if not isinstance(changes, Mapping)]:
            raise InputError(f"value {bad[0]!r} of axis {axis!r} of {path} must be a dict of config keys")
        return {str(name): dict(changes) for name, changes in values.items()}
    if axis not in (known := flatten(default_config().to_dict())):
        near = difflib.get_close_matches(axis, known, 1, 0)[0]
        raise InputError(
            f"axis {axis!r} of {path} is no config key ({near} is one), so its values must be a dict of named ones"
        )
    if len({str(value) for value in values}) < len(values):
        raise InputError(f"axis {axis!r} of {path} has a value twice: {list(values)}")
    return {str(value): {axis: value} for value in values}


def _changed(base: ConfigDict, changes: list[tuple[str, str, Any]]) -> ConfigDict:
    config = ConfigDict(base.to_dict())
    seen: dict[str, str] = {}
    for axis, key, value in changes:
        if key in seen:
            raise InputError(f"axes {seen[key]!r} and {axis!r} both set {key}")
        seen[key] = axis
        set_keys(config, {key: value})
    return config


def _check(config: ConfigDict, changed: set[str]) -> None:
    """Raises InputError for a config that can't be trained, and for a change that would do nothing."""
    grid, train, flat, problem = config.grid, config.train, flatten(config.to_dict()), None
    if wrong := [key for key, choices in CHOICES.items() if flat[key] not in choices]:
        problem = f"{wrong[0]} is {flat[wrong[0]]!r}; choose one of {', '.join(CHOICES[wrong[0]])}"
    elif wrong := [key for key in ("steps", "batch_size", "grad_accum_steps") if train[key] < 1]:
        problem = f"train.{wrong[0]} must be at least 1, got {train[wrong[0]]}"
    elif len(grid.num_bins) != 6 or not all(type(n) is int and n > 0 for n in grid.num_bins):
        problem = f"grid.num_bins must be six numbers, got {grid.num_bins}"
    elif grid.kind == "linear" and "grid.num_bins" in changed:
        problem = "a linear grid has 256 bins a dimension, so grid.num_bins would change nothing"
    elif grid.kind == "checkpoint" and (config.adapt.embedding or "grid.num_bins" in changed):
        problem = "grid.kind=checkpoint keeps the grid of init, so neither adapt.embedding nor grid.num_bins fits it"
    elif config.model.depth_source == "zoedepth" and not config.init:
        problem = (
            "model.depth_source=zoedepth takes the depth model of init, and init is empty: its depth would be random"
        )
    if problem:
        raise InputError(problem)
    check_post_training(config)
    setup = make_setup(config, _grid(config))
    # Patterns are about paths alone, so one grid does for all.
    shapes = param_shapes(make_setup(config, uniform_grid((1,) * 6)).model.config)
    lora = setup.adapters
    adapters = adapter_shapes(shapes, lora.rank, lora.targets) if lora else {}
    split_frozen(unflatten(shapes | {f"lora/{path}": shape for path, shape in adapters.items()}), setup.frozen)


def _grid(config: ConfigDict) -> ActionTokenizer:
    """Of the size that the config's will have, where that is known."""
    return linear_grid() if config.grid.kind == "linear" else uniform_grid(config.grid.num_bins)


def _check_files(config: ConfigDict) -> None:
    """Raises InputError for a file that is missing, and for a grid that the checkpoint in `init` can't be taken to."""
    data, problem = config.data.to_dict(), None
    paths = [entry["path"] for entry in data["datasets"] if "path" in entry and not data["packed"]]
    if config.init and not Path(config.init).exists():
        problem = f"init is {config.init}, which does not exist"
    elif data["packed"] and not Path(data["packed"]).is_file():
        problem = f"data.packed is {data['packed']}, which does not exist"
    elif missing := [path for path in paths if not Path(path).exists()]:
        problem = f"data.datasets has {missing[0]}, which does not exist"
        if data["precomputed_depth"]:
            problem += ": make it with `spatialvla-jax data depth`, or leave the trials that need it out with --only"
    if problem:
        raise InputError(problem)
    if not config.init or config.grid.kind == "checkpoint" or is_paligemma(Path(config.init)):
        return
    start = read_checkpoint(config.init)
    old = start.processor.grid if start.processor else None
    # A grid that is fitted to the data may be the one that the checkpoint has, if its bins are as many.
    as_many = isinstance(old, ActionGrid) and old.num_bins == tuple(config.grid.num_bins)
    if not (as_many and config.grid.kind == "gaussian"):
        adapt_checkpoint(config.init, start, _grid(config), **config.adapt.to_dict())


def _check_distinct(path: Path, trials: list[Trial]) -> None:
    names, configs = set[str](), dict[str, str]()
    for trial in trials:
        if trial.name in names:
            raise InputError(f"{path}: two trials would be named {trial.name}; rename values or seeds")
        if (other := configs.setdefault(trial.digest, trial.name)) != trial.name:
            raise InputError(f"{path}: trials {other} and {trial.name} have the same config")
        names.add(trial.name)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+]+", "-", text).strip("-")
