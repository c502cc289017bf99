"""Preference files of other projects -> `PreferenceRow`s, paired and unpaired. Imports no torch and no ray.

Every row of a file ends in exactly one place: in a pair, or `Rejected` with a named reason and its origin. A file's
format is recognised by its columns (`PREFERENCE_FORMATS`; docs/data.md shows each).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from dtrpo_ray.data.formats.base import Format, Row, RowFormat, attempt, find_format
from dtrpo_ray.data.formats.files import Shard, share_shards
from dtrpo_ray.data.formats.parsing import (
    AS_NAMED,
    Columns,
    Messages,
    Prompt,
    Record,
    Refusal,
    as_messages,
    as_prompt,
    as_text,
    is_empty,
    require_text,
)
from dtrpo_ray.data.formats.reading import raw_rows
from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.files import sha256_json

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # the marks of an HH-RLHF dialogue

Labelled = tuple[Prompt, str, bool]  # (prompt, answer, whether it is good)
_Answers = list[tuple[str, str, tuple[str, ...]]]  # (origin, text, ignored columns)


@dataclass(frozen=True, slots=True)
class PreferenceRow(Row):
    """A pair as text; one that was made of two rows also has a `rejected_origin`."""

    prompt: Prompt
    chosen: str
    rejected: str
    rejected_origin: str | None = None

    def require(self) -> Self:
        """Return the pair. Raises Refusal for one without text, or whose sides are the same text."""
        require_text(self.prompt, chosen=self.chosen, rejected=self.rejected)
        if self.chosen.strip() == self.rejected.strip():
            raise Refusal("identical sides", "chosen and rejected are the same text")
        return self


@dataclass(frozen=True, slots=True)
class UnpairedFormat(Format[PreferenceRow]):
    """A layout whose rows are single answers, good or bad; those to the same prompt are paired."""

    rows_each = 2
    parse: Callable[[Record], Labelled]

    def shards(self, file: str, rows: int | None = None) -> list[Shard]:
        """Return the whole file once for each share of its prompts, so that partners meet."""
        return share_shards(file)

    def read(self, shard: Shard) -> Iterator[PreferenceRow | Rejected]:
        """Pair good and bad answers to the same prompt in the order of the file, each used once.

        Only prompts of the part's share are looked at; rows without a prompt belong to the first share.
        """
        share, shares = shard.share
        groups: dict[str, tuple[Prompt, _Answers, _Answers]] = {}
        for origin, value in raw_rows(shard):
            found = attempt(origin, self.parse_raw, self._judge, value)
            if isinstance(found, Rejected):
                if share == 0:
                    yield found
                continue
            (prompt, answer, is_good), ignored = found
            key = sha256_json(prompt)
            if int(key[:8], 16) % shares == share:
                _, good, bad = groups.setdefault(key, (prompt, [], []))
                (good if is_good else bad).append((origin, answer, ignored))
        for prompt, good, bad in groups.values():
            yield from _pair_answers(prompt, good, bad)

    def _judge(self, row: Record) -> Labelled:
        prompt, answer, is_good = self.parse(row)
        require_text(prompt, answer=answer)
        return prompt, answer, is_good


def _pair_answers(prompt: Prompt, good: _Answers, bad: _Answers) -> Iterator[PreferenceRow | Rejected]:
    for (good_at, chosen, ignored), (bad_at, rejected, _) in zip(good, bad, strict=False):
        pair = PreferenceRow(prompt, chosen, rejected, bad_at, origin=good_at, ignored=ignored)
        row = attempt(good_at, pair.require)
        yield row
        if isinstance(row, Rejected):
            yield replace(row, origin=bad_at)
    used = min(len(good), len(bad))
    for kind, left in (("rejected", good[used:]), ("chosen", bad[used:])):
        for origin, *_ in left:
            yield Rejected(origin, "no partner", f"the file has no {kind} answer left to pair it with")


# === one raw row -> its pair or labelled answer, a function for each format ===

_SIDES = ("chosen", "rejected")
# the columns that public sets call the prompt, the first that holds something before the others
PROMPTS = ("prompt", "conversations", "messages", "instruction", "question", "problem", "query", "input", "context")


def _explicit(row: Record) -> PreferenceRow:
    """A prompt and two sides; the sides may repeat the prompt as their first turns, and may then stand without it."""
    chosen, rejected = (row.require(side) for side in _SIDES)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return PreferenceRow(prompt_of(row), chosen, rejected)
    turns = [_turns(chosen, "chosen"), _turns(rejected, "rejected")]
    if all(side and side[0]["role"] == "assistant" for side in turns):
        asked = prompt_of(row)
        prompt = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        return PreferenceRow(prompt, one_answer(turns[0], "chosen"), one_answer(turns[1], "rejected"))
    pair = _split(turns[0], turns[1], row)
    assert not isinstance(pair.prompt, str)
    if (asked := prompt_of(row, optional=True)) and not _holds(pair.prompt, asked):
        raise Refusal("prompts differ", "the prompt is not the beginning, or a user turn, of chosen and rejected")
    return pair


def _holds(turns: Messages, asked: Prompt) -> bool:
    """Return whether turns are what was asked, or have it as one of their turns; white space around it counts not."""
    wanted = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    theirs, ours = ([(turn["role"], turn["content"].strip()) for turn in side] for side in (wanted, turns))
    one = sum(role != "system" for role, _ in theirs) == 1
    return theirs in (ours, ours[1:]) or (one and all(turn in ours for turn in theirs))


def _implicit(row: Record) -> PreferenceRow:
    """TRL without a prompt: two lists of messages, two HH-RLHF dialogues or two texts, alike at their beginning."""
    chosen, rejected = row.require("chosen"), row.require("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not chosen.startswith(HUMAN) and not rejected.startswith(HUMAN):
            return _split_texts(chosen, rejected)
        return _split(_dialogue(chosen, "chosen"), _dialogue(rejected, "rejected"), row)
    return _split(row.messages("chosen"), row.messages("rejected"), row)


def prompt_of(row: Record, optional: bool = False) -> Prompt:
    """Return the prompt of a row that calls it one of PROMPTS: text as it is, or messages.

    Text becomes messages if there is a column for a system prompt, and in Alpaca's columns. Raises Refusal if there is
    none, unless it is `optional`.
    """
    there = [name for name in PROMPTS if not is_empty(row.fields.get(name))]
    if not there and optional:
        return ""
    name = there[0] if there else next((name for name in PROMPTS if name in row.fields), "prompt")
    prompt = as_prompt(row.require(name), name)
    alpaca = isinstance(prompt, str) and name in ("instruction", "input") and "instruction" in row.fields
    if alpaca:
        parts = (as_text(row.get(part) or "", part) for part in ("instruction", "input"))
        prompt = "\n".join(part for part in parts if part)
    if isinstance(prompt, str) and (alpaca or any(name in row.fields for name in (*_SYSTEMS, "history"))):
        return with_system(row, [*_history(row), {"role": "user", "content": prompt}])
    return prompt if isinstance(prompt, str) else with_system(row, prompt)


_SYSTEMS = ("system", "system_prompt")


def with_system(row: Record, turns: Messages) -> Messages:
    """Return messages after the row's system prompt, which is text or messages; both may not have a different one."""
    value = next((row.get(name) for name in _SYSTEMS if not is_empty(row.fields.get(name))), "")
    told = [{"role": "system", "content": value}] if isinstance(value, str) else value
    system = as_messages(told, "system")
    if system and turns and turns[0]["role"] == "system" and turns[0] != system[0]:
        raise Refusal("prompts differ", "the column of the system prompt and the messages have different ones")
    return turns if system == turns[:1] else system + turns


def _history(row: Record) -> Messages:
    """Return Alpaca's earlier turns, [question, answer] each."""
    turns, history = list[dict[str, str]](), row.get("history") or []
    for turn in history if isinstance(history, list) else [None]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Refusal("wrong type", "history is not a list of [question, answer]")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            turns.append({"role": role, "content": as_text(text, "history")})
    return turns


def _completion(column: str, label: str, row: Record) -> Labelled:
    """An answer beside its prompt, and whether it is good."""
    return prompt_of(row), one_answer(row.require(column), column), row.label(label)


def _dialogue_labelled(column: str, label: str, row: Record) -> Labelled:
    """A conversation whose last turn is judged."""
    prompt, answer = _last_answer(row.messages(column), column)
    return with_system(row, prompt), answer, row.label(label)


PREFERENCE_FORMATS: tuple[RowFormat[PreferenceRow] | UnpairedFormat, ...] = (
    RowFormat("pairs with a prompt", ("|".join(PROMPTS), *_SIDES), _explicit),
    RowFormat("pairs without a prompt", _SIDES, _implicit),
    *(
        UnpairedFormat(f"unpaired, {name}", (prompts, answer, label), partial(_completion, answer, label))
        for name, prompts, answer, label in (
            ("TRL", "prompt|instruction|question|query", "completion", "label"),
            ("LLaMA-Factory Alpaca", "instruction", "output", "kto_tag"),
        )
    ),
    *(
        UnpairedFormat(f"unpaired, {name}", (column, label), partial(_dialogue_labelled, column, label))
        for name, column, label in (
            ("LLaMA-Factory messages", "messages", "label"),
            ("LLaMA-Factory ShareGPT", "conversations", "kto_tag"),
        )
    ),
)


def preference_format(file: str, task: Columns = AS_NAMED) -> RowFormat[PreferenceRow] | UnpairedFormat:
    """Return the format of a file by the columns of its first rows. Raises DataError if it has none."""
    return find_format(file, PREFERENCE_FORMATS, "preferences", task)


def _turns(value: Any, where: str) -> Messages:
    """Return a side as messages: the assistant's bare text, one message, or a list of them."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return as_messages(value if isinstance(value, list) else [value], where)


def one_answer(value: Any, where: str) -> str:
    """Return the text of one assistant turn: bare, a message, or a list of one message."""
    turns = _turns(value, where)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise Refusal("no answer", f"{where} must be one assistant turn")
    return turns[0]["content"]


def _split(chosen: Messages, rejected: Messages, row: Record) -> PreferenceRow:
    """Split two whole conversations into the turns they share and their last turns."""
    (prompt, better), (other, worse) = _last_answer(chosen, "chosen"), _last_answer(rejected, "rejected")
    if prompt != other:
        raise Refusal("prompts differ", "chosen and rejected differ before their last turn")
    return PreferenceRow(with_system(row, prompt), better, worse)


def _last_answer(turns: Messages, where: str) -> tuple[Messages, str]:
    """Split a conversation before its last turn, which must be the assistant's."""
    if not turns or turns[-1]["role"] != "assistant":
        raise Refusal("no answer", f"{where} does not end in an assistant turn")
    return turns[:-1], turns[-1]["content"]


def _split_texts(chosen: str, rejected: str) -> PreferenceRow:
    """Split two texts after the words they share; the space between belongs to the sides."""
    length = common_length(chosen, rejected)
    cut = max(chosen.rfind(space, 0, length) for space in " \n\t")
    if cut < 1:
        raise Refusal("no shared prompt", "chosen and rejected are texts that begin with different words")
    return PreferenceRow(chosen[:cut], chosen[cut:], rejected[cut:])


def common_length(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def _dialogue(text: str, where: str) -> Messages:
    """Split an HH-RLHF dialogue into messages; white space around a turn belongs to the layout."""
    start, *parts = re.split(f"({HUMAN}|{ASSISTANT})", text)
    if start or not parts:
        raise Refusal("not a dialogue", f"{where} is text without a prompt and does not begin with {HUMAN!r}")
    roles = {HUMAN: "user", ASSISTANT: "assistant"}
    return [{"role": roles[m], "content": turn.strip()} for m, turn in zip(parts[::2], parts[1::2], strict=True)]
