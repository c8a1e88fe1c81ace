"""Progress bars."""

from collections.abc import Callable

from tqdm import tqdm


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
