"""Compiled programs kept on disk, for the next process that needs them."""

from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def share_compilations(folder: Path) -> None:
    """Whatever is compiled from now on is stored, and loaded where it was compiled before, by this process or another.
    A directory that the user has set (JAX_COMPILATION_CACHE_DIR) stays."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()  # it looks for its directory only once, and something may have been compiled
