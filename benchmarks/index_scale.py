"""Index of a mixture as large as the published one: start-up time, memory, sampling speed and exact weights.

    python benchmarks/index_scale.py --dir /tmp/index_scale [--latency 50] [--bandwidth 200] [--out index_scale.json]

Creates the datasets once: empty shards, and indexes of random actions and offsets, built by the package's own code.
Then runs each of these phases `--repeats` times, in a separate process:

cold     seconds of `Loader` after imports, of wall and CPU time, on a host without indexes, which are fetched from a
         bucket: a server on loopback (`--latency` ms per request, `--bandwidth` MB/s in total)
warm     the same on that host, now with indexes
draws    samples per second of CPU time, in batches of 2,048 and of 16,384: choosing dataset and frame, and locating its
         bytes (`sample_frames` and `Index.spans`), releasing the index's pages as the loader does; resident memory
weights  how often each dataset occurs in whole blocks of the sequence, compared with its weight

Ends with one line of JSON.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests"))

# Episodes and frames of each dataset, all splits together, as counted in the statistics published with OpenVLA
# (openvla/openvla-7b, config.json) and, for RH20T, with the release (SpatialVLA, processor_config.json). How they
# compare with other public sources:
SIZES = {
    # Equal to the sizes of `train` in bdaiinstitute/theia (src/theia/dataset/oxe/oxe_common.py); these datasets have no
    # other split.
    "fractal20220817_data": (87_212, 3_786_400),
    "language_table": (442_226, 7_045_476),
    "stanford_hydra_dataset_converted_externally_to_rlds": (570, 358_234),
    "austin_buds_dataset_converted_externally_to_rlds": (50, 34_112),
    "furniture_bench_dataset_converted_externally_to_rlds": (5_100, 3_948_057),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": (150, 3_970),
    "austin_sailor_dataset_converted_externally_to_rlds": (240, 353_094),
    "austin_sirius_dataset_converted_externally_to_rlds": (559, 279_939),
    "dlr_edan_shared_control_converted_externally_to_rlds": (104, 8_928),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": (631, 146_241),
    "utaustin_mutex": (1_500, 361_883),
    "berkeley_fanuc_manipulation": (415, 62_613),
    "cmu_stretch": (135, 25_016),
    # Confirmed only by copies of OpenVLA's statistics.
    "bridge_orig": (60_064, 2_135_463),
    "droid": (92_233, 27_044_326),
    # Episodes: the sum over splits in the datasets' dataset_info.json, as listed in felixmin/high-level-robot-planner
    # (docs/openx_local_dataset_inventory.md). Frames: theia has those of `train`, given in the comments; no source was
    # found for the other split, whose mean episode length agrees within 22 %.
    "taco_play": (3_603, 237_798),  # 213,972
    "jaco_play": (1_085, 77_965),  # 70,127
    "berkeley_cable_routing": (1_647, 42_328),  # 38,240
    "roboturk": (1_995, 187_507),  # 168,423
    "viola": (150, 76_324),  # 68,913
    "berkeley_autolab_ur5": (1_000, 97_939),  # 87,783
    "toto": (1_003, 325_699),  # 294,139
    "nyu_franka_play_dataset_converted_externally_to_rlds": (456, 44_875),  # 34,448
    "bc_z": (43_264, 6_015_535),  # 5,471,693
    # Episodes: the same list, which has one fewer for fmb. No source was found for the frames.
    "dobbe": (5_208, 1_139_911),
    "fmb_dataset": (8_612, 1_137_459),
    # The successful ones of 580,392 episodes (8,583,978 frames in theia's table). No source was found for their number.
    "kuka": (209_880, 2_455_879),
    # No source was found.
    "rh20t_rlds": (104_392, 52_644_433),
}
INSTRUCTIONS = 127_605  # at most this many distinct ones per dataset, the number in language_table
FRAMES_A_SHARD, SHARDS = 5_000, 2_048
MOST_BYTES = 45_000  # largest encoded image
BATCHES = (2_048, 16_384)  # batch size of the published run, and eight times that
PHASES = ("cold", "warm", "draws", "weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/index_scale"), help="folder of data and indexes, which is kept"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of episodes and frames")
    parser.add_argument("--latency", type=float, default=50, help="milliseconds per request")
    parser.add_argument("--bandwidth", type=float, default=200, help="MB/s of the server")
    parser.add_argument("--draws", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dir = args.dir.absolute()
    if args.phase:
        print(json.dumps(globals()[args.phase](args)))
        return
    made = make(args)
    from helpers.range_server import range_server

    found: dict[str, list[dict[str, Any]]] = {phase: [] for phase in PHASES}
    with range_server(args.dir / "buckets", latency_ms=args.latency, bandwidth_mb=args.bandwidth) as server:
        environment = os.environ | server.environment | {"HOME": str(args.dir / "host")}
        for _ in range(args.repeats):
            subprocess.run(["rm", "-rf", args.dir / "host"], check=True)  # made by this program
            for phase in PHASES:
                before = server.counts()
                command = [sys.executable, __file__, *sys.argv[1:], "--phase", phase]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                result = json.loads(done.stdout.splitlines()[-1]) | {"load": round(os.getloadavg()[0], 2)}
                after = server.counts()
                for key in ("requests", "bytes_read", "cpu_seconds"):
                    result[f"server_{key}"] = after.get(key, 0) - before.get(key, 0)
                found[phase].append(result)
                print(phase, result, file=sys.stderr)
    about = {"host": platform.node(), "cores": os.cpu_count(), "python": platform.python_version()}
    about |= {"numpy": np.__version__, "latency_ms": args.latency, "bandwidth_mb": args.bandwidth}
    if args.out:
        args.out.write_text(json.dumps(about | made | found, indent=2) + "\n")
    print(json.dumps(about | made | found))


# ---- the data


def make(args: argparse.Namespace) -> dict[str, Any]:
    """Create missing datasets and indexes; returns their sizes."""
    from tqdm import tqdm

    from spatialvla_jax.data.index_cache import find_source, load_indexes
    from spatialvla_jax.data.oxe import DatasetSpec
    from spatialvla_jax.utils.storage import as_path

    before, start = peak_gb(), time.monotonic()
    arrays = 0
    for number, (name, (episodes, frames)) in enumerate(tqdm(SIZES.items(), "indexes")):
        episodes, frames = max(1, round(episodes * args.scale)), max(1, round(frames * args.scale))
        folder = args.dir / "data" / name / "1.0.0"
        lengths = 1 + np.random.default_rng(number).multinomial(frames - episodes, np.full(episodes, 1 / episodes))
        write_dataset(folder, name, lengths)
        source = find_source(name, folder, DatasetSpec(), "train")
        read = partial(random_part, number=number, lengths=lengths)
        (index,) = load_indexes([source], as_path(args.dir / "buckets" / "bucket" / "index", ""), read=read)
        arrays += sum(array.nbytes for array in index.arrays.values())
        total = sum(episodes for episodes, _ in SIZES.values()), sum(frames for _, frames in SIZES.values())
    return {
        "datasets": len(SIZES),
        "episodes": total[0],
        "frames": total[1],
        "index_bytes": arrays,
        "bytes_a_frame": arrays / total[1] / args.scale,
        "make_seconds": time.monotonic() - start,
        "make_peak_gb": peak_gb() - before,
    }


def write_dataset(folder: Path, name: str, lengths: np.ndarray) -> None:
    """Write a dataset in the layout of TFDS, with empty files for shards."""
    import tensorflow_datasets as tfds

    if (folder / "dataset_info.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    steps = {
        "observation": {"image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")},
        "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": tfds.features.Text(),
    }
    tfds.features.FeaturesDict({"steps": tfds.features.Dataset(steps)}).save_config(str(folder))
    count = min(SHARDS, len(lengths), -(-int(lengths.sum()) // FRAMES_A_SHARD))
    shards = [len(part) for part in np.array_split(lengths, count)]
    for number in range(count):
        with open(folder / f"{name}-train.tfrecord-{number:05d}-of-{count:05d}", "wb") as file:
            file.truncate(2 * int(lengths.sum()) * MOST_BYTES // count)  # sparse; larger than any shard
    split = {"name": "train", "shardLengths": [str(n) for n in shards], "numBytes": "0"}
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {
        "name": name,
        "version": "1.0.0",
        "fileFormat": "tfrecord",
        "splits": [split | {"filepathTemplate": template}],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


def random_part(source: Any, shard: int, *, number: int, lengths: np.ndarray) -> bytes:
    """A random index part, in the format of `read_shard`."""
    from spatialvla_jax.data.index_parts import Part

    rng = np.random.default_rng((number, shard))
    first = sum(len(one.numbers) for one in source.shards[:shard])
    own = lengths[first : first + len(source.shards[shard].numbers)]
    ends, frames = np.cumsum(own), int(own.sum())
    sizes = rng.integers(15_000, MOST_BYTES, frames, np.uint32)
    places = np.cumsum(sizes, dtype=np.int64) - sizes
    starts = np.repeat(places[ends - own], own)
    records = np.stack([places[ends - own], np.add.reduceat(sizes.astype(np.int64), ends - own), 0 * ends], 1)
    words = rng.integers(0, min(INSTRUCTIONS, max(1, len(lengths) // 4)), len(own))
    different, language = np.unique(words, return_inverse=True)
    arrays = {
        "action": rng.standard_normal((frames, 7), np.float32) / 10,
        "image": np.stack([places - starts, sizes, rng.integers(0, 2**32, frames, np.uint32)], 1).astype(np.uint32),
        "language": language.astype(np.int32),
        "language_end": ends,
        "step": -(ends - own),
        "step_end": ends,
        "episode_end": ends,
        "episode_file": np.full(len(own), shard, np.int32),
        "episode_number": np.asarray(source.shards[shard].numbers, np.int32),
        "episode_record": records,
    }
    return Part(arrays, tuple(f"move the object {word} to place {word % 97}" for word in different)).to_bytes()


# ---- the measurements, each in a separate process


def config(args: argparse.Namespace) -> dict[str, Any]:
    from spatialvla_jax.data.oxe.mixtures import MIXTURES

    names = dict(MIXTURES["oxe_spatial_vla_plus"])
    entries = [
        {"name": name, "path": str(args.dir / "data" / name / "1.0.0"), "spec": {}, "weight": names[name]}
        for name in SIZES
    ]
    return {"datasets": entries, "cache_dir": "gs://bucket/index", "prompt": {"length": 64}}


def load(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    start = time.monotonic()
    from spatialvla_jax.data import Loader
    from spatialvla_jax.data.images import tensorflow
    from spatialvla_jax.text import train_tokenizer

    tensorflow()
    tokenizer = train_tokenizer({f"move the object {word} to place {word % 97}" for word in range(999)}, 256)
    imported, used = time.monotonic(), time.process_time()
    loader = Loader(config(args), image_size=224, tokenizer=tokenizer)
    result = {"seconds": time.monotonic() - imported, "processor_seconds": time.process_time() - used}
    return loader, result | {"imports_seconds": imported - start, "peak_gb": peak_gb()}


def cold(args: argparse.Namespace) -> dict[str, Any]:
    return load(args)[1]


warm = cold


def draws(args: argparse.Namespace) -> dict[str, Any]:
    from spatialvla_jax.data.mixture import sample_frames

    loader, _ = load(args)
    indexes, resident, rates = loader.indexes(), [resident_gb()], {}
    for batch in BATCHES:
        started, checked = time.process_time(), 0
        for first in range(0, args.draws, batch):
            dataset, frame = sample_frames(loader.mixture, 0, np.arange(first, first + batch))
            for number in np.unique(dataset):
                checked += int(indexes[number].spans("image", frame[dataset == number])[:, 1].sum())
            if first // (args.draws // 10) != (first - batch) // (args.draws // 10):
                resident.append(resident_gb())
            for index in indexes:
                index.release()
        rates[batch] = args.draws / (time.process_time() - started)
    return {"draws_per_cpu_second": rates, "resident_gb": resident, "memory_gb": loader.config.memory_gb}


def weights(args: argparse.Namespace) -> dict[str, Any]:
    from spatialvla_jax.data.mixture import BLOCK, sample_frames

    loader, _ = load(args)
    blocks = 16
    dataset, _ = sample_frames(loader.mixture, 0, np.arange(blocks * BLOCK))
    counts = np.bincount(dataset, minlength=len(loader.names))
    assert (counts == blocks * np.asarray(loader.mixture.counts)).all(), "a block has other counts"
    meant = np.asarray(loader.weights) * [index.num_frames for index in loader.indexes()]
    error = np.abs(counts / counts.sum() - meant / meant.sum()).max()
    return {"samples": blocks * BLOCK, "largest_error_of_a_share": error, "one_slot": 1 / BLOCK}


def peak_gb() -> float:
    """Of this program; `getrusage` would include the process that it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def resident_gb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


if __name__ == "__main__":
    main()
