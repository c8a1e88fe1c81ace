"""Files shipped besides the code: `configs/`, `launch/` and the demo's episodes."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shipped(path: str) -> Path:
    """The path of a shipped file or folder, such as `data/libero_spatial_demo`.

    It is at the top of a repository, or inside a wheel's package. The working directory is tried first: in a clone the
    path then stays relative, so that a run's config contains no machine-specific path.
    """
    return next((p for p in (Path(path), PACKAGE / path) if p.exists()), PACKAGE.parent / path)
