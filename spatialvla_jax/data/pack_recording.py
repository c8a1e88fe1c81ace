"""Writes recorded episodes directly to a packed file like that of `data pack`: no RLDS, TensorFlow or compression."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spatialvla_jax.data.config import DataConfig
from spatialvla_jax.data.index import Index
from spatialvla_jax.data.oxe import CATALOGUE
from spatialvla_jax.data.oxe.operations import apply_operations
from spatialvla_jax.data.pack import RECORDED, Pictures, write_pack
from spatialvla_jax.data.statistics import action_statistics
from spatialvla_jax.errors import InputError
from spatialvla_jax.text import train_tokenizer

SPEC = "libero"  # the catalogue's spec for recorded episodes
VOCABULARY = 256  # of the tokenizer, at most

Known = tuple[str, str, Float[np.ndarray, "_ A"]]  # an episode's split, instruction and actions


def _index(known: Sequence[Known], instructions: Sequence[str], name: str, every: int) -> Index:
    """The index of a split's episodes: everything except their images."""
    steps = [len(actions) for *_, actions in known]
    steps_with_images = [np.arange(0, count, every, dtype=np.int32) for count in steps]
    lengths = [len(rows) for rows in steps_with_images]
    canonical = [apply_operations({"action": actions}, CATALOGUE[SPEC].operations)["action"] for *_, actions in known]
    numbers = np.array([instructions.index(language) for _, language, _ in known], np.int32)
    episodes = np.arange(len(known), dtype=np.int32)
    arrays = {
        "action": np.concatenate(canonical).astype(np.float32),
        "intrinsics": np.zeros((sum(lengths), 3, 3), np.float32),  # placeholder: they come with the images
        "step": np.concatenate(steps_with_images),
        "language": np.repeat(numbers, lengths),
        "episode_end": np.cumsum(lengths),
        "episode_file": 0 * episodes,
        "episode_number": episodes,
    }
    if every > 1:
        ends = np.cumsum(steps)
        arrays |= {"action_row": arrays["step"] + np.repeat(ends - steps, lengths), "action_end": ends}
    return Index(
        name=name,
        spec=CATALOGUE[SPEC],
        files=("the recording",),
        instructions=tuple(instructions),
        statistics=action_statistics(arrays["action"], len(known)),
        num_read=len(known),
        skipped={},
        arrays=arrays,
    )


class _Recording:
    """The splits with the interface that `write_pack` needs, yielding one episode at a time."""

    def __init__(self, name: str, indexes: dict[str, Index], episodes: Iterator[dict], image_size: int) -> None:
        self.config = DataConfig(datasets=({"name": name, "spec": SPEC},))
        self.image_size, self.depth, self.weights = image_size, True, (1.0,)
        self.extra = RECORDED
        self.tokenizer = train_tokenizer(next(iter(indexes.values())).instructions, VOCABULARY)
        self._indexes, self._episodes = indexes, episodes

    def indexes(self, split: str) -> tuple[Index, ...]:
        return (self._indexes[split],)

    def epoch(self, batch_size: int, split: str) -> Iterator[Pictures]:
        index, start = self._indexes[split], 0
        for end in index.arrays["episode_end"].tolist():
            frames = [step["observation"] for step in next(self._episodes)["steps"]]
            keys = ("image", "intrinsics", "depth", *self.extra)
            arrays = {key: np.stack([frame[key] for frame in frames]) for key in keys}
            extra = {key: arrays.pop(key) for key in self.extra}
            ids = np.arange(start, end)
            yield Pictures(**arrays, extra=extra, sample_id=ids, dataset_id=0 * ids, valid=ids >= 0)
            start = end


def check_file(out: Path) -> None:
    """Raises InputError if `out` already exists."""
    if out.exists():
        raise InputError(f"{out} already exists: expected the name of a new file")


def write_packed(
    out: Path, known: Sequence[Known], episodes: Iterable[dict], *, name: str, image_size: int, every: int = 1
) -> dict[str, Any]:
    """Write the episodes as the dataset `name`, by rename; returns the result of `write_pack`.

    `known` describes the episodes in advance and determines the file's size. Images are then written to their places as
    they arrive, one whole split after another. Episodes are as in `rlds_writer.features`, with images as arrays of
    `image_size`, which a model must match. Observations also have the camera's "extrinsics" f32[4, 4]; "target" f32[3],
    the position of the task's object in the camera's frame; and "hand" f32[4], that of the point between the fingertips
    and how far apart they are. The frame is in metres: x right, y down, z forward. Episodes contain only steps with
    images: with `every` 3, each third step from the first. Raises InputError, also if there is not enough room.
    """
    instructions = list(dict.fromkeys(language for _, language, _ in known))
    splits = list(dict.fromkeys(split for split, *_ in known))
    assert [one[0] for one in known] == sorted((one[0] for one in known), key=splits.index), "splits are mixed"
    indexes = {split: _index([one for one in known if one[0] == split], instructions, name, every) for split in splits}
    recording = _Recording(name, indexes, iter(episodes), image_size)
    return write_pack(recording, out, splits)
