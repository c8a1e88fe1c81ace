"""Observations and actions as msgpack in openpi's encoding; unpacking is safe for untrusted input."""

import math
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import numpy as np

from spatialvla_jax.errors import InputError

KEYS = ("image", "prompt", "intrinsics", "depth", "depth_unit", "unnorm_key", "reset", "explain")
DTYPES = ("|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8")


@dataclass(frozen=True)
class Limits:
    """Limits on each client and on the whole server."""

    message_bytes: int = 16 << 20
    prompt_characters: int = 1000
    image_sizes: tuple[tuple[int, int], ...] = ()  # (height, width) to compile for; empty: the model's own
    clients: int = 128
    queue: int = 64  # observations waiting for the policy
    batch: int = 32
    wait: float = 0.004  # seconds that a batch waits for more clients


LIMITS = Limits()
PIXEL = 3 + 8  # bytes: colours, and depth in the largest of DTYPES
REST = 2**16  # bytes of an observation beside image and depth


def room_for_images(limits: Limits) -> Limits:
    """The limits with `message_bytes` raised to fit an observation of the largest image size."""
    sizes = [PIXEL * height * width + REST for height, width in limits.image_sizes]
    return replace(limits, message_bytes=max(limits.message_bytes, *sizes, 0))


def pack(message: dict) -> bytes:
    """Encode as msgpack, arrays as openpi's map {__ndarray__, data, dtype, shape}. Raises InputError for other
    types."""

    def encode(value: Any) -> Any:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise InputError(f"a message holds numbers, texts and arrays of numbers, not {type(value).__name__}")
        return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}

    try:
        return msgpack.packb(message, default=encode)
    except InputError:
        raise
    except (OverflowError, TypeError, ValueError) as error:
        raise InputError(f"the message cannot be packed: {error}") from None


def unpack(message: bytes | str) -> dict[Any, Any]:
    """Inverse of `pack` for untrusted observations: only numbers, strings, arrays of `DTYPES` and a few containers.

    Raises InputError for anything else. Memory is bounded by the message's size, whatever lengths the message claims.
    """
    return _unpack(message, "an observation", 64, max_array_len=16, max_map_len=16, max_str_len=10_000)


def unpack_reply(message: bytes | str) -> dict[Any, Any]:
    """`unpack` for a server's replies and metadata, which may be larger and hold anything msgpack can."""
    return _unpack(message, "a reply", 10_000, strict_map_key=False)


def _unpack(message: bytes | str, what: str, most: int, **limits: int) -> dict[Any, Any]:
    containers = 0

    def seen(value: Any) -> Any:
        nonlocal containers
        containers += 1
        if containers > most:
            raise InputError(f"the message holds more than {most} lists and maps")
        return value

    def decode(value: dict[Any, Any]) -> Any:
        seen(value)
        if b"__npgeneric__" in value:
            return value.get(b"data")
        if b"__ndarray__" not in value:
            return value
        data, dtype, shape = (value.get(key) for key in (b"data", b"dtype", b"shape"))
        if dtype not in DTYPES:
            raise InputError(f"an array's dtype must be one of {', '.join(DTYPES)}, got {dtype!r:.40}")
        if not (isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 32 for n in shape)):
            raise InputError(f"an array's shape must be a list of sizes, got {shape!r:.40}")
        if not (isinstance(data, bytes) and len(data) == math.prod(shape) * np.dtype(dtype).itemsize):
            got = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
            raise InputError(f"an array {dtype}{shape} holds {got}")
        return np.frombuffer(data, dtype).reshape(shape)

    if isinstance(message, str):
        raise InputError(f"{what} must be a binary msgpack message, got text: {message:.200}")
    try:
        value = msgpack.unpackb(message, object_hook=decode, list_hook=seen, max_ext_len=0, **limits)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{what} must be a msgpack map in openpi's encoding: {str(error) or type(error).__name__}"
        ) from None
    if not isinstance(value, dict):
        raise InputError(f"{what} must be a map, got {type(value).__name__}")
    return value


def check(observation: dict[Any, Any], limits: Limits) -> None:
    """Raises InputError for unknown keys, wrong types and a prompt that is too long."""
    for key in observation:
        if key not in KEYS:
            raise InputError(f"observation key {key!r:.40} is not known; choose one of {', '.join(KEYS)}")
    for key, kind in (("prompt", str), ("unnorm_key", str), ("reset", bool), ("explain", bool)):
        value = observation.get(key)
        if value is not None and not isinstance(value, kind):
            raise InputError(f"observation {key!r} must be a {kind.__name__}, got {type(value).__name__}")
    for key in ("image", "depth", "intrinsics"):
        value = observation.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise InputError(f"observation {key!r} must be an array, got {type(value).__name__}")
    if len(observation.get("prompt") or "") > limits.prompt_characters:
        raise InputError(f"observation 'prompt' may have at most {limits.prompt_characters} characters")
