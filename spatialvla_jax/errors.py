"""The exceptions for bad input; the command line prints their sentence and exits with 2."""


class InputError(ValueError):
    """Bad input from the user: the message is one sentence naming the file, key or value and what was expected."""


class Fault(InputError):
    """Bad data in one place of a dataset, which `data.faults` may leave out: `reason` is its kind in a word or two, by
    which it is counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason
