"""What stands in front of Ray Serve's queue, beside apps that never answer, break off, or count what reaches them."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dtrpo_ray.serve import middleware
from dtrpo_ray.serve.middleware import MAX_BODY_BYTES, Front, front

SCOPE: Scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
START: Message = {"type": "http.response.start", "status": 200, "headers": [[b"content-type", b"text/event-stream"]]}


class Inside:
    """An app that keeps what reaches it, then does `work`."""

    def __init__(self, work: Callable[[Receive, Send], Coroutine[Any, Any, None]]) -> None:
        self.work, self.headers, self.cancelled = work, list[Any](), False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers.append(scope["headers"])
        try:
            await self.work(receive, send)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def echo(receive: Receive, send: Send) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def hang(receive: Receive, send: Send) -> None:
    await asyncio.Event().wait()


async def begin_and_hang(receive: Receive, send: Send) -> None:
    await send(START)
    await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
    await asyncio.Event().wait()


async def begin_and_end(receive: Receive, send: Send) -> None:
    await send(START)
    await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})


async def call(app: ASGIApp, *parts: Message, headers: Any = ()) -> tuple[int, list[bytes]]:
    """Send parts of a body, and nothing after them; return the status (0 for none) and the parts of the answer."""
    asked, sent = iter(parts), list[Message]()

    async def receive() -> Message:
        return next(asked, None) or await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: Message) -> None:
        sent.append(message)

    await asyncio.wait_for(app({**SCOPE, "headers": [*headers]}, receive, send), 10)
    await asyncio.sleep(0.02)  # for what is sent too late
    if sent:
        assert not sent[-1].get("more_body", False)  # the server may close the connection in order
    return sum(m.get("status", 0) for m in sent), [m["body"] for m in sent if m["type"] == "http.response.body"]


def part(body: bytes = b"", more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def code_of(body: bytes) -> str:
    return str(json.loads(body.removeprefix(b"data: "))["error"]["code"])


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(middleware, "FRONT_SECONDS", 0.3)


def test_a_body_is_read_whole_before_serve_knows_of_it() -> None:
    """300 clients that send one byte each reach nobody, and another is answered meanwhile."""
    inside = Inside(echo)
    app = Front(inside)

    async def run() -> None:
        slow = [asyncio.ensure_future(call(app, part(b"{", more=True))) for _ in range(300)]
        await asyncio.sleep(0.05)
        assert (app.held_bytes, inside.headers) == (300, [])
        assert await call(app, part(b"ab", more=True), part(b"c")) == (200, [b"abc"])
        assert {(status, code_of(body)) for status, (body,) in await asyncio.gather(*slow)} == {(408, "body_too_slow")}
        assert app.held_bytes == 0

    asyncio.run(run())
    assert len(inside.headers) == 1


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ([part(b" " * (MAX_BODY_BYTES + 1))], 413, "body_too_large"),
        ([part(b" " * 2**19, more=True)] * 3, 413, "body_too_large"),
        ([part(b"1234", more=True), part(b"5")], 503, "busy"),
    ],
)
def test_bodies_are_bounded_one_by_one_and_all_together(
    parts: list[Message], status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code == "busy":
        monkeypatch.setattr(middleware, "MAX_HELD_BYTES", 4)
    inside = Inside(echo)
    app = Front(inside)
    found, (body,) = asyncio.run(call(app, *parts))
    assert (found, code_of(body), inside.headers, app.held_bytes) == (status, code, [], 0)


def test_a_client_that_hangs_up_before_its_body_ends_reaches_nobody() -> None:
    inside = Inside(echo)
    gone = call(Front(inside), part(b"{", more=True), {"type": "http.disconnect"})
    assert (asyncio.run(gone), inside.headers) == ((0, []), [])


def test_serve_is_told_no_limits_by_a_client() -> None:
    """Serve would let the client switch off its time limit, or its notice of a hang-up."""
    inside = Inside(echo)
    kept, *dropped = ((name, b"0") for name in (b"accept", b"x-request-timeout-seconds", b"x-request-disconnect-disabled"))
    assert asyncio.run(call(Front(inside), part(), headers=[*dropped, kept]))[0] == 200
    assert inside.headers == [[kept]]


def test_a_request_that_nobody_answers_gets_its_504() -> None:
    inside = Inside(hang)
    status, (body,) = asyncio.run(call(Front(inside), part()))
    assert (status, code_of(body), inside.cancelled) == (504, "deadline", True)


@pytest.mark.parametrize(("work", "code"), [(begin_and_hang, "deadline"), (begin_and_end, "None")])
def test_a_stream_that_is_not_ended_ends_with_an_error(work: Any, code: str) -> None:
    status, (first, last) = asyncio.run(call(Front(Inside(work)), part()))
    assert (status, first, code_of(last)) == (200, b"data: 1\n\n", code)


def test_nothing_is_sent_after_the_answer_was_ended() -> None:
    async def begin_late(receive: Receive, send: Send) -> None:
        try:
            await hang(receive, send)
        finally:
            await echo(receive, send)

    assert asyncio.run(call(Front(Inside(begin_late)), part()))[0] == 504


def test_serve_finds_the_front_by_its_name() -> None:
    ((_, path),) = middleware.FRONT_VARIABLE.items()
    module, _, name = path.partition(":")
    assert (module, name) == (front.__module__, front.__name__)
    assert [made.cls for made in front()] == [Front]
