"""What stands in Serve's proxy: bodies, deadlines and headers before its queue, and its errors in OpenAI's shape."""

import asyncio
import json
from typing import Any

import pytest
from ray.serve._private.http_util import convert_object_to_asgi_messages
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dtrpo_ray.serve import middleware
from dtrpo_ray.serve.middleware import MAX_BODY_BYTES, Front, front, shorten


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


# --- bodies and deadlines ----------------------------------------------------------------------------------------

SCOPE: Scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
START: Message = {"type": "http.response.start", "status": 200, "headers": [[b"content-type", b"text/event-stream"]]}
FIRST: Message = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}


def part(body: bytes = b"", more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


async def call(app: ASGIApp, *parts: Message) -> tuple[int, list[bytes]]:
    """Send parts of a body, and nothing after them; return the status (0 for none) and the parts of the answer."""
    asked, sent = iter(parts), list[Message]()

    async def receive() -> Message:
        if message := next(asked, None):
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    await asyncio.wait_for(app({**SCOPE}, receive, send), 60)
    await asyncio.sleep(0)  # for what is sent too late
    if sent:
        assert not sent[-1].get("more_body", False)  # the server may close the connection in order
    return sum(m.get("status", 0) for m in sent), [m["body"] for m in sent if m["type"] == "http.response.body"]


def code_of(body: bytes) -> str | None:
    code: str | None = json.loads(body.removeprefix(b"data: "))["error"]["code"]
    return code


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def hang(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.Event().wait()


async def begin_and_hang(scope: Scope, receive: Receive, send: Send) -> None:
    await send(START)
    await send(FIRST)
    await asyncio.Event().wait()


async def begin_and_break(scope: Scope, receive: Receive, send: Send) -> None:
    await send(START)
    await send(FIRST)
    raise ValueError("a secret of the inside")


def test_a_body_is_read_whole_before_serve_knows_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 clients that send one byte each nothing reaches Serve, and another is answered meanwhile."""
    monkeypatch.setattr(middleware, "BODY_SECONDS", 1)
    seen: list[Scope] = []

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await echo(scope, receive, send)

    app = Front(counted)

    async def run() -> None:
        slow = [asyncio.ensure_future(call(app, part(b"{", more=True))) for _ in range(300)]
        await asyncio.sleep(0)
        assert await call(app, part(b"ab", more=True), part(b"c")) == (200, [b"abc"])
        assert len(app.arriving) == 300
        assert {(status, code_of(body)) for status, (body,) in await asyncio.gather(*slow)} == {(408, "body_too_slow")}
        assert not app.arriving

    asyncio.run(run())
    assert len(seen) == 1


@pytest.mark.parametrize("parts", [[part(b" " * (MAX_BODY_BYTES + 1))], [part(b" " * 2**19, more=True)] * 3], ids=len)
def test_a_large_body_is_refused_before_serve(parts: list[Message]) -> None:
    status, (body,) = asyncio.run(call(Front(proxy()), *parts))
    assert (status, code_of(body)) == (413, "body_too_large")


def test_bodies_that_arrive_are_bounded_in_all_and_the_oldest_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_READ_BYTES", 10)
    app = Front(echo)

    async def run() -> None:
        slow = []
        for size in (4, 4, 4, 4):
            slow.append(asyncio.ensure_future(call(app, part(b"x" * size, more=True))))
            await asyncio.sleep(0.01)
        for task in slow[:2]:
            status, (body,) = await task
            assert (status, code_of(body)) == (408, "body_too_slow")
        assert [task.done() for task in slow] == [True, True, False, False]
        assert await call(app, part(b"ab")) == (200, [b"ab"])
        for task in slow:
            task.cancel()

    asyncio.run(run())


def test_a_client_that_hangs_up_before_its_body_ends_reaches_nobody() -> None:
    gone = call(Front(proxy(START)), part(b"{", more=True), {"type": "http.disconnect"})
    assert asyncio.run(gone) == (0, [])


@pytest.mark.parametrize(
    ("app", "status", "bodies", "code"),
    [
        (hang, 504, 1, "deadline"),
        (begin_and_hang, 200, 2, "deadline"),
        (begin_and_break, 200, 2, None),
        (proxy(START, FIRST), 200, 2, None),  # a replica that died
    ],
)
def test_an_answer_that_does_not_end_is_ended_here(
    app: ASGIApp, status: int, bodies: int, code: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 504 where nothing was sent; a stream ends with an error event."""
    monkeypatch.setattr(middleware, "FRONT_SECONDS", 0.2)
    found, parts = asyncio.run(call(Front(app), part()))
    assert (found, len(parts), code_of(parts[-1])) == (status, bodies, code)
    assert b"secret" not in parts[-1]


def test_nothing_is_sent_after_the_answer_was_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "FRONT_SECONDS", 0.2)

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await echo(scope, receive, send)

    assert asyncio.run(call(Front(late), part()))[0] == 504


def test_a_message_about_a_long_value_is_short() -> None:
    for value in ("x" * 2**20, [1] * 2**20, {str(key): key for key in range(1000)}, [[[["x" * 99] * 9] * 9] * 9]):
        assert len(shorten(value)) <= 80
    assert shorten([1, "a"]) == "[1, 'a']"
