import json

import pytest

from spatialvla_jax.config import check_resumable, default_config, load_config, set_key
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
        set_key(config, key, text)
    assert config.optimizer.learning_rate == 1.0 and type(config.optimizer.learning_rate) is float
    assert config.augment.enabled is False and config.grid.num_bins == (8, 16, 4, 8, 8, 8)
    assert config.data.prompt.template == "do {instruction}!"
    for key, text in {"seed": "1.5", "augment.enabled": "1", "grid.num_bins": "8", "train.steps.x": "1"}.items():
        with pytest.raises(InputError, match=key):
            set_key(config, key, text)


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
    with pytest.raises(
        InputError, match=r"begun by another version of this program \(config key train.old_key does not"
    ):
        check_resumable(saved, config, tmp_path)


def test_paths_of_checkpoints(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config("demo", {"init": "~/run", "init_zoedepth": "zoedepth"})
    assert (config.init, config.init_zoedepth) == (f"{tmp_path}/run", "zoedepth")
    with pytest.raises(InputError, match=r"config key init gs://bucket/run is no path of a file system"):
        load_config("demo", {"init": "gs://bucket/run"})
