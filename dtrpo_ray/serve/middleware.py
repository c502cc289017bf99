"""What stands before the endpoints and beside them: keys, sizes, and every refusal in OpenAI's words."""

import hmac
import logging
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dtrpo_ray.serve import api

MAX_BODY_BYTES = 2**20
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})  # any other path wants a key, where there are keys

_ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 504: "timeout_error"}

logger = logging.getLogger(__name__)


class Gate:
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
            return await error(401, message, code="invalid_api_key", headers=headers)(scope, receive, send)
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
            await error(500, "internal error; the server's log names the cause")(scope, receive, send)

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
            raise refusal(413, f"the body exceeds {MAX_BODY_BYTES} bytes; split the request", code="body_too_large")
        return message

    return counted


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> api.ErrorBody:
    """What an error says, in OpenAI's shape."""
    kind = _ERROR_TYPES.get(status, "invalid_request_error")
    return api.ErrorBody(error=api.ErrorDetail(message=message, type=kind, param=param, code=code))


def error(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An answer that is an error."""
    return JSONResponse(error_body(status, message, param, code).model_dump(), status, headers)


def refusal(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> HTTPException:
    """The same, to be raised."""
    return HTTPException(status, {"message": message, "param": param, "code": code}, headers)


async def on_http_error(_: Request, problem: Exception) -> JSONResponse:
    assert isinstance(problem, StarletteHTTPException)
    detail: Any = problem.detail if isinstance(problem.detail, dict) else {"message": str(problem.detail)}
    return error(problem.status_code, **detail, headers=dict(problem.headers or {}))


async def on_invalid_request(_: Request, problem: Exception) -> JSONResponse:
    """The first problem, as OpenAI words it: 400, never 422, with the field as `param`."""
    assert isinstance(problem, RequestValidationError)
    first = problem.errors()[0]
    if first["type"] == "json_invalid":
        return error(400, "the body is not valid JSON")
    param = next((str(part) for part in first["loc"][1:]), None)
    where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return error(400, message, param)
    given = "" if first["type"] == "missing" else f" = {short(first['input'])}"
    code = api.UNSUPPORTED if first["type"] == api.UNSUPPORTED else None
    return error(400, f"{where}{given}: {message}", param, code)


def short(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
