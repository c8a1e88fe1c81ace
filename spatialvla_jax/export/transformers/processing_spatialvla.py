"""SpatialVLA's processor: image and instruction → the model's inputs; token ids → actions in robot units."""

import base64
import json
import os
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np
import sentencepiece
import torch
from transformers import ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils.hub import cached_file

from spatialvla_jax.utils.camera import depth_problem, in_metres, intrinsics_problem, unit_problem

PAD, EOS, BOS = 0, 1, 2
IGNORED = -100  # label of positions without a loss
IMAGE = "<image>"
VARIABLES = ("theta", "phi", "r", "roll", "pitch", "yaw")
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
# Files that the processor reads and `save_pretrained` writes; not every checkpoint has all of them.
CONFIG, DATA, RELEASE = "config.json", "processor.json", "processor_config.json"
OTHER_FILES = (
    RELEASE,
    "preprocessor_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "camera_spatialvla.py",
    "configuration_spatialvla.py",
    "ego3d_spatialvla.py",
    "generation_spatialvla.py",
    "modeling_spatialvla.py",
    "processing_spatialvla.py",
)
# Options of transformers' image processors and tokenizers for which this one supports a single value.
FIXED = {
    "add_special_tokens": True,
    "do_center_crop": False,
    "do_convert_rgb": True,
    "do_normalize": False,  # done by the model
    "do_pad": False,
    "padding_side": "left",
    "return_attention_mask": True,
    "return_tensors": "pt",
    "truncation": False,  # a prompt's last token matters
}


class Tokenizer(sentencepiece.SentencePieceProcessor):
    """SentencePiece with the attributes that transformers' Trainer expects of a tokenizer."""

    pad_token_id, eos_token_id, bos_token_id = PAD, EOS, BOS


class SpatialVLAProcessor(ProcessorMixin):
    """Image and instruction → the model's inputs; token ids → actions in robot units.

    `config` and `data` are the checkpoint's config.json and processor.json; `files` maps names to the files' paths.
    """

    def __init__(self, config: dict[str, Any], data: dict[str, Any], files: dict[str, str]) -> None:
        super().__init__()
        extra, vision = config.get("spatialvla_jax", {}), config["vision_config"]
        self.image_size = vision.get("image_size", 224)
        self.image_seq_length = (self.image_size // vision.get("patch_size", 16)) ** 2
        self.image_token_id = config["image_token_index"]
        self.action_offset = config["action_token_begin_idx"]
        self.action_chunk_size = extra.get("action_chunk", 4)
        self.prompt_length = extra.get("prompt_length", 52)  # tokens, including <bos> and the newline
        self.data, self.files = data, files
        self.statistics, self.prompt_template = data["statistics"], data["prompt_template"]
        self.intrinsics = {name: np.asarray(camera) for name, camera in data["intrinsics"].items()}
        self.grid = {name: np.asarray(x, np.float32) for name, x in data["grid"].items() if name != "kind"}
        self.tokenizer = Tokenizer()
        self.tokenizer.LoadFromSerializedProto(base64.b64decode(data["tokenizer"]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(image_size={self.image_size}, statistics={list(self.statistics)})"

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "intrinsic", "depth"]

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs: Any) -> "SpatialVLAProcessor":
        options = {name: kwargs.pop(name) for name in HUB if name in kwargs}
        known = ("trust_remote_code", "code_revision", "use_fast", "backend")
        if unknown := [name for name in kwargs if name not in known and not name.startswith("_")]:
            raise ValueError(f"{cls.__name__}.from_pretrained does not support {', '.join(unknown)}")
        found = {name: str(cached_file(path, name, **options)) for name in (CONFIG, DATA)}
        for name in OTHER_FILES:
            if file := cached_file(path, name, _raise_exceptions_for_missing_entries=False, **options):
                found[name] = str(file)
        return cls(_read(found[CONFIG]), _read(found[DATA]), found)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write the files that `from_pretrained` reads, with the current statistics and cameras. An existing
        config.json, such as the model's, is kept. Returns the paths."""
        kwargs.pop("max_shard_size", None)  # `push_to_hub` passes it to models and processors alike
        if unknown := [*(["push_to_hub"] if push_to_hub else []), *kwargs]:
            raise ValueError(f"{type(self).__name__}.save_pretrained does not support {', '.join(unknown)}")
        os.makedirs(save_directory, exist_ok=True)
        paths = {name: os.path.join(save_directory, name) for name in self.files}
        for name, path in paths.items():
            if not os.path.exists(path) or (name != CONFIG and not os.path.samefile(self.files[name], path)):
                shutil.copyfile(self.files[name], path)
        cameras = {name: camera.tolist() for name, camera in self.intrinsics.items()}
        current = {"statistics": self.statistics, "intrinsics": cameras, "prompt_template": self.prompt_template}
        _write(paths[DATA], self.data | current)
        if RELEASE in paths:
            relative = {name: {"height": 1, "width": 1, "intrinsic": k} for name, k in cameras.items()}
            released = {
                "statistics": self.statistics,
                "intrinsic_config": {"default": relative[self.find_camera(None)]} | relative,
            }
            _write(paths[RELEASE], _read(self.files[RELEASE]) | released)
        return list(paths.values())

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        unnorm_key: str | list[str] | None = None,
        intrinsics: Any = None,
        depth: Any = None,
        depth_unit: float | None = None,
        suffix_actions: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """One example or a list of them: an image for each `text`, which is the bare instruction.

        An image is PIL, u8[H, W, 3] or u8[3, H, W]; with `do_rescale=False` it is floating point in [0, 1].
        `intrinsics` [3, 3] are in pixels of the given image and default to those of the dataset `unnorm_key`. `depth`
        [H, W], in metres or in counts of `depth_unit` metres, is for models that take depth from their data. Normalised
        `suffix_actions` f[T, 7] turn it into training examples with labels. Padding is on the left: to the longest, or
        with `padding="max_length"` to `max_length` tokens besides the image's.

        Raises ValueError for implausible or unsupported inputs, and for prompts longer than `prompt_length` tokens.
        """
        options = _options(kwargs)
        one = isinstance(text, str)
        sentences = [text] if one else list(text) if isinstance(text, (list, tuple)) else []
        if not sentences or not all(isinstance(sentence, str) for sentence in sentences):
            raise ValueError(f"text is a sentence or a list of them, got {text!r:.80}")
        count = len(sentences)
        pixels = [self.levels(image, **options["images"]) for image in _images(images, count)]
        sizes = [(len(x), x.shape[1]) for x in pixels]
        keys = [unnorm_key] * count if isinstance(unnorm_key, str) else _rows("unnorm_key", unnorm_key, count, one)
        cameras = _rows("intrinsics", intrinsics, count, one)
        actions = _rows("suffix_actions", suffix_actions, count, one)
        image_ids = [self.image_token_id] * self.image_seq_length
        prompts = [image_ids + self.encode(sentence) for sentence in sentences]
        targets = [[] if chunk is None else [*self.encode_actions(chunk), EOS] for chunk in actions]
        data = self.pad(prompts, targets, **options["text"])
        data |= {
            "pixel_values": torch.from_numpy(np.stack([self.resize(x) for x in pixels])),
            "intrinsic": torch.from_numpy(
                np.stack([self.camera(*row) for row in zip(cameras, sizes, keys, strict=True)])
            ),
        }
        if suffix_actions is None:
            ranges = [[self.action_offset + first, size] for first, size in self.token_ranges]
            data["token_ranges"] = torch.tensor(ranges)
        if depth is not None:
            maps = zip(_rows("depth", depth, count, one), sizes, strict=True)
            data["depth"] = torch.from_numpy(np.stack([self.depth(x, size, depth_unit) for x, size in maps]))
        return BatchFeature(data)

    def encode(self, sentence: str) -> list[int]:
        """Token ids of the prompt: <bos>, the lower-cased instruction in the template, newline."""
        if IMAGE in sentence:
            raise ValueError(f"text holds {IMAGE}: the processor itself puts the image before the instruction")
        if any("\ud800" <= letter <= "\udfff" for letter in sentence):
            raise ValueError(f"text must be without lone surrogates, got {sentence!r:.80}")
        prompt = self.prompt_template.replace("{instruction}", sentence.strip().lower())
        ids = [BOS, *self.tokenizer.EncodeAsIds(prompt), self.tokenizer.PieceToId("\n")]
        if len(ids) > self.prompt_length:
            shown = prompt if len(prompt) <= 80 else f"{prompt[:79]}…"
            limit = f"more than the {self.prompt_length} of data.prompt.length"
            raise ValueError(f"The prompt {shown!r} needs {len(ids)} tokens, {limit}")
        return ids

    def pad(
        self, prompts: list[list[int]], targets: list[list[int]], padding: Any = True, max_length: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Left-padded token ids of prompts and their targets; also labels if there is any target."""
        lengths = [len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]
        longest = max(lengths)
        if max_length is not None and longest > self.image_seq_length + max_length:
            needed = longest - self.image_seq_length
            raise ValueError(f"the longest text needs {needed} tokens, more than the max_length of {max_length}")
        if padding == "max_length":
            if max_length is None:
                raise ValueError("padding='max_length' needs max_length, the tokens beside the image's")
            longest = self.image_seq_length + max_length
        elif padding in (False, "do_not_pad"):
            if len(set(lengths)) > 1:
                raise ValueError(f"padding={padding!r} needs prompts of one length, got {lengths}")
        elif padding not in (True, "longest"):
            raise ValueError(f"padding is {padding!r}: it can be True, 'longest', False or 'max_length'")

        def padded(value: int, rows: Iterable[list[int]]) -> torch.Tensor:
            return torch.tensor([[value] * (longest - len(row)) + row for row in rows])

        pairs = list(zip(prompts, targets, strict=True))
        data = {
            "input_ids": padded(0, [prompt + target for prompt, target in pairs]),
            "attention_mask": padded(0, [[1] * length for length in lengths]),
        }
        if any(targets):
            data["token_type_ids"] = padded(0, [[1] * len(target) for target in targets])
            data["labels"] = padded(IGNORED, targets)
        return data

    def levels(self, image: Any, do_rescale: bool = True, do_resize: bool = True) -> np.ndarray:
        """An image as u8[H, W, 3], or as f32[H, W, 3] from 0 to 255 if it was given in [0, 1]."""
        x = _array(image.convert("RGB") if hasattr(image, "convert") else image)
        if x.ndim == 3 and x.shape[0] == 3 and x.shape[2] != 3:
            x = np.moveaxis(x, 0, -1)
        if x.ndim != 3 or x.shape[2] != 3 or not x.size or (x.dtype != np.uint8 if do_rescale else x.dtype.kind != "f"):
            expected = "uint8[H, W, 3]" if do_rescale else "floating point[H, W, 3] for do_rescale=False"
            hint = "; do_rescale=False takes floating point in [0, 1]" if do_rescale and x.dtype.kind == "f" else ""
            raise ValueError(f"an image is {expected}, not {x.dtype}{list(x.shape)}{hint}")
        if not do_rescale and not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(f"an image for do_rescale=False holds values in [0, 1], not {x.min():g} to {x.max():g}")
        S = self.image_size
        if not do_resize and x.shape[:2] != (S, S):
            raise ValueError(f"an image for do_resize=False has {S}×{S} pixels, not {x.shape[1]}×{x.shape[0]}")
        return x if do_rescale else x.astype(np.float32) * 255

    def resize(self, image: np.ndarray) -> np.ndarray:
        """[H, W, 3] from 0 to 255 → f32[3, S, S] in [0, 1]: antialiased Lanczos, rounded to levels, as in training."""
        rows, columns = (lanczos(n, self.image_size) for n in image.shape[:2])
        resized = np.einsum("yh,hwc,xw->cyx", rows, image.astype(np.float32), columns, optimize=True)
        return resized.round().clip(0, 255).astype(np.float32) / 255

    def camera(self, intrinsics: Any, size: tuple[int, int], unnorm_key: str | None) -> np.ndarray:
        """f32[3, 3] in pixels of the S×S image."""
        if intrinsics is None:
            size, matrix = (1, 1), np.asarray(self.intrinsics[self.find_camera(unnorm_key)], np.float32)
        elif wrong := intrinsics_problem(intrinsics, size):
            raise ValueError(f"intrinsics {wrong}")
        else:
            matrix = np.asarray(intrinsics, np.float32)
        S = self.image_size
        return (matrix * np.array([[S / size[1]], [S / size[0]], [1.0]])).astype(np.float32)

    def find_camera(self, key: str | None) -> str:
        """The name of the dataset's camera. A missing or unknown key gives "default", or else the first."""
        default = "default" if "default" in self.intrinsics else next(iter(self.intrinsics))
        return find_key(key, self.intrinsics) or default

    def depth(self, depth: Any, size: tuple[int, int], unit: float | None) -> np.ndarray:
        """f32[S, S] in metres."""
        if unit is not None and (wrong := unit_problem(unit)):
            raise ValueError(f"depth_unit {wrong}")
        if wrong := depth_problem(depth, size, unit):
            raise ValueError(f"depth {wrong}")
        return nearest(in_metres(depth, unit), self.image_size)

    @property
    def token_ranges(self) -> list[tuple[int, int]]:
        """(first id, count) for each token of an action, counted from the first action token."""
        if "levels" in self.grid:
            return [(0, len(self.grid["levels"]))] * 7
        theta, phi, r, roll, pitch, yaw = self._bins()
        translations, rotations = theta * phi * r, roll * pitch * yaw
        return [(0, translations), (translations, rotations), (translations + rotations, 2)]

    def decode_actions(
        self, generation_outputs: Any, unnorm_key: str | list[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Token ids of one chunk [tokens] or [1, tokens] → {"actions": f64[T, 7] in robot units, "action_ids": i64[T,
        tokens of an action]}. For several, [B, tokens] → the same with a leading B, and `unnorm_key` may be a list. An
        `<eos>` may follow. The gripper is 0 closed to 1 open. Ids of the wrong kind count as the nearest id."""
        ids = _array(generation_outputs)
        n = len(self.token_ranges)
        size = self.action_chunk_size * n
        if ids.ndim in (1, 2) and ids.shape[-1] == size + 1 and (ids[..., -1] == EOS).all():
            ids = ids[..., :-1]
        if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or ids.shape[-1] != size or not ids.size:
            raise ValueError(
                f"a chunk is {self.action_chunk_size} × {n} token ids, without the prompt's: got "
                f"{ids.dtype}{list(ids.shape)}"
            )
        chunks = ids.reshape(-1, self.action_chunk_size, n)
        several = isinstance(unnorm_key, (list, tuple))
        keys = _rows("unnorm_key", unnorm_key, len(chunks), False) if several else [unnorm_key] * len(chunks)
        actions = np.stack([self.to_robot_units(chunk, key) for chunk, key in zip(chunks, keys, strict=True)])
        one = ids.ndim == 1 or len(ids) == 1
        return {"actions": actions[0] if one else actions, "action_ids": chunks[0] if one else chunks}

    def to_robot_units(self, ids: np.ndarray, unnorm_key: str | None) -> np.ndarray:
        """Token ids i64[T, tokens of an action] → f64[T, 7]."""
        key = find_key(unnorm_key, self.statistics)
        if unnorm_key is None and len(self.statistics) == 1:
            key = next(iter(self.statistics))
        if key is None:
            raise ValueError(f"unnorm_key {unnorm_key!r} is not one of {', '.join(self.statistics)}")
        actions = self.from_grid(ids - self.action_offset)
        rows = self.statistics[key]["action"]
        low, high = np.asarray(rows["q01"]), np.asarray(rows["q99"])
        mask = np.asarray(rows.get("mask", [True] * 6 + [False]), bool)
        actions = np.where(mask, (actions + 1) / 2 * (high - low) + low, actions)
        if not np.isfinite(actions).all():
            raise ValueError(f"the statistics of {key} make actions that are not finite")
        return actions

    def encode_actions(self, actions: Any) -> list[int]:
        """Normalised actions f[T, 7] of one chunk → their token ids."""
        x = _array(actions).astype(np.float32)
        if x.shape != (self.action_chunk_size, 7) or not np.isfinite(x).all():
            raise ValueError(
                f"suffix_actions are one chunk of normalised actions [{self.action_chunk_size}, 7], all finite: got "
                f"{list(x.shape)}"
            )
        if "levels" in self.grid:
            levels = self.grid["levels"]
            return (self.action_offset + np.searchsorted(levels, x.clip(levels[0], levels[-1]))).ravel().tolist()
        xyz = x[:, :3].clip(-1, 1)
        radius = np.hypot(xyz[:, 0], xyz[:, 1])
        r = np.hypot(radius, xyz[:, 2])
        theta = np.where(r == 0, 0, np.arctan2(radius, xyz[:, 2]))
        phi = np.where(radius == 0, 0, np.arctan2(xyz[:, 1], xyz[:, 0]))
        values = (theta, phi, r, *x[:, 3:6].T)
        inner = [self.grid[name][1:-1] for name in VARIABLES]
        bins = [(value[:, None] >= edges).sum(1) for value, edges in zip(values, inner, strict=True)]
        sizes, starts = self._bins(), [first for first, _ in self.token_ranges]
        kinds = [np.ravel_multi_index(bins[:3], sizes[:3]), np.ravel_multi_index(bins[3:], sizes[3:]), x[:, 6] >= 0.5]
        return (self.action_offset + np.stack(kinds, -1) + starts).ravel().tolist()

    def decode(self, token_ids: Any, **kwargs: Any) -> str:
        """The text of token ids, without image and action tokens."""
        pieces = self.tokenizer.GetPieceSize()
        return self.tokenizer.DecodeIds([i for i in _array(token_ids).ravel().tolist() if i < pieces])

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        return [self.decode(ids) for ids in sequences]

    def from_grid(self, ids: np.ndarray) -> np.ndarray:
        """Ids counted from the first action token, i[T, tokens] → normalised actions f32[T, 7] at the bin centres."""
        kinds = zip(ids.T, self.token_ranges, strict=True)
        ids = np.stack([np.clip(x - first, 0, size - 1) for x, (first, size) in kinds], -1)
        if "levels" in self.grid:
            return self.grid["levels"][ids]
        bins = self._bins()
        bins = [*np.unravel_index(ids[:, 0], bins[:3]), *np.unravel_index(ids[:, 1], bins[3:])]
        edges = [self.grid[name] for name in VARIABLES]
        theta, phi, r, *angles = (((e[:-1] + e[1:]) / 2)[i] for e, i in zip(edges, bins, strict=True))
        xyz = np.stack([r * np.sin(theta) * np.cos(phi), r * np.sin(theta) * np.sin(phi), r * np.cos(theta)], -1)
        return np.concatenate([xyz.clip(-1, 1), np.stack([*angles, ids[:, 2].astype(np.float32)], -1)], -1)

    def _bins(self) -> list[int]:
        return [len(self.grid[name]) - 1 for name in VARIABLES]


def _options(kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """transformers' keyword arguments → the arguments of `levels` ("images") and `pad` ("text"). Raises ValueError for
    arguments that are unknown here or ask for unsupported behaviour."""
    groups = [kwargs.pop(name, None) or {} for name in ("common_kwargs", "images_kwargs", "text_kwargs")]
    given = {name: value for group in (*groups, kwargs) for name, value in group.items() if value is not None}
    supported = {"images": ("do_rescale", "do_resize"), "text": ("padding", "max_length")}
    for name, value in given.items():
        if name in FIXED and value != FIXED[name]:
            raise ValueError(f"{name} is {value!r}: this processor only supports {FIXED[name]!r}")
        if name not in FIXED and not any(name in names for names in supported.values()):
            raise ValueError(f"this processor does not support {name}")
    return {kind: {name: given[name] for name in names if name in given} for kind, names in supported.items()}


def _images(images: Any, count: int) -> list[Any]:
    """One image for each sentence; an image may be wrapped in a list."""
    one = hasattr(images, "convert") or getattr(images, "ndim", None) == 3
    rows = [images] if one else list(images) if hasattr(images, "__len__") else []
    for row in rows:
        if isinstance(row, (list, tuple)) and len(row) != 1:
            raise ValueError(f"the model sees one image for each sentence, got a list of {len(row)}")
    if len(rows) != count:
        raise ValueError(f"there are {len(rows)} images for {count} sentences: each needs its own")
    return [row[0] if isinstance(row, (list, tuple)) else row for row in rows]


def _rows(name: str, value: Any, count: int, one: bool) -> list[Any]:
    """One row of `value` for each of `count` sentences; None becomes a row of None each."""
    rows = [value] * count if value is None else list(value) if hasattr(value, "__len__") and not one else [value]
    if len(rows) != count:
        raise ValueError(f"{name} has {len(rows)} rows for {count} sentences")
    return rows


def _array(x: Any) -> np.ndarray:
    if torch.is_tensor(x):
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return np.asarray(x)


def _read(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _write(path: str, data: dict[str, Any]) -> None:
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)
    os.replace(f"{path}.tmp", path)


def find_key(key: str | None, known: dict[str, Any]) -> str | None:
    """The known name of the dataset `key`, spelled NAME or NAME/VERSION; None if there is none."""
    if not isinstance(key, (str, type(None))):
        raise ValueError(f"unnorm_key must be a dataset's name, got {key!r:.80}")
    if key is None or key in known:
        return key
    name, _, version = key.partition("/")
    found = [other for other in known if (other if version else other.partition("/")[0]) == name]
    if len(found) > 1:
        raise ValueError(f"dataset {key!r} is known in {len(found)} versions: choose {' or '.join(found)}")
    return found[0] if found else None


def lanczos(n: int, m: int) -> np.ndarray:
    """Weights f32[m, n] that resize n samples to m: Lanczos with radius 3, widened when shrinking."""
    position = (np.arange(m) + 0.5) * n / m - 0.5
    x = (position[:, None] - np.arange(n)) / max(n / m, 1)
    weights = np.where(np.abs(x) <= 3, np.sinc(x) * np.sinc(x / 3), 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def nearest(depth: np.ndarray, size: int) -> np.ndarray:
    """f32[H, W] → f32[size, size]."""
    rows, columns = (((np.arange(size) + 0.5) * n / size).astype(int) for n in depth.shape)
    return depth[rows[:, None], columns].astype(np.float32)
