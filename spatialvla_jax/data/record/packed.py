"""Recorded episodes straight into a packed file, as `data pack` makes one of RLDS: no TensorFlow, no compression."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from spatialvla_jax.data.index import Index
from spatialvla_jax.data.oxe import CATALOGUE
from spatialvla_jax.data.oxe.operations import apply_operations
from spatialvla_jax.data.pack import write_pack
from spatialvla_jax.data.prompt import train_tokenizer
from spatialvla_jax.data.statistics import action_statistics
from spatialvla_jax.errors import InputError

SPEC = "libero"  # the catalogue's entry for what `record` writes
VOCABULARY = 256  # of the tokenizer, at most


class _Spill:
    """The frames of one split on disk until all are there, because a packed file begins with their number."""

    def __init__(self, folder: Path, split: str, image_size: int) -> None:
        shape = (image_size, image_size)
        self.rows = {"image": (np.uint8, (*shape, 3)), "depth": (np.uint16, shape)}
        self.files: dict[str, BinaryIO] = {key: open(folder / f"{split}.{key}", "w+b") for key in self.rows}  # noqa: SIM115
        self.columns: dict[str, list[np.ndarray]] = {key: [] for key in ("action", "intrinsics", "step", "language")}
        self.ends: list[int] = []

    def add(self, steps: list[dict[str, Any]], language: int) -> None:
        for key, file in self.files.items():
            for step in steps:
                file.write(step["observation"][key].tobytes())
        action = np.stack([step["action"] for step in steps])
        episode = apply_operations({"action": action}, CATALOGUE[SPEC].operations)
        self.columns["action"].append(episode["action"].astype(np.float32))
        self.columns["intrinsics"].append(np.stack([step["observation"]["intrinsics"] for step in steps]))
        self.columns["step"].append(np.arange(len(steps), dtype=np.int32))
        self.columns["language"].append(np.full(len(steps), language, np.int32))
        self.ends.append(len(steps) + (self.ends[-1] if self.ends else 0))

    def index(self, name: str, instructions: tuple[str, ...]) -> Index:
        arrays = {key: np.concatenate(parts) for key, parts in self.columns.items()}
        episodes = np.arange(len(self.ends), dtype=np.int32)
        arrays |= {"episode_end": np.array(self.ends), "episode_file": 0 * episodes, "episode_number": episodes}
        for key, (dtype, shape) in self.rows.items():
            self.files[key].flush()
            arrays[key] = np.memmap(self.files[key], dtype, "r", shape=(self.ends[-1], *shape))
        statistics = action_statistics(arrays["action"], len(episodes))
        return Index(name, CATALOGUE[SPEC], ("the recording",), instructions, statistics, len(episodes), {}, arrays)


class _Recording:
    """The splits as `write_pack` reads them from a loader."""

    def __init__(self, indexes: dict[str, Index], image_size: int, instructions: Iterable[str]) -> None:
        self.image_size, self.depth, self.weights = image_size, True, (1.0,)
        self.tokenizer = train_tokenizer(instructions, VOCABULARY)
        self._indexes = indexes

    def indexes(self, split: str) -> tuple[Index, ...]:
        return (self._indexes[split],)

    def epoch(self, batch_size: int, split: str) -> Iterator[dict[str, np.ndarray]]:
        index = self._indexes[split]
        for start in range(0, index.num_frames, batch_size):
            ids = np.arange(start, min(start + batch_size, index.num_frames))
            batch = {key: index.arrays[key][ids] for key in ("image", "intrinsics")}
            batch["depth"] = index.arrays["depth"][ids].astype(np.float32) * np.float32(index.spec.depth_unit)
            yield batch | {"sample_id": ids, "dataset_id": 0 * ids, "valid": ids >= 0}


def check_file(out: Path) -> None:
    """Raises `InputError` when `out` exists already."""
    if out.exists():
        raise InputError(f"{out} exists already: expected the name of a file that does not")


def write_packed(out: Path, episodes: Iterable[tuple[str, dict]], *, name: str, image_size: int) -> dict[str, Any]:
    """Writes (split, episode) pairs as the dataset `name`, by rename; returns what `write_pack` does.

    An episode is as `writer.features` describes it, its images arrays of `image_size`, which a model must then have.
    The disk holds the frames twice meanwhile. Raises InputError, also when there is no room.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".incomplete-") as folder:
        spills: dict[str, _Spill] = {}
        instructions: dict[str, int] = {}
        try:
            for split, episode in episodes:
                steps = episode["steps"]
                language = instructions.setdefault(steps[0]["language_instruction"], len(instructions))
                if split not in spills:
                    spills[split] = _Spill(Path(folder), split, image_size)
                spills[split].add(steps, language)
            indexes = {split: spill.index(name, tuple(instructions)) for split, spill in spills.items()}
            recording = _Recording(indexes, image_size, instructions)
            return write_pack(recording, out, {"datasets": [{"name": name, "spec": SPEC}]}, list(indexes))
        except OSError as error:
            raise InputError(f"{out} cannot be written: {error.strerror or error}") from error
        finally:
            for spill in spills.values():
                for file in spill.files.values():
                    file.close()
