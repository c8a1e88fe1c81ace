"""The command `convert`."""

import argparse
import json
import sys
from pathlib import Path

from spatialvla_jax.cli.arguments import Commands, add_command


def add(commands: Commands) -> None:
    p = add_command(commands, "convert", run_convert, "convert a checkpoint between formats")
    p.add_argument("src", type=Path)
    p.add_argument("dst", type=Path)
    p.add_argument("--to", choices=("orbax", "pytorch", "big_vision", "peft"), required=True)
    p.add_argument("--merge", action="store_true", help="write a run of LoRA adapters and its base as one checkpoint")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights written; by default as they are")
    p.add_argument("--zoedepth", type=Path, help="ZoeDepth's directory, where SRC is a PaliGemma 2 to start from")
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="run the PyTorch export beside JAX; by default up to 500 M parameters",
    )


def run_convert(args: argparse.Namespace) -> None:
    from spatialvla_jax.export.convert import convert
    from spatialvla_jax.export.verify import VerificationError, table

    try:
        options = {"dtype": args.dtype, "verify": args.verify, "zoedepth": args.zoedepth, "merge": args.merge}
        result = convert(args.src, args.dst, to=args.to, **options)
    except VerificationError as error:
        print(table(error.result))
        print(json.dumps(error.result))
        print(f"spatialvla-jax convert: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    verification = result["verification"]
    print(table(verification) if isinstance(verification, dict) else f"not verified: {verification}")
    print(f"wrote {args.dst}")
    print(json.dumps(result))
    if not result["bit_exact"]:
        print(f"spatialvla-jax convert: {args.dst} reads back with other bytes than {args.src}", file=sys.stderr)
        raise SystemExit(1)
