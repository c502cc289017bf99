"""Engines -> an ASGI app that speaks OpenAI's HTTP. Knows nothing of Ray; `server.py` puts it into replicas.

A request passes the gate (`middleware.py`), the schema (`api.py`) and the limits; then its choices join the decoding
thread of their model (`batcher.py`), and blocks come back as they finish. Nothing here blocks the event loop.
"""

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib import metadata, resources
from typing import Any, TypeVar, TypeVarTuple

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Receive, Scope, Send

from dtrpo_ray.config.serve import ServeConfig
from dtrpo_ray.decode.engine import Engine, block_size_error
from dtrpo_ray.decode.types import SamplingParams, to_params
from dtrpo_ray.method.trajectory import row_generator
from dtrpo_ray.models.tokenizer import control_token_error
from dtrpo_ray.serve import api, middleware, responses
from dtrpo_ray.serve.batcher import Batcher, Delivery
from dtrpo_ray.serve.middleware import (
    DEADLINE_SECONDS,
    INTERNAL_ERROR,
    OPEN_PATHS,
    deadline_passed,
    refusal,
    shorten,
)
from dtrpo_ray.serve.monitor import Monitor
from dtrpo_ray.serve.responses import ActiveRequest, Choice

logger = logging.getLogger(__name__)

MAX_ACTIVE_REQUESTS = 128  # decoding or queued; further requests get 429
MAX_BATCH_TOKENS = 65_536  # of a request's choices, prompts included

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")
Prompt = str | list[int] | list[api.Message]
OpenAPI = dict[int | str, dict[str, Any]]

REFUSALS = {
    400: "The request cannot be honoured; `param` names the field.",
    401: "No valid API key.",
    403: "There are no API keys, and the Host header is neither localhost nor an IP address.",
    404: "No such model.",
    413: "The body is too large.",
    429: "The queue is full; come back after `Retry-After` seconds.",
    500: "A failure of the server.",
    504: "No answer before the server's deadline.",
}


def create_app(
    engine: Engine, config: ServeConfig, digests: tuple[str, ...], others: Mapping[str, Engine] | None = None
) -> FastAPI:
    """Return the app of one engine, and of `others` by name.

    With `digests` (`middleware.key_digests`), clients send a key of such a digest as a Bearer token.
    """
    service = Service({config.model_name: engine, **(others or {})}, config)
    # a redirect would name the host that the client names
    app = FastAPI(title="dtrpo", version=_version(), docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.add_middleware(middleware.Gate, digests=digests)
    app.add_exception_handler(StarletteHTTPException, middleware.on_http_error)
    app.add_exception_handler(RequestValidationError, middleware.on_invalid_request)
    post = partial(app.add_api_route, methods=["POST"])
    stream: OpenAPI = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
    refusals = _refusals(*REFUSALS) | stream
    post("/v1/completions", service.complete, response_model=api.Completion, responses=refusals)
    post("/v1/chat/completions", service.chat, response_model=api.ChatCompletion, responses=refusals)
    post("/tokenize", service.tokenize, responses=_refusals(400, 401, 403, 404, 413, 500))
    small = _refusals(401, 403, 500)
    app.add_api_route("/v1/models", service.models, responses=small)
    app.add_api_route("/metrics", service.metrics, responses={**small, 200: {"content": {"text/plain": {}}}})
    app.add_api_route("/health", service.health)
    app.add_api_route("/ready", service.ready, responses={503: {"description": "The queue is full."}})
    app.add_api_route("/version", service.version)
    app.add_api_route("/", service.page, include_in_schema=False)
    _describe(app, bool(digests))
    return app


def _refusals(*codes: int) -> OpenAPI:
    return {code: {"model": api.ErrorBody, "description": REFUSALS[code]} for code in codes}


def _describe(app: FastAPI, keys: bool) -> None:
    """Add to the specification what FastAPI cannot know: keys, and 400 in place of its own 422."""
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
    """The endpoints, and the count of requests under way."""

    def __init__(self, engines: Mapping[str, Engine], config: ServeConfig) -> None:
        self.config, self.started = config, int(time.time())
        self.served: dict[str, Batcher] = {}
        for name, engine in engines.items():
            self.swap(name, engine)
        self.monitor = Monitor(self.served)
        # tokenizers are not safe to share between threads, and must not hold up the event loop
        self.tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self.num_active = 0

    def swap(self, name: str, engine: Engine) -> None:
        """Serve new requests for a name with an engine; those under way end with the one they began with."""
        self.served[name] = Batcher(engine, self.config.max_batch, self.config.cache_tokens)

    # --- endpoints ---

    async def complete(self, body: api.CompletionRequest, request: Request) -> Any:
        """Complete prompts; `stream` sends each block as it is finished."""
        return await self._respond(body, body.prompt, body.max_tokens, request)

    async def chat(self, body: api.ChatRequest, request: Request) -> Any:
        """Answer a conversation; `stream` sends each block as it is finished."""
        return await self._respond(body, [body.messages], body.max_completion_tokens or body.max_tokens, request)

    async def tokenize(self, body: api.TokenizeRequest) -> api.Tokenized:
        """Return the ids of a text, or of messages through the chat template."""
        engine = self._find(body.model).engine
        prompt, field = (body.messages or [], "messages") if body.prompt is None else (body.prompt, "prompt")
        ids = await self._tokenize(_encode, engine, prompt, field)
        return api.Tokenized(tokens=ids, count=len(ids), max_model_len=engine.context_tokens)

    async def models(self) -> api.ModelList:
        """List the served models."""
        cards = []
        for name, served in self.served.items():
            model, most = served.engine.model, served.engine.context_tokens
            facts = {"max_model_len": most, "block_size": model.block_size, "attention": model.attention}
            cards.append(api.ModelCard(id=name, created=self.started, **facts))
        return api.ModelList(data=cards)

    async def metrics(self) -> Response:
        """Return the counters of this process, for Prometheus."""
        return Response(generate_latest(self.monitor.registry), media_type="text/plain; version=1.0.0; charset=utf-8")

    async def health(self) -> dict[str, str]:
        """Answer, to show that the process is alive."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """Answer 200 if a request sent now would be accepted, else 503."""
        busy = self.num_active >= MAX_ACTIVE_REQUESTS
        return JSONResponse({"status": "busy" if busy else "ready"}, 503 if busy else 200)

    async def version(self) -> dict[str, str]:
        """Return the version of this package."""
        return {"version": _version()}

    async def page(self) -> HTMLResponse:
        """Return the playground: one page that loads nothing else."""
        text = resources.files("dtrpo_ray.serve").joinpath("playground.html").read_text()
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})

    # --- before decoding ---

    async def _begin(
        self, body: api.TextRequest, prompts: Sequence[Prompt], most: int | None, begun: float
    ) -> ActiveRequest:
        """Check a request for `most` tokens a choice, tokenize it and send its choices to the decoding thread."""
        is_chat = isinstance(body, api.ChatRequest)
        field, prefix = ("messages", "chatcmpl") if is_chat else ("prompt", "cmpl")
        served = self._find(body.model)
        engine = served.engine
        _check_blocks(body, engine)
        async with _deadline(begun):
            ids = [await self._tokenize(_encode, engine, prompt, field) for prompt in prompts]
        params = to_params(
            body,
            max_new_tokens=self._limit(engine, ids, body.n, most, field),
            denoising_steps=body.steps or self.config.denoising_steps,
            stop_token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            top_logprobs=body.num_alternatives or 0,
        )
        if engine.model.shift and not all(ids):
            raise refusal(400, f"{field} has no token, and this model needs one to predict the next from", field)
        choices = _choices(body, engine, ids, params)
        events: asyncio.Queue[Delivery] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        request = ActiveRequest(
            prompts=[choice.prompt for choice in choices],
            params=params,
            seeds=[choice.seed for choice in choices],
            emit=lambda delivery: loop.call_soon_threadsafe(events.put_nowait, delivery),
            watch=body.stream and body.stream_options.include_denoising,
            id=f"{prefix}-{uuid.uuid4().hex}",
            model_name=body.model or self.config.model_name,
            body=body,
            choices=choices,
            prompt_tokens=sum(map(len, ids)),
            begun=begun,
            events=events,
        )
        served.submit(request)
        return request

    def _find(self, name: str | None) -> Batcher:
        served = self.served.get(name or self.config.model_name)
        if served is None:
            message = f"model = {shorten(name)} is not served here; ask for {', '.join(map(repr, self.served))}"
            raise refusal(404, message, "model", "model_not_found")
        return served

    def _limit(self, engine: Engine, prompts: list[list[int]], n: int, wanted: int | None, field: str) -> int:
        """Return the most tokens of each choice; `wanted` None asks for as many as there is room for."""
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

    async def _tokenize(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Call a function on the tokenizing thread."""
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, function, *arguments)

    # --- while it decodes ---

    async def _respond(
        self, body: api.TextRequest, prompts: Sequence[Prompt], most: int | None, connection: Request
    ) -> Response:
        begun = time.monotonic()
        if self.num_active >= MAX_ACTIVE_REQUESTS:
            message = f"{MAX_ACTIVE_REQUESTS} requests are running or queued; try again later"
            raise refusal(429, message, code="queue_full", headers={"Retry-After": "1"})
        self.num_active += 1  # before its prompts are tokenized, which other requests wait for
        try:
            request = await self._begin(body, prompts, most, begun)
        except BaseException:
            self.num_active -= 1
            raise
        if body.stream:
            return EventStream(self._stream(request), partial(self._end, request))
        try:
            response = await unless_disconnected(connection.receive, self._answer(request))
        finally:
            self._end(request)
        return response or Response(status_code=499)  # nobody is there to read it

    async def _answer(self, request: ActiveRequest) -> Response:
        async with _deadline(request.begun):
            async for _ in self._events(request):
                pass
            return JSONResponse(await self._tokenize(responses.whole_response, request))

    async def _stream(self, request: ActiveRequest) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events; a failure after the first byte is an event too, since the status has been sent."""
        try:
            async with _deadline(request.begun):
                async for event in self._events(request):
                    yield event
            if request.body.stream_options.include_usage:
                yield responses.sse(responses.answer(request, [], usage=request.usage()))
        except HTTPException as problem:
            yield responses.sse(problem.detail)
        except Exception:
            logger.exception("a stream failed")
            yield responses.sse(refusal(500, INTERNAL_ERROR).detail)
        finally:
            self._end(request)  # before the last bytes are sent, which a slow reader may hold up
        yield b"data: [DONE]\n\n"

    async def _events(self, request: ActiveRequest) -> AsyncGenerator[bytes, None]:
        """Apply the decoder's events to the choices until all have ended; yield what a stream sends of them."""
        first = True
        while not request.done:
            events = await request.events.get()
            if isinstance(events, Exception):
                raise events
            for event in await self._tokenize(responses.stream_events, request, events):
                yield event
            if first and any(choice.blocks for choice in request.choices):
                self.monitor.first.labels(request.model_name).observe(time.monotonic() - request.begun)
                first = False
        self.monitor.latency.labels(request.model_name).observe(time.monotonic() - request.begun)

    def _end(self, request: ActiveRequest) -> None:
        """Free all that a request holds before the next denoising step. Idempotent."""
        if not request.cancelled:
            request.cancelled = True
            self.num_active -= 1
            self.monitor.requests.labels(request.model_name, "complete" if request.done else "abandoned").inc()


@asynccontextmanager
async def _deadline(begun: float) -> AsyncIterator[None]:
    """Raise a refusal if the block has not ended DEADLINE_SECONDS after the request began."""
    try:
        async with asyncio.timeout(DEADLINE_SECONDS - (time.monotonic() - begun)):
            yield
    except TimeoutError:
        raise deadline_passed(DEADLINE_SECONDS) from None


class EventStream(StreamingResponse):
    """Sends server-sent events until the client hangs up; calls `done` at the end, however it comes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], done: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.events, self.done = events, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self.stream_response(send))
        finally:
            self.done()  # whatever closing raises; and closing an iterator that never began runs none of it
            await self.events.aclose()


async def unless_disconnected(receive: Receive, work: Coroutine[object, None, Result]) -> Result | None:
    """Return the result of `work`, None if it was cancelled; if the client hangs up first, cancel it."""

    async def hung_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() and not task.cancelled() else None
    finally:
        for each in (task, watcher):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


def _check_blocks(body: api.TextRequest, engine: Engine) -> None:
    if problem := block_size_error(engine.model, body, body.steps):
        raise refusal(400, param=problem[0], message=problem[1])
    if (size := body.block_length or engine.model.block_size) > engine.context_tokens:
        raise refusal(
            400,
            f"block_length = {size} exceeds the context of {engine.context_tokens} tokens; ask for fewer",
            "block_length",
        )


def _encode(engine: Engine, prompt: Prompt, field: str) -> list[int]:
    """Return the ids of a prompt. Messages are text alone; a text is the caller's own prompt, chat markup included."""
    ids = [token for token in prompt if isinstance(token, int)]
    turns = [turn.model_dump() for turn in prompt if isinstance(turn, api.Message)]
    contents = ((f"{field}.{i}.content", turn["content"]) for i, turn in enumerate(turns))
    if problem := control_token_error(engine.control, contents):
        raise refusal(400, f"{problem}; remove it from the text", field)
    if ids:
        if max(ids) >= engine.num_tokens and max(ids) != engine.model.mask_id:
            raise refusal(400, f"{field} holds the id {max(ids)}; the model has {engine.num_tokens} tokens", field)
    else:
        try:
            ids = engine.encode(prompt if isinstance(prompt, str) else turns)
        except Exception as error:  # tokenizers and chat templates raise bare exceptions at text they cannot take
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            raise refusal(400, f"{field} cannot be tokenized ({cause[:200]}); change the text", field) from None
    if engine.model.mask_id in ids:
        raise refusal(400, f"{field} holds the mask token, which marks what to decode; remove it", field)
    return ids


def _choices(body: api.TextRequest, engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[Choice]:
    """Return `n` choices of each prompt; their seeds do not depend on `n`."""
    shared = secrets.randbits(63) if body.seed is None else body.seed
    choices = []
    for number, prompt in enumerate(prompts):
        for place in range(body.n):
            seed = int(row_generator(shared, f"{number}|{place}", 0, "serve").integers(2**63))
            choices.append(Choice(engine, prompt, params, seed, stop=body.stop, alternatives=body.num_alternatives))
    return choices


def _version() -> str:
    try:
        return metadata.version("dtrpo-ray")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "source"
