"""Commands that show, convert, pack and measure datasets: `data …` and `stats`."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spatialvla_jax.cli.arguments import (
    Commands,
    add_command,
    add_group,
    add_output,
    at_most,
    count,
    local_path,
    path,
    positive,
)
from spatialvla_jax.errors import Fault, InputError
from spatialvla_jax.utils.outputs import OutputFile, OutputFolder, begins_with, has_keys, is_report

DATASET = OutputFolder(names=())  # importers check the version directories inside


def add_show(commands: Commands) -> None:
    p = add_command(
        commands,
        "show",
        run_show,
        "write an HTML page that shows a mixture: frames, instructions, actions, weights",
        ("--config demo --out mixture.html",),
    )
    p.add_argument("--config", required=True, help="names the data")
    add_output(p, "--out", OutputFile(is_report), required=True, help="the page, e.g. mixture.html")
    p.add_argument("--seed", type=count, default=0, help="selects the episodes shown")


def run_show(args: argparse.Namespace) -> None:
    from spatialvla_jax.config import load_config
    from spatialvla_jax.data import Loader
    from spatialvla_jax.models.presets import preset
    from spatialvla_jax.reports.mixture import IMAGE_SIZE, write_page
    from spatialvla_jax.training.loop import make_processor
    from spatialvla_jax.utils.progress import progress_bar, shard_progress

    config: Any = load_config(args.config, args.overrides)
    size = (
        preset(config.model.preset, config.model.image_size).img.image_size if config.data.get("packed") else IMAGE_SIZE
    )
    loader = Loader(config.data, image_size=size, progress=shard_progress())
    grid = make_processor(config, loader).grid
    with progress_bar("show", "dataset") as progress:
        write_page(args.out, loader, grid, title=Path(args.config).stem, seed=args.seed, progress=progress)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB): open it in a browser")


def add_lerobot(commands: Commands) -> None:
    p = add_command(
        commands,
        "lerobot",
        run_lerobot,
        "convert a LeRobot dataset (v2.0, v2.1, v3.0) to RLDS (extra [lerobot])",
        ("lerobot/pusht data/pusht", "lerobot/aloha data/aloha --camera observation.images.top --faults skip"),
    )
    p.add_argument("src", type=local_path, help="directory that holds meta/info.json")
    add_output(p, "dst", DATASET, type=local_path, help="dataset directory, to hold version 1.0.0")
    p.add_argument("--camera", help="e.g. observation.images.top; by default the only one")
    p.add_argument("--name", help="name of the dataset; by default that of DST")
    add_faults(p)


def run_lerobot(args: argparse.Namespace) -> None:
    from spatialvla_jax.data.importers.lerobot import convert_lerobot
    from spatialvla_jax.data.importers.lerobot_tables import JPEG_QUALITY
    from spatialvla_jax.utils.progress import progress_bar

    with progress_bar("convert", "episode") as progress:
        made = convert_lerobot(
            args.src, args.dst, camera=args.camera, name=args.name, faults=args.faults, progress=progress
        )
    source = made.source
    width = "x".join(map(str, source.shapes["action"]))
    print(f"actions are {width} wide, {source.names}: the spec in your config says what they mean")
    print(f"frames of {source.camera}; those of videos are stored as JPEG of quality {JPEG_QUALITY}")
    if made.changed:
        print(f"shards of the interrupted conversion made again, because their source has changed: {made.changed}")
    print_skipped(made.skipped)
    for split, episodes in made.splits.items():
        print(f"{split}: {len(episodes):,} episodes, {sum(episode.length for episode in episodes):,} frames")
    print(f"wrote {made.directory}")


def add_import(commands: Commands) -> None:
    p = add_command(
        commands,
        "import",
        run_import,
        "store any tf.data.Dataset of trajectories as an RLDS dataset",
        ("--from my_data:trajectories --out data/mine",),
    )
    p.add_argument(
        "--from",
        dest="function",
        required=True,
        metavar="MODULE:FUNCTION",
        help="returns a dataset (the split train), or {split: dataset}",
    )
    add_output(p, "--out", DATASET, type=local_path, required=True, help="dataset directory, to hold version 1.0.0")
    add_faults(p)


def run_import(args: argparse.Namespace) -> None:
    from spatialvla_jax.data.importers.tf_dataset import PipelineError, their_traceback, trajectories_of, write_rlds
    from spatialvla_jax.utils.progress import progress_bar

    sys.path.insert(0, "")  # so that a module of the working directory is found
    try:
        with progress_bar("import", "trajectory") as show:

            def progress(split: str, done: int, total: int | None) -> None:
                show(done, total, desc=f"import {split}")

            data = trajectories_of(args.function)
            directory, stored, skipped = write_rlds(data, args.out, faults=args.faults, progress=progress)
    except PipelineError as error:
        print(their_traceback(error), end="", file=sys.stderr)
        raise
    print_skipped(skipped)
    for key, kind in stored.items():
        print(f"{key}: {kind}")
    print(f"wrote {directory}")


def add_faults(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--faults",
        choices=("fail", "skip"),
        default="fail",
        help="whether a faulty episode ends the conversion (fail, the default) or is left out and counted (skip)",
    )


def print_skipped(faults: Sequence[Fault]) -> None:
    """Print how many episodes were left out and why, naming the first ten."""
    shown = 10
    if faults:
        counts = Counter(fault.reason for fault in faults)
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        print(f"episodes left out: {len(faults)} ({listed}); metadata.json beside the data names them:")
        print("\n".join(f"  {fault}" for fault in faults[:shown]))
        if len(faults) > shown:
            print(f"  and {len(faults) - shown} more")


def add_depth(commands: Commands) -> None:
    p = add_command(
        commands,
        "depth",
        run_depth,
        "store ZoeDepth's depth of every frame in copies of RLDS datasets",
        (
            "--config libero_spatial --checkpoint zoedepth --out data/with_depth",
            "data/mine/1.0.0 --spec libero --checkpoint zoedepth --image-size 224 --out data/with_depth",
        ),
    )
    p.add_argument(
        "src", type=local_path, nargs="?", help="a dataset's version directory; by default those of --config"
    )
    p.add_argument("--spec", help="catalogue entry that names the image of SRC; no default")
    p.add_argument("--config", help="names the datasets and the model's image size; by default SRC and --spec are used")
    p.add_argument("--checkpoint", type=path, required=True, help="a ZoeDepth, or any checkpoint that contains one")
    add_output(p, "--out", DATASET, type=local_path, required=True, help="the copies are made in OUT/NAME/VERSION")
    p.add_argument("--split", action="append", help="may be repeated; by default every split")
    p.add_argument("--image-size", type=positive, help="pixels a side; by default the config's or the checkpoint's")
    p.add_argument("--batch-size", type=at_most(4096), default=16, help="frames per call of ZoeDepth")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the computation")
    add_faults(p)


def run_depth(args: argparse.Namespace) -> None:
    from functools import partial

    import jax

    from spatialvla_jax.checkpoints.load import read_zoedepth
    from spatialvla_jax.config import load_config
    from spatialvla_jax.data import DataConfig
    from spatialvla_jax.data.importers.add_depth import MAX_DEPTH, add_depth
    from spatialvla_jax.data.oxe import CATALOGUE, make_spec
    from spatialvla_jax.data.resolve_datasets import make_entries
    from spatialvla_jax.inference.depth import depth_estimator
    from spatialvla_jax.models.presets import preset
    from spatialvla_jax.utils.progress import progress_bar

    if (args.src is None) == (args.config is None) or (args.src is None) != (args.spec is None):
        raise InputError("name the data either as SRC --spec NAME or by --config FILE")
    size = args.image_size
    if args.config is None:
        datasets = [(args.src, make_spec(args.spec, CATALOGUE, str(args.src)))]
    else:
        config = load_config(args.config, args.overrides)
        entries = make_entries(DataConfig.from_config(config.data))
        datasets = [(Path(entry.path), entry.spec) for entry in entries]
        size = size or preset(config.model.preset, config.model.image_size).img.image_size
    zoedepth, arrays, native_size = read_zoedepth(args.checkpoint)
    if not (size := size or native_size):
        raise InputError(
            f"{args.checkpoint} is only a ZoeDepth: --config or --image-size must give the model's image size"
        )
    if args.batch_size < 1 or args.batch_size % jax.device_count():
        raise InputError(f"the batch size {args.batch_size} does not divide among {jax.device_count()} devices")
    estimate, digest = depth_estimator(zoedepth, arrays, args.dtype)
    splits = args.split and tuple(args.split)
    options = {"image_size": size, "batch_size": args.batch_size, "splits": splits, "faults": args.faults}
    made_with = {"weights": digest, "dtype": args.dtype}
    with progress_bar("depth", "episode") as show:

        def progress(name: str, done: int, total: int) -> None:
            show(done, total, desc=f"depth of {name}")

        add = partial(add_depth, estimate=estimate, made_with=made_with, progress=progress, **options)
        results = [add(path, args.out, image=spec.image) for path, spec in datasets]
    for result in results:
        print_skipped(result["skipped"])
        if result["clipped"]:
            print(f"{result['clipped']} pixels were farther than {MAX_DEPTH} m and are stored as that")
        print(f"wrote {result['directory']}: {result['depth']} of {result['frames']} frames")
    print(f"to train on it: datasets in {args.out}, data.precomputed_depth=True, model.depth_source=dataset")


def add_pack(commands: Commands) -> None:
    p = add_command(
        commands,
        "pack",
        run_pack,
        "pack a small dataset into one file that trains without TensorFlow",
        ("--config demo --out demo.pack",),
    )
    p.add_argument("--config", required=True, help="names the datasets, the model's image size and source of depth")
    add_output(p, "--out", OutputFile(begins_with(b"SVLAPACK")), required=True, help="file to write, for data.packed")
    p.add_argument("--split", action="append", help="may be repeated; by default those of training and validation")
    p.add_argument("--image-size", type=positive, help="pixels a side; by default the config's")


def run_pack(args: argparse.Namespace) -> None:
    from spatialvla_jax.config import load_config
    from spatialvla_jax.data import open_data
    from spatialvla_jax.data.pack import write_pack
    from spatialvla_jax.utils.progress import progress_bar

    config = load_config(args.config, args.overrides)
    loader = open_data(config, image_size=args.image_size)
    splits = args.split or default_splits(config)
    with progress_bar("pack", "frame") as progress:
        result = write_pack(loader, args.out, splits, progress)
    frames = ", ".join(f"{count:,} frames of {split}" for split, count in result["frames"].items())
    print(f"wrote {result['path']}: {result['bytes']:,} bytes, {frames}")


def add_index(commands: Commands) -> None:
    p = add_command(
        commands,
        "index",
        run_index,
        "make the indexes of a mixture with Apache Beam (extra [beam])",
        (
            "--config pretrain --out data/index",
            "--config pretrain --out data/index -- --direct_num_workers=0 --direct_running_mode=multi_processing",
        ),
    )
    p.add_argument("--config", required=True, help="names the data")
    p.add_argument("--out", type=path, required=True, help="folder of the indexes, for data.cache_dir")
    p.add_argument("--split", action="append", help="may be repeated; by default those of training and validation")
    add_runner(p)


def run_index(args: argparse.Namespace) -> None:
    from spatialvla_jax.config import load_config
    from spatialvla_jax.data import DataConfig
    from spatialvla_jax.data.beam import index_table, make_indexes
    from spatialvla_jax.utils.progress import progress_bar

    config = load_config(args.config, args.overrides)
    splits = args.split or default_splits(config)
    with progress_bar("index", "shard") as progress:
        indexes = make_indexes(
            DataConfig.from_config(config.data), splits, args.out, args.runner, args.runner_options, progress
        )
    print(index_table(indexes))
    print(f"wrote {args.out}: set data.cache_dir to it")


def default_splits(config: Any) -> list[str]:
    """The splits that a run of this config reads."""
    validation = [config.train.eval_split] if config.train.eval_every else []
    return list(dict.fromkeys([config.data.split, *validation]))


def add_runner(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"Arguments after -- are passed to the runner.\n\n{parser.epilog}"
    runners = ("DirectRunner", "FlinkRunner", "DataflowRunner", "SparkRunner")
    parser.add_argument("--runner", choices=runners, default="DirectRunner", help="Beam's runner")


def add_stats(commands: Commands) -> None:
    p = add_command(
        commands,
        "stats",
        run_stats,
        "action statistics and grid Gaussians of a mixture, with Apache Beam (extra [beam])",
        (
            "--config demo --out stats.json",
            "--config pretrain --out stats.json -- --direct_num_workers=0 --direct_running_mode=multi_processing",
            "--config pretrain --out gs://bucket/stats.json --runner FlinkRunner -- --flink_master=localhost:8081",
        ),
    )
    p.add_argument("--config", required=True, help="names the data; indexes are kept in its data.cache_dir")
    made = OutputFile(has_keys("statistics", "gaussians"))
    add_output(p, "--out", made, required=True, help="file to write, for data.statistics, e.g. stats.json")
    add_runner(p)


def run_stats(args: argparse.Namespace) -> None:
    from spatialvla_jax.config import load_config
    from spatialvla_jax.data import DataConfig
    from spatialvla_jax.data.beam import compute_stats, table
    from spatialvla_jax.data.resolve_datasets import make_entries
    from spatialvla_jax.data.statistics import find_oddities
    from spatialvla_jax.utils.progress import progress_bar, warn

    config = load_config(args.config, args.overrides)
    data, exclude, out = DataConfig.from_config(config.data), config.grid.exclude, str(args.out)
    with progress_bar("stats", "shard") as progress:
        stats = compute_stats(data, exclude, out, args.runner, args.runner_options, progress)
    for entry in make_entries(data):
        for oddity in find_oddities(entry.name, stats["statistics"][entry.name], entry.spec):
            warn(oddity)
    print(table(stats))
    print(f"wrote {out}: set data.statistics to it")


def add(commands: Commands) -> None:
    group = add_group(
        commands,
        "data",
        "convert and look at datasets: show, lerobot, import, depth, pack, index",
        ("show --config demo --out mixture.html", "lerobot lerobot/pusht data/pusht"),
    )
    add_show(group)
    add_lerobot(group)
    add_import(group)
    add_depth(group)
    add_pack(group)
    add_index(group)
    add_stats(commands)
