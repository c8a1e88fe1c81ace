"""A command that is stopped by a signal ends with one line, wherever it is."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from spatialvla_jax.utils.atomic import remove_unfinished

WORDS = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}  # the last line of a command that was stopped
GRACE = 5.0  # seconds in which a stopped command may tidy up; a compilation does not look for signals for minutes


class Terminated(BaseException):
    """SIGTERM, raised in the main thread as KeyboardInterrupt is for SIGINT."""


def keep_handlers() -> None:
    """Puts Python's handlers back in place, which libtpu replaces as it is loaded by one that prints its stack."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.getsignal(number))


@contextlib.contextmanager
def sigterm_raises(command: str) -> Iterator[None]:
    """SIGTERM raises Terminated within. Where the main thread has not left in `GRACE` seconds, or has not seen a SIGINT
    in that time, the process ends with `command` in its last line. Outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended, seen = threading.Event(), threading.Event()
    read, write = os.pipe()
    os.set_blocking(write, False)

    def handle(number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_name == "_xla_gc_callback":  # Python would only print the exception
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
            return
        if number == signal.SIGTERM:
            raise Terminated
        seen.set()
        raise KeyboardInterrupt

    # A shell's background jobs ignore SIGINT, and go on doing so.
    numbers = [signal.SIGTERM] + [signal.SIGINT] * (signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    handlers = {number: signal.signal(number, handle) for number in numbers}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        while received := os.read(read, 64):
            for number, answered in ((signal.SIGTERM, ended), (signal.SIGINT, seen)):
                # A run that trains has its own handler, and ends after its step.
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
        seen.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(write)
        watcher.join()
        os.close(read)
