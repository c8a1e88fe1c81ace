"""The parts of an index, one per shard of a split. Parts can be read on any machine and are merged in the shards'
order, so the index is bit-identical however many machines read them."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from jaxtyping import Int64

from spatialvla_jax.actions import DIMENSIONS, fit_gaussians
from spatialvla_jax.actions.normalization import in_parts, normalize
from spatialvla_jax.data.oxe.spec import DatasetSpec
from spatialvla_jax.data.rlds import Shard, read_episodes
from spatialvla_jax.data.statistics import action_statistics

# One row per frame. Spans are u32: offset from `episode_record`'s, length, CRC-32C.
PER_FRAME: dict[str, tuple[str, tuple[int, ...]]] = {
    "action": ("<f4", (-1,)),  # the dataset's number of action dimensions
    "image": ("<u4", (3,)),
    "depth": ("<u4", (3,)),
}
# One row per run of frames with equal values; KEY_end i64 holds the end of each run.
_RUNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "language": ("<i4", ()),
    "step": ("<i8", ()),  # minus the frame's number
    "intrinsics": ("<f4", (3, 3)),
}
_EPISODES: dict[str, tuple[str, tuple[int, ...]]] = {
    "episode_end": ("<i8", ()),
    "episode_file": ("<i4", ()),
    "episode_number": ("<i4", ()),
    "episode_record": ("<i8", (3,)),  # offset, length and checksum
}


_RUN_ENDS = {f"{key}_end": ("<i8", ()) for key in _RUNS}
Rows = Mapping[str, tuple[str, tuple[int, ...]]]


def layout(spec: DatasetSpec, action_dim: int) -> Rows:
    """Dtype and row shape of each array in a dataset's index."""
    rows = PER_FRAME | {"action": ("<f4", (action_dim,))} | _RUNS | _RUN_ENDS | _EPISODES
    absent = {name for key in ("depth", "intrinsics") if not getattr(spec, key) for name in (key, f"{key}_end")}
    return {key: row for key, row in rows.items() if key not in absent}


class Part(NamedTuple):
    """The content of one or more consecutive shards of a split. Frame numbers start at 0 in each part; file numbers are
    positions among the split's shards."""

    arrays: Mapping[str, np.ndarray]  # see `layout`
    instructions: tuple[str, ...]
    skipped: Mapping[str, int] = {}  # number of skipped episodes, by reason
    fault: str = ""  # message about the first damaged episode

    def to_bytes(self) -> bytes:
        about = json.dumps([self.instructions, self.skipped, self.fault]).encode()
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, about=np.frombuffer(about, np.uint8), **self.arrays)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Part":
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            arrays = dict(stored)
        instructions, skipped, fault = json.loads(arrays.pop("about").tobytes())
        return cls(arrays, tuple(instructions), skipped, fault)


def read_part(name: str, builder: Any, number: int, shard: Shard, spec: DatasetSpec, action_dim: int) -> Part:
    """Read the part of shard `number`. Counts its faults and keeps the first one's message. Raises InputError for
    problems of the whole dataset."""
    skipped: Counter[str] = Counter()
    faults: list[str] = []
    instructions: dict[str, int] = {}
    rows = layout(spec, action_dim)
    found: dict[str, list[np.ndarray]] = {key: [] for key in rows if key not in _RUN_ENDS}
    frames = 0

    def skip(reason: str, sentence: str) -> None:
        skipped[reason] += 1
        faults.extend([sentence] if sentence else [])

    stored = read_episodes(name, builder, shard.file, shard.numbers, spec, skip, action_dim, shard.listed)
    for place, episode in zip(shard.numbers, stored, strict=True):
        if not (length := len(episode["step"])):
            continue
        record = episode.pop("record")
        for key in PER_FRAME.keys() & rows.keys() - {"action"}:
            episode[key] = episode[key] - [record[0], 0, 0]
        episode["step"] = episode["step"] - np.arange(frames, frames + length)
        language = [instructions.setdefault(text, len(instructions)) for text in episode["language"]]
        episode["language"] = np.asarray(language)
        frames += length
        own: dict[str, Any] = {"end": [frames], "file": [number], "number": [place], "record": [record]}
        values = episode | {f"episode_{key}": value for key, value in own.items()}
        for key in found:
            found[key].append(np.asarray(values[key], rows[key][0]))
    arrays = {key: np.concatenate([np.empty((0, *rows[key][1]), rows[key][0]), *found[key]]) for key in found}
    for key in _RUNS.keys() & rows.keys():
        arrays[key], arrays[f"{key}_end"] = _join_runs(arrays[key], np.arange(1, frames + 1))
    return Part(arrays, tuple(instructions), dict(skipped), faults[0] if faults else "")


def _join_runs(values: np.ndarray, ends: Int64[np.ndarray, " R"]) -> tuple[np.ndarray, Int64[np.ndarray, " K"]]:
    """Merge neighbouring runs whose values have the same bits."""
    if not len(values):
        return values, ends
    bits = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint32)
    last = np.append((bits[1:] != bits[:-1]).any(axis=1), True)
    return values[last], ends[last]


def merge_parts(
    parts: Iterable[Part], rows: Rows, folder: Path, check: Callable[[Part, Counter[str]], None]
) -> dict[str, Any]:
    """Write the arrays of an index, KEY.bin, to a folder. `parts` come in the shards' order; `check(part, skipped so
    far)` is called for each.

    Returns their entries in meta.json: "checksums" (CRC-32C of each file), "instructions", "statistics", "gaussians"
    (as from `fit_gaussians`; both None if there are no frames), "skipped", "fault".
    """
    instructions: dict[str, int] = {}
    skipped: Counter[str] = Counter()
    fault = ""
    frames = episodes = 0
    runs: dict[str, list[np.ndarray]] = {key: [] for key in rows if key in _RUNS | _RUN_ENDS}
    with ExitStack() as stack:
        streams = {key: stack.enter_context(open(folder / f"{key}.bin", "wb")) for key in rows}
        checksums = dict.fromkeys(rows, 0)

        def write(key: str, value: np.ndarray) -> None:
            content = np.ascontiguousarray(value, rows[key][0]).tobytes()
            streams[key].write(content)
            checksums[key] = google_crc32c.extend(checksums[key], content)

        for part in parts:
            skipped.update(part.skipped)
            fault = fault or part.fault
            check(part, skipped)
            numbers = np.asarray([instructions.setdefault(text, len(instructions)) for text in part.instructions], int)
            moved = {"language": numbers[part.arrays["language"]], "step": part.arrays["step"] - frames}
            moved |= {key: part.arrays[key] + frames for key in rows if key.endswith("_end")}
            for key, value in {**part.arrays, **moved}.items():
                if key in runs:
                    runs[key].append(value)
                else:
                    write(key, value)
            episodes += len(part.arrays["episode_end"])
            frames += len(part.arrays["action"])
        for key in _RUNS.keys() & rows.keys():
            values, ends = (np.concatenate(runs[one]) for one in (key, f"{key}_end"))
            for one, value in zip((key, f"{key}_end"), _join_runs(values, ends), strict=True):
                write(one, value)
    about = {"checksums": checksums, "instructions": list(instructions), "skipped": dict(skipped), "fault": fault}
    if not frames:
        return about | {"statistics": None, "gaussians": None}
    actions = np.memmap(folder / "action.bin", "<f4", "r").reshape(frames, -1)
    statistics = action_statistics(actions, episodes)
    fitted = actions.shape[1] == len(DIMENSIONS)
    normalized = [normalize(part, statistics["action"]) for part in in_parts(actions)] if fitted else []
    gaussians = fit_gaussians(np.concatenate(normalized)).tolist() if fitted else None
    return about | {"statistics": statistics, "gaussians": gaussians}
