"""The two methods that a robot needs, and a minimal server of openpi's protocol."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest
from openpi_client import msgpack_numpy
from websockets.server import ServerProtocol
from websockets.sync.client import connect
from websockets.sync.server import serve

from spatialvla_jax.errors import InputError
from spatialvla_jax.serving.client import REPLY_BYTES, Agent, Client
from spatialvla_jax.serving.protocol import pack, unpack

METADATA = {"unnorm_keys": [f"dataset_{i}" for i in range(40)], "needs_depth": True, "action_chunk": 2}


def test_an_agent_asks_where_a_chunk_is_due_and_forgets_at_reset() -> None:
    asked = []

    def infer(observation):
        asked.append(observation)
        return {"actions": np.arange(14, dtype=np.float32).reshape(2, 7) + 100 * len(asked)}

    agent = Agent(infer, execute="open_loop", unnorm_key="bridge")
    agent.reset("open the drawer")
    first = [float(agent.step({"image": i})[0]) for i in range(3)]
    agent.reset("close it")
    first.append(float(agent.step({"image": 3})[0]))
    assert first == [100, 107, 200, 300]
    assert [(o["image"], o["prompt"], o["reset"], o["unnorm_key"]) for o in asked] == [
        (0, "open the drawer", True, "bridge"),
        (2, "open the drawer", False, "bridge"),
        (3, "close it", True, "bridge"),
    ]


def test_an_agent_drops_the_chunk_of_another_instruction() -> None:
    """The same holds for another `unnorm_key`, wherever it comes from."""
    asked = []

    def infer(observation):
        asked.append((observation["prompt"], observation.get("unnorm_key")))
        return {"actions": np.full((4, 7), len(asked), np.float32)}

    for execute in ("open_loop", "adaptive"):
        asked.clear()
        agent = Agent(infer, execute)
        agent.reset("open the drawer")
        agent.step({})
        agent.instruction = "close it"
        assert float(agent.step({})[0]) == 2
        agent.unnorm_key = "bridge"
        assert float(agent.step({})[0]) == 3
        agent.unnorm_key = None
        assert float(agent.step({"unnorm_key": "fractal"})[0]) == 4
        assert asked[1:] == [("close it", None), ("close it", "bridge"), ("close it", "fractal")]


def test_an_agent_without_an_instruction_asks_for_one() -> None:
    agent = Agent(lambda _: {"actions": np.ones((2, 7), np.float32)})
    with pytest.raises(InputError, match="call reset"):
        agent.step({})
    agent.reset("open the drawer")
    for instruction in ("", " ", None, 3):
        with pytest.raises(InputError, match="an instruction must be a non-empty string, got"):
            agent.reset(instruction)
        with pytest.raises(InputError, match="call reset"):
            agent.step({})
    agent.reset("open the drawer")
    with pytest.raises(InputError, match="an observation must be a dict, got list"):
        agent.step([])


GOOD = np.ones((2, 7), np.float32)
ARRAY = {b"__ndarray__": True, b"data": GOOD.tobytes(), b"dtype": "<f4", b"shape": [2, 7]}
# invalid "actions" -> words in the error
NO_CHUNKS = [
    (None, r"numbers of shape \[steps, .*\], got object"),
    ("go", "got <U2"),
    (0.5, r"got float64\[\]"),
    ({"x": 1}, "got object"),
    ([[1.0] * 7, [1.0] * 6], "got rows of different lengths"),
    ([["0"] * 7], "got <U1"),
    (GOOD > 0, r"got bool\[2, 7\]"),
    (GOOD[0], r"got float32\[7\]"),
    (GOOD[:0], r"got float32\[0, 7\]"),
    (GOOD[:, :0], r"got float32\[2, 0\]"),
    (GOOD[None], r"got float32\[1, 2, 7\]"),
    (np.where(np.eye(2, 7) > 0, np.nan, GOOD), "hold 2 numbers that are NaN or infinite"),
    (-GOOD * np.inf, "hold 14 numbers"),
    (GOOD.astype(np.float64) * 1e300, "hold 14 numbers"),  # as float32
]


@pytest.mark.parametrize(("actions", "message"), [*NO_CHUNKS, (GOOD[:, :6], "steps, 7"), (np.ones((2, 8)), "steps, 7")])
def test_an_agent_takes_no_action_from_such_replies(actions: Any, message: str) -> None:
    replies: list[Any] = [{"actions": GOOD}, {"actions": actions}, {"actions": [[2] * 7]}]
    agent = Agent(lambda _: replies.pop(0), execute="receding:1")
    agent.reset("go")
    agent.step({})
    with pytest.raises(InputError, match=message):
        agent.step({})
    assert agent.step({}).tolist() == [2] * 7, "and may go on"


@pytest.mark.parametrize("reply", [None, [GOOD], {}, {"action": GOOD}, b"actions"])
def test_an_agent_needs_a_reply_with_actions(reply: Any) -> None:
    agent = Agent(lambda _: reply)
    agent.reset("go")
    with pytest.raises(InputError, match="a reply must be a map with 'actions', got"):
        agent.step({})


# --- a server of openpi's protocol ---------------------------------------------------------------------------------


@contextmanager
def serving(talk: Any) -> Iterator[str]:
    with serve(talk, "127.0.0.1", 0, max_size=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def address():
    """The prompt selects the reply: one of REPLIES, or actions of twice the state."""

    def talk(connection):
        connection.send(pack(METADATA))
        for message in connection:
            observation = unpack(message)
            prompt = observation.get("prompt")
            if prompt == "close":
                return
            if prompt in REPLIES:
                connection.send(REPLIES[prompt][0])
            elif prompt != "wait":
                doubled = observation["image"].astype(np.float32) * 2
                connection.send(msgpack_numpy.packb({"actions": doubled, "timing": {"ms": np.float32(1.5)}}))

    with serving(talk) as address:
        yield address


def reply(**changes: Any) -> bytes:
    return msgpack.packb({"actions": ARRAY | {key.encode(): value for key, value in changes.items()}})


# prompt -> (the server's reply, words in the error)
REPLIES: dict[str, tuple[bytes | str, str]] = {
    "text": ("observation 'prompt' makes no sense", "makes no sense"),
    "lines": ("Traceback:\n  File\n", "Traceback: File$"),
    "no text": (" \n", "an empty message$"),
    "empty": (b"", "must be a msgpack map in openpi's encoding"),
    "garbage": (b"\xc1\xff\x00", "must be a msgpack map in openpi's encoding"),
    "half": (reply()[:-9], "must be a msgpack map in openpi's encoding"),
    "more": (reply() + b"\x01", "must be a msgpack map in openpi's encoding"),
    "deep": (b"\x91" * 5000, "must be a msgpack map in openpi's encoding: StackError$"),
    "many": (msgpack.packb([[]] * 20_000), "more than 10000 lists"),
    "list": (msgpack.packb([1, 2]), "a reply must be a map, got list"),
    "array": (msgpack.packb(ARRAY), "a reply must be a map, got ndarray"),
    "none": (msgpack.packb({}), "a map with 'actions', got a map with nothing"),
    "other": (msgpack.packb({"action": 1, "t": 2}), "got a map with action, t"),
    "size": (reply(shape=[2, 8]), r"an array <f4\[2, 8\] holds 56 bytes"),
    "sizes": (reply(shape=[1 << 31, 1 << 31]), "holds 56 bytes"),
    "shape": (reply(shape=[-2, -7]), "list of sizes"),
    "object": (reply(dtype="|O"), "dtype must be one of"),
    "large": (reply(dtype="(100000,100000)f8"), "dtype must be one of"),
    "strings": (reply(dtype="<U2"), "dtype must be one of"),
    "data": (reply(data=None), "holds NoneType"),
    "huge": (b"\0" * (REPLY_BYTES + 1), "closed the connection: .*too big"),
    **{f"actions {i}": (pack({"actions": x}), text) for i, (x, text) in enumerate(NO_CHUNKS) if x is not None},
}


@pytest.fixture(scope="module")
def client(address: str) -> Client:
    return Client(address)


@pytest.mark.parametrize("prompt", REPLIES)
def test_a_client_refuses_what_is_no_reply_and_goes_on(client: Client, prompt: str) -> None:
    with pytest.raises(InputError, match=f"^{client.address}[: ].*{REPLIES[prompt][1].replace('<U', '.*')}"):
        client.infer({"prompt": prompt})
    assert client.infer({"image": GOOD, "prompt": "go"})["actions"].shape == (2, 7)


def test_a_client_connects_anew_after_silence_and_after_a_farewell(address: str) -> None:
    """A late reply is never taken for the reply to the next message."""
    client = Client(address)
    first, client.timeout = client.connection, 0.2
    with pytest.raises(InputError, match=rf"{address}: no reply in 0.2 s"):
        client.infer({"prompt": "wait"})
    client.timeout = 60
    np.testing.assert_array_equal(client.infer({"image": 3 * GOOD, "prompt": "go"})["actions"], 6 * GOOD)
    assert client.connection is not first
    with pytest.raises(InputError, match=f"{address} closed the connection"):
        client.infer({"prompt": "close"})
    np.testing.assert_array_equal(client.infer({"image": 4 * GOOD, "prompt": "go"})["actions"], 8 * GOOD)


def test_a_client_sends_and_gets_arrays(address: str) -> None:
    """NumPy scalars too, encoded as openpi does."""
    client = Client(address)
    assert client.metadata == METADATA
    image = np.arange(24, dtype=np.uint8).reshape(4, 6)
    answer = client.infer({"image": image, "prompt": "go", "reset": True})
    np.testing.assert_array_equal(answer["actions"], 2.0 * image)
    assert answer["actions"].dtype == np.float32 and answer["timing"] == {"ms": 1.5}
    for unfit in (object(), 1 << 70, "\ud800", np.array(["a"]), [image, {1: np.array([None])}]):
        with pytest.raises(InputError, match=r"a message holds numbers|cannot be packed"):
            client.infer({"image": image, "prompt": unfit})
    with pytest.raises(InputError, match="an observation must be a dict, got list"):
        client.infer([image])
    client.close()


def test_a_server_that_no_longer_reads_does_not_hold_a_client_for_ever() -> None:
    """The message is larger than the system's socket buffers."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            peer, protocol = listener.accept()[0], ServerProtocol()
            while not (requests := protocol.events_received()):
                protocol.receive_data(peer.recv(1 << 16))
            protocol.send_response(protocol.accept(requests[0]))
            protocol.send_binary(pack(METADATA))
            peer.sendall(b"".join(protocol.data_to_send()))
            done.wait(300)
            peer.close()

        threading.Thread(target=greet, daemon=True).start()
        client = Client(f"ws://127.0.0.1:{listener.getsockname()[1]}", timeout=0.5, wait=120)
        client.started = 0.0  # the greeting may take long, a reply may not
        try:
            with pytest.raises(InputError, match=r"no reply in 0\.5 s"):
                client.infer({"image": np.zeros(30 << 20, np.uint8), "prompt": "go"})
        finally:
            done.set()


@pytest.mark.parametrize("greeting", ["busy", b"\xc1", msgpack.packb([]), None])
def test_a_server_that_does_not_say_what_it_is(greeting: Any) -> None:
    def talk(connection):
        if greeting is not None:
            connection.send(greeting)

    with serving(talk) as address, pytest.raises(InputError, match=f"^{address}[: ]"):
        Client(address)


def test_a_client_waits_for_a_server_that_starts(address: str, monkeypatch) -> None:
    """It waits for the port to open and then for replies, however short the timeout of later replies."""
    refused = [ConnectionRefusedError(), ConnectionRefusedError()]

    def connect_late(*args: Any, **options: Any) -> Any:
        if refused:
            raise refused.pop()
        return connect(*args, **options)

    monkeypatch.setattr("websockets.sync.client.connect", connect_late)
    client = Client(address, timeout=0, wait=120)
    assert client.metadata == METADATA and not refused
    np.testing.assert_array_equal(client.infer({"image": GOOD, "prompt": "go"})["actions"], 2 * GOOD)
    client.started = 0.0
    with pytest.raises(InputError, match="no reply in 0 s"):
        client.infer({"prompt": "wait"})


def test_where_there_is_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        thread = threading.Thread(target=lambda: other.accept()[0].close(), daemon=True)
        thread.start()
        addresses = [
            f"ws://127.0.0.1:{other.getsockname()[1]}",
            "ws://127.0.0.1:9",
            "ws://127.0.0.1:99999",
            "ws://",
            "x",
        ]
        for address in (*addresses, f"ws://{'a' * 80}.example"):
            with pytest.raises(InputError, match=f"no policy server at {address}: "):
                Client(address)
