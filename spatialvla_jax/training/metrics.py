"""Metrics to a JSON-lines file, TensorBoard and Weights & Biases; where a step's time goes, and what it achieves."""

import contextlib
import hashlib
import importlib.util
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.utils.atomic import write_text
from spatialvla_jax.utils.chips import peak
from spatialvla_jax.utils.distributed import is_writer

if "torch" in sys.modules:
    from tensorboardX import SummaryWriter
else:  # kept out: tensorboardX imports all of PyTorch, where it is installed, for one type hint
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        from tensorboardX import SummaryWriter
    finally:
        del sys.modules["torch"]


class MetricsLog:
    """Appends one JSON object a record to `metrics.jsonl`, its timings to `times.jsonl`, scalars to TensorBoard and,
    given its project, to Weights & Biases. Only the run's first process writes. Raises StorageError where it cannot.

    A resumed run drops what was logged beyond `resume_step`, so the file reads as if the run had never stopped.
    """

    def __init__(self, workdir: Path, resume_step: int, wandb: str = "") -> None:
        self.path, self.wandb = workdir / "metrics.jsonl", None
        if not is_writer():
            return
        self.file, self.times = (_kept(path, resume_step) for path in (self.path, workdir / "times.jsonl"))
        self.tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)
        if wandb:
            check_wandb()
            import wandb as client  # pyright: ignore[reportMissingImports]

            same = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]  # a run that goes on is one run
            self.wandb = client.init(project=wandb, name=workdir.name, id=same, resume="allow", dir=str(workdir))

    def write(self, step: int, values: dict[str, Any], timings: dict[str, float] | None = None) -> None:
        """`values` are JSON scalars. `timings` have a file of their own: the other is the same whenever the run is."""
        if not is_writer():
            return
        self._append(self.file, "metrics.jsonl", step, values)
        if timings:
            self._append(self.times, "times.jsonl", step, timings)
        # A write that failed ended its thread, and a full queue would be waited for.
        if not self.tensorboard.file_writer.event_writer._worker.is_alive():  # pyright: ignore[reportOptionalMemberAccess]
            raise StorageError(f"{self.tensorboard.logdir} cannot be written at step {step}")
        scalars = {k: v for k, v in (values | (timings or {})).items() if isinstance(v, float | int)}
        for name, value in scalars.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(scalars, step=step)

    def _append(self, file: BinaryIO, name: str, step: int, values: dict[str, Any]) -> None:
        try:
            file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        except OSError as error:
            path = self.path.with_name(name)
            raise StorageError(f"{path} cannot be written at step {step}: {error.strerror}") from error

    def close(self) -> None:
        if is_writer():
            self.file.close()
            self.times.close()
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _kept(path: Path, resume_step: int) -> BinaryIO:
    """The file opened to append to, without the records beyond `resume_step`; unbuffered, so that nothing is left over
    to fail again when it is closed."""
    if path.exists():
        kept = [r for r in read_metrics(path) if r["step"] <= resume_step]
        write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
    return path.open("ab", buffering=0)  # pyright: ignore[reportReturnType]


def check_wandb() -> None:
    if importlib.util.find_spec("wandb") is None:
        raise InputError("--wandb needs the package wandb, which is not installed: pip install wandb")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a `metrics.jsonl`; a last line cut short by a kill is dropped."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def scalars(metrics: dict[str, Any], datasets: Sequence[str]) -> dict[str, float]:
    """The step's metrics as numbers; "datasets" of `by_dataset` as loss/NAME and accuracy/NAME of those in it."""
    values = {k: np.asarray(v) for k, v in metrics.items()}
    named: dict[str, float] = {}
    for name, (count, loss, accuracy) in zip(datasets, values.pop("datasets").tolist(), strict=True):
        if count:
            named |= {f"loss/{name}": loss / count, f"accuracy/{name}": accuracy / count}
    return {k: v.item() for k, v in values.items()} | named


class Clock:
    """Where this process's time went since the last report: `with clock("data"): …`."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.began = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.spent[name] += time.perf_counter() - began

    def report(self, steps: int) -> dict[str, float]:
        """Seconds a step, of the last `steps`: in all, waiting for data and for devices, and stalled by saving.
        Validation does not count."""
        whole = time.perf_counter() - self.began - self.spent["eval"]
        parts = {"data/wait_seconds": "data", "compute/seconds": "compute", "save/stall_seconds": "save"}
        report = {"step/seconds": whole / steps} | {k: self.spent[v] / steps for k, v in parts.items()}
        self.__init__()
        return report


def rates(seconds: float, samples: int, tokens: int, flops: float) -> dict[str, float]:
    """What a step of `seconds` over `samples` achieves, each of `tokens` positions and `flops` FLOPs.

    MFU = flops × samples / (seconds × devices × peak): FLOPs of the forward pass and the backward pass to trainable
    parameters, without rematerialisation, augmentation and optimizer (`topology.model_flops`); 0 for devices of unknown
    peak, where MFU is left out. Memory is that of this process's first device.
    """
    values = {"samples_per_second": samples / seconds, "tokens_per_second": samples * tokens / seconds}
    if flops:
        values["mfu"] = flops * samples / (seconds * jax.device_count() * (peak() or np.inf))
    memory = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "memory/gb", "peak_bytes_in_use": "memory/peak_gb"}
    return values | {name: memory[key] / 1e9 for key, name in names.items() if key in memory}
