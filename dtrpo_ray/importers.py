"""Preference files of other projects -> `PreferenceRow`s -> the table preference/v1. Imports no torch and no ray.

Every row of a file ends in exactly one place: imported, or `Rejected` with a named reason and its origin. A file's
format is recognised by its columns (`FORMATS`; docs/data.md shows each).
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dtrpo_ray.errors import DataError
from dtrpo_ray.records import CONTRACT_VERSION, PREFERENCE, check_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
Prompt = str | Messages

ENDINGS = (".json", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """A pair as text. `origin` is "file:line" (JSONL) or "file:row", both counted from 1."""

    prompt: Prompt
    chosen: str
    rejected: str
    origin: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was not imported: `reason` is one of the names in docs/data.md, `detail` says what was found."""

    origin: str
    reason: str
    detail: str


class _Refusal(Exception):
    """(reason, detail) of one row; never leaves this module."""


# === 1. Files -> raw rows ===


def read_preferences(path: Path) -> tuple[list[PreferenceRow], list[Rejected]]:
    """The pairs of a .json (a list), .jsonl, .jsonl.gz or .parquet file, and the rows refused.

    Raises DataError for a file that cannot be read, holds no row, or has columns of no known format.
    """
    try:
        raw = list(_raw_rows(path))
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the path, or fetch the file again") from None
    parse = _recognise(path, [value for _, value in raw if isinstance(value, dict)])
    rows, rejected = [], []
    for origin, value in raw:
        try:
            rows.append(_checked(PreferenceRow(*parse(_object(value)), origin)))
        except _Refusal as refusal:
            rejected.append(Rejected(origin, *refusal.args))
    return rows, rejected


def _raw_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(origin, value) of each row; the value is a _Refusal where the row could not be decoded."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            if line.strip():
                yield f"{path}:{number}", _decode_json(line)
    elif path.suffix == ".json":
        values = _decode_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        if isinstance(values, _Refusal):
            raise DataError(f"{path}: not JSON ({values.args[1]}); rows one to a line belong in a .jsonl file")
        if not isinstance(values, list):
            raise DataError(f"{path}: holds a JSON {type(values).__name__}; expected a list of rows")
        yield from ((f"{path}:{number}", value) for number, value in enumerate(values, 1))
    elif path.suffix == ".parquet":
        values = (value for batch in pq.ParquetFile(path).iter_batches(1024) for value in _decode_arrow(batch))
        yield from ((f"{path}:{number}", value) for number, value in enumerate(values, 1))
    else:
        raise DataError(f"{path}: unknown kind of file; expected a name ending in {', '.join(ENDINGS)}")


def _decode_json(text: bytes) -> Any:
    # stray bytes become lone surrogates, so that they spoil their own row (see _checked) and not the whole file
    try:
        return json.loads(text.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        return _Refusal("bad JSON", str(error))


def _decode_arrow(batch: pa.RecordBatch) -> list[Any]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [_Refusal("bad UTF-8", str(error))]
        return [row for i in range(len(batch)) for row in _decode_arrow(batch.slice(i, 1))]


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, _Refusal):
        raise value
    if not isinstance(value, dict):
        raise _Refusal("not an object", f"the row is a JSON {type(value).__name__}")
    for field in ("tools", "images", "videos", "audios"):
        if value.get(field):
            raise _Refusal("unsupported field", f"{field} belongs to the prompt and would be lost")
    return value


def _checked(row: PreferenceRow) -> PreferenceRow:
    """The rules that hold for every format."""
    turns = [row.prompt] if isinstance(row.prompt, str) else [turn["content"] for turn in row.prompt]
    try:
        "".join([*turns, row.chosen, row.rejected]).encode()
    except UnicodeEncodeError as error:
        raise _Refusal("bad UTF-8", str(error)) from None
    if not any(turn.strip() for turn in turns):
        raise _Refusal("empty prompt", "the prompt has no text")
    for side in ("chosen", "rejected"):
        if not getattr(row, side).strip():
            raise _Refusal("empty side", f"{side} has no text")
    if row.chosen.strip() == row.rejected.strip():
        raise _Refusal("identical sides", "chosen and rejected are the same text")
    return row


# === 2. One raw row -> (prompt, chosen, rejected), a function for each format ===

Pair = tuple[Prompt, str, str]

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def _explicit(row: dict[str, Any]) -> Pair:
    """TRL with a prompt (text or messages); UltraFeedback, whose sides repeat the prompt as their first turn."""
    prompt, chosen, rejected = (_field(row, name) for name in ("prompt", "chosen", "rejected"))
    if not isinstance(prompt, str):
        return _messages(prompt, "prompt"), _answer(chosen, "chosen"), _answer(rejected, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    shared, *sides = _split(_messages(chosen, "chosen"), _messages(rejected, "rejected"))
    if shared and {"role": "user", "content": prompt} not in shared:
        raise _Refusal("prompts differ", "the prompt is not a user turn of chosen and rejected")
    return shared or [{"role": "user", "content": prompt}], sides[0], sides[1]


def _implicit(row: dict[str, Any]) -> Pair:
    """TRL without a prompt: two lists of messages, or two HH-RLHF dialogues, alike up to the last answer."""
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    parse = _dialogue if isinstance(chosen, str) and isinstance(rejected, str) else _messages
    return _split(parse(chosen, "chosen"), parse(rejected, "rejected"))


def _sharegpt(row: dict[str, Any]) -> Pair:
    """LLaMA-Factory ranking over `conversations` of {from, value}."""
    keys = ("from", "value", _SHAREGPT_ROLES)
    prompt = _system(row) + _messages(_field(row, "conversations"), "conversations", *keys)
    return prompt, *(_answer(_field(row, side), side, *keys) for side in ("chosen", "rejected"))  # type: ignore[return-value]


def _alpaca(row: dict[str, Any]) -> Pair:
    """LLaMA-Factory ranking over instruction, input and history; input goes under instruction, as there."""
    request = [_text(_field(row, "instruction"), "instruction"), _text(row.get("input") or "", "input")]
    prompt = _system(row)
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise _Refusal("wrong type", "history is not a list of [question, answer]")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            prompt.append({"role": role, "content": _text(text, "history")})
    prompt.append({"role": "user", "content": "\n".join(part for part in request if part)})
    return prompt, _text(_field(row, "chosen"), "chosen"), _text(_field(row, "rejected"), "rejected")


@dataclass(frozen=True, slots=True)
class Format:
    """A layout of preference rows; a file has it if it has all its columns, and the first that fits wins."""

    name: str
    columns: tuple[str, ...]
    parse: Callable[[dict[str, Any]], Pair]


FORMATS = (
    Format("LLaMA-Factory ranking, ShareGPT", ("conversations", "chosen", "rejected"), _sharegpt),
    Format("LLaMA-Factory ranking, Alpaca", ("instruction", "chosen", "rejected"), _alpaca),
    Format("TRL with a prompt, UltraFeedback", ("prompt", "chosen", "rejected"), _explicit),
    Format("TRL without a prompt, HH-RLHF", ("chosen", "rejected"), _implicit),
)


def _recognise(path: Path, rows: list[dict[str, Any]]) -> Callable[[dict[str, Any]], Pair]:
    # columns of the whole file, not of one row: a row that lacks its prompt is a bad row, not another format
    columns = {name for row in rows for name, value in row.items() if value is not None}
    for form in FORMATS:
        if columns.issuperset(form.columns):
            return form.parse
    found = ", ".join(sorted(columns)) or "none (no row is a JSON object)"
    known = "; ".join(f"{form.name} ({', '.join(form.columns)})" for form in FORMATS)
    raise DataError(f"{path}: columns of no known preference format: {found}; known are {known}")


def _field(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise _Refusal("missing field", name)
    return row[name]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _Refusal("wrong type", f"{where} is a {type(value).__name__}, not text")
    return value


def _system(row: dict[str, Any]) -> Messages:
    return [{"role": "system", "content": _text(row["system"], "system")}] if row.get("system") else []


def _messages(
    value: Any, where: str, role: str = "role", content: str = "content", roles: dict[str, str] = _ROLES
) -> Messages:
    """A list of messages in our spelling, whatever the file calls the keys and the roles."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise _Refusal("wrong type", f"{where} is not a list of messages")
    for message in value:
        if message.get("tool_calls"):
            raise _Refusal("unsupported field", f"tool_calls in {where}")
        if roles.get(str(message.get(role))) is None:
            raise _Refusal("unknown role", f"{str(message.get(role))[:40]!r} in {where}; known are {', '.join(roles)}")
    return [{"role": roles[m[role]], "content": _text(m.get(content), f"{where}.{content}")} for m in value]


def _answer(
    value: Any, where: str, role: str = "role", content: str = "content", roles: dict[str, str] = _ROLES
) -> str:
    """The text of one assistant turn: bare, a message, or a list of one message."""
    if isinstance(value, str):
        return value
    turns = _messages(value if isinstance(value, list) else [value], where, role, content, roles)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise _Refusal("no answer", f"{where} must be one assistant turn")
    return turns[0]["content"]


def _split(chosen: Messages, rejected: Messages) -> tuple[Messages, str, str]:
    """Two whole conversations -> what they share and the two last turns."""
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[-1]["role"] != "assistant":
            raise _Refusal("no answer", f"{side} does not end in an assistant turn")
    if chosen[:-1] != rejected[:-1]:
        raise _Refusal("prompts differ", "chosen and rejected part before their last turn")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _dialogue(text: str, where: str) -> Messages:
    """An HH-RLHF dialogue -> messages; white space around a turn belongs to the layout."""
    start, *parts = re.split(f"({_HUMAN}|{_ASSISTANT})", text)
    if start or not parts:
        raise _Refusal("not a dialogue", f"{where} is text without a prompt and does not begin with {_HUMAN!r}")
    roles = {_HUMAN: "user", _ASSISTANT: "assistant"}
    return [{"role": roles[m], "content": turn.strip()} for m, turn in zip(parts[::2], parts[1::2], strict=True)]


# === 3. Text -> preference/v1 ===


@dataclass(frozen=True, slots=True)
class _Limits:
    block_size: int
    block_origin: str
    max_prompt_tokens: int
    max_response_tokens: int
    mask_id: int
    control: re.Pattern[str]
    end: int
    turn_end: int


def tokenize_preferences(
    rows: Iterable[PreferenceRow],
    tokenizer: "PreTrainedTokenizerBase",
    block_size: int,
    max_prompt_tokens: int,
    max_response_tokens: int,
    block_origin: str = "global",
) -> tuple[pa.Table, list[Rejected]]:
    """The table preference/v1 (no recorded steps, no rewards) and the rows refused.

    A prompt keeps its last `max_prompt_tokens`; a response counts with its end token and the fill of its block. An
    answer to messages ends as the chat template ends an assistant's turn, one to plain text in the end of sequence.
    """
    # here, since transformers takes seconds that reading need not pay
    from dtrpo_ray.tokenizer import control_tokens, eos_token_id, mask_token_id, turn_end_id

    end, turn_end = eos_token_id(tokenizer), turn_end_id(tokenizer)
    limits = _Limits(
        block_size,
        block_origin,
        max_prompt_tokens,
        max_response_tokens,
        mask_token_id(tokenizer),
        control_tokens(tokenizer),
        end,
        end if turn_end is None else turn_end,
    )
    made, rejected, first_seen = [], [], dict[str, str]()
    for row in rows:
        row_id = _content_id([row.prompt, row.chosen, row.rejected])
        try:
            if row_id in first_seen:
                raise _Refusal("duplicate row", f"the same as {first_seen[row_id]}")
            first_seen[row_id] = row.origin
            made.append({"row_id": row_id, **_tokenized(row, tokenizer, limits)})
        except _Refusal as refusal:
            rejected.append(Rejected(row.origin, *refusal.args))
    return check_table(pa.Table.from_pylist(made, schema=PREFERENCE), "imported preferences"), rejected


def _tokenized(row: PreferenceRow, tokenizer: "PreTrainedTokenizerBase", limits: _Limits) -> dict[str, Any]:
    from dtrpo_ray.tokenizer import encode_prompt, encode_response

    # a prompt of plain text may be written in the model's own chat markup; a message or a response may not
    texts = {} if isinstance(row.prompt, str) else {f"prompt[{i}]": m["content"] for i, m in enumerate(row.prompt)}
    for where, text in {**texts, "chosen": row.chosen, "rejected": row.rejected}.items():
        if found := limits.control.search(text):
            raise _Refusal("control token", f"{where} holds {found[0]!r}, which the tokenizer reads as a control token")
    try:
        prompt = encode_prompt(tokenizer, row.prompt)[-limits.max_prompt_tokens :]
        before = len(prompt) if limits.block_origin == "global" else 0
        end = limits.end if isinstance(row.prompt, str) else limits.turn_end
        sides = {
            side: encode_response(tokenizer, getattr(row, side), before, limits.block_size, end)
            for side in ("chosen", "rejected")
        }
    except DataError as error:
        raise _Refusal("cannot be tokenized", str(error)) from None
    for where, ids in {"prompt": prompt, **sides}.items():
        if limits.mask_id in ids:
            raise _Refusal("mask token", f"{where} holds the mask token, id {limits.mask_id}")
        if where != "prompt" and len(ids) > limits.max_response_tokens:
            raise _Refusal(
                "response too long", f"{where} has {len(ids)} tokens of at most {limits.max_response_tokens}"
            )
    if sides["chosen"] == sides["rejected"]:
        raise _Refusal("identical tokens", "chosen and rejected differ as text and not as tokens")
    return {
        "contract_version": CONTRACT_VERSION,
        "prompt_id": _content_id(row.prompt),
        "prompt_ids": prompt,
        "chosen_ids": sides["chosen"],
        "rejected_ids": sides["rejected"],
        "block_size": limits.block_size,
        "block_origin": limits.block_origin,
        "mask_id": limits.mask_id,
    }


def _content_id(content: Any) -> str:
    """16 hex digits of the SHA-256 of the canonical JSON: the same text has the same id in any file and run."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_quarantine(rejected: Iterable[Rejected], path: Path) -> None:
    """One JSON line {origin, reason, detail} for each row refused; no text of the row itself."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rejected))
