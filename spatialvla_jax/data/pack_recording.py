"""Recorded episodes straight into a packed file, as `data pack` makes one of RLDS: no TensorFlow, no compression."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spatialvla_jax.data.config import DataConfig
from spatialvla_jax.data.index import Index
from spatialvla_jax.data.oxe import CATALOGUE
from spatialvla_jax.data.oxe.operations import apply_operations
from spatialvla_jax.data.pack import Pictures, write_pack
from spatialvla_jax.data.statistics import action_statistics
from spatialvla_jax.errors import InputError
from spatialvla_jax.text import train_tokenizer

SPEC = "libero"  # the catalogue's entry for what `record` writes
VOCABULARY = 256  # of the tokenizer, at most

Known = tuple[str, str, Float[np.ndarray, "_ A"]]  # of an episode: split, instruction, actions


def _index(known: Sequence[Known], instructions: Sequence[str], name: str, every: int) -> Index:
    """All of a split's episodes but their pictures."""
    steps = [len(actions) for *_, actions in known]
    seen = [np.arange(0, count, every, dtype=np.int32) for count in steps]
    lengths = [len(rows) for rows in seen]
    canonical = [apply_operations({"action": actions}, CATALOGUE[SPEC].operations)["action"] for *_, actions in known]
    numbers = np.array([instructions.index(language) for _, language, _ in known], np.int32)
    episodes = np.arange(len(known), dtype=np.int32)
    arrays = {
        "action": np.concatenate(canonical).astype(np.float32),
        "intrinsics": np.zeros((sum(lengths), 3, 3), np.float32),  # only their place: they come with the pictures
        "step": np.concatenate(seen),
        "language": np.repeat(numbers, lengths),
        "episode_end": np.cumsum(lengths),
        "episode_file": 0 * episodes,
        "episode_number": episodes,
    }
    if every > 1:
        ends = np.cumsum(steps)
        arrays |= {"action_row": arrays["step"] + np.repeat(ends - steps, lengths), "action_end": ends}
    statistics = action_statistics(arrays["action"], len(known))
    return Index(name, CATALOGUE[SPEC], ("the recording",), tuple(instructions), statistics, len(known), {}, arrays)


class _Recording:
    """The splits as `write_pack` reads them from a loader, an episode at a time."""

    def __init__(self, name: str, indexes: dict[str, Index], episodes: Iterator[dict], image_size: int) -> None:
        self.config = DataConfig(datasets=({"name": name, "spec": SPEC},))
        self.image_size, self.depth, self.weights = image_size, True, (1.0,)
        self.tokenizer = train_tokenizer(next(iter(indexes.values())).instructions, VOCABULARY)
        self._indexes, self._episodes = indexes, episodes

    def indexes(self, split: str) -> tuple[Index, ...]:
        return (self._indexes[split],)

    def epoch(self, batch_size: int, split: str) -> Iterator[Pictures]:
        index, start = self._indexes[split], 0
        for end in index.arrays["episode_end"].tolist():
            seen = [step["observation"] for step in next(self._episodes)["steps"]]
            arrays = {key: np.stack([frame[key] for frame in seen]) for key in ("image", "intrinsics", "depth")}
            ids = np.arange(start, end)
            yield Pictures(**arrays, sample_id=ids, dataset_id=0 * ids, valid=ids >= 0)
            start = end


def check_file(out: Path) -> None:
    """Raises `InputError` when `out` exists already."""
    if out.exists():
        raise InputError(f"{out} exists already: expected the name of a file that does not")


def write_packed(
    out: Path, known: Sequence[Known], episodes: Iterable[dict], *, name: str, image_size: int, every: int = 1
) -> dict[str, Any]:
    """Writes the episodes as the dataset `name`, by rename; returns what `write_pack` does.

    What is `known` of each beforehand tells how large the file will be, so that the pictures go into their places as
    they come, whole splits one after the other. An episode is as `writer.features` describes it, its images arrays of
    `image_size`, which a model must then have; its steps are those with pictures, with `every` 3 each third from the
    first on. Raises InputError, also when there is no room.
    """
    instructions = list(dict.fromkeys(language for _, language, _ in known))
    splits = list(dict.fromkeys(split for split, *_ in known))
    assert [one[0] for one in known] == sorted((one[0] for one in known), key=splits.index), "splits are mixed"
    indexes = {split: _index([one for one in known if one[0] == split], instructions, name, every) for split in splits}
    recording = _Recording(name, indexes, iter(episodes), image_size)
    return write_pack(recording, out, splits)
