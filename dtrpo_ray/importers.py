"""Preference files in the field's formats -> rows of prompt, chosen, rejected -> the table preference/v1.

Formats are recognised by their columns: TRL preference (explicit or implicit prompt, text or messages), HH-RLHF
dialogues, UltraFeedback-binarized, LLaMA-Factory rankings. A bad row is refused with a named reason and its origin.
"""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from dtrpo_ray.errors import DataError
from dtrpo_ray.records import CONTRACT_VERSION, PREFERENCE
from dtrpo_ray.tokenizer import encode_prompt, encode_response, mask_token_id

Messages = list[dict[str, str]]
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FORMATS = "TRL (prompt, chosen, rejected), HH-RLHF (chosen, rejected), LLaMA-Factory (conversations, chosen, rejected)"


@dataclass(frozen=True, slots=True)
class Preference:
    """One readable pair; `origin` is file:row, counted from 1."""

    prompt: str | Messages
    chosen: str
    rejected: str
    origin: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was refused, and why."""

    reason: str
    origin: str


class _Refused(Exception):
    """Raised by a reader for one row; the message is the reason."""


def read_preferences(path: Path) -> tuple[list[Preference], list[Rejected]]:
    """Every row of a file, as a pair or as a refusal. Raises DataError if no row has a known format."""
    good: list[Preference] = []
    bad: list[Rejected] = []
    columns: set[str] = set()
    for number, record in enumerate(_records(path), 1):
        origin = f"{path}:{number}"
        try:
            if not isinstance(record, dict):
                raise _Refused(record if isinstance(record, str) else "not an object")
            columns |= record.keys()
            prompt, chosen, rejected = _reader(record)(record)
            if not chosen.strip() or not rejected.strip():
                raise _Refused("empty side")
            if chosen == rejected:
                raise _Refused("identical sides")
            good.append(Preference(prompt, chosen, rejected, origin))
        except _Refused as refusal:
            bad.append(Rejected(str(refusal), origin))
    if not good:
        why = f"; the first row was refused: {bad[0].reason}" if bad else "; the file is empty"
        raise DataError(f"{path}: no preference pairs (columns {sorted(columns)}){why}. Known formats: {FORMATS}")
    return good, bad


def _records(path: Path) -> Iterator[Any]:
    """Rows of a file; a line that is no JSON or no UTF-8 comes as a string naming the fault."""
    if path.suffix == ".parquet":
        yield from pq.read_table(path).to_pylist()
        return
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if path.name.removesuffix(".gz").endswith(".json"):
        try:
            whole = json.loads(raw)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not valid JSON ({error})") from None
        yield from whole if isinstance(whole, list) else [whole]
        return
    for line in raw.split(b"\n"):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            yield "not valid JSON"
        except UnicodeDecodeError:
            yield "not valid UTF-8"


def _reader(record: dict[str, Any]) -> Callable[[dict[str, Any]], tuple[str | Messages, str, str]]:
    missing = [name for name in ("chosen", "rejected") if record.get(name) in (None, "", [])]
    if missing:
        raise _Refused(f"field {missing[0]} is missing or empty")
    if "conversations" in record:
        return _llama_factory
    if "instruction" in record:
        return _alpaca
    if "prompt" in record:
        return _explicit
    return _implicit


def _explicit(record: dict[str, Any]) -> tuple[str | Messages, str, str]:
    prompt, sides = record["prompt"], [record["chosen"], record["rejected"]]
    if isinstance(prompt, str) and all(isinstance(side, str) for side in sides):
        return prompt, *sides
    if isinstance(prompt, str):  # UltraFeedback: the messages repeat the prompt
        return _implicit(record)
    return _messages(prompt), *(_last(_messages(side)) for side in sides)


def _implicit(record: dict[str, Any]) -> tuple[str | Messages, str, str]:
    sides = [_dialogue(s) if isinstance(s, str) else _messages(s) for s in (record["chosen"], record["rejected"])]
    if sides[0][:-1] != sides[1][:-1]:
        raise _Refused("the sides answer different prompts")
    if not sides[0][:-1]:
        raise _Refused("no prompt before the answer")
    return sides[0][:-1], _last(sides[0]), _last(sides[1])


def _llama_factory(record: dict[str, Any]) -> tuple[str | Messages, str, str]:
    sides = [_messages([record[name]]) for name in ("chosen", "rejected")]
    return _messages(record["conversations"]), _last(sides[0]), _last(sides[1])


def _alpaca(record: dict[str, Any]) -> tuple[str | Messages, str, str]:
    text = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
    return [{"role": "user", "content": text}], record["chosen"], record["rejected"]


def _messages(value: Any) -> Messages:
    """Messages of {role, content} or {from, value}, with roles in the chat templates' words."""
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise _Refused("not a list of messages")
    made = []
    for message in value:
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role not in ROLES:
            raise _Refused(f"unknown role {role!r}")
        if not isinstance(content, str):
            raise _Refused("a message has no text")
        made.append({"role": ROLES[role], "content": content})
    return made


def _last(messages: Messages) -> str:
    if messages[-1]["role"] != "assistant":
        raise _Refused("a side does not end with the assistant")
    return messages[-1]["content"]


def _dialogue(text: str) -> Messages:
    """An HH-RLHF transcript as messages; the last turn is the answer."""
    messages: Messages = []
    for turn in text.split(HUMAN)[1:]:
        user, *answers = turn.split(ASSISTANT)
        messages.append({"role": "user", "content": user.strip()})
        messages += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    if not messages:
        raise _Refused("no Human: and Assistant: turns")
    return messages


def tokenize_preferences(
    rows: list[Preference],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> tuple[pa.Table, list[Rejected]]:
    """Pairs -> the table preference/v1 without steps. Long prompts lose their beginning; long responses are refused."""
    made: dict[str, dict[str, Any]] = {}
    bad: list[Rejected] = []
    mask_id = mask_token_id(tokenizer)
    for row in rows:
        content = json.dumps([row.prompt, row.chosen, row.rejected], sort_keys=True)
        row_id = hashlib.sha256(content.encode()).hexdigest()[:16]
        prompt = encode_prompt(tokenizer, row.prompt)[-max_prompt_tokens:]
        sides = [encode_response(tokenizer, text, len(prompt), block_size) for text in (row.chosen, row.rejected)]
        if row_id in made:
            bad.append(Rejected("duplicate row", row.origin))
        elif max(map(len, sides)) > max_response_tokens:
            bad.append(Rejected(f"response of {max(map(len, sides))} tokens is over {max_response_tokens}", row.origin))
        elif mask_id in sides[0] + sides[1] + prompt:
            bad.append(Rejected("text holds the mask token", row.origin))
        elif sides[0] == sides[1]:
            bad.append(Rejected("identical sides", row.origin))
        else:
            made[row_id] = {
                "contract_version": CONTRACT_VERSION,
                "row_id": row_id,
                "prompt_id": hashlib.sha256(json.dumps(row.prompt).encode()).hexdigest()[:16],
                "prompt_ids": prompt,
                "chosen_ids": sides[0],
                "rejected_ids": sides[1],
                "chosen_reward": 1.0,
                "rejected_reward": 0.0,
                "block_size": block_size,
                "mask_id": mask_id,
            }
    return pa.Table.from_pylist(list(made.values()), schema=PREFERENCE), bad


def write_quarantine(rejected: list[Rejected], path: Path) -> None:
    """One JSON line for each refused row: reason and origin."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rejected))
