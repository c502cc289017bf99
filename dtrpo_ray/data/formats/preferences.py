"""Preference files of other projects -> `PreferenceRow`s, paired and unpaired. Imports no torch and no ray.

Every row of a file ends in exactly one place: in a pair, or `Rejected` with a named reason and its origin. A file's
format is recognised by its columns (`FORMATS`; docs/data.md shows each).
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dtrpo_ray.data.formats import views
from dtrpo_ray.data.formats.batches import BATCH_ROWS, raw_rows, recognised
from dtrpo_ray.data.formats.columns import PROMPT, prompt_columns
from dtrpo_ray.data.formats.files import Shard, data_files, plan_shards, share_shards
from dtrpo_ray.data.formats.parsing import (
    ASSISTANT,
    EXTRAS,
    HUMAN,
    ROLES,
    SHAREGPT_ROLES,
    Refusal,
    field,
    one_row,
    parted,
    parted_batches,
    text,
)
from dtrpo_ray.data.formats.views import View
from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.stages import sha256_json

Messages = list[dict[str, str]]
Prompt = str | Messages

_Answers = list[tuple[str, str]]  # (origin, text)


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """A pair as text. `origin` is "file:line" or "file:row", counted from 1; `rejected_origin` is of a pair that was
    made of two rows."""

    prompt: Prompt
    chosen: str
    rejected: str
    origin: str
    rejected_origin: str | None = None

    @property
    def origins(self) -> list[str]:
        """Of every row of the file that the pair is made of."""
        return [self.origin, *([self.rejected_origin] if self.rejected_origin else [])]


# pairs in columns; `partner` is the second origin of a pair that was made of two rows
PAIRS = pa.schema(
    [*PROMPT, ("chosen", pa.string()), ("rejected", pa.string()), ("partner", pa.string())],
)


def as_table(rows: Sequence[PreferenceRow]) -> pa.Table:
    """Pairs as PAIRS."""
    columns: dict[str, Any] = {name: [getattr(row, name) for row in rows] for name in ("origin", "chosen", "rejected")}
    columns |= prompt_columns([row.prompt for row in rows])
    return pa.table(columns | {"partner": [row.rejected_origin for row in rows]}, schema=PAIRS)


# === 1. Files -> pairs ===


def read_preferences(where: str | Path) -> tuple[list[PreferenceRow], list[Rejected]]:
    """The pairs of a file or folder, and the rows refused.

    Raises DataError for a file that cannot be read, holds no row, or has columns of no known format.
    """
    return parted(row for file in data_files(str(where)) for row in read_file(file))


def read_file(file: str) -> Iterator[PreferenceRow | Rejected]:
    """The pairs of a file and the rows refused, one after the other."""
    form = recognise(file)
    for shard in shards_of(form, file):
        yield from read_shard(form, shard)


def shards_of(form: "Format", file: str, rows: int | None = None) -> list[Shard]:
    """A file in parts, of `rows` rows where they are given; the partners of unpaired rows are in the same part."""
    return share_shards(file) if form.unpaired else plan_shards(file, rows)


def read_shard(form: "Format", shard: Shard) -> Iterator[PreferenceRow | Rejected]:
    """The rows of one part of a file; unpaired rows are paired within it."""
    if form.unpaired:
        yield from _paired(form, shard)
        return
    for origin, value in raw_rows(shard):
        yield _pair(form, origin, value)


def read_tables(form: "Format", shard: Shard) -> Iterator[tuple[pa.Table, list[Rejected]]]:
    """What `read_shard` reads, a batch at a time: the pairs as PAIRS, and the rows refused."""
    if form.unpaired:
        for rows, rejected in parted_batches(_paired(form, shard), BATCH_ROWS):
            yield as_table(rows), rejected
    else:
        yield from views.tables(shard, form.views, lambda *row: [_pair(form, *row)], as_table)


def _pair(form: "Format", origin: str, value: Any) -> PreferenceRow | Rejected:
    try:
        with one_row():
            prompt, chosen, rejected = form.parse(row_object(value))
            return _checked(PreferenceRow(prompt, chosen, rejected, origin))
    except Refusal as refusal:
        return Rejected(origin, *refusal.args)


def _paired(form: "Format", shard: Shard) -> Iterator[PreferenceRow | Rejected]:
    """Good and bad answers of the same prompt in the order of the file, each used once.

    Of the part's share of the prompts; the first share has the rows that have none.
    """
    share, shares = shard.share
    groups: dict[str, tuple[Prompt, _Answers, _Answers]] = {}
    for origin, value in raw_rows(shard):
        try:
            with one_row():
                prompt, answer, is_good = form.parse(row_object(value))
                require_text(prompt_turns(prompt), answer=answer)
                key = sha256_json(prompt)
        except Refusal as refusal:
            if share == 0:
                yield Rejected(origin, *refusal.args)
            continue
        if int(key[:8], 16) % shares != share:
            continue
        _, good, bad = groups.setdefault(key, (prompt, [], []))
        (good if is_good else bad).append((origin, answer))
    for prompt, good, bad in groups.values():
        for (good_at, chosen), (bad_at, rejected) in zip(good, bad, strict=False):
            try:
                yield _checked(PreferenceRow(prompt, chosen, rejected, good_at, bad_at))
            except Refusal as refusal:
                yield from (Rejected(origin, *refusal.args) for origin in (good_at, bad_at))
        used = min(len(good), len(bad))
        for kind, left in (("rejected", good[used:]), ("chosen", bad[used:])):
            for origin, _ in left:
                yield Rejected(origin, "no partner", f"the file has no {kind} answer to this prompt for it")


def row_object(value: Any) -> dict[str, Any]:
    if isinstance(value, Refusal):
        raise value
    if not isinstance(value, dict):
        raise Refusal("not an object", f"the row is a JSON {type(value).__name__}")
    for name in EXTRAS:
        if value.get(name):
            raise Refusal("unsupported field", f"{name} belongs to the prompt and would be lost")
    return value


def _checked(row: PreferenceRow) -> PreferenceRow:
    """The rules that hold for every format."""
    require_text(prompt_turns(row.prompt), chosen=row.chosen, rejected=row.rejected)
    if row.chosen.strip() == row.rejected.strip():
        raise Refusal("identical sides", "chosen and rejected are the same text")
    return row


def prompt_turns(prompt: Prompt) -> list[str]:
    """The texts of a prompt."""
    return [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]


def require_utf8(content: Any) -> None:
    """Raise Refusal for text, however deep in JSON, that is not UTF-8."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refusal("bad UTF-8", str(error)) from None


def require_text(turns: list[str], **sides: str) -> None:
    require_utf8([*turns, *sides.values()])
    if not any(turn.strip() for turn in turns):
        raise Refusal("empty prompt", "the prompt has no text")
    for side, answer in sides.items():
        if not answer.strip():
            raise Refusal("empty side", f"{side} has no text")


# === 2. One raw row -> (prompt, chosen, rejected), a function for each format ===

Pair = tuple[Prompt, str, str]
Labelled = tuple[Prompt, str, bool]


def _explicit(row: dict[str, Any]) -> Pair:
    """TRL with a prompt (text or messages); UltraFeedback, whose sides repeat the prompt as their first turn."""
    prompt, chosen, rejected = (field(row, name) for name in ("prompt", "chosen", "rejected"))
    if not isinstance(prompt, str):
        return messages(prompt, "prompt"), _answer(chosen, "chosen"), _answer(rejected, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    shared, *sides = _split(messages(chosen, "chosen"), messages(rejected, "rejected"))
    if shared and {"role": "user", "content": prompt} not in shared:
        raise Refusal("prompts differ", "the prompt is not a user turn of chosen and rejected")
    return shared or [{"role": "user", "content": prompt}], sides[0], sides[1]


def _implicit(row: dict[str, Any]) -> Pair:
    """TRL without a prompt: two lists of messages, two HH-RLHF dialogues or two texts, alike at their beginning."""
    chosen, rejected = field(row, "chosen"), field(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not chosen.startswith(HUMAN) and not rejected.startswith(HUMAN):
            return _split_texts(chosen, rejected)
        return _split(_dialogue(chosen, "chosen"), _dialogue(rejected, "rejected"))
    return _split(messages(chosen, "chosen"), messages(rejected, "rejected"))


def _sharegpt(row: dict[str, Any]) -> Pair:
    """LLaMA-Factory ranking over `conversations` of {from, value}."""
    keys = ("from", "value", SHAREGPT_ROLES)
    prompt = _system(row) + messages(field(row, "conversations"), "conversations", *keys)
    return prompt, *(_answer(field(row, side), side, *keys) for side in ("chosen", "rejected"))  # type: ignore[return-value]


def _alpaca(row: dict[str, Any]) -> Pair:
    """LLaMA-Factory ranking over instruction, input and history."""
    return _alpaca_prompt(row), text(field(row, "chosen"), "chosen"), text(field(row, "rejected"), "rejected")


def _alpaca_prompt(row: dict[str, Any]) -> Messages:
    """System, history and instruction, with input under it, as LLaMA-Factory has it."""
    request = [text(field(row, "instruction"), "instruction"), text(row.get("input") or "", "input")]
    prompt = _system(row)
    history = row.get("history") or []
    for turn in history if isinstance(history, list) else [None]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Refusal("wrong type", "history is not a list of [question, answer]")
        for role, said in zip(("user", "assistant"), turn, strict=True):
            prompt.append({"role": role, "content": text(said, "history")})
    prompt.append({"role": "user", "content": "\n".join(part for part in request if part)})
    return prompt


def _unpaired(row: dict[str, Any]) -> Labelled:
    """TRL unpaired: a prompt (text or messages), a completion, and a label that says whether it is good."""
    prompt, completion = field(row, "prompt"), field(row, "completion")
    if not isinstance(prompt, str):
        prompt = messages(prompt, "prompt")
    return prompt, _answer(completion, "completion"), _label(row, "label")


def _unpaired_messages(row: dict[str, Any]) -> Labelled:
    """LLaMA-Factory KTO over `messages` of {role, content}, the last of which is judged."""
    return *_last_answer(messages(field(row, "messages"), "messages"), "messages"), _label(row, "label")


def _unpaired_sharegpt(row: dict[str, Any]) -> Labelled:
    """LLaMA-Factory KTO over `conversations` of {from, value}, the last of which is judged."""
    turns = messages(field(row, "conversations"), "conversations", "from", "value", SHAREGPT_ROLES)
    prompt, answer = _last_answer(turns, "conversations")
    return [*_system(row), *prompt], answer, _label(row, "kto_tag")


def _unpaired_alpaca(row: dict[str, Any]) -> Labelled:
    """LLaMA-Factory KTO over instruction, input and output."""
    return _alpaca_prompt(row), text(field(row, "output"), "output"), _label(row, "kto_tag")


@dataclass(frozen=True, slots=True)
class Format:
    """A layout of preference rows; a file has it if it has all its columns, and the first that fits wins.

    `parse` gives (prompt, chosen, rejected), of an unpaired layout (prompt, answer, whether it is good); `views` read
    whole columns of it.
    """

    name: str
    columns: tuple[str, ...]
    parse: Callable[[dict[str, Any]], Any]
    unpaired: bool = False
    views: tuple[View, ...] = ()


_SIDES = ("chosen", "rejected")
FORMATS = (
    Format("LLaMA-Factory ranking, ShareGPT", ("conversations", *_SIDES), _sharegpt, views=views.RANKING_SHAREGPT),
    Format("LLaMA-Factory ranking, Alpaca", ("instruction", *_SIDES), _alpaca, views=views.RANKING_ALPACA),
    Format("TRL with a prompt, UltraFeedback", ("prompt", *_SIDES), _explicit, views=views.EXPLICIT),
    Format("TRL without a prompt, HH-RLHF", _SIDES, _implicit, views=views.IMPLICIT),
    Format("TRL unpaired", ("prompt", "completion", "label"), _unpaired, True),
    Format("LLaMA-Factory KTO, messages", ("messages", "label"), _unpaired_messages, True),
    Format("LLaMA-Factory KTO, ShareGPT", ("conversations", "kto_tag"), _unpaired_sharegpt, True),
    Format("LLaMA-Factory KTO, Alpaca", ("instruction", "output", "kto_tag"), _unpaired_alpaca, True),
)


def recognise(file: str) -> Format:
    """The format of a file by the columns of its first rows. Raises DataError if it has none."""
    return recognised(file, FORMATS, "preferences")


def _label(row: dict[str, Any], name: str) -> bool:
    if not isinstance(label := field(row, name), bool):
        raise Refusal("wrong type", f"{name} is a {type(label).__name__}, not true or false")
    return label


def _system(row: dict[str, Any]) -> Messages:
    return [{"role": "system", "content": text(row["system"], "system")}] if row.get("system") else []


def messages(
    value: Any, where: str, role: str = "role", content: str = "content", roles: dict[str, str] = ROLES
) -> Messages:
    """A list of messages in our spelling, whatever the file calls the keys and the roles."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Refusal("wrong type", f"{where} is not a list of messages")
    for message in value:
        if message.get("tool_calls"):
            raise Refusal("unsupported field", f"tool_calls in {where}")
        if roles.get(str(message.get(role))) is None:
            raise Refusal("unknown role", f"{str(message.get(role))[:40]!r} in {where}; known are {', '.join(roles)}")
    return [{"role": roles[m[role]], "content": text(m.get(content), f"{where}.{content}")} for m in value]


def _answer(value: Any, where: str, role: str = "role", content: str = "content", roles: dict[str, str] = ROLES) -> str:
    """The text of one assistant turn: bare, a message, or a list of one message."""
    if isinstance(value, str):
        return value
    turns = messages(value if isinstance(value, list) else [value], where, role, content, roles)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise Refusal("no answer", f"{where} must be one assistant turn")
    return turns[0]["content"]


def _split(chosen: Messages, rejected: Messages) -> tuple[Messages, str, str]:
    """Two whole conversations -> what they share and the two last turns."""
    (prompt, better), (other, worse) = _last_answer(chosen, "chosen"), _last_answer(rejected, "rejected")
    if prompt != other:
        raise Refusal("prompts differ", "chosen and rejected part before their last turn")
    return prompt, better, worse


def _last_answer(turns: Messages, where: str) -> tuple[Messages, str]:
    """A conversation -> all but its last turn, and that turn, which must be the assistant's."""
    if not turns or turns[-1]["role"] != "assistant":
        raise Refusal("no answer", f"{where} does not end in an assistant turn")
    return turns[:-1], turns[-1]["content"]


def _split_texts(chosen: str, rejected: str) -> Pair:
    """Two texts -> the words they share at the beginning, and what follows; the space between belongs to the sides."""
    length = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    cut = max(chosen.rfind(space, 0, length) for space in " \n\t")
    if cut < 1:
        raise Refusal("no shared prompt", "chosen and rejected are texts that begin with different words")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _dialogue(text: str, where: str) -> Messages:
    """An HH-RLHF dialogue -> messages; white space around a turn belongs to the layout."""
    start, *parts = re.split(f"({HUMAN}|{ASSISTANT})", text)
    if start or not parts:
        raise Refusal("not a dialogue", f"{where} is text without a prompt and does not begin with {HUMAN!r}")
    roles = {HUMAN: "user", ASSISTANT: "assistant"}
    return [{"role": roles[m], "content": turn.strip()} for m, turn in zip(parts[::2], parts[1::2], strict=True)]
