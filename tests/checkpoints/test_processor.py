"""Which statistics and which camera a dataset name selects."""

from dataclasses import replace

import pytest

from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.errors import InputError


@pytest.fixture(scope="module")
def published(processor: Processor) -> Processor:
    """Two datasets with names as published, and cameras that can be told apart by their focal length."""
    cameras = {"default": 1.0, "bridge_orig/1.0.0": 2.0}
    intrinsics = {name: [[f, 0.0, 0.5], [0.0, f, 0.5], [0.0, 0.0, 1.0]] for name, f in cameras.items()}
    statistics = {name: {"action": {"q01": [q]}} for q, name in enumerate(("bridge_orig/1.0.0", "toy"))}
    return replace(processor, statistics=statistics, intrinsics=intrinsics)


@pytest.mark.parametrize("key", ["bridge_orig", "bridge_orig/1.0.0"])
def test_both_spellings_of_a_dataset_are_one(published: Processor, key: str) -> None:
    assert published.find_statistics(key)["action"]["q01"] == [0]
    assert published.find_intrinsics(key)[0][0] == 2
    assert published.find_statistics("toy/1.0.0")["action"]["q01"] == [1]


@pytest.mark.parametrize("key", [None, "bridge_orig/2.0.0", "bridge", 3, ["toy"], ""])
def test_unknown_keys_get_no_statistics(published: Processor, key) -> None:
    with pytest.raises(InputError, match="is not a dataset of this policy; choose one of bridge_orig/1"):
        published.find_statistics(key)


def test_a_missing_or_unknown_key_gets_the_default_camera(published: Processor) -> None:
    """The default camera as in the release; without one, the first."""
    assert [published.find_intrinsics(key)[0][0] for key in (None, "toy", "unknown")] == [1, 1, 1]
    bridge = {name: camera for name, camera in published.intrinsics.items() if name != "default"}
    assert replace(published, intrinsics=bridge).find_intrinsics("toy")[0][0] == 2


def test_the_only_dataset_needs_no_key(processor: Processor) -> None:
    assert processor.find_statistics(None) is processor.statistics["toy"]


def test_exports_have_the_published_names(processor: Processor) -> None:
    statistics = processor.statistics | {"mine": processor.statistics["toy"]}
    known = replace(processor, statistics=statistics, versions={"toy": "1.0.0"})
    assert Processor.from_dict(known.to_dict()).versions == {"toy": "1.0.0"}
    published = known.with_published_names()
    assert list(published.statistics) == ["toy/1.0.0", "mine"] and list(published.intrinsics) == ["toy/1.0.0"]
    assert published.find_statistics("toy") == known.find_statistics("toy")
    assert "versions" not in published.to_dict() and published.with_published_names() == published
    with pytest.raises(InputError, match=r"versions\['toy'\]=1 is a whole number, but a string is expected"):
        Processor.from_dict(known.to_dict() | {"versions": {"toy": 1}})
