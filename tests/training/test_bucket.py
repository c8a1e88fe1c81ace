"""A run's workdir at gs:// and s3://, against servers of both protocols."""

import json
import math
import random
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.batches import assert_equal
from helpers.processes import Run, Server, records
from helpers.serving import eventually

from spatialvla_jax.checkpoints import load_pretrained
from spatialvla_jax.checkpoints.orbax import MARKER, TRIES, missing, open_params, step_directories, step_directory
from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.export.convert import convert
from spatialvla_jax.inference.policy import Policy
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.training.metrics import MetricsLog, read_metrics
from spatialvla_jax.training.saving import Checkpoints
from spatialvla_jax.training.state import TrainState
from spatialvla_jax.utils import retries, storage


def state_of(step: int) -> TrainState:
    weights = {"kernel": jnp.arange(6.0).reshape(2, 3) + step, "bias": jnp.full((3,), step, jnp.bfloat16)}
    return TrainState(jnp.int32(step), {"dense": weights}, {"mu": jnp.arange(5.0) - step})


def saver(workdir, **options) -> Checkpoints:
    return Checkpoints(workdir, {"run": "test"}, **({"every": 1, "keep_last": 2, "keep_every": None} | options))


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(state_of(step), step, lambda: None, spikes={}, last=True)


def restore(workdir) -> int:
    """→ the step from which a new process resumes; its state must equal that step's, bit for bit."""
    checkpoints, sharding = saver(workdir), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step, state = checkpoints.restore(state_of(0), jax.tree.map(lambda _: sharding, state_of(0)))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
    return step


def test_steps_are_saved_kept_and_restored(bucket) -> None:
    workdir = storage.as_path(f"{bucket.url}/run", "--workdir")
    checkpoints = saver(workdir)
    save(checkpoints, 1, 2, 3)
    checkpoints.close()
    assert [step.name for step in step_directories(workdir)] == ["3", "2"]
    assert restore(workdir) == 3
    arrays = open_params(step_directory(workdir))
    np.testing.assert_array_equal(arrays["dense/kernel"].read(), state_of(3).params["dense"]["kernel"])
    assert arrays["dense/bias"].read().dtype == jnp.bfloat16


def test_what_was_cut_off_does_not_exist_and_what_is_damaged_is_kept_aside(bucket, tmp_path: Path, capsys) -> None:
    """Step 5 is what a killed save left. Step 4 has lost an array's data. Step 3, copied from a disk, has no marker."""
    save(saver(tmp_path), 3)
    (tmp_path / "checkpoints/3" / MARKER).unlink(missing_ok=True)
    workdir = storage.as_path(bucket.upload(tmp_path, "run"), "--workdir")
    save(saver(workdir, keep_last=5), 4, 5)
    folder = workdir / "checkpoints"
    storage.remove(folder / "5" / MARKER)
    contents = folder / "5/_CHECKPOINT_METADATA"
    storage.put(contents, b'{"item_handlers": {}, "commit_timestamp_nsecs": null}')
    (data, *_) = (name for name in storage.list_tree(folder / "4") if name.startswith("params/d/"))
    storage.put(folder / "4" / data, b"")
    assert (missing(folder / "5"), missing(folder / "4"), missing(folder / "3")) == (MARKER, data, "")
    assert step_directory(workdir) == folder / "3"
    assert restore(workdir) == 3
    eventually(lambda: storage.list_names(folder) == ["3"])  # Orbax removes interrupted saves in the background
    assert storage.list_tree(workdir / "incomplete_checkpoints/4").keys() >= {data, MARKER}
    assert f"{folder}/4 is incomplete and was moved to {workdir}/incomplete_checkpoints/4" in capsys.readouterr().err


WRITES = "^(POST|PUT) "
ARRAYS = f"{WRITES}.*(ocdbt|%2Fd%2F)"  # only those of tensorstore
LASTING = {
    "permission": (403, "no create access", WRITES, "the permission (storage.objects.create|s3:PutObject) is missing"),
    "full": (507, "InsufficientStorage", WRITES, "the bucket is full or a quota is used up"),
    "quota": (403, "quota exceeded", WRITES, "the bucket is full or a quota is used up"),
    "read-only": (403, "object is under a retention policy", "^(POST|PUT|DELETE) ", "the bucket is read-only"),
    "full for arrays": (507, "InsufficientStorage", ARRAYS, "the bucket is full or a quota is used up"),
    "throttled for arrays": (429, "slow down", ARRAYS, "429"),
    "credentials for arrays": (401, "Unauthorized", ARRAYS, "there are no valid credentials"),
    "throttled": (429, "slow down", "", "the storage failed for"),
    "down": (503, "", "", "the storage failed for"),
    "bucket removed": (404, "The specified bucket does not exist", "", "there is no bucket"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", LASTING)
def test_a_save_that_fails_is_tried_again_and_then_one_sentence(gcs, monkeypatch, capsys, fault) -> None:
    """A lasting failure ends the run. The last good checkpoint is still there afterwards."""
    status, body, pattern, words = LASTING[fault]
    workdir = storage.as_path(f"{gcs.url}/run", "--workdir")
    monkeypatch.setattr(Checkpoints, "WAIT", 0.1)
    monkeypatch.setattr(retries, "PATIENCE", 0.3)
    for key, value in {"max_retries": 2, "initial_delay": "1ms"}.items():
        monkeypatch.setitem(TRIES, key, value)
    checkpoints = saver(workdir)
    save(checkpoints, 1)
    if pattern == WRITES:
        gcs.proxy.add(status=403, body="no create access", pattern=ARRAYS, count=1)  # the store doesn't retry a 403
        save(checkpoints, 2)
        assert checkpoints.latest() == 2 and "the last good one is from step 1; trying again" in capsys.readouterr().err
    gcs.proxy.add(status=status, body=json.dumps({"error": {"message": body}}), pattern=pattern)
    with pytest.raises(StorageError, match=words) as ended:
        save(checkpoints, 3)
    assert str(ended.value).count(str(workdir)) <= 2 and "tensorstore_spec" not in str(ended.value)
    assert "\n" not in str(ended.value) and len(str(ended.value)) < 400
    checkpoints.close()
    gcs.proxy.faults.clear()
    assert restore(workdir) == (2 if pattern == WRITES else 1)


def test_a_checkpoint_is_complete_although_an_older_one_cannot_be_removed(gcs, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Checkpoints, "RETRIES", 0)
    workdir = storage.as_path(f"{gcs.url}/run", "--workdir")
    checkpoints = saver(workdir)
    save(checkpoints, 1, 2)
    body = json.dumps({"error": {"message": "me@x does not have storage.objects.delete access"}})
    gcs.proxy.add(status=403, body=body, pattern=r"^DELETE .*checkpoints%2F1(%2F|\?|$)")
    save(checkpoints, 3)
    checkpoints.close()
    err = capsys.readouterr().err
    assert (
        f"{workdir}/checkpoints/3 is complete, but while it was saved: the permission storage.objects.delete is missing"
        in err
    )
    gcs.proxy.faults.clear()
    assert restore(workdir) == 3


def test_logs_outlive_a_kill_up_to_the_last_save(bucket) -> None:
    """The first process saves after step 3, logs step 4 and is killed. The second one resumes from step 3."""
    workdir = storage.as_path(f"{bucket.url}/run", "--workdir")
    folder = LogFolder(workdir)
    folder.began = math.inf  # nothing is uploaded in the background
    log = MetricsLog(folder, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1 / step})
    folder.upload()
    log.write(4, {"loss": 0.0})
    shutil.rmtree(folder.path)  # the machine is gone

    folder = LogFolder(workdir)
    log = MetricsLog(folder, 2)
    log.write(3, {"loss": 0.5}, {"step/seconds": 1.0})
    log.close()
    folder.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(workdir / "metrics.jsonl")] == [(1, 1.0), (2, 0.5), (3, 0.5)]
    assert read_metrics(workdir / "times.jsonl") == [{"step": 3, "step/seconds": 1.0}]
    assert len(storage.list_names(workdir / "tensorboard")) == 2 and not folder.path.exists()


STEPS = 30


def start(server: Server, config: Path, workdir, errors: Path) -> Run:
    return server.train(config, workdir, f"--config.train.steps={STEPS}", errors=errors)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_and_ends_in_the_same_bits(
    bucket, server: Server, packed_config: Path, tmp_path: Path
) -> None:
    """Every 40th request gets a 503, a 429, or half a response. The undisturbed run is on a disk. Export and policy are
    read from the bucket too."""
    assert start(server, packed_config, tmp_path / "run", tmp_path / "undisturbed.txt").wait() == 0
    workdir, errors = storage.as_path(f"{bucket.url}/run", "--workdir"), tmp_path / "errors.txt"
    for status in (503, 429, 0):
        bucket.proxy.add(status=status, cut=not status, every=40)
    chance = random.Random(0)
    for number in range(4):
        run = start(server, packed_config, workdir, errors)
        before = len(storage.list_names(workdir / "checkpoints"))
        if number:
            run.until(lambda before=before: len(storage.list_names(workdir / "checkpoints")) > before)
        time.sleep(chance.uniform(0, 1))
        if run.poll() is None:
            run.send(signal.SIGKILL)
        run.wait()
    assert start(server, packed_config, workdir, errors).wait() == 0, errors.read_text()
    assert records(workdir) == records(tmp_path / "run")
    assert_equal(load_pretrained(workdir)[1], load_pretrained(tmp_path / "run")[1])
    bucket.proxy.faults.clear()

    result = convert(workdir, f"{bucket.url}/export", "pytorch")
    assert result["bit_exact"]
    observation = {"image": np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "prompt": "open it"}
    observation["depth"] = np.ones((64, 64), np.float32)
    expected = Policy.load(tmp_path / "run").infer(observation)
    for place in (workdir, f"{bucket.url}/export"):
        assert_equal(Policy.load(place).infer(observation), expected)


def test_a_workdir_that_cannot_be_used_is_one_sentence(gcs, s3) -> None:
    for url, words in ((f"{gcs.url}-other/run", "no bucket"), (f"{s3.url}-other/run", "no bucket")):
        with pytest.raises(InputError, match=words):
            step_directory(storage.as_path(url, "--workdir"))
