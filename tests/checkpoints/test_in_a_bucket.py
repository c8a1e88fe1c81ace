"""Checkpoints at gs:// and s3://, against servers of the protocols: what is read is what was written, bit for bit."""

from pathlib import Path

import pytest
from helpers.checkpoints import equal

from spatialvla_jax.checkpoints import read_checkpoint, write_huggingface
from spatialvla_jax.checkpoints.types import Checkpoint
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.convert import convert


@pytest.fixture
def small(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint


def test_a_conversion_there_and_back(bucket, small: Checkpoint, tmp_path: Path) -> None:
    """Local safetensors → Orbax in a bucket → .npz in a bucket → safetensors on the disk."""
    write_huggingface(tmp_path / "export", small)
    assert convert(tmp_path / "export", f"{bucket.url}/run", "orbax")["bit_exact"]
    assert convert(f"{bucket.url}/run", f"{bucket.url}/model.npz", "big_vision")["bit_exact"]
    convert(f"{bucket.url}/model.npz", f"{bucket.url}/export", "pytorch", verify=False)
    convert(f"{bucket.url}/export", tmp_path / "back", "orbax")
    assert equal(small, read_checkpoint(tmp_path / "back"))
    for url in (f"{bucket.url}/run", f"{bucket.url}/export"):
        with pytest.raises(InputError, match=f"{url} exists; choose a new destination"):
            convert(tmp_path / "export", url, "orbax")
