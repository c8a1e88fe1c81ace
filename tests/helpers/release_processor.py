"""An independent implementation of the release's processor, based only on `tokenizers`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

LOCATIONS = [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]


class ReleaseProcessor:
    """For an exported directory. Adds tokens in the release's order: `<image>`, PaliGemma's locations, the actions."""

    def __init__(self, directory: Path):
        self.config = json.loads((directory / "processor_config.json").read_text())
        self.images = json.loads((directory / "preprocessor_config.json").read_text())
        names = json.loads((directory / "tokenizer_config.json").read_text())
        self.bos = names["bos_token"]
        self.tokenizer = tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.add_special_tokens(["<image>"])
        tokenizer.add_tokens(LOCATIONS)
        total = self.config["action_config"]["num_bins"]["total"]
        tokenizer.add_special_tokens([f"<ACTION{i:05d}>" for i in range(total)])
        self.ids = {name: tokenizer.token_to_id(text) for name, text in names.items() if name.endswith("_token")}
        self.ids |= {"image": tokenizer.token_to_id("<image>"), "action": tokenizer.token_to_id("<ACTION00000>")}
        tokenizer.enable_padding(direction="left", pad_id=self.ids["pad_token"], pad_token=names["pad_token"])

    def encode(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """→ input_ids and attention_mask i64[N, T], padded on the left."""
        images = "<image>" * self.images["image_seq_length"]
        texts = [f"{images}{self.bos}{prompt}\n" for prompt in prompts]
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return np.array([x.ids for x in encoded]), np.array([x.attention_mask for x in encoded])

    def pixels(self, image: np.ndarray) -> np.ndarray:
        """u8[H, W, 3] → f32[3, S, S] in [0, 1], resized bicubically."""
        size = self.images["size"]["width"], self.images["size"]["height"]
        resized = Image.fromarray(image).resize(size, Image.Resampling(self.images["resample"]))
        return np.asarray(resized, np.float32).transpose(2, 0, 1) * self.images["rescale_factor"]

    def decode_actions(self, tokens: np.ndarray, unnorm_key: str) -> np.ndarray:
        """Token ids [T, 3] → actions f64[T, 7] in robot units."""
        policy = {name: np.array(x) for group in self.config["bin_policy"].values() for name, x in group.items()}
        centres = {name.removesuffix("_bins"): (x[1:] + x[:-1]) / 2 for name, x in policy.items()}
        groups, first, bins = (("theta", "phi", "r"), ("roll", "pitch", "yaw")), self.ids["action"], []
        for column, names in enumerate(groups):
            shape = [len(centres[name]) for name in names]
            ids = np.clip(tokens[:, column] - first, 0, np.prod(shape) - 1)
            bins += [centres[name][i] for name, i in zip(names, np.unravel_index(ids, shape), strict=True)]
            first += int(np.prod(shape))
        theta, phi, r, *angles = bins
        xyz = r * np.array([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)])
        actions = np.stack([*xyz.clip(-1, 1), *angles, np.where(tokens[:, 2] <= first, 0.0, 1.0)], 1)
        rows: dict[str, Any] = self.config["statistics"][unnorm_key]["action"]
        low, high = np.array(rows["q01"]), np.array(rows["q99"])
        return np.where(rows["mask"], (actions + 1) / 2 * (high - low) + low, actions)
