"""What a policy needs besides weights: tokenizer, action grid, statistics, prompt template. Plain, JSON-able data.

A checkpoint stores `SpatialVLAConfig.to_dict()` and `Processor.to_dict()`, so its directory alone can run the policy.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from spatialvla_jax.actions import ActionTokenizer, grid_from_dict, grid_to_dict
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.text import Tokenizer, template_problem
from spatialvla_jax.utils.camera import intrinsics_problem
from spatialvla_jax.utils.dataset_keys import find_key
from spatialvla_jax.utils.schema import Field, check_stored, shown

# Action values, in any robot's units. Extremes of one published dataset reach 1e36, which its quantiles do not show.
QUANTILES, ENDS = (Field([], "", items=item) for item in (Field(0.0, "", low=-1e6, high=1e6), Field(0.0, "")))
ROWS = {"q01": QUANTILES, "q99": QUANTILES, "min": ENDS, "max": ENDS}
MASK = Field([], "", items=Field(True, ""))
MATRIX = Field([], "", size=3, items=Field([], "", size=3, items=Field(0.0, "")))

RELATIVE = replace(MATRIX, problem=lambda matrix: intrinsics_problem(matrix, None))


def not_empty(value: Any) -> str:
    """Used as `Field.problem`."""
    return "" if value else "is empty"


STATISTICS = Field({}, "", items=Field({}, ""), problem=not_empty)
VERSIONS = Field({}, "", items=Field("", ""))
FIELDS = {
    "tokenizer": Field("", ""),
    "grid": Field({}, ""),
    "statistics": STATISTICS,
    "intrinsics": Field({}, "", items=RELATIVE, problem=not_empty),
    "prompt_template": Field("", "", problem=template_problem),
}

DEFAULT = "default"  # key in `intrinsics` for datasets without their own entry


@dataclass(frozen=True)
class Processor:
    """`statistics` maps an `unnorm_key` (dataset name) to its action statistics, in the release's layout.

    `intrinsics` maps it to the camera's 3×3 matrix relative to the image (first row divided by width, second by
    height), for observations without intrinsics. Names are found in both spellings, NAME and NAME/VERSION. `versions`
    maps names without version to their version, where known.
    """

    tokenizer: Tokenizer
    grid: ActionTokenizer
    statistics: dict[str, dict[str, Any]]
    intrinsics: dict[str, list[list[float]]]
    prompt_template: str = "{instruction}"
    versions: dict[str, str] = field(default_factory=dict)

    def find_statistics(self, key: Any) -> dict[str, Any]:
        """The statistics of dataset `key`; None selects the only dataset. Raises InputError that lists the datasets."""
        known = self.statistics
        only = next(iter(known)) if key is None and len(known) == 1 else None
        found = find_key(key, known) if isinstance(key, str) else only
        if found is None:
            choice = f"choose one of {', '.join(known)}"
            raise InputError(f"unnorm_key {shown(key)} is not a dataset of this policy; {choice}")
        return known[found]

    def find_intrinsics(self, key: str | None) -> list[list[float]]:
        """The intrinsics of dataset `key`. A missing or unknown key gives "default", as in the release, or else the
        first entry. Raises InputError if `key` is ambiguous."""
        known = self.intrinsics
        return known[(key and find_key(key, known)) or (DEFAULT if DEFAULT in known else next(iter(known)))]

    def with_published_names(self) -> "Processor":
        """A copy with dataset names as in the release: NAME/VERSION, where the version is known."""
        names = {name: f"{name}/{version}" for name, version in self.versions.items()}
        statistics, intrinsics = (
            {names.get(name, name): value for name, value in known.items()}
            for known in (self.statistics, self.intrinsics)
        )
        return replace(self, statistics=statistics, intrinsics=intrinsics, versions={})

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokenizer": base64.b64encode(self.tokenizer.to_bytes()).decode("ascii"),
            "grid": grid_to_dict(self.grid),
            "statistics": self.statistics,
            "intrinsics": self.intrinsics,
            "prompt_template": self.prompt_template,
        } | ({"versions": self.versions} if self.versions else {})

    @classmethod
    def from_dict(cls, data: Any, where: str = "") -> "Processor":
        """Raises InputError for missing or invalid fields; `where` prefixes the field's name in the message."""
        values = check_stored(data, FIELDS, where)
        values |= check_stored(data, {"versions": VERSIONS} if "versions" in data else {}, where)
        grid = grid_from_dict(values["grid"], f"{where}grid.")
        try:
            model = base64.b64decode(values["tokenizer"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"{where}tokenizer={shown(values['tokenizer'])} is not base64: {error}") from error
        return cls(
            tokenizer=read_tokenizer(model, f"{where}tokenizer"),
            grid=grid,
            statistics=checked_statistics(values["statistics"], grid.action_dim, f"{where}statistics"),
            intrinsics=values["intrinsics"],
            prompt_template=values["prompt_template"],
            versions=values.get("versions", {}),
        )


def read_tokenizer(model: bytes, name: str) -> Tokenizer:
    try:
        return Tokenizer.from_bytes(model)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def checked_statistics(statistics: Mapping[str, Any], width: int, name: str) -> dict[str, Any]:
    """Datasets' statistics with `width` numbers per row. Rows without the gripper, which is not normalised, are
    completed. Raises InputError for quantiles that cannot be inverted."""
    return {key: _checked_dataset(one, width, f"{name}[{key!r}].") for key, one in statistics.items()}


def _checked_dataset(dataset: Any, width: int, where: str) -> dict[str, Any]:
    action = check_stored(dataset, {"action": Field({}, "")}, where)["action"]
    where = f"{where}action."
    rows = check_stored(action, ROWS, where)
    rows |= check_stored(action, {"mask": MASK} if "mask" in action else {}, where)
    for name, row in rows.items():
        if len(row) != len(rows["q01"]) or len(row) not in (width - 1, width):
            expected = f"{width} (or {width - 1} in every row, without the gripper)"
            raise InputError(f"{where}{name}={shown(row)} has {len(row)} elements, but {expected} are expected")
    for low, high in (("q01", "q99"), ("min", "max")):
        for i, (a, b) in enumerate(zip(rows[low], rows[high], strict=True)):
            if a > b:
                raise InputError(f"{where}{low}[{i}]={a} is above {high}[{i}]={b}")
    if len(rows["q01"]) == width:
        return dataset
    ends = {"q01": 0.0, "min": 0.0, "q99": 1.0, "max": 1.0, "mask": False}
    rows.setdefault("mask", [True] * (width - 1))
    return {**dataset, "action": {**action, **{name: [*row, ends[name]] for name, row in rows.items()}}}


def parse_checkpoint(data: Any, where: str) -> tuple[SpatialVLAConfig, Processor | None]:
    """The model config and processor in our own formats. Raises InputError if they are invalid or inconsistent; `where`
    prefixes the field's name in the message."""
    optional = Field({}, "", kinds=(dict, type(None)))
    values = check_stored(data, {"model": Field({}, ""), "processor": optional}, where)
    config = SpatialVLAConfig.from_dict(values["model"], f"{where}model.")
    if values["processor"] is None:
        return config, None
    processor = Processor.from_dict(values["processor"], f"{where}processor.")
    check_agreement(config, processor, where)
    return config, processor


def check_agreement(config: SpatialVLAConfig, processor: Processor, where: str) -> None:
    """Raises InputError if processor and model disagree about tokens."""
    grid, pieces = processor.grid, processor.tokenizer.vocab_size
    if grid.vocab_size != config.spatial_tokens:
        raise InputError(f"{where}the grid has {grid.vocab_size} tokens, and the model {config.spatial_tokens}")
    if grid.tokens_per_action != config.tokens_per_action:
        counts = f"{grid.tokens_per_action} tokens, and the model with {config.tokens_per_action}"
        raise InputError(f"{where}the grid encodes an action with {counts}")
    if pieces > config.text_vocab:
        raise InputError(f"{where}the tokenizer has {pieces} pieces, and the model {config.text_vocab} text tokens")
    template, length = processor.prompt_template, config.prompt_length
    try:
        processor.tokenizer.encode_prompt("", template=template, length=length)
    except InputError as error:
        why = f"does not fit the model's prompt_length, {length}, without any instruction"
        raise InputError(f"{where}prompt_template={shown(template)} {why}") from error
