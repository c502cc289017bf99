"""What stands in Serve's proxy: Serve's own errors in OpenAI's shape, and no header that steers Serve."""

import asyncio
import json
from typing import Any

import pytest
from ray.serve._private.http_util import convert_object_to_asgi_messages
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dtrpo_ray.serve.middleware import Front, front


def proxy(*messages: Message, seen: list[Scope] | None = None) -> ASGIApp:
    """A proxy that answers with these messages; `seen` collects what reaches it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if seen is not None:
            seen.append(scope)
        for message in messages:
            await send(message)

    return app


def answer(app: ASGIApp, *headers: tuple[bytes, bytes]) -> tuple[int, dict[str, str], bytes]:
    """The status, headers and body of a request with these headers through `Front`."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        sent.append(dict(message))

    scope: Any = {"type": "http", "method": "GET", "path": "/v1/models", "headers": list(headers)}
    asyncio.run(Front(app)(scope, receive, send))
    start, *rest = sent
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], found, b"".join(message["body"] for message in rest)


@pytest.mark.parametrize(
    ("status", "ours", "code", "kind", "retry"),
    [
        (404, 503, "unavailable", "server_error", "1"),  # no route: the application starts or drains
        (503, 503, "unavailable", "server_error", "1"),
        (429, 429, "queue_full", "rate_limit_error", "1"),
        (408, 504, "deadline", "timeout_error", None),
        (500, 500, None, "server_error", None),
    ],
)
def test_errors_of_serve_have_openais_shape(status: int, ours: int, code: str, kind: str, retry: str | None) -> None:
    """The messages are what Serve itself sends."""
    found, headers, body = answer(proxy(*convert_object_to_asgi_messages("replica 7f3a of 10.0.0.3 died", status)))
    error = json.loads(body)["error"]
    assert (found, error["code"], error["type"], headers.get("retry-after")) == (ours, code, kind, retry)
    assert set(error) == {"message", "type", "param", "code"}
    assert b"10.0.0.3" not in body


def test_an_error_keeps_the_delay_and_the_id_that_serve_gave_it() -> None:
    more = [(b"retry-after", b"7"), (b"x-request-id", b"abc")]
    _, headers, _ = answer(proxy(*convert_object_to_asgi_messages("full", 503, more)))
    assert (headers["retry-after"], headers["x-request-id"]) == ("7", "abc")


def test_a_replica_that_dies_before_its_answer_is_a_500() -> None:
    """Serve sends nothing then, or raises; after the first bytes the connection breaks."""

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("a secret of the inside")

    for app in (proxy(), broken):
        status, _, body = answer(app)
        assert (status, json.loads(body)["error"]["type"]) == (500, "server_error")
        assert b"secret" not in body

    async def breaks_off(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - uvicorn then closes the connection
        answer(breaks_off)


@pytest.mark.parametrize("status", [200, 400, 503])
def test_answers_of_replicas_pass_unchanged(status: int) -> None:
    messages = convert_object_to_asgi_messages({"error": "ours"}, status, [(b"x-own", b"1")])
    found, headers, body = answer(proxy(*messages))
    assert (found, headers["x-own"], json.loads(body)) == (status, "1", {"error": "ours"})


def test_headers_that_serve_obeys_or_cannot_decode_stop_here() -> None:
    kept = [(b"host", b"h"), (b"authorization", b"Bearer \xc3\xa9"), (b"x-request-id", b"mine"), (b"cookie", b"\xff")]
    dropped = [
        (b"x-request-timeout-seconds", b"0"),
        (b"X-Request-Disconnect-Disabled", b"?1"),
        (b"x_session_id", b"a"),
        (b"serve_multiplexed_model_id", b"b"),
        (b"Serve-Multiplexed-Model-Id", b"c"),
        (b"x-serve-router-x", b"d"),
        (b"x-request-id", b"\xff"),
        (b"traceparent", b"\xff"),
        (b"tracestate", b"\xff"),
        (b"x-\xff", b"e"),
    ]
    seen: list[Scope] = []
    answer(proxy(*convert_object_to_asgi_messages({}), seen=seen), *kept, *dropped)
    assert seen[0]["headers"] == kept
    (middleware,) = front()
    assert middleware.cls is Front
