"""Fixtures: the golden checkpoint, a processor, and a checkpoint with every config field off its default; `equal`."""

from dataclasses import replace
from pathlib import Path

import pytest

from spatialvla_jax.actions import gaussian_grid
from spatialvla_jax.checkpoints import Checkpoint, read_huggingface
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.checkpoints.types import digest
from spatialvla_jax.text import train_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_model"


@pytest.fixture
def golden() -> Path:
    """The published layout with random weights: 380 tensors, of which 287 are ZoeDepth's."""
    return GOLDEN


@pytest.fixture(scope="session")
def processor() -> Processor:
    rows = {name: [0.5 + i] * 7 for i, name in enumerate(("min", "q01", "mean", "std", "q99", "max"))}
    return Processor(
        tokenizer=train_tokenizer(["put the bowl on the plate", "open the drawer"], 96),
        grid=gaussian_grid([(0.1, 0.4)] * 6, num_bins=(4, 4, 4, 4, 4, 4), min_sigma=0.0),
        statistics={
            "toy": {"action": rows | {"mask": [True] * 6 + [False]}, "num_transitions": 3, "num_trajectories": 1}
        },
        intrinsics={"toy": [[1.2, 0.0, 0.51], [0.0, 1.6, 0.49], [0.0, 0.0, 1.0]]},
        prompt_template="what should the robot do to {instruction}?",
    )


@pytest.fixture(scope="session")
def checkpoint(processor) -> Checkpoint:
    """The golden model as one that takes depth from its data, every config field off its default, and a processor."""
    read = read_huggingface(GOLDEN, ignore=("vision_zoe_model.",))
    config = replace(read.config, prompt_length=24, action_chunk=3, mask="causal", remat="dots")
    return replace(read, config=config, processor=processor)


def equal(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether config, processor and every byte of every array are the same."""
    processors = [c.processor and c.processor.to_dict() for c in (a, b)]
    digests = [{path: digest(x.read()) for path, x in c.arrays.items()} for c in (a, b)]
    return a.config == b.config and processors[0] == processors[1] and digests[0] == digests[1]
