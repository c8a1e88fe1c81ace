"""Checkpoints with Orbax: asynchronous, committed by rename, each one enough to run the policy.

Layout: `<workdir>/checkpoints/<step>/{params, optimizer, metadata}`; `metadata` is JSON with the step, the model's
sizes, the processor (grid, statistics, tokenizer) and the training config; of a run with adapters also where its frozen
parameters are, which `params` leaves out. Where the optimizer keeps averaged
parameters, `params` are these and `optimizer` holds the trained ones.
"""

import contextlib
import errno
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost
from tqdm import tqdm

from spatialvla_jax.checkpoints.orbax import missing, step_directories, tree_handler
from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.training.optimizer import merge, split_frozen, swap_ema
from spatialvla_jax.training.state import TrainState
from spatialvla_jax.utils.distributed import is_writer
from spatialvla_jax.utils.progress import warn

FOLDER = "checkpoints"
INCOMPLETE = "incomplete_checkpoints"  # beside it: those that a run found damaged
# In the array store's errors: a file is missing, cut off or garbled.
DAMAGE = ("NOT_FOUND", "OUT_OF_RANGE", "DATA_LOSS", "FAILED_PRECONDITION", "was not found", "Error decoding")


@contextlib.contextmanager
def quiet_storage() -> Iterator[None]:
    """While a run saves, nothing but the sentence that says why a save failed. Orbax logs the traceback of every error
    that it raises, too. With several devices the array store prints an error for every write that ends after another
    one failed."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook

    def show(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = show
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Checkpoints:
    """Saves every `every` steps in the background, keeps the last `keep_last` and each `keep_every`-th.

    A save that fails is tried again, with the state of that moment, after 1, 2, 4, … steps (the last of a run: seconds)
    up to `RETRIES` times in a row; then StorageError says why. What was saved before is never touched. Over several
    processes the first failure is the last: the others could not follow, and the job's restart is the second attempt.
    """

    RETRIES = 4

    def __init__(
        self,
        workdir: Path,
        metadata: dict[str, Any],
        *,
        every: int,
        keep_last: int,
        keep_every: int | None,
        left_out: tuple[str, ...] = (),
    ):
        self.folder, self.metadata, self.every = (workdir / FOLDER).absolute(), metadata, every
        self.left_out = left_out  # patterns of parameters that are neither saved nor restored, for they never change
        self.keep = {"max_to_keep": keep_last, "keep_period": keep_every}
        self.failures, self.retry_at, self.reason = 0, 0, ""
        self.began, self.seconds = 0.0, 0.0  # of the save under way; how long the last one took
        if is_writer():
            for step in itertools.takewhile(missing, step_directories(workdir)):
                self._set_aside(step, f"{missing(step)} is missing or cut off")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("incomplete checkpoints are set aside")
        self.manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        several = jax.process_count() > 1
        options = ocp.CheckpointManagerOptions(
            **self.keep,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=wait_unless_failed if several else None),
        )
        handlers = {"params": tree_handler(), "optimizer": tree_handler(), "metadata": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether to save after `step`; looks after the save under way."""
        if self.began and not self.manager.is_saving_in_progress():
            self._finish(step)
        return step % self.every == 0 or step == self.retry_at

    def save(self, state: TrainState, step: int, *, last: bool = False) -> None:
        """Start saving `state`, which is that after `step`; wait for it where it is the `last`."""
        self._start(state, step)
        while last and not self._finish(step):
            time.sleep(2.0 ** (self.failures - 1))
            self._start(state, step)

    def _saved(self, state: TrainState) -> tuple[Any, Any]:
        """Parameters and optimizer state as they are stored."""
        return swap_ema(split_frozen(state.params, self.left_out)[0], state.opt_state)

    def _start(self, state: TrainState, step: int) -> None:
        self._finish(step)  # only one at a time
        self.began = time.perf_counter()
        params, opt_state = self._saved(state)
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params),
            optimizer=ocp.args.PyTreeSave(opt_state),
            metadata=ocp.args.JsonSave({"step": step, **self.metadata}),
        )
        try:
            self.manager.save(step, args=items, force=True)
        except Exception as error:  # Orbax raises whatever its storage raises
            self._failed(error, step)

    def _finish(self, step: int) -> bool:
        """Wait for the save under way; returns whether it succeeded."""
        if not self.began:
            return self.failures == 0
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except Exception as error:
            self._failed(error, step)
            return False
        self.seconds, self.began, self.failures = time.perf_counter() - self.began, 0.0, 0
        return True

    def _failed(self, error: Exception, step: int) -> None:
        self.began, self.retry_at = 0.0, step + 2**self.failures
        if not self.failures:  # the following ones may only have stumbled over the remains of this one
            self.reason = reason(error)
        self.failures += 1
        sentence = f"no checkpoint could be written to {self.folder} at step {step}: {self.reason}"
        if jax.process_count() > 1:
            raise StorageError(sentence) from error
        with contextlib.suppress(Exception):
            self.manager.close()
        # A fresh manager knows of finished checkpoints alone, and clears the remains away.
        self.manager = self._open()
        kept = "there is none yet" if self.latest() is None else f"the last good one is of step {self.latest()}"
        if self.failures > self.RETRIES:
            raise StorageError(f"{sentence}; {kept}") from error
        tqdm.write(f"{sentence}; {kept}; trying again", file=sys.stderr)

    def restore_metadata(self) -> dict[str, Any]:
        """That of the newest checkpoint."""
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        return self.manager.restore(self.latest(), args=args)["metadata"]

    def restore(self, state: TrainState, shardings: TrainState) -> tuple[int, TrainState]:
        """→ (step, state) of the newest checkpoint whose files are all there, in the shapes and shardings given (which
        may be another mesh's); (0, `state`) where there is none. Those with files missing or cut off are set aside.

        Raises InputError for a checkpoint that cannot be read for another reason, which may pass, or by one process of
        several: the others would restore another step.
        """
        while step := self.latest():
            try:
                return step, self._restore(step, state, shardings)
            except Exception as error:  # Orbax raises whatever its storage raises
                text = first_cause(error)
                if jax.process_count() > 1 or not any(word in text for word in DAMAGE):
                    raise InputError(f"{self.folder / str(step)} cannot be read: {text[:300]}") from error
                self.manager.close()
                self._set_aside(self.folder / str(step), f"its files are damaged: {text[:200]}")
                self.manager = self._open()
        return 0, state

    def _set_aside(self, step: Path, why: str) -> None:
        """Move a checkpoint that cannot be restored out of the way of the run, which will write that step again."""
        place = self.folder.with_name(INCOMPLETE)
        place.mkdir(exist_ok=True)
        names = itertools.chain([step.name], (f"{step.name}-{n}" for n in itertools.count(2)))
        new = next(place / name for name in names if not (place / name).exists())
        step.rename(new)
        warn(f"{step} is incomplete and was moved to {new}: {why}")

    def _restore(self, step: int, state: TrainState, shardings: TrainState) -> TrainState:
        def target(tree: Any, sharding: Any) -> ocp.args.PyTreeRestore:
            item = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding)
            return ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))

        params, optimizer = map(target, self._saved(state), self._saved(shardings))
        restored = self.manager.restore(step, args=ocp.args.Composite(params=params, optimizer=optimizer))
        at = jax.device_put(np.int32(step), shardings.step)
        params, opt_state = swap_ema(restored["params"], restored["optimizer"])
        return TrainState(at, merge(params, split_frozen(state.params, self.left_out)[1]), opt_state)

    def close(self) -> None:
        """Wait for the save under way. Where it fails the run has ended early, and says by another error why. After a
        failure over several processes nobody is waited for: the others are not told of it."""
        if self.failures and jax.process_count() > 1:
            return
        with contextlib.suppress(Exception):
            self.manager.close()


def wait_unless_failed(*, key: str, timeout_ms: int) -> None:
    """The barrier of a save's background threads. Orbax goes to its last one from the `finally` of a write that failed,
    too, where it would wait for processes that wait for that write, and tell nobody of the failure meanwhile."""
    if sys.exc_info()[1] is None:
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def first_cause(error: BaseException) -> str:
    """The message of an error's first cause, on one line."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return " ".join(str(error).split())


def reason(error: Exception) -> str:
    """The system's own words in an error of the array store, or the error's first words."""
    text = " ".join(str(error).split())
    return next((words for number in errno.errorcode if (words := os.strerror(number)) in text), text[:300])
