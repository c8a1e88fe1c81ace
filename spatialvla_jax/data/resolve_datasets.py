"""Resolves the datasets in a config's `data` part: those of a catalogue mixture, and the config's own."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from spatialvla_jax.data.config import DataConfig
from spatialvla_jax.data.oxe import CATALOGUE, DatasetSpec, make_spec
from spatialvla_jax.data.oxe.spec import with_precomputed_depth
from spatialvla_jax.data.rlds import find_versions
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.schema import Field, check, check_all
from spatialvla_jax.utils.storage import AnyPath, is_file, to_path


@dataclasses.dataclass(frozen=True)
class Entry:
    """One dataset of a run."""

    name: str
    spec: DatasetSpec
    path: str  # version directory
    weight: float = 1.0
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)  # {the mixture's split: this dataset's}

    def split(self, name: str) -> str:
        """This dataset's split for a split of the mixture."""
        return self.splits.get(name, name)


def _name(text: str) -> str:
    return "" if text and "/" not in text and "\0" not in text else "is not a name: it is empty or has a slash"


def _path(text: str) -> str:
    return "is not a path" if not text or "\0" in text else ""


ENTRY = {
    "name": Field("", "of the dataset, in metrics and statistics", problem=_name),
    "path": Field("", "version directory", problem=_path),
    "weight": Field(1.0, "in the mixture", above=0),
    "splits": Field({}, "{split: what this dataset has in its place}", items=Field("", "")),
}


def make_entries(config: DataConfig, depth: bool = False) -> tuple[Entry, ...]:
    """The datasets of `mixture` under `root`, then those of `datasets`; with `depth`, each must have depth. Raises
    InputError for problems in the config; if a mixture lacks directories, it lists all of them."""
    named = _mixture(config.mixture, config.root) if config.mixture else ()
    entries = (*named, *map(_entry, config.datasets))
    if config.precomputed_depth:
        entries = tuple(dataclasses.replace(entry, spec=with_precomputed_depth(entry.spec)) for entry in entries)
    if depth and (without := [entry.name for entry in entries if entry.spec.depth is None]):
        raise InputError(f"Dataset {without[0]!r} has no depth, which the config requires")
    names = [entry.name for entry in entries]
    if not entries:
        raise InputError("The mixture is empty: data.mixture or data.datasets must name at least one dataset")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"data.datasets and data.mixture have duplicate names: {', '.join(twice)}")
    check_drop(config.drop, names)
    return entries


def check_drop(drop: Mapping[str, float], names: Sequence[str]) -> None:
    """Raises InputError if `data.drop` names other datasets than `names`, or all of them, or has a wrong fraction."""
    for name, until in drop.items():
        if name not in names:
            raise InputError(f"data.drop names {name!r}, which is not in the mixture: that has {', '.join(names)}")
        check(until, Field(0.5, "", above=0, below=1, unit="fraction of the steps"), f"data.drop[{name!r}]")
    if len(drop) == len(names):
        raise InputError("data.drop names every dataset: at least one must remain to the end")


def _entry(values: Mapping[str, Any]) -> Entry:
    """One of the config's own datasets."""
    for key in ("name", "path", "spec"):
        if key not in values:
            raise InputError(f"An entry of data.datasets has no {key!r}: it has {', '.join(map(str, values))}")
    name = check(values["name"], ENTRY["name"], "the name of a dataset in data.datasets")
    spec = make_spec(values["spec"], CATALOGUE, name)
    rest = {key: value for key, value in values.items() if key != "spec"}
    return Entry(**check_all(rest, ENTRY, f"data.datasets[{name!r}]"), spec=spec)


def _mixture(name: str, root: str) -> list[Entry]:
    from spatialvla_jax.data.oxe.mixtures import MIXTURES

    if name not in MIXTURES:
        raise InputError(f"data.mixture is {name!r}: known are {', '.join(sorted(MIXTURES))}")
    if not root:
        raise InputError(f"data.mixture {name!r} needs data.root, the directory that holds its datasets")
    entries, missing = [], []
    specs = [make_spec(dataset, CATALOGUE, dataset) for dataset, _ in MIXTURES[name]]
    folders = [
        to_path(root) / (spec.tfds_name or dataset) for spec, (dataset, _) in zip(specs, MIXTURES[name], strict=True)
    ]
    with ThreadPoolExecutor(len(folders)) as pool:  # hides a bucket's latency
        paths = pool.map(newest_version, folders)
    for (dataset, weight), spec, path in zip(MIXTURES[name], specs, paths, strict=True):
        if path:
            entries.append(Entry(dataset, spec, str(path), weight))
        else:
            missing.append(spec.tfds_name or dataset)
    if missing:
        raise InputError(
            f"{root} lacks {len(missing)} of the {len(MIXTURES[name])} datasets of {name!r}: {', '.join(missing)}; "
            "NAME/VERSION/dataset_info.json is expected in each"
        )
    return entries


def newest_version(path: AnyPath) -> AnyPath | None:
    """The newest of a dataset's version directories, or the path itself if it is one; None if there is none."""
    if is_file(path / "dataset_info.json"):
        return path
    versions = find_versions(path)
    return path / versions[-1] if versions else None
