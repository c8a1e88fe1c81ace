import re
from dataclasses import replace

import pytest
from safetensors.numpy import load_file, save_file

from spatialvla_jax.checkpoints import write_orbax
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.convert import convert, write_pytorch
from spatialvla_jax.export.verify import VerificationError, table, verify


@pytest.fixture
def run(checkpoint, tmp_path):
    write_orbax(tmp_path / "run", checkpoint)
    return tmp_path / "run"


def test_convert_verifies(run, tmp_path, monkeypatch):
    """The default is to verify up to a certain size, in float32 whatever the dtype of the weights."""
    done = convert(run, tmp_path / "out", to="pytorch", dtype="bfloat16")["verification"]
    assert done["tokens"] == done["tokens_equal"] == 4 * 9
    assert list(done["differences"]) == ["inputs", "image_features", "logits", "actions"]
    assert 0 < done["differences"]["logits"]["max"] < 1e-4
    lines = table(done).splitlines()
    assert re.match(r"logits +\d\.\de-\d\d +\d\.\de-\d\d$", lines[3]) and lines[-1] == "greedy tokens equal: 36 of 36"


def test_convert_says_why_it_did_not_verify(run, tmp_path, monkeypatch):
    def why(name, **options):
        return convert(run, tmp_path / name, **options)["verification"]

    assert why("a", to="pytorch", verify=False) == "not requested"
    assert "bytes were read back" in why("b.npz", to="big_vision", verify=True)
    monkeypatch.setattr("spatialvla_jax.export.convert.VERIFIED_BY_DEFAULT", 1000)
    assert re.match(r"[\d,]+ parameters are more than 1,000: the", why("c", to="pytorch"))
    monkeypatch.setattr("spatialvla_jax.export.convert.available", lambda: False)
    assert "pip install 'spatialvla-jax[torch]'" in why("d", to="pytorch")
    with pytest.raises(InputError, match="cannot be verified: PyTorch is not installed"):
        why("e", to="pytorch", verify=True)
    assert not (tmp_path / "e").exists()


TABLE = "spatial_embed_tokens.weight"
SWAPPED = {
    "layers": [f"language_model.model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)],
    "projections": [f"vision_tower.vision_model.encoder.layers.0.self_attn.{x}_proj.weight" for x in "qk"],
    "rows": [TABLE, TABLE],
}


@pytest.mark.parametrize("keys", SWAPPED.values(), ids=SWAPPED)
def test_a_tampered_export_fails(checkpoint, tmp_path, keys):
    write_pytorch(tmp_path / "out", checkpoint)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    a, b = keys
    tensors[a], tensors[b] = (tensors[a][::-1].copy(),) * 2 if a == b else (tensors[b], tensors[a])
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"does not act like its source: \d+ of 36 greedy tokens") as raised:
        verify(checkpoint, tmp_path / "out")
    found = raised.value.result
    assert found["tokens_equal"] < found["tokens"] or found["differences"]["logits"]["max"] > 1e-2


def test_without_a_processor(checkpoint, tmp_path):
    """Covers random prompts of several lengths, tokens from the whole vocabulary, and no Ego3D."""
    arrays = {path: array for path, array in checkpoint.arrays.items() if not path.startswith("ego3d/")}
    bare = replace(checkpoint, config=replace(checkpoint.config, depth_source="none"), arrays=arrays, processor=None)
    write_pytorch(tmp_path / "out", bare)
    found = verify(bare, tmp_path / "out")
    assert found["tokens"] == found["tokens_equal"] and "actions" not in found["differences"]
