import sys

import numpy as np
import pytest
import tensorflow as tf
from helpers.streams import take
from helpers.toy_rlds import data_config, encode_image

from spatialvla_jax.cli import main
from spatialvla_jax.data import load_data
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
    """As a dlimp pipeline gives them, images encoded or not."""
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
    """Images bit for bit, depth, actions and words; and it is a dataset that resumes like any other."""
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
    loader = load_data(config, image_size=SIZE, depth=True)
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
        ([{"a": np.zeros(3), "b": {"c": np.zeros((2, 5))}}], r"one row a step .* a \(3,\), b/c \(2, 5\)"),
        ([{"a": np.float32(1)}], r"one row a step .* a \(\)"),
        ([{"a": np.zeros(0)}], "has no steps"),
        ([{"a": np.zeros(2)}, {"a": np.zeros(2), "b": np.zeros(2)}], r"trajectory 1 .* differ in \['b'\]"),
        (
            [{"a": np.zeros((2, 3))}, {"a": np.zeros((2, 4))}],
            r"not like the first one: a is tensor float64\[4\], not tensor float64\[3\]",
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
    assert "exists already" in capsys.readouterr().err
    config = data_config(out / "1.0.0", cache_dir=tmp_path / "cache")
    config["datasets"][0]["spec"] = SPEC
    loader = load_data(config, image_size=SIZE)
    assert (loader.num_frames("train"), loader.num_frames("val")) == (11, 3)


@pytest.mark.parametrize("function", ["no_such_module:make", "json:make", "json", "json:"])
def test_bad_function(function):
    with pytest.raises(InputError, match="is not a function without arguments, written module:name"):
        trajectories_of(function)
