"""Metrics logging to JSON lines, TensorBoard and Weights & Biases; throughput and MFU of a step."""

import contextlib
import hashlib
import importlib.util
import io
import json
import math
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.utils.atomic import Appending, write_text
from spatialvla_jax.utils.chips import peak
from spatialvla_jax.utils.distributed import is_writer
from spatialvla_jax.utils.storage import AnyPath, absolute, read_text

PLATEAU_GAIN = 2.0  # percent; a training whose last quarter gained less is at its plateau


class MetricsLog:
    """Appends a JSON record per report to `metrics.jsonl` and its timings to `times.jsonl`. Scalars go to TensorBoard
    and, if a project is given, to Weights & Biases. Only the run's first process writes. Raises StorageError if a write
    fails.

    A resumed run drops records after `resume_step`, so the files read as if the run had never stopped.
    """

    def __init__(self, folder: LogFolder, resume_step: int, wandb: str = "") -> None:
        self.folder, self.path, self.wandb = folder, folder.path / "metrics.jsonl", None
        if not is_writer():
            return
        self.file, self.times = (_kept(folder.fetch(name), resume_step) for name in ("metrics.jsonl", "times.jsonl"))
        (folder.path / "tensorboard").mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        # TensorBoard's own SummaryWriter would import TensorFlow where it is installed.
        self.events = RecordWriter(Appending(folder.path / "tensorboard" / name))
        with self._writing("tensorboard", resume_step):
            self._write_event(file_version="brain.Event:2")
            # Hides what earlier files logged for later steps.
            self._write_event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        if wandb:
            import wandb as client  # pyright: ignore[reportMissingImports]

            run = folder.workdir
            same = hashlib.sha256(str(absolute(run)).encode()).hexdigest()[:16]  # a resumed run keeps its id
            self.wandb = client.init(project=wandb, name=run.name, id=same, resume="allow", dir=str(folder.path))

    def write(self, step: int, values: dict[str, Any], timings: dict[str, float] | None = None) -> None:
        """`values` are JSON scalars. `timings` go to a separate file, so that equal runs have equal metrics files."""
        if not is_writer():
            return
        timings = timings or {}
        with self._writing("metrics.jsonl", step):
            self.file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        with self._writing("times.jsonl", step):
            if timings:
                self.times.write(json.dumps({"step": step, **timings}).encode() + b"\n")
        scalars = {k: v for k, v in (values | timings).items() if isinstance(v, float | int)}
        with self._writing("tensorboard", step):
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()])
            self._write_event(step=step, summary=summary)
        if self.wandb is not None:
            self.wandb.log(scalars, step=step)
        self.folder.upload_now_and_then()

    def write_pictures(self, step: int, pictures: Mapping[str, bytes] | None) -> None:
        """PNG and GIF files, by name, to TensorBoard and Weights & Biases."""
        if not is_writer() or not pictures:
            return
        from PIL import Image

        opened = {name: Image.open(io.BytesIO(data)) for name, data in pictures.items()}
        images = {
            name: Summary.Image(encoded_image_string=pictures[name], width=x.width, height=x.height, colorspace=3)
            for name, x in opened.items()
        }
        with self._writing("tensorboard", step):
            summary = Summary(value=[Summary.Value(tag=name, image=image) for name, image in images.items()])
            self._write_event(step=step, summary=summary)
        if self.wandb is not None:
            import wandb as client  # pyright: ignore[reportMissingImports]

            logged = {
                name: client.Video(io.BytesIO(pictures[name]), format="gif") if x.format == "GIF" else client.Image(x)
                for name, x in opened.items()
            }
            self.wandb.log(logged, step=step)

    def go_back(self, step: int) -> None:
        """Drop what was logged after `step`, from which the run resumes."""
        if not is_writer():
            return
        self.file.close()
        self.times.close()
        self.file, self.times = (_kept(self.path.with_name(name), step) for name in ("metrics.jsonl", "times.jsonl"))
        with self._writing("tensorboard", step):
            self._write_event(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def _write_event(self, **fields: Any) -> None:
        self.events.write(Event(wall_time=time.time(), **fields).SerializeToString())

    @contextlib.contextmanager
    def _writing(self, name: str, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = self.path.with_name(name)
            raise StorageError(f"{path} cannot be written at step {step}: {error.strerror}") from error

    def close(self) -> None:
        if is_writer():
            self.file.close()
            self.times.close()
            self.events.close()
        if self.wandb is not None:
            self.wandb.finish()


def _kept(path: Path, resume_step: int) -> Appending:
    """Open a file for appending, after dropping records beyond `resume_step`."""
    if path.exists():
        kept = [r for r in read_metrics(path) if r["step"] <= resume_step]
        write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
    return Appending(path)


def check_wandb() -> None:
    if importlib.util.find_spec("wandb") is None:
        raise InputError("--wandb needs the package wandb, which is not installed: pip install wandb")


def read_metrics(path: AnyPath) -> list[dict[str, Any]]:
    """All complete records of a `metrics.jsonl`; a last line truncated by a kill is dropped. Raises InputError for
    any other line that is not a record."""
    records, lines = [], read_text(path).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            record = None
        if not isinstance(record, dict) or "step" not in record:
            raise InputError(f"{path} is damaged: line {number} is not a JSON object with a step")
        records.append(record)
    return records


def curve_of(records: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of every finite value."""
    return [(record["step"], record[key]) for record in records if key in record and math.isfinite(record[key])]


def last_gain(curve: Sequence[Sequence[float]], steps: int) -> float | None:
    """By how many percent the best value of a curve of (step, value) fell over the last quarter of `steps`. None
    without a value in that quarter or before it."""
    before = [value for step, value in curve if step <= 0.75 * steps]
    after = [value for step, value in curve if step > 0.75 * steps]
    return 100 * max(0.0, 1 - min(after) / min(before)) if before and after and min(before) > 0 else None


def plateau(curve: Sequence[Sequence[float]], steps: int) -> bool | None:
    """Whether a curve fell, but by less than `PLATEAU_GAIN` over the last quarter of `steps`; None as of `last_gain`.
    A curve that never falls below its first value says that nothing was learned, not that nothing is left to learn."""
    gain = last_gain(curve, steps)
    return None if gain is None else gain < PLATEAU_GAIN and min(value for _, value in curve) < curve[0][1]


def scalars(metrics: dict[str, Any], datasets: Sequence[str]) -> dict[str, float]:
    """A step's metrics as numbers. "datasets" of `by_dataset` becomes loss/NAME and accuracy/NAME."""
    values = {k: np.asarray(v) for k, v in metrics.items()}
    named: dict[str, float] = {}
    for name, (count, loss, accuracy) in zip(datasets, values.pop("datasets").tolist(), strict=True):
        if count:
            named |= {f"loss/{name}": loss / count, f"accuracy/{name}": accuracy / count}
    return {k: v.item() for k, v in values.items()} | named


def rates(seconds: float, samples: int, tokens: int, flops: float) -> dict[str, float]:
    """Throughput of a step of `seconds` over `samples`, each with `tokens` positions and `flops` FLOPs.

    MFU = flops × samples / (seconds × devices × peak). The FLOPs are those of the forward pass and of the backward pass
    to trainable parameters, without rematerialisation, augmentation and optimizer (`flops.model_flops`). It is omitted
    if `flops` is 0, as for devices of unknown peak. Memory is that of this process's first device.
    """
    values = {"samples_per_second": samples / seconds, "tokens_per_second": samples * tokens / seconds}
    if flops:
        values["mfu"] = flops * samples / (seconds * jax.device_count() * (peak() or np.inf))
    memory = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "memory/gb", "peak_bytes_in_use": "memory/peak_gb"}
    return values | {name: memory[key] / 1e9 for key, name in names.items() if key in memory}
