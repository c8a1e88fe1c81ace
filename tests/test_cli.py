"""Bad input ends with one sentence on stderr and exit code 2; good input does what the help says."""

import json
import shutil
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import jax
import pytest
from helpers.toy_rlds import libero_features, make_episodes, make_rlds
from tensorboard.summary.writer.record_writer import RecordWriter

import spatialvla_jax
from spatialvla_jax import Policy
from spatialvla_jax.cli import main
from spatialvla_jax.errors import InputError
from spatialvla_jax.training import loop
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.training.metrics import MetricsLog
from spatialvla_jax.utils import compilation_cache as compiled


def fails(capsys: pytest.CaptureFixture, *argv: object) -> str:
    assert main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"spatialvla-jax {argv[0]}: ")
    return error


def config_for(config_file: Path, path: Path, folder: Path) -> Path:
    """The test config with another dataset."""
    lines = [
        f'    config.data.datasets = [{{"name": "toy", "spec": "libero", "path": {str(path)!r}}}]'
        if "datasets" in line
        else line
        for line in config_file.read_text().splitlines()
    ]
    changed = folder / "changed.py"
    changed.write_text("\n".join(lines))
    return changed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=3", "config key train.step does not exist; did you mean train.steps?"),
        ("train.steps=many", "train.steps='many' is a string, but a whole number is expected"),
        ("model.preset=huge", "model.preset='huge' is not one of nano, tiny, mini, small"),
        ("model.remat=everything", "model.remat='everything' is not one of none, full, dots; a valid value is 'dots'"),
        ("model.dtype=float61", "model.dtype='float61' is not one of float32, bfloat16"),
        ("model.mask=prefixes", "'prefixes' is not one of prefix, causal; the nearest valid value is 'prefix'"),
        (
            "model.depth_source=zeodepth",
            "'zeodepth' is not one of zoedepth, dataset, none; the nearest valid value is 'zoedepth'",
        ),
        ("mesh.tensor=3", "does not fit 8 devices"),
        ("train.batch_size=12", "train.batch_size 12 does not divide"),
        ("grid.kind=cubic", "grid.kind='cubic' is not one of gaussian, uniform, linear, checkpoint"),
        ("optimizer.frozen=('lmm',)", "optimizer.frozen pattern 'lmm' matches no parameter"),
        ("optimizer.frozen=('.*',)", "optimizer.frozen leaves nothing to train"),
    ],
)
def test_bad_config(config_file: Path, tmp_path: Path, capsys, override: str, message: str) -> None:
    assert message in fails(
        capsys, "train", "--config", config_file, "--workdir", tmp_path / "run", f"--config.{override}"
    )


def test_adapters_of_no_layer(trained: Path, config_file: Path, tmp_path: Path, capsys) -> None:
    overrides = f"--config.init={trained}", "--config.lora.rank=4", "--config.lora.targets=()"
    error = fails(capsys, "train", "--config", config_file, "--workdir", tmp_path / "run", *overrides)
    assert "lora.targets names no linear layer that this model has" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("evaluate --checkpoint run --batch-size 0", "argument --batch-size: '0' is not an integer from 1"),
        ("evaluate --checkpoint run --batch-size -1", "argument --batch-size: '-1' is not an integer from 1"),
        ("evaluate --closed-loop x --videos -1", "argument --videos: '-1' is not an integer from 0"),
        ("evaluate --closed-loop x --tasks 0,-1", "argument --tasks: '-1' is not an integer from 0"),
        ("sweep --config x --workdir x --parallel 0", "argument --parallel: '0' is not an integer from 1"),
        ("compile --config demo --topology v5e:2x2 --slices 0", "--slices: '0' is not an integer from 1"),
        ("evaluate --closed-loop x --episodes 0", "argument --episodes: '0' is not an integer from 1"),
        ("record libero --episodes 0 --out x", "argument --episodes: '0' is not an integer from 1"),
        ("record libero --episodes 1 --noise nan --out x", "argument --noise: 'nan' is not a non-negative number"),
        ("serve --checkpoint run --port -1", "argument --port: '-1' is not a port from 0 to 65535"),
        ("serve --checkpoint run --port 65536", "argument --port: '65536' is not a port from 0 to 65535"),
        ("serve --checkpoint run --max-batch 0", "argument --max-batch: '0' is not an integer from 1"),
        ("serve --checkpoint run --max-batch 33", "argument --max-batch: '33' is more than 32"),
        ("serve --checkpoint run --max-clients 0", "argument --max-clients: '0' is not an integer from 1"),
        ("serve --checkpoint run --max-clients -1", "argument --max-clients: '-1' is not an integer from 1"),
        ("serve --checkpoint run --max-wait-ms -1", "argument --max-wait-ms: '-1' is not a non-negative number"),
        ("serve --checkpoint run --max-wait-ms nan", "argument --max-wait-ms: 'nan' is not a non-negative number"),
        ("serve --checkpoint run --max-wait-ms inf", "argument --max-wait-ms: 'inf' is not a non-negative number"),
        ("serve --checkpoint run --max-wait-ms 1e9", "argument --max-wait-ms: '1e9' is more than 10000"),
        ("serve --checkpoint run --image-size 0x0", "argument --image-size: '0x0' is not HEIGHTxWIDTH"),
        ("serve --checkpoint run --image-size 224", "argument --image-size: '224' is not HEIGHTxWIDTH"),
        ("serve --checkpoint run --image-size 5x5x3", "argument --image-size: '5x5x3' is not HEIGHTxWIDTH"),
        ("serve --checkpoint run --image-size 4097x5", "argument --image-size: '4097x5' is not HEIGHTxWIDTH"),
        ("evaluate --checkpoint run --batch-size 4097", "argument --batch-size: '4097' is more than 4096"),
        (f"evaluate --checkpoint run --videos {2**31}", "argument --videos: '2147483648' is not an integer from 0"),
    ],
)
def test_numbers_out_of_range(capsys, argv: str, message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv.split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--unnorm-key"])
def test_the_open_loop_refuses_options_of_the_closed_loop(capsys, option: str) -> None:
    assert f"{option} needs --closed-loop SUITE" in fails(capsys, "evaluate", "--checkpoint", "run", option, "x")


def test_bench_alone_names_the_benchmarks(capsys) -> None:
    assert "name a benchmark: tokenizer, loader, train" in fails(capsys, "bench")


def test_out_of_memory_is_one_sentence(config_file: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def train(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.\nand a long table")

    monkeypatch.setattr(loop, "train", train)
    error = fails(capsys, "train", "--config", config_file, "--workdir", tmp_path)
    assert "Out of memory allocating 12 bytes" in error and "long table" not in error
    assert all(
        word in error for word in ("model.remat", "batch size", "train.grad_accum_steps", "mesh.fsdp", "compile")
    )

    def broken(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: another error")

    monkeypatch.setattr(loop, "train", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another error"):
        main(["train", "--config", str(config_file), "--workdir", str(tmp_path)])


@pytest.mark.parametrize("full", ["metrics.jsonl", "times.jsonl", "tensorboard"])
def test_a_full_disk_is_one_sentence(config_file: Path, tmp_path: Path, capsys, monkeypatch, full: str) -> None:
    """One of the run's record files is on a device that is always full."""

    def train(config, workdir: Path, **_):
        log = MetricsLog(LogFolder(workdir), 0)
        device = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
        name = {"metrics.jsonl": "file", "times.jsonl": "times", "tensorboard": "events"}[full]
        setattr(log, name, RecordWriter(device) if full == "tensorboard" else device)
        try:
            for step in range(1, 100):
                time.sleep(0.01)
                log.write(step, {"loss": 1.0}, {"step/seconds": 1.0})
        finally:
            log.close()

    monkeypatch.setattr(loop, "train", train)
    assert main(["train", "--config", str(config_file), "--workdir", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"spatialvla-jax train: {tmp_path / full} cannot be written at step ")
    assert error.endswith("No space left on device")


def test_a_workdir_that_cannot_be_made(config_file: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    workdir = tmp_path / "file" / "run"
    error = fails(capsys, "train", "--config", config_file, "--workdir", workdir)
    assert error.endswith(f"--workdir {workdir}: {tmp_path / 'file'} is a file, but a folder is expected")


def test_other_urls_are_refused(config_file: Path, capsys) -> None:
    error = fails(capsys, "train", "--config", config_file, "--workdir", "ftp://host/run")
    assert "--workdir ftp://host/run is not a supported path: expected a local one, or gs://BUCKET" in error
    assert not Path("ftp:").exists()


@pytest.mark.parametrize("module", ["spatialvla_jax", "spatialvla_jax.cli"])
def test_version(module: str) -> None:
    run = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"spatialvla-jax {spatialvla_jax.__version__}\n"


def test_bad_arguments(config_file: Path, tmp_path: Path, capsys) -> None:
    assert "config file nowhere.py does not exist" in fails(
        capsys, "train", "--config", "nowhere.py", "--workdir", tmp_path
    )
    assert "'--stepz=3' is not known" in fails(
        capsys, "train", "--config", config_file, "--workdir", tmp_path, "--stepz=3"
    )


def test_missing_dataset(config_file: Path, tmp_path: Path, capsys) -> None:
    changed = config_for(config_file, tmp_path / "nothing" / "1.0.0", tmp_path)
    assert "nothing/1.0.0" in fails(capsys, "train", "--config", changed, "--workdir", tmp_path / "run")


def test_wrong_version(config_file: Path, rlds: Path, tmp_path: Path, capsys) -> None:
    changed = config_for(config_file, rlds.parent / "2.0.0", tmp_path)
    error = fails(capsys, "train", "--config", changed, "--workdir", tmp_path / "run")
    assert "2.0.0" in error and "1.0.0" in error


def test_no_episode_with_language(config_file: Path, tmp_path: Path, capsys) -> None:
    episodes = make_episodes(2)
    for step in chain(*episodes):
        step["language_instruction"] = ""
    changed = config_for(config_file, make_rlds(tmp_path, {"train": episodes, "val": episodes}), tmp_path)
    error = fails(capsys, "train", "--config", changed, "--workdir", tmp_path / "run")
    assert "toy" in error and "language" in error


def test_action_of_another_width(config_file: Path, tmp_path: Path, capsys) -> None:
    episodes = make_episodes(2)
    for episode in episodes:
        for step in episode:
            step["action"] = step["action"][:6]
    path = make_rlds(tmp_path, {"train": episodes, "val": episodes}, step_features=libero_features(6))
    error = fails(capsys, "train", "--config", config_for(config_file, path, tmp_path), "--workdir", tmp_path / "run")
    assert "toy" in error and "6" in error and "7" in error


def test_image_that_does_not_decode(config_file: Path, tmp_path: Path, capsys) -> None:
    episodes = make_episodes(2)
    episodes[0][1]["observation"]["image"] = b"\xff\xd8 not a picture"
    path = make_rlds(tmp_path, {"train": episodes, "val": episodes})
    error = fails(capsys, "train", "--config", config_for(config_file, path, tmp_path), "--workdir", tmp_path / "run")
    assert "image does not decode" in error and "toy" in error


def test_split_that_does_not_exist(trained: Path, config_file: Path, capsys) -> None:
    error = fails(capsys, "evaluate", "--checkpoint", trained, "--split", "test")
    assert "'test'" in error and "train" in error and "val" in error


def test_checkpoint_of_another_config(trained: Path, config_file: Path, capsys) -> None:
    argv = ("train", "--config", config_file, "--workdir", trained, "--config.train.steps=10", "--config.seed=1")
    assert "seed = 0, this config says 1" in fails(capsys, *argv)


def test_no_checkpoint(tmp_path: Path, capsys) -> None:
    assert str(tmp_path / "empty") in fails(capsys, "evaluate", "--checkpoint", tmp_path / "empty")


def test_evaluate_and_convert(trained: Path, config_file: Path, tmp_path: Path, capsys) -> None:
    assert main(["evaluate", "--checkpoint", str(trained)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= result["token_accuracy"] <= 1 and len(result["l1_per_dimension"]) == 7
    assert main(["convert", str(trained), str(tmp_path / "out"), "--to", "pytorch"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bit_exact"] is True
    # The export alone runs the policy, with the same numbers. Its dataset is named as published.
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    for file, cameras in (("processor.json", "intrinsics"), ("processor_config.json", "intrinsic_config")):
        data = json.loads((moved / file).read_text())
        assert {*data["statistics"], *data[cameras]} - {"default"} == {"toy/1.0.0"}
    assert "--config must name the data" in fails(capsys, "evaluate", "--checkpoint", moved)
    assert main(["evaluate", "--checkpoint", str(moved), "--config", str(config_file)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


def test_a_failed_verification_ends_with_exit_code_1(trained: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Two of the export's tables are flipped: its tokens differ, and the command reports it."""
    from safetensors.numpy import load_file, save_file

    from spatialvla_jax.export.convert import WRITERS

    write = WRITERS["pytorch"]

    def tampered(path, checkpoint, **options):
        write(path, checkpoint, **options)
        tensors = load_file(path / "model.safetensors")
        tensors["spatial_embed_tokens.weight"] = tensors["spatial_embed_tokens.weight"][::-1].copy()
        tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"][::-1].copy()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setitem(WRITERS, "pytorch", tampered)
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(trained), str(tmp_path / "out"), "--to", "pytorch", "--verify"])
    assert stopped.value.code == 1
    assert "spatialvla-jax convert: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["evaluate"], ["serve", "--compile-cache", "never"]])
def test_unconstrained_is_what_the_policy_is_loaded_with(arguments: list[str], capsys, monkeypatch) -> None:
    loaded = []

    def load(path: str, **options: object) -> None:
        loaded.append(options["constrained"])
        raise InputError("that is all")

    monkeypatch.setattr(compiled, "share_compilations", lambda folder: None)
    monkeypatch.setattr(Policy, "load", load)
    for more in ([], ["--unconstrained"]):
        assert fails(capsys, *arguments, "--checkpoint", "run", *more).endswith("that is all")
    assert loaded == [True, False]
