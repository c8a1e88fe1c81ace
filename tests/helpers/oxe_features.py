"""What one step of each dataset in the catalogue holds, as published (`golden/oxe_features.json`).

Sources: tensorflow/datasets (docs/catalog/<name>.md), an inventory of the features.json of all Open X-Embodiment
datasets (felixmin/high-level-robot-planner: docs/openx_local_dataset_inventory.md), and for the others the RLDS
builders or descriptions of bridge_orig, DROID, RH20T, Language-Table, T-DROID and LIBERO. Keys whose shape is in none
of them are left out; nothing reads them.

A leaf gives type and shape: f32, f64, i32, i64, u8, bool, text, string; and with height and width jpeg, png, image (one
of these two), png16 or jpeg8 (one channel of 16 or 8 bits) and float_image (one channel). The name of another dataset
stands for its tree. `libero` is what sim/record_libero writes, without the keys that only a replay needs.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

_STORED = json.loads((Path(__file__).parents[1] / "golden" / "oxe_features.json").read_text())
FEATURES: dict[str, dict[str, Any]] = {
    k: _STORED[tree] if isinstance(tree, str) else tree for k, tree in _STORED.items()
}
LIBERO_NO_NOOPS = [name for name in FEATURES if name.endswith("_no_noops")]
TDROID = [name for name in FEATURES if name.startswith("tdroid_")]

_NUMBERS = {
    "f32": np.float32,
    "f64": np.float64,
    "i32": np.int32,
    "i64": np.int64,
    "u8": np.uint8,
    "bool": np.bool_,
}


def tfds_features(tree: Any) -> Any:
    """The TFDS features of a tree."""
    import tensorflow_datasets as tfds

    features = tfds.features
    if isinstance(tree, dict):
        return features.FeaturesDict({key: tfds_features(value) for key, value in tree.items()})
    kind, *sizes = tree.split()
    shape = tuple(map(int, sizes))
    match kind:
        case "text":
            return features.Text()
        case "string":
            return features.Tensor(shape=(), dtype=np.str_)
        case "jpeg" | "png" | "image":
            return features.Image(shape=(*shape, 3), encoding_format=None if kind == "image" else kind)
        case "jpeg8":
            return features.Image(shape=(*shape, 1), encoding_format="jpeg")
        case "png16":
            return features.Image(shape=(*shape, 1), dtype=np.uint16, encoding_format="png")
        case "float_image":
            return features.Image(shape=(*shape, 1), dtype=np.float32)
        case _:
            return features.Tensor(shape=shape, dtype=_NUMBERS[kind])


def random_steps(tree: Any, length: int, rng: np.random.Generator, path: str = "") -> Any:
    """Values for `length` steps of a tree, each leaf an array or list of this length. Texts and encoded images contain
    their path and step."""
    if isinstance(tree, dict):
        return {key: random_steps(value, length, rng, f"{path}/{key}" if path else key) for key, value in tree.items()}
    kind, *sizes = tree.split()
    shape = (length, *map(int, sizes))
    if kind == "float_image":  # TFDS does not accept these encoded
        return np.zeros((*shape, 1), np.float32)
    if kind not in _NUMBERS:
        return [f"{path} {step}".encode() for step in range(length)]
    if kind.startswith("f"):
        return rng.normal(size=shape).astype(_NUMBERS[kind])
    return rng.integers(0, 2 if kind == "bool" else 100, shape).astype(_NUMBERS[kind])
