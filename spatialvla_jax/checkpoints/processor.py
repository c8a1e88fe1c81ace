"""What a policy needs beside its weights: tokenizer, action grid, statistics, prompt template. Plain data, JSON-able.

A checkpoint holds `SpatialVLAConfig.to_dict()` and `Processor.to_dict()`, so that its directory alone runs the policy.
"""

import base64
from dataclasses import dataclass
from typing import Any

from spatialvla_jax.actions import ActionTokenizer, grid_from_dict, grid_to_dict
from spatialvla_jax.errors import InputError
from spatialvla_jax.text import Tokenizer
from spatialvla_jax.utils.dataset_keys import find_key

DEFAULT = "default"  # among the intrinsics: the camera of every dataset that has none there


@dataclass(frozen=True)
class Processor:
    """`statistics` maps an `unnorm_key` (dataset name) to its action statistics, in the release's layout.

    `intrinsics` maps it to the camera's 3×3 matrix in units of the image (first row divided by its width, second by its
    height), for observations that come without. Names are found in both spellings, NAME and NAME/VERSION.
    """

    tokenizer: Tokenizer
    grid: ActionTokenizer
    statistics: dict[str, dict[str, Any]]
    intrinsics: dict[str, list[list[float]]]
    prompt_template: str = "{instruction}"

    def find_statistics(self, key: Any) -> dict[str, Any]:
        """Those of the dataset `key`; None stands for the only dataset. Raises InputError that names the datasets."""
        known = self.statistics
        only = next(iter(known)) if key is None and len(known) == 1 else None
        found = find_key(key, known) if isinstance(key, str) else only
        if found is None:
            raise InputError(f"unnorm_key {key!r} is not a dataset of this policy; choose one of {', '.join(known)}")
        return known[found]

    def find_intrinsics(self, key: str | None) -> list[list[float]]:
        """Those of the dataset `key`. A missing or unknown key gets "default", as in the release, and the first where
        there is no "default". Raises InputError where `key` may mean several."""
        known = self.intrinsics
        return known[(key and find_key(key, known)) or (DEFAULT if DEFAULT in known else next(iter(known)))]

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokenizer": base64.b64encode(self.tokenizer.to_bytes()).decode("ascii"),
            "grid": grid_to_dict(self.grid),
            "statistics": self.statistics,
            "intrinsics": self.intrinsics,
            "prompt_template": self.prompt_template,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Processor":
        return cls(
            tokenizer=Tokenizer.from_bytes(base64.b64decode(data["tokenizer"])),
            grid=grid_from_dict(data["grid"]),
            statistics=data["statistics"],
            intrinsics=data["intrinsics"],
            prompt_template=data["prompt_template"],
        )
