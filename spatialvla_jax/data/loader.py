"""Batches from a mixture of RLDS datasets, in an order that is a pure function of seed and step."""

import functools
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from spatialvla_jax.actions import DIMENSIONS
from spatialvla_jax.actions.normalization import normalize
from spatialvla_jax.batch import WIDTHS, Batch
from spatialvla_jax.data import mixture
from spatialvla_jax.data.beam import load_stats
from spatialvla_jax.data.chunks import chunk_actions
from spatialvla_jax.data.config import DataConfig
from spatialvla_jax.data.images import scale_intrinsics
from spatialvla_jax.data.index import Index
from spatialvla_jax.data.oxe.spec import meaning
from spatialvla_jax.data.pack import Packed
from spatialvla_jax.data.reader import Pixels, Rlds, Samples, Source, Split
from spatialvla_jax.data.resolve_datasets import Entry, make_entries
from spatialvla_jax.data.rlds import version_of
from spatialvla_jax.data.statistics import check_spec, difference, find_oddities
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.presets import preset
from spatialvla_jax.text import Tokenizer, train_tokenizer
from spatialvla_jax.utils.dataset_keys import find_key
from spatialvla_jax.utils.distributed import ALONE, Processes
from spatialvla_jax.utils.progress import shard_progress, warn
from spatialvla_jax.utils.storage import is_url, read_bytes, to_path
from spatialvla_jax.utils.tables import text_table

_STATISTICS_ROWS = ("q01", "q99", "min", "max", "mask")
_RELEASE_EVERY = 1024  # samples between releases of the indexes' touched pages


class Episode(NamedTuple):
    """The L frames of an episode, in order."""

    dataset: str
    instruction: str
    frames: Batch
    previous_action: Float[np.ndarray, "L A"]  # normalised, of the step before each frame (at the first: its own)
    steps: Int[np.ndarray, " L"]  # of each frame, from 0; a recording may have images of some steps only
    actions: Float[np.ndarray, "S A"]  # of all steps up to the last frame's, in the dataset's units


class Loader:
    """Batches of NumPy arrays, as a config's `data` part describes them (see `DataConfig`).

    `statistics` ({name: …}) and `tokenizer` come from a checkpoint. Without them, statistics come from the file
    `data.statistics` if set, and otherwise both come from the data. The first loader of a dataset reads it once and
    caches an index, which several `processes` build together; `progress(name, shards done, shards)` is called
    meanwhile. Batches have depth maps if `depth` is true, and the fields in `recorded` ("target", "hand"), which
    recordings in packed files have. Raises InputError for problems in the config or the data.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | ConfigDict | DataConfig,
        *,
        image_size: int,
        action_chunk: int = 4,
        action_dim: int = len(DIMENSIONS),
        depth: bool = False,
        recorded: Sequence[str] = (),
        statistics: Mapping[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        processes: Processes = ALONE,
    ):
        config = DataConfig.from_config(config)
        packed = Packed(config, image_size, depth) if config.packed else None
        entries = packed.entries if packed else make_entries(config, depth)
        self.names = tuple(dict.fromkeys(entry.name for entry in entries))
        self._dataset_ids = np.asarray([self.names.index(e.name) for e in entries], np.int32)  # packed parts share one
        self.image_size, self.depth, self.action_chunk, self.action_dim = image_size, depth, action_chunk, action_dim
        self._recorded, self._paths = tuple(recorded), [entry.path for entry in entries]
        self.extra: dict[str, tuple[int, ...]] = {}  # see `pack.Frames`
        from_file = statistics is None and bool(config.statistics)
        known = (_read_statistics(config.statistics, entries) if from_file else statistics) or {}
        given = {name: find_key(name, known) for name in self.names if known}
        if unknown := [name for name, key in given.items() if key is None]:
            raise InputError(f"The statistics know {', '.join(known)}, but not the dataset {unknown[0]!r}")
        self._source: Source = packed or Rlds(config, entries, image_size, depth, action_dim, progress, processes)
        self.config, self._train_split = config, config.split
        self._indexes: dict[str, tuple[Index, ...]] = {}
        self._splits: dict[str, Split] = {}

        train = self.indexes()
        self.weights = tuple(entry.weight for entry in entries)
        self.mixture = mixture.make_mixture(
            tuple(index.num_frames for index in train),
            self.weights,
            balance=config.balance,
            block=self._source.choose_block(train),
            shuffle=config.shuffle_frames,
        )
        self.statistics = {i.name: known[key] if (key := given.get(i.name)) else i.statistics for i in train}
        for index in train if from_file else ():
            if what := difference(self.statistics[index.name], index.statistics):
                warn(f"the statistics of dataset {index.name!r} in {config.statistics} are of other data: {what}")
        for index in {index.name: index for index in train}.values():
            for sentence in find_oddities(index.name, self.statistics[index.name], index.spec):
                warn(sentence)
        actions = [self.statistics[entry.name]["action"] for entry in entries]
        self._bounds = {row: np.asarray([values[row] for values in actions]) for row in _STATISTICS_ROWS}
        self.tokenizer = tokenizer or (packed and packed.tokenizer) or self._make_tokenizer(train)
        self._split(self._train_split)  # report now if a prompt is too long

    def batches(
        self,
        batch_size: int,
        *,
        start_step: int = 0,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        total_steps: int | None = None,
    ) -> Iterator[Batch]:
        """Endless training batches from step `start_step`: this process's rows of global batches of `batch_size`.

        Step s holds samples s * batch_size … of the mixture's endless sequence, for any number of processes.
        `total_steps` is the number to which the fractions in `data.drop` refer.
        """
        split = self._split(self._train_split)
        rows = mixture.process_rows(batch_size, process_index, process_count)
        phases = self._phases(batch_size, seed, total_steps)
        firsts = [first for first, *_ in phases]

        def samples(step: int, attempt: int = 0) -> np.ndarray:
            first, datasets, drawn = phases[bisect_right(firsts, step) - 1]
            numbers = mixture.replacement_samples((step - first) * batch_size + rows, attempt)
            dataset, frame = mixture.sample_frames(datasets, seed, numbers, drawn)
            return split.starts[dataset] + frame

        windows = self.mixture.window_frames if self.mixture.block > 1 else ()
        return self._stream(split, samples, range(start_step, sys.maxsize), len(rows), windows)

    def epoch(
        self,
        batch_size: int,
        split: str,
        *,
        process_index: int = 0,
        process_count: int = 1,
        frames: int | None = None,
    ) -> Iterator[Batch]:
        """This process's rows of batches with every frame of a split once, in stored order, or with only `frames` of
        them, evenly spaced. The last batch is padded; `valid` bool[B] marks the rows that count."""
        data = self._split(split)
        rows = mixture.process_rows(batch_size, process_index, process_count)
        total = int(data.starts[-1])
        count = min(frames or total, total)
        steps = range(-(-count // batch_size))

        def samples(step: int, attempt: int = 0) -> np.ndarray:
            ids = np.minimum(step * batch_size + rows, count - 1) * total // count
            return (ids + attempt) % total  # an unreadable frame is replaced by another, which is not valid

        for step, batch in zip(steps, self._stream(data, samples, steps, len(rows)), strict=True):
            meant = (step * batch_size + rows < count) & (batch.sample_id == samples(step))
            yield batch.replace(valid=meant)

    def episodes(self, split: str, dataset: str = "", skip: int = 0) -> Iterator[Episode]:
        """Every episode of a split. Episodes with unreadable frames are omitted, if the config allows it."""
        data = self._split(split)
        for number, index in enumerate(data.indexes):
            ends = index.arrays["episode_end"].tolist() if dataset in ("", index.name) else []
            for first, end in list(zip([0, *ends], ends, strict=False))[skip:]:
                ids = data.starts[number] + np.arange(first, end)
                batch = self.frames(ids, split)
                if np.array_equal(np.asarray(batch.sample_id), ids):
                    instruction = index.instructions[index.language(first)]
                    rows, _ = index.action_rows(np.arange(first, end))
                    before = index.arrays["action"][np.maximum(rows - 1, rows[0])]
                    previous = normalize(before, self.statistics[index.name]["action"])
                    actions = index.arrays["action"][rows[0] : rows[-1] + 1]
                    yield Episode(index.name, instruction, batch, previous, rows - rows[0], actions)

    def indexes(self, split: str | None = None) -> tuple[Index, ...]:
        """Every dataset's index of a split (by default the training split)."""
        split = split or self._train_split
        if split not in self._indexes:
            indexes = self._source.index(split)
            for path, index in zip(self._paths, indexes, strict=True):
                if missing := [name for name in self._recorded if name not in index.arrays]:
                    raise InputError(
                        f"{path} has no positions of the {' and '.join(missing)}, which loss.target needs: expected a "
                        "packed file of `record libero` with this version"
                    )
                if (width := index.arrays["action"].shape[1]) != self.action_dim:
                    raise InputError(
                        f"Dataset {index.name!r} has an action {width} wide; {self.action_dim} is expected"
                    )
            self._indexes[split] = indexes
        return self._indexes[split]

    def frames(self, samples: np.ndarray, split: str | None = None) -> Batch:
        """One batch of chosen frames of a split (by default the training split), numbered i64[B] as in sample_id.
        Unreadable frames are replaced by later ones, if the config allows it."""
        data = self._split(split or self._train_split)

        def later(_: int, attempt: int = 0) -> np.ndarray:
            return (samples + attempt) % data.starts[-1]

        return next(self._stream(data, later, range(1), len(samples)))

    def actions(self, split: str | None = None) -> Float[np.ndarray, "N A"]:
        """Normalised actions f32[N, A] of all steps of a split (by default the training split), for fitting a grid."""
        indexes = self.indexes(split)
        return np.concatenate([normalize(i.arrays["action"], self.statistics[i.name]["action"]) for i in indexes])

    @functools.cached_property
    def intrinsics(self) -> dict[str, list[list[float]]]:
        """The camera of every dataset's first training frame, relative to the image: fx and cx divided by its width, fy
        and cy by its height."""
        split = self._split(self._train_split)
        first = self.frames(split.starts[np.unique(self._dataset_ids, return_index=True)[1]]).intrinsics
        relative = scale_intrinsics(first, (self.image_size, self.image_size), (1, 1))
        return dict(zip(self.names, relative.tolist(), strict=True))

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the datasets that were read from a version directory."""
        versions = {index.name: version_of(index.made_from.get("place", "")) for index in self.indexes()}
        return {name: version for name, version in versions.items() if version}

    def num_frames(self, split: str | None = None) -> int:
        """The number of frames in a split (by default the training split)."""
        return sum(index.num_frames for index in self.indexes(split))

    def check_epoch(self, split: str) -> int:
        """→ the number of frames in a split. Raises InputError as `epoch` would: the split is missing or empty, or a
        prompt is too long."""
        self._split(split)
        if not (total := self.num_frames(split)):
            raise InputError(f"the split {split!r} of {', '.join(self.names)} has no frames")
        return total

    def table(self) -> list[dict[str, Any]]:
        """The training mixture, one row per dataset: name, episodes read, used and skipped (by reason), frames and
        weight. "shares" are its effective shares of the samples in each phase. "passes" counts passes over the dataset
        in one epoch (`mixture.epoch_length` samples) of the first phase."""
        phases = [phase for _, phase in self._fractions()]
        return [
            {
                "dataset": index.name,
                "read": index.num_read,
                "episodes": index.num_episodes,
                "skipped": dict(index.skipped),
                "frames": index.num_frames,
                "weight": self.weights[number],
                "shares": [phase.shares[number] for phase in phases],
                "passes": phases[0].epoch_length * phases[0].shares[number] / index.num_frames,
            }
            for number, index in enumerate(self.indexes())
        ]

    def describe(self) -> str:
        """`table` as text."""
        borders = [fraction for fraction, _ in self._fractions()]
        names = ["share", *(f"from {border:.0%}" for border in borders[1:])]
        rows = [["dataset", "episodes", "skipped", "frames", "weight", *names, "passes"]]
        for row in self.table():
            skipped = ", ".join(f"{count} {reason}" for reason, count in row["skipped"].items()) or "0"
            shares = [f"{share:.2%}" for share in row["shares"]]
            numbers = [f"{row['episodes']:,}", skipped, f"{row['frames']:,}", f"{row['weight']:g}"]
            rows.append([row["dataset"], *numbers, *shares, f"{row['passes']:.2f}"])
        epoch = f"One epoch, {self.mixture.epoch_length:,} samples, sees every dataset in full."
        return f"{text_table(rows, '>')}\n{epoch}"

    def num_skipped(self) -> int:
        """The number of episodes of the training split that were skipped during indexing."""
        return sum(sum(index.skipped.values()) for index in self.indexes())

    def shared_episodes(self, split: str) -> dict[str, int]:
        """{dataset: how many episodes of a split are also in the training split}, without zeros."""
        files: dict[str, int] = {}

        def places(index: Index) -> np.ndarray:
            numbers = np.asarray([files.setdefault(file, len(files)) for file in index.files])
            return numbers[index.arrays["episode_file"]] * 2**32 + index.arrays["episode_number"]

        def stored(split: str) -> dict[str, np.ndarray]:  # recordings have no files, and splits are separate
            return {i.name: places(i) for i in self.indexes(split) if all(".tfrecord" in file for file in i.files)}

        trained = np.concatenate([np.empty(0, np.int64), *stored(self._train_split).values()])
        counts = {name: int(np.isin(listed, trained).sum()) for name, listed in stored(split).items()}
        return {name: count for name, count in counts.items() if count}

    def replaced(self) -> dict[tuple[str, str], int]:
        """Training samples that this process has redrawn because their frames could not be read: {(dataset, reason):
        count}. Samples delivered + these = samples drawn."""
        return dict(self._split(self._train_split).replaced)

    def _fractions(self) -> list[tuple[float, mixture.Mixture]]:
        """The phases of a run: the fraction of its steps at which each starts, and its mixture."""
        phases = [(0.0, self.mixture)]
        for border in sorted(set(self.config.drop.values())):
            gone = {name for name, until in self.config.drop.items() if until <= border}
            left = frozenset(n for n, dataset in enumerate(self._dataset_ids) if self.names[dataset] in gone)
            phases.append((border, self.mixture.without(self.weights, left, balance=self.config.balance)))
        return phases

    def _phases(
        self, batch_size: int, seed: int, total_steps: int | None
    ) -> list[tuple[int, mixture.Mixture, np.ndarray]]:
        """The phases of a run: first step, mixture, and how many frames of each dataset were drawn before."""
        if self.config.drop and total_steps is None:
            raise InputError("data.drop needs the run's number of steps")
        phases: list[tuple[int, mixture.Mixture, np.ndarray]] = []
        drawn = np.zeros(len(self.weights), np.int64)
        for fraction, datasets in self._fractions():
            first = round(fraction * (total_steps or 0))
            if phases:
                before, previous, _ = phases[-1]
                drawn = drawn + mixture.count_draws(previous, seed, (first - before) * batch_size)
            phases.append((first, datasets, drawn))
        return phases

    def _split(self, split: str) -> Split:
        if split not in self._splits:
            indexes = self.indexes(split)
            prompts = tuple(self._encode(index, split) for index in indexes)
            starts = np.cumsum([0, *(index.num_frames for index in indexes)])
            current = tuple(np.full(index.num_episodes, any(map(is_url, index.files))) for index in indexes)
            self._splits[split] = Split(indexes, prompts, starts, current)
        return self._splits[split]

    def _encode(self, index: Index, split: str) -> tuple[np.ndarray, np.ndarray]:
        prompt = self.config.prompt
        try:
            return self.tokenizer.encode_prompts(index.instructions, template=prompt.template, length=prompt.length)
        except InputError as error:
            raise InputError(f"dataset {index.name!r}, split {split!r}: {error}") from error

    def _make_tokenizer(self, indexes: tuple[Index, ...]) -> Tokenizer:
        prompt = self.config.prompt
        if path := prompt.model:
            try:
                return Tokenizer.from_bytes(read_bytes(to_path(path)))
            except (OSError, InputError) as error:
                raise InputError(f"data.prompt.model {path} is not a usable SentencePiece model: {error}") from error
        instructions = {text for index in indexes for text in index.instructions}
        return train_tokenizer(instructions, prompt.vocab_size, template=prompt.template)

    def _stream(
        self, split: Split, samples: Samples, steps: range, batch_size: int, windows: tuple[int, ...] = ()
    ) -> Iterator[Batch]:
        """Batches of the frames `samples(step)` i64[B] for every step, or of their replacements."""
        seen = 0
        for pixels in self._source.pixels(split, samples, steps, batch_size, windows):
            yield self._assemble(split, pixels)
            seen += batch_size
            if seen >= _RELEASE_EVERY:
                seen = 0
                for index in split.indexes:
                    index.release()

    def _assemble(self, split: Split, pixels: Pixels) -> Batch:
        """Assemble a batch from its pixels and the indexes."""
        dataset, frames = split.locate(pixels.sample_id)
        rows, chunk, length = len(frames), self.action_chunk, self.config.prompt.length
        intrinsics = np.empty((rows, 3, 3), np.float32)
        prompt_ids, prompt_mask = np.empty((rows, length), np.int32), np.empty((rows, length), bool)
        actions, action_mask = np.empty((rows, chunk, self.action_dim), np.float32), np.empty((rows, chunk), bool)
        recorded = {name: np.empty((rows, WIDTHS[name]), np.float32) for name in self._recorded}
        new_size = (self.image_size, self.image_size)
        for number in np.unique(dataset):
            selected = dataset == number
            index, frame = split.indexes[number], frames[selected]
            if index.spec.intrinsics:
                intrinsics[selected] = scale_intrinsics(index.intrinsics(frame), pixels.stored_size[selected], new_size)
            else:
                default, old_size = np.asarray(index.spec.default_intrinsics), index.spec.default_intrinsics_size
                intrinsics[selected] = scale_intrinsics(default, old_size, new_size)
            for column, table in zip((prompt_ids, prompt_mask), split.prompts[number], strict=True):
                column[selected] = table[index.language(frame)]
            for name, places in recorded.items():
                places[selected] = index.arrays[name][frame]
            bounds = {row: value[number] for row, value in self._bounds.items()}
            first, end = index.action_rows(frame)
            actions[selected], action_mask[selected] = chunk_actions(index.arrays["action"], first, end, chunk, bounds)
        return Batch(
            image=pixels.image,
            depth=pixels.depth,
            intrinsics=intrinsics,
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            actions=actions,
            action_mask=action_mask,
            **recorded,
            dataset_id=self._dataset_ids[dataset],
            sample_id=pixels.sample_id,
        )


def _read_statistics(path: str, entries: Sequence[Entry]) -> dict[str, Any]:
    """{dataset: its statistics} from a file of `stats`. Raises InputError if it was made with other specs."""
    stats = load_stats(path)
    for entry in entries:
        if key := find_key(entry.name, specs := stats.get("specs", {})):
            check_spec(path, entry.name, specs[key], meaning(entry.spec))
    return stats["statistics"]


def open_data(
    config: ConfigDict,
    statistics: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    image_size: int | None = None,
    recorded: Sequence[str] = (),
    processes: Processes = ALONE,
) -> Loader:
    """The loader for a whole config, with images of the model's size unless `image_size` is given. For the other
    arguments see `Loader`."""
    return Loader(
        config.data,
        image_size=image_size or preset(config.model.preset, config.model.image_size).img.image_size,
        action_chunk=config.model.action_chunk,
        depth=config.model.depth_source == "dataset",
        recorded=recorded,
        statistics=statistics,
        tokenizer=tokenizer,
        progress=shard_progress(),
        processes=processes,
    )
