"""Small RLDS datasets, written with TFDS."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

INTRINSICS = np.asarray([[50.0, 0, 31.0], [0, 48.0, 25.0], [0, 0, 1]], np.float32)  # of images of 48x64


def make_episodes(
    count: int,
    *,
    seed: int = 0,
    size: tuple[int, int] = (48, 64),
    steps: tuple[int, int] = (3, 9),
    action_dim: int = 7,
    intrinsics: np.ndarray | None = None,
):
    """`count` random LIBERO-style episodes, each a list of step dicts, with distinct images of `size` (height, width).
    The default `intrinsics` are `INTRINSICS`, scaled to this size."""
    rng = np.random.default_rng(seed)
    if intrinsics is None:
        intrinsics = INTRINSICS * np.asarray([[size[1] / 64], [size[0] / 48], [1]], np.float32)
    episodes = []
    for number in range(count):
        length = int(rng.integers(steps[0], steps[1] + 1))
        episodes.append(
            [
                {
                    "observation": {
                        "image": encode_image(rng.integers(0, 256, (*size, 3)).astype(np.uint8)),
                        "depth": rng.integers(1, 5000, (*size, 1)).astype(np.uint16),
                        "intrinsics": intrinsics,
                        "state": rng.normal(size=8).astype(np.float32),
                    },
                    "action": np.append(rng.uniform(-1, 1, action_dim - 1), rng.choice([-1, 1])).astype(np.float32),
                    "language_instruction": f"Pick up object {number % 3}",
                    "is_first": step == 0,
                    "is_last": step == length - 1,
                    "is_terminal": step == length - 1,
                }
                for step in range(length)
            ]
        )
    return episodes


def encode_image(pixels: np.ndarray, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def libero_features(action_width: int = 7) -> Any:
    import tensorflow_datasets as tfds

    features = tfds.features
    return {
        "observation": {
            "image": features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "depth": features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png"),
            "intrinsics": features.Tensor(shape=(3, 3), dtype=np.float32),
            "state": features.Tensor(shape=(8,), dtype=np.float32),
        },
        "action": features.Tensor(shape=(action_width,), dtype=np.float32),
        "language_instruction": features.Text(),
        "is_first": np.bool_,
        "is_last": np.bool_,
        "is_terminal": np.bool_,
    }


def make_rlds(
    path: Path,
    splits: dict[str, list[Any]],
    *,
    step_features: Any = None,
    name: str = "toy",
    version: str = "1.0.0",
    episodes_per_shard: int = 3,
) -> Path:
    """Write `splits` ({name: episodes, each a list of step dicts}); returns the version directory."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    directory = Path(path) / name / version
    directory.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step_features or libero_features())})
    identity = DatasetIdentity(name=name, version=tfds.core.Version(version), data_dir=str(directory), module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    writer = tfds.core.SequentialWriter(info, episodes_per_shard)
    writer.initialize_splits(list(splits))
    for split, episodes in splits.items():
        writer.add_examples({split: [{"steps": steps} for steps in episodes]})
    writer.close_all()
    return directory


def data_config(*paths: Path, cache_dir: Path, **overrides: Any) -> dict[str, Any]:
    """A `data` config over LIBERO-style datasets."""
    datasets = [{"name": f"toy{i}", "path": str(path), "spec": "libero"} for i, path in enumerate(paths)]
    prompt = {"length": 24, "vocab_size": 96}
    return {"datasets": datasets, "cache_dir": str(cache_dir), "workers": 1, "prompt": prompt} | overrides
