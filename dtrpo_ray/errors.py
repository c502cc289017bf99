"""The errors a user can cause, and their messages on one line.

    DtrpoError           any of them: the CLI prints its message and exits with 2
    +-- ConfigError      a job file, an override or a flag that cannot be run
    +-- DataError        a row, file or store that breaks its schema
    +-- ModelError       a model directory that is unknown, incomplete or of another shape
    +-- CheckpointError  a training checkpoint that is missing, partial, corrupt or of another run
    +-- TrainError       a training run that cannot go on (for example a loss that is not finite)
    +-- ServeError       a request or deployment that cannot be served
    +-- SessionError     a Ray session that does not start on this machine

Each message names the place, the field, the value and the remedy. No class defines `__init__`: Ray sends exceptions
between processes by pickle, which calls the class with `args`.
"""


class DtrpoError(Exception): ...


class ConfigError(DtrpoError, ValueError): ...


class DataError(DtrpoError, ValueError): ...


class ModelError(DtrpoError, ValueError): ...


class CheckpointError(DtrpoError, ValueError): ...


class TrainError(DtrpoError, RuntimeError): ...


class ServeError(DtrpoError, RuntimeError): ...


class SessionError(DtrpoError, RuntimeError): ...


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def last_line(error: BaseException) -> str:
    """Return an error's kind and message; if the message is a traceback, its last line."""
    lines = str(error).strip().splitlines()
    if not lines:
        return repr(error)
    return lines[-1].strip() if len(lines) > 1 else f"{type(error).__name__}: {lines[0].strip()}"
