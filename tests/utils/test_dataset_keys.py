import pytest

from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.dataset_keys import find_key

KNOWN = ["bridge_orig/1.0.0", "toy", "droid/1.0.0", "droid/1.0.1", "both", "both/1.0.0"]


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("bridge_orig/1.0.0", "bridge_orig/1.0.0"),
        ("bridge_orig", "bridge_orig/1.0.0"),
        ("toy/2.0.0", "toy"),
        ("toy", "toy"),
        ("droid/1.0.1", "droid/1.0.1"),
        ("both", "both"),
        ("both/1.0.0", "both/1.0.0"),
        ("both/2.0.0", "both"),
        ("bridge_orig/2.0.0", None),  # other data
        ("bridge", None),
        ("droid/2.0.0", None),
        ("", None),
        ("/1.0.0", None),
    ],
)
def test_both_spellings_are_one_key(key: str, found: str | None) -> None:
    assert find_key(key, KNOWN) == found


def test_several_versions_are_listed() -> None:
    with pytest.raises(InputError, match=r"'droid' is known in 2 versions: choose droid/1.0.0 or droid/1.0.1"):
        find_key("droid", KNOWN)
