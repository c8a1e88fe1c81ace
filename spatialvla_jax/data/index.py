"""A dataset's sidecar index: every frame's place in the unmodified TFRecords, and the small arrays of all episodes.

It is made in one pass over the data and kept in a cache directory. Its arrays of frames are memory-mapped, so that host
memory does not grow with the dataset. An index is a directory of meta.json and one file per array of
`index_parts.layout`. meta.json says what the index was made from (`Source`) and holds statistics and instructions.
"""

import dataclasses
import hashlib
import json
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from spatialvla_jax.data.oxe.spec import DatasetSpec
from spatialvla_jax.data.rlds import UNLABELED, Shard
from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.utils.storage import AnyPath

META = "meta.json"
CHECKSUM_BYTES = 4  # of the CRC that follows each record


@dataclasses.dataclass(frozen=True)
class Faults:
    """What to do about bad data: "fail", or "skip" it and count it. More than `limit` skipped is an error."""

    policy: str = "fail"
    limit: float = 0  # a whole number, checked below

    def __post_init__(self) -> None:
        if self.policy not in ("fail", "skip") or not isinstance(self.limit, int) or self.limit < 0:
            raise InputError(
                f"data.faults has policy {self.policy!r} and limit {self.limit!r}: expected fail or skip, and a number"
            )

    def check(self, counts: Mapping[str, int], what: str) -> None:
        """Raises InputError if more faults were skipped than the limit allows."""
        faults = {reason: count for reason, count in counts.items() if reason != UNLABELED}
        if (total := sum(faults.values())) > self.limit:
            listed = ", ".join(f"{count} {reason}" for reason, count in sorted(faults.items()))
            raise InputError(f"{total} {what} are faulty ({listed}), more than the {self.limit} of data.faults.limit")


FAIL = Faults()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """One split of one dataset: N frames of E episodes. Arrays of frames are memory-mapped.

    A frame is a step with an image. Usually every step is a frame, but a recording may have images of some steps only
    (`record libero --every`). `action` still has a row for every step; `action_row` i64[N] is then the row of each
    frame, and `action_end` i64[E] the end of each episode's rows.
    """

    name: str
    spec: DatasetSpec
    files: tuple[str, ...]
    instructions: tuple[str, ...]
    statistics: dict[str, Any]  # of this split, in the release's layout; see also `pack.Packed`
    num_read: int  # episodes in the split, used and skipped
    skipped: Mapping[str, int]  # skipped episodes, by reason
    arrays: Mapping[str, np.ndarray]
    maps: tuple[mmap.mmap, ...] = ()  # memory of the mapped arrays
    descriptors: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of the mapped files
    made_from: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # see `Source`
    gaussians: Any = None  # f64[6, 2], `fit_gaussians` of the actions normalised by `statistics`, if known
    directories: tuple[AnyPath, ...] = ()  # that hold this index

    @property
    def num_frames(self) -> int:
        return int(self.arrays["episode_end"][-1]) if self.num_episodes else 0

    @property
    def num_episodes(self) -> int:
        return len(self.arrays["episode_end"])

    def episode(self, frames: Any) -> np.ndarray | np.int64:
        """The episode i64[...] of each frame."""
        return np.searchsorted(self.arrays["episode_end"], frames, side="right")

    def spans(self, key: str, frames: Any) -> Int64[np.ndarray, "*B 3"]:
        """Where each frame's image or depth map (`key` "image" or "depth") is stored: offset in the episode's file,
        length in bytes, CRC-32C."""
        spans = self._rows(key, frames).astype(np.int64)
        spans[..., 0] += self.arrays["episode_record"][self.episode(frames), 0]
        return spans

    def _rows(self, key: str, frames: Any) -> np.ndarray:
        """The rows of these frames in a per-frame array. Frames are drawn at random. Reading their rows from the file
        takes less than half the time of mapping a page for each and releasing it."""
        array = self.arrays[key]
        if key not in self.descriptors:
            return array[frames]
        file, size = self.descriptors[key], array.strides[0]
        rows = b"".join([os.pread(file, size, size * frame) for frame in np.ravel(frames).tolist()])
        return np.frombuffer(rows, array.dtype).reshape(*np.shape(frames), *array.shape[1:])

    def mean_size(self, key: str) -> float:
        """Mean size in bytes of a stored image or depth map, from about a thousand of them."""
        return float(self.arrays[key][:: max(1, self.num_frames // 1000), 1].mean())

    def language(self, frames: Any) -> np.ndarray | np.int32:
        """Each frame's index into `instructions`, i32[...]."""
        return self._in_runs("language", frames)

    def intrinsics(self, frames: Any) -> Float32[np.ndarray, "*B 3 3"]:
        """Each frame's intrinsics in pixels of its stored image. Raises KeyError if the dataset has none."""
        return self._in_runs("intrinsics", frames)

    def step(self, frames: Any) -> np.ndarray | np.int64:
        """Each frame's number in its stored episode, i64[...]."""
        steps = self._in_runs("step", frames)
        return steps + frames if "step_end" in self.arrays else steps

    def _in_runs(self, key: str, frames: Any) -> Any:
        """The values of an array with a row per run of frames or, in packed files, per frame."""
        if (ends := self.arrays.get(f"{key}_end")) is not None:
            frames = np.searchsorted(ends, frames, side="right")
        return self.arrays[key][frames]

    def action_rows(self, frames: Any) -> tuple[np.ndarray, np.ndarray]:
        """Each frame's row in `action`, and the end of its episode's rows, both i64[...]."""
        episode = self.episode(frames)
        if "action_row" in self.arrays:
            return self.arrays["action_row"][frames], self.arrays["action_end"][episode]
        return np.asarray(frames), self.arrays["episode_end"][episode]

    def release(self) -> None:
        """Releases the touched pages: they stay in the page cache but leave this process's resident set."""
        for memory in self.maps:
            memory.madvise(mmap.MADV_DONTNEED)

    def describe(self, frame: int) -> str:
        """Names a frame in an error: dataset, file, episode within the file, step."""
        episode = self.episode(frame)
        return (
            f"dataset {self.name!r}, file {self.files[self.arrays['episode_file'][episode]]}, "
            f"episode {self.arrays['episode_number'][episode]}, step {self.step(frame)}"
        )

    def record(self, episode: int) -> tuple[str, int, bytes]:
        """The file and offset of the CRC of an episode's record, and its value when it was indexed."""
        offset, length, checksum = self.arrays["episode_record"][episode].tolist()
        file = self.files[self.arrays["episode_file"][episode]]
        return file, offset + length, checksum.to_bytes(CHECKSUM_BYTES, "little")

    def forget(self) -> None:
        """Deletes meta.json, so that the next start indexes the data again."""
        for directory in self.directories:
            with suppress(OSError, InputError, StorageError):
                (directory / META).unlink()


class Source(NamedTuple):
    """A split of a dataset to index."""

    name: str
    spec: DatasetSpec
    builder: Any  # of TFDS
    shards: Sequence[Shard]
    # Everything that the index depends on, as JSON: "place", the dataset's full path; "split"; "spec", its `meaning`;
    # "features", its types; "shards", each (name, bytes, version, start and stop of the split's episodes in it,
    # episodes); "action_dim".
    made_from: dict[str, Any]

    @property
    def folder(self) -> str:
        """The name of the index's directory."""
        made_from = self.made_from
        words = [re.sub("[^0-9A-Za-z]+", "_", word)[:80] for word in (self.name, made_from["split"])]
        identity = [self.name, made_from["place"], made_from["split"], made_from["spec"]["fields"]]
        return "-".join([*words, digest(identity)])


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
