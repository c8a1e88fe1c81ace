"""Valid values: a `Field` describes them once, for checks, for the command line's help and for the reference."""

import ast
import contextlib
import difflib
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spatialvla_jax.errors import InputError

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    tuple: "a sequence",
    list: "a list",
    dict: "a dict",
}
LARGEST = {int: 2**31 - 1, float: 3.4e38}  # limits of the devices' 32-bit types


@dataclass(frozen=True)
class Field:
    """A value of the type of `default`, between `low` and `high` (inclusive), above `above` and below `below`
    (exclusive), or one of `also`.

    `items` describes the elements of a sequence or the values of a dict, `size` their number. `problem` returns what is
    wrong with a value of the right type and range, or "". `kinds` gives several types, or the types of a field whose
    default is None, which then is valid too.
    """

    default: Any
    meaning: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[Any, ...] = ()
    choices: tuple[str, ...] = ()
    unit: str = ""
    items: "Field | None" = None
    size: int | None = None
    problem: Callable[[Any], str] | None = None
    kinds: tuple[type, ...] = ()

    @property
    def types(self) -> tuple[type, ...]:
        return self.kinds if self.default is not None and self.kinds else (*self.kinds, type(self.default))

    def expected(self) -> str:
        return " or ".join(word for kind, word in KINDS.items() if kind in self.types)

    def range(self) -> str:
        """In words, such as "a whole number, at least 1"."""
        if self.choices:
            return " | ".join(self.choices)
        parts = [self.expected() + (f" of {self.size}" if self.size else "")]
        bounds = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        parts += [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
        if self.items:
            parts.append(f"each {self.items.range()}")
        return ", ".join(parts) + "".join(f", or {value!r}" for value in self.also)

    def describe(self) -> str:
        """Type, range, unit and default, as text."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.range()}{unit}; default {self.default!r}"


def check(value: Any, field: Field, name: str, *, hint: bool = True) -> Any:
    """The value converted to the field's type: NumPy's scalars and arrays become Python's, and lists become tuples
    where a tuple is expected. Raises InputError that names the key and, with `hint`, the nearest valid value."""
    value = _converted(value, field.types)
    if wrong := _wrong(value, field):
        raise InputError(f"{name}={shown(value)} {wrong}{_nearest(value, field) if hint else ''}")
    if field.size is not None and len(value) != field.size:
        raise InputError(f"{name}={shown(value)} has {len(value)} elements, but {field.size} are expected")
    if field.items:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        items = {key: check(item, field.items, f"{name}[{key!r}]", hint=hint) for key, item in pairs}
        value = items if isinstance(value, dict) else _converted([*items.values()], field.types)
    if field.problem and (wrong := field.problem(value)):
        raise InputError(f"{name}={shown(value)} {wrong}")
    return value


def _converted(value: Any, kinds: tuple[type, ...]) -> Any:
    """Convert to one of the types, if that is exact."""
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    value = list(value) if isinstance(value, range) else value
    if type(value) is int and float in kinds and int not in kinds and abs(value) < 2**53:
        return float(value)
    if isinstance(value, list) and list not in kinds and tuple in kinds:
        return tuple(value)
    return list(value) if isinstance(value, tuple) and tuple not in kinds and list in kinds else value


def _wrong(value: Any, field: Field) -> str:
    """What is wrong with the value's type or range, or ""."""
    if type(value) not in field.types:
        found = "None" if value is None else KINDS.get(type(value), f"of type {type(value).__name__}")
        return f"is {found}, but {field.expected()} is expected"
    if field.choices and value not in field.choices:
        return f"is not one of {', '.join(field.choices)}"
    if type(value) not in (int, float) or value in field.also:
        return ""
    if type(value) is float and not math.isfinite(value):
        return "is not a finite number"
    high = LARGEST[type(value)] if field.high is None else field.high
    bounds = (
        ("below", field.low, field.low is not None and value < field.low),
        ("above", high, value > high),
        ("not above", field.above, field.above is not None and value <= field.above),
        ("not below", field.below, field.below is not None and value >= field.below),
    )
    about = f" ({field.unit})" if field.unit else ""
    return next((f"is {word} {bound}{about}" for word, bound, outside in bounds if outside), "")


def _nearest(value: Any, field: Field) -> str:
    """The end of a message: the nearest valid value if there is one, else the default if it helps."""
    kind, near = field.types[0], None
    with contextlib.suppress(InputError, IndexError, TypeError, ValueError, OverflowError):
        if field.choices:
            near = difflib.get_close_matches(str(value).strip().lower(), field.choices, 1, 0.5)[0]
        elif kind in LARGEST and not isinstance(value, bool) and math.isfinite(float(value)):
            number = float(value) if kind is float else round(float(value))
            inside = max(number, number if field.low is None else field.low)
            ends = (min(inside, LARGEST[kind] if field.high is None else field.high), *field.also)
            near = kind(min(ends, key=lambda end: abs(end - number)))
        elif kind is str and isinstance(value, os.PathLike):
            near = str(value)
        elif kind in (tuple, list) and field.items and not isinstance(value, tuple | list | dict):
            near = kind([check(value, field.items, "")])
    if near is not None and not _wrong(near, field):
        return f"; the nearest valid value is {near!r}"
    helps = field.default not in (None, "", [], (), {}) and not _wrong(field.default, field)
    return f"; a valid value is {field.default!r}" if helps else ""


def parse(text: str, field: Field) -> Any:
    """The value of a text from the command line; it may be invalid, which `check` reports."""
    if field.types == (str,) or (field.types == (str, dict) and not text.lstrip().startswith("{")):
        return text
    for read in (int, float, lambda t: {"true": True, "false": False}[t.lower()], ast.literal_eval):
        with contextlib.suppress(ValueError, KeyError, SyntaxError, TypeError, MemoryError, RecursionError):
            return read(text.strip())
    return text


def nearest_name(name: str, known: Collection[str]) -> str:
    """A hint for an unknown name: the nearest known one, or all if there are few."""
    near = difflib.get_close_matches(str(name), known, 1, 0.6 if len(known) <= 20 else 0.0)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def check_all(values: Mapping[str, Any], fields: Mapping[str, Field], name: str) -> dict[str, Any]:
    """Check every value of a mapping with the keys of `fields`. Raises InputError, also for an unknown key."""
    for key in values:
        if key not in fields:
            raise InputError(f"{name} has no key {key!r}; {nearest_name(key, fields)}")
    return {key: check(value, fields[key], f"{name}.{key}") for key, value in values.items()}


def check_stored(data: Any, fields: Mapping[str, Field], where: str) -> dict[str, Any]:
    """Check the values of `fields` in an object that was read from a file, and return them; other keys are ignored.

    `where` prefixes a field's name in an InputError: the file and the enclosing fields, each with its dot.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{where.rstrip('.: ')} is {shown(data)}, but a dict is expected")
    for name in fields:
        if name not in data:
            raise InputError(f"{where}{name} is missing; {fields[name].range()} is expected")
    return {name: check(data[name], field, f"{where}{name}", hint=False) for name, field in fields.items()}


def shown(value: Any) -> str:
    """A value as text on one line, at most 80 characters."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of thousands of digits
        text = "(a huge number)"
    except RecursionError:
        text = "(deeply nested)"
    return text if len(text) <= 80 else f"{text[:77]}…"
