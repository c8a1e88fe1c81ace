"""Asynchronous checkpoints with Orbax, committed by a rename or, in a bucket, by a marker file that is written last.
Each checkpoint suffices to run the policy.

Layout: `<workdir>/checkpoints/<step>/{params, optimizer, metadata}`. `metadata` is JSON with the step, the model's
sizes, the processor (grid, statistics, tokenizer) and the training config. With adapters it also says where the frozen
parameters are, which `params` then omits. With averaged parameters, `optimizer` holds the trained ones.
"""

import contextlib
import errno
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers, multihost
from tqdm import tqdm

from spatialvla_jax.checkpoints.orbax import (
    FOLDER,
    MARKER,
    first_cause,
    missing,
    step_directories,
    tree_handler,
    unreadable,
)
from spatialvla_jax.errors import StorageError
from spatialvla_jax.training.optimizer import merge, split_frozen, swap_ema
from spatialvla_jax.training.state import TrainState
from spatialvla_jax.utils.distributed import is_writer
from spatialvla_jax.utils.progress import warn
from spatialvla_jax.utils.storage import AnyPath, absolute, exists, explain, is_url, move_folder, put

INCOMPLETE = "incomplete_checkpoints"  # in a run's directory: checkpoints that were found damaged
# The array store's errors for missing, truncated or garbled files.
DAMAGE = ("NOT_FOUND", "OUT_OF_RANGE", "DATA_LOSS", "FAILED_PRECONDITION", "was not found", "Error decoding")


@dataclass(frozen=True)
class Preservation(checkpoint_managers.PreservationPolicy):
    """Keeps the last `keep_last` checkpoints, the last `keep_last` with steps divisible by `every`, and all with steps
    divisible by `keep_every`."""

    keep_last: int
    every: int
    keep_every: int | None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        regular = [step for step in steps if step % self.every == 0]
        kept = {*steps[-self.keep_last :], *regular[-self.keep_last :]}
        return [step in kept or bool(self.keep_every and step % self.keep_every == 0) for step in steps]


@contextlib.contextmanager
def quiet_storage() -> Iterator[None]:
    """Silence storage libraries, so that a failed save prints one sentence. Orbax also logs the traceback of every
    error it raises. With several devices the array store prints an error for each later write too."""
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
    """Saves every `every` steps in the background and keeps the last `keep_last` and each `keep_every`-th checkpoint.
    With `keep_regular`, also keeps the last `keep_last` at multiples of `every`, whatever was saved in between.

    A failed save is retried with the then current state after 1, 2, 4, … steps (a run's last save: seconds). After
    `RETRIES` failures in a row, StorageError gives the reason. Earlier checkpoints are never touched. Multi-process
    runs do not retry: other hosts cannot join, so the launcher restarts the job.
    """

    RETRIES = 4
    WAIT = 1.0  # seconds before a run's last save is retried; doubled each time

    def __init__(
        self,
        workdir: AnyPath,
        metadata: dict[str, Any],
        *,
        every: int,
        keep_last: int,
        keep_every: int | None,
        keep_regular: bool = False,
        left_out: tuple[str, ...] = (),
    ):
        self.folder, self.metadata, self.every = absolute(workdir / FOLDER), metadata, every
        self.left_out = left_out  # patterns of parameters that never change and are neither saved nor restored
        self.keep: dict[str, Any] = {"max_to_keep": keep_last, "keep_period": keep_every}
        if keep_regular:
            self.keep = {"preservation_policy": Preservation(keep_last, every, keep_every)}
        self.failures, self.retry_at, self.reason = 0, 0, ""
        self.began, self.seconds = 0.0, 0.0  # start of the save in progress; duration of the last one
        self.saving = 0  # its step
        if is_writer():
            self._tidy(workdir)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("incomplete checkpoints are set aside")
        self.manager = self._open()

    def _tidy(self, workdir: AnyPath) -> None:
        """Repair the folder before Orbax reads it. Steps newer than the newest complete one are set aside, except
        interrupted saves in a bucket, which Orbax removes. It would also remove steps copied from a disk to a bucket,
        so these get the marker they lack."""
        complete = False
        for step in step_directories(workdir):
            lost = missing(step)
            if lost and lost != MARKER and not complete:
                self._set_aside(step, f"{lost} is missing or truncated")
            if not lost and is_url(step) and not exists(step / MARKER):
                put(step / MARKER, b"")
            complete = complete or not lost
            if complete and not is_url(step):
                return

    def _open(self) -> ocp.CheckpointManager:
        several = jax.process_count() > 1
        mode = ocp.options.AtomicityMode.COMMIT_FILE if is_url(self.folder) else ocp.options.AtomicityMode.AUTO
        options = ocp.CheckpointManagerOptions(
            **self.keep,
            cleanup_tmp_directories=True,
            atomicity_options=ocp.options.AtomicityOptions(mode),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=wait_unless_failed if several else None),
        )
        handlers = {"params": tree_handler(), "optimizer": tree_handler(), "metadata": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether to save after `step`. Also completes a finished background save."""
        if self.began and not self.manager.is_saving_in_progress():
            self._finish(step)
        return step % self.every == 0 or step == self.retry_at

    def save(
        self,
        state: TrainState,
        step: int,
        upload_logs: Callable[[], None],
        *,
        spikes: dict[str, Any],
        last: bool = False,
    ) -> None:
        """Start saving `state`, the state after `step`, and wait for it if it is the `last`. `upload_logs` is called
        first, so that a resumed run finds its logs. `spikes` is the metadata's record of loss spikes, {} for none."""
        self.metadata = self.metadata | ({"spikes": spikes} if spikes else {})
        self._start(state, step, upload_logs)
        while last and not self._finish(step):
            time.sleep(self.WAIT * 2 ** (self.failures - 1))
            self._start(state, step, upload_logs)

    def _saved(self, state: TrainState) -> tuple[Any, Any]:
        """Parameters and optimizer state in the form that is stored."""
        return swap_ema(split_frozen(state.params, self.left_out)[0], state.opt_state)

    def _start(self, state: TrainState, step: int, upload_logs: Callable[[], None]) -> None:
        self._finish(step)  # at most one save at a time
        self.began, self.saving = time.perf_counter(), step
        params, opt_state = self._saved(state)
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params),
            optimizer=ocp.args.PyTreeSave(opt_state),
            metadata=ocp.args.JsonSave({"step": step, **self.metadata}),
        )
        try:
            upload_logs()
            self.manager.save(step, args=items, force=True)
        except Exception as error:  # Orbax raises whatever its storage raises
            self._failed(error, step)

    def _finish(self, step: int) -> bool:
        """Wait for the save in progress; returns whether it succeeded."""
        if not self.began:
            return self.failures == 0
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except Exception as error:
            self._failed(error, step)
            return self.failures == 0
        self.seconds, self.began, self.failures = time.perf_counter() - self.began, 0.0, 0
        return True

    def _failed(self, error: Exception, step: int) -> None:
        self.began, self.retry_at = 0.0, step + 2**self.failures
        if not self.failures:  # later failures may only be due to this one's remains
            self.reason = reason(error, self.folder)
        self.failures += 1
        sentence = f"no checkpoint could be written to {self.folder} at step {step}: {self.reason}"
        if jax.process_count() > 1:
            raise StorageError(sentence) from error
        with contextlib.suppress(Exception):
            self.manager.close()
        # A new manager only knows finished checkpoints, and removes the remains.
        self.manager = self._open()
        if self.latest() == self.saving and not missing(self.folder / str(self.saving)):
            # Orbax can raise after it has committed, for example if it could not remove an older step.
            self.failures, self.retry_at = 0, 0
            warn(f"{self.folder / str(self.saving)} is complete, but while it was saved: {self.reason}")
            return
        kept = "there is none yet" if self.latest() is None else f"the last good one is from step {self.latest()}"
        if self.failures > self.RETRIES:
            raise StorageError(f"{sentence}; {kept}") from error
        tqdm.write(f"{sentence}; {kept}; trying again", file=sys.stderr)

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, newest first: if the process is killed meanwhile, the newest one left
        still belongs to the run."""
        self._finish(step)
        for later in sorted(self.manager.all_steps(), reverse=True):
            if later > step:
                self.manager.delete(later)

    def restore_metadata(self) -> dict[str, Any]:
        """The metadata of the newest checkpoint."""
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        return self.manager.restore(self.latest(), args=args)["metadata"]

    def restore(self, state: TrainState, shardings: TrainState) -> tuple[int, TrainState]:
        """→ (step, state) of the newest intact checkpoint, in the given shapes and shardings, which may be for another
        mesh; (0, `state`) if there is none. Checkpoints with missing or truncated files are set aside.

        Raises InputError if a checkpoint cannot be read for another reason, or, in multi-process runs, for any reason,
        since other processes would restore another step. Raises StorageError if a bucket does not answer.
        """
        while step := self.latest():
            try:
                return step, self._restore(step, state, shardings)
            except Exception as error:  # Orbax raises whatever its storage raises
                text = " ".join(str(first_cause(error)).split())
                if jax.process_count() > 1 or not any(word in text for word in DAMAGE):
                    raise unreadable(error, f"{self.folder / str(step)} cannot be read") from error
                self.manager.close()
                self._set_aside(self.folder / str(step), f"its files are damaged: {text[:200]}")
                self.manager = self._open()
        return 0, state

    def _set_aside(self, step: AnyPath, why: str) -> None:
        """Move a checkpoint that cannot be restored aside; the run will write that step again."""
        place = self.folder.parent / INCOMPLETE
        names = itertools.chain([step.name], (f"{step.name}-{n}" for n in itertools.count(2)))
        new = next(place / name for name in names if not exists(place / name))
        if is_url(step):
            move_folder(step, new)
        else:
            place.mkdir(exist_ok=True)
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
        """Wait for the save in progress. If it fails, the run has already ended with another error. After a failure in
        a multi-process run, don't wait: the other processes don't know of it."""
        if self.failures and jax.process_count() > 1:
            return
        with contextlib.suppress(Exception):
            self.manager.close()


def wait_unless_failed(*, key: str, timeout_ms: int) -> None:
    """The barrier of a save's background threads. Orbax also enters its last barrier from the `finally` of a failed
    write. It would then wait for processes that wait for that write, and report the failure to nobody."""
    if sys.exc_info()[1] is None:
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def reason(error: Exception, folder: AnyPath) -> str:
    """Why `folder` could not be written: the bucket's answer, or the operating system's message inside an error of the
    array store. Otherwise the start of the error's text."""
    if is_url(folder):
        sentence = str(explain(first_cause(error), folder, "written"))
        return sentence.removeprefix(f"{folder} cannot be written").removeprefix(f"{folder}").removeprefix(": ")
    text = " ".join(str(error).split())
    return next((words for number in errno.errorcode if (words := os.strerror(number)) in text), text[:300])
