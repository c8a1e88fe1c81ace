"""Compare the data stream with bare decoding and with a shuffle buffer: throughput, memory, start-up and waits.

    python benchmarks/loader.py [--parts speed packed memory start overlap] [--samples 300000] [--out FILE.json]

Creates 28 RLDS datasets with the names and weights of the published mixture (2.3 GB, once, in `--root`). Parts:

speed    samples/s, measured in turns in one process: the ceiling, which only decodes and resizes the same frames from
         memory; the loader; and an Octo-style stream with a shuffle buffer, without and with colour augmentation. Rates
         are per second of wall time and of CPU time; the latter hardly depends on what else the machine is doing.
packed   samples/s from one packed file of each dataset's first episode, whose frames are already resized
memory   resident set over the run, of each stream in a separate process
start    seconds from `Loader` to the first batch, at the first step and a million steps later, each in a new process
overlap  how long a consumer waits if its step takes a little longer than decoding its batch; writes a trace

Ends with one line of JSON. Needs Linux; the data should fit into the page cache.
"""

import argparse
import gc
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from spatialvla_jax.cli.arguments import Parser, positive, state_defaults

IMAGE_SIZE, CHUNK, PROMPT_LENGTH = 224, 4, 32
# Height, width and JPEG quality of the stored frames, dataset by dataset in turn: 47 and 32 KB each.
SIZES = ((480, 640, 75), (256, 256, 95))
EPISODE_STEPS = (50, 150)
SETTLED = 0.05  # share of a core that a process uses once its queues are full
READERS = 1  # per dataset in the buffered stream
DIFFERENT_FRAMES = 512  # frames that the ceiling decodes repeatedly
DEEP_STEP = 1_000_000


def main() -> None:
    parser = Parser(prog="spatialvla-jax bench loader", description=__doc__)
    parts = ("speed", "packed", "memory", "start", "overlap")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument(
        "--root", type=Path, default=Path("runs/bench_loader"), help="folder of the data, created if missing"
    )
    parser.add_argument("--datasets", type=positive, default=28)
    parser.add_argument("--frames", type=positive, default=2000, help="distinct frames per dataset")
    parser.add_argument("--copies", type=positive, default=8, help="factor by which hard links enlarge each dataset")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--workers", type=positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=positive, default=5, help="repeats of the speed part")
    parser.add_argument("--repeat-samples", type=positive, default=1536)
    parser.add_argument("--samples", type=positive, default=300_000, help="samples of the memory part")
    parser.add_argument("--read-block", type=positive, nargs="+", default=(1, 16), help="memory part: one run for each")
    parser.add_argument("--shuffle-frames", type=positive, default=100_000)
    parser.add_argument("--memory-gb", type=float, default=8.0)
    parser.add_argument("--buffered-samples", type=positive, default=6000, help="the same for the buffered stream")
    parser.add_argument("--buffer", type=positive, default=1024, help="frames in its shuffle buffer")
    parser.add_argument("--overlap-steps", type=positive, default=60)
    parser.add_argument("--chip-rate", type=float, default=30.0, help="samples/s that one chip consumes")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    state_defaults(parser)
    args = parser.parse_args()

    result: dict[str, Any] = {"benchmark": "loader"} | environment(args)
    print("environment: " + ", ".join(f"{k} {v}" for k, v in result.items() if k != "benchmark"))
    began = time.perf_counter()
    datasets = make_data(args)
    data = {
        "datasets": datasets,
        "cache_dir": str(args.root / "index"),
        "workers": args.workers,
        "memory_gb": args.memory_gb,
        "shuffle_frames": args.shuffle_frames,
        "prompt": {"length": PROMPT_LENGTH, "vocab_size": 256},
    }
    frames = load(data, progress=True).num_frames()
    print(f"{len(datasets)} datasets, {frames:,} frames, made and indexed in {time.perf_counter() - began:.0f} s")
    result |= {"datasets": len(datasets), "frames": frames}

    if "memory" in args.parts:  # first, before the other parts take memory
        result["memory"] = measure_memory(data, args)
    if "start" in args.parts:
        result["start"] = measure_start(data, args)
    if "speed" in args.parts:
        result["speed"] = measure_speed(data, args)
    if "packed" in args.parts:
        result["packed"] = measure_packed(data, args)
    if "overlap" in args.parts:
        result["overlap"] = measure_overlap(data, args)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def environment(args: argparse.Namespace) -> dict[str, Any]:
    packages = {package.metadata["name"]: package.version for package in distributions()}
    return {
        "python": platform.python_version(),
        "tensorflow": packages.get("tensorflow_cpu") or packages["tensorflow"],
        "numpy": np.__version__,
        "cpu": cpu_name(),
        "cores": args.workers,
        "load": round(os.getloadavg()[0], 2),
        "batch_size": args.batch_size,
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# ---- the data


def make_data(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Entries of data.datasets; missing datasets are created deterministically."""
    from spatialvla_jax.data.oxe.mixtures import MIXTURES

    root = args.root / f"{args.frames}x{args.copies}"
    named = MIXTURES["oxe_spatial_vla_plus"][: args.datasets]
    missing = [(number, root / name) for number, (name, _) in enumerate(named) if not (root / name).is_dir()]
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(make_dataset, path, number, args.frames, args.copies) for number, path in missing]
        for job in tqdm(jobs, "make", unit="dataset", disable=not jobs):
            job.result()
    spec = {"image": "observation/image"}
    return [
        {"name": name, "path": str(root / name / "1.0.0"), "spec": spec, "weight": weight} for name, weight in named
    ]


def make_dataset(directory: Path, seed: int, frames: int, copies: int) -> None:
    """Write a dataset of `frames` frames, and enlarge it `copies` times by hard links to its shards."""
    from spatialvla_jax.data.importers.tf_dataset import write_rlds

    work = directory.with_name(f".{directory.name}.{os.getpid()}") / directory.name
    try:
        version, *_ = write_rlds({"train": make_trajectories(seed, frames)}, work)
        info = json.loads((version / "dataset_info.json").read_text())
        (split,) = info["splits"]
        shards = sorted(version.glob("*.tfrecord-*"))  # NAME-train.tfrecord-00000 and so on
        for number, shard in enumerate(shards * copies):
            if number >= len(shards):
                os.link(shard, f"{os.fspath(shard)[:-5]}{number:05}")
        split["shardLengths"] *= copies
        split["numBytes"] = str(int(split["numBytes"]) * copies)
        (version / "dataset_info.json").write_text(json.dumps(info))
        work.rename(directory)
    finally:
        shutil.rmtree(work.parent)


def make_trajectories(seed: int, frames: int) -> Iterator[dict[str, Any]]:
    """Episodes of `frames` frames in total: a camera moves over a smooth texture with sensor noise."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    height, width, quality = SIZES[seed % len(SIZES)]
    margin = 128
    size = (width + margin, height + margin)
    scene = np.full((*size[::-1], 3), 128, np.float32)
    for scale, contrast in ((4, 10), (16, 25), (64, 50)):
        for channel in range(3):
            coarse = rng.normal(0, contrast, (size[1] // scale + 1, size[0] // scale + 1)).astype(np.float32)
            scene[..., channel] += np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    scene = (scene + rng.normal(0, 4, (*scene.shape[:2], 1))).clip(0, 255).astype(np.uint8)
    number = 0
    while number < frames:
        length = min(int(rng.integers(EPISODE_STEPS[0], EPISODE_STEPS[1] + 1)), frames - number)
        images = []
        for place in range(number, number + length):
            y, x = place // margin % margin, place % margin
            file = io.BytesIO()
            Image.fromarray(scene[y : y + height, x : x + width]).save(file, "JPEG", quality=quality)
            images.append(file.getvalue())
        action = np.append(rng.uniform(-1, 1, (length, 6)), rng.random((length, 1)) < 0.5, axis=1)
        yield {
            "observation": {"image": np.asarray(images, object)},
            "action": action.astype(np.float32),
            "language_instruction": np.full(length, f"move object {rng.integers(20)} of scene {seed}".encode(), object),
        }
        number += length


def load(data: dict[str, Any], progress: bool = False) -> Any:
    from spatialvla_jax.data import Loader

    with tqdm(unit="shard", desc="index", disable=not progress) as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.update()

        return Loader(data, image_size=IMAGE_SIZE, action_chunk=CHUNK, progress=show)


# ---- the streams


def encoded_frames(loader: Any, count: int) -> list[bytes]:
    """The first `count` encoded frames of the mixture."""
    from spatialvla_jax.data import mixture

    frames = []
    datasets, places = mixture.sample_frames(loader.mixture, 0, np.arange(count))
    for dataset, place in zip(datasets.tolist(), places.tolist(), strict=True):
        index = loader.indexes()[dataset]
        offset, length, _ = index.spans("image", place).tolist()
        with open(index.files[index.arrays["episode_file"][index.episode(place)]], "rb") as file:
            file.seek(offset)
            frames.append(file.read(length))
    return frames


def bare_decoding(frames: list[bytes], workers: int) -> Callable[[int], None]:
    """A function that decodes and resizes so many of `frames` and discards the results."""
    from spatialvla_jax.data.images import tensorflow

    tf = tensorflow()
    stored = tf.constant(frames)

    def decode(number: Any) -> Any:
        image = tf.io.decode_jpeg(stored[number % len(frames)], channels=3)
        resized = tf.image.resize(image, (IMAGE_SIZE, IMAGE_SIZE), method="lanczos3", antialias=True)
        return tf.cast(resized, tf.uint8)

    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = workers
    options.threading.max_intra_op_parallelism = 1

    def run(count: int) -> None:
        dataset = tf.data.Dataset.range(count).map(decode, num_parallel_calls=workers, deterministic=False)
        dataset.with_options(options).reduce(
            np.int64(0), lambda total, image: total + tf.cast(image[0, 0, 0], tf.int64)
        )

    return run


def buffered_stream(loader: Any, data: dict[str, Any], batch_size: int, buffer: int, colour: bool) -> Iterator[Any]:
    """Batches of an Octo-style pipeline: one reader per dataset, trajectories split into frames, mixed by sampling,
    shuffled in a buffer of encoded frames, decoded and colour-augmented; tf.data tunes itself."""
    from spatialvla_jax.data.images import decode_image, tensorflow

    tf = tensorflow()
    import tensorflow_datasets as tfds

    auto = tf.data.AUTOTUNE

    def frames(entry: dict[str, Any]) -> Any:
        builder: Any = tfds.builder_from_directory(entry["path"])
        bounds = loader.statistics[entry["name"]]["action"]
        low, high = (tf.constant(bounds[key], tf.float32) for key in ("q01", "q99"))

        def chunk(episode: dict[str, Any]) -> dict[str, Any]:
            steps = episode["steps"]
            length = tf.shape(steps["action"])[0]
            actions = tf.clip_by_value(2 * (steps["action"] - low) / (high - low + 1e-8) - 1, -1, 1)
            places = tf.range(length)[:, None] + tf.range(CHUNK)
            return {
                "image": steps["observation"]["image"],
                "language": steps["language_instruction"],
                "actions": tf.gather(actions, tf.minimum(places, length - 1)),
                "action_mask": places < length,
            }

        # By default TFDS reads 16 episodes each from 16 files per dataset, which takes more than 19 GB.
        readers = {"num_parallel_calls_for_interleave_files": READERS, "num_parallel_calls_for_decode": READERS}
        config = tfds.ReadConfig(
            interleave_cycle_length=READERS, interleave_block_length=1, skip_prefetch=True, **readers
        )
        decoders = {"steps": tfds.decode.SkipDecoding()}
        episodes = builder.as_dataset(split="train", shuffle_files=True, decoders=decoders, read_config=config)
        return episodes.repeat().map(chunk, num_parallel_calls=READERS).unbatch()

    def decode(frame: dict[str, Any]) -> dict[str, Any]:
        image, _ = decode_image(frame["image"], IMAGE_SIZE)
        if colour:
            image = tf.image.random_brightness(tf.image.convert_image_dtype(image, tf.float32), 0.2)
            image = tf.image.random_saturation(tf.image.random_contrast(image, 0.8, 1.2), 0.8, 1.2)
            image = tf.image.convert_image_dtype(tf.image.random_hue(image, 0.05), tf.uint8, saturate=True)
        return frame | {"image": image}

    streams = [frames(entry) for entry in data["datasets"]]
    mixed = tf.data.Dataset.sample_from_datasets(streams, list(loader.mixture.shares), seed=0).shuffle(buffer, seed=0)
    batches = mixed.map(decode, num_parallel_calls=auto).batch(batch_size).prefetch(2)
    options = tf.data.Options()
    options.autotune.ram_budget = 2**30
    return batches.with_options(options).as_numpy_iterator()


# ---- speed


def measure_speed(data: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    loader, size = load(data), args.batch_size

    def taker(batches: Iterator[Any]) -> Callable[[int], None]:
        def take(count: int) -> None:
            for _ in range(-(-count // size)):
                next(batches)

        return take

    streams = {
        "ceiling": bare_decoding(encoded_frames(loader, DIFFERENT_FRAMES), args.workers),
        "loader": taker(loader.batches(size)),
        "buffered": taker(buffered_stream(loader, data, size, args.buffer, False)),
        "buffered_colour": taker(buffered_stream(loader, data, size, args.buffer, True)),
    }
    # Samples already in a stream's queues cost nothing when its turn comes, so they are taken first.
    queued = 16 * size
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in streams}
    for repeat in range(args.repeats):
        for name, take in streams.items():
            settle()
            take(queued)
            wall, cpu = time.perf_counter(), time.process_time()
            take(args.repeat_samples)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            rates[name].append((args.repeat_samples / wall, args.repeat_samples / cpu))
        print(f"repeat {repeat + 1}: " + ", ".join(f"{name} {own[-1][0]:.0f}/s" for name, own in rates.items()))

    result: dict[str, Any] = {}
    print(f"\n{'samples/s':16}{'wall':>8}{'a core':>8}{'ceiling':>9}{'CPU second':>12}{'ceiling':>9}")
    for name, own in rates.items():
        # Ratios within a repeat, since other load on the machine slows both.
        ratios = [(w / top_w, c / top_c) for (w, c), (top_w, top_c) in zip(own, rates["ceiling"], strict=True)]
        wall, cpu = (statistics.median(column) for column in zip(*own, strict=True))
        of_wall, of_cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
        print(f"{name:16}{wall:8.0f}{wall / args.workers:8.0f}{of_wall:9.1%}{cpu:12.0f}{of_cpu:9.1%}")
        result[name] = {
            "samples_per_second": round(wall, 1),
            "samples_per_second_range": [round(f(own)[0], 1) for f in (min, max)],
            "per_core": round(wall / args.workers, 1),
            "of_ceiling": round(of_wall, 4),
            "per_cpu_second": round(cpu, 1),
            "of_ceiling_cpu": round(of_cpu, 4),
        }
    per_core = result["loader"]["per_core"]
    result["chip_rate"] = args.chip_rate
    result["cores_per_host"] = {chips: round(chips * args.chip_rate / per_core, 1) for chips in (4, 8)}
    for chips, cores in result["cores_per_host"].items():
        print(
            f"a host of {chips} chips that train on {args.chip_rate:g} samples/s each needs {cores:.1f} cores to decode"
        )
    return result


def settle() -> None:
    """Wait until the queues of all streams are full and the process is idle."""
    gc.collect()
    used = 1.0
    while used > SETTLED:
        before = time.process_time()
        time.sleep(0.25)
        used = (time.process_time() - before) / 0.25


def measure_packed(data: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    from spatialvla_jax.data.pack import write_pack

    file, split = args.root / f"{args.frames}x{args.copies}.pack", "train[:1]"
    if not file.exists():
        write_pack(load(data | {"split": split}), file, [split])
    loader = load({"packed": str(file), "split": split, "prompt": data["prompt"]})
    batches, steps, rates = loader.batches(args.batch_size), -(-10 * args.repeat_samples // args.batch_size), []
    for _ in range(args.repeats + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            next(batches)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rates.append((steps * args.batch_size / wall, steps * args.batch_size / cpu))
    walls, cpus = zip(*rates[1:], strict=True)  # the first one loads the file into the page cache
    print(f"packed: {statistics.median(walls):.0f} samples/s, {statistics.median(cpus):.0f} a CPU second")
    return {
        "frames": loader.num_frames(),
        "samples_per_second": round(statistics.median(walls), 1),
        "per_cpu_second": round(statistics.median(cpus), 1),
        "per_cpu_second_range": [round(min(cpus), 1), round(max(cpus), 1)],
    }


# ---- memory


def measure_memory(data: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    runs = [(f"loader, blocks of {block}", args.samples, block) for block in args.read_block]
    runs.append((f"buffered, {args.buffer} frames", args.buffered_samples, None))
    results = []
    percents = (20, 40, 60, 80, 100)
    print(f"resident set, MB{'at':>22}" + "".join(f"{percent:7}%" for percent in percents) + "  growth    most")
    for name, samples, block in runs:
        memory, rate = in_new_process(stream_memory, name, data, samples, block, args)
        at = {percent: memory[percent] for percent in percents}
        growth, most = at[100] / at[20] - 1, max(memory)
        budget = f" of {1024 * args.memory_gb:.0f}" if block else ""
        print(f"{name:22}{samples:>9,} samples " + "".join(f"{mb:8.0f}" for mb in at.values()), end="")
        print(f"{growth:8.1%}{most:8.0f}{budget}")
        results.append(
            {"stream": name, "samples": samples, "rss_mb": at, "growth": round(growth, 4), "peak_mb": most}
            | {"budget_mb": 1024 * args.memory_gb if block else None, "samples_per_second": round(rate, 1)}
        )
    return results


def stream_memory(
    name: str, data: dict[str, Any], samples: int, block: int | None, args: argparse.Namespace
) -> tuple[list[float], float]:
    """Resident set in MB before the first batch and after each percent of `samples`, and samples/s."""
    loader = load(data | {"read_block": block or 1})
    if block is None:
        batches = buffered_stream(loader, data, args.batch_size, args.buffer, colour=True)
    else:
        batches = loader.batches(args.batch_size)
    memory, steps = [resident()], -(-samples // args.batch_size)
    began = time.perf_counter()
    for step in tqdm(range(steps), name, unit_scale=args.batch_size, unit="sample", mininterval=5):
        next(batches)
        memory.extend([resident()] * (100 * (step + 1) // steps + 1 - len(memory)))
    return memory, samples / (time.perf_counter() - began)


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


# ---- start


def measure_start(data: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    steps = {"first_step": 0, "deep_step": DEEP_STEP}
    result = {name: round(in_new_process(start, data, step, args.batch_size), 2) for name, step in steps.items()}
    result["deep_step_number"] = DEEP_STEP
    print(f"from Loader to the first batch: {result['first_step']} s; {result['deep_step']} s at step {DEEP_STEP:,}")
    return result


def start(data: dict[str, Any], step: int, batch_size: int) -> float:
    began = time.perf_counter()
    next(load(data).batches(batch_size, start_step=step))
    return time.perf_counter() - began


# ---- overlap


def measure_overlap(data: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Simulate an accelerator: each step sleeps a third longer than decoding a batch takes."""
    batches = load(data).batches(args.batch_size)
    next(batches)
    began = time.perf_counter()
    for _ in range(16):
        next(batches)
    decoding = (time.perf_counter() - began) / 16
    seconds = 4 / 3 * decoding
    time.sleep(seconds)
    events, waits, began = [], [], time.perf_counter()
    for number in range(args.overlap_steps):
        clock, cpu = time.perf_counter(), time.process_time()
        next(batches)
        ready = time.perf_counter()
        time.sleep(seconds)
        done = time.perf_counter()
        waits.append(ready - clock)
        busy = (time.process_time() - cpu) / (done - clock)
        events += [
            {"name": "wait for data", "ph": "X", "ts": 1e6 * (clock - began), "dur": 1e6 * (ready - clock)},
            {"name": f"step {number}", "ph": "X", "ts": 1e6 * (ready - began), "dur": 1e6 * (done - ready)},
            {"name": "cores that decode", "ph": "C", "ts": 1e6 * (clock - began), "args": {"cores": round(busy, 2)}},
        ]
    trace = args.root / "overlap.json"
    trace.write_text(json.dumps({"traceEvents": [{"pid": 0, "tid": 0} | event for event in events]}))
    median, high, most = (1e3 * float(np.quantile(waits, q)) for q in (0.5, 0.95, 1))
    print(f"{1e3 * decoding:.0f} ms to decode a batch, steps of {1e3 * seconds:.0f} ms:", end=" ")
    print(
        f"waits of {median:.1f} ms (median), {high:.1f} (95 %), {most:.1f} (longest); wrote {trace}: chrome://tracing"
    )
    return {
        "decode_ms": round(1e3 * decoding, 1),
        "step_ms": round(1e3 * seconds, 1),
        "wait_ms_median": round(median, 2),
        "wait_ms_95": round(high, 2),
        "wait_ms_max": round(most, 2),
        "waited": round(sum(waits) / (sum(waits) + seconds * args.overlap_steps), 5),
        "trace": str(trace),
    }


if __name__ == "__main__":
    main()
