from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for a test module's indexes."""
    return tmp_path_factory.mktemp("cache")
