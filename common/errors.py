"""The one exception that a person is meant to read."""


class InputError(ValueError):
    """Bad input: the message says what was got, what was wanted, and what to change.

    The command line prints the message without a traceback and exits with code 2.
    """
