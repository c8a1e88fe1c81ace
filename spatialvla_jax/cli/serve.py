"""The command `serve`."""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spatialvla_jax.cli.arguments import UNCONSTRAINED, Commands, add_command, amount, at_most, local_path, path, port
from spatialvla_jax.errors import InputError

if TYPE_CHECKING:
    from spatialvla_jax.inference.policy import Policy

CACHE = Path("~/.cache/spatialvla_jax/compiled")


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "serve",
        run_serve,
        "serve a policy to robots by websocket, in openpi's protocol (extra [serve])",
        ("--checkpoint runs/demo/run", "--checkpoint export --host 0.0.0.0 --token-file token --dtype bfloat16"),
    )
    p.add_argument(
        "--checkpoint", type=path, required=True, help="run directory, one of its steps, an export or a Hub id"
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; all but localhost need a token")
    p.add_argument("--port", type=port, default=8000, help="port to listen on; 0: a free one")
    p.add_argument(
        "--token-file", type=local_path, help="clients send 'Authorization: Api-Key TOKEN'; by default SPATIALVLA_TOKEN"
    )
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="",
        help="for computing; by default the model's own",
    )
    p.add_argument("--quantize", choices=("int8",), default="", help="quantize the language model; by default off")
    p.add_argument("--unconstrained", action="store_true", help=UNCONSTRAINED)
    p.add_argument("--speculate", action="store_true", help="use each client's last chunk as a draft of the next")
    p.add_argument(
        "--execute", default="chunk", help="chunk, or single actions: open_loop, receding:K, adaptive, recent"
    )
    p.add_argument(
        "--image-size",
        type=image_size,
        action="append",
        metavar="HEIGHTxWIDTH",
        help="size of the clients' images, may be repeated; by default the model's own. The message limit, at least "
        "16 MiB, fits such an image with its depth",
    )
    p.add_argument("--max-batch", type=at_most(32), default=32, help="observations per call of the policy, up to 32")
    p.add_argument(
        "--max-wait-ms", type=at_most(10_000, amount), default=4, help="how long a batch waits for more clients"
    )
    p.add_argument("--max-clients", type=at_most(10_000), default=128, help="clients connected at once")
    p.add_argument(
        "--compile-cache",
        type=local_path,
        default=CACHE,
        help="folder for compiled programs, which makes the next start quick",
    )


def run_serve(args: argparse.Namespace) -> None:
    import asyncio
    import logging

    from spatialvla_jax.serving.access import read_token
    from spatialvla_jax.utils.outputs import OutputFolder
    from spatialvla_jax.utils.progress import warn

    try:
        from spatialvla_jax.serving.server import Limits, Server, run
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'spatialvla-jax[serve]'") from None

    limits = Limits(
        image_sizes=tuple(dict.fromkeys(args.image_size or ())),
        clients=args.max_clients,
        batch=args.max_batch,
        wait=args.max_wait_ms / 1000,
    )
    logging.getLogger("websockets.server").setLevel(logging.CRITICAL)  # don't log broken handshakes

    cache = args.compile_cache
    try:
        OutputFolder(names=()).check(cache, "--compile-cache")
    except InputError as error:
        if cache != CACHE.expanduser():
            raise
        warn(f"{error}; programs are compiled anew at every start")
        cache = None

    def load() -> "Policy":
        from spatialvla_jax.inference.policy import Policy
        from spatialvla_jax.utils.compilation_cache import share_compilations
        from spatialvla_jax.utils.malloc import limit_heaps

        limit_heaps()
        if cache:
            share_compilations(cache)
        options = {"dtype": args.dtype, "quantize": args.quantize, "speculate": args.speculate}
        return Policy.load(args.checkpoint, constrained=not args.unconstrained, **options)

    def identify() -> str:
        from spatialvla_jax.checkpoints import fingerprint

        digest = fingerprint(args.checkpoint).rpartition("(")[2].rstrip(")")
        return ", ".join(filter(None, (digest, args.dtype, args.quantize, "unconstrained" * args.unconstrained)))

    say, token = partial(print, flush=True), read_token(args.token_file)
    options = {"token": token, "execute": args.execute, "limits": limits, "report": say, "identify": identify}
    server = Server(load, args.host, args.port, **options)
    asyncio.run(run(server, lambda: say(f"listening on ws://{args.host}:{server.port}, loading {args.checkpoint}")))
    say("every reply is sent; stopped")
    if server.compiling:  # the interpreter would wait for its thread
        os._exit(0)


def image_size(text: str) -> tuple[int, int]:
    """`480x640` → (480, 640)."""
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and 0 < int(side) <= 4096 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH of 1 to 4096 pixels a side, such as 480x640")
    height, width = map(int, sides)
    return height, width
