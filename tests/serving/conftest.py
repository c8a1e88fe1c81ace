from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.serving import serving

from spatialvla_jax import Policy, load_pretrained
from spatialvla_jax.models import SpatialVLA
from spatialvla_jax.serving.server import Server


@pytest.fixture(scope="session")
def policy(trained: Path) -> Policy:
    """A policy for direct calls; prompts have up to 16 tokens, so only one length is compiled."""
    model, params, processor = load_pretrained(trained)
    assert processor
    return Policy(SpatialVLA(replace(model.config, prompt_length=16)), params, processor)


@pytest.fixture(scope="session")
def served(policy: Policy, trained: Path) -> Policy:
    """The same policy with speculation: it accepts drafts."""
    return Policy(policy.model, load_pretrained(trained)[1], policy.processor, speculate=True)


@pytest.fixture(scope="session")
def server(served: Policy) -> Iterator[Server]:
    with serving(served) as server:
        yield server
