"""Exceptions that a person is meant to read: the command line prints their message, without a traceback."""


class InputError(ValueError):
    """Bad input: the message says what was got, what was wanted, and what to change.

    Exit code 2.
    """


class CheckpointUnavailable(Exception):
    """A checkpoint is there and cannot be read now: no network, no memory, no permission. Nothing was changed. Exit code 1."""


class Busy(Exception):
    """Another process writes what this one wants to write. Nothing was changed; later it works. Exit code 1."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C came, or the terminal was closed; the state is saved. Exit code 143, 130 or 129."""

    def __init__(self, message: str, signal: int = 15):
        super().__init__(message)
        self.signal = signal


class Diverged(Exception):
    """Too many steps in a row had no finite loss; the last good checkpoint is untouched.

    Exit code 3: the same command would diverge again.
    """
