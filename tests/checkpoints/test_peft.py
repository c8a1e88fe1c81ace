"""A run of adapters, written for `peft`, on the PyTorch export of its base."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import tensorstore
from helpers.checkpoints import equal, with_lora
from safetensors.numpy import load_file

from spatialvla_jax.actions import grid_to_dict
from spatialvla_jax.checkpoints import read_checkpoint
from spatialvla_jax.checkpoints.orbax import read_metadata
from spatialvla_jax.checkpoints.peft import read_adapters, refer, write_peft
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.convert import convert


@pytest.fixture(scope="module")
def exported(adapted: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base's export, and adapters that name it. Together they act like the run: same greedy tokens, logits within
    1e-4. They use the run's own grid, which differs from the base's."""
    folder = tmp_path_factory.mktemp("exported")
    convert(trained, folder / "base", to="pytorch", verify=False)
    figures = convert(adapted, folder / "adapters", to="peft", base=folder / "base")
    found = figures["verification"]
    assert figures["bit_exact"] and isinstance(found, dict)
    assert found["tokens_equal"] == found["tokens"] == 48
    assert found["differences"]["logits"]["max"] < 1e-4 and found["differences"]["actions"]["max"] < 1e-5
    assert {path.name for path in folder.iterdir()} == {"base", "adapters"}
    return folder


def named(adapters: Path) -> str:
    return json.loads((adapters / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_it_names_a_base_that_transformers_loads(adapted: Path, exported: Path, tmp_path: Path) -> None:
    """Uses `base`, or writes a byte-equal export beside the adapters, because the run's base is an Orbax run."""
    assert named(exported / "adapters") == str(exported / "base") and not (exported / "adapters" / "base").exists()
    convert(adapted, tmp_path / "whole", to="peft", verify=False)
    assert named(tmp_path / "whole") == str(tmp_path / "whole" / "base")
    weights = [folder / "model.safetensors" for folder in (tmp_path / "whole" / "base", exported / "base")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    adapters = [
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "whole", exported / "adapters")
    ]
    assert all((x == adapters[1][key]).all() for key, x in adapters[0].items())


def test_another_base_is_refused(adapted: Path, trained: Path, exported: Path, tmp_path: Path) -> None:
    """A base with other numbers or another dtype is refused by the conversion, and by the model on loading."""
    import torch
    from peft import PeftModel
    from transformers import AutoModel

    convert(trained, tmp_path / "bf16", to="pytorch", dtype="bfloat16", verify=False)
    convert(adapted, tmp_path / "merged", to="pytorch", merge=True, verify=False)
    for name in ("bf16", "merged"):
        with pytest.raises(
            InputError, match=rf"{name} is not an export of .*, on which the adapters were trained: \S+ dif"
        ):
            convert(adapted, tmp_path / "out", to="peft", base=tmp_path / name)
        model = AutoModel.from_pretrained(tmp_path / name, trust_remote_code=True)
        with pytest.raises(ValueError, match=f"belong to another base: load {exported / 'base'} without changing"):
            PeftModel.from_pretrained(model, exported / "adapters")
    model = AutoModel.from_pretrained(exported / "base", trust_remote_code=True, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="belong to another base"):
        model.load_adapter(str(exported / "adapters"))
    with pytest.raises(InputError, match="is not a directory written by convert --to pytorch"):
        convert(adapted, tmp_path / "out", to="peft", base=trained)
    with pytest.raises(InputError, match="--base goes with --to peft"):
        convert(trained, tmp_path / "out", to="pytorch", base=exported / "base")
    assert {path.name for path in tmp_path.iterdir()} == {"bf16", "merged"}


def test_every_published_layer_is_adapted_when_peft_loads_it(exported: Path) -> None:
    """`peft` drops no adapter silently: the loaded model returns all of them unchanged."""
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModel

    def base():
        return AutoModel.from_pretrained(exported / "base", trust_remote_code=True)

    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base(), exported / "adapters"))
    stored = load_file(exported / "adapters" / "adapter_model.safetensors")
    assert loaded.keys() < stored.keys()
    assert all((stored[key] == x.numpy()).all() for key, x in loaded.items())
    assert {key.replace("vision_tower.vision_model.", "vision_tower.") for key in stored} == loaded.keys()
    # The release's target names match the same layers, so as many parameters are trained.
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down", "out")]
    targets += ["fc1", "fc2", "linear", "position_embedding_head.0", "position_embedding_head.3"]
    released = get_peft_model(base(), LoraConfig(r=4, target_modules=targets, modules_to_save=["spatial_embed_tokens"]))
    assert get_peft_model_state_dict(released).keys() == loaded.keys()
    assert released.get_nb_trainable_parameters()[0] == sum(x.numel() for x in loaded.values())


def test_what_adapters_cannot_carry_is_refused(adapted: Path, tmp_path: Path) -> None:
    """The LM head was adapted with the grid, so it differs from the base's."""
    adapt = {"embedding": True, "head": True}
    step = with_lora(adapted / "checkpoints" / "6", tmp_path / "6", adapt=adapt)
    with pytest.raises(InputError, match=r"adapted to another grid in llm/lm_head too.*--to pytorch --merge"):
        write_peft(tmp_path / "out", read_adapters(step, read_checkpoint))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"to": "peft"}, {"to": "pytorch", "merge": True}])
def test_every_tensor_is_read_once(adapted: Path, tmp_path: Path, options: dict, monkeypatch) -> None:
    """Also reads the base's tensors only once, to compare them with their digests. Opening reads none."""
    opened, open_store = Counter(), tensorstore.open

    def counted(spec: object, *args: object, **kwargs: object) -> object:
        if isinstance(spec, dict) and not str(spec["kvstore"]).endswith("_sharding'}"):  # arrays, not Orbax's metadata
            opened[str(spec["kvstore"])] += 1
        return open_store(spec, *args, **kwargs)

    monkeypatch.setattr(tensorstore, "open", counted)
    run = read_adapters(adapted, read_checkpoint)
    assert not opened
    assert convert(adapted, tmp_path / "out", **options, verify=False)["bit_exact"]
    replaced = 0 if options["to"] == "peft" else 1  # the base's spatial table, which the run has trained
    assert set(opened.values()) == {1} and len(opened) == len(run.base.arrays) + len(run.trained) - replaced


@pytest.mark.parametrize("options", [{"to": "peft"}, {"to": "orbax", "merge": True}])
def test_a_base_that_has_changed_leaves_nothing(adapted: Path, tmp_path: Path, options: dict) -> None:
    step = adapted / "checkpoints" / "6"
    base = read_metadata(step)["lora"]["base"]
    for i, changed in enumerate(({"digests": base["digests"] | {"llm/lm_head": "0"}}, {"grid": "0"})):
        with pytest.raises(InputError, match="which has changed since"):
            convert(with_lora(step, tmp_path / str(i), base=base | changed), tmp_path / "out", **options)
    assert {p.name for p in tmp_path.iterdir()} == {"0", "1"}


DAMAGES = {
    "null rank": ({"rank": None}, "lora.rank=None is None, but a whole number is expected"),
    "another rank": ({"rank": 8}, r"with a shape other than its config says: lora/"),
    "alpha": ({"alpha": float("nan")}, "lora.alpha=nan is not a finite number"),
    "no base": ({"base": {}}, "lora.base.path is missing"),
    "no digests": ({"base": {"path": ".", "grid": "0"}}, "lora.base.digests is missing"),
    "adapt": ({"adapt": {"embedding": 1, "head": False}}, "lora.adapt.embedding=1 is a whole number"),
}


@pytest.mark.parametrize("changes, says", DAMAGES.values(), ids=DAMAGES)
def test_bad_facts_of_adapters_are_named(adapted: Path, tmp_path: Path, changes: dict, says: str) -> None:
    step = with_lora(adapted / "checkpoints" / "6", tmp_path / "6", **changes)
    with pytest.raises(InputError, match=says):
        read_checkpoint(step)


def test_adapters_are_of_another_run(adapted: Path, tmp_path: Path) -> None:
    base = read_metadata(adapted / "checkpoints" / "6")["lora"]["base"]
    step = with_lora(adapted / "checkpoints" / "6", tmp_path / "6", base=base | {"path": str(tmp_path / "6")})
    with pytest.raises(InputError, match="which is the run itself"):
        read_checkpoint(step)


def test_a_run_of_an_earlier_version_keeps_one_digest_of_its_base(adapted: Path, trained: Path, tmp_path: Path) -> None:
    step, base = adapted / "checkpoints" / "6", read_checkpoint(trained)
    assert base.processor is not None
    total = hashlib.sha256(json.dumps(grid_to_dict(base.processor.grid)).encode())
    for path, array in sorted(base.arrays.items()):
        total.update(f"{path} {array.shape} {array.dtype}".encode() + array.read().tobytes())
    old = {"path": read_metadata(step)["lora"]["base"]["path"], "digest": total.hexdigest()}
    assert equal(read_checkpoint(with_lora(step, tmp_path / "old", base=old)), read_checkpoint(step))
    assert refer(trained, base, {}, old) == old
    with pytest.raises(InputError, match="which has changed since"):
        read_checkpoint(with_lora(step, tmp_path / "changed", base=old | {"digest": "0"}))
