"""Paths that users write."""

import os
import re
from pathlib import Path

from spatialvla_jax.errors import InputError


def local_path(path: str | os.PathLike[str], what: str) -> Path:
    """`path` with ~ expanded. Raises InputError for a URL such as gs://bucket/data, which would be a folder "gs:" here;
    `what` names the argument or key that has it."""
    text = os.fspath(path)
    if url := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", text):
        raise InputError(
            f"{what} {url[1]}://{text[url.end() :]} is no path of a file system: mount the bucket (gcsfuse) and name "
            "its folder"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{what} {text} cannot be expanded: {error}") from error
