"""The `data` part of a config, typed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from spatialvla_jax.data.index import Faults
from spatialvla_jax.data.index_cache import LOCAL_CACHE
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.schema import Field, check
from spatialvla_jax.utils.storage import AnyPath, as_path

ENTRY = Field({}, "{name, spec, path, weight, splits}")


@dataclass(frozen=True)
class PromptConfig:
    length: int = 52  # tokens, <bos> and newline included
    template: str = "{instruction}"
    model: str = ""  # path of a SentencePiece model; empty: one is trained on the instructions
    vocab_size: int = 256  # of the trained one, at most


@dataclass(frozen=True)
class DataConfig:
    """Which data there is and how it is read. `from_config` makes it from a config's `data` part."""

    mixture: str = ""  # of the catalogue; `root` holds its datasets, each in the newest of its versions
    root: str = ""
    # Further ones: {"name", "path" (version directory), "spec" (catalogue name or fields), "weight" (1.0), "splits"
    # ({split: what this dataset has in its place})}.
    datasets: tuple[Mapping[str, Any], ...] = ()
    # A file of `data pack`, in the place of mixture and datasets, with their tokenizer. It is read without TensorFlow.
    packed: str = ""
    # {dataset: the fraction of the run's steps after which it gives no more samples}
    drop: Mapping[str, float] = field(default_factory=dict)
    split: str = "train"  # or a part of one, "train[:95%]"; what statistics, tokenizer and training batches are made of
    precomputed_depth: bool = False  # the depth that `data depth` has stored instead of the datasets' own
    statistics: str = ""  # a file of `spatialvla-jax stats`; empty: made from the data
    balance: bool = True  # multiply weights by the datasets' frame counts
    faults: Faults = field(default_factory=Faults)  # of a split's episodes and, while streaming, of a process's frames
    read_block: int = 0  # consecutive frames read at once, see mixture.py; 0: one on a disk, chosen for a bucket
    shuffle_frames: int = 100_000  # shuffled together where `read_block` is above 1
    memory_gb: float = 8.0  # of a process, for data: queues get shallower for it; too little is an error
    cache_dir: str = ""  # of the indexes; empty: ~/.cache/spatialvla_jax
    workers: int = 0  # threads that decode; 0: one a core
    prompt: PromptConfig = PromptConfig()

    @property
    def cache_folder(self) -> AnyPath:
        """Where the indexes are kept. Raises InputError."""
        return as_path(self.cache_dir or LOCAL_CACHE, "the default of config key data.cache_dir")

    @property
    def local_cache(self) -> Path:
        """Where copies of what lies in buckets are kept: `cache_folder`, the default where that is a URL."""
        folder = self.cache_folder
        return folder if isinstance(folder, Path) else DataConfig().local_cache

    @classmethod
    def from_config(cls, config: "Mapping[str, Any] | ConfigDict | DataConfig") -> "DataConfig":
        """Keys that are missing, None or "" have their defaults. Raises InputError for a key that does not exist."""
        if isinstance(config, DataConfig):
            return config
        plain: Any = config
        plain = plain.to_dict() if isinstance(plain, ConfigDict) else plain
        given = {key: value for key, value in plain.items() if value not in (None, "")}
        given = _expand(given, "config key data.", "root", "packed", "statistics", "cache_dir")
        entries = [check(entry, ENTRY, "an entry of data.datasets") for entry in given.get("datasets", ())]
        given["datasets"] = tuple(
            _expand(entry, f"dataset {entry.get('name')!r} in data.datasets: ", "path") for entry in entries
        )
        for key, kind in (("faults", Faults), ("prompt", PromptConfig)):
            values = {name: value for name, value in given.get(key, {}).items() if value is not None}
            given[key] = _make(kind, _expand(values, f"config key data.{key}.", "model"), f"data.{key}")
        return _make(cls, given, "data")


def _expand(values: Mapping[str, Any], where: str, *keys: str) -> dict[str, Any]:
    """`values` with ~ expanded in the paths `keys`. Raises InputError for a URL."""
    paths = {key: values[key] for key in keys if isinstance(values.get(key), str | Path) and values[key]}
    return {**values, **{key: str(as_path(path, where + key)) for key, path in paths.items()}}


def _make(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    known = [one.name for one in fields(kind)]
    if unknown := sorted(set(values) - set(known)):
        raise InputError(f"config key {where}.{unknown[0]} does not exist; there are {', '.join(known)}")
    return kind(**values)
