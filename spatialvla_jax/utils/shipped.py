"""What the project ships beside its code: `configs/`, `launch/` and the demo's episodes."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shipped(path: str) -> Path:
    """Where such a file or folder is, for example `data/libero_spatial_demo`.

    It lies at the top of the repository, and in the package of a wheel. The working directory comes first: in a clone
    the path stays relative, and a run's config has no machine's path in it.
    """
    return next((p for p in (Path(path), PACKAGE / path) if p.exists()), PACKAGE.parent / path)
