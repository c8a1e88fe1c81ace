"""What a run reports about itself, and when it gives up."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.full_disk import no_room
from helpers.processes import LOGGED, Server
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from spatialvla_jax.checkpoints.orbax import read_orbax
from spatialvla_jax.cli.train import step_range
from spatialvla_jax.config import default_config
from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.reports.run import describe, run_report
from spatialvla_jax.training import goodput, metrics
from spatialvla_jax.training.goodput import Clock
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.training.loop import train
from spatialvla_jax.training.metrics import MetricsLog, rates, read_metrics, scalars


def test_a_run_is_watched_traced_and_averaged(server: Server, packed_config: Path, tmp_path: Path) -> None:
    """Killed and restarted with averaged parameters, a run logs and ends like an undisturbed one."""
    arguments = ("--config.optimizer.ema=0.9", "--config.train.steps=12", "--config.train.eval_every=12")
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    run = server.train(packed_config, plain, *arguments, "--profile", "11:20")  # longer than the run
    assert run.wait() == 0, run.errors.read_text()
    assert list((plain / "profile").rglob("*.xplane.pb"))
    events = b"".join(path.read_bytes() for path in (plain / "tensorboard").iterdir())
    for name in ("data/wait_seconds", "compute/seconds", "save/stall_seconds", "save/seconds", "step/seconds"):
        assert name.encode() in events
    assert b"samples_per_second" in events and b"tokens_per_second" in events and b"mfu" not in events
    first, *_, validation = read_metrics(plain / "metrics.jsonl")
    parts = ("img", "llm", "ego3d", "spatial_embedding")
    assert {f"{norm}_norm/{part}" for norm in ("gradient", "update") for part in parts} <= set(first)
    assert first["loss/toy"] == pytest.approx(first["loss"]) and first["skipped"] == 0
    assert validation["val/accuracy/toy"] == pytest.approx(validation["val/accuracy"])

    run = server.train(packed_config, killed, *arguments, pause=(LOGGED, 12))
    assert run.until(run.paused) and (killed / "checkpoints" / "5").exists(), run.errors.read_text()
    run.kill()
    run = server.train(packed_config, killed, *arguments)
    assert run.wait() == 0, run.errors.read_text()
    assert read_metrics(killed / "metrics.jsonl") == read_metrics(plain / "metrics.jsonl")
    a, b = (read_orbax(workdir).arrays for workdir in (plain, killed))
    assert all(np.array_equal(a[k].read(), b[k].read()) for k in a)
    check_goodput(killed)


def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """The disk has room for part of one, and later for all."""
    log = MetricsLog(LogFolder(tmp_path), 0)
    for step in (1, 2, 3):
        with no_room((tmp_path / "metrics.jsonl").stat().st_size + 10) if step == 2 else nullcontext():
            try:
                log.write(step, {"loss": 1.0})
            except StorageError as error:
                assert step == 2 and str(error).startswith(f"{tmp_path}/metrics.jsonl cannot be written at step 2: ")
    with no_room(next((tmp_path / "tensorboard").iterdir()).stat().st_size + 10), pytest.raises(StorageError):
        log.write(4, {"loss": 1.0})
    log.write(5, {"loss": 1.0})
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3, 4, 5]
    events = [event for event in EventFileLoader(str(next((tmp_path / "tensorboard").iterdir()))).Load()]
    assert [event.step for event in events if event.HasField("summary")] == [1, 3, 5]


def check_goodput(workdir: Path) -> None:
    """A run of 12 steps, killed once: every second of wall time has a cause, in every report."""
    report = run_report(workdir)
    first, second = report["processes"]
    assert first["first_step"] == 0 and 5 <= second["first_step"] <= 12 == second["last_step"] == report["step"]
    wall = second["began"] + second["seconds"] - first["began"]
    assert sum(report["seconds"].values()) == pytest.approx(report["wall_seconds"]) == pytest.approx(wall)
    assert all(report["seconds"][cause] > 0 for cause in ("steps", "start", "compile", "data", "save", "eval"))
    assert "step 12 of 12, 2 processes, goodput" in describe(report)
    times = [json.loads(line) for line in (workdir / "times.jsonl").read_text().splitlines()]
    shares = {key: value for key, value in times[-1].items() if key.startswith("goodput")}
    assert sum(shares.values()) == pytest.approx(1) and 0 < shares["goodput"] < 1
    assert b"goodput/lost" in b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())


def test_too_many_skipped_steps_end_the_run(server: Server, packed_config: Path, tmp_path: Path) -> None:
    arguments = ("--config.optimizer.learning_rate=1e30", "--config.train.max_skipped=3")
    run = server.train(packed_config, tmp_path / "run", *arguments)
    assert run.wait() == 2
    sentence = run.errors.read_text().splitlines()[-1]
    steps = [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["skipped"] == 4]
    assert f"train: step {steps[0]}: loss or gradient are not finite, 4 times" in sentence
    assert "train.max_skipped 3" in sentence


def test_metrics_by_dataset_are_named() -> None:
    values = {"loss": np.float32(2), "datasets": np.array([[2, 3.0, 1.0], [0, 0, 0]])}
    assert scalars(values, ("a", "b")) == {"loss": 2.0, "loss/a": 1.5, "accuracy/a": 0.5}


def test_the_clock_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(goodput, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = Clock()
    for name, seconds in (("data", 1.0), ("compute", 6.0), ("save", 2.0), ("eval", 50.0), ("data", 1.0)):
        with clock(name):
            now += seconds
    expected = {"step/seconds": 5.0, "data/wait_seconds": 1.0, "compute/seconds": 3.0, "save/stall_seconds": 1.0}
    assert clock.report(2) == expected
    assert clock.report(1)["step/seconds"] == 0


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "peak", lambda: 100.0)
    monkeypatch.setattr(metrics.jax, "device_count", lambda: 4)
    values = rates(2.0, samples=16, tokens=10, flops=25.0)
    assert values == {"samples_per_second": 8.0, "tokens_per_second": 80.0, "mfu": 0.5}


@pytest.mark.parametrize(("kind", "peak"), [("NVIDIA H200", 989e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12)])
def test_peaks(kind: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    assert metrics.peak() == peak


def test_weights_and_biases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a stub: a resumed run keeps its id there, and only numbers are logged."""
    started, logged = [], []

    def init(**arguments):
        started.append(arguments)
        return SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=SimpleNamespace()))
    for step in (1, 2):
        log = MetricsLog(LogFolder(tmp_path), step - 1, "project")
        log.write(step, {"loss": 1.0, "batch": "abc"}, {"step/seconds": 0.5})
        log.close()
    assert logged == [(1, {"loss": 1.0, "step/seconds": 0.5}), (2, {"loss": 1.0, "step/seconds": 0.5})]
    assert started[0] == started[1] and started[0]["project"] == "project" and started[0]["resume"] == "allow"


def test_weights_and_biases_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--wandb needs the package wandb, which is not installed"):
        train(default_config(), tmp_path, wandb="project")


def test_step_range() -> None:
    assert step_range("50:55") == (50, 55)
    for text in ("50", "0:3", "5:4", "a:b"):
        with pytest.raises(Exception, match="is not FIRST:LAST"):
            step_range(text)


def test_tensorflow_reads_the_events(tmp_path: Path) -> None:
    """Also hides what earlier files say about later steps."""
    from tensorflow.compat.v1.train import summary_iterator  # pyright: ignore

    for step in (1, 2):
        log = MetricsLog(LogFolder(tmp_path), step - 1)
        log.write(step, {"loss": 0.5 * step, "batch": "abc"}, {"step/seconds": 0.25})
        log.close()
    files = sorted((tmp_path / "tensorboard").iterdir())
    events = [event for file in files for event in summary_iterator(str(file))]
    found = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert found == [(s, k, v) for s in (1, 2) for k, v in (("loss", 0.5 * s), ("step/seconds", 0.25))]
    assert [e.step for e in events if e.session_log.status] == [1, 2]
