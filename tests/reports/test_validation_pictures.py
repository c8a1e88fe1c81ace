"""Pictures and rollouts during training reach TensorBoard and Weights & Biases, and do not affect the run."""

import io
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.environments import Counter
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from spatialvla_jax.actions import PRETRAIN_GAUSSIANS, gaussian_grid, linear_grid
from spatialvla_jax.checkpoints.orbax import read_orbax
from spatialvla_jax.cli import main
from spatialvla_jax.cli.train import suites_and_tasks
from spatialvla_jax.config import load_config
from spatialvla_jax.errors import InputError
from spatialvla_jax.evaluation.rollouts import Episode
from spatialvla_jax.reports import rollouts as module
from spatialvla_jax.reports.figures.training import chunks, token_use
from spatialvla_jax.reports.rollouts import ValidationRollouts
from spatialvla_jax.reports.validation import ValidationPictures
from spatialvla_jax.sim import libero_env as libero
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.training.loop import train
from spatialvla_jax.training.metrics import MetricsLog

TASKS = [Episode("libero_spatial", task, 0, 0) for task in (0, 1)]  # one episode is done after two steps, one never


def pictures_in(workdir: Path) -> dict[tuple[str, int], Image.Image]:
    """{(tag, step): picture} from a run's event files."""
    found = {}
    for file in (workdir / "tensorboard").iterdir():
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag.startswith(("pictures/", "rollouts/")):
                    data = value.image.encoded_image_string or value.tensor.string_val[2]
                    found[value.tag, event.step] = Image.open(io.BytesIO(data))
    return found


@pytest.mark.slow
def test_a_run_with_pictures_is_the_same_run(packed_config: Path, tmp_path: Path, monkeypatch) -> None:
    overrides = {
        "train.steps": "4",
        "train.eval_every": "2",
        "mesh.fsdp": "4",
        "mesh.data": "2",
        "optimizer.ema": "0.9",
    }
    config, pictures, seen = load_config(packed_config, overrides), ValidationPictures(), []
    monkeypatch.setattr(libero, "Libero", Counter)
    monkeypatch.setitem(libero.MAX_STEPS, "libero_spatial", 9)
    films = ValidationRollouts(TASKS)
    train(config, tmp_path / "plain")
    train(config, tmp_path / "called", on_validation=lambda step, params: seen.append((step, sorted(params))))
    train(config, tmp_path / "drawn", on_start=pictures.start, on_validation=pictures.draw)
    train(config, tmp_path / "filmed", on_start=films.start, on_validation=films.film)
    assert [step for step, _ in seen] == [2, 4] and "spatial_embedding" in seen[0][1]
    plain, called, drawn, filmed = (tmp_path / name for name in ("plain", "called", "drawn", "filmed"))
    assert len({(run / "metrics.jsonl").read_bytes() for run in (plain, called, drawn, filmed)}) == 1
    a = read_orbax(plain).arrays
    for b in (read_orbax(drawn).arrays, read_orbax(filmed).arrays):
        assert all(np.array_equal(a[name].read(), b[name].read()) for name in a)
    rollouts = {key: film.n_frames for key, film in pictures_in(filmed).items()}
    assert rollouts == {
        (f"rollouts/libero_spatial_task{task}", step): frames for task, frames in ((0, 2), (1, 4)) for step in (2, 4)
    }
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


def test_a_rollout_is_a_small_video(monkeypatch) -> None:
    """A frame shows success. The suite's name selects one of several datasets. Faults do not end the run."""
    monkeypatch.setattr(libero, "Libero", Counter)
    monkeypatch.setitem(libero.MAX_STEPS, "libero_spatial", 9)
    asked = []

    def policy(model, params, processor):
        assert params == {"w": 1}
        return SimpleNamespace(
            infer_batch=lambda seen: asked.extend(seen) or [{"actions": np.zeros((4, 7))}] * len(seen)
        )

    monkeypatch.setattr(module, "Policy", policy)
    config = SimpleNamespace(img=SimpleNamespace(image_size=56), depth_source="none")
    films = ValidationRollouts(TASKS)
    films.run = SimpleNamespace(setup=SimpleNamespace(model=SimpleNamespace(config=config), lora_scale=0.0))
    films.processor, films.keys = None, ["libero_spatial_no_noops/1.0.0"] * 2
    found = {name: Image.open(io.BytesIO(data)) for name, data in films.film(3, {"w": 1}).items()}
    assert list(found) == ["rollouts/libero_spatial_task0", "rollouts/libero_spatial_task1"]
    good, bad = (film.convert("RGB").getpixel((1, 1)) for film in found.values())
    assert good[1] > good[0] and bad[0] > bad[1]
    assert {one["unnorm_key"] for one in asked} == {"libero_spatial_no_noops/1.0.0"}
    assert asked[0]["image"][0, 0].tolist() == [56, True, 0]  # mirrored, as that dataset is


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--film", "libero_moon:0"], "unknown suite 'libero_moon'"),
        (["--film", "libero_goal:10"], "unknown task 10"),
        (["--film", "libero_goal:3", "--config.train.eval_every=0"], "train.eval_every=0 makes none"),
    ],
)
def test_films_that_cannot_be_are_refused_first(arguments, message, tmp_path: Path, capsys) -> None:
    workdir = tmp_path / "run"
    assert main(["train", "--config", "demo", "--workdir", str(workdir), *arguments]) == 2
    assert message in capsys.readouterr().err and not workdir.exists()


@pytest.mark.parametrize("text", ["libero_spatial", "libero_spatial:", ":1", "libero_goal:-1", "libero_goal:1,,"])
def test_films_are_named_by_suite_and_task(text) -> None:
    assert suites_and_tasks("libero_spatial:0,libero_goal:3") == [("libero_spatial", 0), ("libero_goal", 3)]
    with pytest.raises(ArgumentTypeError, match="is not SUITE:TASK"):
        suites_and_tasks(text)


def test_a_suite_needs_a_dataset_of_its_name() -> None:
    statistics = {"libero_goal_no_noops": 0, "bridge": 0}
    assert libero.dataset_of("libero_goal", [*statistics]) == "libero_goal_no_noops"
    assert libero.dataset_of("libero_10", ["mine"]) == "mine"
    assert libero.dataset_of("libero_10", ["libero_10_more", "libero_10"]) == "libero_10"
    with pytest.raises(InputError, match=r"suite 'libero_10': .*the data has libero_goal_no_noops, bridge"):
        libero.dataset_of("libero_10", [*statistics])


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
