"""Write a tiny export for trying the integrations, and the answers of `spatialvla_jax.Policy` on it.

    python integrations/make_export.py FOLDER

Writes FOLDER/export, the PyTorch export of a tiny model with random weights that estimates depth itself, and
FOLDER/expected.npz: images u8[N, H, W, 3], prompts, and the "action_ids" and "actions" of `Policy.infer`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from spatialvla_jax import Policy
from spatialvla_jax.actions import gaussian_grid
from spatialvla_jax.checkpoints import read_huggingface
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.export.convert import write_pytorch
from spatialvla_jax.text import train_tokenizer

TINY_MODEL = Path(__file__).parents[1] / "tests" / "golden" / "tiny_model"
PROMPTS = ("Pick up the black bowl", "open the drawer", "put the bowl on the plate", "turn on the stove")


def main(folder: Path) -> None:
    low, high = [-1.0] * 6 + [0.0], [1.0] * 7
    action = {"min": low, "q01": low, "mean": [0.0] * 7, "std": high, "q99": high, "max": high}
    action |= {"mask": [True] * 6 + [False]}
    processor = Processor(
        tokenizer=train_tokenizer(list(PROMPTS), 96),
        grid=gaussian_grid([(0.0, 0.4)] * 6, num_bins=(4, 4, 4, 4, 4, 4), min_sigma=0.0),
        statistics={"libero": {"action": action, "num_transitions": 1, "num_trajectories": 1}},
        intrinsics={"libero": [[1.2, 0.0, 0.5], [0.0, 1.2, 0.5], [0.0, 0.0, 1.0]]},
        prompt_template="{instruction}?",
    )
    read = read_huggingface(TINY_MODEL)
    write_pytorch(folder / "export", replace(read, config=replace(read.config, prompt_length=64), processor=processor))

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (len(PROMPTS), 8, 8, 3), np.uint8)
    images = coarse.repeat(32, 1).repeat(32, 2)
    policy = Policy.load(folder / "export")
    asked = [{"image": image, "prompt": prompt} for image, prompt in zip(images, PROMPTS, strict=True)]
    answers = [policy.infer(one) for one in asked]
    ids, actions = (np.stack([answer[name] for answer in answers]) for name in ("action_ids", "actions"))
    expected = folder / "expected.npz"
    np.savez_compressed(expected, images=images, prompts=np.array(PROMPTS), action_ids=ids, actions=actions)
    print(f"wrote {folder / 'export'} and {expected}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
