"""Fixtures (the golden checkpoint, a processor, a checkpoint with every config field off its default) and helpers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spatialvla_jax.actions import gaussian_grid
from spatialvla_jax.checkpoints import Checkpoint, read_huggingface
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.checkpoints.types import LazyArray, digest
from spatialvla_jax.text import train_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_model"


@pytest.fixture
def golden() -> Path:
    """The published layout with random weights: 380 tensors, 287 of them ZoeDepth's."""
    return GOLDEN


def golden_with_given_depth() -> Checkpoint:
    """The golden model changed to take depth from its data, so without ZoeDepth."""
    read = read_huggingface(GOLDEN)
    arrays = {path: array for path, array in read.arrays.items() if not path.startswith("zoe/")}
    return replace(read, config=replace(read.config, depth_source="dataset"), arrays=arrays)


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
    """The golden model with every config field off its default, and a processor."""
    read = golden_with_given_depth()
    config = replace(read.config, prompt_length=24, action_chunk=3, mask="causal", remat="dots")
    return replace(read, config=config, processor=processor)


@pytest.fixture
def reads(monkeypatch) -> list[list[int]]:
    """How often each lazy array was read, for all arrays created from now on: [[1], [0], …]."""
    counts: list[list[int]] = []
    make = LazyArray.__init__

    def make_counted(self, shape, dtype, read):
        counts.append(count := [0])

        def counted():
            count[0] += 1
            return read()

        make(self, shape, dtype, counted)

    monkeypatch.setattr(LazyArray, "__init__", make_counted)
    return counts


def with_lora(step: Path, copy: Path, **changes: Any) -> Path:
    """A copy of one step of an adapter run, with changed metadata."""
    (copy / "metadata").mkdir(parents=True)
    (copy / "params").symlink_to(step / "params")
    metadata = json.loads((step / "metadata" / "metadata").read_text())
    metadata["lora"] |= changes
    (copy / "metadata" / "metadata").write_text(json.dumps(metadata))
    return copy


def equal(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether config, processor and every byte of every array are equal."""
    processors = [c.processor and c.processor.to_dict() for c in (a, b)]
    digests = [{path: digest(x.read()) for path, x in c.arrays.items()} for c in (a, b)]
    return a.config == b.config and processors[0] == processors[1] and digests[0] == digests[1]
