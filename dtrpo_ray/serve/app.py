"""Engines -> an ASGI app that speaks OpenAI's HTTP. Knows nothing of Ray; `server.py` puts it into replicas.

A request passes the gate (`gate.py`), the schema (`api.py`) and the limits; then its choices join the decoding thread
of their model (`batcher.py`), and blocks come back as they finish. Nothing here blocks the event loop.
"""

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib import metadata, resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from dtrpo_ray.config.serve import ServeConfig
from dtrpo_ray.decode.engine import Engine, block_size_error
from dtrpo_ray.decode.types import Event, SamplingParams, to_params
from dtrpo_ray.method.trajectory import row_generator
from dtrpo_ray.serve import api
from dtrpo_ray.serve.answers import Choice
from dtrpo_ray.serve.middleware import OPEN_PATHS, Gate, error_body, on_http_error, on_invalid_request, refusal, short
from dtrpo_ray.serve.monitor import Monitor
from dtrpo_ray.serve.replies import (
    Chunk,
    Hosted,
    Work,
    chat,
    chat_chunk,
    completion,
    completion_chunk,
    empty_chunk,
    read,
    sse,
)  # fmt: skip
from dtrpo_ray.serve.streams import EventStream, unless_disconnected

logger = logging.getLogger(__name__)

DEADLINE_SECONDS = 120.0  # of a request, its wait included; no header of a client lifts it
MAX_PENDING = 128  # requests decoding or waiting for it; the next is told to come back
MAX_BATCH_TOKENS = 65_536  # of a request's choices, prompts included

REFUSALS: dict[int | str, dict[str, Any]] = {
    code: {"model": api.ErrorBody, "description": text}
    for code, text in {
        400: "The request cannot be honoured; `param` names the field.",
        401: "No valid API key.",
        404: "No such model.",
        413: "The body is too large.",
        429: "The queue is full; come back after `Retry-After` seconds.",
        500: "A failure of the server.",
        504: "No answer before the server's deadline.",
    }.items()
}
STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


def create_app(
    engine: Engine, config: ServeConfig, keys: frozenset[str], others: Mapping[str, Engine] | None = None
) -> FastAPI:
    """The app of one engine, and of `others` by name. With `keys`, clients send one of them as a Bearer token."""
    service = Service({config.model_name: engine, **(others or {})}, config)
    app = FastAPI(title="dtrpo", version=_version(), lifespan=service.lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Gate, keys=keys)
    app.add_exception_handler(StarletteHTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid_request)
    post = partial(app.add_api_route, methods=["POST"])
    refusals: dict[int | str, dict[str, Any]] = {**REFUSALS, 200: {"content": STREAM}}
    post("/v1/completions", service.complete, response_model=api.Completion, responses=refusals)
    post("/v1/chat/completions", service.chat, response_model=api.ChatCompletion, responses=refusals)
    post("/tokenize", service.tokenize, responses=_refused(400, 401, 404, 413, 500))
    small = _refused(401, 500)
    app.add_api_route("/v1/models", service.models, responses=small)
    app.add_api_route("/metrics", service.metrics, responses={**small, 200: {"content": {"text/plain": {}}}})
    app.add_api_route("/health", service.health)
    app.add_api_route("/ready", service.ready, responses={503: {"description": "The queue is full."}})
    app.add_api_route("/version", service.version)
    app.add_api_route("/", service.page, include_in_schema=False)
    _describe(app, bool(keys))
    return app


def _refused(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: REFUSALS[code] for code in codes}


def _describe(app: FastAPI, keys: bool) -> None:
    """Make the specification say what FastAPI cannot know: keys, and 400 where it would answer 422."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        spec = original()
        for path, operations in spec["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if keys and path not in OPEN_PATHS:
                    operation["security"] = [{"key": []}]
        if keys:
            spec["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return spec

    app.openapi = openapi  # type: ignore[method-assign]


class Service:
    """The endpoints, and the queue before the engines."""

    def __init__(self, engines: Mapping[str, Engine], config: ServeConfig) -> None:
        self.config, self.started = config, int(time.time())
        self.hosted = {name: self._host(engine) for name, engine in engines.items()}
        self.batchers = {name: hosted.batcher for name, hosted in self.hosted.items()}
        self.monitor = Monitor(self.batchers)
        # tokenizers are not safe to share between threads, and must not hold up the event loop
        self.tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self.pending = 0

    def _host(self, engine: Engine) -> Hosted:
        return Hosted(engine, engine.batcher(self.config.max_batch, self.config.cache_tokens))

    def swap(self, name: str, engine: Engine) -> None:
        """Serve new requests for a name with another engine; those under way end with the one they began with."""
        old = self.hosted.get(name)
        self.hosted[name] = self._host(engine)
        self.batchers[name] = self.hosted[name].batcher
        if old:
            old.batcher.close()

    def close(self) -> None:
        """Let what decodes finish, and end the threads."""
        for hosted in self.hosted.values():
            hosted.batcher.close()
        self.tokenizing.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        self.close()

    # --- endpoints ---

    async def complete(self, body: api.CompletionRequest, request: Request) -> Any:
        """Complete prompts; `stream` sends each block as it is finished."""
        work = await self._begin(body, list(body.prompt), body.max_tokens, "prompt", "cmpl")
        return await self._respond(work, request, completion, completion_chunk)

    async def chat(self, body: api.ChatRequest, request: Request) -> Any:
        """Answer a conversation; `stream` sends each block as it is finished."""
        messages = [message.model_dump() for message in body.messages]
        wanted = body.max_completion_tokens or body.max_tokens
        work = await self._begin(body, [messages], wanted, "messages", "chatcmpl")
        return await self._respond(work, request, chat, chat_chunk)

    async def tokenize(self, body: api.TokenizeRequest) -> api.Tokenized:
        """Ids of a text, or of messages through the chat template."""
        engine = self._find(body.model).engine
        messages = [message.model_dump() for message in body.messages or ()]
        prompt: Any = messages if body.prompt is None else body.prompt
        field = "messages" if body.prompt is None else "prompt"
        ids = await self._tokenizing(self._encode, engine, prompt, field)
        return api.Tokenized(tokens=ids, count=len(ids), max_model_len=engine.context_tokens)

    async def models(self) -> api.ModelList:
        """What is served here."""
        cards = [
            api.ModelCard(
                id=name,
                created=self.started,
                max_model_len=hosted.engine.context_tokens,
                block_size=hosted.engine.model.block_size,
                attention=hosted.engine.model.attention,
            )
            for name, hosted in self.hosted.items()
        ]
        return api.ModelList(data=cards)

    async def metrics(self) -> Response:
        """Counters of this process, for Prometheus."""
        return Response(self.monitor.text(), media_type="text/plain; version=1.0.0; charset=utf-8")

    async def health(self) -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """A request sent now would be taken."""
        busy = self.pending >= MAX_PENDING
        return JSONResponse({"status": "busy" if busy else "ready"}, 503 if busy else 200)

    async def version(self) -> dict[str, str]:
        """The version of this package."""
        return {"version": _version()}

    async def page(self) -> HTMLResponse:
        """The playground: one page, nothing from elsewhere."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        text = resources.files("dtrpo_ray.serve").joinpath("playground.html").read_text()
        return HTMLResponse(text, headers={"Content-Security-Policy": f"{policy}; base-uri 'none'; form-action 'none'"})

    # --- before decoding ---

    async def _begin(
        self,
        body: api.CompletionRequest | api.ChatRequest,
        prompts: Sequence[Any],
        wanted: int | None,
        field: str,
        prefix: str,
    ) -> Work:
        """Check a request, tokenize it and send its choices to the decoding thread."""
        begun = time.monotonic()
        hosted = self._find(body.model)
        model, name = hosted.engine.model, body.model or self.config.model_name
        self._check(body, hosted)
        ids = [await self._tokenizing(self._encode, hosted.engine, prompt, field) for prompt in prompts]
        params = self._params(body, self._limit(hosted.engine, ids, body.n, wanted, field))
        if model.shift and not all(ids):
            raise refusal(400, f"{field} has no token, and this model needs one to predict the next from", field)
        if self.pending >= MAX_PENDING:
            message = f"{MAX_PENDING} requests are waiting already; try again"
            raise refusal(429, message, code="queue_full", headers={"Retry-After": "1"})
        seed = secrets.randbits(63) if body.seed is None else body.seed
        rows = [prompt for prompt in ids for _ in range(body.n)]
        seeds = _row_seeds(seed, len(ids), body.n)
        wants = body.num_alternatives
        choices = [
            Choice(hosted.engine, prompt, params, each, body.stop, wants)
            for prompt, each in zip(rows, seeds, strict=True)
        ]
        work = Work(
            name, body, hosted, choices, sum(map(len, ids)), asyncio.Queue(), begun, f"{prefix}-{uuid.uuid4().hex}"
        )
        loop = asyncio.get_running_loop()
        watch = body.stream and body.stream_options.include_denoising
        self.pending += 1

        def emit(what: list[tuple[int, Event]] | Exception) -> None:
            loop.call_soon_threadsafe(work.events.put_nowait, what)

        work.ticket = hosted.batcher.submit(rows, params, seeds, emit, watch)
        return work

    def _find(self, name: str | None) -> Hosted:
        hosted = self.hosted.get(name or self.config.model_name)
        if hosted is None:
            served = ", ".join(map(repr, self.hosted))
            raise refusal(
                404, f"model = {short(name)} is not served here; ask for {served}", "model", "model_not_found"
            )
        return hosted

    def _check(self, body: api.CompletionRequest | api.ChatRequest, hosted: Hosted) -> None:
        model = hosted.engine.model
        if problem := block_size_error(model, body, body.steps):
            field, message = problem
            raise refusal(400, message, field)
        if (size := body.block_length or model.block_size) > hosted.engine.context_tokens:
            raise refusal(400, f"block_length = {size} exceeds the context; ask for fewer", "block_length")

    def _params(self, body: api.CompletionRequest | api.ChatRequest, limit: int) -> SamplingParams:
        return to_params(
            body,
            max_new_tokens=limit,
            denoising_steps=body.steps or self.config.denoising_steps,
            stop_token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            top_logprobs=body.num_alternatives or 0,
        )

    def _encode(self, engine: Engine, prompt: str | list[int] | list[dict[str, str]], field: str) -> list[int]:
        if isinstance(prompt, list) and all(isinstance(part, int) for part in prompt):
            ids = [int(part) for part in prompt]  # type: ignore[arg-type]
            if max(ids) >= engine.num_tokens and max(ids) != engine.model.mask_id:
                raise refusal(400, f"{field} holds the id {max(ids)}; the model has {engine.num_tokens} tokens", field)
        else:
            try:
                ids = engine.encode(prompt)  # type: ignore[arg-type]
            except Exception as error:  # tokenizers and chat templates raise bare exceptions at text they cannot take
                cause = (str(error).splitlines() or [type(error).__name__])[0]
                raise refusal(400, f"{field} cannot be tokenized ({cause[:200]}); change the text", field) from None
        if engine.model.mask_id in ids:
            raise refusal(400, f"{field} holds the mask token, which marks what to decode; remove it", field)
        return ids

    def _limit(self, engine: Engine, prompts: list[list[int]], n: int, wanted: int | None, field: str) -> int:
        """The most tokens of each choice; `wanted` None is as many as there is room for."""
        longest = max(map(len, prompts))
        most, room = self.config.max_new_tokens, engine.context_tokens - longest
        if wanted is not None and wanted > most:
            raise refusal(400, f"max_tokens = {wanted} exceeds this server's {most}; ask for fewer", "max_tokens")
        if room < (wanted or 1):
            asked = f"{longest} prompt tokens and max_tokens = {wanted or 1} exceed the context"
            message = f"{asked} of {engine.context_tokens}; shorten the {field} or ask for fewer"
            raise refusal(400, message, field, "context_length_exceeded")
        limit = wanted or min(most, room)
        if len(prompts) * n * (longest + limit) > MAX_BATCH_TOKENS:
            asked = f"{len(prompts)} prompts x n = {n} of up to {longest + limit} tokens each"
            raise refusal(400, f"{asked} exceed {MAX_BATCH_TOKENS} in all; ask for fewer choices or tokens", "n")
        return limit

    async def _tokenizing(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, function, *args)

    # --- while it decodes ---

    async def _respond(
        self, work: Work, request: Request, whole: Callable[[Work], BaseModel], chunk: Chunk
    ) -> Response:
        if work.body.stream:
            return EventStream(self._stream(work, chunk), partial(self._end, work))
        try:
            answered = await unless_disconnected(request, self._drain(work))
            if answered is None:
                return Response(status_code=499)  # nobody is there to read it
            answer = await self._tokenizing(whole, work)
        finally:
            self._end(work)
        return JSONResponse(answer.model_dump(exclude={"denoising"}))

    async def _drain(self, work: Work) -> bool:
        try:
            async with asyncio.timeout_at(_deadline(work)):
                async for _ in self._happenings(work, None):
                    pass
        except TimeoutError:
            raise refusal(504, _late(), code="deadline") from None
        return True

    async def _stream(self, work: Work, chunk: Chunk) -> AsyncGenerator[bytes, None]:
        """Server-sent events; a failure after the first byte is an event too, since the status has been sent."""
        try:
            async with asyncio.timeout_at(_deadline(work)):
                async for events in self._happenings(work, chunk):
                    for event in events:
                        yield event
            if work.body.stream_options.include_usage:
                yield sse(empty_chunk(work).model_copy(update={"usage": work.usage()}))
        except TimeoutError:
            yield sse(error_body(504, _late(), code="deadline"))
        except Exception:
            logger.exception("a stream failed")
            yield sse(error_body(500, "internal error; the server's log names the cause"))
        finally:
            self._end(work)
        yield b"data: [DONE]\n\n"

    async def _happenings(self, work: Work, chunk: Chunk | None) -> AsyncGenerator[list[bytes], None]:
        """What happens to the choices, in order, until all have ended."""
        first = True
        while not work.done:
            events = await work.events.get()
            if isinstance(events, Exception):
                raise events
            yield await self._tokenizing(read, work, events, chunk)
            if first and any(choice.whole for choice in work.choices):
                self.monitor.first.labels(work.name).observe(time.monotonic() - work.begun)
                first = False
        self.monitor.latency.labels(work.name).observe(time.monotonic() - work.begun)

    def _end(self, work: Work) -> None:
        """The request is over, however it ended: what it holds is free before the next denoising step. Idempotent."""
        if work.ticket is None:
            return
        work.hosted.batcher.cancel(work.ticket)
        work.ticket = None
        self.pending -= 1
        self.monitor.requests.labels(work.name, "complete" if work.done else "abandoned").inc()


def _deadline(work: Work) -> float:
    return asyncio.get_running_loop().time() + DEADLINE_SECONDS - (time.monotonic() - work.begun)


def _late() -> str:
    return f"no answer within {DEADLINE_SECONDS:g} s; ask for fewer tokens, steps or choices"


def _row_seeds(seed: int, num_prompts: int, n: int) -> list[int]:
    """A seed for each choice of each prompt; a choice keeps its seed whatever `n` is."""
    places = [f"{prompt}|{choice}" for prompt in range(num_prompts) for choice in range(n)]
    return [int(row_generator(seed, place, 0, "serve").integers(2**63)) for place in places]


def _version() -> str:
    try:
        return metadata.version("dtrpo-ray")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "source"
