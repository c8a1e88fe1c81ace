"""The page of a running server: who gets it, what it requests, and how it works in a real browser."""

import base64
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import browser
from helpers.serving import Stub, asks, client_of, eventually, get, observations, serving
from PIL import Image
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from spatialvla_jax import Policy
from spatialvla_jax.errors import InputError
from spatialvla_jax.inference.explain import explain
from spatialvla_jax.serving.client import Client
from spatialvla_jax.serving.server import Server


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


def test_the_page_is_for_this_machine_or_for_those_with_the_token() -> None:
    with serving(Stub()) as server:
        status, html = get(server, "/")
        assert status == 200 and server.page.ticket in html and "{{" not in html
        assert get(server, "/", Host="localhost:80")[0] == get(server, "/", Host=f"[::1]:{server.port}")[0] == 200
        for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1@evil.example", "192.168.0.2"):
            assert get(server, "/", Host=host)[0] == 403, "a name that a stranger lets resolve to this machine"
        assert get(server, "/?ticket=" + server.page.ticket)[0] == get(server, "/?x")[0] == 404
    with serving(Stub(), token="secret") as server:
        for authorization in ("Api-Key secret", basic("secret")):
            status, html = get(server, "/", Authorization=authorization, Host="robot.example")
            assert status == 200 and server.page.ticket in html and "secret" not in html
        for authorization in ("", "Api-Key other", basic("other"), basic("secret\0"), "Basic é", "Basic ="):
            assert get(server, "/", Authorization=authorization)[0] == 401
        assert get(server, "/metrics", Authorization=basic("secret"))[0] == 200


@pytest.mark.parametrize("token", ["", "secret"])
def test_only_the_page_s_own_socket_is_let_in(token: str) -> None:
    with serving(Stub(), token=token) as server, serving(Stub(), token=token) as other:
        address, origin = f"ws://127.0.0.1:{server.port}", {"origin": "http://127.0.0.1"}
        connect(f"{address}/?ticket={server.page.ticket}", **origin).close()
        for path in ("", f"/?ticket={other.page.ticket}", "/?ticket=", "/?ticket=é"):
            with pytest.raises((InvalidStatus, UnicodeError), match=r"40[13]|ascii"):
                connect(address + path, **origin).close()


def test_an_explained_reply_has_the_same_tokens(server: Server, policy: Policy) -> None:
    client, asked = client_of(server), observations(1, seed=5)[0]
    expected = policy.infer(asked)
    before = client.infer(asked)
    answer = client.infer(asked | {"explain": True})
    for key in ("actions", "action_ids"):
        np.testing.assert_array_equal(answer[key], expected[key])
    for key, value in explain(policy, policy.prepare(asked), expected["action_ids"]).items():
        np.testing.assert_array_equal(answer[key], value)
    timing = answer["server_timing"]
    assert timing.keys() == {"infer_ms", "batch", "prepare_ms", "wait_ms", "explain_ms"} and min(timing.values()) > 0
    assert client.infer(asked).keys() == before.keys() == {"actions", "action_ids", "server_timing"}
    assert server.explaining == 0
    with pytest.raises(RuntimeError, match="'explain' must be a bool, got int"):
        client.infer(asked | {"explain": 1})
    with pytest.raises(RuntimeError, match=r"'image' is 40x64: this server is compiled for 48x64"):
        client.infer({"image": asked["image"][:40], "depth": asked["depth"][:40], "prompt": "go", "explain": True})


def test_an_explanation_takes_nothing_from_a_robot_s_chunk() -> None:
    """Its chunk is planned separately, whatever the server executes, and no batch waits for the page's reader."""
    with serving(Stub(), execute="open_loop") as server:
        client = Client(f"ws://127.0.0.1:{server.port}")
        first = client.infer(asks("3"))["actions"]
        with pytest.raises(InputError, match="the policy failed on this observation"):  # a stub cannot be explained
            client.infer(asks("5") | {"explain": True})
        assert server.explaining == 0
        np.testing.assert_array_equal(client.infer(asks("3"))["actions"], first)
        assert [batch[0]["prompt"] for batch in server.policy.batches[-2:]] == ["3", "5"]


@pytest.mark.slow
def test_the_page_in_a_browser(served: Policy, policy: Policy, tmp_path: Path) -> None:
    asked = observations(1, seed=7)[0]
    Image.fromarray(asked["image"]).save(tmp_path / "image.png")
    millimetres = np.round(1000 * asked["depth"]).astype(np.uint16)
    Image.fromarray(millimetres).save(tmp_path / "depth.png")
    np.save(tmp_path / "depth.npy", (0.001 * millimetres.astype(np.float64)).astype(np.float32))
    np.save(tmp_path / "odd.npy", millimetres[None])
    expected = policy.infer(asked | {"depth": 0.001 * millimetres.astype(np.float32)})
    with browser() as page, serving(served, token="secret") as server:
        page.open(f"http://me:secret@127.0.0.1:{server.port}/")
        page.wait_for("document.body?.dataset.state === 'ready'")
        assert page.evaluate("[...document.querySelectorAll('#key option')].map((o) => o.value)") == ["toy"]

        def ask() -> str:
            page.evaluate("document.body.dataset.state = ''; document.querySelector('#ask').click()")
            page.wait_for("['done', 'failed'].includes(document.body.dataset.state)")
            return page.evaluate("document.querySelector('#message').textContent")

        assert ask() == "choose a picture first"
        page.choose_file("#picture", tmp_path / "image.png")
        page.evaluate(f"document.querySelector('#prompt').value = {asked['prompt']!r}")
        assert "'depth' must be metres" in ask()
        page.choose_file("#depth", tmp_path / "odd.npy")
        assert ask().startswith("odd.npy must hold an array [height, width]")
        camera = [float(asked["intrinsics"][i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2))]
        page.evaluate(f"{camera}.forEach((x, i) => document.querySelector('#camera').elements[i].value = x)")
        for name in ("depth.png", "depth.npy"):
            page.choose_file("#depth", tmp_path / name)
            assert ask() == ""
            assert page.evaluate("[...answer.action_ids]") == expected["action_ids"].ravel().tolist()
            depth = np.array(page.evaluate("[...answer.depth]")).reshape(56, 56)
            assert set(np.round(1000 * depth).astype(int).ravel()) <= set(millimetres.ravel().tolist())
        chosen = page.evaluate("[...document.querySelectorAll('.chosen')].map((row) => row.title)")
        assert chosen == [f"action token {i}" for i in expected["action_ids"].ravel()]
        for view in ("image", "depth-map", "cloud"):
            pixels = f"document.querySelector('#{view}').getContext('2d').getImageData(0, 0, 400, 300).data"
            assert page.evaluate(f"new Set({pixels}).size") > 20, view
        assert page.evaluate("document.querySelector('#latency').rows.length") == 7
        page.wait_for("document.querySelector('#live').rows[1].cells[2].textContent === '2'")  # answered
        assert page.evaluate("document.querySelector('#live').rows[1].cells[3].textContent") == "1"  # refused
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
        assert not page.problems
        eventually(lambda: not server.clients)  # the page holds no connection while nothing is asked
