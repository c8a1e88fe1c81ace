from pathlib import Path

import pytest
from toy_rlds import make_episodes, make_rlds


@pytest.fixture(scope="session")
def rlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One LIBERO-style dataset: 7 training and 2 validation episodes."""
    return make_rlds(tmp_path_factory.mktemp("rlds"), {"train": make_episodes(7), "val": make_episodes(2, seed=1)})
