"""The command `convert`."""

import argparse
import json
import sys

from spatialvla_jax.cli.arguments import Commands, add_command, path
from spatialvla_jax.utils.outputs import OutputFile, OutputFolder


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "convert",
        run_convert,
        "convert a checkpoint between formats",
        ("runs/demo/run export --to pytorch", "export model.npz --to big_vision --dtype bfloat16"),
    )
    p.add_argument("src", type=path, help="run directory, one of its steps, an export or a published checkpoint")
    p.add_argument("dst", type=path, help="new directory, or new .npz file for big_vision")
    p.add_argument("--to", choices=("orbax", "pytorch", "big_vision", "peft"), required=True, help="format of DST")
    p.add_argument("--merge", action="store_true", help="write a run of LoRA adapters and its base as one checkpoint")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights written; by default as they are")
    p.add_argument(
        "--zoedepth", type=path, help="ZoeDepth's directory, where SRC is a PaliGemma 2; by default without depth"
    )
    p.add_argument(
        "--base",
        type=path,
        help="for --to peft: the export of the run's base that the adapters name; by default the base where "
        "transformers can load it, otherwise an export of it in DST/base",
    )
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="run the PyTorch export beside JAX; by default up to 500 M parameters",
    )


def run_convert(args: argparse.Namespace) -> None:
    from spatialvla_jax.export.convert import convert
    from spatialvla_jax.export.verify import VerificationError, table

    (OutputFile() if args.to == "big_vision" else OutputFolder()).check(args.dst, "DST")
    try:
        options = {"dtype": args.dtype, "verify": args.verify, "zoedepth": args.zoedepth, "merge": args.merge}
        options["base"] = args.base
        result = convert(args.src, args.dst, to=args.to, **options)
    except VerificationError as error:
        print(table(error.result))
        print(json.dumps(error.result))
        print(f"spatialvla-jax convert: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    verification = result["verification"]
    print(table(verification) if isinstance(verification, dict) else f"not verified: {verification}")
    for difference in result["release_differences"]:
        print(f"in the release's own code it acts differently: {difference}")
    print(f"wrote {args.dst}")
    print(json.dumps(result))
    if not result["bit_exact"]:
        print(f"spatialvla-jax convert: {args.dst} reads back with other bytes than {args.src}", file=sys.stderr)
        raise SystemExit(1)
