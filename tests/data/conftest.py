from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a module's indexes are kept."""
    return tmp_path_factory.mktemp("cache")
