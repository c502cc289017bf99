"""Draft answers to prompts with an ordinary language model on vLLM, as rows of trajectory/v1 without steps.

A draft is treated like imported text: it is tokenized for the model that will be aligned, and on that model's grid. Its
row id comes from its prompt and number, its seed from (seed, row id), so neither depends on parts or actors.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from dtrpo_ray.config.produce import DraftsConfig
from dtrpo_ray.data.formats.base import attempt, split_batches, split_rejected
from dtrpo_ray.data.formats.files import Shard
from dtrpo_ray.data.formats.parsing import Refusal
from dtrpo_ray.data.formats.prompts import PromptRow
from dtrpo_ray.data.formats.responses import ResponseRow
from dtrpo_ray.data.formats.tokenize import content_id, tokenize_responses
from dtrpo_ray.data.prepare import Importer, ImportJob
from dtrpo_ray.data.tables import Rejected, with_columns
from dtrpo_ray.errors import DataError
from dtrpo_ray.method.trajectory import row_generator
from dtrpo_ray.produce.llm import GenerateParams, LanguageModel

ENGINE_NAME = "vllm"


class Drafter(Importer):
    """Answer the prompts of a part of a file, and import the answers."""

    def __init__(self, source: ImportJob, config: DraftsConfig, model_hash: str, seed: int) -> None:
        super().__init__(source)
        self.config, self.model_hash, self.seed = config, model_hash, seed
        self.sampling = GenerateParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
        self.model = LanguageModel(config.model, config.engine)

    def _batches(self, part: Shard) -> Iterator[tuple[list[ResponseRow], list[Rejected]]]:
        prompts, first_seen = self.form(part.file).read(part), dict[str, str]()
        for rows, refused in split_batches(prompts, self.config.batch_size):
            drafts, unfit = split_rejected(self._answer(rows, first_seen))
            yield drafts, refused + unfit

    def _answer(self, rows: list[PromptRow], first_seen: dict[str, str]) -> Iterator[ResponseRow | Rejected]:
        """Yield the drafts of a batch of prompts, and a refusal for each prompt that cannot be asked."""
        drafts: list[tuple[PromptRow, int, list[int]]] = []
        for row in rows:
            ids = attempt(row.origin, self._encode, row, first_seen)
            if isinstance(ids, Rejected):
                yield ids
            else:
                drafts += [(row, number, ids) for number in range(1, self.config.num_samples + 1)]
        seeds = [draft_seed(self.seed, draft_id(content_id(row.prompt), number)) for row, number, _ in drafts]
        replies = self.model.generate([ids for *_, ids in drafts], self.sampling, seeds)
        for (row, number, _), reply in zip(drafts, replies, strict=True):
            origin = f"{row.origin}#{number}"
            if not reply.ended:
                limit = f"no end within drafts.max_new_tokens = {self.config.max_new_tokens}"
                yield Rejected(origin, "unfinished", limit)
            elif not reply.text.strip():
                yield Rejected(origin, "empty side", "the draft has no text")
            else:
                yield ResponseRow(ENGINE_NAME, row.prompt, reply.text, row.answer, origin=origin, ignored=row.ignored)

    def _encode(self, row: PromptRow, first_seen: dict[str, str]) -> list[int]:
        first = first_seen.setdefault(content_id(row.prompt), row.origin)
        if first != row.origin:
            raise Refusal("duplicate row", f"the prompt of {first}")
        try:
            ids = self.model.encode(row.prompt)
        except DataError as error:
            raise Refusal("cannot be tokenized", str(error)) from None
        room = self.model.longest - self.config.max_new_tokens
        if not 0 < len(ids) <= room:
            detail = f"{len(ids)} tokens; with drafts.max_new_tokens for the answer, {room} fit"
            raise Refusal("prompt too long", detail)
        return ids

    def _tokenize(self, rows: list[ResponseRow]) -> tuple[pa.Table, list[Rejected]]:
        table, refused = tokenize_responses(rows, self.target)
        config, known = self.config, zip(table["prompt_id"].to_pylist(), table["origin"].to_pylist(), strict=True)
        ids = [draft_id(prompt_id, int(origin.rsplit("#", 1)[1])) for prompt_id, origin in known]
        cut = config.temperature > 0 and (config.top_p < 1 or config.top_k > 0)
        same = {
            "temperature": config.temperature,
            "sampler": config.model_dump(include={"top_p", "top_k", "max_new_tokens"}),
            "support": "truncated" if cut else "full",
            "model_hash": self.model_hash,
        }
        columns: dict[str, list[Any]] = {name: [value] * len(ids) for name, value in same.items()}
        columns |= {"row_id": ids, "seed": [draft_seed(self.seed, row_id) for row_id in ids]}
        return with_columns(table, columns), refused


def draft_id(prompt_id: str, number: int) -> str:
    """Return the row id of a prompt's draft; drafts of a prompt count from 1."""
    return f"{prompt_id}-{number:03d}"


def draft_seed(seed: int, row_id: str) -> int:
    """Derive the seed of one draft."""
    return int(row_generator(seed, row_id, 0, "draft").integers(2**63))
