"""Peak memory of converting a full-size checkpoint, published → Orbax → published, and whether it is lossless.

    python benchmarks/convert_full_size.py [--preset spatialvla-4b-224] [--dir /tmp]

Creates a directory in the published layout with random bfloat16 weights (8 GB by default), converts it there and back,
each in a new process, and removes everything. Prints the peak resident memory of each conversion; ends with one line of
JSON.
"""

import argparse
import json
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from loader import in_new_process

from spatialvla_jax.checkpoints import Checkpoint, write_huggingface
from spatialvla_jax.checkpoints.mapping import param_shapes
from spatialvla_jax.checkpoints.safetensors_io import open_directory
from spatialvla_jax.checkpoints.types import LazyArray
from spatialvla_jax.export.convert import convert
from spatialvla_jax.models import preset

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def random_checkpoint(name: str) -> Checkpoint:
    """A checkpoint of normally distributed weights, drawn when they are read."""

    def lazy(seed: int, shape: tuple[int, ...]) -> LazyArray:
        def read() -> np.ndarray:
            rng, x = np.random.default_rng(seed), np.empty(prod(shape), BFLOAT16)
            for i in range(0, x.size, 2**24):
                x[i : i + 2**24] = rng.standard_normal(min(2**24, x.size - i), np.float32) * np.float32(0.02)
            return x.reshape(shape)

        return LazyArray(shape, BFLOAT16, read)

    config = preset(name)
    arrays = {path: lazy(seed, shape) for seed, (path, shape) in enumerate(param_shapes(config).items())}
    return Checkpoint(config, arrays, None)


def peak_gb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e9 if sys.platform == "darwin" else 1e6), 2)


def measure(function: Callable[..., None], *arguments: Any) -> dict[str, float]:
    """Run `function`; returns {"seconds", "peak_gb", "idle_gb"}, where `idle_gb` is the peak before it runs."""
    idle, start = peak_gb(), time.perf_counter()
    function(*arguments)
    return {"seconds": round(time.perf_counter() - start, 1), "peak_gb": peak_gb(), "idle_gb": idle}


def make(name: str, path: Path) -> None:
    write_huggingface(path, random_checkpoint(name))


def there(source: Path, destination: Path) -> None:
    assert convert(source, destination, to="orbax")["bit_exact"]


def back(source: Path, destination: Path) -> None:
    assert convert(source, destination, to="pytorch", verify=False)["bit_exact"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="spatialvla-4b-224")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="parent of the temporary folder")
    arguments = parser.parse_args()

    parameters = sum(prod(shape) for shape in param_shapes(preset(arguments.preset)).values())
    needed, free = 3.2 * 2 * parameters, shutil.disk_usage(arguments.dir).free
    if free < needed:
        sys.exit(f"{arguments.dir} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed")
    environment = {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__}
    print("environment: " + ", ".join(f"{k} {v}" for k, v in environment.items()))

    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        published, run, again = (Path(folder) / name for name in ("published", "run", "again"))
        in_new_process(make, arguments.preset, published)
        figures = {
            "to_orbax": in_new_process(measure, there, published, run),
            "to_published": in_new_process(measure, back, run, again),
        }
        before, after = open_directory(published), open_directory(again)
        equal = before.keys() == after.keys() and all(
            before[key].dtype == after[key].dtype and before[key].read().tobytes() == after[key].read().tobytes()
            for key in before
        )
        shards = [file.stat().st_size for file in again.glob("*.safetensors")]

    print(f"{arguments.preset}: {parameters:,} parameters in bfloat16, {len(after)} tensors in {len(shards)} shards")
    for name, found in figures.items():
        print(f"{name:13} {found['seconds']:8.1f} s   peak {found['peak_gb']:.2f} GB (idle {found['idle_gb']:.2f} GB)")
    print(f"all tensors are byte-equal: {equal}")
    result = {"benchmark": "convert_full_size", "preset": arguments.preset, "parameters": parameters, **environment}
    print(json.dumps({**result, **figures, "largest_shard_bytes": max(shards), "byte_equal": equal}))
    sys.exit(not equal)


if __name__ == "__main__":
    main()
