"""Imported texts and ids -> rows of preference/v1 and trajectory/v1 on a model's grid of blocks, a table at a time."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from dtrpo_ray.data.formats.columns import Refusals, content_ids, first_places, json_texts
from dtrpo_ray.data.ragged import Ragged, list_lengths
from dtrpo_ray.data.rules import GOOD, block_ranks, rules_of, verdicts
from dtrpo_ray.data.schemas import CONTRACT_VERSION, DIFFUSION, PREFERENCE, TRAJECTORY
from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.errors import DataError
from dtrpo_ray.method.trajectory import NEVER, Origin
from dtrpo_ray.models.tokenizer import (
    control_tokens,
    encode_all,
    encode_prompt,
    eos_token_id,
    mask_token_id,
    render_all,
    tokenizer_hash,
    turn_end_id,
)

JOIN = " + "  # between the origins of a pair made of two rows
_TWO_ROWS = re.compile(rf"(.+):(\d+){re.escape(JOIN)}\1:(\d+)", re.DOTALL)
IMPORTED = "the file"  # the source of the rewards of imported rows
_INTS = pa.list_(pa.int32())
_SAMPLER = TRAJECTORY.field("sampler").type


@dataclass(frozen=True)
class Target:
    """The tokenizer and grid of a model that rows are made for, and the longest prompt and response in tokens.

    A prompt keeps its last `max_prompt_tokens`; a response counts with its end token and the fill of its block.
    """

    tokenizer: PreTrainedTokenizerBase
    block_size: int
    max_prompt_tokens: int
    max_response_tokens: int
    block_origin: Origin = "global"
    shift: int | None = None

    @cached_property
    def mask_id(self) -> int:
        """Return the id of the tokenizer's mask token."""
        return mask_token_id(self.tokenizer)

    @cached_property
    def vocabulary(self) -> int:
        """Return the exclusive upper bound of the tokenizer's ids."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Return a pattern of the spellings that the tokenizer reads as control tokens."""
        return control_tokens(self.tokenizer)

    @cached_property
    def end(self) -> int:
        """Return the token that closes plain text and fills a block."""
        return eos_token_id(self.tokenizer)

    @cached_property
    def turn_end(self) -> int:
        """Return the token that closes an answer to messages, as the chat template ends an assistant's turn."""
        found = turn_end_id(self.tokenizer)
        return self.end if found is None else found

    @cached_property
    def columns(self) -> dict[str, int | str]:
        """Return the columns that are the same in all rows."""
        return {
            "contract_version": CONTRACT_VERSION,
            "block_size": self.block_size,
            "block_origin": self.block_origin,
            "mask_id": self.mask_id,
            "tokenizer_hash": tokenizer_hash(self.tokenizer),
        }

    def fill(self, prompt: Ragged, response: Ragged) -> np.ndarray:
        """Return int [rows], the number of tokens that each terminal block lacks."""
        return -(response.lengths + prompt.lengths * (self.block_origin == "global")) % self.block_size


# === 1. Rows of texts -> rows of ids ===


def tokenize_preferences(rows: pa.RecordBatch, target: Target) -> tuple[pa.Table, list[Rejected]]:
    """Turn `preferences.PAIRS` into preference/v1 (no recorded steps, no rewards). Return also the refused rows."""
    refusals = Refusals(len(rows))
    texts = {side: rows[side] for side in ("chosen", "rejected")}
    prompts = prompt_json(rows)
    row_ids = _ids_of_lists(prompts, *map(json_texts, texts.values()))
    _refuse_repeated(row_ids, rows, refusals)
    _refuse_control(rows, texts, target, refusals)
    prompt = _shorten(encode_prompts(rows, prompts, target).require(refusals), target, refusals)
    ends = _ends(rows, target)
    sides = {side: encode_texts(target.tokenizer, text).require(refusals) for side, text in texts.items()}
    sides = {side: ids.append(1, ends) for side, ids in sides.items()}
    sides = {side: ids.append(target.fill(prompt, ids), target.end) for side, ids in sides.items()}
    _refuse_mask("prompt", prompt, target, refusals)
    for side, ids in sides.items():
        _refuse_unfit(side, ids, target, refusals)
    same = sides["chosen"].same_as(sides["rejected"])
    refusals.refuse(same, "identical tokens", lambda _: "chosen and rejected differ as text and not as tokens")
    origins, partners = rows["origin"], rows["rejected_origin"]
    two_rows = pc.binary_join_element_wise(origins, partners, JOIN)
    columns = {
        "row_id": row_ids,
        "prompt_id": content_ids(prompts),
        "origin": pc.coalesce(two_rows, origins),
        "prompt_ids": prompt.to_arrow(_INTS),
        **{f"{side}_ids": ids.to_arrow(_INTS) for side, ids in sides.items()},
    }
    return _finish(columns, PREFERENCE, target, refusals, partners)


def tokenize_responses(rows: pa.RecordBatch, target: Target) -> tuple[pa.Table, list[Rejected]]:
    """Turn `responses.RESPONSES` into trajectory/v1. Return also the refused rows.

    Text without ids is closed by an end token, as in preferences. A response with steps that stops before its terminal
    block does, as samplers that cut at the end token write it, is filled with end tokens that no step ever reached:
    they are hidden in every state and never scored.
    """
    refusals = Refusals(len(rows))
    has = {name: np.asarray(rows[name].is_valid()) for name in rows.schema.names}
    prompts, text = prompt_json(rows), rows["response"]
    identity = [rows[n] for n in ("prompt_ids", "response", "response_ids", "pieces", "steps", "max_new_tokens")]
    row_ids = _ids_of_lists(prompts, *map(json_texts, identity))
    _refuse_repeated(row_ids, rows, refusals)
    # a response that came as ids or with steps may end in the control tokens that its source spelled out
    bare = ~(has["response_ids"] | has["pieces"] | has["steps"])
    _refuse_control(rows, {"response": pc.if_else(pa.array(bare), text, "")}, target, refusals)
    given = {name: Ragged.from_arrow(rows[name]) for name in ("prompt_ids", "response_ids")}
    for name, ids in given.items():
        _refuse_unknown(name, ids, target, refusals)
    encoded = encode_prompts(rows, prompts, target).require(refusals, ~has["prompt_ids"])
    prompt = Ragged.where(has["prompt_ids"], given["prompt_ids"], encoded)
    prompt = _shorten(prompt, target, refusals, has["steps"])
    ids, steps = _tokens(rows, given["response_ids"], has, target, refusals)
    open_ended = ~has["response_ids"] & ~has["steps"]
    ids = ids.append(open_ended, _ends(rows, target))
    fill = target.fill(prompt, ids)
    ids = ids.append(fill, target.end)
    steps = steps.append(fill * has["steps"], NEVER)
    _refuse_mask("prompt", prompt, target, refusals)
    _refuse_unfit("response", ids, target, refusals)
    scored = has["logps"] & has["response_ids"]
    starts = prompt.lengths * (target.block_origin == "global")
    ranks = block_ranks(steps, starts, np.full(len(rows), target.block_size))
    columns = {
        "row_id": row_ids,
        "prompt_id": content_ids(pc.if_else(pc.equal(prompts, "null"), json_texts(identity[0]), prompts)),
        "prompt": _prompt_texts(rows, prompt, target, refusals),
        "response": pc.coalesce(text, _decode(ids, has["response"], target, refusals, skip_special_tokens=True)),
        "prompt_ids": prompt.to_arrow(_INTS),
        "response_ids": ids.to_arrow(_INTS),
        "steps": steps.to_arrow(_INTS, has["steps"]),
        "ranks": Ragged.packed(ranks, steps.lengths).to_arrow(_INTS, has["steps"]),
        "types": Ragged.packed(np.full(len(ranks), DIFFUSION), steps.lengths).to_arrow(_INTS, has["steps"]),
        "logps": Ragged.from_arrow(rows["logps"])
        .append(fill * has["logps"], 0.0)
        .to_arrow(TRAJECTORY.field("logps").type, scored),
        "reward_source": pc.if_else(rows["reward"].is_valid(), IMPORTED, None),
        "shift": pa.repeat(pa.scalar(target.shift, pa.int32()), len(rows)),
        "sampler": _sampler(rows["max_new_tokens"]),
        **{name: rows[name] for name in ("origin", "answer", "reward", "denoising_steps", "engine")},
    }
    return _finish(columns, TRAJECTORY, target, refusals)


def tokenize_prompts(rows: pa.RecordBatch, target: Target) -> tuple[pa.StringArray, Ragged, Refusals]:
    """Return the prompt_id and ids of prompts without an answer, and the prompts that no row may have."""
    refusals = Refusals(len(rows))
    prompts = prompt_json(rows)
    prompt_ids = content_ids(prompts)
    _refuse_repeated(prompt_ids, rows, refusals, "the prompt of")
    _refuse_control(rows, {}, target, refusals)
    ids = _shorten(encode_prompts(rows, prompts, target).require(refusals), target, refusals)
    _refuse_mask("prompt", ids, target, refusals)
    return prompt_ids, ids, refusals


# === 2. Texts -> ids ===


@dataclass(frozen=True, slots=True)
class Encoded:
    """The ids of each text; `unfit` has the reason why a text has none."""

    ids: Ragged
    unfit: dict[int, str]

    def require(self, refusals: Refusals, rows: np.ndarray | None = None) -> Ragged:
        """Refuse those of `rows` (bool [rows], or all) that have no ids. Return the ids."""
        refusals.refuse_places(self.unfit, "cannot be tokenized", rows)
        return self.ids

    def take(self, rows: np.ndarray) -> "Encoded":
        """Return the texts with these numbers."""
        unfit = {i: self.unfit[row] for i, row in enumerate(rows.tolist()) if row in self.unfit} if self.unfit else {}
        return Encoded(self.ids.take(rows), unfit)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: pa.StringArray) -> Encoded:
    """Tokenize texts without special tokens, all in one call; a null text has no ids."""
    different = texts.fill_null("").dictionary_encode()  # the answers to a prompt repeat it
    values, unfit = different.dictionary.to_pylist(), dict[int, str]()
    try:
        ids = encode_all(tokenizer, values)
    except Exception:  # one text without a token spoils the call: find it
        ids = [[]] * len(values)
        for place, text in enumerate(values):
            try:
                ids[place] = encode_prompt(tokenizer, text)
            except DataError as error:
                unfit[place] = str(error)
    return Encoded(Ragged.of(ids), unfit).take(different.indices.to_numpy(zero_copy_only=False))


def encode_prompts(rows: pa.RecordBatch, prompts: pa.StringArray, target: Target) -> Encoded:
    """Tokenize prompts, messages in the chat template; `prompts` is the JSON by which equal ones are found."""
    first, which = np.unique(first_places(prompts), return_inverse=True)
    different = rows.take(pa.array(first))
    chats = different["messages"]
    turns = list_lengths(chats) > 0  # a prompt without a turn is one without text
    places = np.flatnonzero(turns)
    texts, refused = render_all(target.tokenizer, chats.take(pa.array(places)).to_pylist())
    texts = pc.replace_with_mask(different["prompt"], pa.array(turns), pa.array(texts, pa.string()))
    encoded = encode_texts(target.tokenizer, texts)
    unfit = encoded.unfit | {int(places[place]): detail for place, detail in refused.items()}
    return Encoded(encoded.ids, unfit).take(which)


def prompt_json(rows: pa.RecordBatch) -> pa.StringArray:
    """Return the canonical JSON of each prompt, of which its id is made; "null" for neither text nor messages."""
    messages = rows["messages"]
    return pc.if_else(messages.is_valid(), json_texts(messages), json_texts(rows["prompt"]))


# === 3. What a row's columns are made of ===


def _ids_of_lists(*texts: pa.StringArray) -> pa.StringArray:
    """Return the content id of each row's JSON list, whose elements are the row's `texts`."""
    commas = [part for text in texts for part in (",", text)][1:]
    return content_ids(pc.binary_join_element_wise("[", *commas, "]", ""))


def _ends(rows: pa.RecordBatch, target: Target) -> np.ndarray:
    """Return int [rows], the token that closes an answer to each prompt."""
    chat = np.asarray(rows["messages"].is_valid())
    return np.where(chat, target.turn_end, target.end) if chat.any() else np.full(len(rows), target.end)


def _shorten(prompt: Ragged, target: Target, refusals: Refusals, has_steps: np.ndarray | bool = False) -> Ragged:
    """Keep the last `max_prompt_tokens`; before recorded steps only whole blocks are cut, which keeps their grid."""
    cut = np.maximum(0, prompt.lengths - target.max_prompt_tokens)
    cut += np.where(has_steps, -cut % target.block_size, 0) * (target.block_origin == "global")

    def detail(row: int) -> str:
        whole = f"whole blocks of {target.block_size} off its {prompt.lengths[row]} tokens"
        return f"{whole} leave none of {target.max_prompt_tokens}"

    refusals.refuse((cut >= prompt.lengths) & (prompt.lengths > 0), "prompt too long", detail)
    return prompt.without_first(np.minimum(cut, prompt.lengths))


def _tokens(
    rows: pa.RecordBatch, given: Ragged, has: Mapping[str, np.ndarray], target: Target, refusals: Refusals
) -> tuple[Ragged, Ragged]:
    """Return ids and steps of each response, which its source gives as ids, as pieces of text, or as a text."""
    steps, pieces = Ragged.from_arrow(rows["steps"]), rows["pieces"]
    in_pieces = has["pieces"] & ~has["response_ids"]
    by_text = ~in_pieces & ~has["response_ids"]
    text = encode_texts(target.tokenizer, rows["response"]).require(refusals, by_text)
    # the step map may count the end that the text omits
    omitted = by_text & has["steps"] & (text.lengths + 1 == steps.lengths)
    ids = Ragged.where(has["response_ids"], given, text.append(omitted, _ends(rows, target)))
    if in_pieces.any():
        # tokens of another tokenizer: each becomes one or more of ours, which share its step
        pieces, counts = pieces.filter(pa.array(in_pieces)), np.where(in_pieces, steps.lengths, 0)
        encoded, owner = encode_texts(target.tokenizer, pieces.flatten()), np.repeat(np.arange(len(rows)), counts)
        unfit = {int(owner[place]): detail for place, detail in sorted(encoded.unfit.items(), reverse=True)}
        refusals.refuse_places(unfit, "cannot be tokenized")
        joined = encoded.ids.join(counts)
        shared = np.repeat(steps.take(np.flatnonzero(in_pieces)).flat, encoded.ids.lengths)
        ids = Ragged.where(in_pieces, joined, ids)
        steps = Ragged.where(in_pieces, Ragged(shared, joined.starts, joined.lengths), steps)
    differ = by_text & has["steps"] & (ids.lengths != steps.lengths)

    def detail(row: int) -> str:
        return f"{steps.lengths[row]} steps for the {ids.lengths[row]} tokens of this tokenizer"

    refusals.refuse(differ, "lengths differ", detail)
    return ids, steps


def _sampler(max_new_tokens: pa.Array) -> pa.StructArray:
    known = {"max_new_tokens": max_new_tokens}
    fields = [known.get(field.name, pa.nulls(len(max_new_tokens), field.type)) for field in _SAMPLER]
    return pa.StructArray.from_arrays(fields, fields=list(_SAMPLER), mask=max_new_tokens.is_null())


def _prompt_texts(rows: pa.RecordBatch, ids: Ragged, target: Target, refusals: Refusals) -> pa.StringArray:
    """Return the column `prompt`: the text, the messages as JSON, or else the decoded ids."""
    text, messages = rows["prompt"], rows["messages"]
    as_json = pc.if_else(messages.is_valid(), json_texts(messages, canonical=False), None)
    known = np.asarray(pc.or_(text.is_valid(), messages.is_valid()))
    return pc.coalesce(text, as_json, _decode(ids, known, target, refusals))


def _decode(ids: Ragged, known: np.ndarray, target: Target, refusals: Refusals, **options: bool) -> pa.StringArray:
    """Decode the ids of good rows whose text is not `known`; the others are null."""
    rows = np.flatnonzero(~known & refusals.good)
    texts = np.full(len(ids), None, dtype=object)
    if len(rows):
        texts[rows] = target.tokenizer.batch_decode(ids.take(rows).to_arrow(_INTS).to_pylist(), **options)
    return pa.array(texts, pa.string())


def _refuse_repeated(ids: pa.StringArray, rows: pa.RecordBatch, refusals: Refusals, what: str = "the same as") -> None:
    first, origins = first_places(ids), rows["origin"]
    repeats = first != np.arange(len(rows))
    refusals.refuse(repeats, "duplicate row", lambda row: f"{what} {origins[int(first[row])]}")


def _refuse_control(
    rows: pa.RecordBatch, sides: Mapping[str, pa.StringArray], target: Target, refusals: Refusals
) -> None:
    # a prompt of plain text may be written in the model's own chat markup; a message or a response may not
    pattern, messages = target.control, rows["messages"]
    contents = messages.flatten().field("content")

    def detail(where: str, text: str) -> str:
        return f"{where} holds {pattern.search(text)[0]!r}, which the tokenizer reads as a control token"  # type: ignore[index]

    def of_turns(row: int) -> str:
        turns = [turn["content"] for turn in messages[row].as_py()]
        return next(detail(f"prompt[{i}]", text) for i, text in enumerate(turns) if pattern.search(text))

    matches = _matches(contents, pattern)
    bad = Ragged.packed(matches, list_lengths(messages)).any(matches)
    refusals.refuse(bad, "control token", of_turns)
    for side, texts in sides.items():
        refusals.refuse(
            _matches(texts, pattern),
            "control token",
            lambda row, side=side, texts=texts: detail(side, str(texts[row])),  # type: ignore[misc]
        )


def _matches(texts: pa.StringArray, pattern: re.Pattern[str]) -> np.ndarray:
    """Return bool [rows]: whether a pattern of literals is found."""
    return np.asarray(pc.match_substring_regex(texts, pattern.pattern).fill_null(False).to_numpy(zero_copy_only=False))


def _refuse_unknown(where: str, ids: Ragged, target: Target, refusals: Refusals) -> None:
    flat = ids.flat
    unknown = (flat < 0) | (flat >= target.vocabulary)

    def detail(row: int) -> str:
        first = flat[unknown & (ids.owner == row)][0]
        return f"{where} holds {first}; the tokenizer has ids 0 to {target.vocabulary - 1}"

    refusals.refuse(ids.any(unknown), "unknown id", detail)


def _refuse_mask(where: str, ids: Ragged, target: Target, refusals: Refusals) -> None:
    says = f"{where} holds the mask token, id {target.mask_id}"
    refusals.refuse(ids.any(ids.flat == target.mask_id), "mask token", lambda _: says)


def _refuse_unfit(side: str, ids: Ragged, target: Target, refusals: Refusals) -> None:
    def detail(row: int) -> str:
        return f"{side} has {ids.lengths[row]} tokens of at most {target.max_response_tokens}"

    _refuse_mask(side, ids, target, refusals)
    refusals.refuse(ids.lengths > target.max_response_tokens, "response too long", detail)


def _finish(
    columns: dict[str, pa.Array],
    schema: pa.Schema,
    target: Target,
    refusals: Refusals,
    partners: pa.StringArray | None = None,
) -> tuple[pa.Table, list[Rejected]]:
    """Return the rows that are good and pass the rules of their table, and the refused ones.

    Only a row with a partner is made of two rows of the file.
    """
    rows = len(refusals.good)
    same = {name: pa.repeat(pa.scalar(value), rows) for name, value in target.columns.items()}
    columns = {field.name: pa.nulls(rows, field.type) for field in schema} | same | columns
    table = pa.table([columns[name] for name in schema.names], names=schema.names).cast(schema)
    origins = table["origin"]
    two = np.zeros(rows, dtype=bool) if partners is None else np.asarray(partners.is_valid())
    rejected = refusals.to_rejected(lambda row: split_origins(str(origins[row])) if two[row] else [str(origins[row])])
    return apply_rules(table.filter(pa.array(refusals.good)), rejected)


def split_origins(origin: str) -> list[str]:
    """Split a column `origin` into the rows it names: one, or two of the same file, whose name may hold anything."""
    found = _TWO_ROWS.fullmatch(origin)
    return [f"{found[1]}:{found[2]}", f"{found[1]}:{found[3]}"] if found else [origin]


def apply_rules(table: pa.Table, rejected: list[Rejected]) -> tuple[pa.Table, list[Rejected]]:
    """Return the rows that pass the rules of their table; the others are added to `rejected`."""
    rules = rules_of(table.schema)
    found = verdicts(table, rules)
    for row in np.flatnonzero(found != GOOD):
        rule = rules[found[row]]
        origins = split_origins(table["origin"][int(row)].as_py())
        rejected += (Rejected(origin, rule.name, rule.says) for origin in origins)
    return table.filter(pa.array(found == GOOD)), rejected
