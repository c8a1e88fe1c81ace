"""The parts of an index: what each shard of a split holds. Parts are read anywhere and merged in the shards' order, so
that the index is the same, bit for bit, however many machines have read them."""

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

# A row for every frame. Spans are u32: offset behind `episode_record`'s, length, CRC-32C.
PER_FRAME: dict[str, tuple[str, tuple[int, ...]]] = {
    "action": ("<f4", (-1,)),  # as many as the dataset's actions have
    "image": ("<u4", (3,)),
    "depth": ("<u4", (3,)),
}
# A row for every run of frames that share the value; KEY_end i64 has the end of each run.
_RUNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "language": ("<i4", ()),
    "step": ("<i8", ()),  # less the number of the frame
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
    """Dtype and shape of a row of each array of a dataset's index."""
    rows = PER_FRAME | {"action": ("<f4", (action_dim,))} | _RUNS | _RUN_ENDS | _EPISODES
    absent = {name for key in ("depth", "intrinsics") if not getattr(spec, key) for name in (key, f"{key}_end")}
    return {key: row for key, row in rows.items() if key not in absent}


class Part(NamedTuple):
    """What one or more consecutive shards hold of a split. Frames count from the part's first one; files are numbered
    as the split's shards are."""

    arrays: Mapping[str, np.ndarray]  # see `layout`
    instructions: tuple[str, ...]
    skipped: Mapping[str, int] = {}  # episodes left out, by reason
    fault: str = ""  # a sentence on the first damaged episode

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
    """The part of the shard with this number. Its faults are counted, and the first one is told; what is wrong with the
    whole dataset raises InputError."""
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
    """Neighbouring runs of the same bits made one."""
    if not len(values):
        return values, ends
    bits = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint32)
    last = np.append((bits[1:] != bits[:-1]).any(axis=1), True)
    return values[last], ends[last]


def merge_parts(
    parts: Iterable[Part], rows: Rows, folder: Path, check: Callable[[Part, Counter[str]], None]
) -> dict[str, Any]:
    """Writes the arrays of an index, KEY.bin, to a folder. `parts` come in the shards' order; `check(part, skipped so
    far)` is called for each.

    Returns what meta.json says of them: "checksums" (CRC-32C of each file), "instructions", "statistics", "gaussians"
    (as `fit_gaussians`; both None without any frame), "skipped", "fault".
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
