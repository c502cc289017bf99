"""What stands before the endpoints: `Front` in Serve's proxy, `Gate` in the replica; and every refusal's shape."""

import asyncio
import hashlib
import hmac
import logging
import reprlib
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import urlsplit

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
FLUSH_SECONDS = 5.0  # for a client to take the end of a stream that is broken off
MAX_BODY_BYTES = 2**20
MAX_READ_BYTES = 2**26  # of all bodies that are still arriving; beyond, the oldest of them is refused
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})  # no key is asked for here
INTERNAL_ERROR = "internal error; the server's log names the cause"
_ERROR_TYPES = {
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
# by these a client would set its own deadline, outlive its hang-up, or choose its replica
_STEERING = (
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"x-session-id",
    b"serve-multiplexed-model-id",
)
_ROUTER = b"x-serve-router-"
_DECODED = (b"x-request-id", b"traceparent", b"tracestate")  # Serve decodes their values as UTF-8
_KEPT = (b"retry-after", b"x-request-id")  # headers of an answer of Serve's own

logger = logging.getLogger(__name__)


def key_digests(keys: Iterable[str]) -> tuple[str, ...]:
    """Return the SHA-256 of each API key, which is what travels to the replicas in place of the keys.

    They are sorted: Serve compares the bytes of two deployments, and replaces replicas where they differ.
    """
    return tuple(sorted(hashlib.sha256(key.encode()).hexdigest() for key in keys))


def front() -> list[Middleware]:
    """Return the middleware of Serve's proxy; `server.FRONT` tells Serve of this function."""
    return [Middleware(Front)]


class Front:
    """In Serve's proxy, before its queue: reads bodies, keeps the deadline, and words Serve's own errors as ours.

    Serve counts a request from its headers on, so clients that never finish their bodies would fill its queue. It
    answers 404 while the application starts or drains, 408 at its timeout, 503 without a replica and 500 for a replica
    that died, all in plain text, and it obeys headers that steer it, which end here.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.arriving: dict[asyncio.Timeout, int] = {}  # bytes of each body that is being read, oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            whole = await self._read(receive)
        except HTTPException as problem:
            return await _respond(problem)(scope, receive, send)
        if whole is not None:
            passed = [(name, value) for name, value in scope["headers"] if _reaches_serve(name, value)]
            await self._pass_on({**scope, "headers": passed}, whole, _Answer(scope, receive, send))

    async def _read(self, receive: Receive) -> Receive | None:
        """Return a `receive` that gives the whole body at once, or None if the client hangs up.

        Raises a refusal for a body that is too large or too slow.
        """
        body, more, close = bytearray(), True, {"Connection": "close"}
        try:
            async with asyncio.timeout(BODY_SECONDS) as limit:
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > MAX_BODY_BYTES:
                        raise too_large(close)
                    self.arriving[limit] = len(body)
                    self._bound()
        except TimeoutError:
            text = f"the body did not arrive within {BODY_SECONDS:g} s, or others waited for its room; send it faster"
            raise refusal(408, text, code="body_too_slow", headers=close) from None
        finally:
            self.arriving.pop(limit, None)
        return _replay(bytes(body), receive)

    def _bound(self) -> None:
        """Refuse the oldest bodies until the rest are within MAX_READ_BYTES."""
        while sum(self.arriving.values()) > MAX_READ_BYTES:
            oldest = next(iter(self.arriving))
            del self.arriving[oldest]
            with suppress(RuntimeError):  # it has expired already
                oldest.reschedule(asyncio.get_running_loop().time())

    async def _pass_on(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        """Run Serve's proxy, and end its answer here if FRONT_SECONDS pass first or if it breaks off."""
        work = asyncio.ensure_future(self.app(scope, receive, answer))
        try:
            await asyncio.wait({work}, timeout=FRONT_SECONDS)
        finally:
            late, answer.closed = not work.done(), True
            work.cancel()
        failure = None if late or work.cancelled() else work.exception()
        if failure and answer.begun and not answer.streams:
            raise failure
        if failure:
            logger.error("the proxy failed", exc_info=failure)
        await answer.end(deadline_passed(FRONT_SECONDS) if late else refusal(500, INTERNAL_ERROR))


class _Answer:
    """A `send` that words Serve's own errors as ours and knows how far it is. Once `closed`, it passes nothing on."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        self.begun = self.streams = self.closed = False

    async def __call__(self, message: Message) -> None:
        if self.closed:
            return
        if not self.begun and (problem := _of_serve(message)):
            return await self.end(problem)
        if message["type"] == "http.response.start":
            self.begun = True
            self.streams = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        elif not message.get("more_body", False):
            self.closed, self.streams = True, False
        await self.send(message)

    async def end(self, problem: HTTPException) -> None:
        """Answer with a problem if nothing has been sent; a stream that has begun ends with it as an event."""
        self.closed = True
        if not self.begun:
            self.begun = True
            await _respond(problem)(self.scope, self.receive, self.send)
        elif self.streams:
            event = b"data: " + bytes(_respond(problem).body) + b"\n\n"
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self.send({"type": "http.response.body", "body": event})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the whole body first, and then what comes after it: that the client hung up."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


def _reaches_serve(name: bytes, value: bytes) -> bool:
    """Return False for a header that steers Serve, and for one whose bytes Serve's proxy cannot decode."""
    plain = name.lower().replace(b"_", b"-")
    return (
        name.isascii()
        and plain not in _STEERING
        and not plain.startswith(_ROUTER)
        and (plain not in _DECODED or value.isascii())
    )


def _of_serve(start: Message) -> HTTPException | None:
    """Return the refusal that stands for an error of Serve's own; None for any other answer."""
    headers = dict(start["headers"])
    if start["status"] < 400 or headers.get(b"content-type", b"").startswith(b"application/json"):
        return None
    kept = {name.decode(): headers[name].decode("latin-1") for name in _KEPT if name in headers}
    match start["status"]:
        case 404 | 503:
            message = "no replica takes requests now: the server starts or stops; try again later"
            return refusal(503, message, code="unavailable", headers={"retry-after": "1"} | kept)
        case 408:
            return deadline_passed(None, kept)
        case 429:
            message = "too many requests are running or queued; try again later"
            return refusal(429, message, code="queue_full", headers={"retry-after": "1"} | kept)
        case status:
            return refusal(status, INTERNAL_ERROR, headers=kept)


class Gate:
    """Refuses requests without a key and bodies that are too large, and answers every failure inside with a 500.

    `digests` are those of the keys (`key_digests`). Without any, no key is asked for, and the server answers under
    `localhost` and IP addresses alone: a page of another site that resolves its own name to loopback (DNS rebinding)
    could else read from it in the user's browser.
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
        if not self.digests and not _is_local(scope):
            message = (
                "without API keys this server answers under localhost and IP addresses alone; set keys, or use those"
            )
            return await _respond(refusal(403, message, code="host_not_allowed"))(scope, receive, send)
        begun = False

        async def send_once_begun(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, _limit_body(receive), send_once_begun)
        except Exception:
            if begun:  # the status has been sent
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


def _is_local(scope: Scope) -> bool:
    """Return True if the Host header is localhost or an IP address, or absent: browsers send it always."""
    host = dict(scope["headers"]).get(b"host", b"localhost").decode("latin-1")
    try:
        name = urlsplit(f"//{host}").hostname
        return name == "localhost" or bool(ip_address(name or ""))
    except ValueError:
        return False


def _limit_body(receive: Receive) -> Receive:
    """Pass messages on until the body grows too large."""
    total = 0

    async def count() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > MAX_BODY_BYTES:
            raise too_large()
        return message

    return count


def refusal(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> HTTPException:
    """Return an error to raise, its `detail` a body in OpenAI's shape; `param` is the field to change."""
    kind = _ERROR_TYPES.get(status, "invalid_request_error")
    body = api.ErrorBody(error=api.ErrorDetail(message=message, type=kind, param=param, code=code))
    return HTTPException(status, body.model_dump(), headers)


def deadline_passed(seconds: float | None, headers: dict[str, str] | None = None) -> HTTPException:
    """Return the refusal of a request that was not answered in time."""
    within = "the server's deadline" if seconds is None else f"{seconds:g} s"
    message = f"no answer within {within}; ask for fewer tokens, steps or choices"
    return refusal(504, message, code="deadline", headers=headers)


def too_large(headers: dict[str, str] | None = None) -> HTTPException:
    message = f"the body exceeds {MAX_BODY_BYTES} bytes; split the request"
    return refusal(413, message, code="body_too_large", headers=headers)


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


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def shorten(value: object) -> str:
    """Return the repr of a value for a message, cut to 80 characters, without reading all of a long value."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
