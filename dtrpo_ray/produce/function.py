"""Reward responses by a function of the user's own, which the job file names as `module:function`.

It is called as TRL calls a reward function; docs/data.md has the contract. The code runs with the user's rights.
"""

import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa

from dtrpo_ray.data.schemas import TRAJECTORY
from dtrpo_ray.errors import ConfigError, last_line
from dtrpo_ray.files import sha256_file

# keyword -> column: TRL has names of its own for two
COLUMNS = {"prompts": "prompt", "completions": "response"}
COLUMNS |= {name: name for name in TRAJECTORY.names if name not in COLUMNS.values()}


class Unscorable(Exception):
    """A row that cannot be scored: (row number, reason). `Scorer` adds the file and raises DataError."""


@dataclass(frozen=True, slots=True)
class FunctionSource:
    """A function by its name `module:function`, the job's folder, and its module's file with its SHA-256."""

    name: str
    folder: Path
    file: Path
    digest: str

    @classmethod
    def find(cls, name: str, folder: Path) -> "FunctionSource":
        """Import the module, with the job's folder first on sys.path, and find the function. Raises ConfigError."""
        module = _import(name, folder.resolve())
        _keywords(_function(name, module), name)
        if not module.__file__:
            raise ConfigError(f"score.scorer = {name!r}: the module has no file that could be hashed")
        file = Path(module.__file__).resolve()
        return cls(name, folder.resolve(), file, sha256_file(file))

    def load(self) -> Callable[..., object]:
        """Return the function. Raises ConfigError if this process imports another file than `find` did."""
        module = _import(self.name, self.folder)
        file = Path(module.__file__ or "")
        if not file.is_file() or sha256_file(file) != self.digest:
            raise ConfigError(
                f"score.scorer = {self.name!r}: {file} is not the file that the command began with, {self.file}; keep "
                "it unchanged while the command runs, on a disk that all nodes share"
            )
        return _function(self.name, module)


def _import(name: str, folder: Path) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    known, keeps = sys.modules.get(name.partition(":")[0]), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # kept bytecode passes for that of a file changed within the same second
    try:
        if known and Path(known.__file__ or "").is_relative_to(folder):
            return importlib.reload(known)  # a worker of an earlier stage may hold the file as it was
        return importlib.import_module(name.partition(":")[0])
    except (Exception, SystemExit) as error:  # a module is a program, which raises anything
        raise ConfigError(
            f"score.scorer = {name!r}: it cannot be imported in {folder}: {_describe(error, folder)}"
        ) from None
    finally:
        sys.dont_write_bytecode = keeps


def _function(name: str, module: ModuleType) -> Callable[..., object]:
    try:
        found: object = attrgetter(name.partition(":")[2])(module)
    except AttributeError:
        found = None
    if not callable(found):
        raise ConfigError(f"score.scorer = {name!r}: {module.__file__} has no such function; define it there")
    return found


def _keywords(function: Callable[..., object], name: str) -> list[str]:
    """Return the keywords that a function takes. Raises ConfigError if it needs others than COLUMNS has."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # compiled functions may have none
        return list(COLUMNS)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    taken = [word for word in COLUMNS if takes_all or word in signature.parameters]
    try:
        signature.bind(**dict.fromkeys(taken))
    except TypeError as error:
        raise ConfigError(f"score.scorer = {name!r}: {error}; the keywords are {', '.join(COLUMNS)}") from None
    return taken


def _describe(error: BaseException, within: Path) -> str:
    """Return the last line of an error's traceback, and the deepest line of a file or folder that it passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f" ({f.filename}:{f.lineno})" for f in frames if Path(f.filename).is_relative_to(within)]
    return last_line(error) + "".join(lines[-1:])


class RewardFunction:
    """Reward the rows of a trajectory table by a function, `batch_size` rows in a call."""

    def __init__(self, source: FunctionSource, batch_size: int) -> None:
        self.source, self.batch_size, self.function = source, batch_size, source.load()
        self.keywords = _keywords(self.function, source.name)

    def __call__(self, table: pa.Table) -> list[float | None]:
        """Return rewards in the order of the rows; None for a row that the function does not score."""
        starts = range(0, len(table), self.batch_size)
        return [reward for start in starts for reward in self._call(table.slice(start, self.batch_size), start)]

    def _call(self, table: pa.Table, start: int) -> list[float | None]:
        name, given = self.source.name, {word: table[COLUMNS[word]].to_pylist() for word in self.keywords}
        try:
            returned = self.function(**given)
        except Exception as error:
            traceback.print_exc()  # in the worker's log
            reason = _describe(error, self.source.file)
            raise Unscorable(start, f"{name}, called with {len(table)} rows from here, raised {reason}") from None
        if not isinstance(returned, Iterable) or isinstance(returned, str | bytes | Mapping):
            kind = type(returned).__name__
            raise Unscorable(start, f"{name}, called with {len(table)} rows from here, returned {kind} and no list")
        values = list(returned)
        if len(values) != len(table):
            raise Unscorable(start, f"{name}, called with {len(table)} rows from here, returned {len(values)} rewards")
        return [self._reward(value, row) for row, value in enumerate(values, start)]

    def _reward(self, value: Any, row: int) -> float | None:
        if value is None:
            return None
        try:
            reward = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            reward = math.nan
        if not math.isfinite(reward):
            wanted = "a reward is a finite number, or None to leave the row unscored"
            raise Unscorable(row, f"{self.source.name} returned {value!r:.80}; {wanted}")
        return reward
