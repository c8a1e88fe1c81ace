"""Pictures of a training run's validations, for TensorBoard and Weights & Biases."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from spatialvla_jax.actions import decode, encode
from spatialvla_jax.batch import Batch
from spatialvla_jax.models import Params
from spatialvla_jax.training.loop import Run, to_device
from spatialvla_jax.training.sharding import BATCH
from spatialvla_jax.training.step import jit_predict_step
from spatialvla_jax.utils.distributed import is_writer
from spatialvla_jax.utils.progress import warn

SHOWN = 4  # samples whose chunks are drawn


class ValidationPictures:
    """Callbacks of `training.loop.train`. Each validation costs one forward pass over one batch of the validation
    split, the same frames every time; the run itself is not changed."""

    run: Run
    batch: Batch  # on the device
    predict: Any

    def start(self, run: Run) -> None:
        self.run = run

    def draw(self, step: int, params: Params) -> dict[str, bytes]:
        """Pictures by name. If they cannot be drawn, warns instead of stopping the run."""
        setup, grid = self.run.setup, self.run.grid
        if not hasattr(self, "predict"):
            self.batch = self._read()
            self.predict = jit_predict_step(setup, self.run.shardings, SHOWN)
        ids, actions, valid, images = jax.device_get(self.predict(params, self.batch, grid))
        if not is_writer():
            return {}
        try:
            return _draw(jax.device_get(grid), ids, actions, valid, images)
        except Exception as error:
            warn(f"no pictures of step {step}: {type(error).__name__}: {error}")
            return {}

    def _read(self) -> Batch:
        """One validation batch of frames, evenly spaced over the split."""
        setup, size = self.run.setup, self.run.setup.batch_size // self.run.setup.grad_accum_steps
        rows = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        batches = self.run.loader.epoch(size, setup.eval_split, frames=size, **rows)
        assert setup.mesh is not None
        (batch,) = batches
        return to_device(batch, NamedSharding(setup.mesh, BATCH))


def _draw(grid: Any, ids: np.ndarray, actions: np.ndarray, valid: np.ndarray, images: np.ndarray) -> dict[str, bytes]:
    from spatialvla_jax.reports.figures.training import chunks, token_use  # matplotlib takes a second to import

    expert, predicted = np.asarray(encode(grid, actions)), np.asarray(decode(grid, ids))
    rows = np.flatnonzero(valid[: len(images)])
    samples = [{"image": images[i], "expert": actions[i], "predicted": predicted[i]} for i in rows]
    pictures: dict[str, Callable[[Path], None]] = {
        "pictures/token_use": lambda path: token_use(path, grid, expert[valid], ids[valid])
    }
    if samples:
        pictures["pictures/chunks"] = lambda path: chunks(path, samples, grid.dimensions)
    found = {}
    with tempfile.TemporaryDirectory(prefix="spatialvla-") as folder:
        for name, draw in pictures.items():
            draw(Path(folder) / "picture.png")
            found[name] = (Path(folder) / "picture.png").read_bytes()
    return found
