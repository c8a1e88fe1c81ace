"""Statistics of whole mixtures as an Apache Beam pipeline, and the file that it leaves (stats.json).

The stored data is read once: one element is one shard, read from its first byte to its last, of which its actions
remain (28 bytes a frame). They are summed up (`ActionSummary`), and kept by a reshuffle until all datasets' quantiles
are known, which the grid's Gaussians need: the angles of normalised translations depend on three dimensions together,
so no summary made before normalising would do. The second pass is over those kept actions alone.

Sums are exact integers and quantile sketches merge alike in any order, so the file does not depend on the runner.
"""

import functools
import json
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from spatialvla_jax.actions import DIMENSIONS, grid_variables, pool_gaussians
from spatialvla_jax.actions.grid import VARIABLES
from spatialvla_jax.actions.normalization import normalize
from spatialvla_jax.data.config import DataConfig
from spatialvla_jax.data.index import Faults
from spatialvla_jax.data.oxe.spec import DatasetSpec, meaning
from spatialvla_jax.data.resolve_datasets import make_entries
from spatialvla_jax.data.rlds import open_rlds, read_episodes, slice_shards
from spatialvla_jax.data.sketch import ActionSummary, Moments
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.dataset_keys import find_key
from spatialvla_jax.utils.tables import text_table

# Our name, Beam's name. Beam's own DirectRunner first tries to download another one, Prism.
RUNNERS = {
    "DirectRunner": "apache_beam.runners.portability.fn_api_runner.FnApiRunner",
    "FlinkRunner": "FlinkRunner",
    "DataflowRunner": "DataflowRunner",
    "SparkRunner": "SparkRunner",
}


class Shard(NamedTuple):
    """One file's part of a split of a dataset."""

    name: str
    path: str  # the dataset's version directory
    spec: DatasetSpec
    file: Path
    numbers: range  # of its episodes
    listed: int  # episodes of the whole file


@dataclass(frozen=True)
class Summary:
    """Of a dataset or a part of it. `fault` is a sentence on the first damaged episode, "" without one."""

    actions: ActionSummary
    skipped: Mapping[str, int]  # episodes left out, by reason
    fault: str = ""

    @classmethod
    def merge(cls, parts: Sequence["Summary"]) -> "Summary":
        return cls(
            ActionSummary.merge([part.actions for part in parts]),
            sum((Counter(part.skipped) for part in parts), Counter()),
            min((part.fault for part in parts if part.fault), default=""),
        )


def find_shards(data: DataConfig) -> list[Shard]:
    """The shards of the training split. Raises InputError for what is missing or misnamed."""
    return [
        Shard(entry.name, str(entry.path), entry.spec, file, numbers, listed)
        for entry in make_entries(data)
        for file, numbers, listed, *_ in slice_shards(open_rlds(entry.path), entry.splits.get(data.split, data.split))
    ]


def compute_stats(
    data: DataConfig,
    exclude: Sequence[str],
    out: str,
    runner: str = "DirectRunner",
    options: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write and return the statistics of the mixture that the config names:

    split        that they are of
    statistics   {dataset: as `action_statistics`}
    gaussians    {dataset: {variable of the grid: [mu, sigma]}} of its normalised actions
    mixture      {"datasets": those not in `exclude`, "gaussians": theirs pooled over all frames}, None without any
    quantile_error  {dataset: bound on the relative error of the numbers that q01 and q99 lie between; 0: exact}
    skipped      {dataset: {reason: episodes left out}}
    specs        {dataset: `meaning` of its spec}

    `runner` is a key of `RUNNERS`, `options` its own arguments. `out` and the data must be reachable under the same
    paths by all workers; `out` may be any path that Beam writes. `progress(shards done, shards)` is called by the
    DirectRunner only, as its workers are threads of this process. Raises InputError for anything wrong with config or
    data, and by the limit of `data.faults`, when nothing is written.
    """
    beam, filesystems = _beam()
    from apache_beam.options.pipeline_options import PipelineOptions

    shards = find_shards(data)
    partial = f"{out}.{uuid.uuid4().hex}.tmp"

    done = iter(range(1, len(shards) + 1))
    _LISTENERS[partial] = (lambda: progress(next(done), len(shards))) if progress else lambda: None
    try:
        # Beam's type check cannot read jaxtyping's annotations.
        flags = [f"--runner={RUNNERS[runner]}", "--no_pipeline_type_check", *options]
        try:
            pipeline = beam.Pipeline(options=PipelineOptions(flags))
        except ValueError as error:
            raise InputError(f"{runner} does not start: {' '.join(str(error).split())}") from error
        read = pipeline | "shards" >> beam.Create(shards) | beam.Reshuffle() | "read" >> beam.Map(_read, partial)
        summaries = (
            read
            | "summarise" >> beam.MapTuple(lambda name, summary, _: (name, summary))
            | "merge summaries" >> beam.CombinePerKey(lambda parts: Summary.merge(list(parts)))
        )
        entries = summaries | "statistics" >> beam.MapTuple(dataset_entry)
        moments = (
            read
            | "actions" >> beam.MapTuple(lambda name, _, actions: (name, actions))
            | "keep actions" >> beam.Reshuffle()
            | "normalise" >> beam.Map(grid_moments, beam.pvalue.AsDict(entries))
            | "merge moments" >> beam.CombinePerKey(lambda parts: Moments.merge(list(parts)))
        )
        _ = (
            pipeline
            | "once" >> beam.Create([partial])
            | "write" >> beam.Map(_write, beam.pvalue.AsDict(entries), beam.pvalue.AsDict(moments))
        )
        pipeline.run().wait_until_finish()
        with filesystems.open(partial) as file:
            collected = json.loads(file.read())
        result = check_collected(collected, [shard.name for shard in shards], data.faults, exclude)
        specs = {shard.name: shard.spec for shard in shards}
        result = {"split": data.split} | result | {"specs": {name: meaning(spec) for name, spec in specs.items()}}
        with filesystems.create(partial) as file:
            file.write((json.dumps(result, indent=2) + "\n").encode())
        filesystems.rename([partial], [out])
    finally:
        del _LISTENERS[partial]
        if filesystems.exists(partial):
            filesystems.delete([partial])
    return result


# Called for every shard that this process has read, by the run's own file: Beam copies what it hands to its workers, so
# that a callback among their arguments would be another one.
_LISTENERS: dict[str, Callable[[], None]] = {}


def _read(shard: Shard, run: str) -> tuple[str, Summary, Float[np.ndarray, "N 7"]]:
    result = read_shard(shard)
    if run in _LISTENERS:
        _LISTENERS[run]()
    return result


def _beam() -> tuple[Any, Any]:
    try:
        logging.disable(logging.WARNING)  # it warns of Google clients that nobody asked for
        import apache_beam
        from apache_beam.io.filesystems import FileSystems
    except ImportError as error:
        raise InputError("the statistics pipeline needs Apache Beam: pip install 'spatialvla-jax[beam]'") from error
    finally:
        logging.disable(logging.NOTSET)
    return apache_beam, FileSystems


@functools.lru_cache(maxsize=64)
def _open(path: str) -> Any:
    return open_rlds(path)


def read_shard(shard: Shard) -> tuple[str, Summary, Float[np.ndarray, "N A"]]:
    """(dataset, summary, canonical actions) of a shard. Faults are data here: a runner would retry an exception, and
    bury its sentence in a traceback."""
    skipped: Counter[str] = Counter()
    sentences: list[str] = []

    def skip(reason: str, sentence: str) -> None:
        skipped[reason] += 1
        sentences.extend([sentence] if sentence else [])

    actions = [np.empty((0, len(DIMENSIONS)), np.float32)]
    try:
        name, path, spec, file, numbers, listed = shard
        for episode in read_episodes(name, _open(path), file, numbers, spec, skip, listed=listed):
            if len(episode["step"]):
                actions.append(episode["action"])
    except InputError as error:  # of the whole dataset, not of an episode
        skip("invalid", str(error))
    together = np.concatenate(actions)
    summary = ActionSummary.of(together, len(actions) - 1)
    return shard.name, Summary(summary, skipped, sentences[0] if sentences else ""), together


def dataset_entry(name: str, summary: Summary) -> tuple[str, dict[str, Any]]:
    """(dataset, what the file says about it). A dataset without actions has no statistics."""
    usable = summary.actions.moments.count > 0
    return name, {
        "statistics": summary.actions.statistics() if usable else None,
        "quantile_error": summary.actions.quantile_error,
        "skipped": dict(sorted(summary.skipped.items())),
        "fault": summary.fault,
    }


def grid_moments(
    kept: tuple[str, Float[np.ndarray, "N A"]], entries: Mapping[str, Mapping[str, Any]]
) -> tuple[str, Moments]:
    """(dataset, some canonical actions) to (dataset, moments of theta, phi, r, roll, pitch, yaw, normalised)."""
    name, actions = kept
    if not len(actions):
        return name, Moments(0, (0,) * 6, (0,) * 6)
    return name, Moments.of(grid_variables(normalize(actions, entries[name]["statistics"]["action"])))


def _write(path: str, entries: Mapping[str, dict[str, Any]], moments: Mapping[str, Moments]) -> None:
    _, filesystems = _beam()
    for name, entry in entries.items():
        if entry["statistics"]:
            entry["gaussians"] = named_gaussians(np.stack(moments[name].mean_std(), -1))
    with filesystems.create(path) as file:
        file.write(json.dumps(entries).encode())


def check_collected(
    entries: Mapping[str, Mapping[str, Any]], names: Sequence[str], faults: Faults, exclude: Sequence[str]
) -> dict[str, Any]:
    """The file's content from each dataset's `dataset_entry`, in the config's order. Raises InputError for faults."""
    names = list(dict.fromkeys(names))
    if faults.policy == "fail":
        for name in names:
            if entries[name]["fault"]:
                raise InputError(entries[name]["fault"])
    faults.check(sum((Counter(entries[name]["skipped"]) for name in names), Counter()), "episodes")
    for name in names:
        if not entries[name]["statistics"]:
            raise InputError(f"Dataset {name!r} has no episode to use (left out: {entries[name]['skipped']})")
    result: dict[str, Any] = {
        key: {name: entries[name][key] for name in names}
        for key in ("statistics", "gaussians", "quantile_error", "skipped")
    }
    fitted = [name for name in names if find_key(name, exclude) is None]
    mixture = {"datasets": fitted, "gaussians": named_gaussians(pooled(result, fitted))} if fitted else None
    return result | {"mixture": mixture}


def named_gaussians(gaussians: Float[np.ndarray, "6 2"]) -> dict[str, list[float]]:
    return {variable: row.tolist() for variable, row in zip(VARIABLES, gaussians, strict=True)}


def pooled(stats: Mapping[str, Any], names: Sequence[str]) -> Float[np.ndarray, "6 2"]:
    """The Gaussians (mu, sigma) of some of the file's datasets together, every frame counting the same, which is what
    `fit_gaussians` gives on all their normalised actions. Raises InputError for a dataset that it lacks."""
    keys = {name: find_key(name, stats["gaussians"]) for name in names}
    if missing := [name for name, key in keys.items() if key is None]:
        raise InputError(f"The statistics know {', '.join(stats['gaussians'])}, but not the dataset {missing[0]!r}")
    return pool_gaussians(
        [np.asarray([stats["gaussians"][key][variable] for variable in VARIABLES]) for key in keys.values()],
        [stats["statistics"][key]["num_transitions"] for key in keys.values()],
    )


def table(stats: Mapping[str, Any]) -> str:
    """What `compute_stats` found, for a reader."""
    fitted = stats["mixture"]["datasets"] if stats["mixture"] else []
    rows = [["dataset", "episodes", "left out", "frames", "quantiles", "in the grid's fit"]]
    for name, entry in stats["statistics"].items():
        error, skipped = stats["quantile_error"][name], sum(stats["skipped"][name].values())
        accuracy = f"within {error:.1e}" if error else "exact"
        counts = [f"{entry['num_trajectories']:,}", f"{skipped:,}", f"{entry['num_transitions']:,}"]
        rows.append([name, *counts, accuracy, "yes" if name in fitted else "no"])
    lines = [text_table(rows)]
    if stats["mixture"]:
        gaussians = stats["mixture"]["gaussians"].items()
        lines.append("grid: " + ", ".join(f"{name} {mu:.4f} ± {sigma:.4f}" for name, (mu, sigma) in gaussians))
    return "\n".join(lines)


def load_stats(path: str | Path) -> dict[str, Any]:
    """A file that `compute_stats` wrote. Raises InputError naming it when it is missing or something else."""
    try:
        stats = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable JSON file of `spatialvla-jax stats`: {error}") from error
    if not isinstance(stats, dict) or not {"statistics", "gaussians"} <= set(stats):
        raise InputError(f"{path} is not a file of `spatialvla-jax stats`: that has 'statistics' and 'gaussians'")
    return stats
