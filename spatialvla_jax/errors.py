"""The one exception for bad input; the command line prints its sentence and exits with 2."""


class InputError(ValueError):
    """Bad input from the user: the message is one sentence naming the file, key or value and what was expected."""
