"""The two spellings of a dataset's name: NAME, and NAME/VERSION as the published checkpoints have it."""

from collections.abc import Collection

from spatialvla_jax.errors import InputError


def find_key(key: str, known: Collection[str]) -> str | None:
    """The one of the `known` names that means the dataset `key`: the same, or the same in the other spelling. None
    where there is none. Raises InputError where several versions are known and `key` names none of them.

    Another version of a dataset has other statistics, so "bridge_orig/2.0.0" is not "bridge_orig/1.0.0".
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
