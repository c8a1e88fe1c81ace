"""Random observations give finite actions or one sentence, from the policy and through the server."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.batches import observation as random_observation
from helpers.toy_rlds import INTRINSICS
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection, connect

from spatialvla_jax import Policy, load_pretrained
from spatialvla_jax.errors import InputError, NonFiniteError
from spatialvla_jax.inference.action_chunking import chunk_of
from spatialvla_jax.models import SpatialVLA
from spatialvla_jax.serving.protocol import Limits, pack, unpack_reply
from spatialvla_jax.serving.server import Server
from spatialvla_jax.utils.camera import intrinsics_problem

SIZE = 48, 64  # of all valid images: each size is compiled for
KEYS = ("image", "prompt", "intrinsics", "depth", "depth_unit", "unnorm_key", "draft", "reset", "state")
NUMBERS = (0, 1, -1, 0.5, 255, 1e-45, 1e-30, 1e4, 1e30, 3e38, 1e300, -1e300, np.nan, np.inf, -np.inf)
DTYPES = ("u1", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "b1", "U1", "O", ">f4")
SHAPES = (
    (),
    (0,),
    (3,),
    (3, 3),
    (4, 4),
    (1, 3, 3),
    (4, 3),
    SIZE,
    (47, 64),
    (48, 0),
    (*SIZE, 1),
    (*SIZE, 3),
    (0, 64, 3),
)
ODD = (
    *(
        None,
        True,
        3,
        -1,
        10**400,
        1j,
        "",
        " ",
        "x",
        "\0",
        "\ud800",
        "toy",
        "word " * 400,
        b"a",
        object(),
        len,
        {},
        {1: 2},
    ),
    *([], [[]], [[1, 2], [3]], [np.nan] * 3, [[0] * 3] * 3, np.float32(2), np.bool_(1), np.str_("toy"), Path("a")),
)


def filled(dtype: str, shape: tuple[int, ...], number: float) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.full(shape, number).astype(dtype)


ARRAYS = st.builds(filled, st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.sampled_from(NUMBERS))
VALID: dict[str, st.SearchStrategy[Any]] = {
    "image": st.builds(filled, st.just("u1"), st.just((*SIZE, 3)), st.integers(0, 255)),
    "prompt": st.sampled_from(["open the drawer", "Öffne", "开", "pick up object 3", "a"]),
    "intrinsics": st.one_of(st.none(), st.floats(0.5, 4).map(lambda zoom: INTRINSICS * np.array([zoom, zoom, 1]))),
    "depth": st.builds(filled, st.sampled_from(["f2", "f4", "f8"]), st.just(SIZE), st.floats(0.1, 50)),
    "unnorm_key": st.sampled_from([None, "toy"]),
    "reset": st.booleans(),
}


@st.composite
def draws(draw: st.DrawFn) -> tuple[str, dict[Any, Any]]:
    """(where it is sent, observation)"""
    way, seen = draw(st.sampled_from(("policy", "server"))), random_observation(draw(st.integers(0, 9)), SIZE)
    if draw(st.booleans()):
        return way, seen | {key: draw(VALID[key]) for key in draw(st.sets(st.sampled_from([*VALID]), max_size=3))}
    for key in draw(st.sets(st.sampled_from(KEYS), min_size=1, max_size=3)):
        change = draw(st.sampled_from(("odd", "array", "number", "none")))
        if change == "number" and isinstance(seen.get(key), np.ndarray):  # one part of a valid observation is replaced
            seen[key] = seen[key].astype(np.float64)
            seen[key].flat[draw(st.integers(0, seen[key].size - 1))] = draw(st.sampled_from(NUMBERS))
        elif change == "none":
            seen.pop(key, None)
        else:
            seen[key] = draw(st.sampled_from(ODD) if change == "odd" else ARRAYS)
    if way == "server" and draw(st.integers(0, 9)) == 0:
        seen[draw(st.sampled_from((3, b"image", "images")))] = draw(ARRAYS)
    return way, seen


@pytest.fixture(scope="module")
def policy(trained: Path) -> Policy:
    """Prompts have up to 16 tokens, as compiled by the server's tests."""
    model, params, processor = load_pretrained(trained)
    assert processor
    return Policy(SpatialVLA(replace(model.config, prompt_length=16)), params, processor, speculate=True)


@pytest.fixture(scope="module")
def ask(policy: Policy) -> Iterator[Callable[[str, dict], dict]]:
    """(where, observation) → the result, or an InputError."""
    loop, limits = asyncio.new_event_loop(), Limits(image_sizes=(SIZE,), batch=1)
    server = Server(lambda: policy, "127.0.0.1", 0, limits=limits)

    async def connected() -> ClientConnection:
        await server.start()
        await server.prepared
        connection = await connect(f"ws://127.0.0.1:{server.port}")
        await connection.recv()
        return connection

    async def exchange(message: bytes) -> bytes | str:
        await connection.send(message)
        return await connection.recv()

    connection = loop.run_until_complete(connected())

    def ask(way: str, seen: dict) -> dict:
        if way == "policy":
            prepared = policy.prepare(seen)
            assert all(np.isfinite(array).all() for array in prepared.values())
            assert intrinsics_problem(prepared["intrinsics"], prepared["image"].shape[:2]) == ""
            assert prepared["depth"].min() >= 0 and 0 < prepared["depth"].max() <= 1000
            return policy.act([prepared])[0]
        answer = loop.run_until_complete(exchange(pack(seen)))
        if isinstance(answer, str):
            assert "the policy failed on this observation" not in answer
            raise InputError(answer)
        return unpack_reply(answer)

    yield ask
    loop.run_until_complete(server.drain())


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_observation_gets_finite_actions_or_a_sentence(examples: int, policy: Policy, ask) -> None:
    outcomes, ranges = Counter(), policy.processor.grid.token_ranges

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(draws())
    def one(drawn: tuple[str, dict]) -> None:
        try:
            result = ask(*drawn)
        except InputError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 600, error
            outcomes["refused"] += 1
            return
        if result == {"reset": True}:
            outcomes["reset"] += 1
            return
        assert chunk_of(result, action_dim=7).shape == (4, 7)
        for (start, size), ids in zip(ranges, result["action_ids"].T, strict=True):
            assert (start <= ids).all() and (ids < start + size).all()
        outcomes["answered"] += 1

    one()
    assert outcomes["answered"] >= 0.3 * outcomes.total() >= 0.3 * examples and outcomes["refused"] > 0.2 * examples


@pytest.mark.parametrize("examples", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_numbers_that_prepare_has_let_through_are_the_model_s_to_refuse(examples: int, policy: Policy) -> None:
    """Whatever overwrites the arrays that `act` takes, its actions are finite, or it returns none."""
    good = policy.prepare(random_observation(1, SIZE))

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(["depth", "intrinsics", "bounds"]), st.sampled_from(NUMBERS), st.booleans(), st.data())
    def one(key: str, number: float, everywhere: bool, data: st.DataObject) -> None:
        with np.errstate(over="ignore"):
            number = np.float32(number)
        array = good[key].copy()
        part = array[:2] if key == "bounds" else array  # low and high; the third row says which dimensions have them
        part.flat[slice(None) if everywhere else data.draw(st.integers(0, part.size - 1))] = number
        try:
            (result,) = policy.act([good | {key: array}])
        except NonFiniteError:
            return
        assert np.isfinite(chunk_of(result)).all() and not (everywhere and not np.isfinite(number))

    one()
