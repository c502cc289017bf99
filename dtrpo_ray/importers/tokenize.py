"""Imported texts and ids -> rows of preference/v1 and trajectory/v1 on a model's grid of blocks."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dtrpo_ray.errors import DataError
from dtrpo_ray.importers.files import Refusal
from dtrpo_ray.importers.preferences import PreferenceRow, Prompt
from dtrpo_ray.importers.responses import ResponseRow
from dtrpo_ray.records import CONTRACT_VERSION, DIFFUSION, PREFERENCE, TRAJECTORY
from dtrpo_ray.rows import tokenizer_hash
from dtrpo_ray.rules import GOOD, block_ranks, rules_of, verdicts
from dtrpo_ray.tables import Rejected
from dtrpo_ray.tokenizer import (
    control_tokens,
    encode_all,
    encode_prompt,
    eos_token_id,
    mask_token_id,
    rendered,
    turn_end_id,
)
from dtrpo_ray.trajectory import NEVER, Origin

JOIN = " + "  # between the origins of a pair made of two rows
_TWO_ROWS = re.compile(rf"(.+):(\d+){re.escape(JOIN)}\1:(\d+)", re.DOTALL)
IMPORTED = "the file"  # who gave the rewards that an imported row brings


@dataclass(frozen=True)
class Target:
    """What rows are made for: a tokenizer, a model's grid, and the longest prompt and response in tokens.

    A prompt keeps its last `max_prompt_tokens`; a response counts with its end token and the fill of its block.
    """

    tokenizer: PreTrainedTokenizerBase
    block_size: int
    max_prompt_tokens: int
    max_response_tokens: int
    block_origin: Origin = "global"
    shift: int | None = None
    data_hash: str | None = None

    @cached_property
    def mask_id(self) -> int:
        """Of the tokenizer's mask token."""
        return mask_token_id(self.tokenizer)

    @cached_property
    def vocabulary(self) -> int:
        """Ids that the tokenizer knows are below."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @cached_property
    def control(self) -> re.Pattern[str]:
        """The spellings that the tokenizer reads as control tokens."""
        return control_tokens(self.tokenizer)

    @cached_property
    def end(self) -> int:
        """The token that closes plain text and fills a block."""
        return eos_token_id(self.tokenizer)

    @cached_property
    def turn_end(self) -> int:
        """The token that closes an answer to messages, as the chat template ends an assistant's turn."""
        found = turn_end_id(self.tokenizer)
        return self.end if found is None else found

    def ends(self, prompt: Prompt | None) -> int:
        """The token that closes an answer to `prompt`."""
        return self.turn_end if isinstance(prompt, list) else self.end

    @cached_property
    def columns(self) -> dict[str, Any]:
        """What all rows have in common."""
        return {
            "contract_version": CONTRACT_VERSION,
            "block_size": self.block_size,
            "block_origin": self.block_origin,
            "mask_id": self.mask_id,
            "tokenizer_hash": tokenizer_hash(self.tokenizer),
            "data_hash": self.data_hash,
        }

    def fill(self, prompt_len: int, response_len: int) -> int:
        """Tokens that the terminal block lacks."""
        return -(response_len + prompt_len * (self.block_origin == "global")) % self.block_size


def tokenize_preferences(rows: Iterable[PreferenceRow], target: Target) -> tuple[pa.Table, list[Rejected]]:
    """The table preference/v1 (no recorded steps, no rewards) and the rows refused."""
    rows, made, rejected = list(rows), [], list[Rejected]()
    prompts = encode_prompts(target.tokenizer, [row.prompt for row in rows])
    sides = encode_texts(target.tokenizer, [text for row in rows for text in (row.chosen, row.rejected)])
    first_seen: dict[str, str] = {}
    for i, row in enumerate(rows):
        row_id = content_id([row.prompt, row.chosen, row.rejected])
        try:
            if row_id in first_seen:
                raise Refusal("duplicate row", f"the same as {first_seen[row_id]}")
            first_seen[row_id] = row.origin
            _require_no_control(row.prompt, {"chosen": row.chosen, "rejected": row.rejected}, target)
            prompt = _shortened(prompts[i], target)
            end = target.ends(row.prompt)
            chosen, rejected_ids = (_closed(side, end, len(prompt), target) for side in sides[2 * i : 2 * i + 2])
            _require_fit(prompt, {"chosen": chosen, "rejected": rejected_ids}, target)
            if chosen == rejected_ids:
                raise Refusal("identical tokens", "chosen and rejected differ as text and not as tokens")
        except Refusal as refusal:
            rejected += (Rejected(origin, *refusal.args) for origin in row.origins)
            continue
        ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected_ids}
        names = {"row_id": row_id, "prompt_id": content_id(row.prompt), "origin": JOIN.join(row.origins)}
        made.append({**target.columns, **names, **ids})
    return checked(pa.Table.from_pylist(made, schema=PREFERENCE), rejected)


def tokenize_responses(rows: Iterable[ResponseRow], target: Target) -> tuple[pa.Table, list[Rejected]]:
    """The table trajectory/v1 and the rows refused. Text without ids is closed by an end token, as in preferences.

    A response with steps that stops before its terminal block does, as samplers that cut at the end token write it, is
    filled with end tokens that no step ever reached: they are hidden in every state and never scored.
    """
    rows, made, rejected = list(rows), [], list[Rejected]()
    prompts = encode_prompts(target.tokenizer, [row.prompt or "" for row in rows])
    texts = encode_texts(target.tokenizer, [row.response or "" for row in rows])
    first_seen: dict[str, str] = {}
    for row, prompt, text in zip(rows, prompts, texts, strict=True):
        content = [row.prompt, row.prompt_ids, row.response, row.response_ids, row.pieces, row.steps]
        row_id = content_id([*content, row.max_new_tokens])
        try:
            if row_id in first_seen:
                raise Refusal("duplicate row", f"the same as {first_seen[row_id]}")
            first_seen[row_id] = row.origin
            made.append({**target.columns, "row_id": row_id, **_response_columns(row, prompt, text, target)})
        except Refusal as refusal:
            rejected.append(Rejected(row.origin, *refusal.args))
    table = pa.Table.from_pylist(made, schema=TRAJECTORY)
    return checked(_with_ranks(table), rejected)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int] | Refusal]:
    """Ids of each text without special tokens, all in one call; a Refusal in the place of one that has no ids."""
    different = list(dict.fromkeys(texts))  # the answers to a prompt repeat it
    found: list[list[int] | Refusal]
    try:
        found = list(encode_all(tokenizer, different))
    except Exception:  # one text without a token spoils the call: find it
        found = [_encode_alone(tokenizer, text) for text in different]
    ids = dict(zip(different, found, strict=True))
    return [ids[text] for text in texts]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int] | Refusal]:
    """Ids of each prompt, messages in the chat template, as `encode_texts` gives them."""
    texts, refused = [], dict[int, Refusal]()
    for place, prompt in enumerate(prompts):
        try:
            texts.append(rendered(tokenizer, prompt))
        except DataError as error:
            texts.append("")
            refused[place] = Refusal("cannot be tokenized", str(error))
    return [refused.get(place, ids) for place, ids in enumerate(encode_texts(tokenizer, texts))]


def split_origins(origin: str) -> list[str]:
    """The column `origin` as the rows it names: one, or two of the same file, whose name may hold anything."""
    found = _TWO_ROWS.fullmatch(origin)
    return [f"{found[1]}:{found[2]}", f"{found[1]}:{found[3]}"] if found else [origin]


def content_id(content: Any) -> str:
    """16 hex digits of the SHA-256 of the canonical JSON: the same text has the same id in any file and run."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _encode_alone(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | Refusal:
    try:
        return encode_prompt(tokenizer, text)
    except DataError as error:
        return Refusal("cannot be tokenized", str(error))


def _response_columns(
    row: ResponseRow, prompt_ids: list[int] | Refusal, text_ids: list[int] | Refusal, target: Target
) -> dict[str, Any]:
    # a response that came as ids or with steps may end in the control tokens that its source spelled out
    bare = row.response_ids is None and row.pieces is None and row.steps is None
    _require_no_control(row.prompt or "", {"response": row.response or ""} if bare else {}, target)
    _require_known(row, target)
    prompt = _shortened(prompt_ids if row.prompt_ids is None else row.prompt_ids, target, row.steps is not None)
    ids, steps, logps = _tokens(row, text_ids, target)
    if steps is None and row.response_ids is None:
        ids = _closed(ids, target.ends(row.prompt), len(prompt), target)
    fill = target.fill(len(prompt), len(ids))
    ids = ids + [target.end] * fill
    steps = None if steps is None else steps + [NEVER] * fill
    _require_fit(prompt, {"response": ids}, target)
    text = row.response if row.response is not None else target.tokenizer.decode(ids, skip_special_tokens=True)
    sampler = {"max_new_tokens": row.max_new_tokens} if row.max_new_tokens else None
    return {
        "prompt_id": content_id(row.prompt if row.prompt is not None else row.prompt_ids),
        "origin": row.origin,
        "prompt": prompt_text(row.prompt, prompt, target.tokenizer),
        "response": text,
        "answer": row.answer,
        "prompt_ids": prompt,
        "response_ids": ids,
        "steps": steps,
        "types": None if steps is None else [DIFFUSION] * len(steps),
        "logps": None if logps is None else logps + [0.0] * fill,
        "reward": row.reward,
        "reward_source": None if row.reward is None else IMPORTED,
        "shift": target.shift,
        "denoising_steps": row.denoising_steps,
        "sampler": sampler,
        "engine": row.engine,
    }


def prompt_text(prompt: Prompt | None, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The column `prompt`: the text, the messages as JSON, or what the ids say."""
    if prompt is None:
        return str(tokenizer.decode(ids))
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def prompt_messages(prompt: str) -> list[dict[str, str]]:
    """The column `prompt` as messages: those it holds as JSON, or the text as the user's."""
    if prompt.startswith("[{"):
        try:
            messages = json.loads(prompt)
        except json.JSONDecodeError:
            messages = []
        if messages and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages):
            return list(messages)
    return [{"role": "user", "content": prompt}]


def _tokens(
    row: ResponseRow, text_ids: list[int] | Refusal, target: Target
) -> tuple[list[int], list[int] | None, list[float] | None]:
    """Ids, steps and log-probs of a response as its source has it."""
    if row.response_ids is not None:
        return row.response_ids, row.steps, row.logps
    if row.pieces is not None:
        # tokens of another tokenizer: each becomes one or more of ours, which share its step
        ids = [_require(piece) for piece in encode_texts(target.tokenizer, row.pieces)]
        steps = [step for piece, step in zip(ids, row.steps or (), strict=True) for _ in piece]
        return [token for piece in ids for token in piece], steps, None
    ids_of_text = _require(text_ids)
    if row.steps is not None and len(ids_of_text) + 1 == len(row.steps):
        ids_of_text = [*ids_of_text, target.ends(row.prompt)]  # the step map counts the end that the text omits
    if row.steps is not None and len(ids_of_text) != len(row.steps):
        raise Refusal("lengths differ", f"{len(row.steps)} steps for the {len(ids_of_text)} tokens of this tokenizer")
    return ids_of_text, row.steps, None


def _with_ranks(table: pa.Table) -> pa.Table:
    """Fill in `ranks` from `steps`, for all rows at once."""
    has = np.array(table["steps"].is_valid())
    rows = table.filter(pa.array(has, pa.bool_()))
    steps = rows["steps"].combine_chunks()
    lengths = np.diff(steps.offsets) if len(rows) else np.zeros(0, dtype=np.int64)
    on_global = np.array(rows["block_origin"].to_pylist()) == "global"
    starts = np.array([len(ids) for ids in rows["prompt_ids"].to_pylist()], dtype=np.int64) * on_global
    ranks, _ = block_ranks(steps.flatten().to_numpy(), lengths, starts, rows["block_size"].to_numpy())
    per_row = iter(np.split(ranks, np.cumsum(lengths)[:-1])) if len(rows) else iter(())
    column = pa.array([next(per_row).tolist() if known else None for known in has], pa.list_(pa.int32()))
    return table.set_column(table.schema.get_field_index("ranks"), "ranks", column)


def _shortened(prompt: list[int] | Refusal, target: Target, has_steps: bool = False) -> list[int]:
    """The last `max_prompt_tokens` of a prompt; before recorded steps only whole blocks go, which keeps their grid."""
    ids = _require(prompt)
    cut = max(0, len(ids) - target.max_prompt_tokens)
    cut += -cut % target.block_size if has_steps and target.block_origin == "global" else 0
    if cut >= len(ids) > 0:
        raise Refusal(
            "prompt too long",
            f"whole blocks of {target.block_size} off its {len(ids)} tokens leave none of {target.max_prompt_tokens}",
        )
    return ids[cut:]


def ids_to_answer(prompt: Prompt, target: Target) -> list[int]:
    """Ids of a prompt without an answer yet. Raises Refusal for one that could not be in a row of ours."""
    _require_no_control(prompt, {}, target)
    ids = _shortened(encode_prompts(target.tokenizer, [prompt])[0], target)
    _require_fit(ids, {}, target)
    return ids


def _require(ids: list[int] | Refusal) -> list[int]:
    if isinstance(ids, Refusal):
        raise ids
    return ids


def _closed(ids: list[int] | Refusal, end: int, prompt_len: int, target: Target) -> list[int]:
    """Ids of a text, the token `end`, and end-of-sequence to the end of its block (see tokenizer.encode_response)."""
    ended = [*_require(ids), end]
    return ended + [target.end] * target.fill(prompt_len, len(ended))


def _require_no_control(prompt: Prompt, sides: dict[str, str], target: Target) -> None:
    # a prompt of plain text may be written in the model's own chat markup; a message or a response may not
    texts = {} if isinstance(prompt, str) else {f"prompt[{i}]": m["content"] for i, m in enumerate(prompt)}
    for where, text in {**texts, **sides}.items():
        if found := target.control.search(text):
            raise Refusal("control token", f"{where} holds {found[0]!r}, which the tokenizer reads as a control token")


def _require_known(row: ResponseRow, target: Target) -> None:
    for where, ids in {"prompt_ids": row.prompt_ids, "response_ids": row.response_ids}.items():
        if ids and not 0 <= min(ids) <= max(ids) < target.vocabulary:
            wrong = next(i for i in ids if not 0 <= i < target.vocabulary)
            raise Refusal("unknown id", f"{where} holds {wrong}; the tokenizer has ids 0 to {target.vocabulary - 1}")


def _require_fit(prompt: list[int], sides: dict[str, list[int]], target: Target) -> None:
    for where, ids in {"prompt": prompt, **sides}.items():
        if target.mask_id in ids:
            raise Refusal("mask token", f"{where} holds the mask token, id {target.mask_id}")
        if where != "prompt" and len(ids) > target.max_response_tokens:
            detail = f"{where} has {len(ids)} tokens of at most {target.max_response_tokens}"
            raise Refusal("response too long", detail)


def checked(table: pa.Table, rejected: list[Rejected]) -> tuple[pa.Table, list[Rejected]]:
    """The rows that pass the table's own rules; the others are refused by those."""
    rules = rules_of(table.schema)
    found = verdicts(table, rules)
    for row in np.flatnonzero(found != GOOD):
        rule = rules[found[row]]
        origins = split_origins(table["origin"][int(row)].as_py())
        rejected += (Rejected(origin, rule.name, rule.says) for origin in origins)
    return table.filter(pa.array(found == GOOD)), rejected
