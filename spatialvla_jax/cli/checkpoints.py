"""Commands for checkpoints: `convert` and `fetch`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spatialvla_jax.cli.arguments import Commands, add_command, add_output, local_path, path
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.outputs import OutputFile, OutputFolder

if TYPE_CHECKING:
    from spatialvla_jax.checkpoints.hub import Repository

# The next command for a model of each `model_type`.
NEXT = {
    "paligemma": "train --config pretrain --workdir runs/pretrain --config.data.root=DIR --config.init={0} "
    "--config.init_zoedepth=Intel/zoedepth-nyu-kitti",
    "zoedepth": "train --config pretrain --workdir runs/pretrain --config.data.root=DIR "
    "--config.init=google/paligemma2-3b-pt-224 --config.init_zoedepth={0}",
    "spatialvla": "serve --checkpoint {0}",
}


def add(commands: Commands) -> None:
    add_convert(commands)
    add_fetch(commands)


def add_convert(commands: Commands) -> None:
    p = add_command(
        commands,
        "convert",
        run_convert,
        "convert a checkpoint between formats",
        (
            "runs/demo/run export --to pytorch",
            "export model.npz --to big_vision --dtype bfloat16",
            "runs/demo/run export --to pytorch --push me/policy --private",
        ),
    )
    p.add_argument("src", type=path, help="run directory, one of its steps, an export, or an id of the Hub")
    p.add_argument("dst", type=path, help="new directory, or new .npz file for big_vision")
    p.add_argument("--to", choices=("orbax", "pytorch", "big_vision", "peft"), required=True, help="format of DST")
    p.add_argument("--merge", action="store_true", help="write a run of LoRA adapters and its base as one checkpoint")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights; by default unchanged")
    p.add_argument(
        "--zoedepth",
        type=path,
        help="ZoeDepth's directory, if SRC is a PaliGemma 2; by default the model has no depth estimator",
    )
    p.add_argument(
        "--base",
        type=path,
        help="for --to peft: the export of the run's base that the adapters refer to; by default the base itself if "
        "transformers can load it, otherwise a new export in DST/base",
    )
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare the PyTorch export with JAX; by default up to 500 M parameters",
    )
    p.add_argument(
        "--push",
        default="",
        metavar="ORG/NAME",
        help="upload the verified PyTorch export to a new repository on the Hugging Face Hub; by default off",
    )
    p.add_argument("--private", action="store_true", help="make that repository private")


def run_convert(args: argparse.Namespace) -> None:
    from spatialvla_jax.export.convert import convert
    from spatialvla_jax.export.verify import VerificationError, table

    if args.private and not args.push:
        raise InputError("--private goes with --push ORG/NAME")
    (OutputFile() if args.to == "big_vision" else OutputFolder()).check(args.dst, "DST")
    try:
        options = {"dtype": args.dtype, "verify": args.verify, "zoedepth": args.zoedepth, "merge": args.merge}
        options |= {"base": args.base, "push": args.push, "private": args.private}
        result = convert(args.src, args.dst, to=args.to, **options)
    except VerificationError as error:
        print(table(error.result))
        print(json.dumps(error.result))
        print(f"spatialvla-jax convert: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    verification = result["verification"]
    print(table(verification) if isinstance(verification, dict) else f"not verified: {verification}")
    for difference in result["release_differences"]:
        print(f"the release's own code acts differently: {difference}")
    print(f"wrote {args.dst}")
    if result["pushed"]:
        print(f"pushed {result['pushed']}; `spatialvla-jax serve --checkpoint {args.push}` runs it anywhere")
    print(json.dumps(result))
    if not result["bit_exact"]:
        print(
            f"spatialvla-jax convert: {args.dst} does not read back as it was written: do not use it",
            file=sys.stderr,
        )
        raise SystemExit(1)


def add_fetch(commands: Commands) -> None:
    p = add_command(
        commands,
        "fetch",
        run_fetch,
        "download a checkpoint from the Hugging Face Hub, or resume an interrupted download (extra [hub])",
        ("paligemma2-3b-pt-224", "zoedepth-nyu-kitti --to zoedepth", "spatialvla-4b-224-pt", "me/policy@v1"),
    )
    p.add_argument(
        "name",
        metavar="NAME",
        help="paligemma2-3b-pt-224, zoedepth-nyu-kitti, spatialvla-4b-224-pt, or any ORG/NAME[@REVISION] of the Hub",
    )
    add_output(p, "--to", OutputFolder(), type=local_path, help="a new folder; by default the Hub's own cache")


def run_fetch(args: argparse.Namespace) -> None:
    from spatialvla_jax.checkpoints import hub
    from spatialvla_jax.checkpoints.types import read_json

    name: str = hub.KNOWN.get(args.name) or args.name
    id, revision = hub.parse_id(name)
    if args.to is None:
        folder = hub.snapshot(id, revision, announce)
    else:
        announce(repository := hub.look_up(id, revision), args.to)
        hub.download(repository, args.to)
        folder, name = args.to, str(args.to)
    kind = read_json(folder / hub.CONFIG).get("model_type", "spatialvla")
    print(f"{id} is in {folder}")
    print(f"next: spatialvla-jax {NEXT[kind].format(name)}")


def announce(repository: "Repository", to: Path | None = None) -> None:
    from huggingface_hub import constants

    gate = f", gated: accept it on {constants.ENDPOINT}/{repository.id}" if repository.gated else ""
    print(
        f"{repository.id}@{repository.commit[:12]}: licence {repository.licence}{gate}; "
        f"{len(repository.files)} files, {repository.size / 1e9:.2f} GB, to {to or 'the cache of the Hub'}",
        flush=True,
    )
