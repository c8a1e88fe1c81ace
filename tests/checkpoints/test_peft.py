"""A run of adapters as a directory of `peft`'s, on the PyTorch export of its base."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from spatialvla_jax.checkpoints import read_checkpoint
from spatialvla_jax.checkpoints.peft import read_adapters, write_peft
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.convert import convert
from spatialvla_jax.export.verify import verify


@pytest.fixture(scope="module")
def exported(adapted: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    convert(trained, folder / "base", to="pytorch", verify=False)
    assert convert(adapted, folder / "adapters", to="peft")["bit_exact"]
    return folder


def test_it_acts_as_the_run(adapted: Path, exported: Path) -> None:
    """Every greedy token, and the logits within 1e-4; by its own grid, which the base's processor does not have."""
    whole = read_checkpoint(adapted)
    found = verify(whole, exported / "base", exported / "adapters")
    assert found["tokens_equal"] == found["tokens"] == 48
    assert found["differences"]["logits"]["max"] < 1e-4 and found["differences"]["actions"]["max"] < 1e-5


def test_every_published_layer_is_adapted_when_peft_loads_it(exported: Path) -> None:
    """None is left out silently: the adapters come back as they are from the model that has them."""
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModel

    def base():
        return AutoModel.from_pretrained(exported / "base", trust_remote_code=True)

    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base(), exported / "adapters"))
    stored = load_file(exported / "adapters" / "adapter_model.safetensors")
    assert loaded.keys() < stored.keys()
    assert all((stored[key] == x.numpy()).all() for key, x in loaded.items())
    assert {key.replace("vision_tower.vision_model.", "vision_tower.") for key in stored} == loaded.keys()
    # The release's target names find the same layers, so that as many parameters are trained.
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down", "out")]
    targets += ["fc1", "fc2", "linear", "position_embedding_head.0", "position_embedding_head.3"]
    released = get_peft_model(base(), LoraConfig(r=4, target_modules=targets, modules_to_save=["spatial_embed_tokens"]))
    assert get_peft_model_state_dict(released).keys() == loaded.keys()
    assert released.get_nb_trainable_parameters()[0] == sum(x.numel() for x in loaded.values())


def test_what_adapters_cannot_carry_is_refused(adapted: Path, tmp_path: Path) -> None:
    """An LM head that was adapted with the grid: the base has another one."""
    step = adapted / "checkpoints" / "6"
    (tmp_path / "6").mkdir()
    (tmp_path / "6" / "params").symlink_to(step / "params")
    (tmp_path / "6" / "metadata").mkdir()
    metadata = json.loads((step / "metadata" / "metadata").read_text())
    metadata["lora"]["adapt"]["head"] = True
    (tmp_path / "6" / "metadata" / "metadata").write_text(json.dumps(metadata))
    with pytest.raises(InputError, match=r"adapted to another grid in llm/lm_head too.*--to pytorch --merge"):
        write_peft(tmp_path / "out", read_adapters(tmp_path / "6", read_checkpoint))
    assert not (tmp_path / "out").exists()
