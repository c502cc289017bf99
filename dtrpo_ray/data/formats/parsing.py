"""Typed access to a raw row, and the checks that all formats share.

A row that cannot be used raises `Refusal`; it is then refused in its own place and spoils no other row.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

from dtrpo_ray.errors import DtrpoError

EXTRAS = ("tools", "images", "videos", "audios")  # they belong to a prompt, and would be lost
MOST = 2**31 - 1  # the largest integer that our tables hold

Messages = list[dict[str, str]]
Prompt = str | Messages
T = TypeVar("T")


class Refusal(Exception):
    """(reason, detail) of one row; it never leaves the importers."""


@contextmanager
def one_row() -> Iterator[None]:
    """Turn an error that no check foresaw, in the parsing of one row, into a Refusal of that row."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, DtrpoError):
            raise
        raise Refusal("wrong type", f"{type(error).__name__}: {error}"[:200]) from None


class Chat(NamedTuple):
    """The keys of a message in a file, and our name for each of its roles."""

    role: str
    content: str
    roles: dict[str, str]


OPENAI = Chat("role", "content", {"system": "system", "user": "user", "assistant": "assistant"})
SHAREGPT = Chat("from", "value", {"system": "system", "human": "user", "gpt": "assistant"})


# === values: each function returns `value` in a type, or raises Refusal that names `where` it stands ===


def _as_type(kind: type[T], says: str) -> Callable[[Any, str], T]:
    def read(value: Any, where: str) -> T:
        if not isinstance(value, kind):
            raise Refusal("wrong type", f"{where} is a {type(value).__name__}, not {says}")
        return value

    return read


as_text, as_list, as_label = _as_type(str, "text"), _as_type(list, "a list"), _as_type(bool, "true or false")


def as_reference(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        raise Refusal("wrong type", f"{where} is a {type(value).__name__}, neither text nor JSON") from None


def as_integer(value: Any, where: str, least: int = 0) -> int:
    """Return an integer from `least` to MOST."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refusal("wrong type", f"{where} is a {type(value).__name__}, not an integer")
    if not least <= value <= MOST:
        raise Refusal("bad value", f"{where} is {str(value)[:20]}; expected {least} to {MOST}")
    return value


def as_integers(value: Any, where: str) -> list[int]:
    """Return a list of integers that int32 holds."""
    values = as_list(value, where)
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
        raise Refusal("wrong type", f"{where} is not a list of integers")
    if values and not -MOST <= min(values) <= max(values) <= MOST:
        raise Refusal("bad value", f"{where} holds a number beyond int32")
    return values


def as_float(value: Any, where: str) -> float:
    """Return a number; `where` is followed by "a str, not a number"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refusal("wrong type", f"{where} a {type(value).__name__}, not a number")
    try:
        return float(value)
    except OverflowError:
        raise Refusal("bad value", f"{where} a number beyond float64") from None


def as_messages(value: Any, where: str, chat: Chat = OPENAI) -> Messages:
    """Return messages in our spelling, whatever the file calls the keys and the roles."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Refusal("wrong type", f"{where} is not a list of messages")
    for message in value:
        if message.get("tool_calls"):
            raise Refusal("unsupported field", f"tool_calls in {where}")
        if chat.roles.get(str(message.get(chat.role))) is None:
            known = ", ".join(chat.roles)
            raise Refusal("unknown role", f"{str(message.get(chat.role))[:40]!r} in {where}; known are {known}")
    return [
        {"role": chat.roles[m[chat.role]], "content": as_text(m.get(chat.content), f"{where}.{chat.content}")}
        for m in value
    ]


def as_prompt(value: Any, where: str) -> Prompt:
    """Return text as it is, and anything else as messages."""
    return value if isinstance(value, str) else as_messages(value, where)


# === rows ===


def _field(read: Callable[[Any, str], T]) -> Callable[["Record", str], T]:
    """Make a method that returns a field as `read` does; the field must be there."""
    return lambda record, name: read(record.require(name), name)


class Record:
    """The JSON object of one row. Each method returns a field in the type asked for, or raises Refusal."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields, self.get = fields, fields.get

    @classmethod
    def of_row(cls, value: Any) -> "Record":
        """Return the record of a raw row. Raises Refusal if it is none, or has a field that an import would lose."""
        if isinstance(value, Refusal):
            raise value
        if not isinstance(value, dict):
            raise Refusal("not an object", f"the row is a JSON {type(value).__name__}")
        for name in EXTRAS:
            if value.get(name):
                raise Refusal("unsupported field", f"{name} belongs to the prompt and would be lost")
        return cls(value)

    def first(self, *names: str) -> Any:
        """Return the first of these fields that is there, None if none is."""
        return next((value for name in names if (value := self.get(name)) is not None), None)

    def reference(self, name: str) -> str | None:
        """Return a reference answer as a verifier reads it: text as it is, anything else as JSON."""
        return as_reference(self.get(name), name)

    def require(self, name: str) -> Any:
        """Return a field as it is; it must be there."""
        if (value := self.get(name)) is None:
            raise Refusal("missing field", name)
        return value

    text, items, label = _field(as_text), _field(as_list), _field(as_label)
    integer, size, integers = _field(as_integer), _field(partial(as_integer, least=1)), _field(as_integers)
    prompt, messages, sharegpt = _field(as_prompt), _field(as_messages), _field(partial(as_messages, chat=SHAREGPT))


def require_utf8(content: Any) -> None:
    """Raise Refusal for text, however deep in JSON, that is not UTF-8."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refusal("bad UTF-8", str(error)) from None


def require_text(prompt: Prompt, **sides: str) -> None:
    """Raise Refusal if the prompt or one of the `sides` has no text, or text that is not UTF-8."""
    turns = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    require_utf8([*turns, *sides.values()])
    if not any(turn.strip() for turn in turns):
        raise Refusal("empty prompt", "the prompt has no text")
    for side, answer in sides.items():
        if not answer.strip():
            raise Refusal("empty side", f"{side} has no text")
