"""The interface of a file format: it splits a file into parts and turns each part into rows and refusals."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, ParamSpec, Self, TypeVar

from dtrpo_ray.data.formats.files import Shard, plan_shards
from dtrpo_ray.data.formats.parsing import AS_NAMED, Columns, Record, Refusal, one_row
from dtrpo_ray.data.formats.reading import BATCH_ROWS, raw_batches, raw_rows
from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.errors import DataError

HEAD_ROWS = 1_000  # a file is recognised by the columns of so many rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(ABC):
    """A row that a format makes of a file's; `origin` is "file:line" or "file:row", counted from 1.

    `ignored` are the columns of its raw row that hold something and are no part of it.
    """

    origin: str = ""
    ignored: tuple[str, ...] = field(default=(), compare=False)

    @abstractmethod
    def require(self) -> Self:
        """Return the row. Raises Refusal for one that breaks a rule of all formats."""

    @property
    def is_answered(self) -> bool:
        """Return whether the row has a reference answer, or is of a kind that has none."""
        return True


T = TypeVar("T")
R = TypeVar("R", bound=Row)
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Format(ABC, Generic[R]):
    """A layout of rows, which a file has if it has all its `columns`. Every raw row becomes rows R or is refused.

    One of `columns` may be any of several, "a|b". Beside the columns that it reads, a row may have those `beside` it
    and those ABOUT it (parsing.py); any other column refuses its row, unless `task.ignore_columns` names it. `task` is
    what the task says of its columns. `rows_each` rows of a file make one row R.
    """

    name: str
    columns: tuple[str, ...]
    beside: frozenset[str] = field(default=frozenset(), kw_only=True)
    task: Columns = field(default=AS_NAMED, kw_only=True)
    rows_each: ClassVar[int] = 1

    def fits(self, columns: set[str]) -> bool:
        """Return whether a file of these columns, under the names that the task gives them, has this layout."""
        return all(columns.intersection(name.split("|")) for name in self.columns)

    def parse_raw(self, parse: Callable[[Record], T], value: Any) -> tuple[T, tuple[str, ...]]:
        """Return what `parse` makes of a raw row, and the columns that are no part of it. Raises Refusal."""
        with one_row():
            record = Record.of_row(value, self.task)
            made = parse(record)
            return made, record.ignored(self.beside)

    def shards(self, file: str, rows: int | None = None) -> list[Shard]:
        """Return the parts of a file, of `rows` rows each if they are given."""
        return plan_shards(file, rows)

    @abstractmethod
    def read(self, shard: Shard) -> Iterator[R | Rejected]:
        """Yield the rows of a part and the refusals."""

    def batches(self, shard: Shard) -> Iterator[tuple[list[R], list[Rejected]]]:
        """Yield the rows of a part and the refusals, a batch at a time."""
        return split_batches(self.read(shard), BATCH_ROWS)


@dataclass(frozen=True, slots=True)
class RowFormat(Format[R]):
    """A format whose raw rows are parsed one by one; `parse` returns one row without its origin, or a list of them."""

    parse: Callable[[Record], R | list[R]]

    def parse_row(self, origin: str, value: Any) -> Iterator[R | Rejected]:
        """Yield the rows, or the refusals, that one raw row becomes; of several "origin#2" is the second."""
        found = attempt(origin, self.parse_raw, self.parse, value)
        if isinstance(found, Rejected):
            yield found
            return
        made, ignored = found
        rows = made if isinstance(made, list) else [made]
        for number, row in enumerate(rows, 1):
            where = origin if len(rows) == 1 else f"{origin}#{number}"
            yield attempt(where, self._require, replace(row, origin=where, ignored=ignored))

    def _require(self, row: R) -> R:
        if self.task.answers and not row.is_answered:
            raise Refusal(
                "no reference answer", "score.scorer compares with it; task.columns names the column `answer`"
            )
        return row.require()

    def read(self, shard: Shard) -> Iterator[R | Rejected]:
        for origin, value in raw_rows(shard):
            yield from self.parse_row(origin, value)

    def batches(self, shard: Shard) -> Iterator[tuple[list[R], list[Rejected]]]:
        for batch in raw_batches(shard):
            yield split_rejected(itertools.chain.from_iterable(self.parse_row(*row) for row in batch))


def attempt(origin: str, make: Callable[P, T], *args: P.args, **options: P.kwargs) -> T | Rejected:
    """Return what `make` returns, or the refusal of the row at `origin` that it raises."""
    try:
        return make(*args, **options)
    except Refusal as refusal:
        return Rejected(origin, *refusal.args)


F = TypeVar("F", bound=Format[Any])


def find_format(file: str, formats: Sequence[F], kind: str, task: Columns = AS_NAMED) -> F:
    """Return the first of `formats` whose columns the first rows of a file have. Raises DataError if none fits."""
    rows = [value for _, value in itertools.islice(raw_rows(Shard(file)), HEAD_ROWS) if isinstance(value, dict)]
    # columns of many rows, not of one: a row that lacks its prompt is a bad row, not another format
    columns = {name for row in rows for name, value in task.rename(row).items() if value is not None} - task.ignored
    if gone := [theirs for theirs in task.names.values() if not any(theirs in row for row in rows)]:
        raise DataError(f"{file}: has no column {gone[0]!r}, which task.columns names")
    for form in formats:
        if form.fits(columns):
            return replace(form, task=task)
    found = ", ".join(sorted(columns)) or "none (no row is a JSON object)"
    known = "; ".join(f"{form.name} ({', '.join(form.columns)})" for form in formats)
    raise DataError(f"{file}: no format of {kind} has these columns: {found}; known formats: {known}")


def split_rejected(rows: Iterable[T | Rejected]) -> tuple[list[T], list[Rejected]]:
    """Return the good rows and the refusals."""
    good: list[T] = []
    rejected: list[Rejected] = []
    for row in rows:
        rejected.append(row) if isinstance(row, Rejected) else good.append(row)
    return good, rejected


def split_batches(rows: Iterator[T | Rejected], size: int) -> Iterator[tuple[list[T], list[Rejected]]]:
    """Yield batches of at most `size` rows, refused ones included, each split by `split_rejected`."""
    while batch := list(itertools.islice(rows, size)):
        yield split_rejected(batch)
