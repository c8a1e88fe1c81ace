"""Where results come from: the code's commit, the versions of what it runs on, and the date."""

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from spatialvla_jax import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def provenance() -> dict[str, Any]:
    """{"commit", "versions": {package: version}, "date"}. The commit is "" outside a checkout; it ends in "-dirty" if
    tracked files differ from it. The date is UTC."""
    versions = {"spatialvla_jax": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": commit(Path(__file__).parents[2]), "versions": versions, "date": date}


def commit(checkout: Path) -> str:
    if not (checkout / ".git").exists():  # a folder above that is a repository is not ours
        return ""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout of another user
        return ""
