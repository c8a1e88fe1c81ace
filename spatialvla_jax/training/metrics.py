"""Metrics to a JSON-lines file and TensorBoard."""

import json
import os
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class MetricsLog:
    """Appends one JSON object a record to `metrics.jsonl`, and scalars to TensorBoard.

    A resumed run drops what was logged beyond `resume_step`, so the file reads as if the run had never stopped.
    """

    def __init__(self, workdir: Path, resume_step: int) -> None:
        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            kept = [r for r in read_metrics(self.path) if r["step"] <= resume_step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
            os.replace(temporary, self.path)
        self.file = self.path.open("a")
        self.tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, Any], timings: dict[str, float] | None = None) -> None:
        """`values` are JSON scalars; numbers go to TensorBoard too. `timings` go there alone: the file is the same
        whenever the run is."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in (values | (timings or {})).items():
            if isinstance(value, float | int):
                self.tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        self.tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a `metrics.jsonl`; a last line cut short by a kill is dropped."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
