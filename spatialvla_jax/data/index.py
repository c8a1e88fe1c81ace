"""A dataset's sidecar index: every frame's place in the unmodified TFRecords, and the small arrays of all episodes.

Made in one pass, kept in a cache directory, memory-mapped when used: host memory does not grow with the dataset.
"""

import dataclasses
import hashlib
import json
import mmap
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from spatialvla_jax.actions import DIMENSIONS
from spatialvla_jax.data.oxe.spec import DatasetSpec
from spatialvla_jax.data.rlds import UNLABELED, open_rlds, read_episodes, slice_shards
from spatialvla_jax.data.statistics import action_statistics
from spatialvla_jax.errors import Fault, InputError
from spatialvla_jax.utils.atomic import replacing

_VERSION = 2  # of the files below; another one makes a new index
# Fields of a spec that change nothing in the files below.
_NOT_READ = {
    "default_intrinsics",
    "default_intrinsics_size",
    "depth_unit",
    "tfds_name",
    "robot",
    "episodes",
    "known_camera",
    "unread_depth",
}
# Rows are frames, except those of `episode_*`, which are episodes.
_ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "action": ("<f4", (-1,)),  # as many as the dataset's actions have
    "language": ("<i4", ()),
    "step": ("<i4", ()),
    "image": ("<i8", (2,)),
    "depth": ("<i8", (2,)),
    "intrinsics": ("<f4", (3, 3)),
    "episode_end": ("<i8", ()),
    "episode_file": ("<i4", ()),
    "episode_number": ("<i4", ()),
}


@dataclasses.dataclass(frozen=True)
class Faults:
    """What to do about bad data: `policy` "fail", or "skip" it, count it and go on up to `limit` times."""

    policy: str = "fail"
    limit: float = 0  # whole, as is checked below

    def __post_init__(self) -> None:
        if self.policy not in ("fail", "skip") or not isinstance(self.limit, int) or self.limit < 0:
            raise InputError(
                f"data.faults has policy {self.policy!r} and limit {self.limit!r}: expected fail or skip, and a number"
            )

    def check(self, counts: Mapping[str, int], what: str) -> None:
        """Raises InputError when more was left out than the limit allows."""
        faults = {reason: count for reason, count in counts.items() if reason != UNLABELED}
        if (total := sum(faults.values())) > self.limit:
            listed = ", ".join(f"{count} {reason}" for reason, count in sorted(faults.items()))
            raise InputError(f"{total} {what} are faulty ({listed}), more than the {self.limit} of data.faults.limit")


@dataclasses.dataclass(frozen=True)
class Index:
    """One split of one dataset: N frames of E episodes. Arrays are memory-mapped.

    A frame is a step with a picture, and every step is one but in a recording with pictures of some steps only
    (`record libero --every`). `action` has a row for every step; there, `action_row` i64[N] is that of each frame and
    `action_end` i64[E] the end of each episode's.
    """

    name: str
    spec: DatasetSpec
    files: tuple[str, ...]
    instructions: tuple[str, ...]
    statistics: dict[str, Any]  # of this split, in the release's layout
    num_read: int  # episodes that the split holds: those used and those skipped
    skipped: Mapping[str, int]  # episodes left out, by reason
    arrays: Mapping[str, np.ndarray]
    maps: tuple[mmap.mmap, ...] = ()  # what the arrays look into

    @property
    def num_frames(self) -> int:
        return len(self.arrays["step"])

    @property
    def num_episodes(self) -> int:
        return len(self.arrays["episode_end"])

    def episode(self, frames: Any) -> np.ndarray | np.int64:
        """The episode i64[...] of each frame."""
        return np.searchsorted(self.arrays["episode_end"], frames, side="right")

    def action_rows(self, frames: Any) -> tuple[np.ndarray, np.ndarray]:
        """Where in `action` each frame's is, and where its episode's end, i64[...] both."""
        episode = self.episode(frames)
        if "action_row" in self.arrays:
            return self.arrays["action_row"][frames], self.arrays["action_end"][episode]
        return np.asarray(frames), self.arrays["episode_end"][episode]

    def release(self) -> None:
        """Gives the touched pages back: they stay in the system's cache, not in this process's resident set."""
        for memory in self.maps:
            memory.madvise(mmap.MADV_DONTNEED)

    def describe(self, frame: int) -> str:
        """Names a frame in an error: dataset, file, episode within the file, step."""
        episode = self.episode(frame)
        return (
            f"dataset {self.name!r}, file {self.files[self.arrays['episode_file'][episode]]}, "
            f"episode {self.arrays['episode_number'][episode]}, step {self.arrays['step'][frame]}"
        )


def load_index(
    name: str,
    path: str | os.PathLike[str],
    spec: DatasetSpec,
    split: str,
    cache_dir: str | os.PathLike[str],
    progress: Callable[[str, int, int], None] | None = None,
    faults: Faults = Faults(),
    action_dim: int = len(DIMENSIONS),
) -> Index:
    """The index of a split, from the cache or made now. `progress(name, shards done, shards)` is called meanwhile.

    What is indexed has been read in full and checked, except that images are not decoded yet. Raises InputError for
    anything wrong with the data; under the policy "skip" only when too much is.
    """
    builder = open_rlds(path)
    shards = slice_shards(builder, split)
    key = {
        "version": _VERSION,
        "spec": {key: value for key, value in dataclasses.asdict(spec).items() if key not in _NOT_READ},
        "split": split,
        "files": [(file.name, file.stat().st_size, numbers.start, numbers.stop) for file, numbers in shards],
        "features": builder.info.features.to_json(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    directory = Path(cache_dir) / f"{name}-{re.sub('[^0-9A-Za-z]+', '_', split)}-{digest}"
    if not (directory / "meta.json").is_file():
        try:
            _build(directory, name, builder, shards, spec, progress, faults, action_dim)
        except OSError:  # another process may have made the same index meanwhile
            if not (directory / "meta.json").is_file():
                raise
    meta = json.loads((directory / "meta.json").read_text())
    # The policy is not in the key: without faults it makes no difference, and with them the index says so.
    if meta["fault"] and faults.policy == "fail":
        raise InputError(meta["fault"])
    maps = {key: _map(directory / f"{key}.bin") for key in meta["rows"]}
    arrays = {
        key: np.frombuffer(maps[key], _ARRAYS[key][0]).reshape(rows, *_ARRAYS[key][1])
        for key, rows in meta["rows"].items()
    }
    return Index(
        name,
        spec,
        tuple(os.fspath(file) for file, _ in shards),
        tuple(meta["instructions"]),
        meta["statistics"],
        meta["read"],
        meta["skipped"],
        arrays,
        tuple(maps.values()),
    )


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _build(
    directory: Path,
    name: str,
    builder: Any,
    shards: list[tuple[Path, range]],
    spec: DatasetSpec,
    progress: Callable[[str, int, int], None] | None,
    faults: Faults,
    action_dim: int,
) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with replacing(directory) as work:
        work.mkdir()
        keys = {key for key in _ARRAYS if getattr(spec, key, True)}  # no depth, no intrinsics where the spec has none
        rows = dict.fromkeys(keys, 0)
        streams: dict[str, Any] = {}

        def append(key: str, value: Any) -> None:
            value = np.ascontiguousarray(value, _ARRAYS[key][0])
            streams[key].write(value.tobytes())
            rows[key] += len(value)

        instructions: dict[str, int] = {}
        skipped: Counter[str] = Counter()
        first_fault = ""

        def skip(reason: str, sentence: str) -> None:
            nonlocal first_fault
            if reason != UNLABELED and faults.policy == "fail":
                raise Fault(reason, sentence)
            first_fault = first_fault or sentence
            skipped[reason] += 1
            faults.check(skipped, f"episodes of the dataset {name!r}")

        with ExitStack() as stack:
            streams |= {key: stack.enter_context(open(work / f"{key}.bin", "wb")) for key in keys}
            for shard, (file, numbers) in enumerate(shards):
                episodes = read_episodes(name, builder, file, numbers, spec, skip, action_dim)
                for number, episode in zip(numbers, episodes, strict=True):
                    if not len(episode["step"]):
                        continue
                    language = [instructions.setdefault(text, len(instructions)) for text in episode["language"]]
                    for key in keys & episode.keys():
                        append(key, language if key == "language" else episode[key])
                    append("episode_end", [rows["step"]])
                    append("episode_file", [shard])
                    append("episode_number", [number])
                if progress:
                    progress(name, shard + 1, len(shards))
        if not rows["step"]:
            listed = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
            raise InputError(f"Dataset {name!r} ({builder.data_dir}) has no episode to use ({listed})")
        actions = np.memmap(work / "action.bin", "<f4", "r", shape=(rows["action"], action_dim))
        meta = {
            "rows": rows,
            "instructions": list(instructions),
            "statistics": action_statistics(actions, rows["episode_end"]),
            "read": sum(len(numbers) for _, numbers in shards),
            "skipped": dict(skipped),
            "fault": first_fault,
        }
        (work / "meta.json").write_text(json.dumps(meta, indent=2))
