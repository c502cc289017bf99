"""batcher: one thread serves many, in order of arrival, and one failure ends nothing but what it met."""

import threading
import time
import weakref
from collections.abc import Callable
from queue import Queue
from string import ascii_letters
from typing import Any

import pytest
from torch import Tensor

from dtrpo_ray.decode.decoder import decode_all
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import DecoderEvent, Generation, SamplingParams
from dtrpo_ray.models.sdar import SDAR
from dtrpo_ray.models.tokenizer import character_tokenizer
from dtrpo_ray.serve.batcher import Batcher, Ticket

MakeModel = Callable[..., SDAR]
PARAMS = SamplingParams(max_new_tokens=14, denoising_steps=2, temperature=0.8, ignore_eos=True)


class Gated(SDAR):
    """Each forward takes a permit; `fail` breaks the next one."""

    permits: threading.Semaphore
    fail: bool

    def hidden(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self.permits.acquire(timeout=30)
        if self.fail:
            self.fail = False
            raise ValueError("broken")
        return super().hidden(*args, **kwargs)


@pytest.fixture
def gated(tiny_config: dict[str, Any]) -> Gated:
    model = Gated(dict(tiny_config)).eval().requires_grad_(False)
    model.permits, model.fail = threading.Semaphore(0), False
    return model


def batcher_of(model: SDAR, max_rows: int, max_tokens: int = 400) -> Batcher:
    return Batcher(Engine(model, character_tokenizer(ascii_letters[:21])), max_rows, max_tokens)


def wait_for_end(batcher: Batcher) -> None:
    if thread := batcher.thread:
        thread.join(10)
    assert batcher.thread is None


class Inbox:
    """What one request is told."""

    def __init__(self) -> None:
        self.queue: Queue[list[tuple[int, DecoderEvent]] | Exception] = Queue()

    def rest(self, rows: int) -> dict[int, list[int]]:
        """Responses of all rows, once they have finished."""
        done: dict[int, list[int]] = {}
        while len(done) < rows:
            events = self.queue.get(timeout=60)
            assert not isinstance(events, Exception)
            done |= {row: event.ids for row, event in events if isinstance(event, Generation)}
        return done


def test_requests_of_many_threads_get_their_own_answers(tiny: SDAR) -> None:
    batcher = batcher_of(tiny, 3, 48)
    inboxes = [Inbox() for _ in range(6)]
    prompts = [[i, 2 * i, 3] for i in range(6)]

    def submit(i: int) -> None:
        batcher.submit(Ticket([prompts[i]] * 2, PARAMS, [i, i + 50], inboxes[i].queue.put))

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for i, inbox in enumerate(inboxes):
        expected = decode_all(tiny, [prompts[i]] * 2, PARAMS, [i, i + 50])
        assert inbox.rest(2) == {row: g.ids for row, g in enumerate(expected)}
    wait_for_end(batcher)


def test_a_cancelled_request_leaves_at_the_next_step(gated: Gated) -> None:
    """One row decodes, another waits for its place; cancelled during a forward, the first gets no step after it."""
    batcher = batcher_of(gated, 1)
    first, second = Inbox(), Inbox()
    ticket = Ticket([[1, 2]], PARAMS, [0], first.queue.put)
    batcher.submit(ticket)
    batcher.submit(
        Ticket([[3]], SamplingParams(max_new_tokens=3, denoising_steps=1, ignore_eos=True), [0], second.queue.put)
    )
    gated.permits.release()
    while not batcher.counters.denoising_steps:
        time.sleep(0.01)
    ticket.cancelled = True
    for _ in range(2):  # the forward that may have begun, and the other's only one
        gated.permits.release()
    assert list(second.rest(1)) == [0]
    assert batcher.counters.denoising_steps <= 3


def test_a_failure_is_told_and_the_thread_lives_on(gated: Gated) -> None:
    batcher = batcher_of(gated, 4)
    gated.fail = True
    gated.permits.release(99)
    inbox = Inbox()
    batcher.submit(Ticket([[1]], PARAMS, [0], inbox.queue.put))
    assert isinstance(inbox.queue.get(timeout=30), ValueError)
    batcher.submit(Ticket([[1]], PARAMS, [0], inbox.queue.put))
    assert list(inbox.rest(1)) == [0]


def test_the_thread_ends_with_the_last_request_and_starts_with_the_next(tiny: SDAR) -> None:
    """Nothing but its requests holds a model that was swapped, and a request for it that was still read is answered."""
    batcher = batcher_of(tiny, 4)
    for _ in range(2):
        inbox = Inbox()
        batcher.submit(Ticket([[1]], PARAMS, [0], inbox.queue.put))
        assert list(inbox.rest(1)) == [0]
        wait_for_end(batcher)
    gone = weakref.ref(batcher)
    del batcher
    for _ in range(100):
        if gone() is None:
            break
        time.sleep(0.05)
    assert gone() is None
