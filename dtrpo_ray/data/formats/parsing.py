"""Typed access to a raw row, and the checks that all formats share.

A row that cannot be used raises `Refusal`; it is then refused in its own place and spoils no other row.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeVar

from dtrpo_ray.errors import DtrpoError

EXTRAS = ("images", "videos", "audios")  # they belong to a prompt, and would be lost
# columns that say something about a row and are no part of its text; docs/data.md lists them
ABOUT = (
    r"id|ids|idx|index|uuid|hash|key|.*_(id|ids|idx|uuid|hash|key)|__index_level_0__|source|data_?source|dataset(_name)?"
    r"|origin|generator|annotator|author|category|domain|topic|subset|split|task|language|lang|licen[sc]e|url|date|created"
    r"|timestamp|.*_(at|date|time|timestamp)|metadata|meta|tags|type|status|version|difficulty|quality|length|turn|shard"
    r"|models?|.*_models?|models?_.*|scores?|.*_scores?|score_.*|ratings?|.*_ratings?|rating_.*|rank|margin|rewards?"
    r"|rationales?|order|labelling_.*|raw_.*|original_.*|generation_(model|prompt)|generations|new_generations|in_.*_train"
    r"|num_.*|.*_(tokens|length|count)|is_.*|has_.*"
)
MOST = 2**31 - 1  # the largest integer that our tables hold

Message = dict[str, Any]  # role and content, and perhaps what a chat template writes beside them: reasoning, tool calls
Messages = list[Message]  # the first one may have the `tools` of the conversation
Prompt = str | Messages
Answer = str | Message  # a message if it has more than text
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


ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
    "tool": "tool",
}
_KEYS = {"role": "role", "from": "role", "content": "content", "value": "content"}  # OpenAI's and ShareGPT's


@dataclass(frozen=True, slots=True)
class Columns:
    """What a task says of its files' columns: `names` maps our name to the file's, `ignored` are not to be read.

    With `answers`, a prompt or response needs a reference answer.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    answers: bool = False

    def rename(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row under our names; a column that another one replaces is gone."""
        if not self.names:
            return row
        moved = {*self.names, *self.names.values()}
        kept = {name: value for name, value in row.items() if name not in moved}
        return kept | {ours: row[theirs] for ours, theirs in self.names.items() if theirs in row}


AS_NAMED = Columns()  # nothing is renamed or left out


# === values: each function returns `value` in a type, or raises Refusal that names `where` it stands ===


def _as_type(kind: type[T], says: str) -> Callable[[Any, str], T]:
    def read(value: Any, where: str) -> T:
        if not isinstance(value, kind):
            raise Refusal("wrong type", f"{where} is a {type(value).__name__}, not {says}")
        return value

    return read


as_text, as_list = _as_type(str, "text"), _as_type(list, "a list")


def as_label(value: Any, where: str) -> bool:
    """Return true or false, which may be written as 1 or 0, or as text."""
    found = {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())
    if found is None or not isinstance(value, bool | int | str):
        raise Refusal("wrong type", f"{where} is {str(value)[:20]!r}, neither true (1) nor false (0)")
    return found


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


def as_messages(value: Any, where: str) -> Messages:
    """Return messages in our spelling, whatever the file calls the keys and the roles; empty system turns are none."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Refusal("wrong type", f"{where} is not a list of messages")
    turns = [_as_message(message, where) for message in value]
    return [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]


def _as_message(message: dict[str, Any], where: str) -> Message:
    found = {key: value for key, value in message.items() if not is_empty(value)}
    more = {key: found.pop(key) for key in found.keys() - _KEYS.keys()}
    calls = [_as_call(call, where) for call in as_objects(more.pop("tool_calls", []), f"{where}.tool_calls")]
    if unread := sorted(key for key, value in more.items() if not isinstance(value, str)):
        raise Refusal("unsupported field", f"{', '.join(unread)} in {where} is no text that a chat template writes")
    ours = {_KEYS[key]: value for key, value in found.items()}
    if (role := ROLES.get(str(ours.get("role")).lower())) is None or len(ours) < len(found):
        raise Refusal("unknown role", f"{str(ours.get('role'))[:40]!r} in {where}; known are {', '.join(ROLES)}")
    text = ours.get("content", message.get("content", message.get("value")))
    content = "" if text is None and (calls or more) else as_content(text, f"{where}.content")
    return {"role": role, "content": content} | more | ({"tool_calls": calls} if calls else {})


def _as_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, which templates write as JSON; OpenAI's are JSON text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(text := function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(text or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise Refusal("wrong type", f"{where}.tool_calls: arguments {text[:40]!r} is no JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


def as_objects(value: Any, where: str) -> list[dict[str, Any]]:
    """Return a list of objects without the nulls that Parquet adds; it may be written as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Refusal("wrong type", f"{where} is text that is no JSON") from None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Refusal("wrong type", f"{where} is not a list of objects")
    json.dumps(value)  # a TypeError refuses what is no JSON
    return [without_nulls(item) for item in value]


def without_nulls(value: Any) -> Any:
    """Return a value without the fields of its objects that are null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def as_content(value: Any, where: str) -> str:
    """Return text, which may come in parts {"type": "text", "text": ...}; an empty list is not text."""
    if not isinstance(value, list) or not value:
        return as_text(value, where)
    for part in value:
        if not isinstance(part, dict) or {k for k, v in part.items() if not is_empty(v)} - {"type", "text"}:
            raise Refusal("unsupported field", f"{where} has a part that is not text")
    return "".join(as_text(part.get("text"), f"{where}.text") for part in value)


def is_empty(value: Any) -> bool:
    """Return whether a field holds nothing: null, no text, no item."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def as_prompt(value: Any, where: str) -> Prompt:
    """Return text as it is, and anything else as messages."""
    return value if isinstance(value, str) else as_messages(value, where)


# === rows ===


def _field(read: Callable[[Any, str], T]) -> Callable[["Record", str], T]:
    """Make a method that returns a field as `read` does; the field must be there."""
    return lambda record, name: read(record.require(name), name)


class Record:
    """The JSON object of one row. Each method returns a field in the type asked for, or raises Refusal.

    It notes which fields were asked for, so that `ignored` can tell which ones an import would lose. `withheld` are
    those that the task leaves out.
    """

    def __init__(self, fields: dict[str, Any], withheld: Collection[str] = ()) -> None:
        self.fields = {name: value for name, value in fields.items() if name not in withheld} if withheld else fields
        self.read, self.left = set[str](), {name for name in withheld if not is_empty(fields.get(name))}

    @classmethod
    def of_row(cls, value: Any, columns: Columns = AS_NAMED) -> "Record":
        """Return the record of a raw row. Raises Refusal if it is none, or has a field that an import would lose."""
        if isinstance(value, Refusal):
            raise value
        if not isinstance(value, dict):
            raise Refusal("not an object", f"the row is a JSON {type(value).__name__}")
        for name in EXTRAS:
            if value.get(name) and name not in columns.ignored:
                raise Refusal("unsupported field", f"{name} belongs to the prompt and would be lost")
        return cls(columns.rename(value), columns.ignored)

    def leave(self, *names: str) -> None:
        """Note parts of the row that are left out, to be named among the ignored columns."""
        self.left.update(names)

    def ignored(self, known: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """Return the columns with a value that nothing read. Raises Refusal for one that may hold a part of the text.

        Those may be left out whose name is `known` or says that they are ABOUT the row, and copies of other fields.
        """
        left = {name: value for name, value in self.fields.items() if name not in self.read and not is_empty(value)}
        unknown = [name for name in left if name not in known and not is_about(name)]
        if unknown:
            told = {leaf for name, value in self.fields.items() if name not in unknown for leaf in texts_of(value)}
            unknown = [name for name in unknown if not texts_of(left[name]) or not texts_of(left[name]) <= told]
        if "tools" in unknown:
            raise Refusal("unsupported field", "tools belongs to a prompt of messages and would be lost")
        if unknown:
            remedy = "name what it is in task.columns, or list it in task.ignore_columns"
            raise Refusal("unknown column", f"{', '.join(sorted(unknown))} would be lost; {remedy}")
        return (*left, *sorted(self.left))

    def get(self, name: str) -> Any:
        """Return a field as it is, None if it is not there."""
        self.read.add(name)
        return self.fields.get(name)

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
    prompt, messages = _field(as_prompt), _field(as_messages)


def texts_of(value: Any) -> set[str]:
    """Return the texts of a field, however deep in lists and objects."""
    if isinstance(value, str):
        return {value} if value else set()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {text for item in inner for text in texts_of(item)}


@cache
def is_about(name: str) -> bool:
    """Return whether a column's name says that it is ABOUT a row."""
    return re.fullmatch(ABOUT, name.lower().replace("-", "_")) is not None


def require_utf8(content: Any) -> None:
    """Raise Refusal for text, however deep in JSON, that is not UTF-8."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refusal("bad UTF-8", str(error)) from None


def answer_of(turn: Message) -> Answer:
    """Return an assistant's turn: its text, or the whole message if it has more."""
    return str(turn["content"]) if turn.keys() == {"role", "content"} else turn


def answer_texts(answer: Answer) -> set[str]:
    """Return all texts of an answer."""
    return texts_of(answer if isinstance(answer, str) else {**answer, "role": None})


def require_text(prompt: Prompt, **sides: Answer) -> None:
    """Raise Refusal if the prompt or one of the `sides` has no text, or text that is not UTF-8."""
    turns = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    require_utf8([prompt, *sides.values()])
    if not any(turn.strip() for turn in turns):
        raise Refusal("empty prompt", "the prompt has no text")
    for side, answer in sides.items():
        if not any(text.strip() for text in answer_texts(answer)):
            raise Refusal("empty side", f"{side} has no text")
