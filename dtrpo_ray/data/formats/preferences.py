"""Preference files of other projects -> `PreferenceRow`s, paired and unpaired. Imports no torch and no ray.

Every row of a file ends in exactly one place: in a pair, or `Rejected` with a named reason and its origin. A file's
format is recognised by its columns (`PREFERENCE_FORMATS`; docs/data.md shows each).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from dtrpo_ray.data.formats.base import Format, Row, RowFormat, attempt, find_format, parse_record
from dtrpo_ray.data.formats.files import Shard, share_shards
from dtrpo_ray.data.formats.parsing import (
    OPENAI,
    SHAREGPT,
    Chat,
    Messages,
    Prompt,
    Record,
    Refusal,
    as_messages,
    as_text,
    require_text,
)
from dtrpo_ray.data.formats.reading import raw_rows
from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.files import sha256_json

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # the marks of an HH-RLHF dialogue

Labelled = tuple[Prompt, str, bool]  # (prompt, answer, whether it is good)
_Answers = list[tuple[str, str]]  # (origin, text)


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
            found = attempt(origin, parse_record, self._judge, value)
            if isinstance(found, Rejected):
                if share == 0:
                    yield found
                continue
            prompt, answer, is_good = found
            key = sha256_json(prompt)
            if int(key[:8], 16) % shares == share:
                _, good, bad = groups.setdefault(key, (prompt, [], []))
                (good if is_good else bad).append((origin, answer))
        for prompt, good, bad in groups.values():
            yield from _pair_answers(prompt, good, bad)

    def _judge(self, row: Record) -> Labelled:
        prompt, answer, is_good = self.parse(row)
        require_text(prompt, answer=answer)
        return prompt, answer, is_good


def _pair_answers(prompt: Prompt, good: _Answers, bad: _Answers) -> Iterator[PreferenceRow | Rejected]:
    for (good_at, chosen), (bad_at, rejected) in zip(good, bad, strict=False):
        pair = PreferenceRow(prompt, chosen, rejected, bad_at, origin=good_at)
        row = attempt(good_at, pair.require)
        yield row
        if isinstance(row, Rejected):
            yield replace(row, origin=bad_at)
    used = min(len(good), len(bad))
    for kind, left in (("rejected", good[used:]), ("chosen", bad[used:])):
        for origin, _ in left:
            yield Rejected(origin, "no partner", f"the file has no {kind} answer left to pair it with")


# === one raw row -> its pair or labelled answer, a function for each format ===


def _explicit(row: Record) -> PreferenceRow:
    """TRL with a prompt (text or messages); UltraFeedback, whose sides repeat the prompt as their first turn."""
    prompt, chosen, rejected = (row.require(name) for name in ("prompt", "chosen", "rejected"))
    if not isinstance(prompt, str):
        return PreferenceRow(
            as_messages(prompt, "prompt"), one_answer(chosen, "chosen"), one_answer(rejected, "rejected")
        )
    if isinstance(chosen, str) and isinstance(rejected, str):
        return PreferenceRow(prompt, chosen, rejected)
    pair, asked = _split(row.messages("chosen"), row.messages("rejected")), {"role": "user", "content": prompt}
    if pair.prompt and asked not in pair.prompt:
        raise Refusal("prompts differ", "the prompt is not a user turn of chosen and rejected")
    return replace(pair, prompt=pair.prompt or [asked])


def _implicit(row: Record) -> PreferenceRow:
    """TRL without a prompt: two lists of messages, two HH-RLHF dialogues or two texts, alike at their beginning."""
    chosen, rejected = row.require("chosen"), row.require("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not chosen.startswith(HUMAN) and not rejected.startswith(HUMAN):
            return _split_texts(chosen, rejected)
        return _split(_dialogue(chosen, "chosen"), _dialogue(rejected, "rejected"))
    return _split(row.messages("chosen"), row.messages("rejected"))


def _sharegpt(row: Record) -> PreferenceRow:
    """LLaMA-Factory ranking over `conversations` of {from, value}."""
    prompt = system_turn(row) + row.sharegpt("conversations")
    return PreferenceRow(prompt, *(one_answer(row.require(side), side, SHAREGPT) for side in _SIDES))


def alpaca_prompt(row: Record) -> Messages:
    """System, history and instruction, with input under it, as LLaMA-Factory has it."""
    request = [row.text("instruction"), as_text(row.get("input") or "", "input")]
    prompt = system_turn(row)
    history = row.get("history") or []
    for turn in history if isinstance(history, list) else [None]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Refusal("wrong type", "history is not a list of [question, answer]")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            prompt.append({"role": role, "content": as_text(text, "history")})
    prompt.append({"role": "user", "content": "\n".join(part for part in request if part)})
    return prompt


def _sharegpt_labelled(row: Record) -> Labelled:
    """LLaMA-Factory KTO over `conversations` of {from, value}, the last of which is judged."""
    prompt, answer = _last_answer(row.sharegpt("conversations"), "conversations")
    return [*system_turn(row), *prompt], answer, row.label("kto_tag")


_SIDES = ("chosen", "rejected")
PREFERENCE_FORMATS: tuple[RowFormat[PreferenceRow] | UnpairedFormat, ...] = (
    RowFormat("LLaMA-Factory ranking, ShareGPT", ("conversations", *_SIDES), _sharegpt),
    RowFormat(
        "LLaMA-Factory ranking, Alpaca",
        ("instruction", *_SIDES),
        lambda row: PreferenceRow(alpaca_prompt(row), row.text("chosen"), row.text("rejected")),
    ),
    RowFormat("TRL with a prompt, UltraFeedback", ("prompt", *_SIDES), _explicit),
    RowFormat("TRL without a prompt, HH-RLHF", _SIDES, _implicit),
    UnpairedFormat(
        "TRL unpaired",
        ("prompt", "completion", "label"),
        lambda row: (row.prompt("prompt"), one_answer(row.require("completion"), "completion"), row.label("label")),
    ),
    UnpairedFormat(
        "LLaMA-Factory KTO, messages",
        ("messages", "label"),
        lambda row: (*_last_answer(row.messages("messages"), "messages"), row.label("label")),
    ),
    UnpairedFormat("LLaMA-Factory KTO, ShareGPT", ("conversations", "kto_tag"), _sharegpt_labelled),
    UnpairedFormat(
        "LLaMA-Factory KTO, Alpaca",
        ("instruction", "output", "kto_tag"),
        lambda row: (alpaca_prompt(row), row.text("output"), row.label("kto_tag")),
    ),
)


def preference_format(file: str) -> RowFormat[PreferenceRow] | UnpairedFormat:
    """Return the format of a file by the columns of its first rows. Raises DataError if it has none."""
    return find_format(file, PREFERENCE_FORMATS, "preferences")


def system_turn(row: Record) -> Messages:
    """Return the column `system` as a turn, or no turn without one."""
    return [{"role": "system", "content": row.text("system")}] if row.get("system") else []


def one_answer(value: Any, where: str, chat: Chat = OPENAI) -> str:
    """Return the text of one assistant turn: bare, a message, or a list of one message."""
    if isinstance(value, str):
        return value
    turns = as_messages(value if isinstance(value, list) else [value], where, chat)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise Refusal("no answer", f"{where} must be one assistant turn")
    return turns[0]["content"]


def _split(chosen: Messages, rejected: Messages) -> PreferenceRow:
    """Split two whole conversations into the turns they share and their last turns."""
    (prompt, better), (other, worse) = _last_answer(chosen, "chosen"), _last_answer(rejected, "rejected")
    if prompt != other:
        raise Refusal("prompts differ", "chosen and rejected differ before their last turn")
    return PreferenceRow(prompt, better, worse)


def _last_answer(turns: Messages, where: str) -> tuple[Messages, str]:
    """Split a conversation before its last turn, which must be the assistant's."""
    if not turns or turns[-1]["role"] != "assistant":
        raise Refusal("no answer", f"{where} does not end in an assistant turn")
    return turns[:-1], turns[-1]["content"]


def _split_texts(chosen: str, rejected: str) -> PreferenceRow:
    """Split two texts after the words they share; the space between belongs to the sides."""
    length = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    cut = max(chosen.rfind(space, 0, length) for space in " \n\t")
    if cut < 1:
        raise Refusal("no shared prompt", "chosen and rejected are texts that begin with different words")
    return PreferenceRow(chosen[:cut], chosen[cut:], rejected[cut:])


def _dialogue(text: str, where: str) -> Messages:
    """Split an HH-RLHF dialogue into messages; white space around a turn belongs to the layout."""
    start, *parts = re.split(f"({HUMAN}|{ASSISTANT})", text)
    if start or not parts:
        raise Refusal("not a dialogue", f"{where} is text without a prompt and does not begin with {HUMAN!r}")
    roles = {HUMAN: "user", ASSISTANT: "assistant"}
    return [{"role": roles[m], "content": turn.strip()} for m, turn in zip(parts[::2], parts[1::2], strict=True)]
