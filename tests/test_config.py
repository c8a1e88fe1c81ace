import json

import pytest

from spatialvla_jax.config import check_resumable, default_config, load_config, set_keys
from spatialvla_jax.errors import InputError


@pytest.mark.parametrize("name", ["demo", "pretrain", "finetune", "lora"])
def test_the_configs_here_load(name: str) -> None:
    assert load_config(f"configs/{name}.py", {"train.steps": "7"}).train.steps == 7


def test_overrides_keep_the_type() -> None:
    config = default_config()
    for key, text in {
        "optimizer.learning_rate": "1",
        "augment.enabled": "false",
        "grid.num_bins": "(8,16,4,8,8,8)",
        "data.prompt.template": "do {instruction}!",
    }.items():
        set_keys(config, {key: text})
    assert config.optimizer.learning_rate == 1.0 and type(config.optimizer.learning_rate) is float
    assert config.augment.enabled is False and config.grid.num_bins == (8, 16, 4, 8, 8, 8)
    assert config.data.prompt.template == "do {instruction}!"
    for key, text in {"seed": "1.5", "augment.enabled": "1", "grid.num_bins": "8", "train.steps.x": "1"}.items():
        with pytest.raises(InputError, match=key):
            set_keys(config, {key: text})


def test_only_what_is_not_computed_may_change(tmp_path) -> None:
    config = default_config()
    saved = json.loads(json.dumps(config.to_dict()))
    config.checkpoint.every, config.mesh.fsdp = 3, 8
    check_resumable(saved, config, tmp_path)
    check_resumable({k: v for k, v in saved.items() if k != "lora"}, config, tmp_path)  # of an earlier version
    config.optimizer.grad_clip_norm, config.seed = 2.0, 1
    with pytest.raises(InputError, match=r"optimizer.grad_clip_norm = 1.0, this config says 2.0 \(and 1 more"):
        check_resumable(saved, config, tmp_path)
    saved["train"]["old_key"] = 3
    with pytest.raises(InputError, match=r"another version of this program, with train.old_key = 3, a config key"):
        check_resumable(saved, config, tmp_path)


def test_paths_of_checkpoints(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config("demo", {"init": "~/run", "init_zoedepth": "zoedepth"})
    assert (config.init, config.init_zoedepth) == (f"{tmp_path}/run", "zoedepth")
    with pytest.raises(InputError, match=r"config key init gs://bucket/run is no path of a file system"):
        load_config("demo", {"init": "gs://bucket/run"})


def test_a_file_may_set_part_of_the_keys_and_no_others(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n"
        "    return ConfigDict({'train': {'steps': 7}, 'data': {'drop': {'droid': 0.5}}, 'optimizer': {'clip': 2}})\n"
    )
    config = load_config(path)
    assert config.train.to_dict() == default_config().train.to_dict() | {"steps": 7}
    assert config.data.drop.to_dict() == {"droid": 0.5} and config.optimizer.grad_clip_norm == 2.0
    config.optimizer.clip = 3.0  # a sweep file may still use old names on a config that is loaded
    path.write_text(path.read_text().replace("'clip'", "'grad_clip'"))
    with pytest.raises(
        InputError, match=r"optimizer\.grad_clip does not exist; did you mean optimizer\.grad_clip_norm"
    ):
        load_config(path)
