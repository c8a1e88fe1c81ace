from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from spatialvla_jax.checkpoints import load_pretrained
from spatialvla_jax.checkpoints.mapping import flatten, param_shapes
from spatialvla_jax.config import load_config
from spatialvla_jax.errors import InputError
from spatialvla_jax.models import preset
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.training.loop import train
from spatialvla_jax.training.metrics import MetricsLog, read_metrics

TABLE = "llm/embedder/input_embedding"


def test_the_last_and_every_kth_are_kept(config_file: Path, tmp_path: Path) -> None:
    """Uses the training step of the fixture `trained`; the loss falls."""
    same = {"train.steps": "10", "mesh.fsdp": "4", "mesh.data": "2"}
    kept = {"checkpoint.every": "2", "checkpoint.keep_last": "2", "checkpoint.keep_every": "4"}
    assert train(load_config(config_file, same | kept), tmp_path)["step"] == 10
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 8, 10]
    processor = load_pretrained(tmp_path)[2]
    assert processor is not None and set(processor.statistics) == {"toy"}
    losses = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_run_starts_from_a_paligemma(config_file: Path, tmp_path: Path) -> None:
    """big_vision's PaliGemma 2 with this model's sizes; action tokens start as the mean of its text rows."""
    config = preset("nano")
    rng = np.random.default_rng(0)
    shapes = {k: s for k, s in param_shapes(config).items() if k.startswith(("img", "llm")) and k != "llm/lm_head"}
    shapes[TABLE] = (config.text_vocab, config.llm.width)
    arrays = {k: rng.normal(0, 0.02, shape).astype(np.float32) for k, shape in shapes.items()}
    np.savez(tmp_path / "paligemma.npz", **arrays)
    overrides = {"init": str(tmp_path / "paligemma.npz"), "train.steps": "1", "optimizer.learning_rate": "0.0"}
    train(load_config(config_file, overrides), tmp_path / "run")
    params = flatten(load_pretrained(tmp_path / "run")[1])
    np.testing.assert_array_equal(params["img/head/kernel"], arrays["img/head/kernel"])
    np.testing.assert_array_equal(params[TABLE][: config.text_vocab], arrays[TABLE])
    mean = np.broadcast_to(arrays[TABLE].mean(0), params["spatial_embedding"].shape)
    np.testing.assert_allclose(params["spatial_embedding"], mean, atol=1e-7)
    overrides["model.depth_source"] = "zoedepth"
    with pytest.raises(InputError, match="init_zoedepth"):
        train(load_config(config_file, overrides), tmp_path / "other")


def test_a_resumed_log_reads_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    log = MetricsLog(LogFolder(tmp_path), 0)
    for step in range(1, 6):
        log.write(step, {"loss": 1 / step, "batch": "abc"})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    log = MetricsLog(LogFolder(tmp_path), 3)
    log.write(4, {"loss": float(jnp.float32(0.1))})
    log.close()
    assert [r["step"] for r in read_metrics(log.path)] == [1, 2, 3, 4]
    assert read_metrics(log.path)[-1]["loss"] == pytest.approx(0.1)
