import json
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from spatialvla_jax.cli import main
from spatialvla_jax.config import (
    KEYS,
    check_resumable,
    check_together,
    completed,
    default_config,
    load_config,
    train_config_of,
)
from spatialvla_jax.errors import InputError


@pytest.mark.parametrize("name", ["demo", "pretrain", "finetune", "lora", "libero_spatial", "libero_mini"])
def test_the_configs_here_load(name: str) -> None:
    assert load_config(f"configs/{name}.py", {"train.steps": "7"}).train.steps == 7


def flags(*assignments: str) -> ConfigDict:
    """The defaults, with `key=text` from the command line."""
    return completed(default_config(), dict(assignment.split("=", 1) for assignment in assignments))


def test_flags_have_the_type_of_their_key() -> None:
    config = flags(
        *("optimizer.learning_rate=1", "augment.enabled=false", "grid.num_bins=[8,16,4,8,8,8]", "mesh.tensor=-1"),
        *("data.prompt.template=do {instruction}!", "optimizer.eps=1e-4", "optimizer.frozen=()", "seed=7"),
    )
    assert config.optimizer.learning_rate == 1.0 and type(config.optimizer.learning_rate) is float
    assert config.augment.enabled is False and config.grid.num_bins == (8, 16, 4, 8, 8, 8)
    assert config.data.prompt.template == "do {instruction}!" and config.optimizer.eps == 1e-4
    assert (config.optimizer.frozen, config.mesh.tensor, config.seed) == ((), -1, 7)


def test_the_keys_of_data_drop_are_set_whole_or_one_by_one() -> None:
    assert flags("data.drop={'a.b': 0.5, 'c': 0.25}").data.drop == {"a.b": 0.5, "c": 0.25}
    assert flags("data.drop.droid=0.5", "data.drop.a.b=0.25").data.drop == {"droid": 0.5, "a.b": 0.25}
    config = default_config()
    config.data.drop = {"a.b": np.float64(0.5)}
    assert completed(config, {"data.drop.c": "0.25"}).data.drop == {"a.b": 0.5, "c": 0.25}


BAD_FLAGS = {
    "checkpoint.keep_last=0": "is below 1; the nearest valid value is 1",
    "optimizer.clip=0": "optimizer.grad_clip_norm=0.0 is not above 0 (0 would freeze the model; 1e9 clips",
    "optimizer.warmup=500": "is above 1 (fraction of all steps); the nearest valid value is 1.0",
    "optimizer.b2=1": "is not below 1; a valid value is 0.999",
    "optimizer.ema=1": "is not below 1; a valid value is 0.0",
    "optimizer.learning_rate=1e999": "is not a finite number; a valid value is 2e-05",
    "optimizer.learning_rate=1e39": "is above 3.4e+38; the nearest valid value is 3.4e+38",
    "optimizer.learning_rate=nan": "is not a finite number; a valid value is 2e-05",
    "augment.crop_area=-1": "is not above 0 (fraction of the image)",
    "augment.crop_area=1.5": "is above 1 (fraction of the image); the nearest valid value is 1.0",
    "augment.hue=0.6": "is above 0.5 (turns of the colour wheel); the nearest valid value is 0.5",
    "model.action_chunk=0": "is below 1; the nearest valid value is 1",
    "model.mask=Prefix": "is not one of prefix, causal; the nearest valid value is 'prefix'",
    "train.steps=-3": "is below 1; the nearest valid value is 1",
    "train.steps=4.0": "is a number, but a whole number is expected; the nearest valid value is 4",
    "train.steps=99999999999": "is above 2147483647; the nearest valid value is 2147483647",
    "train.steps=None": "is None, but a whole number is expected; a valid value is 120000",
    "train.steps=[4]": "is a list, but a whole number is expected",
    "train.steps=many": "is a string, but a whole number is expected",
    "train.batch_size=0": "is below 1 (examples); the nearest valid value is 1",
    "train.accumulate=0": "train.grad_accum_steps=0 is below 1",
    "train.log_every=0": "is below 1 (steps)",
    "checkpoint.every=0": "is below 1 (steps)",
    "data.read_block=-1": "is below 0",
    "seed=-1": "is below 0; the nearest valid value is 0",
    "seed=True": "is true or false, but a whole number is expected",
    "augment.enabled=1": "is a whole number, but true or false is expected",
    "mesh.fsdp=0": "is below 1 (devices); the nearest valid value is 1",
    "mesh.fsdp=-2": "is below 1 (devices); the nearest valid value is -1",
    "grid.num_bins=('a',4,2,4,4,4)": "grid.num_bins[0]='a' is a string, but a whole number is expected",
    "grid.num_bins=(4,4)": "has 2 elements, but 6 are expected",
    "grid.num_bins=8": "is a whole number, but a sequence is expected",
    "optimizer.frozen=zoe": "is a string, but a sequence is expected; the nearest valid value is ('zoe',)",
    "optimizer.frozen=('(',)": "optimizer.frozen[0]='(' is not a regular expression",
    "data.prompt.template=do it": "must contain {instruction}",
    "data.drop={'a': 1.5}": "data.drop['a']=1.5 is not below 1 (fraction of the steps)",
    "train.eval_split=": "train.eval_split='' names no split",
    "data.drop.a=0": "data.drop['a']=0.0 is not above 0",
    "data.datasets=['libero']": "data.datasets[0]='libero' is a string, but a dict is expected",
    "train.step=1": "config key train.step does not exist; did you mean train.steps?",
    "train=1": "config key train does not exist; train is a group of keys: train.steps, ",
    "train.steps.x=1": "config key train.steps.x does not exist; did you mean train.steps?",
}


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_bad_flags_are_refused_with_the_nearest_valid_value(flag: str) -> None:
    with pytest.raises(InputError, match=re.escape(BAD_FLAGS[flag])) as error:
        flags(flag)
    assert "\n" not in str(error.value)


BAD_VALUES = {
    "config.train.batch_size = '4'": "train.batch_size='4' is a string, but .* expected; the nearest valid value is 4",
    "config.train.steps = 4e0": "train.steps=4.0 is a number, but a whole number is expected; the nearest .* 4",
    "config.optimizer.learning_rate = '1e-4'": "learning_rate='1e-4' is a string, but a number is expected; .* 0.0001",
    "config.train.eval_every = None": "train.eval_every=None is None",
    "config.train.steps = 10**5000": r"train.steps=\(a huge number\) is above 2147483647",
    "config.train = 3": "config key train does not exist; train is a group of keys",
    "config.seed = {}": "seed={} is a dict",
    "config.nothing = {}": "config key nothing does not exist",
    "config.init = Path('a')": r"is of type PosixPath, but a string is expected; the nearest .* 'a'",
    "config.data.datasets = [{'path': Path('a')}]": "cannot be stored in the run's config.json: Object of type P",
    "config.data.datasets = [{'weight': float('nan')}]": "cannot be stored in the run's config.json",
    "config.train.update(3)": r"mine.py, line 6: AttributeError: .*",
    "1 / 0": "mine.py, line 6: ZeroDivisionError: division by zero",
    "return None": r"get_config\(\) of .*mine.py must be a config or a dict of its keys, got None",
    "return +": "mine.py, line 6: SyntaxError: invalid syntax",
}
FILE = """import numpy as np
from pathlib import Path
from spatialvla_jax.config import default_config
def get_config():
    config = default_config()
    {line}
    return config
"""


@pytest.mark.parametrize("line", BAD_VALUES)
def test_bad_files_are_refused_in_a_sentence(line: str, tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE.format(line=line))
    with pytest.raises(InputError, match=BAD_VALUES[line]) as error:
        load_config(path)
    assert "\n" not in str(error.value) and [*tmp_path.iterdir()] == [path]


def test_what_a_file_says_exactly_is_converted(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        FILE.format(
            line="config.train.update(steps=np.int64(7), batch_size=np.array(4)); config.optimizer.update("
            "learning_rate=1, weight_decay=np.float32(0.5), frozen=['zoe']); config.augment.enabled = np.bool_(False); "
            "config.grid.num_bins = np.full(6, 4); config.init = np.str_('a')"
        )
    )
    config = load_config(path)
    changed = {
        "train": {"steps": 7, "batch_size": 4},
        "optimizer": {"learning_rate": 1.0, "weight_decay": 0.5, "frozen": ("zoe",)},
        "augment": {"enabled": False},
        "grid": {"num_bins": (4,) * 6},
    }
    for part, values in changed.items():
        for key, value in values.items():
            assert config[part][key] == value and type(config[part][key]) is type(value)
    assert config.init == "a" and type(config.init) is str and all(type(n) is int for n in config.grid.num_bins)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        (["train.batch_size=10", "train.grad_accum_steps=4"], "train.batch_size=10 does not divide by .*=4; .* is 8"),
        (["augment.crop_area_max=0.5"], "crop_area_max=0.5 is below augment.crop_area=0.9"),
        (["mesh.data=-1"], "leaves more than one size open; only one may be -1"),
        (["grid.num_bins=(4096,4096,8,16,16,16)"], "makes 134,221,824 tokens, and 1,000,000 are the most"),
    ],
)
def test_values_that_cannot_go_together(flag: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check_together(flags(*flag))


def test_every_default_is_valid_and_has_a_meaning() -> None:
    assert completed(default_config(), {}).to_dict() == default_config().to_dict()
    check_together(default_config())
    assert all(field.meaning and default_config()[key] == field.default for key, field in KEYS.items())


def test_config_show_prints_values_ranges_and_meanings(capsys) -> None:
    assert main(["config", "show", "optimizer.warmup", "mesh.fsdp", "--config", "demo", "--config.mesh.fsdp=2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "optimizer.warmup = 0.05",
        "    linear warm-up",
        "    a number, at least 0, at most 1 (fraction of all steps); default 0.005",
        "mesh.fsdp = 2",
        "    devices that split batch and parameters; -1: all that remain",
        "    a whole number, at least 1, or -1 (devices); default -1",
    ]
    assert main(["config", "show"]) == 0
    assert capsys.readouterr().out.count(" = ") == len(KEYS)
    assert main(["config", "show", "trian"]) == 2
    assert "config key trian does not exist; did you mean " in capsys.readouterr().err


def test_config_keys_lists_ranges_and_defaults(capsys) -> None:
    assert main(["config", "keys", "lora.rank", "mesh"]) == 0
    names = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert names == ["lora.rank", "mesh.data", "mesh.fsdp", "mesh.tensor"]


def test_config_diff_compares_files_and_runs(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    saved = completed(default_config(), {"train.steps": "7", "grid.num_bins": "(8, 16, 4, 8, 8, 8)"})
    (run / "config.json").write_text(json.dumps(saved.to_dict()))
    (tmp_path / "mine.py").write_text(
        "from spatialvla_jax.config import default_config\n"
        "def get_config():\n    config = default_config()\n    config.train.steps = 9\n    return config\n"
    )
    assert main(["config", "diff", str(tmp_path / "mine.py"), str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "grid.num_bins: [16, 32, 8, 16, 16, 16] → [8, 16, 4, 8, 8, 8]",
        "train.steps: 9 → 7",
        f"2 of {len(KEYS)} keys differ",
    ]
    assert main(["config", "diff", str(run), str(run / "checkpoints")]) == 0
    assert capsys.readouterr().out == f"0 of {len(KEYS)} keys differ\n"
    assert main(["config", "show", "train.steps", "--config", str(run)]) == 0
    assert capsys.readouterr().out.startswith("train.steps = 7\n")
    assert main(["config", "show", "--config", str(run), "--config.train.steps=8"]) == 2
    assert "is a run" in capsys.readouterr().err
    assert main(["config", "diff", "demo", str(tmp_path)]) == 2
    assert "not in a training run's directory" in capsys.readouterr().err


def test_a_run_with_a_value_that_is_no_longer_valid_is_read_but_not_resumed(tmp_path) -> None:
    saved = json.loads(json.dumps(default_config().to_dict()))
    saved["optimizer"]["clip"] = 0.0
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert train_config_of(tmp_path).optimizer.grad_clip_norm == 0.0
    sentence = r"a run with optimizer.grad_clip_norm = 0.0, .* no longer valid \(.*is not above 0.*another workdir"
    with pytest.raises(InputError, match=sentence):
        check_resumable(saved, default_config(), tmp_path)


@pytest.mark.parametrize(("key", "value"), [("data.datasets", None), ("data.datasets", "x"), ("model.preset", [])])
def test_a_damaged_config_of_a_run_is_one_sentence(key: str, value: object, tmp_path) -> None:
    saved = json.loads(json.dumps(default_config().to_dict()))
    group, name = key.split(".")
    saved[group][name] = value
    with pytest.raises(InputError, match=f"{tmp_path} holds a run with a damaged config: "):
        check_resumable(saved, default_config(), tmp_path)


def test_the_presets_own_image_size_is_no_other(tmp_path) -> None:
    saved, config = json.loads(json.dumps(default_config().to_dict())), default_config()
    config.model.image_size = 224
    check_resumable(saved, config, tmp_path)
    check_resumable(json.loads(json.dumps(config.to_dict())), default_config(), tmp_path)
    config.model.image_size = 448
    with pytest.raises(InputError, match=r"a run with model.image_size = 0, this config says 448"):
        check_resumable(saved, config, tmp_path)


def test_only_what_is_not_computed_may_change(tmp_path) -> None:
    config = default_config()
    saved = json.loads(json.dumps(config.to_dict()))
    config.checkpoint.every, config.mesh.fsdp = 3, 8
    check_resumable(saved, config, tmp_path)
    check_resumable({k: v for k, v in saved.items() if k != "lora"}, config, tmp_path)  # of an earlier version
    config.update({"train": {"grad_accum_steps": 2}, "model": {"remat": "full"}})  # on fewer devices
    check_resumable(saved, config, tmp_path)
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
    with pytest.raises(InputError, match=r"config key init ftp://host/run is not a supported path"):
        load_config("demo", {"init": "ftp://host/run"})


def test_a_file_may_set_part_of_the_keys_and_no_others(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n"
        "    return ConfigDict({'train': {'steps': 7}, 'data': {'drop': {'droid': 0.5}}, 'optimizer': {'clip': 2}})\n"
    )
    config = load_config(path)
    assert config.train.to_dict() == default_config().train.to_dict() | {"steps": 7}
    assert config.data.drop == {"droid": 0.5} and config.optimizer.grad_clip_norm == 2.0
    config.optimizer.clip = 3.0  # a sweep file may still use old names on a config that it loads
    path.write_text(path.read_text().replace("'clip'", "'grad_clip'"))
    with pytest.raises(
        InputError, match=r"optimizer\.grad_clip does not exist; did you mean optimizer\.grad_clip_norm"
    ):
        load_config(path)
