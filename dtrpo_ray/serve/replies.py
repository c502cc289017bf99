"""A request under way -> what its client reads: OpenAI's shapes, whole or in chunks.

All of it runs on the tokenizing thread: tokenizers are not safe to share.
"""

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from dtrpo_ray.decode.batcher import Batcher, Ticket
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import Committed, Event, Unmasked
from dtrpo_ray.serve import api
from dtrpo_ray.serve.answers import Choice, Piece, chat_logprobs, completion_logprobs


@dataclass(frozen=True, slots=True)
class Hosted:
    """A served model and its decoding thread."""

    engine: Engine
    batcher: Batcher


@dataclass(slots=True)
class Work:
    """A request on its way: its choices, and the queue its events come by."""

    name: str
    body: api.CompletionRequest | api.ChatRequest
    hosted: Hosted
    choices: list[Choice]
    prompt_tokens: int
    events: asyncio.Queue[list[tuple[int, Event]] | Exception]
    begun: float
    id: str
    ticket: Ticket | None = None

    @property
    def done(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    def usage(self) -> api.Usage:
        done = sum(len(choice.ids) for choice in self.choices)
        return api.Usage(
            prompt_tokens=self.prompt_tokens, completion_tokens=done, total_tokens=self.prompt_tokens + done
        )


Chunk = Callable[[Work, int, Piece], BaseModel]


def read(work: Work, events: list[tuple[int, Event]], chunk: Chunk | None) -> list[bytes]:
    """Take events of the choices; with `chunk`, as what a stream sends of them.

    A choice that ended at a stop text hears no more.
    """
    happened: list[bytes] = []
    for index, event in events:
        choice = work.choices[index]
        if choice.finish_reason:
            continue
        if isinstance(event, Committed):
            piece = choice.add(event)
            if piece and chunk:
                happened.append(sse(chunk(work, index, piece)))
        elif isinstance(event, Unmasked) and chunk:
            happened.append(sse(denoising(work, index, event)))
    return happened


def _stamp(work: Work) -> dict[str, Any]:
    return {"id": work.id, "created": int(time.time()), "model": work.name}


def _trajectory(work: Work, index: int) -> api.Trajectory | None:
    return work.choices[index].trajectory(f"{work.id}-{index}") if work.body.return_trajectory else None


def completion(work: Work) -> api.Completion:
    """The whole answer of /v1/completions."""
    choices = [
        _completion_choice(work, i, Piece(choice.text, choice.tokens, choice.finish_reason))
        for i, choice in enumerate(work.choices)
    ]
    return api.Completion(**_stamp(work), choices=choices, usage=work.usage())


def _completion_choice(work: Work, index: int, piece: Piece) -> api.CompletionChoice:
    wants = work.body.num_alternatives
    return api.CompletionChoice(
        index=index,
        text=piece.text,
        logprobs=completion_logprobs(work.hosted.engine, piece.tokens, wants),
        finish_reason=piece.finish_reason,
        trajectory=_trajectory(work, index) if piece.finish_reason else None,
    )


def completion_chunk(work: Work, index: int, piece: Piece) -> api.Completion:
    """A piece of a choice, as a chunk."""
    return api.Completion(**_stamp(work), choices=[_completion_choice(work, index, piece)])


def chat(work: Work) -> api.ChatCompletion:
    """The whole answer of /v1/chat/completions."""
    choices = [
        api.ChatChoice(
            index=i,
            message=api.Message(role="assistant", content=choice.text),
            logprobs=chat_logprobs(work.hosted.engine, choice.tokens, work.body.num_alternatives),
            finish_reason=choice.finish_reason or "length",
            trajectory=_trajectory(work, i),
        )
        for i, choice in enumerate(work.choices)
    ]
    return api.ChatCompletion(**_stamp(work), choices=choices, usage=work.usage())


def chat_chunk(work: Work, index: int, piece: Piece) -> api.ChatChunk:
    """A piece of a message, as a chunk; the first names the role."""
    first, work.choices[index].opened = not work.choices[index].opened, True
    choice = api.ChatChunkChoice(
        index=index,
        delta=api.Delta(role="assistant" if first else None, content=piece.text),
        logprobs=chat_logprobs(work.hosted.engine, piece.tokens, work.body.num_alternatives),
        finish_reason=piece.finish_reason,
        trajectory=_trajectory(work, index) if piece.finish_reason else None,
    )
    return api.ChatChunk(**_stamp(work), choices=[choice])


def denoising(work: Work, index: int, step: Unmasked) -> BaseModel:
    """A denoising step, as a chunk without choices."""
    engine, choice = work.hosted.engine, work.choices[index]
    size = choice.params.block_length or engine.model.block_size
    given = len(choice.prompt) % size if engine.model.block_origin == "global" else 0  # in the choice's first block
    seen = api.Denoising(
        index=index,
        step=step.step,
        places=step.places,
        token_ids=step.ids,
        tokens=[engine.decode([token]) for token in step.ids],
        probabilities=[math.exp(logp) for logp in step.logps],
        block_start=(step.places[0] + given) // size * size - given,
        block_size=size,
    )
    return empty_chunk(work).model_copy(update={"denoising": seen})


def empty_chunk(work: Work) -> api.Completion | api.ChatChunk:
    """A chunk without choices, as OpenAI sends usage in."""
    kind = api.Completion if isinstance(work.body, api.CompletionRequest) else api.ChatChunk
    return kind(**_stamp(work), choices=[])


def sse(value: BaseModel) -> bytes:
    """A server-sent event; fields that most chunks lack are left out."""
    fields = value.model_dump()
    for name in ("usage", "denoising"):
        if fields.get(name, 0) is None:
            del fields[name]
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"
