"""Decoder events of a request -> OpenAI's response bodies, whole or as the chunks of a stream.

Text goes out only once it can no longer change: half a character waits, and so does a possible beginning of a stop
text. All of this runs on the tokenizing thread, since tokenizers are not safe to share.
"""

import asyncio
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from dtrpo_ray.data.rows import how_decoded
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import Alternatives, Committed, DecoderEvent, Generation, SamplingParams, Unmasked
from dtrpo_ray.serve import api
from dtrpo_ray.serve.batcher import Delivery, Ticket

HALF_CHARACTER = "\ufffd"
PIECE = 16  # tokens that are decoded together, after as many before them
MOST_HELD = 64  # tokens that may wait for the rest of a character


class Detokenizer:
    """The text of ids that come a few at a time: each is decoded a fixed number of times, however long the text grows.

    The text of a piece is what it adds to the piece before it, as some tokenizers drop a space where a text begins.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.fixed = ""  # text that later ids cannot change
        self.before: list[int] = []  # the last ids of that text
        self.held: list[int] = []  # the ids after it: none, or they end inside a character
        self.text = ""

    def add(self, ids: Sequence[int], offsets: bool = False) -> list[int]:
        """Take the next ids. With `offsets`, return for each how long the text of all ids before it is."""
        found: list[int] = []
        for at in range(0, len(ids), PIECE):
            known, start = self.engine.decode(self.before), len(self.held)
            self.held += ids[at : at + PIECE]
            if offsets:
                starts = (self.before + self.held[:place] for place in range(start, len(self.held)))
                found += [len(self.fixed) + len(self.engine.decode(part)) - len(known) for part in starts]
            new = self.engine.decode(self.before + self.held)[len(known) :]
            self.text = self.fixed + new
            if not new.endswith(HALF_CHARACTER) or len(self.held) >= MOST_HELD:
                self.fixed = self.text
                self.before, self.held = self.held if new else self.before, []
        return found


class Token(api.TokenLogprob):
    """One token of the text, with its log mu when it was unmasked, and where its text begins."""

    offset: int


@dataclass(frozen=True, slots=True)
class NewText:
    """The text that a block adds to a choice; `finish_reason` is set in the last one."""

    text: str
    tokens: list[Token]
    finish_reason: api.FinishReason | None


@dataclass(slots=True)
class Choice:
    """One choice as it grows: `ids` are the tokens of its text, `blocks` every committed block."""

    engine: Engine
    prompt: list[int]
    params: SamplingParams
    seed: int
    stop: list[str]
    alternatives: int | None
    ids: list[int] = field(default_factory=list)
    blocks: list[Committed] = field(default_factory=list)
    detokenizer: Detokenizer = field(init=False)
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    chars_sent: int = 0
    tokens_sent: int = 0
    role_sent: bool = False
    finish_reason: api.FinishReason | None = None

    def __post_init__(self) -> None:
        self.detokenizer = Detokenizer(self.engine)

    def add(self, block: Committed) -> NewText | None:
        """Take the next block; return the text that is ready to be sent, if there is any."""
        self.blocks.append(block)
        before, params = len(self.ids), self.params
        stops = params.stops(self.engine.model.stop_ids)
        room = params.max_new_tokens - before
        cut = next((i for i, token in enumerate(block.ids[:room]) if token in stops), None)
        new = block.ids[: room if cut is None else cut]
        self.ids += new
        offsets = self.detokenizer.add(new, offsets=self.alternatives is not None)
        self.tokens += [self._token(block, place, before, offset) for place, offset in enumerate(offsets)]
        text = self.detokenizer.text
        # no stop text begins in what has been sent
        found = min((at for stop in self.stop if (at := text.find(stop, self.chars_sent)) >= 0), default=None)
        self.text = text[:found]
        if found is not None or cut is not None:
            self.finish_reason = "stop"
        elif len(self.ids) >= params.max_new_tokens:
            self.finish_reason = "length"
        if found is not None:
            self.tokens = [token for token in self.tokens if token.offset < found]
        return self._send()

    def _send(self) -> NewText | None:
        end, count = len(self.text), len(self.tokens)
        if not self.finish_reason:
            end = self._safe_end()
            sent = self.tokens_sent
            count = next((i for i, token in enumerate(self.tokens[sent:], sent) if token.offset >= end), count)
        new = NewText(self.text[self.chars_sent : end], self.tokens[self.tokens_sent : count], self.finish_reason)
        self.chars_sent, self.tokens_sent = max(end, self.chars_sent), count
        return new if new.text or new.tokens or new.finish_reason else None

    def _safe_end(self) -> int:
        """Return the length of the text that no later block can change."""
        end = len(self.text.rstrip(HALF_CHARACTER))
        longest = max(map(len, self.stop), default=0)
        for at in range(max(self.chars_sent, end - longest + 1), end):
            if any(stop.startswith(self.text[at:end]) for stop in self.stop):
                return at
        return max(end, self.chars_sent)

    def _token(self, block: Committed, place: int, before: int, offset: int) -> Token:
        """Return a token of a block with `before` tokens before it."""
        top, text = alternatives(self.engine, block.top.get(before + place, [])), self.engine.decode([block.ids[place]])
        return Token.of(text, block.logps[place], top_logprobs=top, offset=offset)

    def trajectory(self, row_id: str) -> api.Trajectory:
        """Return the choice as a row of the trajectory table."""
        ids, steps = [i for b in self.blocks for i in b.ids], [step for b in self.blocks for step in b.steps]
        logps = [logp for b in self.blocks for logp in b.logps]
        made = Generation(ids, steps, logps, num_forwards=1 + max(steps, default=-1), text_ids=self.ids)
        prompt, tokens = self.engine.decode(self.prompt), [self.engine.decode([token]) for token in self.ids]
        row = how_decoded(self.engine.model, self.params, self.prompt, made, self.seed)
        return api.Trajectory(**row, row_id=row_id, prompt_id=row_id, prompt=prompt, response=self.text, tokens=tokens)


def alternatives(engine: Engine, best: Alternatives) -> list[api.Alternative]:
    """Return the alternatives of a token, each under a name of its own.

    That is its text; where two have the same one, as halves of characters do, the less probable is `token_id:ID`.
    """
    found: dict[str, api.Alternative] = {}
    for token, logp in best:
        text = engine.token_text(token)
        name = f"token_id:{token}" if text in found else text
        found[name] = api.Alternative(token=name, logprob=logp, bytes=[*text.encode()])
    return list(found.values())


@dataclass(slots=True, eq=False, kw_only=True)
class ActiveRequest(Ticket):
    """A request under way: its choices, and the queue that its events arrive in."""

    id: str
    model_name: str
    body: api.TextRequest
    choices: list[Choice]
    prompt_tokens: int
    begun: float
    events: asyncio.Queue[Delivery]

    @property
    def done(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    def usage(self) -> api.Usage:
        count = sum(len(choice.ids) for choice in self.choices)
        total = self.prompt_tokens + count
        return api.Usage(prompt_tokens=self.prompt_tokens, completion_tokens=count, total_tokens=total)


def stream_events(request: ActiveRequest, events: list[tuple[int, DecoderEvent]]) -> list[bytes]:
    """Add events to their choices; return what a stream sends of them."""
    sent: list[bytes] = []
    for index, event in events:
        choice = request.choices[index]
        if choice.finish_reason:  # it ended at a stop text, which the decoder does not know
            continue
        if isinstance(event, Committed):
            new = choice.add(event)
            if new and request.body.stream:
                sent.append(sse(answer(request, [_choice(request, index, new)])))
        elif isinstance(event, Unmasked) and request.body.stream:
            sent.append(sse(answer(request, [], denoising=_denoising(choice, index, event))))
    return sent


def whole_response(request: ActiveRequest) -> dict[str, object]:
    """Return the answer to a request whose choices have all finished."""
    whole = [NewText(choice.text, choice.tokens, choice.finish_reason) for choice in request.choices]
    choices = [_choice(request, *text) for text in enumerate(whole)]
    return answer(request, choices, usage=request.usage())


def answer(request: ActiveRequest, choices: list[BaseModel], **more: BaseModel) -> dict[str, object]:
    """Return the body of a response, or of a stream's chunk; of `usage` and `denoising` only what is in `more`."""
    kind: type[BaseModel] = api.ChatCompletion
    if isinstance(request.body, api.CompletionRequest):
        kind = api.Completion
    elif request.body.stream:
        kind = api.ChatChunk
    head = {"id": request.id, "created": int(time.time()), "model": request.model_name}
    body = kind(**head, choices=choices, **more).model_dump()
    return {k: v for k, v in body.items() if v is not None or k not in ("usage", "denoising")}


def _choice(request: ActiveRequest, index: int, new: NewText) -> BaseModel:
    choice = request.choices[index]
    kind: type[BaseModel] = api.ChatChoice
    text: dict[str, object] = {"message": {"role": "assistant", "content": new.text}}
    if isinstance(request.body, api.CompletionRequest):
        kind, text = api.CompletionChoice, {"text": new.text}
    elif request.body.stream:
        role = None if choice.role_sent else "assistant"
        kind, text = api.ChatChunkChoice, {"delta": {"role": role, "content": new.text}}
        choice.role_sent = True
    ended = new.finish_reason and request.body.return_trajectory
    return kind(
        **text,
        index=index,
        logprobs=_logprobs(choice, new.tokens, kind),
        finish_reason=new.finish_reason,
        trajectory=choice.trajectory(f"{request.id}-{index}") if ended else None,
    )


def _logprobs(choice: Choice, tokens: list[Token], kind: type[BaseModel]) -> BaseModel | None:
    if choice.alternatives is None:
        return None
    if kind is not api.CompletionChoice:
        return api.ChatLogprobs(content=[*tokens])
    top = [{each.token: each.logprob for each in token.top_logprobs} for token in tokens]
    return api.CompletionLogprobs(
        tokens=[token.token for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=top if choice.alternatives else None,
        text_offset=[token.offset for token in tokens],
    )


def _denoising(choice: Choice, index: int, event: Unmasked) -> api.Denoising:
    engine = choice.engine
    size = choice.params.block_length or engine.model.block_size
    # tokens of the prompt in the choice's first block
    head = len(choice.prompt) % size if engine.model.block_origin == "global" else 0
    return api.Denoising(
        index=index,
        step=event.step,
        places=event.places,
        token_ids=event.ids,
        tokens=[engine.decode([token]) for token in event.ids],
        probabilities=[math.exp(logp) for logp in event.logps],
        block_start=(event.places[0] + head) // size * size - head,
        block_size=size,
    )


def sse(body: object) -> bytes:
    """Return a server-sent event with a JSON body. Raises ValueError for a number that JSON does not have."""
    return b"data: " + json.dumps(body, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"
