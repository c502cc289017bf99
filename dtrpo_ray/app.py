"""An engine -> an ASGI app that speaks OpenAI's HTTP. Knows nothing of Ray; `server.py` puts it into replicas.

A request passes the gate (key, size), the schema (`api.py`) and the limits; then it waits for the one thread that
decodes, so that the event loop always answers.
"""

import asyncio
import hmac
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import metadata
from threading import Semaphore
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dtrpo_ray import api
from dtrpo_ray.config import ServeConfig
from dtrpo_ray.engine import Engine
from dtrpo_ray.sampler import Generation, SamplingParams
from dtrpo_ray.trajectory import row_generator

DEADLINE_SECONDS = 120.0  # of a request, its wait included; no header of a client lifts it
MAX_BODY_BYTES = 2**20
MAX_PENDING = 32  # requests decoding or waiting for it; the next is told to come back
MAX_BATCH_TOKENS = 65_536  # of a request's choices, prompts included: they decode side by side in memory
DEFAULT_CONTEXT_TOKENS = 4096  # of a model whose config.json names none
OPEN_PATHS = frozenset({"/health", "/ready", "/version"})  # any other path wants a key, where there are keys

_ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 504: "timeout_error"}

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, str]]


def create_app(engine: Engine, config: ServeConfig, keys: frozenset[str]) -> FastAPI:
    """The app of one engine. With `keys`, clients send one of them as a Bearer token."""
    service = _Service(engine, config)
    app = FastAPI(title="dtrpo", version=_version(), lifespan=service.lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(_Gate, keys=keys)
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_api_route("/v1/completions", service.complete, methods=["POST"])
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    app.add_api_route("/v1/models", service.models)
    app.add_api_route("/health", service.health)
    app.add_api_route("/ready", service.ready)
    app.add_api_route("/version", service.version)
    return app


def context_tokens(engine: Engine) -> int:
    """Most tokens of a prompt and its answer together, whole blocks."""
    config: dict[str, Any] = getattr(engine.model, "config", {})
    size = engine.model.block_size
    return int(config.get("max_position_embeddings", DEFAULT_CONTEXT_TOKENS)) // size * size


@dataclass(frozen=True, slots=True)
class _Decoded:
    """One choice, before it takes an endpoint's shape."""

    text: str
    num_tokens: int
    finish_reason: Literal["stop", "length"]
    trajectory: api.Trajectory | None


class _Service:
    """The endpoints, and the queue before the engine."""

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        self.engine, self.config = engine, config
        self.context, self.started = context_tokens(engine), int(time.time())
        # one thread each: an engine decodes one batch at a time, and tokenizers are not safe to share
        self.decoding = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self.tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self.slots = Semaphore(MAX_PENDING)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        for executor in (self.decoding, self.tokenizing):
            executor.shutdown(wait=False, cancel_futures=True)

    async def complete(self, body: api.CompletionRequest) -> api.Completion:
        decoded, usage = await self._answer(body, list(body.prompt), body.max_tokens, "prompt")
        choices = [
            api.CompletionChoice(index=i, text=d.text, finish_reason=d.finish_reason, trajectory=d.trajectory)
            for i, d in enumerate(decoded)
        ]
        stamp = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.config.model_name}
        return api.Completion(**stamp, choices=choices, usage=usage)

    async def chat(self, body: api.ChatRequest) -> api.ChatCompletion:
        messages = [message.model_dump() for message in body.messages]
        wanted = body.max_completion_tokens or body.max_tokens
        decoded, usage = await self._answer(body, [messages], wanted, "messages")
        choices = [
            api.ChatChoice(
                index=i,
                message=api.Message(role="assistant", content=d.text),
                finish_reason=d.finish_reason,
                trajectory=d.trajectory,
            )
            for i, d in enumerate(decoded)
        ]
        stamp = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.config.model_name}
        return api.ChatCompletion(**stamp, choices=choices, usage=usage)

    async def models(self) -> api.ModelList:
        card = api.ModelCard(
            id=self.config.model_name,
            created=self.started,
            max_model_len=self.context,
            block_size=self.engine.model.block_size,
        )
        return api.ModelList(data=[card])

    async def health(self) -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """A request sent now would be taken."""
        if not self.slots.acquire(blocking=False):
            return JSONResponse({"status": "busy"}, 503)
        self.slots.release()
        return JSONResponse({"status": "ready"})

    async def version(self) -> dict[str, str]:
        return {"version": _version()}

    async def _answer(
        self, body: api.CompletionRequest | api.ChatRequest, prompts: Sequence[Prompt], wanted: int | None, field: str
    ) -> tuple[list[_Decoded], api.Usage]:
        """Decode `n` choices of each prompt; `wanted` is the most tokens of a choice, None as many as there is room."""
        self._check(body)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                ids = await loop.run_in_executor(self.tokenizing, self._encode, prompts, field)
                limit = self._limit(ids, body.n, wanted, field)
                params = SamplingParams(
                    limit, body.steps or self.config.denoising_steps, body.temperature, body.threshold
                )
                seed = secrets.randbits(63) if body.seed is None else body.seed
                rows = [prompt for prompt in ids for _ in range(body.n)]
                made = await self._decode(rows, params, _row_seeds(seed, len(ids), body.n))
                decoded = await loop.run_in_executor(self.tokenizing, self._texts, made, body, limit)
        except TimeoutError:
            raise _refusal(
                504, f"no answer within {DEADLINE_SECONDS:g} s; ask for fewer tokens, steps or choices", code="deadline"
            ) from None
        num_prompt, num_done = sum(map(len, ids)), sum(d.num_tokens for d in decoded)
        usage = api.Usage(prompt_tokens=num_prompt, completion_tokens=num_done, total_tokens=num_prompt + num_done)
        return decoded, usage

    def _check(self, body: api.CompletionRequest | api.ChatRequest) -> None:
        served, size = self.config.model_name, self.engine.model.block_size
        if body.model not in (None, served):
            raise _refusal(
                404, f"model = {_short(body.model)} is not served here; ask for {served!r}", "model", "model_not_found"
            )
        if body.steps is not None and body.steps > size:
            raise _refusal(
                400, f"steps = {body.steps} exceeds the model's block of {size} tokens; ask for fewer", "steps"
            )

    def _encode(self, prompts: Sequence[Prompt], field: str) -> list[list[int]]:
        ids = []
        for prompt in prompts:
            try:
                ids.append(self.engine.encode(prompt))
            except Exception as error:  # tokenizers and chat templates raise bare exceptions at text they cannot take
                cause = (str(error).splitlines() or [type(error).__name__])[0]
                raise _refusal(400, f"{field} cannot be tokenized ({cause[:200]}); change the text", field) from None
            if self.engine.model.mask_id in ids[-1]:
                raise _refusal(400, f"{field} holds the mask token, which marks what to decode; remove it", field)
        return ids

    def _limit(self, prompts: list[list[int]], n: int, wanted: int | None, field: str) -> int:
        """The most tokens of each choice."""
        longest = max(map(len, prompts))
        most, room = self.config.max_new_tokens, self.context - longest
        if wanted is not None and wanted > most:
            raise _refusal(400, f"max_tokens = {wanted} exceeds this server's {most}; ask for fewer", "max_tokens")
        if room < (wanted or 1):
            asked = f"{longest} prompt tokens and max_tokens = {wanted or 1} exceed the context of {self.context}"
            raise _refusal(400, f"{asked}; shorten the {field} or ask for fewer", field, "context_length_exceeded")
        limit = wanted or min(most, room)
        if len(prompts) * n * (longest + limit) > MAX_BATCH_TOKENS:
            asked = f"{len(prompts)} prompts x n = {n} of up to {longest + limit} tokens each"
            raise _refusal(400, f"{asked} exceed {MAX_BATCH_TOKENS} in all; ask for fewer choices or tokens", "n")
        return limit

    async def _decode(self, rows: list[list[int]], params: SamplingParams, seeds: list[int]) -> list[Generation]:
        """Wait for the decoding thread, then for its result. A request that gives up leaves the queue."""
        if not self.slots.acquire(blocking=False):
            message = f"{MAX_PENDING} requests are waiting already; try again"
            raise _refusal(429, message, code="queue_full", headers={"Retry-After": "1"})
        future = self.decoding.submit(self.engine.generate, rows, params, seeds)
        future.add_done_callback(lambda _: self.slots.release())
        return await asyncio.wrap_future(future)

    def _texts(
        self, made: list[Generation], body: api.CompletionRequest | api.ChatRequest, limit: int
    ) -> list[_Decoded]:
        decoded = []
        for generation in made:
            ids = generation.text_ids
            text = self.engine.decode(ids)
            cut = min((at for at in map(text.find, body.stop) if at >= 0), default=None)
            ended = cut is not None or len(ids) < limit  # shorter than its limit: an end of sequence came
            trajectory = self._trajectory(generation) if body.return_trajectory else None
            decoded.append(_Decoded(text[:cut], len(ids), "stop" if ended else "length", trajectory))
        return decoded

    def _trajectory(self, generation: Generation) -> api.Trajectory:
        ids = generation.text_ids
        return api.Trajectory(
            token_ids=ids,
            tokens=[self.engine.decode([token]) for token in ids],
            steps=generation.steps[: len(ids)],
            num_forwards=generation.num_forwards,
        )


class _Gate:
    """Before the app: no body without a key, none above its limit; and no failure without an answer."""

    def __init__(self, app: ASGIApp, keys: frozenset[str]) -> None:
        self.app, self.keys = app, [key.encode() for key in sorted(keys)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self.keys and path not in OPEN_PATHS and not self._has_key(scope):
            message = "the API key is missing or wrong; send the header `Authorization: Bearer KEY`"
            headers = {"WWW-Authenticate": "Bearer"}
            return await _error(401, message, code="invalid_api_key", headers=headers)(scope, receive, send)
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, _bounded(receive), watched)
        except Exception:
            if begun:
                raise
            logger.exception("%s %s failed", scope["method"], path)
            await _error(500, "internal error; the server's log names the cause")(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, given = header.partition(b" ")
        # every key is compared, in constant time each: the time taken tells nothing of them
        matches = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        return scheme.lower() == b"bearer" and any(matches)


def _bounded(receive: Receive) -> Receive:
    """The same messages, until the body grows too large."""
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > MAX_BODY_BYTES:
            raise _refusal(413, f"the body exceeds {MAX_BODY_BYTES} bytes; split the request", code="body_too_large")
        return message

    return counted


def _row_seeds(seed: int, num_prompts: int, n: int) -> list[int]:
    """A seed for each choice of each prompt; a choice keeps its seed whatever `n` is."""
    places = [f"{prompt}|{choice}" for prompt in range(num_prompts) for choice in range(n)]
    return [int(row_generator(seed, place, 0, "serve").integers(2**63)) for place in places]


def _error(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    kind = _ERROR_TYPES.get(status, "invalid_request_error")
    body = api.ErrorBody(error=api.ErrorDetail(message=message, type=kind, param=param, code=code))
    return JSONResponse(body.model_dump(), status, headers)


def _refusal(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> HTTPException:
    return HTTPException(status, {"message": message, "param": param, "code": code}, headers)


async def _on_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    detail: Any = error.detail if isinstance(error.detail, dict) else {"message": str(error.detail)}
    return _error(error.status_code, **detail, headers=dict(error.headers or {}))


async def _on_invalid_request(_: Request, error: Exception) -> JSONResponse:
    """The first problem, as OpenAI words it: 400, never 422, with the field as `param`."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        return _error(400, "the body is not valid JSON")
    param = next((str(part) for part in problem["loc"][1:]), None)
    where = ".".join(str(part) for part in problem["loc"][1:]) or "the body"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return _error(400, message, param)
    given = "" if problem["type"] == "missing" else f" = {_short(problem['input'])}"
    code = api.UNSUPPORTED if problem["type"] == api.UNSUPPORTED else None
    return _error(400, f"{where}{given}: {message}", param, code)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _version() -> str:
    try:
        return metadata.version("dtrpo-ray")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "source"
