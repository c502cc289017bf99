"""An `Engine` -> an HTTP application. Decoding runs in one worker thread, never on the event loop."""

import asyncio
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from dtrpo_ray.api import ChatRequest, CompletionRequest, error_body
from dtrpo_ray.config import ServeConfig
from dtrpo_ray.engine import Engine
from dtrpo_ray.errors import ModelError
from dtrpo_ray.sampler import Generation, SamplingParams

MAX_BODY_BYTES = 1 << 20
DEADLINE_SECONDS = 120.0
OPEN_PATHS = ("/health", "/ready", "/version")


class _ApiError(Exception):
    """An answer other than 200: (status, message, parameter, code)."""


def create_app(engine: Engine, config: ServeConfig, keys: frozenset[str] = frozenset()) -> FastAPI:
    """The application around `engine`. With `keys`, every /v1 route asks for one of them as a Bearer token."""
    app = FastAPI(title="dtrpo_ray", version=version("dtrpo-ray"))
    worker = ThreadPoolExecutor(1, thread_name_prefix="decode")
    _add_guards(app, keys)

    async def complete(prompts: list[list[int]], body: CompletionRequest | ChatRequest) -> list[Generation]:
        if body.model != config.model_name:
            raise _ApiError(404, f"model {body.model!r} is not served here; ask for {config.model_name!r}", "model")
        params = _sampling(body, config, engine)
        repeated = [prompt for prompt in prompts for _ in range(body.n)]
        first = secrets.randbits(62) if body.seed is None else body.seed
        seeds = [first + i for i in range(len(repeated))]
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(worker, partial(engine.generate, repeated, params, seeds))
        try:
            return await asyncio.wait_for(work, DEADLINE_SECONDS)
        except TimeoutError:
            raise _ApiError(503, f"not decoded within {DEADLINE_SECONDS:.0f} s; ask for fewer tokens") from None

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> dict[str, Any]:
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        prompts = [_encode(engine, text, "prompt") for text in texts]
        done = await complete(prompts, body)
        choices = [{"index": i, **_choice(engine, g, body)} for i, g in enumerate(done)]
        return _answer("cmpl", "text_completion", config.model_name, choices, prompts, done)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> dict[str, Any]:
        prompts = [_encode(engine, [m.model_dump() for m in body.messages], "messages")]
        done = await complete(prompts, body)
        choices = []
        for i, generation in enumerate(done):
            choice = _choice(engine, generation, body)
            message = {"role": "assistant", "content": choice.pop("text")}
            choices.append({"index": i, "message": message, **choice})
        return _answer("chatcmpl", "chat.completion", config.model_name, choices, prompts, done)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": config.model_name, "object": "model", "owned_by": "dtrpo_ray"}]}

    @app.get("/health")
    @app.get("/ready")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/version")
    def served_version() -> dict[str, str]:
        return {"version": version("dtrpo-ray")}

    return app


def _add_guards(app: FastAPI, keys: frozenset[str]) -> None:
    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if keys and request.url.path not in OPEN_PATHS:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
            # every key is compared, each in constant time
            if not sum(hmac.compare_digest(given, key.encode()) for key in keys):
                body = error_body("a valid API key is needed", "invalid_request_error", code="invalid_api_key")
                return JSONResponse(body, 401)
        if len(await request.body()) > MAX_BODY_BYTES:
            return JSONResponse(error_body(f"the body is over {MAX_BODY_BYTES} bytes", "invalid_request_error"), 413)
        return await call_next(request)

    @app.exception_handler(_ApiError)
    async def refused(_: Request, error: _ApiError) -> JSONResponse:
        status, message, *param = error.args
        return JSONResponse(error_body(message, "invalid_request_error", *param), status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        param = ".".join(str(part) for part in problem["loc"][1:])
        return JSONResponse(error_body(f"{param or 'body'}: {problem['msg']}", "invalid_request_error", param), 400)

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse(error_body("internal error; the server's log says more", "server_error"), 500)


def _encode(engine: Engine, prompt: Any, param: str) -> list[int]:
    try:
        ids = engine.encode(prompt)
    except ModelError as error:
        raise _ApiError(400, str(error), param) from None
    if not ids or engine.model.mask_id in ids:
        raise _ApiError(400, f"{param} is empty or holds the mask token", param)
    return ids


def _sampling(body: CompletionRequest | ChatRequest, config: ServeConfig, engine: Engine) -> SamplingParams:
    if body.max_tokens > config.max_new_tokens:
        raise _ApiError(
            400, f"max_tokens = {body.max_tokens} is over this server's {config.max_new_tokens}", "max_tokens"
        )
    steps = body.steps or min(config.denoising_steps, engine.model.block_size)
    if steps > engine.model.block_size:
        raise _ApiError(400, f"steps = {steps} is over the block size {engine.model.block_size}", "steps")
    return SamplingParams(body.max_tokens, steps, body.temperature, body.threshold)


def _choice(engine: Engine, generation: Generation, body: CompletionRequest | ChatRequest) -> dict[str, Any]:
    text = engine.decode(generation.text_ids)
    cuts = [at for stop in body.stops() if (at := text.find(stop)) >= 0]
    ended = bool(cuts) or len(generation.text_ids) < body.max_tokens
    choice: dict[str, Any] = {
        "text": text[: min(cuts, default=len(text))],
        "finish_reason": "stop" if ended else "length",
    }
    if body.return_trajectory:
        choice["trajectory"] = {"response_ids": generation.ids, "steps": generation.steps, "logps": generation.logps}
    return choice


def _answer(
    prefix: str, kind: str, model: str, choices: list[Any], prompts: list[list[int]], done: list[Generation]
) -> dict[str, Any]:
    prompt_tokens, completion_tokens = sum(map(len, prompts)), sum(len(g.text_ids) for g in done)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    usage["total_tokens"] = prompt_tokens + completion_tokens
    facts = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}
    return {**facts, "choices": choices, "usage": usage}
