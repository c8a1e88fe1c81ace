"""The two spellings of a dataset's name: NAME, and NAME/VERSION as in the published checkpoints."""

from collections.abc import Collection

from spatialvla_jax.errors import InputError


def find_key(key: str, known: Collection[str]) -> str | None:
    """The `known` name of the dataset `key`, in either spelling; None if there is none. Raises InputError if several
    versions are known and `key` does not say which.

    Versions have different statistics, so "bridge_orig/2.0.0" does not match "bridge_orig/1.0.0".
    """
    if key in known:
        return key
    name, _, version = key.partition("/")
    if version:
        return name if name in known else None
    versions = [other for other in known if other.partition("/")[0] == name]
    if len(versions) > 1:
        raise InputError(f"dataset {key!r} is known in {len(versions)} versions: choose {' or '.join(versions)}")
    return versions[0] if versions else None
