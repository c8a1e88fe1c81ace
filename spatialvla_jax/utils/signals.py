"""A command that is stopped by a signal ends with one line, wherever it is."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from spatialvla_jax.utils.atomic import remove_unfinished

GRACE = 5.0  # seconds in which a stopped command may tidy up; a compilation does not look for signals for minutes


class Terminated(BaseException):
    """SIGTERM, raised in the main thread as KeyboardInterrupt is for SIGINT."""


def _raise(number: int, frame: FrameType | None) -> None:
    if frame is not None and frame.f_code.co_name == "_xla_gc_callback":  # there Python would only print the exception
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        return
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def keep_handlers() -> None:
    """Puts Python's handlers back in place, which libtpu replaces as it is loaded by one that prints its stack."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.getsignal(number))


@contextlib.contextmanager
def sigterm_raises(command: str) -> Iterator[None]:
    """SIGTERM raises Terminated within; where the main thread does not see it in `GRACE` seconds, the process ends
    with `command` in its last line. Outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended = threading.Event()
    read, write = os.pipe()
    os.set_blocking(write, False)
    # A shell's background jobs ignore SIGINT, and go on doing so.
    numbers = [signal.SIGTERM] + [signal.SIGINT] * (signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    handlers = {number: signal.signal(number, _raise) for number in numbers}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        while received := os.read(read, 64):
            # A run that trains has its own handler, and ends after its step.
            if signal.SIGTERM in received and signal.getsignal(signal.SIGTERM) is _raise and not ended.wait(GRACE):
                remove_unfinished()
                print(f"{command}: terminated", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(write)
        watcher.join()
        os.close(read)
