"""What stands before the endpoints (`Front` before Ray Serve's queue, `Gate` in a replica), and every refusal in
OpenAI's shape."""

import asyncio
import hashlib
import hmac
import json
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dtrpo_ray.serve import api

DEADLINE_SECONDS = 120.0  # of a request in its replica, queueing there included; clients cannot raise it
FRONT_SECONDS = DEADLINE_SECONDS + 5  # of a request whose body is read: answered even if the replica does not
BODY_SECONDS = 30.0  # for a body to arrive
MAX_BODY_BYTES = 2**20
MAX_HELD_BYTES = 2**28  # of the bodies of all requests under way
FLUSH_SECONDS = 5.0  # for a client to take the last bytes of a stream that was ended
SERVE_HEADERS = frozenset({b"x-request-timeout-seconds", b"x-request-disconnect-disabled"})  # Serve obeys their senders
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})  # no key is asked for here
FRONT_VARIABLE = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "dtrpo_ray.serve.middleware:front"}
BROKEN_STREAM = "the stream broke off; send the request again"
INTERNAL_ERROR = "internal error; the server's log names the cause"
_ERROR_TYPES = {
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}

logger = logging.getLogger(__name__)


def key_digests(keys: Iterable[str]) -> tuple[str, ...]:
    """Return the SHA-256 of each API key, which is what travels to the replicas in place of the keys.

    They are sorted: Serve compares the bytes of two deployments, and replaces replicas where they differ.
    """
    return tuple(sorted(hashlib.sha256(key.encode()).hexdigest() for key in keys))


def front() -> list[Middleware]:
    """Return what Ray Serve's proxy puts before itself (`FRONT_VARIABLE` in its environment names this function)."""
    return [Middleware(Front)]


class Front:
    """Reads a body before Serve's queue knows of the request, and answers in time where a replica does not.

    Serve counts a request from its headers on, so clients that never finish their bodies would fill its queue.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.held_bytes = app, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            taken, self.held_bytes = taken + count, self.held_bytes + count
            if self.held_bytes > MAX_HELD_BYTES:
                headers = {"Retry-After": "1", "Connection": "close"}
                raise refusal(503, "too many requests are being read; try again later", code="busy", headers=headers)

        try:
            body = await read_body(receive, take)
            if body is not None:
                headers = [(name, value) for name, value in scope["headers"] if name not in SERVE_HEADERS]
                await self._pass_on({**scope, "headers": headers}, replay(body, receive), send)
        except StarletteHTTPException as problem:
            await _respond(problem)(scope, receive, send)
        finally:
            self.held_bytes -= taken

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; end its answer here if FRONT_SECONDS pass first, or if it breaks off a stream."""
        outlet = Outlet(send)
        work = asyncio.ensure_future(self.app(scope, receive, outlet))
        try:
            await asyncio.wait({work}, timeout=FRONT_SECONDS)
            late, outlet.closed = not work.done(), True
        finally:
            work.cancel()
        if late and not outlet.begun:
            raise deadline_passed(FRONT_SECONDS)
        if outlet.streams and not outlet.ended:
            problem = deadline_passed(FRONT_SECONDS) if late else refusal(500, BROKEN_STREAM)
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await send({"type": "http.response.body", "body": sse(problem.detail)})
        if not late:
            work.result()  # raises what the app raised


class Outlet:
    """A `send` that knows how far the answer is; once `closed`, it sends nothing more."""

    def __init__(self, send: Send) -> None:
        self.send, self.closed = send, False
        self.begun = self.streams = self.ended = False

    async def __call__(self, message: Message) -> None:
        if self.closed:
            return
        if message["type"] == "http.response.start":
            self.begun = True
            self.streams = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        await self.send(message)


async def read_body(receive: Receive, take: Callable[[int], None] = lambda _: None) -> bytes | None:
    """Return a body, or None if the client hangs up; `take` is called with the length of each part.

    Raises a refusal for a body that is too large or too slow.
    """
    body, more, close = bytearray(), True, {"Connection": "close"}
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part, more = message.get("body", b""), message.get("more_body", False)
                if len(body) + len(part) > MAX_BODY_BYTES:
                    text = f"the body exceeds {MAX_BODY_BYTES} bytes; split the request"
                    raise refusal(413, text, code="body_too_large", headers=close)
                take(len(part))
                body += part
    except TimeoutError:
        text = f"the body did not arrive within {BODY_SECONDS:g} s; send it faster"
        raise refusal(408, text, code="body_too_slow", headers=close) from None
    return bytes(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the whole body first, and then what comes after it: that the client hung up."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive_again() -> Message:
        return next(messages, None) or await receive()

    return receive_again


class Gate:
    """Refuses requests without a key and bodies that are too large, and answers every failure inside with a 500.

    `digests` are those of the keys (`key_digests`); without any, no key is asked for.
    """

    def __init__(self, app: ASGIApp, digests: tuple[str, ...]) -> None:
        self.app, self.digests = app, digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self.digests and path not in OPEN_PATHS and not self._has_key(scope):
            message = "the API key is missing or wrong; send the header `Authorization: Bearer KEY`"
            headers = {"WWW-Authenticate": "Bearer"}
            return await _respond(refusal(401, message, code="invalid_api_key", headers=headers))(scope, receive, send)
        outlet = Outlet(send)
        try:
            body = await read_body(receive)
            if body is not None:
                await self.app(scope, replay(body, receive), outlet)
        except StarletteHTTPException as problem:
            await _respond(problem)(scope, receive, send)
        except Exception:
            if outlet.begun:  # the status has been sent
                raise
            logger.exception("%s %s failed", scope["method"], path)
            await _respond(refusal(500, INTERNAL_ERROR))(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, given = header.partition(b" ")
        digest = hashlib.sha256(given.strip()).hexdigest()
        # every key is compared, in constant time each: the time taken says nothing about them
        matches = [hmac.compare_digest(digest, wanted) for wanted in self.digests]
        return scheme.lower() == b"bearer" and any(matches)


def refusal(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> HTTPException:
    """Return an error to raise, its `detail` a body in OpenAI's shape; `param` is the field to change."""
    kind = _ERROR_TYPES.get(status, "invalid_request_error")
    body = api.ErrorBody(error=api.ErrorDetail(message=message, type=kind, param=param, code=code))
    return HTTPException(status, body.model_dump(), headers)


def deadline_passed(seconds: float) -> HTTPException:
    """Return the refusal of a request that was not answered in time."""
    return refusal(504, f"no answer within {seconds:g} s; ask for fewer tokens, steps or choices", code="deadline")


def sse(body: object) -> bytes:
    """Return a server-sent event with a JSON body. Raises ValueError for a number that JSON does not have."""
    return b"data: " + json.dumps(body, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


def _respond(problem: StarletteHTTPException) -> JSONResponse:
    return JSONResponse(problem.detail, problem.status_code, problem.headers)


async def on_http_error(_: Request, problem: Exception) -> JSONResponse:
    """Answer a `refusal`, or an error of the framework's own such as 404 and 405."""
    assert isinstance(problem, StarletteHTTPException)
    if isinstance(problem.detail, dict):
        return _respond(problem)
    return _respond(refusal(problem.status_code, str(problem.detail), headers=dict(problem.headers or {})))


async def on_invalid_request(_: Request, problem: Exception) -> JSONResponse:
    """Answer with the first problem as OpenAI does: 400, never 422, with the field as `param`."""
    assert isinstance(problem, RequestValidationError)
    first = problem.errors()[0]
    if first["type"] == "json_invalid":
        return _respond(refusal(400, "the body is not valid JSON"))
    param = next((str(part) for part in first["loc"][1:]), None)
    where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return _respond(refusal(400, message, param))
    given = "" if first["type"] == "missing" else f" = {shorten(first['input'])}"
    code = api.UNSUPPORTED if first["type"] == api.UNSUPPORTED else None
    return _respond(refusal(400, f"{where}{given}: {message}", param, code))


def shorten(value: object) -> str:
    """Return the repr of a value for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
