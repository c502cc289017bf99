"""Preference files of other projects -> `PreferenceRow`s, paired and unpaired. Imports no torch and no ray.

Every row of a file ends in exactly one place: in a pair, or `Rejected` with a named reason and its origin. A file's
format is recognised by its columns (`PREFERENCE_FORMATS`; docs/data.md shows each).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Self

from dtrpo_ray.data.formats.base import Format, Row, RowFormat, attempt, find_format
from dtrpo_ray.data.formats.dialogue import (
    HUMAN,
    PROMPTS,
    as_side,
    last_answer,
    one_answer,
    prompt_of,
    read_dialogue,
    with_system,
)
from dtrpo_ray.data.formats.files import Shard, share_shards
from dtrpo_ray.data.formats.graded import GRADED, HELPSTEER2, Pair, scored
from dtrpo_ray.data.formats.parsing import (
    AS_NAMED,
    Answer,
    Columns,
    Messages,
    Prompt,
    Record,
    Refusal,
    answer_of,
    require_text,
)
from dtrpo_ray.data.formats.reading import raw_rows
from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.files import sha256_json

Judged = tuple[Prompt, Answer, float]  # (prompt, answer, its grade: higher is better)


class _Answer(NamedTuple):
    origin: str
    text: Answer
    grade: float
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PreferenceRow(Row):
    """A pair as text; one that was made of two rows also has a `rejected_origin`."""

    prompt: Prompt
    chosen: Answer
    rejected: Answer
    rejected_origin: str | None = None

    def require(self) -> Self:
        """Return the pair. Raises Refusal for one without text, or whose sides are the same text."""
        require_text(self.prompt, chosen=self.chosen, rejected=self.rejected)
        sides = (side.strip() if isinstance(side, str) else side for side in (self.chosen, self.rejected))
        if next(sides) == next(sides):
            raise Refusal("identical sides", "chosen and rejected are the same text")
        return self


@dataclass(frozen=True, slots=True)
class UnpairedFormat(Format[PreferenceRow]):
    """A layout whose rows are single answers, good or bad, or with a score; those to the same prompt are paired.

    Several answers that are left over because they are equal are refused as a `tie`.
    """

    rows_each = 2
    parse: Callable[[Record], Judged]
    tie: str = "no partner"

    def shards(self, file: str, rows: int | None = None) -> list[Shard]:
        """Return the whole file once for each share of its prompts, so that partners meet."""
        return share_shards(file)

    def read(self, shard: Shard) -> Iterator[PreferenceRow | Rejected]:
        """Pair the best answer to a prompt with the worst, then the next ones, each used once, equals as in the file.

        Only prompts of the part's share are looked at; rows without a prompt belong to the first share.
        """
        share, shares = shard.share
        groups: dict[str, tuple[Prompt, list[_Answer]]] = {}
        for origin, value in raw_rows(shard):
            found = attempt(origin, self.parse_raw, self._judge, value)
            if isinstance(found, Rejected):
                if share == 0:
                    yield found
                continue
            (prompt, text, grade), ignored = found
            key = sha256_json(prompt)
            if int(key[:8], 16) % shares == share:
                groups.setdefault(key, (prompt, []))[1].append(_Answer(origin, text, grade, ignored))
        for prompt, answers in groups.values():
            yield from self._pair(prompt, answers)

    def _pair(self, prompt: Prompt, answers: list[_Answer]) -> Iterator[PreferenceRow | Rejected]:
        used = 0
        best, worst = (sorted(answers, key=lambda a: sign * a.grade) for sign in (-1, 1))  # equals stay in their order
        while used < len(answers) and (good := best[used]).grade > (bad := worst[used]).grade:
            pair = PreferenceRow(prompt, good.text, bad.text, bad.origin, origin=good.origin, ignored=good.ignored)
            row = attempt(good.origin, pair.require)
            yield row
            if isinstance(row, Rejected):
                yield replace(row, origin=bad.origin)
            used += 1
        paired = {answer.origin for answer in (*best[:used], *worst[:used])}
        left = [answer.origin for answer in answers if answer.origin not in paired]
        detail = "no better or worse answer to its prompt is left to pair it with"
        for origin in left:
            alone = Rejected(origin, "no partner", detail)
            yield replace(alone, reason=self.tie) if len(left) > 1 else alone

    def _judge(self, row: Record) -> Judged:
        prompt, answer, grade = self.parse(row)
        require_text(prompt, answer=answer)
        return prompt, answer, grade


# === one raw row -> its pair or labelled answer, a function for each format ===

_SIDES = ("chosen", "rejected")


def _explicit(row: Record) -> PreferenceRow:
    """A prompt and two sides; the sides may repeat the prompt as their first turns, and may then stand without it."""
    chosen, rejected = (row.require(side) for side in _SIDES)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return PreferenceRow(prompt_of(row), chosen, rejected)
    turns = [as_side(chosen, "chosen"), as_side(rejected, "rejected")]
    if all(side and side[0]["role"] == "assistant" for side in turns):
        asked = prompt_of(row)
        prompt = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        return PreferenceRow(prompt, one_answer(turns[0], "chosen"), one_answer(turns[1], "rejected"))
    pair = _split(turns[0], turns[1], row)
    if (asked := prompt_of(row, optional=True)) and not _holds(with_system(row, turns[0][:-1]), asked):
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
        return _split(read_dialogue(chosen, "chosen"), read_dialogue(rejected, "rejected"), row)
    return _split(row.messages("chosen"), row.messages("rejected"), row)


def _completion(column: str, label: str, row: Record) -> Judged:
    """An answer beside its prompt, and whether it is good."""
    return prompt_of(row), one_answer(row.require(column), column), row.label(label)


def _dialogue_judged(column: str, label: str, row: Record) -> Judged:
    """A conversation whose last turn is judged."""
    prompt, answer = last_answer(row.messages(column), column)
    return with_system(row, prompt), answer, row.label(label)


def _graded(pair: Callable[[Record], Pair], row: Record) -> PreferenceRow:
    """A row whose answers are compared."""
    return PreferenceRow(*pair(row))


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
        UnpairedFormat(f"unpaired, {name}", (column, label), partial(_dialogue_judged, column, label))
        for name, column, label in (
            ("LLaMA-Factory messages", "messages", "label"),
            ("LLaMA-Factory ShareGPT", "conversations", "kto_tag"),
        )
    ),
    *(RowFormat(form.name, form.columns, partial(_graded, form.pair), beside=form.beside) for form in GRADED),
    UnpairedFormat(
        "HelpSteer2",
        ("prompt", "response", "helpfulness"),
        partial(scored, "response", "helpfulness"),
        beside=HELPSTEER2,
        tie="tie",
    ),
)


def preference_format(file: str, task: Columns = AS_NAMED) -> RowFormat[PreferenceRow] | UnpairedFormat:
    """Return the format of a file by the columns of its first rows. Raises DataError if it has none."""
    return find_format(file, PREFERENCE_FORMATS, "preferences", task)


def _split(chosen: Messages, rejected: Messages, row: Record) -> PreferenceRow:
    """Split two whole conversations into the turns they share and the first turns that differ; later ones are left."""
    sides = {"chosen": chosen, "rejected": rejected}
    most = min(len(last_answer(turns, where)[0]) for where, turns in sides.items())
    same = next((at for at in range(most) if chosen[at] != rejected[at]), most)
    better, worse = chosen[same], rejected[same]
    if {better["role"], worse["role"]} != {"assistant"}:
        raise Refusal("prompts differ", "chosen and rejected first differ in a turn that is not the assistant's")
    if better == worse and len(chosen) != len(rejected):
        raise Refusal("prompts differ", "one of chosen and rejected is the beginning of the other")
    if len(chosen) + len(rejected) > 2 * same + 2:
        row.leave("turns after the first that differ")
    return PreferenceRow(with_system(row, chosen[:same]), answer_of(better), answer_of(worse))


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
