"""Imported texts and ids -> rows of preference, trajectory and example/v1 on a model's grid, a batch at a time."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dtrpo_ray.data.formats.base import attempt, split_rejected
from dtrpo_ray.data.formats.examples import ExampleRow
from dtrpo_ray.data.formats.parsing import Answer, Prompt, Refusal, answer_texts, texts_of
from dtrpo_ray.data.formats.preferences import PreferenceRow
from dtrpo_ray.data.formats.prompts import PromptRow
from dtrpo_ray.data.formats.responses import ResponseRow
from dtrpo_ray.data.ragged import Ragged
from dtrpo_ray.data.rules import GOOD, block_ranks, rules_of, verdicts
from dtrpo_ray.data.schemas import CONTRACT_VERSION, DIFFUSION, EXAMPLE, PREFERENCE, TRAJECTORY
from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.errors import DataError
from dtrpo_ray.method.trajectory import NEVER, Origin
from dtrpo_ray.models.tokenizer import (
    control_token_error,
    control_tokens,
    encode_all,
    encode_prompt,
    eos_token_id,
    mask_token_id,
    render_answer,
    render_prompt,
    tokenizer_hash,
    turn_end_id,
)

JOIN = " + "  # between the origins of a pair made of two rows
_TWO_ROWS = re.compile(rf"(.+):(\d+){re.escape(JOIN)}\1:(\d+)", re.DOTALL)
IMPORTED = "the file"  # the source of the rewards of imported rows

Cells = Mapping[str, object]  # a row of a table by column; a column that is not named is null


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
    truncated: set[str] = field(default_factory=set, compare=False)
    """The origins of the rows whose prompts were cut."""

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
    def columns(self) -> Cells:
        """Return the columns that are the same in all rows."""
        return {
            "contract_version": CONTRACT_VERSION,
            "block_size": self.block_size,
            "block_origin": self.block_origin,
            "mask_id": self.mask_id,
            "tokenizer_hash": tokenizer_hash(self.tokenizer),
        }

    @cached_property
    def turn_end_text(self) -> str | None:
        """Return the spelling of `turn_end`, None if turns end as plain text does."""
        return None if self.turn_end == self.end else str(self.tokenizer.convert_ids_to_tokens(self.turn_end))

    def is_chat(self, prompt: Prompt | None) -> bool:
        """Return whether a prompt is messages, or text that already has turns of the model's chat template."""
        if isinstance(prompt, str):
            return self.turn_end_text is not None and self.turn_end_text in prompt
        return prompt is not None

    def write(self, prompt: Prompt | None, answer: Answer) -> str:
        """Return the text of an answer without the end of its turn.

        To text with chat markup the file may have written that end; of a message the chat template writes all fields.
        """
        if isinstance(answer, str):
            return self._open(prompt, answer) if isinstance(prompt, str) and self.is_chat(prompt) else answer
        self.require_plain(None, **{f"answer[{i}]": text for i, text in enumerate(sorted(answer_texts(answer)))})
        fields = ", ".join(sorted(answer.keys() - {"role", "content"}))
        if not isinstance(prompt, list):
            raise Refusal("unsupported field", f"{fields} of an answer to text; the prompt must be messages")
        try:
            return render_answer(self.tokenizer, prompt, answer)
        except DataError as error:
            raise Refusal("unsupported field", str(error)) from None

    def _open(self, prompt: str, answer: str) -> str:
        end = self.turn_end_text
        assert end is not None
        if prompt.rstrip().endswith(end):
            raise Refusal("not a dialogue", "the prompt ends with a turn, and does not open the assistant's")
        shorter = answer.rstrip()
        return shorter.removesuffix(end) if shorter.endswith(end) else answer

    def close(self, prompt: Prompt | None, ids: list[int]) -> list[int]:
        """Return an answer with the token that closes it."""
        return [*ids, self.turn_end if self.is_chat(prompt) else self.end]

    def fill(self, prompt: list[int], response: list[int]) -> list[int]:
        """Return a response with end tokens up to the end of its terminal block."""
        return response + [self.end] * (-(len(response) + self.start(prompt)) % self.block_size)

    def start(self, prompt: list[int]) -> int:
        """Return the place of a response's first token on its grid."""
        return len(prompt) if self.block_origin == "global" else 0

    def shorten(self, prompt: list[int], origin: str, has_steps: bool = False) -> list[int]:
        """Return the last `max_prompt_tokens`; before recorded steps whole blocks are cut, which keeps their grid."""
        cut = max(0, len(prompt) - self.max_prompt_tokens)
        if has_steps and self.block_origin == "global":
            cut += -cut % self.block_size
        if 0 < len(prompt) <= cut:
            whole = f"whole blocks of {self.block_size} off its {len(prompt)} tokens"
            raise Refusal("prompt too long", f"{whole} leave none of {self.max_prompt_tokens}")
        if cut:
            self.truncated.add(origin)
        return prompt[cut:]

    def require_plain(self, prompt: Prompt | None, **sides: str) -> None:
        """Raise Refusal for messages or `sides` with control tokens; text may have the model's own chat markup."""
        turns = [] if prompt is None or isinstance(prompt, str) else prompt
        told = [(f"prompt[{i}]", text) for i, turn in enumerate(turns) for text in sorted(texts_of(turn))]
        if problem := control_token_error(self.control, [*told, *sides.items()]):
            raise Refusal("control token", problem)

    def require_known(self, where: str, ids: list[int] | None) -> None:
        """Raise Refusal for an id that the tokenizer does not have."""
        for token in ids or ():
            if not 0 <= token < self.vocabulary:
                raise Refusal("unknown id", f"{where} holds {token}; the tokenizer has ids 0 to {self.vocabulary - 1}")

    def require_unmasked(self, where: str, ids: list[int]) -> None:
        """Raise Refusal for the mask token."""
        if self.mask_id in ids:
            raise Refusal("mask token", f"{where} holds the mask token, id {self.mask_id}")

    def require_fit(self, side: str, ids: list[int]) -> None:
        """Raise Refusal for a response with the mask token, or of too many tokens."""
        self.require_unmasked(side, ids)
        if len(ids) > self.max_response_tokens:
            detail = f"{side} has {len(ids)} tokens of at most {self.max_response_tokens}"
            raise Refusal("response too long", detail)


def tokenize_preferences(rows: Sequence[PreferenceRow], target: Target) -> tuple[pa.Table, list[Rejected]]:
    """Return rows of preference/v1 (no recorded steps, no rewards) and the refused ones, of a pair both its origins."""
    opened, refused = split_rejected(attempt(row.origin, _write_pair, row, target) for row in rows)
    batch = Batch(target, chain.from_iterable((row.prompt, *_sides(row)) for row in opened))
    pairs, unfit = split_rejected(attempt(row.origin, batch.pair, row) for row in opened)
    refused += unfit
    partners = {row.origin: row.rejected_origin for row in rows}
    both = [replace(row, origin=origin) for row in refused for origin in (row.origin, partners[row.origin]) if origin]
    return apply_rules(pa.Table.from_pylist(pairs, schema=PREFERENCE), both)


def _write_pair(row: PreferenceRow, target: Target) -> PreferenceRow:
    chosen, rejected = (target.write(row.prompt, side) for side in (row.chosen, row.rejected))
    unchanged = (chosen, rejected) == (row.chosen, row.rejected)
    return row if unchanged else replace(row, chosen=chosen, rejected=rejected).require()


def _sides(row: PreferenceRow) -> tuple[str, str]:
    """Return the sides of a pair whose answers are written as text."""
    assert isinstance(row.chosen, str)
    assert isinstance(row.rejected, str)
    return row.chosen, row.rejected


def tokenize_prompts(rows: Sequence[PromptRow], target: Target) -> tuple[pa.Table, list[Rejected]]:
    """Return the origin and ids of prompts without answers, and the refused ones."""
    batch = Batch(target, [row.prompt for row in rows])

    def cells(row: PromptRow) -> Cells:
        return {"origin": row.origin, "prompt_ids": batch.prompt(row)[1]}

    found, refused = split_rejected(attempt(row.origin, cells, row) for row in rows)
    schema = pa.schema([TRAJECTORY.field("origin"), TRAJECTORY.field("prompt_ids")])
    return pa.Table.from_pylist(found, schema=schema), refused


def tokenize_responses(rows: Sequence[ResponseRow], target: Target) -> tuple[pa.Table, list[Rejected]]:
    """Return rows of trajectory/v1 and the refused ones."""
    batch = Batch(target, chain.from_iterable((row.prompt, *_pieces(row)) for row in rows))
    found, refused = split_rejected(attempt(row.origin, batch.trajectory, row) for row in rows)
    return apply_rules(pa.Table.from_pylist(found, schema=TRAJECTORY), refused)


def tokenize_examples(rows: Sequence[ExampleRow], target: Target) -> tuple[pa.Table, list[Rejected]]:
    """Return rows of example/v1 and the refused ones."""
    written, refused = split_rejected(attempt(row.origin, _write_example, row, target) for row in rows)
    batch = Batch(target, chain.from_iterable((row.prompt, str(row.response)) for row in written))
    found, unfit = split_rejected(attempt(row.origin, batch.example, row) for row in written)
    return apply_rules(pa.Table.from_pylist(found, schema=EXAMPLE), refused + unfit)


def _write_example(row: ExampleRow, target: Target) -> ExampleRow:
    response = target.write(row.prompt, row.response)
    return row if response == row.response else replace(row, response=response).require()


def _pieces(row: ResponseRow) -> list[str]:
    """Return the texts of a response that are tokenized: none, if it came as ids."""
    if row.response_ids is not None:
        return []
    return [row.response or ""] if row.pieces is None else row.pieces


class Batch:
    """Rows that are tokenized together: equal texts and equal conversations once, and all of them in one call.

    A method that takes a row raises Refusal for one that cannot be used.
    """

    def __init__(self, target: Target, texts: Iterable[Prompt | None]) -> None:
        self.target, self.tokenizer = target, target.tokenizer
        self.origins = dict[str, str]()  # row or prompt id -> the origin where it was first seen
        self.rendered, self.known = dict[str, str](), dict[str, list[int]]()
        plain = list[str]()
        for text in texts:
            if isinstance(text, str):
                plain.append(text)
            elif text and (key := content_id(text)) not in self.rendered:
                with suppress(DataError):  # raised again when the conversation is used
                    self.rendered[key] = render_prompt(self.tokenizer, text)
        values = list(dict.fromkeys([*self.rendered.values(), *plain]))
        with suppress(Exception):  # a text without a token spoils the call: each is then tokenized alone
            self.known = dict(zip(values, encode_all(self.tokenizer, values), strict=True))

    def encode(self, text: Prompt | None) -> list[int]:
        """Return the ids of a text or conversation without special tokens; one that is missing or empty has none."""
        text = text or ""
        plain = text if isinstance(text, str) else self.rendered.get(content_id(text), "")
        try:
            return self.known.get(plain) or encode_prompt(self.tokenizer, text)
        except DataError as error:
            raise Refusal("cannot be tokenized", str(error)) from None

    def _fit(self, prompt: Prompt | None, ids: list[int], origin: str, has_steps: bool = False) -> list[int]:
        """Return the ids of a prompt that fit: of messages all but the oldest turns after the system prompt."""
        most = self.target.max_prompt_tokens
        if len(ids) <= most or not isinstance(prompt, list):
            return self.target.shorten(ids, origin, has_steps)
        system = [turn for turn in prompt[:1] if turn["role"] == "system"]
        tools = {} if system else {name: prompt[0][name] for name in ("tools",) if name in prompt[0]}
        for first in range(len(system) + 1, 0 if has_steps else len(prompt)):
            turns = [*system, prompt[first] | tools, *prompt[first + 1 :]]
            if prompt[first]["role"] == "user" and len(ids := self.encode(turns)) <= most:
                self.target.truncated.add(origin)
                return ids
        raise Refusal("prompt too long", f"without its older turns {len(ids)} tokens of at most {most}")

    def prompt(self, row: PromptRow) -> tuple[str, list[int]]:
        """Return the prompt_id and ids of a prompt without an answer, which no row before it may have."""
        prompt_id = content_id(row.prompt)
        self._require_new(prompt_id, row.origin, "the prompt of")
        self.target.require_plain(row.prompt)
        ids = self._fit(row.prompt, self.encode(row.prompt), row.origin)
        self.target.require_unmasked("prompt", ids)
        return prompt_id, ids

    def pair(self, row: PreferenceRow) -> Cells:
        """Return a row of preference/v1."""
        target, texts = self.target, dict(zip(("chosen", "rejected"), _sides(row), strict=True))
        row_id = content_id([row.prompt, *texts.values()])
        self._require_new(row_id, row.origin)
        target.require_plain(row.prompt, **texts)
        origin = JOIN.join(origin for origin in (row.origin, row.rejected_origin) if origin)
        prompt = self._fit(row.prompt, self.encode(row.prompt), origin)
        ids = {side: target.close(row.prompt, self.encode(text)) for side, text in texts.items()}
        sides = {side: target.fill(prompt, answer) for side, answer in ids.items()}
        target.require_unmasked("prompt", prompt)
        for side, answer in sides.items():
            target.require_fit(side, answer)
        if sides["chosen"] == sides["rejected"]:
            raise Refusal("identical tokens", "chosen and rejected differ as text and not as tokens")
        return {
            **target.columns,
            "row_id": row_id,
            "prompt_id": content_id(row.prompt),
            "origin": origin,
            "prompt_ids": prompt,
            **{f"{side}_ids": answer for side, answer in sides.items()},
        }

    def example(self, row: ExampleRow) -> Cells:
        """Return a row of example/v1; the answer is closed and filled as those of preferences are."""
        target, response = self.target, str(row.response)
        row_id = content_id([row.prompt, response])
        self._require_new(row_id, row.origin)
        target.require_plain(row.prompt, response=response)
        prompt = self._fit(row.prompt, self.encode(row.prompt), row.origin)
        ids = target.fill(prompt, target.close(row.prompt, self.encode(response)))
        target.require_unmasked("prompt", prompt)
        target.require_fit("response", ids)
        return {**target.columns, "row_id": row_id, "origin": row.origin, "prompt_ids": prompt, "chosen_ids": ids}

    def trajectory(self, row: ResponseRow) -> Cells:
        """Return a row of trajectory/v1.

        Text without ids is closed by an end token, as in preferences. A response with steps that stops before its
        terminal block does, as samplers that cut at the end token write it, is filled with end tokens that no step
        ever reached: they are hidden in every state and never scored.
        """
        target, given = self.target, (row.response_ids, row.pieces, row.steps)
        row_id = content_id([row.prompt, row.prompt_ids, row.response, *given, row.max_new_tokens])
        self._require_new(row_id, row.origin)
        # a response that came as ids or with steps may end in the control tokens that its source spelled out
        target.require_plain(row.prompt, response=row.response or "" if given == (None, None, None) else "")
        target.require_known("prompt_ids", row.prompt_ids)
        target.require_known("response_ids", row.response_ids)
        prompt = self.encode(row.prompt) if row.prompt_ids is None else row.prompt_ids
        prompt = self._fit(row.prompt, prompt, row.origin, row.steps is not None)
        written, steps = self._tokens(row)
        ids = target.fill(prompt, written)
        filled = len(ids) - len(written)
        target.require_unmasked("prompt", prompt)
        target.require_fit("response", ids)
        cells: dict[str, object] = {
            **target.columns,
            **{name: getattr(row, name) for name in ("origin", "answer", "reward", "denoising_steps", "engine")},
            "row_id": row_id,
            "prompt_id": content_id(row.prompt_ids if row.prompt is None else row.prompt),
            "prompt": self.tokenizer.decode(prompt) if row.prompt is None else row.prompt,
            "response": self.tokenizer.decode(ids, skip_special_tokens=True) if row.response is None else row.response,
            "prompt_ids": prompt,
            "response_ids": ids,
            "reward_source": None if row.reward is None else IMPORTED,
            "shift": target.shift,
            "sampler": None if row.max_new_tokens is None else {"max_new_tokens": row.max_new_tokens},
        }
        if isinstance(row.prompt, list):
            cells["prompt"] = json.dumps(row.prompt, ensure_ascii=False)
        if row.logps is not None and row.response_ids is not None:
            cells["logps"] = row.logps + [0.0] * filled
        if steps is not None:
            steps = steps + [NEVER] * filled
            size, start, block = (np.array([n]) for n in (len(steps), target.start(prompt), target.block_size))
            ranks = block_ranks(Ragged.packed(np.array(steps), size), start, block)
            cells |= {"steps": steps, "ranks": ranks, "types": [DIFFUSION] * len(steps)}
        return cells

    def _tokens(self, row: ResponseRow) -> tuple[list[int], list[int] | None]:
        """Return ids and steps of a response, which its source gives as ids, as pieces of text, or as a text."""
        if row.response_ids is not None:
            return row.response_ids, row.steps
        tokens, steps = [self.encode(text) for text in _pieces(row)], row.steps
        ids = list(chain.from_iterable(tokens))
        if steps is None:
            return self.target.close(row.prompt, ids), None
        if row.pieces is not None:
            # tokens of another tokenizer: each becomes one or more of ours, which share its step
            return ids, [step for step, token in zip(steps, tokens, strict=True) for _ in token]
        if len(steps) == len(ids) + 1:  # the step map may count the end that the text omits
            ids = self.target.close(row.prompt, ids)
        if len(steps) != len(ids):
            detail = f"{len(steps)} steps for the {len(ids)} tokens of this tokenizer"
            raise Refusal("lengths differ", detail)
        return ids, steps

    def _require_new(self, content: str, origin: str, what: str = "the same as") -> None:
        if (first := self.origins.setdefault(content, origin)) != origin:
            raise Refusal("duplicate row", f"{what} {first}")


def content_id(content: object) -> str:
    """Return 16 hex digits of the SHA-256 of the canonical JSON: equal contents have equal ids in any file and run."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
