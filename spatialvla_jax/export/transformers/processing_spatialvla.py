"""SpatialVLA's processor: image and sentence → inputs of the model; its token ids → actions in robot units."""

import base64
import json
import os
from typing import Any

import numpy as np
import sentencepiece
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils.hub import cached_file

from spatialvla_jax.utils.camera import depth_problem, in_metres, intrinsics_problem, unit_problem

BOS = 2


class SpatialVLAProcessor:
    """Image and sentence → inputs of the model; its token ids → actions in robot units.

    `config` and `data` are the checkpoint's config.json and processor.json.
    """

    def __init__(self, config: dict[str, Any], data: dict[str, Any]) -> None:
        extra, vision = config.get("spatialvla_jax", {}), config["vision_config"]
        self.image_size = vision.get("image_size", 224)
        self.image_seq_length = (self.image_size // vision.get("patch_size", 16)) ** 2
        self.image_token_id = config["image_token_index"]
        self.action_offset = config["action_token_begin_idx"]
        self.action_chunk_size = extra.get("action_chunk", 4)
        self.statistics, self.prompt_template = data["statistics"], data["prompt_template"]
        self.intrinsics = {name: np.asarray(camera, np.float32) for name, camera in data["intrinsics"].items()}
        self.grid = {name: np.asarray(x, np.float32) for name, x in data["grid"].items() if name != "kind"}
        self.tokenizer = sentencepiece.SentencePieceProcessor()
        self.tokenizer.LoadFromSerializedProto(base64.b64decode(data["tokenizer"]))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs: Any) -> "SpatialVLAProcessor":
        known = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
        options = {name: kwargs[name] for name in known if name in kwargs}
        parts = []
        for name in ("config.json", "processor.json"):
            with open(str(cached_file(path, name, **options)), encoding="utf-8") as file:
                parts.append(json.load(file))
        return cls(*parts)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """AutoProcessor asks for it; there is nothing to note, as the directory names this class already."""

    def __call__(
        self,
        images: Any,
        text: str | list[str],
        unnorm_key: str | None = None,
        intrinsics: Any = None,
        depth: Any = None,
        return_tensors: str = "pt",
        depth_unit: float | None = None,
    ) -> BatchFeature:
        """One example or a list of them: `images` PIL or u8[H, W, 3], `text` the bare instruction.

        `intrinsics` [3, 3] are in pixels of the given image and default to those of the dataset `unnorm_key`; `depth`
        [H, W] in metres, or in counts of `depth_unit` metres, is for a model that takes depth from its data. Raises
        ValueError where a camera or depth makes no sense. Sentences are padded on the left.
        """
        if isinstance(text, str):
            images = images[0] if isinstance(images, (list, tuple)) else images
            one = (images, text, intrinsics, depth)
            images, text, intrinsics, depth = (None if x is None else [x] for x in one)  # type: ignore[assignment]
        count = len(text)
        if len(images) != count:
            raise ValueError(f"there are {len(images)} images for {count} sentences")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}; the model takes 'pt'")
        pixels = [np.asarray(image.convert("RGB") if hasattr(image, "convert") else image) for image in images]
        cameras = [None] * count if intrinsics is None else list(intrinsics)
        ids = [[self.image_token_id] * self.image_seq_length + self.encode(sentence) for sentence in text]
        longest = max(map(len, ids))
        data = {
            "input_ids": torch.tensor([[0] * (longest - len(x)) + x for x in ids]),
            "attention_mask": torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in ids]),
            "pixel_values": torch.from_numpy(np.stack([self.resize(x) for x in pixels])),
            "intrinsic": torch.from_numpy(
                np.stack([self.camera(k, x.shape, unnorm_key) for k, x in zip(cameras, pixels, strict=True)])
            ),
            "token_ranges": torch.tensor([[self.action_offset + first, size] for first, size in self.token_ranges]),
        }
        if depth is not None:
            maps = [self.depth(x, image.shape, depth_unit) for x, image in zip(depth, pixels, strict=True)]
            data["depth"] = torch.from_numpy(np.stack(maps))
        return BatchFeature(data)

    def encode(self, sentence: str) -> list[int]:
        prompt = self.prompt_template.replace("{instruction}", sentence.strip().lower())
        return [BOS, *self.tokenizer.EncodeAsIds(prompt), self.tokenizer.PieceToId("\n")]

    def resize(self, image: np.ndarray) -> np.ndarray:
        """u8[H, W, 3] → f32[3, S, S] in [0, 1]: antialiased Lanczos to whole levels, as in training."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"an image is uint8[H, W, 3], not {image.dtype}{list(image.shape)}")
        rows, columns = (lanczos(n, self.image_size) for n in image.shape[:2])
        resized = np.einsum("yh,hwc,xw->cyx", rows, image.astype(np.float32), columns, optimize=True)
        return resized.round().clip(0, 255).astype(np.float32) / 255

    def camera(self, intrinsics: Any, shape: tuple[int, ...], unnorm_key: str | None) -> np.ndarray:
        """f32[3, 3] in pixels of the S×S image."""
        if intrinsics is None:
            default = "default" if "default" in self.intrinsics else next(iter(self.intrinsics))
            size, matrix = (1, 1), self.intrinsics[find_key(unnorm_key, self.intrinsics) or default]
        elif wrong := intrinsics_problem(intrinsics, shape[:2]):
            raise ValueError(f"intrinsics {wrong}")
        else:
            size, matrix = shape[:2], np.asarray(intrinsics, np.float32)
        S = self.image_size
        return (matrix * np.array([[S / size[1]], [S / size[0]], [1.0]])).astype(np.float32)

    def depth(self, depth: Any, shape: tuple[int, ...], unit: float | None) -> np.ndarray:
        """f32[S, S] in metres."""
        if unit is not None and (wrong := unit_problem(unit)):
            raise ValueError(f"depth_unit {wrong}")
        if wrong := depth_problem(depth, shape[:2], unit):
            raise ValueError(f"depth {wrong}")
        return nearest(in_metres(depth, unit), self.image_size)

    @property
    def token_ranges(self) -> list[tuple[int, int]]:
        """(first id, count) of each token of one action, counted from the first action token."""
        if "levels" in self.grid:
            return [(0, len(self.grid["levels"]))] * 7
        theta, phi, r, roll, pitch, yaw = self._bins()
        translations, rotations = theta * phi * r, roll * pitch * yaw
        return [(0, translations), (translations, rotations), (translations + rotations, 2)]

    def decode_actions(self, generation_outputs: torch.Tensor, unnorm_key: str | None = None) -> dict[str, np.ndarray]:
        """Token ids [tokens] or [1, tokens] of one example → {"actions": f64[T, 7] in robot units, "action_ids": their
        token ids i64[T, tokens of an action]}. The gripper is 0 closed … 1 open."""
        ids = generation_outputs.detach().cpu().numpy()
        ranges = self.token_ranges
        if ids.size != self.action_chunk_size * len(ranges):
            raise ValueError(f"one chunk has {self.action_chunk_size} × {len(ranges)} tokens, got {list(ids.shape)}")
        key = find_key(unnorm_key, self.statistics)
        if unnorm_key is None and len(self.statistics) == 1:
            key = next(iter(self.statistics))
        if key is None:
            raise ValueError(f"unnorm_key {unnorm_key!r} is none of {', '.join(self.statistics)}")
        ids = ids.reshape(self.action_chunk_size, len(ranges))
        actions = self.from_grid(ids - self.action_offset)
        rows = self.statistics[key]["action"]
        low, high = np.asarray(rows["q01"]), np.asarray(rows["q99"])
        mask = np.asarray(rows.get("mask", [True] * 6 + [False]), bool)
        return {"actions": np.where(mask, (actions + 1) / 2 * (high - low) + low, actions), "action_ids": ids}

    def from_grid(self, ids: np.ndarray) -> np.ndarray:
        """Ids counted from the first action token, i[T, tokens] → normalised actions f32[T, 7] at the bins' middles."""
        kinds = zip(ids.T, self.token_ranges, strict=True)
        ids = np.stack([np.clip(x - first, 0, size - 1) for x, (first, size) in kinds], -1)
        if "levels" in self.grid:
            return self.grid["levels"][ids]
        bins = self._bins()
        bins = [*np.unravel_index(ids[:, 0], bins[:3]), *np.unravel_index(ids[:, 1], bins[3:])]
        edges = [self.grid[name] for name in ("theta", "phi", "r", "roll", "pitch", "yaw")]
        theta, phi, r, *angles = (((e[:-1] + e[1:]) / 2)[i] for e, i in zip(edges, bins, strict=True))
        xyz = np.stack([r * np.sin(theta) * np.cos(phi), r * np.sin(theta) * np.sin(phi), r * np.cos(theta)], -1)
        return np.concatenate([xyz.clip(-1, 1), np.stack([*angles, ids[:, 2].astype(np.float32)], -1)], -1)

    def _bins(self) -> list[int]:
        return [len(self.grid[name]) - 1 for name in ("theta", "phi", "r", "roll", "pitch", "yaw")]


def find_key(key: str | None, known: dict[str, Any]) -> str | None:
    """The known name of the dataset `key`, whether spelled NAME or NAME/VERSION; None where there is none."""
    if key is None or key in known:
        return key
    name, _, version = key.partition("/")
    found = [other for other in known if (other if version else other.partition("/")[0]) == name]
    if len(found) > 1:
        raise ValueError(f"dataset {key!r} is known in {len(found)} versions: choose {' or '.join(found)}")
    return found[0] if found else None


def lanczos(n: int, m: int) -> np.ndarray:
    """Weights f32[m, n] that resize n samples to m: Lanczos with radius 3, widened where it shrinks."""
    position = (np.arange(m) + 0.5) * n / m - 0.5
    x = (position[:, None] - np.arange(n)) / max(n / m, 1)
    weights = np.where(np.abs(x) <= 3, np.sinc(x) * np.sinc(x / 3), 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def nearest(depth: np.ndarray, size: int) -> np.ndarray:
    """f32[H, W] → f32[size, size]."""
    rows, columns = (((np.arange(size) + 0.5) * n / size).astype(int) for n in depth.shape)
    return depth[rows[:, None], columns].astype(np.float32)
