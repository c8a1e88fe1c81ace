"""Progress bars, and warnings that don't garble them."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm import tqdm

REMIND = 15.0  # seconds between messages about a running stage
SETTLED = (2, 5.0)  # updates and seconds after the first update, from which on the remaining time is shown


class Bar(tqdm):
    """A progress bar that shows the remaining time once it means something. The first update is left out of the
    estimate, because it contains what happens once: compilation, opening files, work that an earlier run did."""

    _first: tuple[float, float] | None = None  # position and time after the first update
    _later = 0  # updates since then

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if self._first is None:
            self._first = (self.n, time.monotonic())
        else:
            self._later += 1
        return shown

    @property
    def format_dict(self) -> dict[str, Any]:
        values = dict(super().format_dict)
        if not values["total"]:
            return values
        begun, since = self._first or (self.n, time.monotonic())
        seconds = time.monotonic() - since
        if self._later < SETTLED[0] or seconds < SETTLED[1] or self.n <= begun:
            return values | {"bar_format": "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"}
        return values | {"rate": (self.n - begun) / seconds}


class Show(Protocol):
    def __call__(self, done: int, total: int | None, *, desc: str | None = None, note: str | None = None) -> None: ...


@contextmanager
def progress_bar(desc: str, unit: str) -> Iterator[Show]:
    """A progress bar as the callback `show(done, total)` that our long functions accept; total may be None. `desc` is
    shown before the bar, `note` after it."""
    with Bar(desc=desc, unit=unit) as bar:

        def show(done: int, total: int | None, *, desc: str | None = None, note: str | None = None) -> None:
            if desc is not None:
                bar.set_description(desc, refresh=False)
            if note is not None:
                bar.set_postfix_str(note, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        yield show


@contextmanager
def timed_stage(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Report how long the block took and, every `REMIND` seconds, that it is still running."""
    began, ended = time.perf_counter(), threading.Event()

    def remind() -> None:
        while not ended.wait(REMIND):
            say(f"  {name}: {time.perf_counter() - began:.0f} s so far")

    reminder = threading.Thread(target=remind, daemon=True)
    reminder.start()
    try:
        yield
    finally:
        ended.set()
        reminder.join()
    say(f"  {name}: {time.perf_counter() - began:.1f} s")


def warn(sentence: str) -> None:
    tqdm.write(f"warning: {sentence}", file=sys.stderr)


def shard_progress() -> Callable[[str, int, int], None]:
    """A progress bar per dataset being indexed: callback (name, shards done, shards)."""
    bars: dict[str, Bar] = {}

    def show(name: str, done: int, total: int) -> None:
        if name not in bars:
            bars[name] = Bar(total=total, desc=f"indexing {name}", unit="shard", leave=False)
        bars[name].update(done - bars[name].n)
        if done == total:
            bars.pop(name).close()

    return show
