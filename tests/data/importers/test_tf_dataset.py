import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from helpers.streams import take
from helpers.toy_rlds import data_config, encode_image

from spatialvla_jax.cli import main
from spatialvla_jax.data import Loader
from spatialvla_jax.data.images import decode_image
from spatialvla_jax.data.importers.tf_dataset import trajectories_of, write_rlds
from spatialvla_jax.errors import InputError

SIZE = 16
RNG = np.random.default_rng(0)
LENGTHS = (4, 1, 6)
SPEC = {
    "image": "observation/image_primary",
    "language": "task/language_instruction",
    "depth": "observation/depth",
    "arrays": ["observation/proprio"],
}


def trajectories(lengths=LENGTHS, encoded=True):
    """Trajectories like a dlimp pipeline's, with images encoded or not."""
    for number, length in enumerate(lengths):
        pixels = RNG.integers(0, 256, (length, 20, 24, 3)).astype(np.uint8)
        images = np.asarray([encode_image(image, "PNG") for image in pixels], object) if encoded else pixels
        yield {
            "observation": {
                "image_primary": images,
                "depth": RNG.integers(1, 3000, (length, 20, 24, 1)).astype(np.uint16),
                "proprio": RNG.normal(size=(length, 3)).astype(np.float32),
                "timestep": np.arange(length),
            },
            "task": {"language_instruction": np.asarray([f"do thing {number}".encode()] * length, object)},
            "action": np.concatenate([RNG.uniform(-1, 1, (length, 6)), np.ones((length, 1))], 1).astype(np.float32),
            "done": np.arange(length) == length - 1,
        }


def as_tf(items, kind=tf.data.Dataset):
    """A tf.data.Dataset of the same trajectories."""
    items = list(items)
    signature = tf.nest.map_structure(
        lambda x: tf.TensorSpec([None, *x.shape[1:]], tf.string if x.dtype == object else x.dtype), items[0]
    )
    return kind.from_generator(lambda: iter(items), output_signature=signature)


@pytest.mark.parametrize("kind", ["tf", "iterable", "dlimp"])
@pytest.mark.parametrize("encoded", [True, False])
def test_frames_come_back(tmp_path, kind, encoded):
    """Images (bit for bit), depth, actions and instructions survive, and the dataset resumes like any other."""
    items = list(trajectories(encoded=encoded))
    calls = []
    data = as_tf(items) if kind == "tf" else items
    if kind == "dlimp":
        dlimp = pytest.importorskip("dlimp", reason="not on the package index: the extra [dlimp]")
        data = as_tf(items, dlimp.DLataset).map(lambda trajectory: trajectory)
    path, stored, _ = write_rlds({"train": data}, tmp_path / "mine", progress=lambda *call: calls.append(call))
    assert path == tmp_path / "mine" / "1.0.0" and [p.name for p in (tmp_path / "mine").iterdir()] == ["1.0.0"]
    assert calls == [("train", n + 1, 3 if kind == "iterable" else None) for n in range(3)]
    assert stored["observation/image_primary"] == "image uint8[?, ?, 3]" and stored["action"] == "tensor float32[7]"
    assert stored["task/language_instruction"] == "text" and stored["observation/depth"] == "image uint16[?, ?, 1]"
    config = data_config(path, cache_dir=tmp_path / "cache")
    config["datasets"][0]["spec"] = SPEC
    loader = Loader(config, image_size=SIZE, depth=True)
    for item, episode in zip(items, loader.episodes("train"), strict=True):
        images = item["observation"]["image_primary"]
        for row, image in enumerate(images):
            image = image if encoded else encode_image(image, "PNG")
            np.testing.assert_array_equal(episode.frames.image[row], decode_image(image, SIZE)[0])
        assert episode.instruction == item["task"]["language_instruction"][0].decode()
        assert episode.frames.depth.max() <= 3 and len(episode.frames.image) == len(images)
    actions = np.concatenate([item["action"] for item in items])
    np.testing.assert_array_equal(loader.indexes()[0].arrays["action"], actions)
    whole = take(loader.batches(4), 6)
    np.testing.assert_array_equal(next(loader.batches(4, start_step=5)).image, whole[5].image)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no trajectories in 'train'"),
        ([1], "trajectory 0 of 'train': it is int: expected a dict"),
        ([{"a": np.zeros(3), "b": {"c": np.zeros((2, 5))}}], r"one row per step .* a \(3,\), b/c \(2, 5\)"),
        ([{"a": np.float32(1)}], r"one row per step .* a \(\)"),
        ([{"a": np.zeros(0)}], "has no steps"),
        (
            [{"a": np.zeros(2)}, {"a": np.zeros(2), "b": np.zeros(2)}],
            r"trajectory 1 .* differ from those of the first one in \['b'\]",
        ),
        (
            [{"a": np.zeros((2, 3))}, {"a": np.zeros((2, 4))}],
            r"differs from the first one: a is tensor float64\[4\], not tensor float64\[3\]",
        ),
    ],
)
def test_bad_trajectories(tmp_path, items, message):
    with pytest.raises(InputError, match=message):
        write_rlds({"train": items}, tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_pipeline.py").write_text(
        "from my_trajectories import as_tf, trajectories\n\n\n"
        "def make():\n    return {'train': as_tf(trajectories()), 'val': as_tf(trajectories((3,)))}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "my_trajectories", sys.modules[__name__])
    out = tmp_path / "mine"
    assert main(["data", "import", "--from", "my_pipeline:make", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out / '1.0.0'}" in printed and "observation/image_primary: image uint8[?, ?, 3]" in printed
    assert main(["data", "import", "--from", "my_pipeline:make", "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    config = data_config(out / "1.0.0", cache_dir=tmp_path / "cache")
    config["datasets"][0]["spec"] = SPEC
    loader = Loader(config, image_size=SIZE)
    assert (loader.num_frames("train"), loader.num_frames("val")) == (11, 3)


@pytest.mark.parametrize("function", ["no_such_module:make", "json:make", "json", "json:"])
def test_bad_function(function):
    with pytest.raises(InputError, match="is not a function without arguments, written module:name"):
        trajectories_of(function)


def steps(image=None, length=3, **more):
    """A trajectory whose frames are numbers."""
    pixels = np.random.default_rng(1).integers(0, 256, (length, 20, 24, 3)).astype(np.uint8)
    action = np.zeros((length, 7), np.float32)
    return {"image": pixels if image is None else image(pixels), "action": action, "text": ["go"] * length} | more


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda x: x.transpose(0, 3, 1, 2), "image uint8[?, ?, 3]"),
        (lambda x: np.concatenate([x, np.full_like(x[..., :1], 255)], -1), "image uint8[?, ?, 3]"),
        (lambda x: (x / 255).astype(np.float32), "image uint8[?, ?, 3]"),
        (lambda x: [*x], "image uint8[?, ?, 3]"),
        (lambda x: x[..., 0], "image uint8[?, ?, 1]"),
    ],
)
def test_frames_as_numbers(tmp_path, change, kind):
    path, stored, _ = write_rlds({"train": [steps(change)]}, tmp_path / "mine")
    assert stored == {"image": kind, "action": "tensor float32[7]", "text": "text"}
    expected = steps()["image"]
    (episode,) = tfds.builder_from_directory(path).as_dataset("train")
    for step, pixels in zip(episode["steps"].as_numpy_iterator(), expected, strict=True):
        np.testing.assert_array_equal(step["image"], pixels if kind.endswith("3]") else pixels[..., :1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": lambda x: x.astype(np.float32)}, r"image: frames are float32\[20, 24, 3\] from"),
        ({"image": lambda x: np.concatenate([x, x[..., :1]], -1)}, "image: .* a fourth channel"),
        ({"image": lambda x: x[:, None]}, r"image: a frame has the shape \[1, 20, 24, 3\]"),
        ({"image": lambda x: [row.tobytes() for row in x]}, "image: a byte string is neither a JPEG, a PNG nor UTF-8"),
        ({"image": lambda x: [encode_image(row)[:-9] for row in x]}, "image: a JPEG of .* bytes is cut short"),
        ({"action": [[1], [1, 2], [1]]}, "action is not an array"),
        ({"action": np.asarray([[1], [1, 2], [1]], object)}, "action: rows have different shapes"),
        ({"action": np.full(3, None)}, "action: rows are Python objects"),
        ({"text": [["a", "b"]] * 3}, r"text: a step has strings of the shape \[2\]"),
        ({"text/words": ["a"] * 3}, "'text' is an array, but there are keys within it"),
    ],
)
def test_a_faulty_trajectory_is_named_or_left_out(tmp_path, changes, message):
    bad = steps(changes.get("image"), **{key: value for key, value in changes.items() if key != "image"})
    with pytest.raises(InputError, match=f"trajectory 0 of 'train': {message}"):
        write_rlds({"train": [bad, steps()]}, tmp_path / "mine")
    assert not list(tmp_path.iterdir())
    path, _, skipped = write_rlds({"train": [bad, steps(), steps()]}, tmp_path / "mine", faults="skip")
    builder = tfds.builder_from_directory(path)
    assert builder.info.splits["train"].num_examples == 2
    assert builder.info.metadata == {"skipped": {skipped[0].reason: 1}, "faults": [str(skipped[0])]}


def test_numbers_that_are_no_frames_stay_tensors(tmp_path):
    joints, points = np.zeros((3, 2, 21, 3), np.float32), np.zeros((3, 20, 24), np.float32)
    _, stored, _ = write_rlds({"train": [steps(joints=joints, points=points)]}, tmp_path / "mine")
    assert stored["joints"] == "tensor float32[2, 21, 3]" and stored["points"] == "tensor float32[20, 24]"


USERS = """
import numpy as np
def raises(): raise ValueError("no robot today")
def missing(): import no_such_module
def later():
    yield {"a": np.zeros(3)}
    raise RuntimeError("the camera is gone")
def nothing(): return None
def argument(x): return []
empty = 3
def no_splits(): return {}
def validation(): return {"train": [{"a": np.zeros(3)}], "val": []}
"""


@pytest.mark.parametrize(
    ("function", "message", "own"),
    [
        ("raises", "raised ValueError: no robot today", "in raises"),
        ("missing", "raised ModuleNotFoundError: No module named 'no_such_module'", "in missing"),
        ("later", "the dataset of 'train' raised RuntimeError: the camera is gone", "in later"),
        ("nothing", "the split 'train' is NoneType: expected a tf.data.Dataset", None),
        ("argument", "is not a function without arguments, written module:name: missing a required", None),
        ("empty", "users_pipeline has no function 'empty'", None),
        ("no_splits", "there are no splits", None),
        ("validation", "there are no trajectories in 'val'", None),
    ],
)
def test_what_the_users_function_does_wrong(tmp_path, monkeypatch, capsys, function, message, own):
    """The user's exception is shown with its traceback, from the user's file on; our own errors are one sentence."""
    (tmp_path / "users_pipeline.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_pipeline", raising=False)
    assert main(["data", "import", "--from", f"users_pipeline:{function}", "--out", str(tmp_path / "x" / "mine")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "trajectory [" not in line]
    assert message in lines[-1] and not (tmp_path / "x").exists()
    traceback = "\n".join(lines[:-1])
    assert traceback.startswith("Traceback") == bool(own) and "spatialvla_jax" not in traceback
    if own:
        first = next(line for line in lines if line.startswith("  File"))
        assert "users_pipeline.py" in first and first.endswith(own)


def test_a_file_that_is_not_python(tmp_path, monkeypatch, capsys):
    (tmp_path / "no_python.py").write_text("def make(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["data", "import", "--from", "no_python:make", "--out", str(tmp_path / "mine")]) == 2
    error = capsys.readouterr().err
    assert "the module 'no_python' raised SyntaxError" in error.splitlines()[-1] and "def make(:" in error
