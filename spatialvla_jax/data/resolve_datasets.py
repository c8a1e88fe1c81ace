"""Which datasets a config's `data` part names: those of a mixture of the catalogue, and its own."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spatialvla_jax.data.config import DataConfig
from spatialvla_jax.data.oxe import CATALOGUE, DatasetSpec, make_spec
from spatialvla_jax.data.oxe.spec import with_precomputed_depth
from spatialvla_jax.data.rlds import find_versions
from spatialvla_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Entry:
    """One dataset of a run."""

    name: str
    spec: DatasetSpec
    path: str  # version directory
    weight: float = 1.0
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what this dataset has in a split's place


def make_entries(config: DataConfig) -> tuple[Entry, ...]:
    """The datasets of `mixture` under `root`, then those of `datasets`. Raises InputError for anything wrong with the
    config, and one that names all directories that a mixture lacks."""
    named = _mixture(config.mixture, config.root) if config.mixture else ()
    entries = (*named, *map(_entry, config.datasets))
    if config.precomputed_depth:
        entries = tuple(dataclasses.replace(entry, spec=with_precomputed_depth(entry.spec)) for entry in entries)
    names = [entry.name for entry in entries]
    if not entries:
        raise InputError("The mixture is empty: data.mixture or data.datasets must name at least one dataset")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"data.datasets and data.mixture have a name twice: {', '.join(twice)}")
    for name, until in config.drop.items():
        if name not in names:
            raise InputError(f"data.drop names {name!r}, which is not in the mixture: that has {', '.join(names)}")
        if not 0 < until < 1:
            raise InputError(f"data.drop[{name!r}] is {until}: expected the fraction of the steps, between 0 and 1")
    if len(config.drop) == len(names):
        raise InputError("data.drop names every dataset: one at least must last to the end")
    return entries


def _entry(values: Mapping[str, Any]) -> Entry:
    """One of the config's own datasets."""
    known = [field.name for field in dataclasses.fields(Entry)]
    for key in ("name", "path", "spec"):
        if key not in values:
            raise InputError(f"An entry of data.datasets has no {key!r}: it has {', '.join(sorted(values))}")
    if unknown := sorted(set(values) - set(known)):
        raise InputError(f"Dataset {values['name']!r} in data.datasets has the unknown key {unknown[0]!r}")
    return Entry(**{**values, "spec": make_spec(values["spec"], CATALOGUE, values["name"])})


def _mixture(name: str, root: str) -> list[Entry]:
    from spatialvla_jax.data.oxe.mixtures import MIXTURES

    if name not in MIXTURES:
        raise InputError(f"data.mixture is {name!r}: known are {', '.join(sorted(MIXTURES))}")
    if not root:
        raise InputError(f"data.mixture {name!r} needs data.root, the directory that holds its datasets")
    entries, missing = [], []
    for dataset, weight in MIXTURES[name]:
        spec = make_spec(dataset, CATALOGUE, dataset)
        if path := newest_version(Path(root) / (spec.tfds_name or dataset)):
            entries.append(Entry(dataset, spec, str(path), weight))
        else:
            missing.append(spec.tfds_name or dataset)
    if missing:
        raise InputError(
            f"{root} lacks {len(missing)} of the {len(MIXTURES[name])} datasets of {name!r}: {', '.join(missing)}; "
            "NAME/VERSION/dataset_info.json is expected of each"
        )
    return entries


def newest_version(path: Path) -> Path | None:
    """The newest of a dataset's version directories, or the path itself if it is one; None when there is none."""
    if (path / "dataset_info.json").is_file():
        return path
    versions = find_versions(path)
    return path / versions[-1] if versions else None
