"""Builds indexes and statistics of whole mixtures with Apache Beam.

Each element of the pipeline is one shard: a worker reads its records once and writes its part of the index. Then the
parts are merged and statistics computed by the same code that a run uses for its own data. Index, statistics and grid
are therefore bit-identical for any runner and any number of workers.
"""

import functools
import json
import logging
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from spatialvla_jax.actions import pool_gaussians
from spatialvla_jax.actions.grid import VARIABLES
from spatialvla_jax.data.config import DataConfig
from spatialvla_jax.data.features import find_fields
from spatialvla_jax.data.index import Index, Source
from spatialvla_jax.data.index_cache import complete_indexes, find_indexes, find_source, read_shard
from spatialvla_jax.data.oxe.spec import DatasetSpec, meaning
from spatialvla_jax.data.resolve_datasets import make_entries
from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.utils.atomic import PREFIX, replacing, write_json
from spatialvla_jax.utils.dataset_keys import find_key
from spatialvla_jax.utils.progress import warn
from spatialvla_jax.utils.storage import AnyPath, is_url, list_names, read_bytes, remove, to_path
from spatialvla_jax.utils.tables import text_table

# Our name → Beam's name. Beam's own DirectRunner first tries to download another one, Prism.
RUNNERS = {
    "DirectRunner": "apache_beam.runners.portability.fn_api_runner.FnApiRunner",
    "FlinkRunner": "FlinkRunner",
    "DataflowRunner": "DataflowRunner",
    "SparkRunner": "SparkRunner",
}
Progress = Callable[[int, int], None]


class _Shard(NamedTuple):
    """What a worker needs to read its part of an index."""

    name: str
    path: str  # the dataset's version directory
    spec: DatasetSpec
    split: str
    number: int
    out: AnyPath


def make_indexes(
    data: DataConfig,
    splits: Sequence[str],
    folder: AnyPath,
    runner: str = "DirectRunner",
    options: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Index]:
    """The index of each of the config's datasets for these splits, split by split. Missing ones are made and stored in
    `folder`, a run's `data.cache_dir`.

    `runner` is a key of `RUNNERS`, `options` are its own arguments. All workers must reach `folder` and the data under
    the same paths. `progress(shards done, shards)` is only called by the DirectRunner, whose workers are threads of
    this process. Raises InputError for problems with config or data, and if the limit in `data.faults` is exceeded.
    """
    wanted = [(entry, entry.split(split)) for split in splits for entry in make_entries(data)]
    sources = [find_source(entry.name, entry.path, entry.spec, split) for entry, split in wanted]
    parts = folder / f"{PREFIX}parts-{secrets.token_hex(4)}"
    shards: list[_Shard] = []
    kept = find_indexes(sources, folder)
    for (entry, split), source, one in zip(wanted, sources, kept, strict=True):
        find_fields(source.name, source.builder, source.spec, source.made_from["action_dim"])
        if one is None:
            for number in range(len(source.shards)):
                out = parts / f"{source.folder}-{number}"
                shards.append(_Shard(entry.name, str(entry.path), entry.spec, split, number, out))

    def read(source: Source, number: int) -> bytes:
        return read_bytes(parts / f"{source.folder}-{number}")

    try:
        if shards:
            if not is_url(parts):
                parts.mkdir(parents=True)
            _run(shards, runner, options, progress)
        indexes = complete_indexes(sources, kept, folder, faults=data.faults, read=read)
    finally:
        if not is_url(parts):
            shutil.rmtree(parts, ignore_errors=True)
        else:
            try:
                for name in list_names(parts):
                    remove(parts / name)
            except (InputError, StorageError) as error:
                warn(f"{error}; {parts} is no longer needed")
    for first in range(0, len(indexes), len(indexes) // len(splits)):
        group = indexes[first : first + len(indexes) // len(splits)]
        data.faults.check(sum((Counter(index.skipped) for index in group), Counter()), "episodes of a split")
    return indexes


def _run(shards: list[_Shard], runner: str, options: Sequence[str], progress: Progress | None) -> None:
    """Write the parts of the index for these shards."""
    beam = _beam()
    from apache_beam.options.pipeline_options import PipelineOptions

    done, run = iter(range(1, len(shards) + 1)), shards[0].out.parent.name
    _LISTENERS[run] = (lambda: progress(next(done), len(shards))) if progress else lambda: None
    try:
        # Beam's type check cannot read jaxtyping's annotations.
        flags = [f"--runner={RUNNERS[runner]}", "--no_pipeline_type_check", *options]
        try:
            pipeline = beam.Pipeline(options=PipelineOptions(flags))
        except ValueError as error:
            raise InputError(f"{runner} does not start: {' '.join(str(error).split())}") from error
        _ = pipeline | "shards" >> beam.Create(shards) | beam.Reshuffle() | "read" >> beam.Map(_write_part)
        pipeline.run().wait_until_finish()
    finally:
        del _LISTENERS[run]


# Called after each shard read in this process; keys are the runs' temporary folders. Beam copies the arguments that it
# passes to workers, so a callback among them would be a copy too.
_LISTENERS: dict[str, Callable[[], None]] = {}


def _write_part(shard: _Shard) -> None:
    source = _find_source(shard.name, shard.path, shard.spec, shard.split)
    with replacing(shard.out) as temporary:  # a runner may read a shard twice concurrently
        temporary.write_bytes(read_shard(source, shard.number))
    _LISTENERS.get(shard.out.parent.name, lambda: None)()


_find_source = functools.lru_cache(maxsize=64)(find_source)


def _beam() -> Any:
    try:
        logging.disable(logging.WARNING)  # it warns about Google clients that are not needed here
        import apache_beam
    except ImportError as error:
        raise InputError("the pipeline needs Apache Beam: pip install 'spatialvla-jax[beam]'") from error
    finally:
        logging.disable(logging.NOTSET)
    return apache_beam


def compute_stats(
    data: DataConfig,
    exclude: Sequence[str],
    out: str,
    runner: str = "DirectRunner",
    options: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write and return the statistics of the config's datasets:

    split        the split that they describe
    statistics   {dataset: see `action_statistics`}
    gaussians    {dataset: {variable of the grid: [mu, sigma]}} of normalised actions
    mixture      {"datasets": those not in `exclude`, "gaussians": pooled over all their frames}; None if there are none
    skipped      {dataset: {reason: number of skipped episodes}}
    specs        {dataset: `meaning` of its spec}

    Computed from the datasets' indexes, which stay in `data.cache_dir`. For arguments and errors see `make_indexes`.
    """
    indexes = make_indexes(data, [data.split], data.cache_folder, runner, options, progress)
    result: dict[str, Any] = {
        "split": data.split,
        "statistics": {index.name: index.statistics for index in indexes},
        "gaussians": {index.name: named_gaussians(np.asarray(index.gaussians)) for index in indexes},
        "skipped": {index.name: dict(sorted(index.skipped.items())) for index in indexes},
        "specs": {index.name: meaning(index.spec) for index in indexes},
    }
    fitted = [index.name for index in indexes if find_key(index.name, exclude) is None]
    mixture = {"datasets": fitted, "gaussians": named_gaussians(pooled(result, fitted))} if fitted else None
    result |= {"mixture": mixture}
    write_json(out, result)
    return result


def named_gaussians(gaussians: Float[np.ndarray, "6 2"]) -> dict[str, list[float]]:
    return {variable: row.tolist() for variable, row in zip(VARIABLES, gaussians, strict=True)}


def pooled(stats: Mapping[str, Any], names: Sequence[str]) -> Float[np.ndarray, "6 2"]:
    """f64[6, 2] (mu, sigma) of several of the file's datasets together, all frames counting equally: the result of
    `fit_gaussians` on all their normalised actions. Raises InputError for an unknown dataset."""
    keys = {name: find_key(name, stats["gaussians"]) for name in names}
    if missing := [name for name, key in keys.items() if key is None]:
        raise InputError(f"The statistics know {', '.join(stats['gaussians'])}, but not the dataset {missing[0]!r}")
    return pool_gaussians(
        [np.asarray([stats["gaussians"][key][variable] for variable in VARIABLES]) for key in keys.values()],
        [stats["statistics"][key]["num_transitions"] for key in keys.values()],
    )


def index_table(indexes: Sequence[Index]) -> str:
    """The indexes of `make_indexes` as a text table."""
    rows = [["dataset", "split", "episodes", "left out", "frames", "MB"]]
    for index in indexes:
        counts = f"{index.num_episodes:,}", f"{sum(index.skipped.values()):,}", f"{index.num_frames:,}"
        size = sum(array.nbytes for array in index.arrays.values()) / 1e6
        rows.append([index.name, index.made_from["split"], *counts, f"{size:,.1f}"])
    return text_table(rows)


def table(stats: Mapping[str, Any]) -> str:
    """The result of `compute_stats` as text."""
    fitted = stats["mixture"]["datasets"] if stats["mixture"] else []
    rows = [["dataset", "episodes", "left out", "frames", "in the grid's fit"]]
    for name, entry in stats["statistics"].items():
        skipped = sum(stats["skipped"][name].values())
        counts = [f"{entry['num_trajectories']:,}", f"{skipped:,}", f"{entry['num_transitions']:,}"]
        rows.append([name, *counts, "yes" if name in fitted else "no"])
    lines = [text_table(rows)]
    if stats["mixture"]:
        gaussians = stats["mixture"]["gaussians"].items()
        lines.append("grid: " + ", ".join(f"{name} {mu:.4f} ± {sigma:.4f}" for name, (mu, sigma) in gaussians))
    return "\n".join(lines)


def load_stats(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that `compute_stats` wrote. Raises InputError naming it if it is missing or something else."""
    try:
        stats = json.loads(read_bytes(to_path(path)))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable JSON file of `spatialvla-jax stats`: {error}") from error
    if not isinstance(stats, dict) or not {"statistics", "gaussians"} <= set(stats):
        raise InputError(f"{path} is not a file of `spatialvla-jax stats`: that has 'statistics' and 'gaussians'")
    return stats
