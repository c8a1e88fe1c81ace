import random

import numpy as np
import pytest
from helpers.checkpoints import equal

from spatialvla_jax.checkpoints import (
    read_big_vision,
    read_checkpoint,
    read_huggingface,
    write_big_vision,
    write_huggingface,
)
from spatialvla_jax.checkpoints.big_vision import open_npz
from spatialvla_jax.checkpoints.mapping import flatten
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.convert import cast, convert


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_we_write_we_read_back(checkpoint, tmp_path, dtype):
    stored = cast(checkpoint, dtype)
    write_big_vision(tmp_path / "model.npz", stored)
    assert equal(read_big_vision(tmp_path / "model.npz"), stored)
    write_big_vision(tmp_path / "again.npz", read_big_vision(tmp_path / "model.npz"))
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "model.npz").read_bytes()


def test_the_golden_model_through_all_three(golden, tmp_path):
    """Published → big_vision → Orbax → published: the same bytes in every tensor."""
    assert convert(golden, tmp_path / "a.npz", to="big_vision")["bit_exact"]
    assert convert(tmp_path / "a.npz", tmp_path / "b", to="orbax")["bit_exact"]
    assert convert(tmp_path / "b", tmp_path / "c", to="pytorch", verify=False)["bit_exact"]
    assert equal(read_huggingface(tmp_path / "c"), read_huggingface(golden))


def test_names_are_big_visions(checkpoint, tmp_path):
    write_big_vision(tmp_path / "model.npz", cast(checkpoint, "bfloat16"))
    with np.load(tmp_path / "model.npz", allow_pickle=False) as arrays:
        assert arrays["params/llm/layers/attn/kv_einsum/w"].shape == (4, 2, 2, 24, 8)
        assert arrays["params/llm/layers/attn/kv_einsum/w"].dtype == "V2"  # bfloat16, as numpy stores it
        assert arrays["params/img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"].shape == (2, 32, 48)
        assert arrays["params/img/pos_embedding"].shape == (1, 16, 32)


def test_bad_files_are_named(checkpoint, tmp_path):
    write_huggingface(tmp_path / "hf", checkpoint)
    write_big_vision(tmp_path / "model.npz", checkpoint)
    data = (tmp_path / "model.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(data[:-500])
    middle = len(data) // 2
    (tmp_path / "damaged.npz").write_bytes(data[:middle] + bytes(64) + data[middle + 64 :])
    np.savez(tmp_path / "other.npz", **{"params/img/x": np.zeros(3, np.float32)})
    array = {"params/img/x": np.zeros(3, np.float32)}
    np.savez(tmp_path / "cut.npz", **array, spatialvla_jax=np.array("{"))
    np.savez(tmp_path / "list.npz", **array, spatialvla_jax=np.array("[]"))
    np.savez(tmp_path / "ints.npz", **{"params/img/x": np.zeros(3, np.int32)})
    for name, says in [
        ("short.npz", r"short\.npz is not a complete \.npz file"),
        ("damaged.npz", r"damaged\.npz cannot be read at params/"),
        ("other.npz", "is not a SpatialVLA"),
        ("cut.npz", r"cut\.npz cannot be read at spatialvla_jax: "),
        ("list.npz", r"list\.npz: spatialvla_jax is \[\], but a dict is expected"),
        ("ints.npz", r"1 tensor with a dtype other than float32, float16, bfloat16: img/x \(int32\)"),
    ]:
        with pytest.raises(InputError, match=says):
            read_big_vision(tmp_path / name).params()
    with pytest.raises(InputError, match="exists"):
        write_big_vision(tmp_path / "model.npz", checkpoint)
    assert (tmp_path / "model.npz").read_bytes() == data


@pytest.mark.parametrize("stride", [29, pytest.param(3, marks=pytest.mark.slow)])
def test_a_flipped_bit_does_not_load(stride, tmp_path):
    """Flips bits in the archive's records and contents: reading raises one line, or gives the same arrays."""
    path, rng = tmp_path / "model.npz", random.Random(0)
    arrays = {"params/a": np.arange(12, dtype=np.float32).reshape(3, 4), "params/b": np.ones(5, np.float16)}
    np.savez(path, **arrays, spatialvla_jax="{}")
    whole, refused = path.read_bytes(), 0
    for n in range(0, len(whole), stride):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 1 << rng.randrange(8)]) + whole[n + 1 :])
        with pytest.raises(InputError) as raised:  # reading always fails, because the file does not name its model
            read_checkpoint(path)
        assert "\n" not in str(raised.value)
        try:
            read = {f"params/{name}": x.read() for name, x in open_npz(path).items()}
        except InputError:
            refused += 1
        else:
            assert all(name not in arrays or np.array_equal(x, arrays[name]) for name, x in read.items())
    assert refused > 0.1 * len(whole) / stride


def test_big_vision_reads_what_we_write(checkpoint, tmp_path):
    utils = pytest.importorskip("big_vision.utils", reason="no package: clone it and set PYTHONPATH")
    write_big_vision(tmp_path / "model.npz", cast(checkpoint, "bfloat16"))
    theirs = flatten(utils.load_params(str(tmp_path / "model.npz")))
    for name, x in flatten(cast(checkpoint, "bfloat16").params()).items():
        np.testing.assert_array_equal(np.asarray(theirs[name]).astype(np.float32), x.astype(np.float32), err_msg=name)
