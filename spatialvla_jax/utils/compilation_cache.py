"""JAX's persistent compilation cache."""

from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def share_compilations(folder: Path) -> None:
    """Enable JAX's persistent compilation cache in `folder`; the user's JAX_COMPILATION_CACHE_DIR wins."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()  # JAX reads the setting only once, possibly before this call
