"""The errors a user can cause, and their messages on one line.

Each message names the place, the field, the value and the remedy. No class defines `__init__`: Ray sends exceptions
between processes by pickle, which calls the class with `args`.
"""


class DtrpoError(Exception):
    """Base of every error that the user can mend; the CLI prints its message and exits with 2."""


class ConfigError(DtrpoError, ValueError):
    """A job file, an override or a flag that cannot be run."""


class DataError(DtrpoError, ValueError):
    """A row, file or store that breaks its schema."""


class ModelError(DtrpoError, ValueError):
    """A model directory that is unknown, incomplete or of another shape."""


class CheckpointError(DtrpoError, ValueError):
    """A training checkpoint that is missing, partial, corrupt or of another run."""


class TrainError(DtrpoError, RuntimeError):
    """A training run that cannot go on (for example a loss that is not finite)."""


class ServeError(DtrpoError, RuntimeError):
    """A request or deployment that cannot be served."""


class SessionError(DtrpoError, RuntimeError):
    """A Ray session that does not start on this machine."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def last_line(error: BaseException) -> str:
    """Return an error's kind and message; if the message is a traceback, its last line."""
    lines = str(error).strip().splitlines()
    if not lines:
        return repr(error)
    return lines[-1].strip() if len(lines) > 1 else f"{type(error).__name__}: {lines[0].strip()}"
