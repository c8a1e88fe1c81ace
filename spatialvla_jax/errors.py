"""The exceptions whose sentence the command line prints: it exits with 2 for bad input, which no restart mends, and
with 1 where one may."""


class InputError(ValueError):
    """Bad input from the user: the message is one sentence naming the file, key or value and what was expected."""


class StorageError(RuntimeError):
    """What has to be written cannot be: the message is one sentence naming the path and the reason."""


class Fault(InputError):
    """Bad data in one place of a dataset, which `data.faults` may leave out: `reason` is its kind in a word or two, by
    which it is counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason
