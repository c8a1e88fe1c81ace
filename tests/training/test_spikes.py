"""A run with one poisoned batch: it rewinds, skips batches, and does the same again when killed."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.batches import assert_equal

from spatialvla_jax.batch import Batch
from spatialvla_jax.checkpoints import load_pretrained
from spatialvla_jax.checkpoints.orbax import read_metadata, step_directory
from spatialvla_jax.config import check_together, load_config
from spatialvla_jax.data import Loader
from spatialvla_jax.errors import InputError
from spatialvla_jax.training.goodput import account, read_processes
from spatialvla_jax.training.loop import train
from spatialvla_jax.training.metrics import read_metrics
from spatialvla_jax.training.saving import Preservation
from spatialvla_jax.training.spikes import SpikePolicy, Watch

POISONED = 6  # the number of the batch; step 7 takes it first
FLAGS = {  # the program of the fixture `trained`
    **{"train.steps": "10", "mesh.fsdp": "4", "mesh.data": "2", "checkpoint.every": "2", "checkpoint.keep_last": "2"},
    **{"train.spikes.factor": "1.05", "train.spikes.window": "2", "train.spikes.rewind": "2"},
}


class Killed(Exception):
    pass


class Feed:
    """Replaces Loader.batches: all batches have the same action, except the poisoned one. `taken` collects the numbers
    of the batches it returned; after `dies_after` of them the run ends."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.dies_after = -1
        self.batches = Loader.batches

    def __call__(self, loader: Loader, size: int, *, start_step: int, **options: Any) -> Iterator[Batch]:
        for number, batch in enumerate(self.batches(loader, size, start_step=start_step, **options), start_step):
            if len(self.taken) == self.dies_after:
                raise Killed
            self.taken.append(number)
            yield batch if number == POISONED else replace(batch, actions=np.zeros_like(batch.actions))


def feed_batches(patch: pytest.MonkeyPatch) -> Feed:
    feed = Feed()
    patch.setattr(Loader, "batches", lambda *args, **options: feed(*args, **options))
    return feed


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Feed:
    return feed_batches(monkeypatch)


@pytest.fixture(scope="module")
def undisturbed(packed_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("spikes") / "run"
    with pytest.MonkeyPatch.context() as patch:
        feed = feed_batches(patch)
        train(load_config(packed_config, FLAGS), workdir)
    # The spike of step 7 is noticed during step 8. Rewound to step 4, the run continues with step 8's batch.
    assert feed.taken == [*range(8), *range(7, 13)]
    return workdir


@pytest.mark.slow
def test_it_goes_back_and_on_with_the_batches_after_it(undisturbed: Path) -> None:
    records = read_metrics(undisturbed / "metrics.jsonl")
    assert [r["step"] for r in records] == [*range(1, 11)]
    assert [r["spikes"] for r in records] == [0] * 4 + [1] * 6
    assert [r["spikes/skipped_batches"] for r in records] == [0] * 4 + [3] * 6
    last = step_directory(undisturbed)
    assert last is not None and last.name == "10"
    kept = read_metadata(last)["spikes"]
    (spike,) = kept["spikes"]
    assert (spike["step"], spike["rewound_to"], kept["skipped"]) == (7, 4, 3)
    assert spike["loss"] > 1.05 * spike["median"] and kept["losses"] == [r["loss"] for r in records[-2:]]
    assert account(read_processes(undisturbed))["lost"] > 0


@pytest.mark.slow
def test_killed_before_on_and_after_its_way_back(
    packed_config: Path, feed: Feed, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed after the step with the spike but before it is noticed, and after the rewind, before the first checkpoint
    and after it."""
    config, workdir = load_config(packed_config, FLAGS), tmp_path / "run"
    taken = ([*range(7)], [6, 7], [4, 5, 6, 7, 7, 8, 9])
    for numbers in taken:
        feed.dies_after = len(feed.taken) + len(numbers)
        with pytest.raises(Killed):
            train(config, workdir)
        assert feed.taken[-len(numbers) :] == numbers
    feed.dies_after = -1
    train(config, workdir)
    assert feed.taken[-4:] == [9, 10, 11, 12]
    assert read_metrics(workdir / "metrics.jsonl") == read_metrics(undisturbed / "metrics.jsonl")
    assert_equal(load_pretrained(workdir)[1], load_pretrained(undisturbed)[1])


def step(loss: float) -> dict[str, Any]:
    return {"loss": jnp.float32(loss), "skipped": jnp.int32(0)}


def feed_losses(watch: Watch, first: int, *losses: float) -> list[int | None]:
    found = []
    for number, loss in enumerate(losses, first):
        watch.waiting.append((number, step(loss)))
        found.append(watch.look())
    return found


def test_what_a_spike_is() -> None:
    """Above the factor times the median of a full window, finite, and with a checkpoint to rewind to."""
    watch = Watch(SpikePolicy(2.0, 3, 4, 2), 10, 0)
    assert feed_losses(watch, 1, 4, 4, 4, 9) == [None] * 4  # no checkpoint yet
    assert feed_losses(watch, 10, 4, 8, math.inf, math.nan, 4, 8.1, 4) == [None] * 5 + [10] + [None]
    assert watch.skipped == 5 and watch.counts() == {"spikes": 1, "spikes/skipped_batches": 5}
    watch.restored(10, {"losses": [1.0, 1.0]})
    assert feed_losses(watch, 11, 7, 3) == [None, None]  # the window was not full; then its median was 1, and 3 > 2
    watch = Watch(watch.policy, 10, 0, **json.loads(json.dumps(watch.to_dict())))
    assert watch.skipped == 5
    assert Watch(SpikePolicy(0, 3, 0, 2), 10, 0).to_dict() == {}


def test_too_many_spikes_end_the_run() -> None:
    watch = Watch(SpikePolicy(2.0, 2, 0, 0), 5, 0, losses=[1.0, 1.0])
    with pytest.raises(InputError, match=r"step 6: the loss is 3, the median of 2 steps .* train.spikes.limit"):
        feed_losses(watch, 6, 3.0)


def test_a_rewind_behind_the_kept_checkpoints_is_refused(packed_config: Path) -> None:
    flags = {"train.spikes.factor": "2", "checkpoint.keep_last": "3"}
    check_together(load_config(packed_config, flags | {"train.spikes.rewind": "10"}))
    with pytest.raises(InputError, match=r"train.spikes.rewind=11 .* = 10 steps"):
        check_together(load_config(packed_config, flags | {"train.spikes.rewind": "11"}))
    with pytest.raises(InputError, match=r"train\.spikes\.factor"):
        load_config(packed_config, {"train.spikes.factor": "0.5"})


def test_a_checkpoint_between_displaces_none_to_go_back_to() -> None:
    def kept(keep_every: int | None, *steps: int) -> list[int]:
        saved = [SimpleNamespace(step=step) for step in steps]
        flags = Preservation(2, 10, keep_every).should_preserve(saved, context=None)
        return [step for step, keep in zip(steps, flags, strict=True) if keep]

    assert kept(None, 10, 20, 30) == [20, 30]
    assert kept(None, 10, 20, 23, 24) == [10, 20, 23, 24]
    assert kept(None, 10, 20, 23, 24, 30) == [20, 24, 30]
    assert kept(10, 10, 20, 23, 24, 30, 40) == [10, 20, 30, 40]
