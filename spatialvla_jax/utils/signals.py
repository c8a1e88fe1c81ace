"""Ends a command that is stopped by a signal with one line of output, whatever it is doing."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from spatialvla_jax.utils.atomic import remove_unfinished

WORDS = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}  # the last line of a stopped command
GRACE = 5.0  # seconds for a stopped command to clean up; a compilation may ignore signals for minutes


class Terminated(BaseException):
    """SIGTERM, raised in the main thread as KeyboardInterrupt is for SIGINT."""


def keep_handlers() -> None:
    """Reinstall Python's handlers: libtpu replaces them on loading with one that prints its stack."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.getsignal(number))


@contextlib.contextmanager
def sigterm_raises(command: str) -> Iterator[None]:
    """In this block, SIGTERM raises Terminated. The process prints `command` and ends if the main thread takes over
    `GRACE` seconds to leave the block or to notice a SIGINT. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended, interrupted = threading.Event(), threading.Event()
    read, write = os.pipe()
    os.set_blocking(write, False)

    def handle(number: int, frame: FrameType | None) -> None:
        # Python prints and drops an exception that is raised within this callback: send the signal again, after it.
        if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
            return
        if number == signal.SIGTERM:
            raise Terminated
        interrupted.set()
        raise KeyboardInterrupt

    # A shell's background jobs ignore SIGINT and must keep doing so.
    numbers = [signal.SIGTERM] + [signal.SIGINT] * (signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    handlers = {number: signal.signal(number, handle) for number in numbers}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        while received := os.read(read, 64):
            for number, answered in ((signal.SIGTERM, ended), (signal.SIGINT, interrupted)):
                # A training run has its own handler, and ends after its step.
                if number in received and signal.getsignal(number) is handle and not answered.wait(GRACE):
                    remove_unfinished()
                    print(f"{command}: {WORDS[number]}", file=sys.stderr, flush=True)
                    os._exit(128 + number)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        interrupted.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(write)
        watcher.join()
        os.close(read)
