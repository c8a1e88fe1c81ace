"""The two methods a robot needs, and a server of openpi's protocol that is no more than the protocol."""

import threading

import numpy as np
import pytest
from openpi_client import msgpack_numpy
from websockets.sync.server import serve

from spatialvla_jax.errors import InputError
from spatialvla_jax.serving.client import Agent, Client
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


@pytest.fixture(scope="module")
def address():
    def talk(connection):
        connection.send(pack(METADATA))
        for message in connection:
            observation = unpack(message)
            if observation["prompt"] == "nonsense":
                connection.send("observation 'prompt' makes no sense")
            else:
                doubled = observation["image"].astype(np.float32) * 2
                connection.send(msgpack_numpy.packb({"actions": doubled, "timing": {"ms": np.float32(1.5)}}))

    with serve(talk, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()


def test_a_client_sends_and_gets_arrays(address: str) -> None:
    """And numbers of NumPy's, packed as openpi packs them."""
    client = Client(address)
    assert client.metadata == METADATA
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    answer = client.infer({"image": image, "prompt": "go", "reset": True})
    np.testing.assert_array_equal(answer["actions"], 2.0 * image)
    assert answer["actions"].dtype == np.float32 and answer["timing"] == {"ms": 1.5}
    with pytest.raises(InputError, match="makes no sense"):
        client.infer({"image": image, "prompt": "nonsense"})
    assert client.infer({"image": image, "prompt": "go"})["actions"].shape == (2, 4, 3), "the connection goes on"
    client.close()
    with pytest.raises(InputError, match="no policy server at"):
        Client("ws://127.0.0.1:9")
