"""batcher: one thread serves many, each request its share, and one failure ends nothing but what it met."""

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
from dtrpo_ray.serve.batcher import MOST_PASSED, SHARES, Batcher, Ticket

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


# --- fairness ----------------------------------------------------------------------------------------------------


class Record:
    """Runs a batcher in this thread, and writes down which rows start and which tokens each step runs."""

    def __init__(self, batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batcher, self.names = batcher, dict[Ticket, str]()
        self.started, self.steps, self.done = list[str](), list[dict[str, int]](), list[str]()
        batcher.thread = threading.current_thread()
        admit, step, decoder = batcher.decoder.admit, batcher.decoder.step, batcher.decoder

        def record_admit(key: Any, *rest: Any) -> bool:
            if admitted := admit(key, *rest):
                self.started.append(f"{self.names[key[0]]}{key[1]}")
            return admitted

        def record_step(keys: Any) -> Any:
            tokens: dict[str, int] = {}
            for key in keys:
                tokens[self.names[key[0]]] = tokens.get(self.names[key[0]], 0) + decoder.cost(key)
            self.steps.append(tokens)
            events = step(keys)
            self.done += [f"{self.names[key[0]]}{key[1]}" for key, event in events if isinstance(event, Generation)]
            return events

        monkeypatch.setattr(decoder, "admit", record_admit)
        monkeypatch.setattr(decoder, "step", record_step)

    def submit(self, name: str, prompts: list[list[int]], most: int = 12) -> Ticket:
        params = SamplingParams(max_new_tokens=most, denoising_steps=2, ignore_eos=True)
        ticket = Ticket(prompts, params, range(len(prompts)), lambda _: None)
        self.names[ticket] = name
        self.batcher.submit(ticket)
        return ticket

    def run(self, steps: int) -> None:
        """Run so many rounds of the batcher's loop."""
        for _ in range(steps):
            self.batcher._drop_cancelled()
            self.batcher._admit()
            for (ticket, row), event in self.batcher.decoder.step(self.batcher._turn()):
                if isinstance(event, Generation):
                    self.batcher._left(ticket, row)


def test_rows_start_in_turns_and_leave_half_of_the_room(tiny: SDAR, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request gets its first row before any gets a further one, and one request never holds more than is free."""
    record = Record(batcher_of(tiny, 8), monkeypatch)
    record.submit("H", [[1, 2]] * 16)
    record.run(1)
    assert record.started == ["H0", "H1", "H2", "H3"]
    for name in "ab":
        record.submit(name, [[3], [4], [5]])
    record.run(1)
    assert record.started[4:] == ["a0", "b0", "a1"]
    record.submit("c", [[6]])
    record.run(1)
    assert record.started[7:] == ["c0"]


def test_many_choices_do_not_lengthen_the_steps_of_another(tiny: SDAR, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small request runs in every step from its first to its last, beside at most a share of the large one's."""
    batcher = batcher_of(tiny, 64, 40_000)
    monkeypatch.setattr(batcher, "step_tokens", 64)
    record = Record(batcher, monkeypatch)
    record.submit("H", [[place] for place in range(20)], most=200)
    record.run(2)
    assert [step["H"] for step in record.steps] == [64, 64]  # alone it has all of a step
    for name in "abc":
        first = len(record.steps)
        ticket = record.submit(name, [[7]])
        while f"{name}0" not in record.done:
            record.run(1)
            assert ticket.credit == 0  # what it had no use for is not saved up
        mine = record.steps[first:]
        assert all(step[name] and step["H"] < 64 // SHARES + 8 for step in mine)
        assert len(mine) == 8  # 4 blocks of 2 steps
    record.run(1)
    assert record.steps[-1]["H"] > 32


def test_a_share_is_used_up_and_what_is_left_over_is_owed(tiny: SDAR, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows cost 4 or 8 tokens: in each step a request runs at most what its share and its credit pay for."""
    batcher = batcher_of(tiny, 32, 4000)
    monkeypatch.setattr(batcher, "step_tokens", 12 * SHARES)
    record = Record(batcher, monkeypatch)
    for name in "HI":
        record.submit(name, [[place] for place in range(10)], most=200)
    record.run(30)
    for name in "HI":
        totals = [sum(step.get(name, 0) for step in record.steps[:count]) for count in range(1, 31)]
        assert all(12 * count - 8 < total <= 12 * count for count, total in enumerate(totals, 1))


def test_long_prompts_are_read_in_turns(tiny: SDAR, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small request runs in every step while a long prompt is read, a share at a time, and ends before it."""
    batcher = batcher_of(tiny, 8, 1000)
    monkeypatch.setattr(batcher, "step_tokens", 64)
    record = Record(batcher, monkeypatch)
    record.submit("L", [[place % 20 for place in range(300)]])
    record.submit("a", [[1, 2]])
    record.run(8)
    assert record.done == ["a0"]
    assert [step["L"] for step in record.steps] == [64 // SHARES] * 8
    while "L0" not in record.done:
        record.run(1)
    assert len(record.steps) == 8 + 3 + 6  # alone it has all of a step: 236 tokens in 4, the last of them also decodes


def test_a_request_with_too_few_free_pages_is_not_passed_for_ever(tiny: SDAR, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = batcher_of(tiny, 8, 64)
    pages = batcher.decoder.pool
    record = Record(batcher, monkeypatch)
    record.submit("a", [[1]])
    record.run(1)
    long = len(pages.idle) * tiny.block_size
    record.submit("L", [[2] * (long - 8)], most=9)  # one page more than is free
    names = iter(f"s{number}_" for number in range(100))
    while "L0" not in record.started:
        if len(batcher.waiting) < 3:
            record.submit(next(names), [[3]])
        record.run(1)
    before = record.started.index("L0")
    assert MOST_PASSED <= before <= MOST_PASSED + 10


def test_a_request_that_was_passed_and_runs_blocks_nobody(tiny: SDAR, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first row starts after others passed it often; its second has to wait, and others start meanwhile."""
    batcher = batcher_of(tiny, 8, 64)
    record = Record(batcher, monkeypatch)
    record.submit("a", [[1]], most=40)
    record.run(1)
    half = len(batcher.decoder.pool.idle) // 2 * tiny.block_size
    ticket = record.submit("L", [[2] * half] * 2, most=9)
    ticket.passed = MOST_PASSED
    record.run(1)
    record.submit("b", [[3]])
    record.run(1)
    assert record.started == ["a0", "L0", "b0"]


def test_a_request_cancelled_while_it_waits_blocks_nobody(tiny: SDAR, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = batcher_of(tiny, 8, 64)
    record = Record(batcher, monkeypatch)
    record.submit("a", [[1]], most=40)
    record.run(1)
    ticket = record.submit("L", [[2] * (len(batcher.decoder.pool.idle) * tiny.block_size - 8)], most=9)
    record.run(1)
    ticket.passed = MOST_PASSED
    record.submit("b", [[3]])
    record.run(1)
    assert record.started == ["a0"]
    ticket.cancelled = True
    record.run(1)
    assert record.started == ["a0", "b0"]


def test_steps_of_some_rows_give_what_all_steps_give(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns and shorter reads of a prompt change the order of the work, and no response."""
    model = make_model(exact=True)
    prompts = [[place % 7 for place in range(200)], [1, 2, 3], *[[place % 5 for place in range(61)]] * 4]
    expected = [[g.ids for g in decode_all(model, [prompt], PARAMS, [5])] for prompt in prompts]
    batcher = batcher_of(model, 3, 1000)
    monkeypatch.setattr(batcher, "step_tokens", 24)
    inboxes = [Inbox() for _ in prompts]
    for prompt, inbox in zip(prompts, inboxes, strict=True):
        batcher.submit(Ticket([prompt], PARAMS, [5], inbox.queue.put))
    assert [[inbox.rest(1)[0]] for inbox in inboxes] == expected
