"""Pictures while training: they reach TensorBoard and Weights & Biases, and change nothing."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from spatialvla_jax.actions import PRETRAIN_GAUSSIANS, gaussian_grid, linear_grid
from spatialvla_jax.checkpoints.orbax import read_orbax
from spatialvla_jax.config import load_config
from spatialvla_jax.reports.figures.training import chunks, token_use
from spatialvla_jax.reports.validation import ValidationPictures
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.training.loop import train
from spatialvla_jax.training.metrics import MetricsLog


def pictures_in(workdir: Path) -> dict[tuple[str, int], Image.Image]:
    """{(tag, step): picture} of a run's event files."""
    found = {}
    for file in (workdir / "tensorboard").iterdir():
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag.startswith("pictures/"):
                    data = value.image.encoded_image_string or value.tensor.string_val[2]
                    found[value.tag, event.step] = Image.open(io.BytesIO(data))
    return found


@pytest.mark.slow
def test_a_run_with_pictures_is_the_same_run(packed_config: Path, tmp_path: Path) -> None:
    overrides = {
        "train.steps": "4",
        "train.eval_every": "2",
        "mesh.fsdp": "4",
        "mesh.data": "2",
        "optimizer.ema": "0.9",
    }
    config, pictures, seen = load_config(packed_config, overrides), ValidationPictures(), []
    train(config, tmp_path / "plain")
    train(config, tmp_path / "called", on_validation=lambda step, params: seen.append((step, sorted(params))))
    train(config, tmp_path / "drawn", on_start=pictures.start, on_validation=pictures.draw)
    assert [step for step, _ in seen] == [2, 4] and "spatial_embedding" in seen[0][1]
    plain, called, drawn = (tmp_path / name for name in ("plain", "called", "drawn"))
    assert len({(run / "metrics.jsonl").read_bytes() for run in (plain, called, drawn)}) == 1
    a, b = read_orbax(plain).arrays, read_orbax(drawn).arrays
    assert all(np.array_equal(a[name].read(), b[name].read()) for name in a)
    assert pictures_in(plain) == pictures_in(called) == {}
    found = pictures_in(drawn)
    assert found.keys() == {(f"pictures/{name}", step) for name in ("chunks", "token_use") for step in (2, 4)}
    assert all(min(image.size) > 300 for image in found.values())


def test_pictures_go_to_both_logs(tmp_path: Path, monkeypatch) -> None:
    sent = []
    run = SimpleNamespace(log=lambda values, step: sent.append((step, values)), finish=lambda: None)
    client = SimpleNamespace(
        init=lambda **_: run,
        Image=lambda image: ("image", image.size),
        Video=lambda data, format: (format, data.read(3)),
    )
    monkeypatch.setitem(sys.modules, "wandb", client)
    log = MetricsLog(LogFolder(tmp_path), 0, "project")
    png, gif = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (30, 20)).save(png, "png")
    Image.new("RGB", (8, 8)).save(gif, "gif")
    log.write_pictures(3, {"pictures/a": png.getvalue(), "pictures/b": gif.getvalue()})
    log.write_pictures(4, None)
    log.close()
    found = pictures_in(tmp_path)
    assert {key: image.size for key, image in found.items()} == {("pictures/a", 3): (30, 20), ("pictures/b", 3): (8, 8)}
    assert sent == [(3, {"pictures/a": ("image", (30, 20)), "pictures/b": ("gif", b"GIF")})]


@pytest.mark.parametrize("grid", [gaussian_grid(PRETRAIN_GAUSSIANS, (4, 4, 2, 4, 4, 4)), linear_grid(16)])
def test_figures_of_chunks_and_of_the_grid_s_use(grid, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (6, 4, 7)).astype(np.float32)
    ids = np.asarray(grid.encode(actions))
    token_use(tmp_path / "use.png", grid, ids, ids[::-1])
    samples = [{"image": np.zeros((20, 20, 3), np.uint8), "expert": x, "predicted": -x} for x in actions[:2]]
    chunks(tmp_path / "chunks.png", samples, grid.dimensions)
    for name in ("use", "chunks"):
        assert np.ptp(np.asarray(Image.open(tmp_path / f"{name}.png"))) > 100
