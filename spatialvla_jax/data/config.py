"""The `data` part of a config, as a typed dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from spatialvla_jax.data.index import Faults
from spatialvla_jax.data.index_cache import LOCAL_CACHE
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.schema import Field, check
from spatialvla_jax.utils.storage import AnyPath, as_path, resolved

ENTRY = Field({}, "{name, spec, path, weight, splits}")


@dataclass(frozen=True)
class PromptConfig:
    length: int = 52  # tokens, including <bos> and newline
    template: str = "{instruction}"
    model: str = ""  # path of a SentencePiece model; empty: train one on the instructions
    vocab_size: int = 256  # of the trained model, at most


@dataclass(frozen=True)
class DataConfig:
    """Which data to use and how to read it. `from_config` makes it from a config's `data` part."""

    mixture: str = ""  # a mixture of the catalogue; `root` holds its datasets, of which the newest versions are used
    root: str = ""
    # More datasets: {"name", "path" (version directory), "spec" (catalogue name or fields), "weight" (1.0), "splits"
    # ({split: this dataset's split to use instead})}.
    datasets: tuple[Mapping[str, Any], ...] = ()
    # A file written by `data pack`, instead of mixture and datasets, with its own tokenizer; needs no TensorFlow. Or
    # several, {file: weight}.
    packed: str | Mapping[str, float] = ""
    # {dataset: the fraction of the run's steps after which it is dropped}
    drop: Mapping[str, float] = field(default_factory=dict)
    split: str = "train"  # or part of one, "train[:95%]"; used for statistics, tokenizer and training batches
    precomputed_depth: bool = False  # use the depth stored by `data depth` instead of the datasets' own
    statistics: str = ""  # a file written by `spatialvla-jax stats`; empty: computed from the data
    balance: bool = True  # multiply weights by the datasets' frame counts
    faults: Faults = field(default_factory=Faults)  # limits per split and, while streaming, per process
    read_block: int = 0  # consecutive frames read at once, see mixture.py; 0: one on a disk, chosen for a bucket
    shuffle_frames: int = 100_000  # number of frames shuffled together if `read_block` is above 1
    memory_gb: float = 8.0  # per process, for data: it bounds the queues; too little is an error
    cache_dir: str = ""  # for indexes; empty: ~/.cache/spatialvla_jax
    workers: int = 0  # decoding threads; 0: one per core
    prompt: PromptConfig = PromptConfig()

    @property
    def packed_files(self) -> dict[str, float]:
        """{packed file: factor on the weights of its datasets}, in the order in which they are given."""
        if isinstance(self.packed, str):
            return {self.packed: 1.0} if self.packed else {}
        return dict(self.packed)

    @property
    def cache_folder(self) -> AnyPath:
        """The folder of the indexes. Raises InputError."""
        return as_path(self.cache_dir or LOCAL_CACHE, "the default of config key data.cache_dir")

    @property
    def local_cache(self) -> Path:
        """The local folder for copies of data from buckets: `cache_folder`, or its default if that is a URL."""
        folder = self.cache_folder
        return folder if isinstance(folder, Path) else DataConfig().local_cache

    @classmethod
    def from_config(cls, config: "Mapping[str, Any] | ConfigDict | DataConfig") -> "DataConfig":
        """Missing keys, None and "" get their defaults. Raises InputError for an unknown key."""
        if isinstance(config, DataConfig):
            return config
        plain: Any = config
        plain = plain.to_dict() if isinstance(plain, ConfigDict) else plain
        given = {key: value for key, value in plain.items() if value not in (None, "")}
        given = _expand(given, "config key data.", "root", "packed", "statistics", "cache_dir")
        if isinstance(packed := given.get("packed"), Mapping):
            paths = {path: as_path(path, "config key data.packed") for path in packed}
            places: dict[Any, str] = {}
            for path, place in paths.items():
                if (other := places.setdefault(resolved(place), path)) != path:
                    raise InputError(f"config key data.packed names one file twice, as {other} and {path}")
            given["packed"] = {str(place): packed[path] for path, place in paths.items()}
        entries = [check(entry, ENTRY, "an entry of data.datasets") for entry in given.get("datasets", ())]
        given["datasets"] = tuple(
            _expand(entry, f"dataset {entry.get('name')!r} in data.datasets: ", "path") for entry in entries
        )
        for key, kind in (("faults", Faults), ("prompt", PromptConfig)):
            values = {name: value for name, value in given.get(key, {}).items() if value is not None}
            given[key] = _make(kind, _expand(values, f"config key data.{key}.", "model"), f"data.{key}")
        return _make(cls, given, "data")


def _expand(values: Mapping[str, Any], where: str, *keys: str) -> dict[str, Any]:
    """`values` with ~ expanded in the paths named by `keys`. Raises InputError for an invalid path."""
    paths = {key: values[key] for key in keys if isinstance(values.get(key), str | Path) and values[key]}
    return {**values, **{key: str(as_path(path, where + key)) for key, path in paths.items()}}


def _make(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    known = [one.name for one in fields(kind)]
    if unknown := sorted(set(values) - set(known)):
        raise InputError(f"config key {where}.{unknown[0]} does not exist; there are {', '.join(known)}")
    return kind(**values)
