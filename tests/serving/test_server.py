import asyncio
import importlib.util
import os
import selectors
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import msgpack
import numpy as np
import pytest
import websockets.exceptions
from helpers.serving import LIMITS, Stub, asks, client_of, eventually, get, observations, serving
from openpi_client import msgpack_numpy
from openpi_client.action_chunk_broker import ActionChunkBroker
from websockets.sync.client import connect

from spatialvla_jax import Policy
from spatialvla_jax.cli import main
from spatialvla_jax.errors import InputError
from spatialvla_jax.inference.action_chunking import executor
from spatialvla_jax.serving.access import read_token
from spatialvla_jax.serving.protocol import Limits, check, pack, room_for_images, unpack
from spatialvla_jax.serving.server import Batcher, Server, run
from spatialvla_jax.utils import compilation_cache as compiled

ROOT = Path(__file__).parents[2]


def load_script(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- with a trained policy ---------------------------------------------------------------------------------------


def test_the_published_client_gets_the_direct_call_bit_for_bit(server: Server, policy: Policy) -> None:
    client = client_of(server)
    metadata = client.get_server_metadata()
    assert metadata["action_chunk"] == 4 and metadata["needs_depth"] and metadata["unnorm_keys"] == ["toy"]
    for observation in observations(3):
        answer, expected = client.infer(observation), policy.infer(observation)
        for key in ("actions", "action_ids"):
            assert answer[key].dtype == expected[key].dtype
            np.testing.assert_array_equal(answer[key], expected[key])
        assert answer["server_timing"]["infer_ms"] > 0
    steps = ActionChunkBroker(client, action_horizon=4)
    observation = observations(1)[0]
    expected = policy.infer(observation)["actions"]
    np.testing.assert_array_equal([steps.infer(observation)["actions"] for _ in range(4)], expected)


def test_eight_clients_at_once_get_their_own_answers(server: Server, policy: Policy) -> None:
    seen = observations(8, seed=1)
    expected = [policy.infer(observation)["action_ids"] for observation in seen]
    assert len({ids.tobytes() for ids in expected}) > 4  # they can be told apart

    def drive(first: int) -> None:
        client = client_of(server)
        for turn in range(8):
            answer = client.infer(seen[(first + turn) % 8])
            np.testing.assert_array_equal(answer["action_ids"], expected[(first + turn) % 8])
        client._ws.close()

    before = len(server.clients)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(drive, range(8)))
    eventually(lambda: len(server.clients) == before)


def test_bad_observations_get_a_sentence_and_may_go_on(server: Server, policy: Policy) -> None:
    client, good = client_of(server), observations(1)[0]
    for change, message in [
        ({"image": good["image"].astype(np.float32) * np.nan}, r"'image' must be uint8\[H, W, 3\], got float32"),
        ({k: good[k][1:] for k in ("image", "depth")}, "'image' is 47x64: this server is compiled for 48x64"),
        ({"depth": good["depth"] * np.inf}, "'depth' must be finite"),
        ({"depth": good["depth"][1:]}, "'depth' must be metres"),
        ({"depth": (1000 * good["depth"]).astype(np.uint16)}, "floating-point numbers, got uint16: 'depth_unit' says"),
        ({"depth_unit": "mm"}, "'depth_unit' must be metres per count"),
        ({"intrinsics": [[1, 2], [3, 4]]}, "'intrinsics' must be an array, got list"),
        ({"intrinsics": np.zeros((3, 3), np.float32)}, "'intrinsics' must have the last row"),
        ({"prompt": 3}, "'prompt' must be a str, got int"),
        ({"prompt": "å" * 1001}, "may have at most 1000 characters"),
        ({"prompt": "object " * 40}, "tokens"),
        ({"unnorm_key": ["toy"]}, "'unnorm_key' must be a str, got list"),
        ({"unnorm_key": "bridge"}, "choose one of toy"),
        ({"state": 1}, "'state' is not known; choose one of image, prompt"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            client.infer(good | change)
    np.testing.assert_array_equal(client.infer(good)["action_ids"], policy.infer(good)["action_ids"])
    halves = good | {"depth": (2 * good["depth"]).astype(np.float32), "depth_unit": np.float64(0.5)}
    np.testing.assert_array_equal(client.infer(halves)["action_ids"], policy.infer(good)["action_ids"])


def test_fuzz(server: Server, policy: Policy) -> None:
    """Some of what `benchmarks/serve.py --fuzz` sends; afterwards the server answers as before."""
    before = len(server.clients)
    kinds = load_script("benchmarks/serve.py").fuzz(server.port, observations(1)[0], 300, seed=0)
    assert sum(kinds.values()) == 300 and len(kinds) > 8
    observation = observations(1)[0]
    np.testing.assert_array_equal(
        client_of(server).infer(observation)["action_ids"], policy.infer(observation)["action_ids"]
    )
    eventually(lambda: len(server.clients) == before + 1)


def test_ensembled_actions_are_those_of_the_executor(policy: Policy, served: Policy) -> None:
    seen = [observation | {"prompt": "pick up object 1"} for observation in observations(5)]
    for mode in ("adaptive", "receding:3"):
        with serving(served, execute=mode, limits=replace(LIMITS, batch=1)) as server:
            client, local = client_of(server), executor(mode)
            for episode in range(2):
                for observation in seen:
                    action = local.step(policy.infer(observation)["actions"] if local.due else None)
                    np.testing.assert_array_equal(client.infer(observation)["actions"], action[None])
                if episode == 0:
                    assert client.infer({"reset": True})["reset"]
                    local.reset()


def test_the_command_serves_a_robot_until_sigterm(served: Policy, capfd, monkeypatch) -> None:
    """`examples/robot_loop.py` against `spatialvla-jax serve`, which exits with 0."""
    example, robots, servers = load_script("examples/robot_loop.py"), [], []

    def drive() -> None:
        try:
            eventually(lambda: servers and servers[0].port)
            client = client_of(servers[0], "secret")
            robots.append(example.SimulatedWidowX(*client.get_server_metadata()["image_sizes"][0]))
            example.control(robots[0], client, "pick up object 1", steps=6, hertz=1000)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    kept = []
    monkeypatch.setattr(compiled, "share_compilations", kept.append)  # it would also affect the tests that follow
    monkeypatch.setenv("SPATIALVLA_TOKEN", "secret")
    monkeypatch.setattr(Policy, "load", lambda path, **options: served)  # compiled already
    monkeypatch.setattr(
        "spatialvla_jax.serving.server.run", lambda server, ready: servers.append(server) or run(server, ready)
    )
    thread = threading.Thread(target=drive)
    thread.start()
    arguments = ["--checkpoint", "run", "--port", "0", "--max-batch", "1", "--image-size", "48x64"]
    assert main(["serve", *arguments]) == 0
    thread.join()
    printed = capfd.readouterr().out
    assert f"listening on ws://127.0.0.1:{servers[0].port}, loading run" in printed
    assert "compiled 1 of 1: batch 1, images 48x64, prompts up to 16 tokens" in printed
    assert kept == [Path("~/.cache/spatialvla_jax/compiled").expanduser()]
    assert not np.array_equal(robots[0].position, example.SimulatedWidowX(48, 64).position)


def test_bad_arguments_end_the_command_before_it_loads(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Policy, "load", None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for arguments, message in [
            (["--host", "0.0.0.0"], "serving on it needs a token"),
            (["--token-file", str(tmp_path / "none")], "token file"),
            (["--execute", "sometimes"], "execution 'sometimes' is not known"),
            (["--compile-cache", __file__], "--compile-cache"),
            (["--port", port], f"port {port} of host 127.0.0.1 cannot be opened: Address already in use"),
        ]:
            assert main(["serve", "--checkpoint", "run", *arguments]) == 2
            assert message in capsys.readouterr().err
        monkeypatch.setenv("SPATIALVLA_TOKEN", "secret")
        for host, reason in [("192.0.2.1", "Cannot assign requested address"), ("a" * 70, "label")]:
            assert main(["serve", "--checkpoint", "run", "--host", host]) == 2
            printed = capsys.readouterr()
            assert f"port 8000 of host {host} cannot be opened" in printed.err and reason in printed.err
            assert printed.out == "" and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: expected a token"),
        (b" \n\t\n", "is empty: expected a token"),
        (b"one\ntwo\n", "holds more than one token"),
        (b"one two", "holds more than one token"),
        (b"a\0b", "expected one line of printable ASCII characters"),
        (b"\x89PNG\r\n", "expected one line of printable ASCII characters"),
        ("schlüssel".encode(), "expected one line of printable ASCII characters"),
        (b"a\x07b", "holds no token: expected one line of printable ASCII characters"),
        (os.mkdir, "is a folder: expected a file with a token"),
        (os.mkfifo, "is not a file: expected a file with a token"),
        (lambda file: file.symlink_to(os.devnull), "is not a file: expected a file with a token"),
        (lambda file: None, "does not exist: expected a file with a token"),
    ],
)
def test_a_token_file_holds_one_token(tmp_path: Path, content: bytes | Callable[[Path], Any], message: str) -> None:
    file = tmp_path / "token"
    content(file) if callable(content) else file.write_bytes(content)
    with pytest.raises(InputError, match=f"token file {file} .*{message}"):
        read_token(file)


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "token"
    file.write_text("  secret\n")
    assert read_token(file) == "secret"
    for value, token in (("", ""), ("other", "other")):
        monkeypatch.setenv("SPATIALVLA_TOKEN", value)
        assert read_token() == token
    monkeypatch.setenv("SPATIALVLA_TOKEN", " ")
    with pytest.raises(InputError, match="SPATIALVLA_TOKEN is empty"):
        read_token()


def test_weights_that_are_damaged_while_it_serves(server: Server, served: Policy, monkeypatch) -> None:
    client, good = client_of(server), observations(1)[0]
    failed = 'outcome="failed"} '
    with monkeypatch.context() as patch:
        patch.setattr(served, "weights", jax.tree.map(lambda x: x * np.nan, served.weights))
        with pytest.raises(RuntimeError, match="NaN or infinite, so there is no action"):
            client.infer(good)
    assert failed in get(server, "/metrics")[1] and client.infer(good)["actions"].shape == (4, 7)


# --- with a stub -------------------------------------------------------------------------------------------------


def test_health_metadata_and_metrics() -> None:
    with serving(Stub()) as server:
        client_of(server).infer(asks("1"))
        with pytest.raises(RuntimeError):
            client_of(server).infer({})
        assert get(server, "/healthz") == (200, "OK\n")
        assert '"action_chunk": 4' in get(server, "/metadata")[1]
        metrics = get(server, "/metrics")[1]
        assert 'spatialvla_requests_total{outcome="ok"} 1.0' in metrics
        assert 'spatialvla_requests_total{outcome="invalid"} 1.0' in metrics
        assert "spatialvla_batch_size_count 1.0" in metrics
        assert get(server, "/other")[0] == 404


def test_clients_wait_while_the_checkpoint_is_loaded() -> None:
    go = threading.Event()

    def load() -> Stub:
        assert go.wait(120)
        return Stub()

    with serving(load, compiled=False) as server, ThreadPoolExecutor(1) as thread:
        assert get(server, "/healthz") == (503, "compiling\n")
        assert get(server, "/metadata") == (503, "loading\n")
        assert get(server, "/metrics")[0] == 200
        client = thread.submit(client_of, server)
        eventually(lambda: len(server.clients) == 1)
        go.set()
        assert client.result().infer(asks("3"))["actions"][0, 0] == 3
        assert get(server, "/healthz") == (200, "OK\n")


def test_what_is_asked_for_is_compiled_first() -> None:
    compiling, go, said = [], threading.Semaphore(0), []

    def compile(prompt: str, batch: int) -> None:
        compiling.append((16 * (len(prompt.split()) // 16 + 1), batch))
        assert go.acquire(timeout=120)

    stub = Stub(compiling=compile, steps=3)
    with serving(stub, compiled=False, report=said.append) as server, ThreadPoolExecutor(1) as thread:
        long, short = client_of(server), client_of(server)
        eventually(lambda: compiling == [(16, 1)])
        answer = thread.submit(long.infer, asks("word " * 40))
        eventually(lambda: server.programs.waiting[48, 64, 48] == 1)
        assert get(server, "/healthz") == (503, "compiling\n")
        go.release()
        eventually(lambda: compiling == [(16, 1), (48, 1)])
        assert get(server, "/healthz") == (200, "OK\n")
        assert short.infer(asks("7"))["actions"][0, 0] == 7, "while the long one still waits"
        go.release()
        assert answer.result()["actions"][0, 0] == 0
        assert all(len(batch) == 1 for batch in stub.batches), "no larger batch is ready"
        go.release(10)
        eventually(server.prepared.done)
    assert compiling == [(16, 1), (48, 1), (32, 1), (48, 2), (16, 2), (32, 2)]
    assert said[:2] == [
        "compiled 1 of 6: batch 1, images 48x64, prompts up to 16 tokens",
        f"serving on ws://127.0.0.1:{server.port}",
    ]
    assert said[-1] == "compiled 6 of 6: batch 2, images 48x64, prompts up to 32 tokens"


def test_batches_that_cannot_be_compiled_stay_small() -> None:
    said = []

    def compile(prompt: str, batch: int) -> None:
        if batch > 1:
            raise MemoryError("no room")

    stub = Stub(compiling=compile)
    with serving(stub, replace(LIMITS, batch=4), report=said.append) as server, ThreadPoolExecutor(4) as threads:
        assert said[-1] == "batches of 2 fail (no room): at most 1 are answered at once"
        clients = [client_of(server) for _ in range(4)]
        answers = [threads.submit(client.infer, asks(str(i))) for i, client in enumerate(clients)]
        assert [answer.result()["actions"][0, 0] for answer in answers] == [0, 1, 2, 3]
        assert all(len(batch) == 1 for batch in stub.batches)


@pytest.mark.parametrize("fails", ["loading", "compiling"])
def test_a_server_that_cannot_get_ready_ends(fails: str) -> None:
    def fail(*_: object) -> None:
        raise InputError(f"{fails} failed")

    server = Server(fail if fails == "loading" else lambda: Stub(compiling=fail), "127.0.0.1", 0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"{fails} failed"):
        asyncio.run(run(server))


def test_a_token_is_asked_for() -> None:
    with pytest.raises(InputError, match=r"host 0.0.0.0 can be reached from other machines"):
        Server(Stub, "0.0.0.0", 0)
    with serving(Stub(), token="secret") as server:
        assert client_of(server, "secret").infer(asks("7"))["actions"][0, 0] == 7
        for token in (None, "Secret", "secret2"):
            with pytest.raises(websockets.exceptions.InvalidStatus, match="401"):
                client_of(server, token)
        assert get(server, "/healthz")[0] == 200
        assert get(server, "/metrics")[0] == get(server, "/metadata")[0] == 401
        assert get(server, "/metrics", Authorization="Api-Key secret")[0] == 200


def test_web_pages_are_refused() -> None:
    with serving(Stub()) as server, pytest.raises(websockets.exceptions.InvalidStatus, match="403"):
        connect(f"ws://127.0.0.1:{server.port}", origin="http://127.0.0.1")  # type: ignore[arg-type]


def test_a_full_server_refuses_further_clients() -> None:
    with serving(Stub()) as server:
        clients = [client_of(server) for _ in range(LIMITS.clients)]
        with pytest.raises(websockets.exceptions.InvalidStatus, match="503"):
            client_of(server)
        clients.pop()._ws.close()
        eventually(lambda: len(server.clients) < LIMITS.clients)
        assert client_of(server).infer(asks("2"))["actions"][0, 0] == 2


def test_what_waits_for_the_device_is_one_batch() -> None:
    stub = Stub()
    with serving(stub, replace(LIMITS, batch=4)) as server, ThreadPoolExecutor(5) as threads:
        clients = [client_of(server) for _ in range(5)]
        first = threads.submit(clients[0].infer, asks("slow"))
        eventually(lambda: stub.batches[-1][0]["prompt"] == "slow")
        rest = [threads.submit(clients[i].infer, asks(str(i))) for i in range(1, 5)]
        eventually(lambda: server.batcher.waiting.qsize() == 4)
        stub.go.set()
        assert [future.result()["actions"][0, 0] for future in rest] == [1, 2, 3, 4]
        first.result()
        assert {o["prompt"] for o in stub.batches[-1]} == {"1", "2", "3", "4"}


class Skipping(asyncio.SelectorEventLoop):
    """An event loop that jumps to the next event and runs other threads' work itself, so nothing takes any time."""

    def __init__(self) -> None:
        super().__init__(selector := selectors.DefaultSelector())
        self.now, select = 0.0, selector.select

        def skip(timeout: float | None) -> list:
            self.now += timeout or 0
            return select(timeout and 0)

        selector.select = skip  # type: ignore[method-assign]

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, call: Callable[..., Any], *arguments: Any) -> asyncio.Future:
        done = self.create_future()
        done.set_result(call(*arguments))
        return done


def test_a_batch_waits_for_the_other_clients_no_longer_than_its_bound() -> None:
    def batches(wait: float, asking: int, clients: int, batch: int = 4, every: float = 0.0) -> list[int]:
        """The sizes of the batches that answer `asking` clients, each with one observation per `every` seconds."""
        sizes = []

        async def drive() -> None:
            limits = replace(LIMITS, batch=batch, wait=wait)
            batcher = Batcher(lambda seen: sizes.append(len(seen)) or seen, limits, lambda: clients)
            worker = asyncio.create_task(batcher.run())

            async def ask(turn: int) -> None:
                await asyncio.sleep(turn * every)
                await batcher.infer({})

            await asyncio.wait_for(asyncio.gather(*map(ask, range(asking))), 20)
            worker.cancel()

        with asyncio.Runner(loop_factory=Skipping) as runner:
            runner.run(drive())
        return sizes

    assert batches(1, asking=2, clients=3, every=0.01) == [2], "the second client is waited for; the third says nothing"
    assert batches(60, asking=1, clients=1) == [1], "there is nobody to wait for"
    assert batches(60, asking=3, clients=3) == [3], "nobody is left to wait for"
    assert batches(60, asking=8, clients=9) == [4, 4], "a full batch waits for nobody"
    sizes = batches(0.32, asking=40, clients=100, batch=100, every=0.05)
    assert sizes == [7] * 5 + [5], "those that come meanwhile do not prolong it"


def test_a_full_queue_says_so_at_once() -> None:
    stub = Stub()
    with serving(stub, replace(LIMITS, queue=1, batch=1)) as server, ThreadPoolExecutor(2) as threads:
        slow = threads.submit(client_of(server).infer, asks("slow"))
        eventually(lambda: stub.batches[-1][0]["prompt"] == "slow")
        waiting = threads.submit(client_of(server).infer, asks("5"))
        eventually(lambda: server.batcher.waiting.qsize() == 1)
        with pytest.raises(RuntimeError, match="busy"):
            client_of(server).infer(asks("6"))
        stub.go.set()
        assert waiting.result()["actions"][0, 0] == 5 and slow.result()


def test_an_observation_that_breaks_the_policy_costs_only_itself() -> None:
    stub = Stub()
    with serving(stub, replace(LIMITS, batch=4)) as server, ThreadPoolExecutor(4) as threads:
        clients = [client_of(server) for _ in range(4)]
        slow = threads.submit(clients[0].infer, asks("slow"))
        eventually(lambda: stub.batches[-1][0]["prompt"] == "slow")
        prompts = ("1", "bad", "3")
        rest = [threads.submit(c.infer, asks(p)) for c, p in zip(clients[1:], prompts, strict=True)]
        eventually(lambda: server.batcher.waiting.qsize() == 3)
        stub.go.set()
        assert slow.result() and rest[0].result()["actions"][0, 0] == 1 and rest[2].result()["actions"][0, 0] == 3
        with pytest.raises(RuntimeError, match="failed on this observation: ZeroDivisionError"):
            rest[1].result()


@pytest.mark.parametrize("execute", ["chunk", "adaptive"])
def test_numbers_that_are_not_finite_are_no_answer(execute: str) -> None:
    stub = Stub()
    with serving(stub, execute=execute) as server:
        client = client_of(server)
        client.infer(asks("2"))
        with pytest.raises(RuntimeError, match="NaN or infinite, so there is no action"):
            client.infer(asks("nan"))
        assert client.infer(asks("4"))["actions"][0, 0] == 4
        metrics = get(server, "/metrics")[1]
        assert 'outcome="ok"} 2.0' in metrics and 'outcome="failed"} 1.0' in metrics


def test_a_client_that_vanishes_frees_its_state() -> None:
    stub = Stub()
    with serving(stub) as server:
        gone = client_of(server)
        gone._ws.send(pack(asks("slow")))
        eventually(lambda: stub.batches[-1][0]["prompt"] == "slow")
        gone._ws.socket.close()  # no farewell
        stub.go.set()
        eventually(lambda: not server.clients and not server.busy)
        assert client_of(server).infer(asks("4"))["actions"][0, 0] == 4


@pytest.mark.parametrize("mode", ["open_loop", "receding:3", "adaptive", "recent"])
def test_a_chunk_belongs_to_an_instruction(mode: str) -> None:
    """Another prompt or key starts a new plan, without any action of earlier chunks; the camera does not matter."""
    stub = Stub()
    with serving(stub, execute=mode) as server:
        client = client_of(server)

        def act(prompt: str, **more: Any) -> float:
            return client.infer(asks(prompt) | more)["actions"][0, 0]

        assert [act("3"), act("3"), act("5"), act("5"), act("3")] == [3, 3, 5, 5, 3]
        planned = len(stub.batches)
        act("3", intrinsics=np.eye(3))
        assert len(stub.batches) == planned + (mode in ("adaptive", "recent"))
        for key in ("toy", None, "toy"):
            planned = len(stub.batches)
            act("3", unnorm_key=key)
            assert len(stub.batches) == planned + 1
        for refused in ({"image": asks("7")["image"]}, asks("bad")):
            with pytest.raises(RuntimeError):
                client.infer(refused)
            planned = len(stub.batches)
            assert act("3", unnorm_key="toy") == 3 and len(stub.batches) == planned + 1


def test_what_is_left_of_the_last_chunk_is_the_next_draft_until_reset_or_another_instruction() -> None:
    """Drafts start with the action that the next chunk starts with, whatever part of a chunk is executed."""
    chunk = np.arange(12).reshape(4, 3)
    for mode, left in (("chunk", 4), ("open_loop", 4), ("receding:3", 3), ("adaptive", 1)):
        stub = Stub(chunk)
        with serving(stub, execute=mode) as server:
            client = client_of(server)
            for _ in range(left if mode != "chunk" else 1):
                client.infer(asks("3"))
            client.infer(asks("3"))
            client.infer(asks("4"))
            client.infer(asks("4") | {"unnorm_key": "toy"})
            client.infer(asks("4") | {"unnorm_key": "toy", "reset": True})
            client_of(server).infer(asks("4") | {"unnorm_key": "toy"})
        first, second, *others = [batch[0] for batch in stub.batches[-6:]]
        assert first["prompt"] == "3" and not any("draft" in observation for observation in (first, *others))
        np.testing.assert_array_equal(second["draft"], np.r_[chunk[left:], chunk[[3] * left]], mode)


def test_sigterm_answers_what_is_in_flight() -> None:
    stub = Stub()
    server = Server(lambda: stub, "127.0.0.1", 0, limits=LIMITS)
    answers: list[Any] = []

    def drive() -> None:
        idle, client = client_of(server), client_of(server)
        with ThreadPoolExecutor(1) as asking:
            answer = asking.submit(client.infer, asks("slow"))
            eventually(lambda: any(batch[0]["prompt"] == "slow" for batch in stub.batches))
            os.kill(os.getpid(), signal.SIGTERM)
            eventually(lambda: server.draining)
            stub.go.set()
        answers.append(answer.result())
        with pytest.raises(websockets.exceptions.ConnectionClosed, match="1001"):
            idle._ws.recv()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))
        answers.append("done")

    thread = threading.Thread(target=drive)
    asyncio.run(run(server, thread.start))
    thread.join()
    assert len(answers) == 2 and answers[0]["actions"].shape == (4, 7)


# --- messages ----------------------------------------------------------------------------------------------------


def test_messages_are_those_of_openpi() -> None:
    observation = observations(1)[0] | {"reset": np.True_, "unnorm_key": None}
    for message, read in ((msgpack_numpy.packb(observation), unpack), (pack(observation), msgpack_numpy.unpackb)):
        back = read(message)
        assert back.keys() == observation.keys()
        for key, value in observation.items():
            np.testing.assert_array_equal(back[key], value)


ARRAY = {b"__ndarray__": True, b"data": b"\0" * 12, b"dtype": "|u1", b"shape": [2, 2, 3]}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("text", "binary msgpack message, got text"),
        (b"", "must be a msgpack map in openpi's encoding"),
        (b"\xc1", "must be a msgpack map in openpi's encoding"),
        (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
        (b"\xc6\xff\xff\xff\xff", "incomplete"),
        (b"\x91" * 5000, "must be a msgpack map in openpi's encoding"),
        (b"\xa2\xff\xfe", "utf-8"),
        (b"\xd4\x05a", "max_ext_len"),
        (msgpack.packb(3), "must be a map, got int"),
        (msgpack.packb(ARRAY), "must be a map, got ndarray"),
        (msgpack.packb([[[]] * 9] * 9), "more than 64 lists"),
        (msgpack.packb({"x": [{}] * 70}), "exceeds max_array_len"),
        (msgpack.packb({"image": ARRAY | {b"dtype": "|O"}}), "dtype must be one of"),
        (msgpack.packb({"image": ARRAY | {b"dtype": "(1000000,1000000)f8"}}), "dtype must be one of"),
        (msgpack.packb({"image": ARRAY | {b"dtype": [1]}}), "dtype must be one of"),
        (msgpack.packb({"image": ARRAY | {b"shape": [1 << 31, 1 << 31, 3]}}), "holds 12 bytes"),
        (msgpack.packb({"image": ARRAY | {b"shape": [-2, -2, 3]}}), "list of sizes"),
        (msgpack.packb({"image": ARRAY | {b"shape": 12}}), "list of sizes"),
        (msgpack.packb({"image": ARRAY | {b"data": b"\0" * 11}}), "holds 11 bytes"),
        (msgpack.packb({"image": ARRAY | {b"data": None}}), "holds NoneType"),
    ],
)
def test_messages_of_strangers(message: bytes | str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        unpack(message)


def test_a_message_beyond_the_limit_ends_its_connection() -> None:
    with serving(Stub()) as server:
        client, other = client_of(server), client_of(server)
        with pytest.raises(websockets.exceptions.ConnectionClosedError, match="1009"):
            client.infer({"image": np.zeros(LIMITS.message_bytes, np.uint8)})
        assert other.infer(asks("2"))["actions"][0, 0] == 2


def test_images_of_any_size_fit_a_message() -> None:
    image, depth = np.zeros((300, 200, 3), np.uint8), np.ones((300, 200))
    observation = {"image": image, "depth": depth, "prompt": "å" * 1000, "intrinsics": np.eye(3), "unnorm_key": "toy"}
    limits = room_for_images(Limits(message_bytes=1000, image_sizes=((8, 8), (300, 200))))
    assert len(pack(observation)) <= limits.message_bytes
    assert room_for_images(LIMITS) == LIMITS


def test_values_of_strangers() -> None:
    for observation in ({"image": 1}, {"depth": [1.0]}, {"reset": 1}, {b"image": 1}, {3: 4}):
        with pytest.raises(InputError):
            check(observation, LIMITS)
