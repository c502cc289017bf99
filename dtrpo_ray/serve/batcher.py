"""Requests from any thread -> one decoder in a thread of its own: continuous batching, fair between requests.

A request's rows (its choices) wait until the decoder has a row and pages for them, join it between two denoising
steps, and leave it as each finishes or when the request is cancelled. The request with the fewest running rows comes
next, and one request takes at most half of what is free, so there is room for the next to come. The requests that run
share the steps by deficit round robin (Shreedhar and Varghese 1996), in tokens: many choices or a long prompt take as
many steps as they need, and do not lengthen those of others.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from dtrpo_ray.decode.decoder import PREFILL_TOKENS, Decoder, pages_needed
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import DecoderEvent, Generation, SamplingParams

logger = logging.getLogger(__name__)

# tokens of a step, after which requests that came meanwhile may join: about where wider passes gain no throughput
STEP_TOKENS = {"cpu": 512, "cuda": 4096}
SHARES = 8  # a request gets one of so many parts of a step while others run
MOST_PASSED = 32  # rows of others that may start before a request whose prompt has too few free pages

Delivery = list[tuple[int, DecoderEvent]] | Exception


@dataclass(slots=True, eq=False)
class Ticket:
    """A request in a batcher. The decoding thread calls `emit` with (row, event) pairs, the last of them a `Generation`
    for each row, or with the failure that ended the request. Once `cancelled` is set, by any thread, what it holds is
    freed before the next denoising step, and nothing more is emitted."""

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    seeds: Sequence[int]
    emit: Callable[[Delivery], object]
    watch: bool = False  # emit each denoising step too
    cancelled: bool = False
    credit: int = 0  # tokens that it may still run in its turn
    passed: int = 0  # rows of others that started while it could not


class Batcher:
    """An engine and its decoding thread, which runs while there are rows: at most `max_rows` of them side by side.

    `max_tokens` bounds the keys and values that are kept.
    """

    def __init__(self, engine: Engine, max_rows: int, max_tokens: int) -> None:
        longest = max(max_tokens, engine.context_tokens)  # one request of the whole context must fit
        pages = longest // engine.model.block_size
        self.engine = engine
        self.new_decoder = lambda: Decoder[tuple[Ticket, int]](engine.model, max_rows, pages, engine.num_tokens)
        self.decoder = self.new_decoder()
        self.counters = self.decoder.counters  # since the start
        self.step_tokens = STEP_TOKENS.get(self.decoder.device.type, STEP_TOKENS["cuda"])
        self.waiting: dict[Ticket, deque[int]] = {}  # rows to start, in order of arrival
        self.running: dict[Ticket, deque[int]] = {}  # rows in the decoder; requests and rows in order of their turns
        self.refused: set[Ticket] = set()  # had no room, and nothing has left since
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()  # of `waiting` and `thread`

    @property
    def num_running(self) -> int:
        return len(self.decoder.rows)

    @property
    def num_waiting(self) -> int:
        return sum(map(len, list(self.waiting.values())))

    def submit(self, ticket: Ticket) -> None:
        """Queue a request, one row per prompt."""
        with self.lock:
            self.waiting[ticket] = deque(range(len(ticket.prompts)))
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="decode", daemon=True)
                self.thread.start()

    def _run(self) -> None:
        while self._has_rows():
            try:
                self._drop_cancelled()
                self._admit()
                events = self.decoder.step(self._turn())
                for (ticket, row), event in events:
                    if isinstance(event, Generation):
                        self._left(ticket, row)
                self._deliver(events)
            except Exception as error:  # the thread serves all requests, so it must survive any failure
                self._fail(error)

    def _has_rows(self) -> bool:
        with self.lock:
            if not (self.waiting or self.decoder.rows):
                self.thread = None
            return self.thread is not None

    # --- rows come and go ---

    def _drop_cancelled(self) -> None:
        with self.lock:
            for ticket in [ticket for ticket in self.waiting if ticket.cancelled]:
                del self.waiting[ticket]
                self.refused.discard(ticket)
        for ticket, row in [key for key in self.decoder.rows if key[0].cancelled]:
            self.decoder.cancel((ticket, row))
            self._left(ticket, row)

    def _left(self, ticket: Ticket, row: int) -> None:
        self.running[ticket].remove(row)
        if not self.running[ticket]:
            del self.running[ticket]
        self.refused.clear()

    def _admit(self) -> None:
        """Start rows while there is room, always of the request with the fewest running."""
        with self.lock:
            waiting = [ticket for ticket in self.waiting if ticket not in self.refused]
        while waiting and not any(each.passed >= MOST_PASSED for each in self.refused if not self.running.get(each)):
            ticket = min(waiting, key=lambda each: len(self.running.get(each, ())))
            if not self._start(ticket):
                self.refused.add(ticket)
                waiting.remove(ticket)
            elif not self.waiting[ticket]:
                waiting.remove(ticket)
                with self.lock:
                    del self.waiting[ticket]
        if self.refused and not self.decoder.rows:
            raise RuntimeError("an empty decoder has no room for this request")

    def _start(self, ticket: Ticket) -> bool:
        """Start the next row of a request; False if there is no room for it."""
        row, held = self.waiting[ticket][0], self.running.get(ticket)
        prompt = ticket.prompts[row]
        if held and not self._leaves_half(ticket, len(prompt)):
            return False
        if not self.decoder.admit((ticket, row), prompt, ticket.params, ticket.seeds[row], ticket.watch):
            return False
        self.waiting[ticket].popleft()
        ticket.passed = 0
        self.running.setdefault(ticket, deque()).append(row)
        for other in self.refused:
            other.passed += not self.running.get(other)
        return True

    def _leaves_half(self, ticket: Ticket, prompt_len: int) -> bool:
        """Return True if a further row leaves as many rows and pages free as the request then holds."""
        rows, decoder = self.running[ticket], self.decoder
        pages = sum(len(decoder.rows[ticket, row].pages) for row in rows)
        needed = pages_needed(self.engine.model, prompt_len, ticket.params.max_new_tokens)
        return len(rows) < len(decoder.slots) and pages + needed <= len(decoder.pool.idle)

    # --- steps ---

    def _turn(self) -> list[tuple[Ticket, int]]:
        """Return the rows of the next step."""
        alone = len(self.running) == 1
        share = self.step_tokens if alone else self.step_tokens // SHARES
        self.decoder.prefill_tokens = min(share, PREFILL_TOKENS)
        chosen: list[tuple[Ticket, int]] = []
        while not chosen and self.running:
            room = self.step_tokens
            for ticket in list(self.running):
                if room <= 0:
                    break
                ticket.credit += share
                rows = self._affordable(ticket)
                room -= sum(cost for _, cost in rows)
                chosen += [(ticket, row) for row, _ in rows]
                self.running[ticket] = self.running.pop(ticket)  # to the end
        return chosen

    def _affordable(self, ticket: Ticket) -> list[tuple[int, int]]:
        """Return (row, tokens) of the rows in turn that a request's credit pays for, and charge it."""
        rows, chosen = self.running[ticket], list[tuple[int, int]]()
        for _ in range(len(rows)):
            cost = self.decoder.cost((ticket, rows[0]))
            if cost is not None:
                if cost > ticket.credit:
                    return chosen
                ticket.credit -= cost
                chosen.append((rows[0], cost))
            rows.rotate(-1)
        ticket.credit = 0  # what it has no use for is not saved up
        return chosen

    def _deliver(self, events: Sequence[tuple[tuple[Ticket, int], DecoderEvent]]) -> None:
        by_ticket: dict[Ticket, list[tuple[int, DecoderEvent]]] = {}
        for (ticket, row), event in events:
            by_ticket.setdefault(ticket, []).append((row, event))
        for ticket, mine in by_ticket.items():
            _emit(ticket, mine)

    def _fail(self, error: Exception) -> None:
        """Emit the failure to all running and waiting requests, and start over with an empty decoder."""
        logger.exception("decoding failed")
        with self.lock:
            tickets = dict.fromkeys(chain(self.running, self.waiting))
            self.waiting.clear()
        self.running.clear()
        self.refused.clear()
        self.decoder = self.new_decoder()
        self.decoder.counters = self.counters
        for ticket in tickets:
            _emit(ticket, error)


def _emit(ticket: Ticket, message: Delivery) -> None:
    if not ticket.cancelled:
        try:
            ticket.emit(message)
        except RuntimeError:  # the listening event loop is closed
            ticket.cancelled = True
