"""Requests from any thread -> one decoder in a thread of its own: continuous batching.

A request's rows (its choices) wait in order of arrival until the decoder has a row and pages for them, join it between
two denoising steps, and leave it as each finishes or when the request is cancelled.
"""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from dtrpo_ray.decode.decoder import Decoder
from dtrpo_ray.decode.types import DecoderEvent, Generation, SamplingParams
from dtrpo_ray.models.base import DiffusionLM

logger = logging.getLogger(__name__)

Delivery = list[tuple[int, DecoderEvent]] | Exception
Emit = Callable[[Delivery], object]


@dataclass(slots=True, eq=False)
class Ticket:
    """A request in a batcher. The decoding thread calls `emit` with (row, event) pairs, the last of them a `Generation`
    for each row, or with the failure that ended the request."""

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    seeds: Sequence[int]
    emit: Emit
    watch: bool = False  # emit each denoising step too
    keys: set[Hashable] = field(default_factory=set)  # of its rows in the decoder
    cancelled: bool = False


class Batcher:
    """The decoding thread of one model: at most `max_rows` rows and `max_pages` pages of keys and values."""

    def __init__(self, model: DiffusionLM, max_rows: int, max_pages: int, num_tokens: int | None = None) -> None:
        self.new_decoder = lambda: Decoder(model, max_rows, max_pages, num_tokens)
        self.decoder = self.new_decoder()
        self.counters = self.decoder.counters  # since the start
        self.keys = itertools.count()
        self.owner: dict[Hashable, tuple[Ticket, int]] = {}
        self.waiting: deque[tuple[Ticket, int]] = deque()
        self.arrived: list[Ticket] = []
        self.dropped: list[Ticket] = []
        self.closing = False
        self.changed = threading.Condition()
        self._start()

    def _start(self) -> None:
        self.ended = False
        self.thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self.thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queue a request, one row per prompt."""
        with self.changed:
            self.arrived.append(ticket)
            if self.ended:
                self._start()
            self.changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Free what a request holds before the next denoising step; nothing more is emitted."""
        with self.changed:
            self.dropped.append(ticket)
            self.changed.notify()

    def close(self) -> None:
        """End the thread once everything submitted has finished, without waiting for that.

        A request that is submitted later is still answered: it starts the thread again until it has finished.
        """
        with self.changed:
            self.closing = True
            self.changed.notify()

    @property
    def num_running(self) -> int:
        return self.decoder.num_running

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def _run(self) -> None:
        while True:
            with self.changed:
                busy = self.waiting or self.decoder.num_running
                if not (busy or self.arrived or self.dropped):
                    if self.closing:
                        self.ended = True
                        return
                    self.changed.wait()
                arrived, self.arrived = self.arrived, []
                dropped, self.dropped = self.dropped, []
            self.waiting.extend((ticket, row) for ticket in arrived for row in range(len(ticket.prompts)))
            for ticket in dropped:
                self._drop(ticket)
            try:
                self._admit()
                self._deliver(self.decoder.step() if self.decoder.num_running else [])
            except Exception as error:  # the thread serves all requests, so it must survive any failure
                self._fail(error)

    def _admit(self) -> None:
        while self.waiting:
            ticket, row = self.waiting[0]
            if not ticket.cancelled:
                key = next(self.keys)
                if not self.decoder.admit(key, ticket.prompts[row], ticket.params, ticket.seeds[row], ticket.watch):
                    if self.decoder.num_running:
                        return
                    raise RuntimeError("an empty decoder has no room for this request")
                self.owner[key] = (ticket, row)
                ticket.keys.add(key)
            self.waiting.popleft()

    def _deliver(self, events: Sequence[tuple[Hashable, DecoderEvent]]) -> None:
        by_ticket: dict[Ticket, list[tuple[int, DecoderEvent]]] = {}
        for key, event in events:
            ticket, row = self.owner[key]
            if isinstance(event, Generation):
                del self.owner[key]
                ticket.keys.discard(key)
            by_ticket.setdefault(ticket, []).append((row, event))
        for ticket, mine in by_ticket.items():
            if not ticket.cancelled:
                _emit(ticket, mine)

    def _drop(self, ticket: Ticket) -> None:
        ticket.cancelled = True
        for key in ticket.keys:
            self.decoder.cancel(key)
            del self.owner[key]
        ticket.keys.clear()

    def _fail(self, error: Exception) -> None:
        """Emit the failure to all running and waiting requests, and start over with an empty decoder."""
        logger.exception("decoding failed")
        tickets = dict.fromkeys(ticket for ticket, _ in [*self.owner.values(), *self.waiting])
        self.owner.clear()
        self.waiting.clear()
        self.decoder = self.new_decoder()
        self.decoder.counters = self.counters
        for ticket in tickets:
            if not ticket.cancelled:
                ticket.cancelled = True
                ticket.keys.clear()
                _emit(ticket, error)


def _emit(ticket: Ticket, message: Delivery) -> None:
    try:
        ticket.emit(message)
    except RuntimeError:  # the listening event loop is closed
        ticket.cancelled = True
