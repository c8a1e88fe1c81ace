"""Reads TFRecord files record by record, and locates the values of a tf.train.Example in its record; no TensorFlow.

A record is: its length u64, the length's checksum u32, the data, the data's checksum u32. An example, in protobuf's
wire format, is

Example  {1: Features}        Features  {1: map entry {1: key, 2: Feature}}*
Feature  {1: BytesList} | {2: FloatList} | {3: Int64List}, each list {1: value}*, numbers packed or not
"""

import os
import struct
from collections.abc import Iterator

import google_crc32c
import numpy as np

from spatialvla_jax.errors import Fault, InputError
from spatialvla_jax.utils.storage import open_stream, to_path

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
RECORD_HEADER, RECORD_FOOTER = _HEADER.size, _FOOTER.size  # bytes before and after the data


def read_records(path: os.PathLike[str], skip: int = 0) -> Iterator[tuple[int, bytes, bool]]:
    """The records of a file after the first `skip`: (offset of the data in the file, data, whether the data's checksum
    is correct). The checksum is `masked_crc` of the data, a u32 directly after it.

    A wrong checksum of the data affects one record. After a wrong checksum of the length, or if the file ends within a
    record, the next record cannot be found. This raises a Fault, as does an unreadable file.
    """
    try:
        stream, size = open_stream(to_path(path))
        with stream as file:
            offset = number = 0
            while offset < size:
                header = file.read(_HEADER.size)
                if len(header) < _HEADER.size:
                    raise Fault("truncated", "the record is truncated")
                length, checksum = _HEADER.unpack(header)
                if checksum != masked_crc(header[:8]):
                    raise Fault(
                        "checksum", "the checksum of the record's length is wrong: nothing after it is readable"
                    )
                offset += _HEADER.size
                if offset + length + _FOOTER.size > size:
                    raise Fault("truncated", "the record is truncated")
                if number < skip:
                    if file.seekable():
                        file.seek(length + _FOOTER.size, os.SEEK_CUR)
                    else:
                        file.read(length + _FOOTER.size)
                else:
                    data, footer = file.read(length), file.read(_FOOTER.size)
                    yield offset, data, footer == _FOOTER.pack(masked_crc(data))
                offset += length + _FOOTER.size
                number += 1
    except Fault:
        raise
    except (OSError, InputError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Fault("unreadable file", f"the file cannot be read: {reason}") from error
    except EOFError as error:  # the object was replaced while reading
        raise Fault("truncated", str(error)) from error


def masked_crc(data: bytes) -> int:
    """The checksum used in TFRecords: CRC-32C, rotated and offset."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_example(record: bytes, keys: set[str]) -> dict[str, np.ndarray]:
    """The features in `keys` that the record has: numbers as f32[n] or i64[n], byte strings as i64[n, 2] of (offset,
    length) in the record. Raises a Fault if the record is not a tf.train.Example."""
    found: dict[str, np.ndarray] = {}
    try:
        for _, features in _messages(record, 0, len(record)):
            for _, entry in _messages(record, *features):
                spans = dict(_messages(record, *entry))
                if 1 in spans and (key := record[slice(*spans[1])].decode()) in keys and 2 in spans:
                    for kind, values in _messages(record, *spans[2]):
                        found[key] = _values(record, kind, *values)
    except (IndexError, ValueError, TypeError) as error:
        raise Fault("not an example", "the record is not a tf.train.Example") from error
    return found


def _values(record: bytes, kind: int, start: int, stop: int) -> np.ndarray:
    if kind == 1:
        return np.asarray([(first, last - first) for _, (first, last) in _messages(record, start, stop)]).reshape(-1, 2)
    parts = []
    for _, wire, first, last in _fields(record, start, stop):
        if kind == 2:
            parts.append(np.frombuffer(record, "<f4", (last - first) // 4, first))
        else:
            parts.append(_varints(record, first, last) if wire == 2 else _varints(record, first, last)[:1])
    return np.concatenate(parts) if parts else np.empty(0, np.float32 if kind == 2 else np.int64)


def _messages(record: bytes, start: int, stop: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """(field number, (start, stop)) of a message's length-delimited fields."""
    for number, wire, first, last in _fields(record, start, stop):
        if wire == 2:
            yield number, (first, last)


def _fields(record: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, start, stop) of every field of the message in record[start:stop]."""
    at = start
    while at < stop:
        tag, at = _varint(record, at)
        wire = tag & 7
        if wire == 2:
            length, at = _varint(record, at)
        elif wire == 0:
            length = _varint(record, at)[1] - at
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > stop:
            raise ValueError("a field runs past its message")
        yield tag >> 3, wire, at, at + length
        at += length


def _varint(record: bytes, at: int) -> tuple[int, int]:
    """Decode one base-128 number; also returns the position after it."""
    value = shift = 0
    while (byte := record[at]) & 0x80:
        value |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
    return value | byte << shift, at + 1


def _varints(record: bytes, start: int, stop: int) -> np.ndarray:
    """Decode consecutive base-128 numbers as i64[n]."""
    data = np.frombuffer(record, np.uint8, stop - start, start)
    last = np.flatnonzero(data < 0x80)
    first = np.concatenate([[0], last[:-1] + 1]) if len(last) else last
    place = np.arange(len(data)) - np.repeat(first, np.diff(np.append(first, len(data))))
    digits = (data & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(digits, first).astype(np.int64) if len(last) else np.empty(0, np.int64)
