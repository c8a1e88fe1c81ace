"""Progress bars, and warnings that don't tear them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm


class Show(Protocol):
    def __call__(self, done: int, total: int | None, *, desc: str | None = None, note: str | None = None) -> None: ...


@contextmanager
def progress_bar(desc: str, unit: str) -> Iterator[Show]:
    """A progress bar as the callback `show(done, total)` that our long functions take; a total of None is unknown.
    `desc` is what stands before the bar, `note` what stands behind it."""
    with tqdm(desc=desc, unit=unit) as bar:

        def show(done: int, total: int | None, *, desc: str | None = None, note: str | None = None) -> None:
            if desc is not None:
                bar.set_description(desc, refresh=False)
            if note is not None:
                bar.set_postfix_str(note, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        yield show


def warn(sentence: str) -> None:
    tqdm.write(f"warning: {sentence}", file=sys.stderr)


def shard_progress() -> Callable[[str, int, int], None]:
    """A progress bar for each dataset that is indexed: (name, shards done, shards)."""
    bars: dict[str, tqdm] = {}

    def show(name: str, done: int, total: int) -> None:
        if name not in bars:
            bars[name] = tqdm(total=total, desc=f"indexing {name}", unit="shard", leave=False)
        bars[name].update(done - bars[name].n)
        if done == total:
            bars.pop(name).close()

    return show
