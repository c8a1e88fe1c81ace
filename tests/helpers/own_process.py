"""Functions that fail in a new process."""

import os
from collections.abc import Callable

from spatialvla_jax.errors import InputError


def refuse(sentence: str, say: Callable[[str], None]) -> None:
    say("looking")
    raise InputError(sentence)


def die(code: int, say: Callable[[str], None]) -> None:
    os._exit(code)
