"""Checkpoints at gs:// and s3://, against servers of both protocols: they read back bit for bit."""

from pathlib import Path

import numpy as np
import pytest
from helpers.checkpoints import equal

from spatialvla_jax.checkpoints import Checkpoint, read_checkpoint, write_huggingface
from spatialvla_jax.checkpoints import safetensors_io as safetensors
from spatialvla_jax.checkpoints.load import fingerprint
from spatialvla_jax.checkpoints.types import LazyArray
from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.export.convert import convert
from spatialvla_jax.utils import retries, storage
from spatialvla_jax.utils.atomic import new_directory


def test_tensors_are_read_by_ranges(bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is read alone, a large one in parts; truncated and damaged data is detected."""
    monkeypatch.setattr(safetensors, "PART", 100_000)
    x = {f"x{n}": np.random.default_rng(n).normal(size=10 ** (n + 3)).astype(np.float32) for n in range(3)}
    safetensors.write_directory(tmp_path, {name: LazyArray.of(array) for name, array in x.items()}, 40_000)
    folder = storage.as_path(bucket.upload(tmp_path, "export"), "SRC")
    before = retries.counts()["bytes"]
    tensors = safetensors.open_directory(folder)
    np.testing.assert_array_equal(tensors["x0"].read(), x["x0"])
    assert retries.counts()["bytes"] - before < 40_000  # its own 4,000, headers, index, listings; not all 444,000
    for name, array in x.items():
        np.testing.assert_array_equal(tensors[name].read(), array)
    (file,) = (folder / name for name in storage.list_names(folder) if name.startswith("model-00002"))
    content = storage.read_bytes(file)
    storage.put(file, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{file} is damaged: the bytes of x1 do not have the checksum"):
        tensors["x1"].read()
    storage.put(file, content[:-1])
    with pytest.raises(InputError, match=f"{file} is cut short"):
        safetensors.open_directory(folder)
    storage.remove(file)
    with pytest.raises(InputError, match=f"{file}.* does not exist"):
        tensors["x1"].read()


def test_an_upload_that_fails_leaves_nothing(gcs) -> None:
    path = storage.as_path(f"{gcs.url}/export", "DST")
    gcs.proxy.add(status=403, body='{"error": {"message": "not you"}}', pattern="^POST .*upload", every=3, count=1)
    with (
        pytest.raises(InputError, match=r"config.json cannot be written: .*not you"),
        new_directory(path, "config.json") as folder,
    ):
        for name in ("config.json", "a.bin", "b.bin"):
            (folder / name).write_text(name)
    assert not storage.exists(path)
    gcs.proxy.faults.clear()
    with new_directory(path, "config.json") as folder:
        (folder / "config.json").write_text("{}")
    assert storage.list_names(path) == ["config.json"]


@pytest.mark.slow
def test_a_conversion_there_and_back(bucket, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Safetensors on disk → Orbax in a bucket → .npz there → safetensors there → Orbax on disk."""
    write_huggingface(tmp_path / "export", checkpoint)
    assert convert(tmp_path / "export", f"{bucket.url}/run", "orbax")["bit_exact"]
    assert convert(f"{bucket.url}/run", f"{bucket.url}/model.npz", "big_vision")["bit_exact"]
    result = convert(f"{bucket.url}/model.npz", f"{bucket.url}/export", "pytorch")
    assert result["bit_exact"] and isinstance(result["verification"], dict)
    convert(f"{bucket.url}/export", tmp_path / "back", "orbax")
    assert equal(checkpoint, read_checkpoint(tmp_path / "back"))
    for url in (f"{bucket.url}/run", f"{bucket.url}/export", f"{bucket.url}/model.npz"):
        assert fingerprint(url).startswith(f"{url}")
        with pytest.raises(InputError, match=f"{url} exists"):
            convert(tmp_path / "export", url, "orbax")


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_is_one_sentence(
    gcs, checkpoint: Checkpoint, tmp_path: Path, monkeypatch
) -> None:
    """The bucket throttles forever or denies permission, and then works again."""
    monkeypatch.setattr(retries, "PATIENCE", 1.0)
    monkeypatch.setattr("spatialvla_jax.checkpoints.orbax.TRIES", {"max_retries": 1})
    convert_to = f"{gcs.url}/run"
    write_huggingface(tmp_path / "export", checkpoint)
    convert(tmp_path / "export", convert_to, "orbax")
    arrays = read_checkpoint(convert_to).arrays
    array = next(iter(arrays.values()))
    for status, kind in ((429, StorageError), (403, InputError)):
        gcs.proxy.faults.clear()
        gcs.proxy.add(status=status, body="no", pattern="^GET ")
        with pytest.raises(kind, match=f"{convert_to}/.* cannot be read at"):
            array.read()
        with pytest.raises((InputError, StorageError), match=convert_to):
            read_checkpoint(convert_to)
    gcs.proxy.faults.clear()
    assert array.read().shape == array.shape
