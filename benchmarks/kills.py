"""Kill a run with data and workdir in a bucket at random moments; compare it bit for bit with an undisturbed one.

    python benchmarks/kills.py [--kills 20] [--steps 160] [--seed 0] [--out kills.json]

The bucket is gcp-storage-emulator's, in memory and on loopback. The undisturbed run of the tiny model has data and
workdir on the local disk. The other is killed by SIGKILL: alternately during start-up and at a random moment after a
new checkpoint, possibly during a save. Prints one line per kill. The output file tells whether parameters and metrics
are bit-equal, the goodput (`spatialvla-jax report`), and the time of each restart to its first new step, with the
compiled step loaded from a cache on the local disk.
"""

import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from restart import phases

from spatialvla_jax.checkpoints import load_pretrained
from spatialvla_jax.checkpoints.orbax import MARKER, step_directories
from spatialvla_jax.cli.arguments import Parser, positive, state_defaults
from spatialvla_jax.reports.run import run_report
from spatialvla_jax.training.goodput import read_processes
from spatialvla_jax.training.metrics import read_metrics
from spatialvla_jax.utils.atomic import write_json
from spatialvla_jax.utils.process import tied_to_this
from spatialvla_jax.utils.shipped import shipped
from spatialvla_jax.utils.storage import AnyPath, as_path, is_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.buckets import Bucket, start_gcs

TINY = {"train.batch_size": "8", "train.log_every": "1", "train.eval_every": "0", "checkpoint.every": "5"}
TINY |= {"data.read_block": "8"}  # the default differs for buckets, and with it the order of samples


def main() -> None:
    parser = Parser(prog="python benchmarks/kills.py", description=__doc__)
    parser.add_argument("--kills", type=positive, default=20)
    parser.add_argument("--steps", type=positive, default=160, help="steps of the run, which must outlast all kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--out", type=Path, default=Path("kills.json"), help="JSON file of the result")
    state_defaults(parser)
    args = parser.parse_args()
    proxy, stop = start_gcs()
    os.environ |= {"STORAGE_EMULATOR_HOST": proxy.url, "TENSORSTORE_GCS_HTTP_URL": proxy.url}
    try:
        with tempfile.TemporaryDirectory() as folder:
            (bucket,) = [*Bucket.fresh("gs", proxy)]
            result = measure(bucket, Path(folder), args.kills, args.steps, random.Random(args.seed))
    finally:
        stop()
    write_json(args.out, result)
    print(json.dumps(result))
    print(f"wrote {args.out}")


def measure(bucket: Any, folder: Path, kills: int, steps: int, chance: random.Random) -> dict[str, Any]:
    """The content of `--out`."""
    local, remote = folder / "run", as_path(f"{bucket.url}/run", "run")
    data = shipped("data/libero_spatial_demo/1.0.0")
    finish(folder, local, data, steps)
    there = as_path(bucket.upload(data, "data/libero_spatial_demo/1.0.0"), "data")
    began, startup = time.perf_counter(), 5.0
    moments = []
    for number in range(kills):
        before, start = newest(remote), time.perf_counter()
        process = launch(folder, remote, there, steps)
        if number % 2:
            while newest(remote) == before and process.poll() is None:
                time.sleep(0.2)
            startup = time.perf_counter() - start
        time.sleep(chance.uniform(0, startup / 8 if number % 2 else startup))
        process.send_signal(signal.SIGKILL)
        if process.wait() >= 0:
            ended = f"the run ended after {number} kills: more --steps are needed"
            raise SystemExit(ended if is_file(remote / "finished") else (folder / "output.txt").read_text())
        moments.append({"seconds": time.perf_counter() - start, "checkpoint": newest(remote)})
        print(
            f"kill {number + 1}: after {moments[-1]['seconds']:.1f} s, newest checkpoint {newest(remote)}", flush=True
        )
    finish(folder, remote, there, steps)
    report = run_report(remote)
    restarts = [phases(process) for process in read_processes(remote) if len(process["marks"]) > 2]
    seconds = sorted(restart["total"] for restart in restarts[1:])  # the first start compiled the step
    return {
        "kills": len(moments),
        "parameters_equal": same_bits(load_pretrained(local)[1], load_pretrained(remote)[1]),
        "metrics_equal": read_metrics(local / "metrics.jsonl") == read_metrics(remote / "metrics.jsonl"),
        "steps": steps,
        "seconds": time.perf_counter() - began,
        "goodput": report["goodput"],
        "shares": {cause: seconds / report["wall_seconds"] for cause, seconds in report["seconds"].items()},
        "first_step_seconds": {"median": statistics.median(seconds), "range": [seconds[0], seconds[-1]]},
        "restarts": restarts,
        "moments": moments,
        "environment": {
            "machine": platform.platform(),
            "cores": len(os.sched_getaffinity(0)),
            **{name: version(name) for name in ("jax", "orbax-checkpoint", "tensorstore", "gcsfs")},
        },
    }


def launch(folder: Path, workdir: AnyPath, data: AnyPath, steps: int) -> subprocess.Popen[bytes]:
    keys = TINY | {"train.steps": str(steps), "data.cache_dir": str(folder / "cache")}
    (folder / "config.py").write_text(
        "from spatialvla_jax.config import load_config\n\n\ndef get_config():\n"
        f"    config = load_config('demo', {keys})\n"
        f"    config.data.datasets[0]['path'] = {str(data)!r}\n    return config\n"
    )
    command = [sys.executable, "-m", "spatialvla_jax.cli", "train", "--config", str(folder / "config.py")]
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    compiled["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    with (folder / "output.txt").open("wb") as output:
        return subprocess.Popen(
            [*command, "--workdir", str(workdir)], env=tied_to_this(os.environ | compiled), stdout=output, stderr=output
        )


def finish(folder: Path, workdir: AnyPath, data: AnyPath, steps: int) -> None:
    if launch(folder, workdir, data, steps).wait():
        raise SystemExit((folder / "output.txt").read_text())


def newest(workdir: AnyPath) -> int:
    steps = [step for step in step_directories(workdir) if is_file(step / MARKER)]
    return int(steps[0].name) if steps else 0


def same_bits(a: Any, b: Any) -> bool:
    ours, theirs = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(ours) == len(theirs) and all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
