"""The two ways a command ends other than well: the user's mistake, and numbers that went wrong."""

import os
import shlex
import sys


class UserError(Exception):
    """A mistake the user can mend: one line that names the file, key or value and says what to do. Exit status 2."""


class TrainingError(Exception):
    """The run can't go on (a loss that is not finite, say): one line that names the step and the term. Exit status 1."""


class NonFiniteError(TrainingError):
    """A loss, term, gradient norm or parameter is not finite."""

    def __init__(self, message: str, state: int | None = None) -> None:
        """state: the step after which the parameters were those that the number was computed from, if known."""
        super().__init__(message)
        self.state = state


class LostRanksError(TrainingError):
    """A collective failed because of other ranks: a consequence, not the cause."""


def python(*words: str) -> str:
    """A command line of this interpreter, for messages."""
    near = os.path.relpath(sys.executable)
    return shlex.join([min(near, sys.executable, key=len), *words])


def pip_install(*packages: str) -> str:
    """The command that installs packages into the environment of this interpreter, for messages."""
    return python("-m", "pip", "install", *packages)
