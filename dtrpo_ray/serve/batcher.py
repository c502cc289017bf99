"""Requests from any thread -> one decoder in a thread of its own: continuous batching.

A request's rows (its choices) wait in order of arrival until the decoder has a row and pages for them, join it between
two denoising steps, and leave it as each finishes or when the request is cancelled.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dtrpo_ray.decode.decoder import Decoder
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import DecoderEvent, SamplingParams

logger = logging.getLogger(__name__)

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
        self.waiting: deque[tuple[Ticket, int]] = deque()
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()  # of the two above

    @property
    def num_running(self) -> int:
        return len(self.decoder.rows)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def submit(self, ticket: Ticket) -> None:
        """Queue a request, one row per prompt."""
        with self.lock:
            self.waiting.extend((ticket, row) for row in range(len(ticket.prompts)))
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="decode", daemon=True)
                self.thread.start()

    def _run(self) -> None:
        while self._has_rows():
            try:
                for key in [key for key in self.decoder.rows if key[0].cancelled]:
                    self.decoder.cancel(key)
                self._admit()
                self._deliver(self.decoder.step())
            except Exception as error:  # the thread serves all requests, so it must survive any failure
                self._fail(error)

    def _has_rows(self) -> bool:
        with self.lock:
            if not (self.waiting or self.decoder.rows):
                self.thread = None
            return self.thread is not None

    def _admit(self) -> None:
        while self.waiting:
            ticket, row = key = self.waiting[0]
            prompt, seed = ticket.prompts[row], ticket.seeds[row]
            if not (ticket.cancelled or self.decoder.admit(key, prompt, ticket.params, seed, ticket.watch)):
                if self.decoder.rows:
                    return
                raise RuntimeError("an empty decoder has no room for this request")
            self.waiting.popleft()

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
            tickets = dict.fromkeys(ticket for ticket, _ in [*self.decoder.rows, *self.waiting])
            self.waiting.clear()
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
