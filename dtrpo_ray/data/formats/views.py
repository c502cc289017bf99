"""Layouts whose rows become columns all at once: Arrow columns of known types -> texts, messages, ids and steps.

A view says of each row whether it is plainly good. Those that are not, and batches of other types, are parsed row by
row (`preferences`, `responses`), which alone says what is wrong with a row. Both give the same rows and refusals.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrpo_ray.data.formats.batches import Batch, batches, named_values, typed
from dtrpo_ray.data.formats.columns import MESSAGES, json_texts, list_owner, lists_of
from dtrpo_ray.data.formats.files import Shard
from dtrpo_ray.data.formats.parsing import (
    ASSISTANT,
    D1_BLOCK,
    D1_STOPPED,
    EXTRAS,
    HUMAN,
    MOST,
    ROLES,
    SHAREGPT_ROLES,
    parted,
)
from dtrpo_ray.data.rules import list_lengths, rows_where
from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.method.trajectory import NEVER

Columns = dict[str, pa.Array]
AsTable = Callable[[Sequence[Any]], pa.Table]
Parse = Callable[[str, Any], Iterable[Any]]
"""(origin, value) -> what a raw row becomes, a Rejected where it is refused."""

_TEXT, _LONGS, _FLOATS = pa.string(), pa.list_(pa.int64()), pa.list_(pa.float64())
_SPACES = "".join(filter(str.isspace, map(chr, range(0x3001))))  # what str.strip() takes off
_TURN_MARK = "\x1e"


def _turn_type(role: str = "role", content: str = "content") -> pa.StructType:
    return pa.struct([(role, _TEXT), (content, _TEXT), ("tool_calls", pa.null())])


_TURNS = pa.list_(_turn_type())
_SHAREGPT = _turn_type("from", "value")


@dataclass(frozen=True, slots=True)
class View:
    """A layout by the types of its columns; `make` turns a table of them into columns of ours.

    It also says which rows (bool [rows]) are plainly good; what it makes of others is not used.
    """

    types: Mapping[str, pa.DataType]
    make: Callable[[Columns], tuple[Columns, np.ndarray]]

    @property
    def schema(self) -> pa.Schema:
        """Of the raw rows; a column that may hold nothing is of type null."""
        return pa.schema([*self.types.items(), *((name, pa.null()) for name in EXTRAS if name not in self.types)])


def tables(
    shard: Shard, views: Sequence[View], parse: Parse, as_table: AsTable, same: Mapping[str, str] | None = None
) -> Iterator[tuple[pa.Table, list[Rejected]]]:
    """The rows of a part, as `as_table` has them, and those refused; a batch at a time.

    `same` are columns in which the rows of a view all have the same text.
    """
    for batch in batches(shard):
        yield _tabled(shard.file, batch, views, parse, as_table, same or {})


def _tabled(
    file: str, batch: Batch, views: Sequence[View], parse: Parse, as_table: AsTable, same: Mapping[str, str]
) -> tuple[pa.Table, list[Rejected]]:
    whole, plain = as_table([]), np.zeros(len(batch), dtype=bool)
    for view in views:
        if (table := typed(batch, view.schema)) is not None:
            columns, plain = view.make({name: table[name].combine_chunks() for name in view.types})
            numbers = pa.array(range(batch.first, batch.first + len(batch))).cast(_TEXT)
            columns["origin"] = pc.binary_join_element_wise(f"{file}:", numbers, "")
            columns |= {name: pa.repeat(text, len(batch)) for name, text in same.items()}
            all_columns = [columns.get(f.name, pa.nulls(len(batch), f.type)) for f in whole.schema]
            whole = pa.table(all_columns, names=whole.schema.names).filter(pa.array(plain)).cast(whole.schema)
            break
    left = np.flatnonzero(~plain).tolist()
    raw = named_values(file, batch, left) if left else iter(())
    rows = [(origin, row) for origin, value in raw for row in parse(origin, value)]
    made, rejected = parted(row for _, row in rows)
    places = [int(where.rsplit(":", 1)[1]) - batch.first for where, row in rows if not isinstance(row, Rejected)]
    order = np.argsort(np.concatenate([np.flatnonzero(plain), places]), kind="stable")
    return pa.concat_tables([whole, as_table(made)]).take(pa.array(order)), rejected


# === 1. Pairs: columns -> {prompt or messages, chosen, rejected} ===


def _texts(raw: Columns) -> tuple[Columns, np.ndarray]:
    """A prompt and two sides, all of them text."""
    return _pairs(raw["prompt"], raw["chosen"], raw["rejected"])


def _conversation(raw: Columns) -> tuple[Columns, np.ndarray]:
    """A prompt of messages, and sides that are text or one message."""
    prompt, good = _messages(raw["prompt"])
    (chosen, one), (rejected, other) = _answers(raw["chosen"]), _answers(raw["rejected"])
    return _pairs(prompt, chosen, rejected, good & one & other)


def _shared_turns(raw: Columns) -> tuple[Columns, np.ndarray]:
    """Two whole conversations that part at their last turn."""
    (chosen, one), (rejected, other) = _messages(raw["chosen"]), _messages(raw["rejected"])
    return _parting(chosen, rejected, one & other)


def _repeated_prompt(raw: Columns) -> tuple[Columns, np.ndarray]:
    """UltraFeedback: two conversations, and the prompt a second time, as text."""
    columns, good = _shared_turns(raw)
    shared = columns["messages"]
    turns, owner = shared.flatten(), list_owner(shared)
    asked = pc.and_(pc.equal(turns.field("role"), "user"), pc.equal(turns.field("content"), raw["prompt"].take(owner)))
    return columns, good & rows_where(shared, asked.fill_null(False))


def _dialogues(raw: Columns) -> tuple[Columns, np.ndarray]:
    """HH-RLHF: two dialogues as text that part at their last turn."""
    (chosen, one), (rejected, other) = _dialogue(raw["chosen"]), _dialogue(raw["rejected"])
    return _parting(chosen, rejected, one & other)


def _sharegpt(raw: Columns) -> tuple[Columns, np.ndarray]:
    """LLaMA-Factory ranking over `conversations` of {from, value}, without a system prompt."""
    prompt, good = _messages(raw["conversations"], "from", "value", SHAREGPT_ROLES)
    single = pa.array(range(len(prompt) + 1), pa.int32())
    sides = [pa.ListArray.from_arrays(single, raw[side]) for side in ("chosen", "rejected")]
    (chosen, one), (rejected, other) = (_answers(side, "from", "value", SHAREGPT_ROLES) for side in sides)
    return _pairs(prompt, chosen, rejected, good & one & other)


def _alpaca(raw: Columns) -> tuple[Columns, np.ndarray]:
    """LLaMA-Factory ranking over instruction and input, without a system prompt or history."""
    instruction, more = raw["instruction"], raw["input"].fill_null("")
    both = pc.binary_join_element_wise(instruction, more, "\n")
    request = pc.if_else(pc.equal(more, ""), instruction, pc.if_else(pc.equal(instruction, ""), more, both))
    turns = pa.StructArray.from_arrays([pa.repeat("user", len(request)), request], fields=list(MESSAGES.value_type))
    prompt = pa.ListArray.from_arrays(pa.array(range(len(request) + 1), pa.int32()), turns, type=MESSAGES)
    return _pairs(prompt, raw["chosen"], raw["rejected"], np.asarray(instruction.is_valid()))


_SIDES = {"chosen": _TEXT, "rejected": _TEXT}
_TWO_CHATS = {"chosen": _TURNS, "rejected": _TURNS}
EXPLICIT = (
    View({"prompt": _TEXT, **_SIDES}, _texts),
    View({"prompt": _TURNS, **_TWO_CHATS}, _conversation),
    View({"prompt": _TURNS, **_SIDES}, _conversation),
    View({"prompt": _TEXT, **_TWO_CHATS}, _repeated_prompt),
)
IMPLICIT = (View(_TWO_CHATS, _shared_turns), View(_SIDES, _dialogues))
RANKING_SHAREGPT = (
    View(
        {"conversations": pa.list_(_SHAREGPT), "chosen": _SHAREGPT, "rejected": _SHAREGPT, "system": pa.null()},
        _sharegpt,
    ),
)
RANKING_ALPACA = (
    View({"instruction": _TEXT, "input": _TEXT, "system": pa.null(), "history": pa.null(), **_SIDES}, _alpaca),
)


# === 2. Responses: columns -> the fields of a ResponseRow ===


def _generation(raw: Columns) -> tuple[Columns, np.ndarray]:
    """A prompt and a response."""
    prompt, good = _prompt(raw["prompt"])
    return prompt | {name: raw[name] for name in ("response", "answer", "reward")}, good & _said(raw["response"])


def _d1_generation(raw: Columns) -> tuple[Columns, np.ndarray]:
    """d1's evaluation files: LLaDA's text with its end tokens spelled out, and the ground truth."""
    length, steps = (raw[name].fill_null(-1).to_numpy(zero_copy_only=False) for name in ("gen_length", "steps"))
    good = (length >= 1) & (length <= MOST) & (steps >= 0) & (steps <= MOST)
    per_block = np.clip(D1_BLOCK * np.where(good, steps, 0) // np.where(good, length, 1), 1, MOST)
    asked = {"prompt": raw["question"], "answer": raw["ground_truth"], "max_new_tokens": raw["gen_length"]}
    response = pc.replace_substring_regex(raw["generations"], f"(?s){D1_STOPPED}", "")
    good &= _said(response) & np.asarray(raw["question"].is_valid())
    return asked | {"response": response, "denoising_steps": pa.array(per_block)}, good


def _training_row(raw: Columns) -> tuple[Columns, np.ndarray]:
    """dLLM-RL's training rows: a prompt, a response as text and its step map."""
    columns, good = _generation(raw | {"answer": raw["ground_truth_answer"]})
    steps, known = _integers(raw["step_map"], NEVER)
    return columns | {"steps": steps}, good & known


def _jetengine(raw: Columns) -> tuple[Columns, np.ndarray]:
    """JetEngine: ids, the step of each, and log-probabilities."""
    ids, good = _integers(raw["token_ids"], -MOST)
    steps, known = _integers(raw["first_unmask_times"], NEVER)
    asked = pc.coalesce(raw["prompt_ids"], raw["input_ids"])
    prompt_ids, in_range = _integers(asked, -MOST)
    prompt, as_text = _prompt(raw["prompt"])
    good &= known & (in_range | asked.is_null()) & (as_text | raw["prompt"].is_null()) & (in_range | as_text)
    lengths, logps = list_lengths(raw["token_ids"]), raw["logprobs"]
    good &= (lengths > 0) & (lengths == list_lengths(steps)) & ((lengths == list_lengths(logps)) | logps.is_null())
    good &= ~rows_where(logps, logps.flatten().is_null())
    columns = {"response_ids": ids, "steps": steps, "prompt_ids": prompt_ids, "logps": logps}
    return prompt | columns | {"response": raw["text"].fill_null("")}, good


_PROMPTS = (_TEXT, _TURNS)
_REWARD = {"reward": pa.float64()}
GENERATIONS = tuple(
    View({"prompt": prompt, "response": _TEXT, "answer": _TEXT, **_REWARD}, _generation) for prompt in _PROMPTS
)
D1_GENERATIONS = (
    View(
        {
            **dict.fromkeys(("question", "generations", "ground_truth"), _TEXT),
            **dict.fromkeys(("gen_length", "steps"), pa.int64()),
        },
        _d1_generation,
    ),
)
TRAINING_ROWS = tuple(
    View(
        {"prompt": prompt, "response": _TEXT, "step_map": _LONGS, "ground_truth_answer": _TEXT, **_REWARD},
        _training_row,
    )
    for prompt in _PROMPTS
)
JETENGINE = tuple(
    View(
        {
            **dict.fromkeys(("token_ids", "first_unmask_times", "prompt_ids", "input_ids"), _LONGS),
            **{"prompt": prompt, "text": _TEXT, "logprobs": _FLOATS},
        },
        _jetengine,
    )
    for prompt in _PROMPTS
)


# === 3. What they are made of; each gives columns, and for which rows (bool [rows]) they hold ===


def _pairs(
    prompt: pa.Array, chosen: pa.StringArray, rejected: pa.StringArray, good: np.ndarray | bool = True
) -> tuple[Columns, np.ndarray]:
    """The rules that hold for every format of pairs."""
    columns, asked = _prompt_columns(prompt), _said(prompt)
    differ = pc.not_equal(_stripped(chosen), _stripped(rejected)).fill_null(False)
    fit = good & asked & _said(chosen) & _said(rejected) & np.asarray(differ)
    return columns | {"chosen": chosen, "rejected": rejected}, fit


def _parting(chosen: pa.ListArray, rejected: pa.ListArray, good: np.ndarray) -> tuple[Columns, np.ndarray]:
    """Two conversations, what they share and their last turns."""
    (prompt, better, one), (other_prompt, worse, other) = _last_answer(chosen), _last_answer(rejected)
    same = np.asarray(pc.equal(json_texts(prompt), json_texts(other_prompt)))
    return _pairs(prompt, better, worse, good & one & other & same)


def _prompt_columns(prompt: pa.Array) -> Columns:
    return {"prompt" if pa.types.is_string(prompt.type) else "messages": prompt}


def _prompt(column: pa.Array) -> tuple[Columns, np.ndarray]:
    """A prompt as text or as messages, which may be empty."""
    if pa.types.is_string(column.type):
        return _prompt_columns(column), np.asarray(column.is_valid())
    messages, good = _messages(column)
    return _prompt_columns(messages), good


def _messages(
    column: pa.ListArray, role: str = "role", content: str = "content", roles: Mapping[str, str] = ROLES
) -> tuple[pa.ListArray, np.ndarray]:
    """Messages in our spelling; not those of an unknown role, without text, or of no turn at all."""
    turns, spelled = column.flatten(), pa.array(roles)
    which = pc.index_in(turns.field(role), spelled)
    names, texts = pa.array(roles.values()).take(which), turns.field(content)
    known = pc.and_(pc.and_(turns.is_valid(), which.is_valid()), texts.is_valid())
    made = pa.StructArray.from_arrays([names, texts], fields=list(MESSAGES.value_type))
    lengths = list_lengths(column)
    good = (lengths > 0) & ~rows_where(column, pc.invert(known))
    return lists_of(lengths, made, known=np.asarray(column.is_valid())), good


def _last_answer(messages: pa.ListArray) -> tuple[pa.ListArray, pa.StringArray, np.ndarray]:
    """All but the last turn, and the text of that turn; where it is the assistant's."""
    turns, lengths = messages.flatten(), list_lengths(messages)
    has, last = lengths > 0, np.cumsum(lengths) - 1
    ends = turns.take(pa.array(last, mask=~has))
    before = np.ones(len(turns), dtype=bool)
    before[last[has]] = False
    said = np.asarray(pc.equal(ends.field("role"), "assistant").fill_null(False))
    return lists_of(lengths - has, turns.filter(pa.array(before))), ends.field("content"), has & said


def _answers(column: pa.Array, *keys: Any) -> tuple[pa.StringArray, np.ndarray]:
    """The text of one assistant's turn: bare, or a list of one message."""
    if pa.types.is_string(column.type):
        return column, np.asarray(column.is_valid())
    messages, good = _messages(column, *keys)
    _, texts, said = _last_answer(messages)
    return texts, good & said & (list_lengths(messages) == 1)


def _dialogue(texts: pa.StringArray) -> tuple[pa.ListArray, np.ndarray]:
    """An HH-RLHF dialogue as messages; white space around a turn belongs to the layout."""
    good = pc.and_not(pc.starts_with(texts, HUMAN), pc.match_substring(texts, _TURN_MARK)).fill_null(False)
    marked = texts.fill_null("")
    for speaker in (HUMAN, ASSISTANT):
        marked = pc.replace_substring(marked, speaker, _TURN_MARK + speaker[2])
    parts = pc.split_pattern(marked, _TURN_MARK)
    lengths, turns = list_lengths(parts), parts.flatten()
    inner = np.ones(len(turns), dtype=bool)
    inner[np.cumsum(lengths) - lengths] = False  # what stands before the first mark
    turns = turns.filter(pa.array(inner))
    names = pc.if_else(pc.starts_with(turns, HUMAN[2]), "user", "assistant")
    contents = pc.utf8_trim(pc.utf8_slice_codeunits(turns, 1), _SPACES)
    made = pa.StructArray.from_arrays([names, contents], fields=list(MESSAGES.value_type))
    return lists_of(lengths - 1, made), np.asarray(good)


def _integers(column: pa.ListArray, least: int) -> tuple[pa.ListArray, np.ndarray]:
    """Lists of integers in int32; where there is one, and all of them are there and at least `least`."""
    flat = column.flatten()
    fit = pc.and_(pc.greater_equal(flat, least), pc.less_equal(flat, MOST)).fill_null(False)
    good = np.asarray(column.is_valid()) & ~rows_where(column, pc.invert(fit))
    values = pc.if_else(fit, flat, 0).cast(pa.int32())
    return lists_of(list_lengths(column), values, known=np.asarray(column.is_valid())), good


def _said(column: pa.Array) -> np.ndarray:
    """Which rows have text, or a turn that has some."""
    if pa.types.is_string(column.type):
        return np.asarray(pc.greater(pc.binary_length(_stripped(column)), 0).fill_null(False))
    return rows_where(column, _said(column.flatten().field("content")))


def _stripped(texts: pa.StringArray) -> pa.StringArray:
    return pc.utf8_trim(texts, _SPACES)
