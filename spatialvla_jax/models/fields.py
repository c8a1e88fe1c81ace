"""Valid values of the model configs' fields, for configs read from a file. Upper bounds reject absurd sizes: a billion
layers would exhaust memory on parameter names alone."""

from dataclasses import is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from spatialvla_jax.errors import InputError
from spatialvla_jax.models.remat import POLICIES
from spatialvla_jax.utils.schema import Field, check_stored, nearest_name

T = TypeVar("T")

COUNT = Field(1, "", low=1, high=2**20)
BY_TYPE = {
    bool: Field(False, ""),
    int: COUNT,
    float: Field(1.0, "", low=1e-6, high=1e6),
    tuple[int, int, int, int]: Field((1,), "", size=4, items=COUNT),
}
SIDE, LAYERS, VOCABULARY = (Field(1, "", low=1, high=high) for high in (4096, 1024, 2**24))
BY_NAME = {
    "image_size": SIDE,
    "patch_size": SIDE,
    "classifier_width": SIDE,
    "depth": LAYERS,
    "classifier_depth": LAYERS,
    "num_taps": Field(4, "", low=4, high=4),
    "vocab_size": VOCABULARY,
    "text_vocab": Field(4, "", low=4, high=2**24),
    "spatial_tokens": VOCABULARY,
    "prompt_length": Field(2, "", low=2, high=8192),
    "action_chunk": Field(1, "", low=1, high=1000),
    "tokens_per_action": Field(1, "", low=1, high=1000),
    "sliding_window": Field(1, "", low=1),
    "rope_base": Field(1.0, "", low=1.0, high=1e12),
    "num_bins": Field(2, "", low=2, high=2**16),
    "fusion_width": Field(2, "", low=2, high=2**20),
    "bin_embedding_dim": Field(2, "", low=2, high=2**20),
    "dtype": Field("", "", choices=("float32", "bfloat16", "float16")),
    "remat": Field("", "", choices=POLICIES),
}


def field_of(config: type, name: str) -> Field:
    """The schema of the field `name` of a config class."""
    hint = get_type_hints(config)[name]
    if get_origin(hint) is Literal:
        return Field("", "", choices=get_args(hint))
    return BY_NAME.get(name) or BY_TYPE[hint]


def config_from_dict(config: type[T], data: Any, where: str) -> T:
    """The inverse of `dataclasses.asdict`, nested configs included. Raises InputError for fields that are missing,
    unknown or out of range; `where` prefixes the field's name in the message."""
    hints = get_type_hints(config)
    nested = {name: Field({}, "") for name, hint in hints.items() if is_dataclass(hint)}
    plain = {name: field_of(config, name) for name in hints if name not in nested}
    values = check_stored(data, plain | nested, where)
    if unknown := sorted(map(str, data.keys() - hints.keys())):
        raise InputError(f"{where}{unknown[0]} is not a field of the model; {nearest_name(unknown[0], hints)}")
    parts = {name: config_from_dict(hints[name], values[name], f"{where}{name}.") for name in nested}
    return build(config, values | parts, where)


def build(config: type[T], values: dict[str, Any], where: str) -> T:
    """Like `config(**values)`, but prefixes `where` to the InputError for inconsistent values."""
    try:
        return config(**values)
    except InputError as error:
        raise InputError(f"{where.rstrip('.: ')}: {error}") from error
