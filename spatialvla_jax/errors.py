"""The exceptions whose sentence the command line prints: it exits with 2 for bad input, which no restart mends, and
with 1 where one may."""

from collections.abc import Sequence


class InputError(ValueError):
    """Bad input from the user: the message is one sentence naming the file, key or value and what was expected."""


class StorageError(RuntimeError):
    """What has to be written cannot be: the message is one sentence naming the path and the reason."""


class FaultsError(RuntimeError):
    """Faults are the rule in an evaluation, so that it has ended: the message is one sentence with the last reason."""


class NonFiniteError(InputError):
    """The model's numbers for some observations of a batch are NaN or infinite, so they have no action. `finite` says
    which ones have."""

    def __init__(self, finite: Sequence[bool]):
        self.finite = finite
        failed, count = finite.count(False), len(finite)
        which = "this observation" if count == 1 else f"{failed} of {count} observations"
        super().__init__(
            f"the model's numbers for {which} are NaN or infinite, so there is no action: check the depth, the "
            "intrinsics and the checkpoint's weights"
        )


class Fault(InputError):
    """Bad data in one place of a dataset, which `data.faults` may leave out: `reason` is its kind in a word or two, by
    which it is counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason
