"""Check a server process under load or attack: are all answers those of direct calls, and does its memory stay flat?

    python benchmarks/serve.py [--clients 64] [--seconds 300] [--preset nano]
    python benchmarks/serve.py --fuzz 10000

Starts `spatialvla-jax serve` on random weights (or on --checkpoint) and compares every answer bit for bit with
`Policy.infer`. Load: concurrent clients that send the next request as soon as they have an answer; an answer to another
observation counts as crossed, no answer within a minute as lost. Fuzz: random and mutated messages, false lengths, and
slow, vanishing and half-closed sockets, while one honest client keeps sending requests. Prints the environment and the
server's resident set over time. Ends with one line of JSON, and with exit code 1 if an answer was wrong or lost. Needs
the extra [serve].
"""

import asyncio
import json
import os
import platform
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from tqdm import tqdm
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from spatialvla_jax.cli.arguments import Parser, count, positive, state_defaults
from spatialvla_jax.serving.protocol import pack, unpack
from spatialvla_jax.utils.process import tied_to_this

SIZE = (120, 160)  # height and width of images
SLOW = 16  # connections that may hold half a message at a time
Observation = dict[str, Any]


def main() -> int:
    parser = Parser(prog="spatialvla-jax bench serve", description=__doc__)
    parser.add_argument("--preset", default="nano", help="model with random weights")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--clients", type=positive, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument(
        "--fuzz", type=count, default=0, metavar="MESSAGES", help="send malformed messages instead of load"
    )
    parser.add_argument("--max-batch", type=positive, default=32)
    state_defaults(parser)
    args = parser.parse_args()

    import jax

    from spatialvla_jax import Policy

    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    print(f"Python {platform.python_version()}, JAX {jax.__version__}, {device}")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or random_checkpoint(Path(folder) / "random", args.preset)
        policy = Policy.load(checkpoint)
        pool = [random_observation(policy, seed) for seed in range(64)]
        expected = [policy.infer(observation) for observation in tqdm(pool, desc="direct calls")]
        with server_of(checkpoint, args.max_batch) as (process, port):
            if args.fuzz:
                result = attack(process.pid, port, pool, expected, args.fuzz)
            else:
                result = asyncio.run(load(process.pid, port, pool, expected, args.clients, args.seconds))
        result |= {"exit_code": process.returncode, "different_answers": len({key(e) for e in expected})}
    result = {"benchmark": "serve", "preset": args.preset, "max_batch": args.max_batch, **result}
    print(json.dumps(result))
    return int(bool(result["wrong"] or result["crossed"] or result["lost"] or process.returncode))


def random_checkpoint(path: Path, name: str) -> Path:
    """Write a policy with random weights in the published layout."""
    import jax

    from spatialvla_jax.actions import PRETRAIN_GAUSSIANS, gaussian_grid
    from spatialvla_jax.checkpoints import Checkpoint, write_huggingface
    from spatialvla_jax.checkpoints.processor import Processor
    from spatialvla_jax.data.statistics import action_statistics
    from spatialvla_jax.models import SpatialVLA, preset
    from spatialvla_jax.text import train_tokenizer
    from spatialvla_jax.training.state import init_params

    grid = gaussian_grid(PRETRAIN_GAUSSIANS)
    config = preset(name, spatial_tokens=grid.vocab_size)
    actions = np.random.default_rng(0).normal(size=(1000, 7)).astype(np.float32)
    camera = [[1.0, 0, 0.5], [0, 1.3, 0.5], [0, 0, 1]]
    words = train_tokenizer(["pick up object"], 64)
    processor = Processor(words, grid, {"toy": action_statistics(actions, 1)}, {"toy": camera})
    params = init_params(SpatialVLA(config), 0)
    params = jax.tree.map(lambda x: np.asarray(x) * (4 if x.ndim > 1 else 1), params)  # so that images matter
    write_huggingface(path, Checkpoint.of(config, params, processor))
    return path


def random_observation(policy: Any, seed: int) -> Observation:
    rng = np.random.default_rng(seed)
    observation = {
        "image": rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8),
        "intrinsics": np.array([[rng.uniform(100, 200), 0, 80], [0, 150, 60], [0, 0, 1]], np.float32),
        "prompt": f"pick up object {seed}",
        "unnorm_key": next(iter(policy.processor.statistics)),
    }
    if policy.model.config.depth_source == "dataset":
        observation["depth"] = rng.uniform(0.3, 3, SIZE).astype(np.float32)
    return observation


@contextmanager
def server_of(checkpoint: Path, max_batch: int) -> Any:
    """Start a server process, and stop it with SIGTERM at the end."""
    command = [sys.executable, "-m", "spatialvla_jax.cli", "serve", "--checkpoint", str(checkpoint), "--port", "0"]
    command += ["--image-size", "x".join(map(str, SIZE)), "--max-batch", str(max_batch)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=tied_to_this(os.environ))
    assert process.stdout
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("serving"):
                port = int(line.rsplit(":", 1)[1])
            if re.match(r"compiled (\d+) of \1:", line):  # the last
                yield process, port
                break
    finally:
        process.send_signal(signal.SIGTERM)
        print(process.stdout.read(), end="")
        process.wait(60)


def rss_mb(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def key(answer: dict[str, Any]) -> bytes:
    return answer["action_ids"].tobytes() + answer["actions"].tobytes()


class Tally:
    """Compares answers with the expected ones and records their latencies."""

    def __init__(self, expected: list[dict]) -> None:
        self.expected, self.counts, self.seconds = [key(e) for e in expected], Counter[str](), []

    def add(self, i: int, reply: Any, seconds: float) -> None:
        got = None if isinstance(reply, str) else key(unpack(reply))
        self.counts["right" if got == self.expected[i] else "crossed" if got in self.expected else "wrong"] += 1
        self.seconds.append(seconds)

    def result(self) -> dict[str, Any]:
        p50, p99 = np.percentile(self.seconds, (50, 99)) * 1000
        counts = {name: self.counts[name] for name in ("right", "wrong", "crossed", "lost")}
        return {
            **counts,
            "p50_ms": round(p50, 1),
            "p99_ms": round(p99, 1),
            "max_ms": round(max(self.seconds) * 1000, 1),
        }


# --- load --------------------------------------------------------------------------------------------------------


async def load(pid: int, port: int, pool: list, expected: list, clients: int, seconds: float) -> dict[str, Any]:
    tally, messages, rss = Tally(expected), [pack(observation) for observation in pool], []
    start = time.monotonic()

    async def drive(number: int) -> None:
        rng = random.Random(number)
        async with connect_async(
            f"ws://127.0.0.1:{port}", compression=None, max_size=None, open_timeout=60
        ) as connection:
            await connection.recv()
            while time.monotonic() < start + seconds:
                i, asked = rng.randrange(len(pool)), time.monotonic()
                try:
                    await connection.send(messages[i])
                    reply = await asyncio.wait_for(connection.recv(), 60)
                except (TimeoutError, ConnectionClosed):
                    tally.counts["lost"] += 1
                    return
                tally.add(i, reply, time.monotonic() - asked)

    async def watch() -> None:
        while True:
            await asyncio.sleep(seconds / 10)
            rss.append(round(rss_mb(pid), 1))
            print(f"{time.monotonic() - start:.0f} s: {len(tally.seconds):,} answers, {rss[-1]} MB", flush=True)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(drive(number) for number in range(clients)))
    watcher.cancel()
    elapsed = time.monotonic() - start
    rate = {"answers_per_second": round(len(tally.seconds) / elapsed, 1), "seconds": round(elapsed, 1)}
    return {"clients": clients, **rate, **tally.result(), "rss_mb": {"start": rss[0], "end": rss[-1], "all": rss}}


# --- fuzz --------------------------------------------------------------------------------------------------------


def attack(pid: int, port: int, pool: list, expected: list, count: int) -> dict[str, Any]:
    tally, done, rss = Tally(expected), threading.Event(), []

    def honest() -> None:
        with connect(f"ws://127.0.0.1:{port}", compression=None) as connection:
            connection.recv()
            while not done.is_set():
                i, asked = random.randrange(len(pool)), time.monotonic()
                try:
                    connection.send(pack(pool[i]))
                    reply = connection.recv(60)
                except (TimeoutError, ConnectionClosed):
                    tally.counts["lost"] += 1
                    return
                tally.add(i, reply, time.monotonic() - asked)
                time.sleep(0.05)

    def progress(sent: int) -> None:
        if sent % (count // 10 or 1) == 0:
            rss.append(round(rss_mb(pid), 1))
            print(f"{sent:,} messages, {rss[-1]} MB", flush=True)

    before, start = round(rss_mb(pid), 1), time.monotonic()
    thread = threading.Thread(target=honest)
    thread.start()
    outcomes = fuzz(port, pool[0], count, seed=0, progress=progress)
    seconds = time.monotonic() - start
    done.set()
    thread.join()
    during, after = tally.result(), Tally(expected)
    with connect(f"ws://127.0.0.1:{port}", compression=None) as connection:
        connection.recv()
        for i, observation in enumerate(pool):
            connection.send(pack(observation))
            after.add(i, connection.recv(60), 0.0)
    for name, number in sorted(outcomes.items()):
        print(f"{number:6,}  {name}")
    bad = {name: during[name] + after.counts[name] for name in ("wrong", "crossed", "lost")}
    timing = {name: during[name] for name in ("p50_ms", "p99_ms", "max_ms")}
    memory = {"before": before, "after": round(rss_mb(pid), 1), "all": rss}
    right = {"right_during": during["right"], "right_after": after.counts["right"]}
    return {
        "messages": sum(outcomes.values()),
        "seconds": round(seconds, 1),
        **right,
        **bad,
        **timing,
        "rss_mb": memory,
    }


def fuzz(
    port: int, good: Observation, count: int, seed: int, progress: Callable[[int], Any] = lambda sent: None
) -> Counter[str]:
    """Send `count` bad or odd messages; returns how often each kind led to each outcome: actions, an error message or a
    closed connection. Raises if none of these happens within 30 s."""
    rng, outcomes, slow = random.Random(seed), Counter[str](), deque[ClientConnection]()
    connection = greeted(port)
    for sent in range(1, count + 1):
        if rng.random() < 0.85:
            kind = rng.choice(MESSAGES)
            try:
                connection.send(kind(rng, good))
                outcome = end_of(connection)
            except ConnectionClosed:
                outcome = "closed"
            if outcome == "closed":
                connection = greeted(port)
        else:
            kind = rng.choice(SOCKETS)
            outcome = kind(rng, good, port, slow)
            while len(slow) > SLOW:
                slow.popleft().socket.close()
        outcomes[f"{kind.__name__}: {outcome}"] += 1
        progress(sent)
    for held in slow:
        held.socket.close()
    connection.close()
    return outcomes


def greeted(port: int) -> ClientConnection:
    connection = connect(f"ws://127.0.0.1:{port}", compression=None, close_timeout=0.1).__enter__()
    connection.recv(30)
    return connection


def end_of(connection: ClientConnection) -> str:
    try:
        reply = connection.recv(30)
    except ConnectionClosed:
        return "closed"
    return (
        "a sentence" if isinstance(reply, str) else next(name for name in ("actions", "reset") if name in unpack(reply))
    )


def random_bytes(rng: random.Random, good: Observation) -> bytes:
    return rng.randbytes(rng.randrange(3000))


def random_text(rng: random.Random, good: Observation) -> str:
    return unicode_of(rng, 500)


def mutated(rng: random.Random, good: Observation) -> bytes:
    message = bytearray(pack(good))
    for _ in range(rng.randint(1, 20)):
        message[rng.choice((rng.randrange(80), -1 - rng.randrange(400), rng.randrange(len(message))))] = rng.randrange(
            256
        )
    return bytes(message)


def truncated(rng: random.Random, good: Observation) -> bytes:
    message = pack(good)
    return message[: rng.choice((rng.randrange(100), rng.randrange(len(message))))]


def wrong_type(rng: random.Random, good: Observation) -> bytes:
    junk = [None, True, 3, -1.5, "x", b"x", [1, [2]], {"a": {}}, np.zeros((2, 2)), np.float32(1), 1 << 60, np.zeros(0)]
    changed = good | {rng.choice([*good, "reset", "draft", unicode_of(rng, 5)]): rng.choice(junk)}
    renamed: Any = {rng.choice((name, name.encode(), name)): value for name, value in changed.items()}
    return pack(renamed)


def false_array(rng: random.Random, good: Observation) -> bytes:
    """Arrays with inconsistent dtype, shape and bytes."""
    array = {b"__ndarray__": True, b"data": rng.randbytes(rng.randrange(100)), b"dtype": "<f4", b"shape": [5, 5]}
    dtypes = ["|O", "O8", "<U9999999", "|V1000000000", "(99999,99999)f8", "f8,f8", "<M8[ns]", "<c16", "", 7, None]
    shapes = [[1 << 31] * 3, [-1], [], [0, 1 << 40], 5, None, ["a"], [[1]], [1 << 62], [1] * 16]
    array |= rng.choice(
        ({b"dtype": rng.choice(dtypes)}, {b"shape": rng.choice(shapes)}, {b"data": rng.choice((1, None, "x"))})
    )
    if rng.random() < 0.2:
        del array[rng.choice((b"data", b"dtype", b"shape"))]
    return msgpack.packb({"prompt": "x", rng.choice(("image", "depth", "intrinsics")): array})


def not_finite(rng: random.Random, good: Observation) -> bytes:
    name = rng.choice([name for name in ("image", "depth", "intrinsics") if name in good])
    array = good[name].astype(np.float32)
    array.flat[rng.randrange(array.size)] = rng.choice((np.nan, np.inf, -np.inf))
    return pack(good | {name: array})


def gigabyte_header(rng: random.Random, good: Observation) -> bytes:
    """msgpack that claims a gigabyte or more of bytes, text, list, map or extension."""
    claim = rng.choice((b"\xc6", b"\xdb", b"\xdd", b"\xdf", b"\xc9")) + struct.pack(
        "!I", rng.randrange(1 << 30, 1 << 32)
    )
    return rng.choice((b"", b"\x81\xa5image")) + claim + rng.randbytes(rng.randrange(50))


def odd_prompt(rng: random.Random, good: Observation) -> bytes:
    return pack(good | {"prompt": unicode_of(rng, rng.choice((3, 30, 3000)))})


def nested(rng: random.Random, good: Observation) -> bytes:
    depth = rng.randrange(1, 3000)
    return rng.choice(
        (b"\x91" * depth, b"\x81\xa1a" * depth, b"\x9f" + b"\x9f" * 15 * rng.randrange(1, 9) + b"\x90" * depth)
    )


def odd_size(rng: random.Random, good: Observation) -> bytes:
    shape = (rng.choice((0, 1, SIZE[0], rng.randrange(400))), rng.choice((0, 1, SIZE[1], rng.randrange(400))))
    return pack(
        good | {"image": np.zeros((*shape, rng.choice((1, 3, 4))), np.uint8), "depth": np.ones(shape, np.float32)}
    )


def oversized(rng: random.Random, good: Observation) -> bytes:
    return pack(good | {"image": np.zeros((17 << 20) if rng.random() < 0.05 else 1 << 20, np.uint8)})


def unicode_of(rng: random.Random, most: int) -> str:
    points = (
        rng.choice((rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))) for _ in range(most)
    )
    return "".join(map(chr, points))[: rng.randrange(most + 1)]


def half_closed(rng: random.Random, good: Observation, port: int, slow: deque) -> str:
    """Send a request, then close the sending side."""
    connection = greeted(port)
    connection.send(pack(good))
    connection.socket.shutdown(socket.SHUT_WR)
    return end_of(connection)


def vanishing(rng: random.Random, good: Observation, port: int, slow: deque) -> str:
    """Send a request, then reset the connection."""
    connection = greeted(port)
    connection.send(pack(good))
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.socket.close()
    return "gone"


def slow_message(rng: random.Random, good: Observation, port: int, slow: deque) -> str:
    """Send only the beginning of a message."""
    connection = greeted(port)
    connection.socket.sendall(b"\x82\xfe" + struct.pack("!H", 60_000) + bytes(4) + rng.randbytes(rng.randrange(1000)))
    slow.append(connection)
    return "held"


def gigabyte_frame(rng: random.Random, good: Observation, port: int, slow: deque) -> str:
    connection = greeted(port)
    connection.socket.sendall(b"\x82\xff" + struct.pack("!Q", rng.choice((1 << 30, 1 << 62))) + rng.randbytes(50))
    return end_of(connection)


def bad_frame(rng: random.Random, good: Observation, port: int, slow: deque) -> str:
    """Invalid frames: reserved opcodes, no mask, stray continuations. The connection should be closed."""
    connection = greeted(port)
    with suppress(OSError):
        connection.socket.sendall(
            rng.choice((b"\x83\x80", b"\x82\x05", b"\xf2\x80", b"\x00\x80", b"\x89\xff")) + bytes(200)
        )
        connection.socket.shutdown(socket.SHUT_WR)
    return end_of(connection)


def bad_request(rng: random.Random, good: Observation, port: int, slow: deque) -> str:
    """Invalid or oversized HTTP."""
    lines = (
        rng.randbytes(300),
        b"GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000,
        b"POST / HTTP/1.1\r\n\r\n",
    )
    with socket.create_connection(("127.0.0.1", port), 30) as raw, suppress(ConnectionError):
        raw.sendall(rng.choice(lines))
        raw.shutdown(socket.SHUT_WR)
        while raw.recv(4096):
            pass
    return "closed"


MESSAGES = (
    random_bytes,
    random_text,
    mutated,
    truncated,
    wrong_type,
    false_array,
    not_finite,
    gigabyte_header,
    odd_prompt,
    nested,
    odd_size,
    oversized,
)
SOCKETS = (half_closed, vanishing, slow_message, gigabyte_frame, bad_frame, bad_request)

if __name__ == "__main__":
    sys.exit(main())
