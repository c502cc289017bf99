"""Finished blocks of one choice -> the pieces of text a client gets: cut at stop texts, with log-probabilities.

A piece never takes back what an earlier one said: text that may yet become a stop text, or half a character, waits.
"""

from dataclasses import dataclass, field
from typing import Any

from dtrpo_ray.data.rows import how_decoded
from dtrpo_ray.data.schemas import CONTRACT_VERSION
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import DECODER_NAME, Alternatives, Committed, SamplingParams
from dtrpo_ray.serve import api

HALF_CHARACTER = "\ufffd"


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the text: where its text begins, its log mu when unmasked, and the alternatives."""

    id: int
    text: str
    offset: int
    logp: float
    top: Alternatives


@dataclass(frozen=True, slots=True)
class Piece:
    """What a block adds to a choice; `finish_reason` is set in the last piece."""

    text: str
    tokens: list[Token]
    finish_reason: api.FinishReason | None


@dataclass(slots=True)
class Choice:
    """One choice as it grows: `ids` are its tokens of text, `whole` every committed block."""

    engine: Engine
    prompt: list[int]
    params: SamplingParams
    seed: int
    stop: list[str]
    alternatives: int | None
    ids: list[int] = field(default_factory=list)
    whole: list[Committed] = field(default_factory=list)
    text: str = ""
    sent: int = 0
    tokens: list[Token] = field(default_factory=list)
    told: int = 0  # of `tokens`, in pieces so far
    opened: bool = False  # a stream has named its role
    finish_reason: api.FinishReason | None = None

    def add(self, block: Committed) -> Piece | None:
        """Take the next block; None if there is nothing to say yet."""
        self.whole.append(block)
        before, params = len(self.ids), self.params
        stops = {*params.stop_token_ids} | (frozenset() if params.ignore_eos else self.engine.model.stop_ids)
        room = params.max_new_tokens - before
        cut = next((i for i, token in enumerate(block.ids[:room]) if token in stops), None)
        self.ids += block.ids[: room if cut is None else cut]
        self.text = self.engine.decode(self.ids)
        found = min((at for at in map(self.text.find, self.stop) if at >= 0), default=None)
        if found is not None:
            self.text = self.text[:found]
        if found is not None or cut is not None:
            self.finish_reason = "stop"
        elif len(self.ids) >= params.max_new_tokens:
            self.finish_reason = "length"
        end = len(self.text) if self.finish_reason else self._safe_end()
        self.tokens += self._tokens(before, block)
        if found is not None:
            self.tokens = [token for token in self.tokens if token.offset < found]
        ready = (i for i, token in enumerate(self.tokens) if token.offset >= end)
        told = len(self.tokens) if self.finish_reason else next(ready, len(self.tokens))
        piece = Piece(self.text[self.sent : end], self.tokens[self.told : told], self.finish_reason)
        self.sent, self.told = max(end, self.sent), told
        return piece if piece.text or piece.tokens or piece.finish_reason else None

    def _safe_end(self) -> int:
        """Where text ends that no later block can change."""
        end = len(self.text.rstrip(HALF_CHARACTER))
        longest = max(map(len, self.stop), default=0)
        for at in range(max(self.sent, end - longest + 1), end):
            if any(stop.startswith(self.text[at:end]) for stop in self.stop):
                return at
        return max(end, self.sent)

    def _tokens(self, before: int, block: Committed) -> list[Token]:
        if self.alternatives is None:
            return []
        made = []
        done = sum(len(b.ids) for b in self.whole) - len(block.ids)
        for i in range(before, len(self.ids)):
            offset = len(self.engine.decode(self.ids[:i]))
            logp, top = block.logps[i - done], block.top.get(i, [])
            made.append(Token(self.ids[i], self.engine.decode([self.ids[i]]), offset, logp, top))
        return made

    def trajectory(self, row_id: str) -> api.Trajectory:
        """The choice as a row of the trajectory table."""
        steps = [step for b in self.whole for step in b.steps]
        return api.Trajectory(
            contract_version=CONTRACT_VERSION,
            row_id=row_id,
            prompt_id=row_id,
            prompt=self.engine.decode(self.prompt),
            response=self.text,
            prompt_ids=self.prompt,
            response_ids=[token for b in self.whole for token in b.ids],
            steps=steps,
            logps=[logp for b in self.whole for logp in b.logps],
            num_forwards=1 + max(steps, default=-1),
            **how_decoded(self.engine.model, self.params, len(self.prompt), steps),
            seed=self.seed,
            engine=DECODER_NAME,
            tokens=[self.engine.decode([token]) for token in self.ids],
        )


def completion_logprobs(engine: Engine, tokens: list[Token], alternatives: int | None) -> api.CompletionLogprobs | None:
    """Tokens in the shape of /v1/completions."""
    if alternatives is None:
        return None
    top = [{engine.decode([i]): logp for i, logp in token.top} for token in tokens] if alternatives else None
    return api.CompletionLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.logp for token in tokens],
        top_logprobs=top,
        text_offset=[token.offset for token in tokens],
    )


def chat_logprobs(engine: Engine, tokens: list[Token], alternatives: int | None) -> api.ChatLogprobs | None:
    """Tokens in the shape of /v1/chat/completions."""

    def entry(text: str, logp: float) -> dict[str, Any]:
        return {"token": text, "logprob": logp, "bytes": list(text.encode())}

    if alternatives is None:
        return None
    content = [
        api.TokenLogprob(
            **entry(token.text, token.logp),
            top_logprobs=[api.Alternative(**entry(engine.decode([i]), logp)) for i, logp in token.top],
        )
        for token in tokens
    ]
    return api.ChatLogprobs(content=content)
