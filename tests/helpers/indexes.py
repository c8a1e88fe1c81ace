"""Loads the index of one split of one dataset."""

import os
from pathlib import Path
from typing import Any

from spatialvla_jax.data.index import Faults, Index
from spatialvla_jax.data.index_cache import find_source, load_indexes
from spatialvla_jax.data.oxe import DatasetSpec


def load_index(
    name: str,
    path: str | os.PathLike[str],
    spec: DatasetSpec,
    split: str,
    cache_dir: Path,
    progress: Any = None,
    faults: Faults | None = None,
    **options: Any,
) -> Index:
    source = find_source(name, path, spec, split)
    (index,) = load_indexes([source], cache_dir, progress, faults or Faults(), **options)
    return index
