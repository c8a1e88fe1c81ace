import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.data.tfrecord import RECORD_FOOTER, RECORD_HEADER, read_example, read_records
from spatialvla_jax.errors import Fault, InputError

INTEGERS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20)
FLOATS = st.lists(st.floats(width=32, allow_nan=False), max_size=20)
BYTES = st.lists(st.binary(max_size=300), max_size=8)


@given(INTEGERS, FLOATS, BYTES)
@settings(max_examples=60, deadline=None)
def test_reads_what_tensorflow_reads(integers, floats, strings):
    features = {
        "a/int": tf.train.Feature(int64_list=tf.train.Int64List(value=integers)),
        "b/float": tf.train.Feature(float_list=tf.train.FloatList(value=floats)),
        "c/bytes": tf.train.Feature(bytes_list=tf.train.BytesList(value=strings)),
        "unwanted": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"x"])),
    }
    record = tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
    parsed = tf.io.parse_single_example(
        record,
        {
            "a/int": tf.io.RaggedFeature(tf.int64),
            "b/float": tf.io.RaggedFeature(tf.float32),
            "c/bytes": tf.io.RaggedFeature(tf.string),
        },
    )
    found = read_example(record, {"a/int", "b/float", "c/bytes", "absent"})
    assert set(found) == {"a/int", "b/float", "c/bytes"}
    np.testing.assert_array_equal(found["a/int"], parsed["a/int"].numpy())
    np.testing.assert_array_equal(found["b/float"], parsed["b/float"].numpy())
    assert [record[at : at + size] for at, size in found["c/bytes"].tolist()] == list(parsed["c/bytes"].numpy())


def test_numbers_that_are_not_packed():
    """A writer may also give every number a separate field."""

    def field(number, wire, data):
        return bytes([number << 3 | wire]) + (bytes([len(data)]) if wire == 2 else b"") + data

    def feature(key, kind, values):
        return field(1, 2, field(1, 2, key) + field(2, 2, field(kind, 2, values)))

    integers = b"".join(field(1, 0, data) for data in (b"\x05", b"\xac\x02"))
    floats = b"".join(field(1, 5, np.float32(x).tobytes()) for x in (1.5, -2))
    record = field(1, 2, feature(b"i", 3, integers) + feature(b"f", 2, floats))
    found = read_example(record, {"i", "f"})
    assert found["i"].tolist() == [5, 300] and found["f"].tolist() == [1.5, -2]


@pytest.mark.parametrize("record", [b"\xff\xff", b"\x0a\x05ab", b"\x0f" * 9])
def test_not_an_example(record):
    with pytest.raises(InputError, match=r"not a tf\.train\.Example"):
        read_example(record, {"a"})


def write(folder, records):
    path = folder / "file.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return path


@given(st.lists(st.binary(max_size=3000), max_size=6))
@settings(max_examples=30, deadline=None)
def test_records_are_those_that_tensorflow_writes(tmp_path_factory, records):
    path = write(tmp_path_factory.mktemp("records"), records)
    found = list(read_records(path))
    assert [data for _, data, _ in found] == records and all(intact for *_, intact in found)
    content = path.read_bytes()
    assert all(content[offset : offset + len(data)] == data for offset, data, _ in found)
    for skip in range(len(records) + 2):
        assert list(read_records(path, skip)) == found[skip:]


@given(st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_no_flipped_byte_goes_unnoticed(tmp_path_factory, place, mask):
    """A flipped byte in a record's data loses that record; in its length, all from it on. No record is invented."""
    records = [bytes([n]) * (5 + n) for n in range(4)]
    path = write(tmp_path_factory.mktemp("records"), records)
    data = bytearray(path.read_bytes())
    place %= len(data)
    data[place] ^= mask
    path.write_bytes(data)
    starts = np.cumsum([0, *(len(record) + RECORD_HEADER + RECORD_FOOTER for record in records)])
    hit = int(np.searchsorted(starts, place, side="right")) - 1
    found = []
    try:
        found += read_records(path)
        assert place - starts[hit] >= RECORD_HEADER
        assert [intact for *_, intact in found] == [number != hit for number in range(4)]
    except Fault as fault:
        assert place - starts[hit] < RECORD_HEADER and fault.reason == "checksum"
    found = iter(read_records(path))
    for number in range(hit):
        assert next(found)[1:] == (records[number], True)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(Fault, match="cannot be read: No such file") as error:
        next(read_records(tmp_path / "none"))
    assert error.value.reason == "unreadable file"
