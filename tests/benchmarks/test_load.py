"""The load benchmark: every answer is counted as what it was, and the page shows all of them."""

import asyncio

import httpx
import pytest

from benchmarks import load

pytestmark = pytest.mark.extra

DONE = 'data: {"choices": []}\n\ndata: [DONE]\n\n'
ANSWERS = {
    "completed": [httpx.Response(200, text="{}"), httpx.Response(200, text=DONE)],
    "429": [httpx.Response(429, headers={"Retry-After": "0"})],
    "504": [httpx.Response(504)],
    "ended by an error": [httpx.Response(200, text='data: {"error": {}}\n\ndata: [DONE]\n\n')],
    "cut off": [httpx.Response(200, text='data: {"choices": []}\n\n')],
}


def test_an_answer_counts_as_what_it_was() -> None:
    async def run(answer: httpx.Response) -> load.Outcomes:
        outcomes = load.Outcomes()
        transport = httpx.MockTransport(lambda _: answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            await load.ask(client, {"stream": "data" in answer.text}, outcomes)
        return outcomes

    for name, answers in ANSWERS.items():
        for answer in answers:
            found = asyncio.run(run(answer))
            assert found.counts == {name: 1}
            assert len(found.seconds) == (name == "completed")


def test_the_page_has_a_row_for_every_crowd() -> None:
    row = {"stream": True, "completed": 7, "refused_429": 2, "hung": 0, "status_5xx": 1, "other": {}, "p50_s": 0.5}
    row |= {"p99_s": None, "memory_before_mb": {"replica": 600.0}, "memory_after_mb": {"replica": 601.0}}
    fair = {"alone_p50_s": 0.1, "beside_p50_s": 0.2, "ratio": 2.0, "huge_decoded_throughout": True}
    value = {"hidden_size": 64, "layers": 2, "machine": "2 cores", "busy": 1.0, "seconds": 10.0}
    page = load.text(value | {"small_beside_huge": fair, "loads": [row | {"clients": clients} for clients in (1, 8)]})
    assert "**2.0 times**" in page
    assert "| 8 | streamed | 7 | 2 | 1 | 0 | 0 | 0.50 s | - | 600 -> 601 | 0 -> 0 |" in page
