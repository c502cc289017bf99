"""What the parsers of all formats share: a row that cannot be used is refused in its own place, and spoils no other."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.errors import DtrpoError

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # of HH-RLHF
EXTRAS = ("tools", "images", "videos", "audios")  # belong to a prompt, and would be lost
MOST = 2**31 - 1  # of what a table holds
D1_STOPPED = r"(<\|eot_id\|>|<\|endoftext\|>).*"  # LLaDA's ends, spelled out
D1_BLOCK = 32


class Refusal(Exception):
    """(reason, detail) of one row; it never leaves the importers."""


T = TypeVar("T")


def parted(rows: Iterable[T | Rejected]) -> tuple[list[T], list[Rejected]]:
    """The rows that became something, and those that were refused."""
    good: list[T] = []
    rejected: list[Rejected] = []
    for row in rows:
        rejected.append(row) if isinstance(row, Rejected) else good.append(row)
    return good, rejected


def parted_batches(rows: Iterator[T | Rejected], size: int) -> Iterator[tuple[list[T], list[Rejected]]]:
    """Rows in batches of at most `size`, each `parted`."""
    while batch := list(islice(rows, size)):
        yield parted(batch)


@contextmanager
def one_row() -> Iterator[None]:
    """Around the parsing of one row: what no check foresaw refuses that row, and stops no import."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, DtrpoError):
            raise
        raise Refusal("wrong type", f"{type(error).__name__}: {error}"[:200]) from None


def field(row: dict[str, Any], name: str) -> Any:
    """A field that must be there. Raises Refusal."""
    if row.get(name) is None:
        raise Refusal("missing field", name)
    return row[name]


def reference(value: Any, where: str) -> str | None:
    """A reference answer as a verifier reads it: text as it is, anything else as JSON. Raises Refusal."""
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        raise Refusal("wrong type", f"{where} is a {type(value).__name__}, neither text nor JSON") from None


def text(value: Any, where: str) -> str:
    """A value that must be text. Raises Refusal."""
    if not isinstance(value, str):
        raise Refusal("wrong type", f"{where} is a {type(value).__name__}, not text")
    return value
