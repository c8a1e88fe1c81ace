"""Episodes written and read back through TFDS."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.full_disk import no_room
from helpers.toy_rlds import encode_image

from spatialvla_jax.data.importers.rlds_writer import write_episodes
from spatialvla_jax.errors import InputError

SIZE = 16


def episode(length: int, seed: int) -> tuple[dict, np.ndarray]:
    rng = np.random.default_rng(seed)
    depth = rng.integers(0, 2**16, (length, SIZE, SIZE), dtype=np.uint16)
    steps = [
        {
            "observation": {
                "image": rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
                "depth": encode_image(depth[i], "PNG"),
                "intrinsics": rng.normal(size=(3, 3)).astype(np.float32),
                "state": rng.normal(size=8).astype(np.float32),
            },
            "action": rng.uniform(-1, 1, 7).astype(np.float32),
            "language_instruction": f"task {seed}",
            "is_first": i == 0,
            "is_last": i == length - 1,
            "is_terminal": i == length - 1,
            "reward": 0.0,
            "discount": 1.0,
        }
        for i in range(length)
    ]
    metadata = {"task_id": seed, "task_name": f"name {seed}", "seed": 2**32 - 1, "init_state": 3, "success": True}
    return {"steps": steps, "episode_metadata": metadata | {"extrinsics": np.eye(4, dtype=np.float32)}}, depth


def write(out, episodes):
    return write_episodes(out, episodes, image_size=SIZE, episodes_per_shard=2, description="toy")


def test_what_is_written_is_read_back(tmp_path):
    made = [episode(length, seed) for seed, length in enumerate((3, 1, 4, 2))]
    pairs = [("train", made[0][0]), ("val", made[1][0]), ("train", made[2][0]), ("train", made[3][0])]
    directory = write(tmp_path / "toy", pairs)
    assert directory == tmp_path / "toy" / "1.0.0"
    builder = tfds.builder_from_directory(str(directory))
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 3, "val": 1}
    assert builder.info.splits["train"].num_shards == 2
    for split, numbers in (("train", (0, 2, 3)), ("val", (1,))):
        for read, number in zip(builder.as_dataset(split), numbers, strict=True):
            wrote, depth = made[number]
            assert read["episode_metadata"]["task_id"].numpy() == number
            assert read["episode_metadata"]["seed"].numpy() == 2**32 - 1
            steps = list(read["steps"].as_numpy_iterator())
            np.testing.assert_array_equal([s["observation"]["depth"][..., 0] for s in steps], depth)
            for got, want in zip(steps, wrote["steps"], strict=True):
                np.testing.assert_array_equal(got["action"], want["action"])
                np.testing.assert_array_equal(got["observation"]["state"], want["observation"]["state"])
                assert got["language_instruction"].decode() == want["language_instruction"]
                assert (got["is_first"], got["is_last"]) == (want["is_first"], want["is_last"])


def test_an_existing_dataset_is_kept(tmp_path):
    directory = write(tmp_path / "toy", [("train", episode(2, 0)[0])])
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(InputError, match="already exists"):
        write(tmp_path / "toy", [("train", episode(3, 1)[0])])
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_an_error_on_the_way_leaves_nothing_behind(tmp_path):
    def broken():
        yield "train", episode(2, 0)[0]
        raise RuntimeError("the renderer died")

    with pytest.raises(RuntimeError, match="the renderer died"):
        write(tmp_path / "toy", broken())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [1000, 12_000])
def test_a_full_disk_leaves_nothing_behind(tmp_path, limit):
    """The disk fills up during TFDS's writes, and during TensorFlow's."""
    out = tmp_path / "toy"
    with no_room(limit), pytest.raises(InputError, match=f"^{out}/1.0.0 cannot be written: ") as failed:
        write(out, (("train", episode(4, seed)[0]) for seed in range(4)))
    assert "\n" not in str(failed.value) and not list(tmp_path.iterdir())
