"""Exceptions whose message the command line prints. Bad input exits with 2: the user must change something. The others
exit with 1: the same command may succeed later."""

from collections.abc import Sequence


class InputError(ValueError):
    """Bad input from the user: the message is one sentence naming the file, key or value and what was expected."""


class StorageError(RuntimeError):
    """A file or bucket cannot be read or written: the message is one sentence naming the path and the reason."""


class FaultsError(RuntimeError):
    """An evaluation or a recording stopped because too many episodes failed: the message is one sentence with the last
    reason."""


class NonFiniteError(InputError):
    """The model returned NaN or infinity for some observations of a batch. `finite` has one flag per observation."""

    def __init__(self, finite: Sequence[bool]):
        self.finite = finite
        failed, count = finite.count(False), len(finite)
        which = "this observation" if count == 1 else f"{failed} of {count} observations"
        super().__init__(
            f"the model's numbers for {which} are NaN or infinite, so there is no action: check the depth, the "
            "intrinsics and the checkpoint's weights"
        )


class Fault(InputError):
    """Bad data in one place of a dataset, which `data.faults` may skip. `reason` names its kind in a word or two;
    faults are counted by it."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason
