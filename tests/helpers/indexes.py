"""The index of one split of one dataset, by the names that tests use."""

import os
from pathlib import Path
from typing import Any

from spatialvla_jax.data.index import Faults, Index, find_source, make_index
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
    return make_index(find_source(name, path, spec, split), cache_dir, progress, faults or Faults(), **options)
