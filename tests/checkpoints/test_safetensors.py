"""safetensors: whatever the official library refuses is refused here, and damage never becomes numbers."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from spatialvla_jax.checkpoints.safetensors_io import NAMES, open_directory, open_file, write_directory, write_file
from spatialvla_jax.checkpoints.types import LazyArray
from spatialvla_jax.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, tuple[str, list[int], bytes]]


def lazy(**arrays: np.ndarray) -> dict[str, LazyArray]:
    return {key: LazyArray.of(x) for key, x in arrays.items()}


def official(content: bytes) -> Tensors | None:
    """The official library's result for a file; None if it refuses the file."""
    try:
        found = deserialize(content)
    except SafetensorError:
        return None
    return {key: (x["dtype"], list(x["shape"]), bytes(x["data"])) for key, x in found}


def ours(file: Path) -> Tensors | None:
    """Our reader's result. A refusal must be one line that names the file."""
    try:
        return {k: (NAMES[x.dtype], list(x.shape), x.read().tobytes()) for k, x in open_file(file).items()}
    except InputError as error:
        assert str(file) in str(error) and "\n" not in str(error) and str(error).isprintable()
        return None


def packed(header: str | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    return len(text).to_bytes(8, "little") + text + data


def one(entry: str, data: bytes = bytes(8)) -> bytes:
    return packed(f'{{"a":{entry}}}', data)


def entry(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]") -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


def two(first: str, second: str, size: int) -> bytes:
    return packed(f'{{"a":{entry(offsets=first)},"b":{entry(offsets=second)}}}', bytes(size))


FILES = {
    "one": one(entry()),
    "nothing in it": packed("{}"),
    "space around": packed(f' {{"a":{entry()}}}\n ', bytes(8)),
    "scalar": one(entry(shape="[]", offsets="[0,4]"), bytes(4)),
    "empty tensor": packed(f'{{"b":{entry(shape="[0,7]", offsets="[0,0]")},"a":{entry()}}}', bytes(8)),
    "empty tensor last": packed(f'{{"b":{entry(shape="[0]", offsets="[8,8]")},"a":{entry()}}}', bytes(8)),
    "other order": two("[8,16]", "[0,8]", 16),
    "metadata": packed(f'{{"__metadata__":{{"x":"y"}},"a":{entry()}}}', bytes(8)),
    "metadata null": packed(f'{{"__metadata__":null,"a":{entry()}}}', bytes(8)),
    "integers": one(entry('"I64"', "[1]")),
    "empty file": b"",
    "length alone": bytes(8),
    "length beyond the file": (10**6).to_bytes(8, "little") + b"{}",
    "length beyond reason": (2**63).to_bytes(8, "little") + b"{}",
    "not UTF-8": packed(b'{"\xff":' + entry().encode() + b"}", bytes(8)),
    "half a surrogate pair": packed(f'{{"\\ud800":{entry()}}}', bytes(8)),
    "NUL behind": packed(f'{{"a":{entry()}}}\0', bytes(8)),
    "byte order mark": packed(f'\ufeff{{"a":{entry()}}}', bytes(8)),
    "array": packed("[]"),
    "string": packed('"a"'),
    "very deep": packed('{"a":' + "[" * 10**5),
    "no entry": one("null"),
    "no shape": one('{"dtype":"F32","data_offsets":[0,8]}'),
    "unknown dtype": one(entry('"F33"')),
    "dtype a number": one(entry("32")),
    "dtype null": one(entry("null")),
    "dtype a list": one(entry('["F32"]')),
    "shape a number": one(entry(shape="2")),
    "shape null": one(entry(shape="null", offsets="[0,4]")),
    "shape of fractions": one(entry(shape="[2.0]")),
    "shape of strings": one(entry(shape='["2"]')),
    "shape of booleans": one(entry('"U8"', "[true]", "[0,1]"), bytes(1)),
    "shape negative": one(entry(shape="[-1,-2]")),
    "shape minus zero": one(entry(shape="[-0]", offsets="[0,0]"), b""),
    "shape too large": one(entry(shape="[4611686018427387904,4]", offsets="[0,0]"), b""),
    "shape beyond 64 bits": one(entry(shape=f"[{2**64 + 2}]")),
    "shape endless": one(entry(shape=f"[{'9' * 5000}]")),
    "shape NaN": one(entry(shape="[NaN]")),
    "shape larger": one(entry(shape="[3]")),
    "shape smaller": one(entry(shape="[1]")),
    "offsets of three": one(entry(offsets="[0,8,16]")),
    "offsets of one": one(entry(offsets="[8]")),
    "offsets backwards": one(entry(offsets="[8,0]")),
    "offsets negative": one(entry(offsets="[-8,0]")),
    "offsets fractions": one(entry(offsets="[0,8.0]")),
    "first byte unused": one(entry(offsets="[1,9]"), bytes(9)),
    "gap": two("[0,8]", "[9,17]", 17),
    "overlap": two("[0,8]", "[4,12]", 12),
    "same range": two("[0,8]", "[0,8]", 8),
    "bytes behind": one(entry(), bytes(9)),
    "bytes behind nothing": packed("{}", bytes(1)),
    "cut short": one(entry(), bytes(7)),
    "metadata of numbers": packed(f'{{"__metadata__":{{"x":1}},"a":{entry()}}}', bytes(8)),
    "metadata a list": packed(f'{{"__metadata__":[],"a":{entry()}}}', bytes(8)),
}
STRICTER = {  # files that the official library reads and we refuse
    "key twice": packed(f'{{"a":{entry()},"a":{entry()}}}', bytes(8)),
    "key twice, spelled otherwise": packed(f'{{"a":{entry()},"\\u0061":{entry(shape="[2,1]")}}}', bytes(8)),
    "metadata twice": packed(f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{entry()}}}', bytes(8)),
    "another field": one(entry()[:-1] + ',"x":1}'),
    "entry a list": one('["F32",[2],[0,8]]'),
    "half a byte each": one(entry('"F4"', "[16]")),
    "more axes than numpy has": one(entry(shape=str([1] * 70), offsets="[0,4]"), bytes(4)),
    "empty, but too large": one(entry(shape=f"[0,{2**62},2]", offsets="[0,0]"), b""),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_as_the_official_library(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    assert ours(tmp_path / SINGLE) == official(content)


@pytest.mark.parametrize("content", STRICTER.values(), ids=STRICTER)
def test_stricter_than_the_official_library(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    assert official(content) is not None and ours(tmp_path / SINGLE) is None


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "link", "pipe", "absent"):
        with pytest.raises(InputError, match=f"{name} is not a file"):
            open_file(tmp_path / name)


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    write_file(tmp_path / SINGLE, lazy(a=np.ones(4, np.float32)))
    tensor = open_file(tmp_path / SINGLE)["a"]
    os.truncate(tmp_path / SINGLE, (tmp_path / SINGLE).stat().st_size - 4)
    with pytest.raises(InputError, match="cut short inside a"):
        tensor.read()
    (tmp_path / SINGLE).unlink()
    with pytest.raises(InputError, match="cannot be read at a"):
        tensor.read()


def test_a_flipped_bit_does_not_load(tmp_path: Path) -> None:
    """Flips a bit in every byte of our file: reading raises or, if the bit has no meaning, gives the same tensors."""
    file = tmp_path / SINGLE
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.ones((), ml_dtypes.bfloat16)}
    write_file(file, lazy(**arrays))
    whole = file.read_bytes()
    expected = official(whole)
    assert expected == ours(file) and expected is not None and expected.keys() == {"a", "b.c"}
    with safe_open(file, "np") as opened:
        assert opened.metadata()["format"] == "pt"
    rng, taken = random.Random(0), 0
    for n in range(len(whole)):
        file.write_bytes(whole[:n] + bytes([whole[n] ^ 1 << rng.randrange(8)]) + whole[n + 1 :])
        found = ours(file)
        assert found in (None, expected), n
        taken += found is not None
        if n >= len(whole) - 26:
            with pytest.raises(InputError, match=r"damaged: the bytes of (a|b\.c) do not have the checksum"):
                [x.read() for x in open_file(file).values()]
    assert taken < 0.2 * len(whole)


def test_checksums_are_of_every_tensor_or_none(tmp_path: Path) -> None:
    """Files without checksums, such as our earlier ones, still load."""
    write_file(tmp_path / SINGLE, lazy(a=np.ones(4, np.float32), b=np.ones(4, np.float32)))
    content = (tmp_path / SINGLE).read_bytes()
    for old, new, says in (
        (b"crc32c.a", b"crc32c.c", "1 tensor without a checksum: a"),
        (b"crc32c.", b"-------", None),
    ):
        (tmp_path / SINGLE).write_bytes(content.replace(old, new))
        if says is None:
            assert ours(tmp_path / SINGLE) == official(content)
        else:
            with pytest.raises(InputError, match=says):
                open_file(tmp_path / SINGLE)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four tensors in two shards with an index."""
    write_directory(tmp_path, lazy(**{key: np.full(4, n, np.float32) for n, key in enumerate("abcd")}), 32)
    assert sorted(file.name for file in tmp_path.iterdir()) == [FIRST, SECOND, INDEX]
    return tmp_path


FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


def index(**weight_map: Any) -> Callable[[Path], object]:
    """Changes entries of the index."""

    def damage(path: Path) -> None:
        data = json.loads((path / INDEX).read_text())
        data["weight_map"] |= weight_map
        (path / INDEX).write_text(json.dumps(data))

    return damage


def text(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: (path / INDEX).write_text((path / INDEX).read_text().replace(old, new))


def tensors(name: str, **arrays: Any) -> Callable[[Path], object]:
    return lambda path: write_file(path / name, lazy(**{k: np.full(4, x, np.float32) for k, x in arrays.items()}))


def moved(path: Path) -> None:
    """The index names a shard in a subfolder."""
    (path / "sub").mkdir()
    (path / FIRST).rename(path / "sub" / FIRST)
    text(FIRST, f"sub/{FIRST}")(path)


OUTSIDE = "in a shard that is not a file beside the index: a"
DIRECTORIES = {
    "key in two shards": (tensors(SECOND, b=1, c=2, d=3), rf"b \({SECOND} instead of {FIRST}\)"),
    "key of another value in two shards": (tensors(SECOND, b=9, c=2, d=3), rf"b \({SECOND} instead of {FIRST}\)"),
    "key in another shard": (index(a=SECOND), rf"in another shard than named: a \({FIRST} instead of {SECOND}\)"),
    "shards swapped": (
        lambda d: [(d / FIRST).rename(d / "x"), (d / SECOND).rename(d / FIRST), (d / "x").rename(d / SECOND)],
        "4 tensors in another shard than named",
    ),
    "key named twice": (text('"weight_map": {', f'"weight_map": {{"a": "{SECOND}",'), "'a' occurs twice"),
    "key not in the index": (tensors(SECOND, c=2, d=3, e=4), "1 tensor in a shard but not named: e"),
    "key in no shard": (index(e=FIRST), "1 tensor named but in no shard: e"),
    "shard missing": (lambda d: (d / SECOND).unlink(), rf"2 tensors in a shard that does not exist: c \({SECOND}\)"),
    "shard a folder": (lambda d: [(d / SECOND).unlink(), (d / SECOND).mkdir()], "does not exist"),
    "shard a broken link": (lambda d: [(d / SECOND).unlink(), (d / SECOND).symlink_to("x")], "does not exist"),
    "shard of other case": (index(a=FIRST.upper()), "does not exist"),
    "parent": (index(a=f"../{FIRST}"), OUTSIDE),
    "absolute": (index(a=f"/{FIRST}"), OUTSIDE),
    "subfolder": (moved, "in a shard that is not a file beside the index: a, b"),
    "dot": (index(a="."), OUTSIDE),
    "dots": (index(a=".."), "does not exist"),
    "no name": (index(a=""), OUTSIDE),
    "name a number": (index(a=1), OUTSIDE),
    "name null": (index(a=None), OUTSIDE),
    "map a list": (lambda d: (d / INDEX).write_text('{"weight_map": ["a"]}'), "has no weight_map"),
    "map empty": (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), "has no weight_map"),
    "no map": (lambda d: (d / INDEX).write_text("{}"), "has no weight_map"),
    "index not JSON": (lambda d: (d / INDEX).write_text("{"), "cannot be read as JSON"),
    "index a list": (lambda d: (d / INDEX).write_text("[]"), "must hold a JSON object"),
    "index a folder": (lambda d: [(d / INDEX).unlink(), (d / INDEX).mkdir()], "cannot be read as JSON"),
    "index a broken link": (lambda d: [(d / INDEX).unlink(), (d / INDEX).symlink_to("x")], "cannot be read as JSON"),
    "stale index": (tensors(SINGLE, a=0, b=1, c=2, d=3), rf"holds {SINGLE} too, but {INDEX} does not name it"),
    "stale shard": (
        tensors("model-00003-of-00003.safetensors", e=1),
        rf"holds model-00003-of-00003\.safetensors too, but {INDEX} does not name it",
    ),
    "shards beside a single file": (
        lambda d: [(d / INDEX).unlink(), tensors(SINGLE, a=0)(d)],
        rf"holds {FIRST} too, but there is no index",
    ),
    "shards without an index": (lambda d: (d / INDEX).unlink(), f"holds neither {SINGLE} nor {INDEX}"),
}


@pytest.mark.parametrize("damage, says", DIRECTORIES.values(), ids=DIRECTORIES)
def test_every_key_comes_from_the_shard_that_the_index_names(damage, says: str, shards: Path) -> None:
    damage(shards)
    with pytest.raises(InputError, match=says) as raised:
        open_directory(shards)
    assert str(shards) in str(raised.value) and "\n" not in str(raised.value)


def test_sharded_directories_that_are_whole(shards: Path) -> None:
    """An index with `model.safetensors` as its only shard, links as in the Hub's cache, and unrelated files."""
    read = {key: x.read()[0] for key, x in open_directory(shards).items()}
    assert read == {"a": 0, "b": 1, "c": 2, "d": 3}
    (shards / "cache").mkdir()
    for n, name in enumerate((FIRST, SECOND)):
        shutil.move(shards / name, shards / "cache" / str(n))
        (shards / name).symlink_to(Path("cache", str(n)))
    tensors("adapter_model.safetensors", z=1)(shards)
    assert {key: x.read()[0] for key, x in open_directory(shards).items()} == read
    for name in (FIRST, SECOND):
        (shards / name).unlink()
    tensors(SINGLE, **read)(shards)
    index(**dict.fromkeys(read, SINGLE))(shards)
    assert {key: x.read()[0] for key, x in open_directory(shards).items()} == read


ODD = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    7,
    8,
    2**31,
    2**63,
    2**64,
    10**400,
    0.5,
    8.0,
    "",
    "F32",
    "F33",
    "I8",
    [],
    [1],
    {},
    [[]],
)
DTYPES = ("F32", "BF16", "F16", "I64", "U8", "BOOL", "F8_E4M3")


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """A small file, with or without checksums, and up to three changes to its header and its bytes."""
    arrays = {}
    for key in draw(st.lists(st.sampled_from(("a", "b.weight", "ä", "")), min_size=1, max_size=3, unique=True)):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        arrays[key] = (dtype, shape, draw(st.randoms(use_true_random=False)).randbytes(np.prod(shape, dtype=int) * 8))
    header, data = {}, b""
    for key, (dtype, shape, noise) in arrays.items():
        size = int(np.prod(shape, dtype=int)) * next(d.itemsize for d, name in NAMES.items() if name == dtype)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += noise[:size]
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    changes = draw(st.lists(st.sampled_from(("field", "shift", "swap", "twice", "metadata", "bytes")), max_size=2))
    for change in changes:
        entry = draw(st.sampled_from([x for key, x in header.items() if key != "__metadata__"]))
        if change == "field":
            entry[draw(st.sampled_from(("dtype", "shape", "data_offsets", "more")))] = draw(st.sampled_from(ODD))
        elif change == "shift" and isinstance(numbers := entry[draw(st.sampled_from(("shape", "data_offsets")))], list):
            numbers[:] = [draw(st.sampled_from((x, 1, x + 4, *ODD))) if type(x) is int else x for x in numbers]
        elif change == "swap":
            other = draw(st.sampled_from([x for key, x in header.items() if key != "__metadata__"]))
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        elif change == "metadata":
            header["__metadata__"] = draw(st.sampled_from((*ODD, {"x": "y"}, {"crc32c.a": "00000000"}, {"x": None})))
    text = json.dumps(header, ensure_ascii=draw(st.booleans()), separators=(",", draw(st.sampled_from((":", ": ")))))
    if "twice" in changes:
        text = text.replace("{", '{"a":' + json.dumps(header.get("a")) + ",", 1)
    content = packed(text, data)
    if "bytes" in changes:
        n = draw(st.integers(0, len(content) - 1))
        byte = draw(
            st.sampled_from((b"", b"-", b"0", b"1", b'"', b"{", b"[", b"\xff", bytes([content[n] ^ 1]), b"\0" * 3))
        )
        content = content[:n] + byte + content[n + draw(st.integers(0, 2)) :]
    return content


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_file_is_read_as_the_official_library_does_or_refused(examples: int, tmp_path: Path) -> None:
    read = []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(contents())
    def check(content: bytes) -> None:
        (tmp_path / SINGLE).write_bytes(content)
        found = ours(tmp_path / SINGLE)
        assert found is None or found == official(content)
        read.append(found is not None)

    check()
    assert len(read) >= examples and 0.3 * len(read) <= sum(read) <= 0.9 * len(read)
