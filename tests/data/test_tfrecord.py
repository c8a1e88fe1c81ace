import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.data.tfrecord import read_example
from spatialvla_jax.errors import InputError

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
    """A writer may also give every number its own field."""

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
