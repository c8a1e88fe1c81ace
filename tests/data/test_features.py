"""Datasets with features of every kind are read as written, or refused in one sentence."""

import io
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.indexes import load_index
from helpers.toy_rlds import encode_image, make_rlds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spatialvla_jax.data.oxe import CATALOGUE, make_spec
from spatialvla_jax.errors import InputError

F = tfds.features
LABELS = ["open it", "close it"]


class Kind(NamedTuple):
    """A feature, the value it stores from a step's content, and the error message if it is refused."""

    feature: Any
    store: Any = None  # a function of the step's pixels, texts or action; None: unchanged
    refused: str = ""


def image(shape, dtype=np.uint8, coding="png"):
    return F.Image(shape=shape, dtype=dtype, encoding_format=coding)


# A step has pixels u8[8, 6, 3], three texts (only the first counts) and an action f32[7].
IMAGES = {
    "png": Kind(image((8, 6, 3))),
    "any size": Kind(image((None, None, 3))),
    "jpeg": Kind(image((8, 6, 3), coding="jpeg"), lambda x: encode_image(x)),
    "grey": Kind(image((8, 6, 1)), lambda x: x[..., :1]),
    "alpha": Kind(image((8, 6, 4)), lambda x: np.concatenate([x, x[..., :1]], -1)),
    "bytes": Kind(F.Text(), lambda x: encode_image(x, "PNG")),
    "pixels": Kind(F.Tensor(shape=(8, 6, 3), dtype=np.uint8), refused="encoded image"),
    "coded pixels": Kind(F.Tensor(shape=(8, 6, 3), dtype=np.uint8, encoding="zlib"), refused="encoded image"),
    "16 bits": Kind(image((8, 6, 1), np.uint16), lambda x: x[..., :1].astype(np.uint16), "encoded image"),
    "floats": Kind(
        F.Image(shape=(8, 6, 1), dtype=np.float32), lambda x: x[..., :1].astype(np.float32), "encoded image"
    ),
    "video": Kind(F.Video(shape=(None, 8, 6, 3)), lambda x: np.stack([x, x]), "encoded image"),
    "nothing": Kind(F.Text(), lambda x: b"", "0 bytes"),
    "missing": Kind(None, refused="has no key 'image'"),
}
WORDS = {
    "text": Kind(F.Text(), lambda x: x[0]),
    "spaces": Kind(F.Text(), lambda x: f" {x[0]}\n"),
    "string": Kind(F.Tensor(shape=(), dtype=np.str_), lambda x: x[0]),
    "list": Kind(F.Sequence(F.Text()), lambda x: x[: 1 + len(x[0]) % 3]),
    "three": Kind(F.Sequence(F.Text(), length=3)),
    "strings": Kind(F.Tensor(shape=(3,), dtype=np.str_)),
    "nested": Kind(F.Sequence(F.Sequence(F.Text())), lambda x: [x[:1], x[1:]]),
    "label": Kind(F.ClassLabel(names=LABELS), lambda x: x[0]),
    "labels": Kind(F.Sequence(F.ClassLabel(names=LABELS)), lambda x: x[:1]),
    "letters": Kind(
        F.Tensor(shape=(16,), dtype=np.int32),
        lambda x: np.frombuffer(x[0].encode().ljust(16, b"\0"), np.uint8).astype(np.int32),
    ),
    "embedding": Kind(F.Tensor(shape=(16,), dtype=np.float32), lambda x: np.zeros(16, np.float32), "text is expected"),
    "number": Kind(F.Scalar(np.int64), lambda x: 1, "text is expected"),
    "no names": Kind(F.ClassLabel(num_classes=2), lambda x: 1, "text is expected"),
    "truth": Kind(F.Scalar(np.bool_), lambda x: True, "text is expected"),
    "dict": Kind(F.FeaturesDict({"en": F.Text()}), lambda x: {"en": x[0]}, "text is expected"),
    "not UTF-8": Kind(F.Text(), lambda x: b"\xff\xfe", "not UTF-8"),
    "blank": Kind(F.Text(), lambda x: " \t", "no usable episode .* unlabeled"),
    "empty list": Kind(F.Sequence(F.Text()), lambda x: [], "no usable episode .* unlabeled"),
    "missing": Kind(None, refused="has no key 'words'"),
}
ACTIONS = {
    "seven": Kind(F.Tensor(shape=(7,), dtype=np.float32)),
    "doubles": Kind(F.Tensor(shape=(7,), dtype=np.float64), lambda x: x.astype(np.float64)),
    "unknown width": Kind(F.Tensor(shape=(None,), dtype=np.float32)),
    "sequence": Kind(F.Sequence(np.float32), list),
    "sequence of seven": Kind(F.Sequence(np.float32, length=7), list),
    "rows": Kind(F.Tensor(shape=(1, 7), dtype=np.float32), lambda x: x[None]),
    "six": Kind(F.Tensor(shape=(6,), dtype=np.float32), lambda x: x[:6], "action 6 wide"),
    "sequence of six": Kind(F.Sequence(np.float32), lambda x: list(x[:6]), "action is 6 wide"),
    "some longer": Kind(
        F.Sequence(np.float32), lambda x: list(x) * (1 + int(x[5]) % 2), "7 values in step|14 values in step"
    ),
    "text": Kind(F.Text(), lambda x: "left", "numbers are expected"),
    "coded": Kind(F.Tensor(shape=(7,), dtype=np.float32, encoding="bytes"), refused="numbers are expected"),
    "picture": Kind(image((1, 7, 1)), lambda x: np.zeros((1, 7, 1), np.uint8), "numbers are expected"),
    "not a number": Kind(F.Tensor(shape=(7,), dtype=np.float32), lambda x: x * np.nan, "nan"),
    "open is 255": Kind(
        F.Tensor(shape=(7,), dtype=np.float32), lambda x: np.append(x[:6], np.float32(255)), "255 as the gripper"
    ),
    "closed is -1": Kind(
        F.Tensor(shape=(7,), dtype=np.float32), lambda x: np.append(x[:6], np.float32(-1)), "-1 as the gripper"
    ),
    "missing": Kind(None, refused="has no key 'action'"),
}
LISTS = {"list", "three", "strings", "nested", "labels"}
KEYS = {"image": IMAGES, "words": WORDS, "action": ACTIONS}


def write(folder: Path, kinds: dict[str, Kind], lengths: list[int], seed: int) -> tuple[Path, list[dict[str, Any]]]:
    """A dataset with these features and episode lengths, and what each of its steps stores."""
    rng = np.random.default_rng(seed)
    steps = []
    for number in range(sum(lengths)):
        held: dict[str, Any] = {
            "image": rng.integers(0, 256, (8, 6, 3)).astype(np.uint8),
            "words": [LABELS[seed % 2], "please", f"number {number}"],
            "action": np.asarray([*rng.normal(size=5), number, number % 2], np.float32),
        }
        present = {key: kind for key, kind in kinds.items() if kind.feature}
        steps.append({key: kind.store(held[key]) if kind.store else held[key] for key, kind in present.items()})
    episodes = [steps[end - length : end] for end, length in zip(np.cumsum(lengths), lengths, strict=True)]
    features = {key: kind.feature for key, kind in kinds.items() if kind.feature}
    return make_rlds(folder, {"train": episodes}, step_features=features), steps


def flat(value: Any) -> list[str]:
    return [text for part in value for text in flat(part)] if isinstance(value, list) else [value]


def rgb(stored: Any) -> np.ndarray:
    """The pixels that a reader sees of a stored picture."""
    pixels = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB")) if isinstance(stored, bytes) else stored
    return np.broadcast_to(pixels[..., :3], (8, 6, 3))


def check(folder: Path, image: str, words: str, action: str, which: str, lengths: list[int], seed: int) -> bool:
    """Write a dataset with these features and read it; returns whether it could be read."""
    kinds = {"image": IMAGES[image], "words": WORDS[words], "action": ACTIONS[action]}
    path, steps = write(folder, kinds, lengths, seed)
    refused = [kind.refused for kind in kinds.values() if kind.refused]
    if which and words not in LISTS:
        refused.append("not a list|has no key")
    elif which and not -len(flat(steps[0]["words"])) <= int(which[1:-1]) < len(flat(steps[0]["words"])):
        refused.append("no usable episode .*unlabeled")
    spec = make_spec({"image": "image", "language": f"words{which}", "action": ["action"]}, CATALOGUE, "toy")
    try:
        index = load_index("toy", path, spec, "train", folder / "cache")
    except InputError as error:
        assert refused and re.search("|".join(refused), str(error)) and "'toy'" in str(error), error
        assert "\n" not in str(error) and not list((folder).glob("cache/*"))
        return False
    assert not refused and len(list(folder.glob("cache/*"))) == 1
    assert index.num_frames == len(steps) and index.num_episodes == len(lengths)
    for frame, step in enumerate(steps):
        np.testing.assert_array_equal(index.arrays["action"][frame], np.asarray(step["action"], np.float32).reshape(7))
        text = step["words"] if words == "letters" else flat([*step["words"]] if words == "strings" else step["words"])
        expected = LABELS[seed % 2] if words == "letters" else text[int(which[1:-1]) if which else 0].strip()
        assert index.instructions[index.language(frame)] == expected
        offset, length, _ = index.spans("image", frame).tolist()
        data = Path(index.files[index.arrays["episode_file"][index.episode(frame)]]).read_bytes()
        np.testing.assert_array_equal(rgb(data[offset : offset + length]), rgb(step["image"]))
    return True


@pytest.mark.parametrize(
    ("key", "kind"), [(key, kind) for key, kinds in KEYS.items() for kind in kinds], ids=lambda value: value
)
def test_every_kind(tmp_path, key, kind):
    names = {"image": "png", "words": "text", "action": "seven"} | {key: kind}
    assert check(tmp_path, **names, which="", lengths=[2, 3], seed=0) == (not KEYS[key][kind].refused)


@pytest.mark.parametrize("words", sorted(LISTS))
@pytest.mark.parametrize("which", ["[1]", "[-1]"])
def test_item_of_a_list(tmp_path, words, which):
    assert check(tmp_path, "png", words, "seven", which, [2, 2], 1) == (words != "labels" or which == "[-1]")


def fuzz(folder: Path, examples: int) -> None:
    """Only InputError may be raised. No sample is wrong, and nothing is left behind."""
    counts: Counter[bool] = Counter()

    def kinds(known: dict[str, Kind]) -> st.SearchStrategy[str]:
        return st.sampled_from([name for name, kind in known.items() for _ in range(1 if kind.refused else 10)])

    index = st.sampled_from(["", "", "", "", "[0]", "[1]", "[-1]"])
    lengths = st.lists(st.integers(2, 3), min_size=1, max_size=2)

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(kinds(IMAGES), kinds(WORDS), kinds(ACTIONS), index, lengths, st.integers(0, 10**6))
    def run(image: str, words: str, action: str, which: str, lengths: list[int], seed: int) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            counts[check(Path(place), image, words, action, which, lengths, seed)] += 1

    run()
    assert counts.total() >= examples and counts[True] >= 0.3 * counts.total()


def test_any_combination(tmp_path):
    fuzz(tmp_path, 100)


@pytest.mark.slow
def test_many_combinations(tmp_path):
    fuzz(tmp_path, 2000)
