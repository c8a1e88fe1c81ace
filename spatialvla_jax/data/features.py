"""The kinds of features that a step's keys may have, and how to read their values from an episode's record.

TFDS stores a key of L steps as one flat list of numbers or byte strings. For sequences within steps it also stores
lengths: `ragged_row_lengths_0` has the number of items in each step, `ragged_row_lengths_1` the number in each of those
items, and so on (tensorflow_datasets/core/example_serializer.py).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from spatialvla_jax.data.oxe.operations import width_before
from spatialvla_jax.data.oxe.spec import DatasetSpec, action_keys, action_width, split_language
from spatialvla_jax.errors import Fault, InputError

_IMAGE = "an encoded image (tfds.features.Image of uint8) is expected, so write the dataset again with one"
_DEPTH = "a 16-bit PNG (tfds.features.Image of uint16) is expected"
_NUMBERS = "numbers are expected (tfds.features.Tensor without an encoding)"
_TEXT = "text is expected: name another key as `language`, or give every episode the same words by `instruction`"


class StoredFeature(NamedTuple):
    """How a key is stored."""

    shape: tuple[int | None, ...]  # of one step's values
    rank: int = 0  # number of leading dimensions that are sequences with stored lengths
    labels: tuple[str, ...] = ()  # class names, if the numbers are class labels
    spelled: bool = False  # the numbers are the bytes of a text

    @property
    def is_known(self) -> bool:
        return None not in self.shape

    @property
    def names(self) -> list[str]:
        """The suffixes, after steps/KEY, of the record's features that hold the key."""
        if not self.rank:
            return [""]
        return ["/ragged_flat_values", *(f"/ragged_row_lengths_{level}" for level in range(self.rank))]


def find_fields(name: str, builder: Any, spec: DatasetSpec, action_dim: int) -> dict[str, StoredFeature]:
    """How each key that the spec reads is stored. Raises InputError naming the key and its feature if it is missing or
    of an unexpected kind, or if the action is not `action_dim` wide."""
    dataset = f"Dataset {name!r} ({builder.data_dir})"
    steps: Any = dict(builder.info.features).get("steps")
    if not hasattr(getattr(steps, "feature", None), "keys"):
        raise InputError(f"{builder.data_dir} is not an RLDS dataset: its episodes have no Dataset feature 'steps'")
    features, stored = steps.feature, dict(_leaves(steps.feature.get_serialized_info()))

    def field(key: str, expected: str) -> StoredFeature:
        feature = _feature(features, key)
        if feature is None:
            raise InputError(f"{dataset} has no key {key!r} in its steps: they have {', '.join(stored)}")
        stored_feature = _field(feature, stored.get(key), expected)
        if stored_feature is None:
            raise InputError(f"{dataset} has {key!r} as {' '.join(repr(feature).split())}; {expected}")
        return stored_feature

    fields = {key: field(key, _IMAGE) for key in (spec.image, *spec.other_images)}
    if spec.depth:
        fields[spec.depth] = field(spec.depth, _DEPTH)
    numbers = [*action_keys(spec), *spec.arrays] + ([spec.intrinsics] if spec.intrinsics else [])
    fields |= {key: field(key, _NUMBERS) for key in numbers}
    if spec.instruction is None:
        key, which = split_language(spec.language)
        fields[key] = field(key, _TEXT)
        if which is not None and (fields[key].shape == () or fields[key].spelled):
            raise InputError(f"{dataset} has one text as {key!r}, not a list, which {spec.language!r} needs")
    shapes = {key: tuple(n for n in fields[key].shape if n is not None) for key in action_keys(spec)}
    if all(fields[key].is_known for key in shapes):
        width, expected = action_width(spec, shapes), width_before(spec.operations, action_dim)
        if width != expected:
            found = " + ".join(f"{part} {shapes[part]}" if part in shapes else str(part) for part in spec.action)
            raise InputError(f"{dataset} has an action {width} wide ({found}); {expected} is expected")
    if spec.intrinsics and fields[spec.intrinsics].shape != (3, 3):
        raise InputError(f"{dataset} has intrinsics of shape {fields[spec.intrinsics].shape}; (3, 3) is expected")
    return fields


def _field(feature: Any, stored: Any, expected: str) -> StoredFeature | None:
    """How a feature is stored; None if it is not of the `expected` kind."""
    import tensorflow_datasets as tfds

    if stored is None:  # a dict, or a tensor that is stored with its shape
        return None
    leaf = feature
    while isinstance(leaf, tfds.features.Sequence):
        leaf = leaf.feature
    made = StoredFeature(tuple(stored.shape), stored.sequence_rank)
    holds_bytes, is_text = (np.dtype(info.np_dtype).kind in "OSU" for info in (stored, leaf))
    is_image = isinstance(leaf, tfds.features.Image)
    if expected in (_IMAGE, _DEPTH):
        dtype = np.uint8 if expected is _IMAGE else np.uint16
        fits = leaf.np_dtype == dtype if is_image else is_text and expected is _IMAGE
        return made if fits and made.shape == () else None
    if expected is _NUMBERS:
        return None if holds_bytes else made
    if isinstance(leaf, tfds.features.ClassLabel):
        names = tuple(leaf.names) if leaf.num_classes else ()
        return made._replace(labels=names) if names != tuple(map(str, range(len(names)))) else None
    if holds_bytes:
        return made if is_text else None
    spelled = np.issubdtype(stored.np_dtype, np.integer) and len(made.shape) == 1 and not made.rank
    return made._replace(spelled=True) if spelled and not isinstance(leaf, tfds.features.Text) else None


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _feature(features: Any, key: str) -> Any:
    """The feature at the path `key`, or None. Names may contain slashes themselves ("future/xyz_residual")."""
    if not hasattr(features, "keys"):
        return None
    for name in features:
        if key == name:
            return features[name]
        if key.startswith(f"{name}/") and (feature := _feature(features[name], key[len(name) + 1 :])) is not None:
            return feature
    return None


def read_numbers(features: Mapping[str, np.ndarray], key: str, field: StoredFeature, length: int) -> np.ndarray:
    """The values of a key in `length` steps, [L, …]; byte strings become i64[L, 2], (offset, length) in the record.

    Raises a Fault if their number differs from the field's shape or between steps."""
    values, counts = _values(features, key, field, length)
    if (other := np.flatnonzero(counts != counts[0])).size:
        raise Fault("shape", f"{key!r} has {counts[0]} values in step 0 and {counts[other[0]]} in step {other[0]}")
    shape = field.shape if field.is_known else (counts[0],)
    return values.reshape(length, *shape, *values.shape[1:])


def read_language(
    record: bytes, features: Mapping[str, np.ndarray], key: str, which: int | None, field: StoredFeature, length: int
) -> np.ndarray:
    """The text of every step as object[L], "" if a step has none; for lists, the item `which` (None: the first)."""
    values, counts = _values(features, key, field, length)
    if field.spelled:  # zero-terminated
        if ((values < 0) | (values > 255)).any():
            raise Fault("not UTF-8", "the language instruction is not UTF-8")
        texts = [_decode(bytes(row.tolist()).split(b"\0")[0]) for row in values.reshape(length, -1)]
        return np.asarray(texts, object)
    which = which or 0
    first = np.cumsum(counts) - counts
    places = first + which + (counts if which < 0 else 0)
    found = (first <= places) & (places < first + counts)
    items = [values[place] if there else None for place, there in zip(places.tolist(), found.tolist(), strict=True)]
    return np.asarray([_text(record, item, field.labels) for item in items], object)


def _text(record: bytes, item: Any, labels: tuple[str, ...]) -> str:
    if item is None:
        return ""
    if not labels:
        return _decode(record[item[0] : item[0] + item[1]])
    if item >= len(labels):
        raise Fault("no such label", f"the language instruction is the class {item} of {len(labels)}")
    return labels[item] if item >= 0 else ""  # -1 means no label


def _decode(text: bytes) -> str:
    try:
        return text.decode().strip()
    except UnicodeDecodeError as error:
        raise Fault("not UTF-8", "the language instruction is not UTF-8") from error


def _values(
    features: Mapping[str, np.ndarray], key: str, field: StoredFeature, length: int
) -> tuple[np.ndarray, Int[np.ndarray, " L"]]:
    """All values of a key, and their number in each step. Raises a Fault if these are inconsistent."""
    empty = np.empty(0, np.int64)
    values, *levels = (features.get(f"steps/{key}{name}", empty) for name in field.names)
    each = int(np.prod([size for size in field.shape[field.rank :] if size is not None]))
    if not field.rank:
        counts = np.full(length, len(values) // length if None in field.shape else each)
    else:
        counts = np.ones(length, np.int64)
        for level in levels:
            if len(level) != counts.sum():
                raise Fault("shape", f"{key!r} has {len(level)} lengths of sequences where {counts.sum()} are expected")
            ends = np.cumsum(counts)
            total = np.append(0, np.cumsum(level))
            counts = total[ends] - total[ends - counts]
        counts = counts * each
    if len(values) != counts.sum() or (each and (counts % each).any()):
        raise Fault("shape", f"{key!r} has {len(values)} values for {length} steps of shape {field.shape}")
    return values, counts
