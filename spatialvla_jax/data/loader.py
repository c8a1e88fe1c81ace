"""Batches of a mixture of RLDS datasets, in an order that is a pure function of the seed and the step."""

import dataclasses
import functools
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from spatialvla_jax.data import mixture
from spatialvla_jax.data.images import decode_batches, scale_intrinsics, tensorflow
from spatialvla_jax.data.index import Index, load_index
from spatialvla_jax.data.oxe import CATALOGUE, DatasetSpec, make_spec
from spatialvla_jax.data.prompt import Tokenizer, train_tokenizer
from spatialvla_jax.data.statistics import normalize
from spatialvla_jax.errors import InputError

Batch = dict[str, np.ndarray]
_STATISTICS_ROWS = ("q01", "q99", "min", "max", "mask")


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of every dataset, with each dataset's prompts: ids i32[instructions, P] and mask."""

    indexes: tuple[Index, ...]
    prompts: tuple[tuple[np.ndarray, np.ndarray], ...]
    starts: np.ndarray  # i64[D + 1]: sample_id of every dataset's first frame, and the end

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and frame within it of the samples `ids`."""
        dataset = np.searchsorted(self.starts, ids, side="right") - 1
        return dataset, ids - self.starts[dataset]


class Source(Protocol):
    """Where the loader's frames lie: in RLDS files (`Rlds`) or in one packed file (`pack.Packed`)."""

    def index(self, split: str) -> tuple[Index, ...]:
        """The index of every dataset of the mixture."""
        ...

    def pixels(
        self, split: Split, samples: Callable[[int], np.ndarray], steps: range, batch_size: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """For every step, of the frames `samples(step)` i64[B]: image u8[B,S,S,3], stored_size i32[B,2] (height and
        width that the index's intrinsics are pixels of) and, if asked for, depth f32[B,S,S] metres."""
        ...


def load_data(
    config: Mapping[str, Any] | ConfigDict,
    *,
    image_size: int,
    action_chunk: int = 4,
    depth: bool = False,
    statistics: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> "Loader":
    """The loader that a config's `data` part describes:

    datasets    list of {"name", "path" (version directory), "spec" (catalogue name or fields), "weight" (1.0)}
    split       "train"; the split that statistics, tokenizer and `batches` use
    balance     True; weights are multiplied by the datasets' frame counts
    cache_dir   where indexes are kept; None is ~/.cache/spatialvla_jax
    workers     threads that decode; None is one a core
    prompt      {"length": P, "template": "{instruction}", "model": path of a SentencePiece model or None to train one
                from the instructions, "vocab_size": of the trained one}

    `statistics` ({name: …}) and `tokenizer` are those of a checkpoint; without them they come from the data. The first
    call reads the datasets once and caches an index; `progress(name, shards done, shards)` is called meanwhile.
    Raises InputError for anything wrong in the config or the data.
    """
    config = config.to_dict() if isinstance(config, ConfigDict) else config
    return Loader(config, image_size, action_chunk, depth, statistics, tokenizer, progress)


class Loader:
    """See `load_data`. Batches are dicts of numpy arrays; S is the image size, T the action chunk, P the prompt length:

    image u8[B,S,S,3] · depth f32[B,S,S] metres (if asked for) · intrinsics f32[B,3,3] pixels of the SxS image ·
    prompt_ids i32[B,P] · prompt_mask bool[B,P] · actions f32[B,T,7] normalised · action_mask bool[B,T] ·
    dataset_id i32[B] · sample_id i64[B] (number of the frame among all frames of the split).

    Past the episode's end the normalised movement is 0 and the gripper keeps its last value (as in OpenVLA and the
    release), and action_mask is False.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        image_size: int,
        action_chunk: int,
        depth: bool,
        statistics: Mapping[str, Any] | None,
        tokenizer: Tokenizer | None,
        progress: Callable[[str, int, int], None] | None,
    ):
        entries = [_entry(entry) for entry in config["datasets"]]
        if not entries:
            raise InputError("The mixture is empty: data.datasets must name at least one dataset")
        self.names = tuple(entry["name"] for entry in entries)
        if len(set(self.names)) < len(self.names):
            raise InputError(f"data.datasets has a name twice: {', '.join(self.names)}")
        for entry in entries:
            if depth and entry["spec"].depth is None:
                raise InputError(f"Dataset {entry['name']!r} has no depth, which the config asks for")
        self.image_size, self.action_chunk, self.depth = image_size, action_chunk, depth
        self._source: Source = Rlds(config, entries, image_size, depth, progress)
        self._prompt, self._train_split = config["prompt"], config.get("split") or "train"
        self._indexes: dict[str, tuple[Index, ...]] = {}
        self._splits: dict[str, Split] = {}

        train = self._index(self._train_split)
        self.weights = tuple(entry["weight"] for entry in entries)
        self.mixture = mixture.make_mixture(
            tuple(index.num_frames for index in train), self.weights, balance=config.get("balance", True)
        )
        self.statistics = dict(statistics or {index.name: index.statistics for index in train})
        for name in self.names:
            if name not in self.statistics:
                raise InputError(f"The statistics know {', '.join(self.statistics)}, but not the dataset {name!r}")
        self._bounds = {
            row: np.asarray([self.statistics[name]["action"][row] for name in self.names]) for row in _STATISTICS_ROWS
        }
        self.tokenizer = tokenizer or self._make_tokenizer(train)
        self._split(self._train_split)  # all prompts fit, or it is an error now

    def batches(
        self, batch_size: int, *, start_step: int = 0, seed: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """Endless training batches from step `start_step` on: this process's rows of global batches of `batch_size`.

        Step s holds samples s * batch_size … of the mixture's endless sequence, whatever the number of processes.
        """
        split = self._split(self._train_split)
        rows = _rows(batch_size, process_index, process_count)

        def samples(step: int) -> np.ndarray:
            dataset, frame = mixture.draw(self.mixture, seed, step * batch_size + rows)
            return split.starts[dataset] + frame

        return self._stream(split, samples, range(start_step, sys.maxsize), len(rows))

    def epoch(self, batch_size: int, split: str, *, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """This process's rows of batches with every frame of a split once, in stored order. The last batch is padded;
        `valid` bool[B] tells which rows count."""
        data = self._split(split)
        rows = _rows(batch_size, process_index, process_count)
        total = int(data.starts[-1])
        steps = range(-(-total // batch_size))

        def samples(step: int) -> np.ndarray:
            return np.minimum(step * batch_size + rows, total - 1)

        for step, batch in zip(steps, self._stream(data, samples, steps, len(rows)), strict=True):
            yield batch | {"valid": step * batch_size + rows < total}

    def episodes(self, split: str) -> Iterator[dict[str, Any]]:
        """Every episode of a split: a batch of its L frames in order, with "dataset" (its name) and "instruction"."""
        data = self._split(split)
        for number, index in enumerate(data.indexes):
            first = 0
            for end in index.arrays["episode_end"].tolist():
                ids = data.starts[number] + np.arange(first, end)
                batch = next(self._stream(data, lambda _, ids=ids: ids, range(1), len(ids)))
                instruction = index.instructions[index.arrays["language"][first]]
                yield {"dataset": index.name, "instruction": instruction} | batch
                first = end

    def indexes(self, split: str | None = None) -> tuple[Index, ...]:
        """Every dataset's index of a split (the training split by default)."""
        return self._index(split or self._train_split)

    def frames(self, samples: np.ndarray, split: str | None = None) -> Batch:
        """One batch of chosen frames of a split (the training split by default), numbered i64[B] as in sample_id."""
        return next(self._stream(self._split(split or self._train_split), lambda _: samples, range(1), len(samples)))

    def actions(self, split: str | None = None) -> Float[np.ndarray, "N 7"]:
        """Normalised actions of all frames of a split (the training split by default), for fitting a grid."""
        indexes = self._index(split or self._train_split)
        return np.concatenate([normalize(i.arrays["action"], self.statistics[i.name]["action"]) for i in indexes])

    @functools.cached_property
    def intrinsics(self) -> dict[str, list[list[float]]]:
        """Every dataset's camera (its first training frame's) in units of the image: fx and cx over its width, fy and
        cy over its height."""
        split = self._split(self._train_split)
        first = next(self._stream(split, lambda _: split.starts[:-1], range(1), len(self.names)))["intrinsics"]
        relative = scale_intrinsics(first, (self.image_size, self.image_size), (1, 1))
        return dict(zip(self.names, relative.tolist(), strict=True))

    def num_frames(self, split: str | None = None) -> int:
        """Frames of a split (the training split by default)."""
        return sum(index.num_frames for index in self._index(split or self._train_split))

    def table(self) -> list[dict[str, Any]]:
        """The training mixture, one row a dataset: name, episodes, skipped episodes, frames, weight, effective share of
        the samples, and passes over the dataset in one epoch (= `mixture.epoch_length` samples)."""
        rows = zip(self._index(self._train_split), self.weights, self.mixture.shares, strict=True)
        return [
            {
                "dataset": index.name,
                "episodes": index.num_episodes,
                "skipped": sum(index.skipped.values()),
                "frames": index.num_frames,
                "weight": weight,
                "share": share,
                "passes": self.mixture.epoch_length * share / index.num_frames,
            }
            for index, weight, share in rows
        ]

    def _index(self, split: str) -> tuple[Index, ...]:
        if split not in self._indexes:
            self._indexes[split] = self._source.index(split)
        return self._indexes[split]

    def _split(self, split: str) -> Split:
        if split not in self._splits:
            indexes = self._index(split)
            prompts = tuple(self._encode(index) for index in indexes)
            starts = np.cumsum([0, *(index.num_frames for index in indexes)])
            self._splits[split] = Split(indexes, prompts, starts)
        return self._splits[split]

    def _encode(self, index: Index) -> tuple[np.ndarray, np.ndarray]:
        template, length = self._prompt.get("template", "{instruction}"), self._prompt["length"]
        pairs = [self.tokenizer.encode_prompt(text, template=template, length=length) for text in index.instructions]
        return np.stack([ids for ids, _ in pairs]), np.stack([mask for _, mask in pairs])

    def _make_tokenizer(self, indexes: tuple[Index, ...]) -> Tokenizer:
        if path := self._prompt.get("model"):
            try:
                return Tokenizer.from_bytes(Path(path).read_bytes())
            except (OSError, InputError) as error:
                raise InputError(f"data.prompt.model {path} is not a usable SentencePiece model: {error}") from error
        instructions = {text for index in indexes for text in index.instructions}
        template = self._prompt.get("template", "{instruction}")
        return train_tokenizer(instructions, self._prompt["vocab_size"], template=template)

    def _stream(
        self, split: Split, samples: Callable[[int], np.ndarray], steps: range, batch_size: int
    ) -> Iterator[Batch]:
        """Batches of the frames `samples(step)` i64[B] for every step."""
        for step, images in zip(steps, self._source.pixels(split, samples, steps, batch_size), strict=False):
            yield self._assemble(split, samples(step), images)

    def _assemble(self, split: Split, ids: np.ndarray, images: dict[str, np.ndarray]) -> Batch:
        """Everything of a batch besides its pixels, from the indexes."""
        dataset, frames = split.locate(ids)
        rows, chunk, length = len(ids), self.action_chunk, self._prompt["length"]
        intrinsics = np.empty((rows, 3, 3), np.float32)
        prompt_ids, prompt_mask = np.empty((rows, length), np.int32), np.empty((rows, length), bool)
        actions, action_mask = np.empty((rows, chunk, 7), np.float32), np.empty((rows, chunk), bool)
        new_size = (self.image_size, self.image_size)
        for number in np.unique(dataset):
            own = dataset == number
            index, arrays, frame = split.indexes[number], split.indexes[number].arrays, frames[own]
            if index.spec.intrinsics:
                intrinsics[own] = scale_intrinsics(arrays["intrinsics"][frame], images["stored_size"][own], new_size)
            else:
                default, old_size = np.asarray(index.spec.default_intrinsics), index.spec.default_intrinsics_size
                intrinsics[own] = scale_intrinsics(default, old_size, new_size)
            for target, table in zip((prompt_ids, prompt_mask), split.prompts[number], strict=True):
                target[own] = table[arrays["language"][frame]]
            ends = arrays["episode_end"][index.episode(frame)]
            bounds = {row: value[number] for row, value in self._bounds.items()}
            actions[own], action_mask[own] = chunk_actions(arrays["action"], frame, ends, chunk, bounds)
        pixels = {key: images[key] for key in ("image", "depth") if key in images}
        return pixels | {
            "intrinsics": intrinsics,
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "actions": actions,
            "action_mask": action_mask,
            "dataset_id": dataset.astype(np.int32),
            "sample_id": ids,
        }


def chunk_actions(
    actions: np.ndarray, frames: np.ndarray, ends: np.ndarray, chunk: int, statistics: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """The normalised `chunk` actions from each of `frames` i64[B] on, f32[B,T,7], and the mask bool[B,T] of those
    before the episode's end, the frame number `ends` i64[B]. Later ones are neutral: no movement (0 after
    normalisation), gripper as it was last."""
    positions = frames[:, None] + np.arange(chunk)
    mask = positions < ends[:, None]
    chunks = normalize(actions[np.minimum(positions, ends[:, None] - 1)], statistics)
    chunks[..., :6] *= mask[..., None]
    return chunks, mask


def _rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """Which rows of a global batch belong to a process."""
    if batch_size % process_count:
        raise InputError(f"The batch size {batch_size} does not divide among {process_count} processes")
    return np.arange(batch_size).reshape(process_count, -1)[process_index]


class Rlds:
    """The frames of RLDS datasets, out of their TFRecords. See `Source`."""

    def __init__(
        self,
        config: Mapping[str, Any],
        entries: list[dict[str, Any]],
        image_size: int,
        depth: bool,
        progress: Callable[[str, int, int], None] | None,
    ):
        self._entries, self._image_size, self._depth, self._progress = entries, image_size, depth, progress
        self._cache_dir = Path(config.get("cache_dir") or "~/.cache/spatialvla_jax").expanduser()
        self._workers = config.get("workers") or os.cpu_count() or 1

    def index(self, split: str) -> tuple[Index, ...]:
        return tuple(
            load_index(entry["name"], entry["path"], entry["spec"], split, self._cache_dir, self._progress)
            for entry in self._entries
        )

    def pixels(
        self, split: Split, samples: Callable[[int], np.ndarray], steps: range, batch_size: int
    ) -> Iterator[dict[str, np.ndarray]]:
        def read(step: int) -> tuple[np.ndarray, ...]:
            return self._read(split, samples(int(step)), files)

        tf = tensorflow()
        files = _Files()
        decoded = decode_batches(read, steps, batch_size, self._image_size, self._depth, self._workers)
        for step in steps:
            try:
                yield next(decoded)
            except tf.errors.OpError:
                self._find_broken(split, samples(step))
                raise

    def _read(self, split: Split, ids: np.ndarray, files: "_Files") -> tuple[np.ndarray, ...]:
        """Encoded images (and depth maps with their units) of the frames `ids`."""
        keys = ("image", "depth") if self._depth else ("image",)
        encoded = {key: np.empty(len(ids), object) for key in keys}
        units = np.empty(len(ids), np.float32)
        dataset, frames = split.locate(ids)
        for number in np.unique(dataset):
            index, own = split.indexes[number], np.flatnonzero(dataset == number)
            units[own] = index.spec.depth_unit
            names = index.arrays["episode_file"][index.episode(frames[own])]
            for key in keys:
                spans = index.arrays[key][frames[own]].tolist()
                for row, name, (offset, length) in zip(own, names, spans, strict=True):
                    encoded[key][row] = files.read(index.files[name], offset, length)
        return (*encoded.values(), units) if self._depth else tuple(encoded.values())

    def _find_broken(self, split: Split, ids: np.ndarray) -> None:
        """Raises InputError for the first frame among `ids` that cannot be read or decoded."""
        tf = tensorflow()
        for sample, *encoded in zip(ids, *self._read(split, ids, _Files()), strict=True):
            try:
                tf.io.decode_image(encoded[0], channels=3, expand_animations=False)
                if self._depth:
                    tf.io.decode_png(encoded[1], channels=1, dtype=tf.uint16)
            except tf.errors.InvalidArgumentError as error:
                (dataset,), (frame,) = split.locate(np.asarray([sample]))
                where = split.indexes[dataset].describe(int(frame))
                raise InputError(f"{where}: the image does not decode ({len(encoded[0])} bytes)") from error


class _Files:
    """Byte ranges of files, with the most recently used ones kept open."""

    def __init__(self, limit: int = 64):
        self._limit = limit
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, offset: int, length: int) -> bytes:
        if path not in self._open:
            try:
                self._open[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise InputError(f"{path} cannot be read any more: {error.strerror}") from error
            if len(self._open) > self._limit:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(path)
        return os.pread(self._open[path], length, offset)

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A checked copy of one of the config's datasets."""
    values: dict[str, Any] = {"weight": 1.0} | dict(entry)
    for key in ("name", "path", "spec"):
        if key not in values:
            raise InputError(f"An entry of data.datasets has no {key!r}: it has {', '.join(sorted(values))}")
    if unknown := sorted(set(values) - {"name", "path", "spec", "weight"}):
        raise InputError(f"Dataset {values['name']!r} in data.datasets has the unknown key {unknown[0]!r}")
    spec: DatasetSpec = make_spec(values["spec"], CATALOGUE, values["name"])
    return values | {"spec": spec}
