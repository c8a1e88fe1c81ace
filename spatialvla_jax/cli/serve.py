"""The command `serve`."""

import argparse
import os
from pathlib import Path

from spatialvla_jax.cli.arguments import UNCONSTRAINED, Commands, add_command, amount, port, positive
from spatialvla_jax.errors import InputError


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "serve",
        run_serve,
        "serve a policy to robots by websocket, in openpi's protocol (extra [serve])",
        ("--checkpoint runs/demo/run", "--checkpoint export --host 0.0.0.0 --token-file token --dtype bfloat16"),
    )
    p.add_argument("--checkpoint", type=Path, required=True, help="run directory, one of its steps, or an export")
    p.add_argument("--host", default="127.0.0.1", help="any other than this machine's own needs a token")
    p.add_argument("--port", type=port, default=8000, help="where clients connect")
    p.add_argument(
        "--token-file", type=Path, help="clients send 'Authorization: Api-Key TOKEN'; by default SPATIALVLA_TOKEN"
    )
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="", help="of the computation; by default the model's own"
    )
    p.add_argument(
        "--quantize", choices=("int8",), default="", help="the language model's matrices; by default as they are"
    )
    p.add_argument("--unconstrained", action="store_true", help=UNCONSTRAINED)
    p.add_argument("--speculate", action="store_true", help="take each client's last chunk as a guess of the next")
    p.add_argument(
        "--execute", default="chunk", help="or one action a request: open_loop, receding:K, adaptive, recent"
    )
    p.add_argument(
        "--image-size",
        type=image_size,
        action="append",
        metavar="HEIGHTxWIDTH",
        help="of the clients' images, may be repeated; by default the model's own",
    )
    p.add_argument("--max-batch", type=positive, default=32, help="observations of one call of the policy")
    p.add_argument("--max-wait-ms", type=amount, default=4, help="for which a batch waits for further clients")
    p.add_argument("--max-clients", type=positive, default=128, help="connected at once")
    p.add_argument(
        "--compile-cache",
        type=Path,
        default=Path("~/.cache/spatialvla_jax/compiled"),
        help="where compiled programs are kept: the second start is quick",
    )


def run_serve(args: argparse.Namespace) -> None:
    import asyncio
    import logging

    from spatialvla_jax.inference.policy import Policy
    from spatialvla_jax.utils.compilation_cache import share_compilations
    from spatialvla_jax.utils.malloc import limit_heaps

    try:
        from spatialvla_jax.serving.server import Limits, Server, run
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'spatialvla-jax[serve]'") from None

    if args.token_file and not args.token_file.is_file():
        raise InputError(f"token file {args.token_file} does not exist")
    token = args.token_file.read_text() if args.token_file else os.environ.get("SPATIALVLA_TOKEN", "")
    limits = Limits(
        image_sizes=tuple(args.image_size or ()),
        clients=args.max_clients,
        batch=args.max_batch,
        wait=args.max_wait_ms / 1000,
    )
    logging.getLogger("websockets.server").setLevel(logging.CRITICAL)  # a stranger's broken handshake is no event
    limit_heaps()
    share_compilations(args.compile_cache)
    options = {"dtype": args.dtype, "quantize": args.quantize, "speculate": args.speculate}
    policy = Policy.load(args.checkpoint, constrained=not args.unconstrained, **options)
    server = Server(policy, args.host, args.port, token=token.strip(), execute=args.execute, limits=limits)
    print(f"compiling for batches of 1 to {args.max_batch}", flush=True)
    asyncio.run(run(server, lambda: print(f"serving {args.checkpoint} on ws://{args.host}:{server.port}", flush=True)))
    print("every reply is sent; stopped")


def image_size(text: str) -> tuple[int, int]:
    """`480x640` → (480, 640)."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and 0 < int(height) <= 4096 and 0 < int(width) <= 4096):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 480x640")
    return int(height), int(width)
