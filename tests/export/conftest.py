from dataclasses import replace

import pytest
from helpers.checkpoints import checkpoint, golden, golden_with_given_depth, processor, reads  # noqa: F401

from spatialvla_jax.export.convert import write_pytorch


@pytest.fixture(scope="session")
def source(processor):  # noqa: F811
    """A model that takes depth from its data and has a bidirectional prefix."""
    read = golden_with_given_depth()
    return replace(read, config=replace(read.config, prompt_length=40, remat="none"), processor=processor)


@pytest.fixture(scope="session")
def folder(source, tmp_path_factory):
    """Its PyTorch export."""
    path = tmp_path_factory.mktemp("export") / "export"
    write_pytorch(path, source)
    return path
