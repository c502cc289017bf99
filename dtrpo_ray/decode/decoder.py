"""Block-wise denoising, one step at a time: requests join and leave between any two denoising steps, whatever their
lengths, schedules and seeds. One engine for rollout, evaluation and serving.

One rule drives a block-causal pass: it runs a request's tokens from the first one without keys to the end of its
current block. So the pass over a prompt, and the pass that commits a finished block, is also the first denoising step
of the next block. Full-attention models have no exact cache: each of their passes runs the whole canvas.
Legend: R rows of a pass, B tokens of a block, T tokens of a pass's row, N masked positions, V vocabulary.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dtrpo_ray.config.decode import POLICIES as AMOUNT_FIELDS
from dtrpo_ray.config.decode import STEPS
from dtrpo_ray.decode.cache import SCRATCH, PagedKeys, PagePool, block_digests
from dtrpo_ray.decode.policies import POLICIES, Candidates, apply_policy
from dtrpo_ray.decode.proposal import Draw, Proposal, propose
from dtrpo_ray.decode.types import (
    Alternatives,
    Committed,
    Counters,
    DecoderEvent,
    Generation,
    SamplingParams,
    Unmasked,
)
from dtrpo_ray.errors import DataError
from dtrpo_ray.method.trajectory import GIVEN, NEVER
from dtrpo_ray.models.base import DiffusionLM

MAX_PASS_TOKENS = 8192  # of one forward, all rows together
PREFILL_TOKENS = 1024  # of one prompt in one forward: its neighbours wait no longer than for these

Reports = list[tuple[Hashable, DecoderEvent]]


@dataclass(slots=True)
class _Row:
    """A running request: its current block begins at `start`; `cached` is its first token without keys."""

    key: Hashable
    params: SamplingParams
    rng: np.random.Generator
    watch: bool
    prompt_len: int
    block: int
    small: int
    start: int
    end: int
    stops: frozenset[int]
    cached: int = 0
    forwards: int = 0
    block_steps: int = 0
    pages: list[int] = field(default_factory=list)
    published: int = 0  # number of first pages whose content the pool knows
    waiting: list[int] = field(default_factory=list)  # shared pages that their first holder has yet to fill
    top: dict[int, Alternatives] = field(default_factory=dict)
    response: list[Committed] = field(default_factory=list)

    def amount(self) -> float:
        """Return how much the next step unmasks, in the measure of the request's policy."""
        field = AMOUNT_FIELDS[self.params.policy]
        return self.params.denoising_steps - self.block_steps if field == STEPS else getattr(self.params, field)

    def generation(self) -> Generation:
        ids = [token for block in self.response for token in block.ids]
        most = self.params.max_new_tokens
        cut = next((place for place, token in enumerate(ids[:most]) if token in self.stops), most)
        steps = [step for block in self.response for step in block.steps]
        logps = [logp for block in self.response for logp in block.logps]
        return Generation(ids, steps, logps, self.forwards, text_ids=ids[:cut], top=self.top)


def pages_needed(model: DiffusionLM, prompt_len: int, max_new_tokens: int) -> int:
    """Return the pages of a request that shares none; 0 for a model without an exact cache."""
    return -(-(prompt_len + max_new_tokens) // model.block_size) if model.attention == "block" else 0


class Decoder:
    """Decodes at most `max_rows` requests side by side, in at most `max_pages` pages of keys and values.

    `num_tokens` bounds the proposed ids, for a model whose vocabulary is padded.
    """

    def __init__(self, model: DiffusionLM, max_rows: int, max_pages: int, num_tokens: int | None = None) -> None:
        self.model, self.num_tokens = model, num_tokens or model.vocab_size
        self.device = next(model.parameters()).device
        self.caches = model.attention == "block"
        self.opens = self.caches and model.shift == 1  # a block's first token is autoregressive
        self.pool = PagePool(max_pages + 1)
        self.keys = PagedKeys(max_pages + 1, model.block_size)
        self.unfilled: set[int] = set()  # published pages that no pass has filled yet
        self.rows: dict[int, _Row] = {}
        self.slots = list(range(max_rows - 1, -1, -1))
        self.slot_of: dict[Hashable, int] = {}
        self.counters = Counters()
        self.canvas = torch.full((max_rows, 0), model.mask_id, device=self.device)
        self.steps = torch.full((max_rows, 0), NEVER, device=self.device)
        self.logps = torch.zeros((max_rows, 0), device=self.device)
        self.tables = torch.zeros((max_rows, 0), dtype=torch.long, device=self.device)

    @property
    def num_running(self) -> int:
        return len(self.rows)

    def admit(
        self, key: Hashable, prompt: Sequence[int], params: SamplingParams, seed: int, watch: bool = False
    ) -> bool:
        """Start a request under the caller's key; False if no row or too few pages are free. `watch` reports each step.

        Raises DataError for an empty prompt if the model predicts each token from the one before it, and for a
        small_block_size that does not divide the block.
        """
        if self.model.shift and not prompt:
            raise DataError("this model predicts a token from the one before it; give a prompt of at least one token")
        if not self.slots:
            return False
        row = self._row(key, prompt, params, seed, watch)
        if self.caches and not self._take_pages(row, prompt):
            return False
        slot = self.slots.pop()
        self.rows[slot], self.slot_of[key] = row, slot
        self._write(slot, row, prompt)
        self.counters.prompt_tokens += len(prompt)
        self.counters.reused_tokens += row.cached
        return True

    def cancel(self, key: Hashable) -> None:
        """End a request early; an unknown key is no error, since the request may just have finished."""
        if key in self.slot_of:
            self._leave(self.slot_of[key])

    @torch.inference_mode()
    def step(self) -> Reports:
        """Run one pass of every request, a denoising step once its prompt is read; return (key, event) pairs."""
        events: Reports = []
        for slots in self._groups():
            ready = [slot for slot in slots if self._is_ready(self.rows[slot])]
            if ready:
                events += self._run(ready)
        return events

    # --- coming and going ---

    def _row(self, key: Hashable, prompt: Sequence[int], params: SamplingParams, seed: int, watch: bool) -> _Row:
        model, count = self.model, len(prompt)
        block = model.block_size if self.caches else params.block_length or model.block_size
        origin = count if model.block_origin == "response" else 0
        start = origin + (count - origin) // block * block
        end = origin + -(-(count - origin + params.max_new_tokens) // block) * block
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else model.stop_ids)
        small = params.small_block_size or (model.small_block_size if self.caches else block)
        if block % small:
            raise DataError(
                f"small_block_size = {small} does not divide the block of {block} tokens; give one that does"
            )
        rng = np.random.Generator(np.random.Philox(key=seed))
        return _Row(key, params, rng, watch, count, block=block, small=small, start=start, end=end, stops=stops)

    def _take_pages(self, row: _Row, prompt: Sequence[int]) -> bool:
        size = self.model.block_size
        whole = row.start // size
        digests = block_digests(prompt[: row.start], size)
        # an autoregressive first token needs the pass over the block before it
        shared = self.pool.cached_prefix(
            digests[: max(whole - 1, 0)] if row.start == row.prompt_len and self.opens else digests
        )
        fresh = self.pool.acquire(shared, row.end // size - len(shared))
        if fresh is None:
            return False
        row.pages, row.cached, row.published = [*shared, *fresh], len(shared) * size, whole
        row.waiting = [page for page in shared if page in self.unfilled]
        for page, digest in zip(row.pages[len(shared) : whole], digests[len(shared) :], strict=True):
            if self.pool.publish(page, digest):
                self.unfilled.add(page)
        return True

    def _write(self, slot: int, row: _Row, prompt: Sequence[int]) -> None:
        self.canvas = _widen(self.canvas, row.end, self.model.mask_id)
        self.steps, self.logps = _widen(self.steps, row.end, NEVER), _widen(self.logps, row.end, 0)
        self.tables = _widen(self.tables, len(row.pages), 0)
        self.canvas[slot], self.steps[slot], self.logps[slot], self.tables[slot] = self.model.mask_id, NEVER, 0, 0
        self.canvas[slot, : len(prompt)] = torch.tensor(list(prompt), dtype=torch.long, device=self.device)
        self.tables[slot, : len(row.pages)] = torch.tensor(row.pages, dtype=torch.long, device=self.device)

    def _is_ready(self, row: _Row) -> bool:
        row.waiting = [page for page in row.waiting if page in self.unfilled]
        return not row.waiting

    def _leave(self, slot: int) -> None:
        row = self.rows.pop(slot)
        del self.slot_of[row.key]
        self.slots.append(slot)
        if not self.caches:
            return
        size = self.model.block_size
        done = row.cached // size
        for page in row.pages[done : row.published]:
            self._abandon(page)
        if done > row.published:  # publish the response too: the next turn of a chat begins with it
            digests = block_digests(self.canvas[slot, : row.cached].tolist(), size)
            for page, digest in zip(row.pages[row.published : done], digests[row.published :], strict=True):
                self.pool.publish(page, digest)
        self.pool.release(row.pages)

    def _abandon(self, page: int) -> None:
        """Withdraw a published page that will not be filled; requests that wait for it compute it themselves."""
        self.unfilled.discard(page)
        self.pool.retract(page)
        for row in self.rows.values():
            if page in row.waiting:
                row.cached = min(row.cached, row.pages.index(page) * self.model.block_size)
                row.waiting.clear()

    # --- passes ---

    def _groups(self) -> Iterator[list[int]]:
        """Yield the slots of each pass; wide passes first, since others may read what they fill.

        Widths within a pass differ by less than a factor of two, so padding at most doubles it.
        """
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for slot, row in self.rows.items():
            first, last = self._span(row)
            doubling = (-(-(last - first) // row.block) - 1).bit_length()
            groups.setdefault((doubling, row.block), []).append((last - first, slot))
        for key in sorted(groups, reverse=True):
            many = max(1, MAX_PASS_TOKENS // max(width for width, _ in groups[key]))
            slots = [slot for _, slot in groups[key]]
            yield from (slots[at : at + many] for at in range(0, len(slots), many))

    def _span(self, row: _Row) -> tuple[int, int]:
        """Return the tokens [first, last) of the row's next pass."""
        if not self.caches:
            return 0, row.end
        chunk = max(1, PREFILL_TOKENS // row.block) * row.block
        if row.start - row.cached > chunk:
            return row.cached, row.cached + chunk
        return row.cached, row.start if self._must_open(row) else row.start + row.block

    def _must_open(self, row: _Row) -> bool:
        """Return True if a pass that ends before the row's block must give the block's first token."""
        return self.opens and row.start >= row.prompt_len and row.cached < row.start

    def _run(self, slots: list[int]) -> Reports:
        """Run one pass, then a denoising step of the rows whose block it reached."""
        rows = [self.rows[slot] for slot in slots]
        spans = [self._span(row) for row in rows]
        opened = [p for p, row in enumerate(rows) if self._must_open(row) and spans[p][1] == row.start]
        denoised = [p for p, row in enumerate(rows) if spans[p][1] > row.start]
        hidden = self._forward(slots, spans)
        self.counters.passes += 1
        self.counters.pass_tokens += sum(last - first for first, last in spans)
        for row, (_, last) in zip(rows, spans, strict=True):
            if self.caches:
                cached = min(last, row.start)
                self.unfilled.difference_update(row.pages[row.cached // row.block : cached // row.block])
                row.cached = cached
        events: Reports = []
        if opened:
            at = torch.tensor([spans[p][1] - 1 - spans[p][0] for p in opened], device=self.device)
            self._open([slots[p] for p in opened], hidden[opened, at])
        if denoised:
            first = torch.tensor([rows[p].start - spans[p][0] for p in denoised], device=self.device)
            columns = first[:, None] + torch.arange(rows[0].block, device=self.device) - self.model.shift
            places = torch.tensor(denoised, device=self.device)[:, None]
            # column -1 belongs to the prompt, and nothing reads its state
            events = self._denoise([slots[p] for p in denoised], hidden[places, columns.clamp(min=0)])
        return events + self._finish_blocks([slots[p] for p in sorted(opened + denoised)])

    def _forward(self, slots: list[int], spans: list[tuple[int, int]]) -> Tensor:
        """Return the hidden states [R, T, H] of the spans, padded on the right."""
        at = torch.tensor(slots, device=self.device)
        first, last = torch.tensor(spans, device=self.device).T[..., None]
        width = max(end - begin for begin, end in spans)
        positions = first + torch.arange(width, device=self.device)
        inside = positions < last
        positions = torch.minimum(positions, last - 1)
        ids = self.canvas[at[:, None], positions]
        if not self.caches:
            mask = (torch.arange(width, device=self.device) < last)[:, None, None]
            return self.model.hidden(ids, positions, mask.expand(-1, -1, width, -1))
        size = self.model.block_size
        count = max(end for _, end in spans) // size
        table = self.tables[at, :count]
        page = torch.where(inside, table.gather(1, positions // size), SCRATCH)
        self.keys.aim((page * size + positions % size).reshape(-1), table)
        block_end = (positions // size + 1) * size
        mask = torch.arange(count * size, device=self.device) < block_end[..., None]
        return self.model.hidden(ids, positions, mask[:, None], self.keys)

    # --- tokens ---

    def _open(self, slots: list[int], states: Tensor) -> None:
        """Set each block's first token from the state before it [R, H], greedily at any temperature (Fast-dLLM v2)."""
        rows = [self.rows[slot] for slot in slots]
        found = propose(self.model, states, None, self.num_tokens, max(row.params.top_logprobs for row in rows))
        at = (torch.tensor(slots, device=self.device), torch.tensor([row.start for row in rows], device=self.device))
        self.canvas[at], self.logps[at], self.steps[at] = found.tokens, found.logps.float(), GIVEN
        whole = found.scatter(torch.ones((len(rows), 1), dtype=torch.bool, device=self.device))
        for number, row in enumerate(rows):
            if row.params.top_logprobs:
                row.top[row.start - row.prompt_len] = whole.alternatives(number, 0, row.params.top_logprobs)

    def _denoise(self, slots: list[int], states: Tensor) -> Reports:
        """Run one denoising step of rows whose current blocks have the states [R, B, H]."""
        rows = [self.rows[slot] for slot in slots]
        at, positions, open_ = self._open_positions(slots, rows)
        small = torch.tensor([row.small for row in rows], device=self.device)[:, None]
        sub_block = torch.arange(states.shape[1], device=self.device) // small
        masked = open_ & (sub_block == sub_block.gather(1, open_.int().argmax(1, keepdim=True)))
        alternatives = max(row.params.top_logprobs for row in rows)
        entropy = any(row.params.entropy_bound is not None for row in rows)
        draw = self._draw(rows, masked)
        found = propose(self.model, states[masked], draw, self.num_tokens, alternatives=alternatives, entropy=entropy)
        found = found.scatter(masked)
        take = self._select(rows, Candidates(masked, found.logps, found.entropy, open_.sum(-1)))
        where = (at.expand_as(positions)[take], positions[take])
        forwards = torch.tensor([row.forwards for row in rows], device=self.device)[:, None]
        self.canvas[where], self.logps[where] = found.tokens[take], found.logps[take].float()
        self.steps[where] = forwards.expand_as(positions)[take]
        events = self._report_step(rows, take, found)
        for row in rows:
            row.forwards += 1
            row.block_steps += 1
        self.counters.denoising_steps += len(rows)
        self.counters.steps_with_commits += len(rows)
        self.counters.positions_with_commits += take.numel()
        return events

    def _open_positions(self, slots: list[int], rows: list[_Row]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the slots [R, 1], the positions [R, B] of their current blocks, and which of those are to unmask.

        A mask token in a prompt is read as it is, never filled in.
        """
        at = torch.tensor(slots, device=self.device)[:, None]
        starts = torch.tensor([row.start for row in rows], device=self.device)[:, None]
        positions = starts + torch.arange(rows[0].block, device=self.device)
        prompt_end = torch.tensor([row.prompt_len for row in rows], device=self.device)[:, None]
        return at, positions, (self.canvas[at, positions] == self.model.mask_id) & (positions >= prompt_end)

    def _draw(self, rows: list[_Row], masked: Tensor) -> Draw | None:
        """Return the sampling of each masked position; each row draws one uniform number per position of its block."""
        if all(row.params.temperature == 0 for row in rows):
            return None
        width = masked.shape[1]
        uniform = np.stack([row.rng.random(width) if row.params.temperature else np.zeros(width) for row in rows])
        count = masked.sum(1)

        def each(values: list[float]) -> Tensor:
            return torch.tensor(values, device=self.device).repeat_interleave(count)

        return Draw(
            each([float(row.params.temperature) for row in rows]),
            each([float(row.params.top_p) for row in rows]),
            each([row.params.top_k for row in rows]),
            torch.from_numpy(uniform).to(self.device)[masked],
        )

    def _select(self, rows: list[_Row], candidates: Candidates) -> Tensor:
        """Return the positions [R, B] that this step unmasks, each row by its own policy."""
        by_policy: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            by_policy.setdefault(row.params.policy, []).append(place)
        take = torch.zeros_like(candidates.masked)
        for name, places in by_policy.items():
            amount = torch.tensor([rows[p].amount() for p in places], dtype=torch.float64, device=self.device)
            part = candidates if len(places) == len(rows) else candidates.select(places)
            take[places] = apply_policy(POLICIES[name], part, amount)
        return take

    def _report_step(self, rows: list[_Row], take: Tensor, found: Proposal) -> Reports:
        """Report the step of watched rows; store the alternatives of rows that ask for them."""
        events: Reports = []
        for number, row in enumerate(rows):
            if not (row.watch or row.params.top_logprobs):
                continue
            columns = take[number].nonzero()[:, 0].tolist()
            places = [row.start + column - row.prompt_len for column in columns]
            for place, column in zip(places, columns, strict=True):
                if row.params.top_logprobs:
                    row.top[place] = found.alternatives(number, column, row.params.top_logprobs)
            if row.watch:
                ids, logps = found.tokens[number, columns].tolist(), found.logps[number, columns].tolist()
                events.append((row.key, Unmasked(row.forwards, places, ids, logps)))
        return events

    def _finish_blocks(self, slots: list[int]) -> Reports:
        """Commit blocks without a mask; their rows go on to the next block, or finish."""
        if not slots:
            return []
        rows = [self.rows[slot] for slot in slots]
        unfinished = self._open_positions(slots, rows)[2].any(1).tolist()
        events: Reports = []
        for slot, row, is_open in zip(slots, rows, unfinished, strict=True):
            if not is_open:
                events += self._commit(slot, row)
        return events

    def _commit(self, slot: int, row: _Row) -> Reports:
        span = slice(max(row.start, row.prompt_len), row.start + row.block)
        ids, n = self.canvas[slot, span].tolist(), row.prompt_len
        top = {place: best for place, best in row.top.items() if span.start <= place + n < span.stop}
        block = Committed(ids, self.steps[slot, span].tolist(), self.logps[slot, span].tolist(), top)
        row.response.append(block)
        row.start, row.block_steps = span.stop, 0
        self.counters.committed_tokens += len(ids)
        self.counters.steps_with_commits += 1
        self.counters.positions_with_commits += row.block
        if row.start < row.end and row.stops.isdisjoint(ids):
            return [(row.key, block)]
        self._leave(slot)
        return [(row.key, block), (row.key, row.generation())]


def _widen(plane: Tensor, width: int, fill: int) -> Tensor:
    """Return the plane [rows, old width] at least `width` wide; it grows by doubling."""
    old = plane.shape[1]
    if width <= old:
        return plane
    return torch.cat([plane, plane.new_full((len(plane), max(width, 2 * old) - old), fill)], 1)


def decode_all(
    model: DiffusionLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    seeds: Sequence[int],
    num_tokens: int | None = None,
) -> list[Generation]:
    """Decode prompts [ids] side by side, with one seed each; a prefix that prompts share is computed once."""
    pages = sum(pages_needed(model, len(prompt), params.max_new_tokens) for prompt in prompts)
    decoder = Decoder(model, len(prompts), pages, num_tokens)
    for key, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        admitted = decoder.admit(key, prompt, params, seed)
        assert admitted
    generations: dict[Hashable, Generation] = {}
    while decoder.num_running:
        generations |= {key: event for key, event in decoder.step() if isinstance(event, Generation)}
    return [generations[key] for key in range(len(prompts))]
