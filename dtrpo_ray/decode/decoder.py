"""Block-wise denoising, one step at a time: requests join and leave between any two denoising steps, whatever their
lengths, schedules and seeds. One engine for rollout, evaluation and serving.

One rule drives a block-causal pass: it runs a request's tokens from the first one without keys to the end of its
current block. So the pass over a prompt, and the pass that commits a finished block, is also the first denoising step
of the next block. Full-attention models have no exact cache: each of their passes runs the whole canvas.
Legend: R rows of a pass, B tokens of a block, T tokens of a pass's row, N masked positions, V vocabulary.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dtrpo_ray.config.decode import POLICIES as AMOUNT_FIELDS
from dtrpo_ray.config.decode import STEPS
from dtrpo_ray.decode.cache import SCRATCH, PagedKeys, PagePool, block_digests
from dtrpo_ray.decode.policies import POLICIES, Candidates, apply_policy
from dtrpo_ray.decode.proposal import Draw, Proposal, propose
from dtrpo_ray.decode.types import Alternatives, Committed, Counters, DecoderEvent, Generation, SamplingParams, Unmasked
from dtrpo_ray.errors import DataError
from dtrpo_ray.method.trajectory import GIVEN, NEVER
from dtrpo_ray.models.base import DiffusionLM

MAX_PASS_TOKENS = 8192  # of one forward, all rows together
PREFILL_TOKENS = 1024  # of one prompt in one forward, unless the caller of `step` sets fewer

Key = TypeVar("Key", bound=Hashable)  # a caller's name of a request


@dataclass(slots=True)
class _Row:
    """A running request: its current block begins at `start`; `cached` is its first token without keys."""

    key: Any
    params: SamplingParams
    rng: np.random.Generator
    watch: bool
    prompt_len: int
    block: int
    small: int
    start: int
    end: int
    stops: frozenset[int]
    slot: int = -1  # its row in the decoder's tensors
    cached: int = 0
    forwards: int = 0
    block_steps: int = 0
    pages: list[int] = field(default_factory=list)
    published: int = 0  # number of first pages whose content the pool knows
    waiting: list[int] = field(default_factory=list)  # shared pages that their first holder has yet to fill
    top: dict[int, Alternatives] = field(default_factory=dict)

    def amount(self) -> float:
        """Return how much the next step unmasks, in the measure of the request's policy."""
        field = AMOUNT_FIELDS[self.params.policy]
        return self.params.denoising_steps - self.block_steps if field == STEPS else getattr(self.params, field)


def pages_needed(model: DiffusionLM, prompt_len: int, max_new_tokens: int) -> int:
    """Return the pages of a request that shares none; 0 for a model without an exact cache."""
    return -(-(prompt_len + max_new_tokens) // model.block_size) if model.attention == "block" else 0


class Decoder(Generic[Key]):
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
        self.rows: dict[Key, _Row] = {}
        self.slots = list(range(max_rows - 1, -1, -1))  # free ones
        self.prefill_tokens = PREFILL_TOKENS
        self.counters = Counters()
        self.canvas = torch.full((max_rows, 0), model.mask_id, device=self.device)
        self.steps = torch.full((max_rows, 0), NEVER, device=self.device)
        self.logps = torch.zeros((max_rows, 0), device=self.device)
        self.tables = torch.zeros((max_rows, 0), dtype=torch.long, device=self.device)

    def admit(self, key: Key, prompt: Sequence[int], params: SamplingParams, seed: int, watch: bool = False) -> bool:
        """Start a request under the caller's key; False if no row or too few pages are free. `watch` reports each step.

        Raises DataError for an empty prompt if the model predicts each token from the one before it, and for a
        small_block_size that does not divide the block.
        """
        if self.model.shift and not prompt:
            raise DataError("this model predicts a token from the one before it; give a prompt of at least one token")
        if not self.slots:
            return False
        row = self._row(key, len(prompt), params, seed, watch)
        if self.caches and not self._take_pages(row, prompt):
            return False
        row.slot, self.rows[key] = self.slots.pop(), row
        self._write(row, prompt)
        self.counters.prompt_tokens += len(prompt)
        self.counters.reused_tokens += row.cached
        return True

    def cancel(self, key: Key) -> None:
        """End a request early; an unknown key is no error, since the request may just have finished."""
        if key in self.rows:
            self._leave(self.rows[key])

    def cost(self, key: Key) -> int | None:
        """Return the tokens of a request's next pass; None while it waits for keys that another request computes."""
        row = self.rows[key]
        first, last = self._span(row)
        return None if any(page in self.unfilled for page in row.waiting) else last - first

    @torch.inference_mode()
    def step(self, keys: Iterable[Key] | None = None) -> list[tuple[Key, DecoderEvent]]:
        """Run one pass of these requests, by default of all, a denoising step once a prompt is read.

        Return (key, event) pairs.
        """
        events: list[tuple[Key, DecoderEvent]] = []
        for rows in self._groups(self.rows if keys is None else keys):
            for row in rows:
                row.waiting = [page for page in row.waiting if page in self.unfilled]
            if ready := [row for row in rows if not row.waiting]:
                events += [(row.key, event) for row, event in self._run(ready)]
        return events

    # --- coming and going ---

    def _row(self, key: Key, count: int, params: SamplingParams, seed: int, watch: bool) -> _Row:
        model = self.model
        block = model.block_size if self.caches else params.block_length or model.block_size
        origin = count if model.block_origin == "response" else 0
        start = origin + (count - origin) // block * block
        end = origin + -(-(count - origin + params.max_new_tokens) // block) * block
        stops = params.stops(model.stop_ids)
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

    def _write(self, row: _Row, prompt: Sequence[int]) -> None:
        slot, mask = row.slot, self.model.mask_id
        self.canvas, self.steps = _widen(self.canvas, row.end, mask), _widen(self.steps, row.end, NEVER)
        self.logps, self.tables = _widen(self.logps, row.end, 0), _widen(self.tables, len(row.pages), 0)
        self.canvas[slot], self.steps[slot], self.logps[slot], self.tables[slot] = mask, NEVER, 0, 0
        self.canvas[slot, : len(prompt)] = torch.tensor(list(prompt), dtype=torch.long, device=self.device)
        self.tables[slot, : len(row.pages)] = torch.tensor(row.pages, dtype=torch.long, device=self.device)

    def _leave(self, row: _Row) -> None:
        del self.rows[row.key]
        self.slots.append(row.slot)
        if not self.caches:
            return
        size = self.model.block_size
        done = row.cached // size
        for page in row.pages[done : row.published]:
            self._abandon(page)
        if done > row.published:  # publish the response too: the next turn of a chat begins with it
            digests = block_digests(self.canvas[row.slot, : row.cached].tolist(), size)
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

    def _groups(self, keys: Iterable[Key]) -> Iterator[list[_Row]]:
        """Yield the rows of each pass; wide passes first, since others may read what they fill.

        Widths within a pass differ by less than a factor of two, so padding at most doubles it.
        """
        groups: dict[tuple[int, int], list[_Row]] = {}
        widths: dict[tuple[int, int], int] = {}
        for row in map(self.rows.__getitem__, keys):
            first, last = self._span(row)
            group = ((-(-(last - first) // row.block) - 1).bit_length(), row.block)
            groups.setdefault(group, []).append(row)
            widths[group] = max(last - first, widths.get(group, 0))
        for group in sorted(groups, reverse=True):
            many = max(1, MAX_PASS_TOKENS // widths[group])
            yield from (groups[group][at : at + many] for at in range(0, len(groups[group]), many))

    def _span(self, row: _Row) -> tuple[int, int]:
        """Return the tokens [first, last) of the row's next pass."""
        if not self.caches:
            return 0, row.end
        chunk = max(1, self.prefill_tokens // row.block) * row.block
        if row.start - row.cached > chunk:
            return row.cached, row.cached + chunk
        return row.cached, row.start if self._must_open(row) else row.start + row.block

    def _must_open(self, row: _Row) -> bool:
        """Return True if a pass that ends before the row's block must give the block's first token."""
        return self.opens and row.start >= row.prompt_len and row.cached < row.start

    def _run(self, rows: list[_Row]) -> list[tuple[_Row, DecoderEvent]]:
        """Run one pass, then a denoising step of the rows whose block it reached."""
        spans = [self._span(row) for row in rows]
        opened = [p for p, row in enumerate(rows) if self._must_open(row) and spans[p][1] == row.start]
        denoised = [p for p, row in enumerate(rows) if spans[p][1] > row.start]
        hidden = self._forward(rows, spans)
        self.counters.passes += 1
        self.counters.pass_tokens += sum(last - first for first, last in spans)
        for row, (_, last) in zip(rows, spans, strict=True):
            if self.caches:
                cached = min(last, row.start)
                self.unfilled.difference_update(row.pages[row.cached // row.block : cached // row.block])
                row.cached = cached
        events: list[tuple[_Row, DecoderEvent]] = []
        if opened:
            self._open([rows[p] for p in opened], hidden[opened, [spans[p][1] - 1 - spans[p][0] for p in opened]])
        if denoised:
            first = self._column([rows[p].start - spans[p][0] - self.model.shift for p in denoised])
            columns = first + torch.arange(rows[0].block, device=self.device)
            # column -1 belongs to the prompt, and nothing reads its state
            states = hidden[self._column(denoised), columns.clamp(min=0)]
            events = self._denoise([rows[p] for p in denoised], states)
        return events + self._finish_blocks([rows[p] for p in sorted(opened + denoised)])

    def _column(self, values: Sequence[int]) -> Tensor:
        """Return a tensor [R, 1] of a value of each row."""
        return torch.tensor(values, device=self.device)[:, None]

    def _forward(self, rows: list[_Row], spans: list[tuple[int, int]]) -> Tensor:
        """Return the hidden states [R, T, H] of the spans, padded on the right."""
        at = self._column([row.slot for row in rows])
        first, last = torch.tensor(spans, device=self.device).T[..., None]
        width = max(end - begin for begin, end in spans)
        positions = first + torch.arange(width, device=self.device)
        inside = positions < last
        positions = torch.minimum(positions, last - 1)
        ids = self.canvas[at, positions]
        if not self.caches:
            mask = (torch.arange(width, device=self.device) < last)[:, None, None]
            return self.model.hidden(ids, positions, mask.expand(-1, -1, width, -1))
        size = self.model.block_size
        count = max(end for _, end in spans) // size
        table = self.tables[at[:, 0], :count]
        page = torch.where(inside, table.gather(1, positions // size), SCRATCH)
        self.keys.aim((page * size + positions % size).reshape(-1), table)
        block_end = (positions // size + 1) * size
        mask = torch.arange(count * size, device=self.device) < block_end[..., None]
        return self.model.hidden(ids, positions, mask[:, None], self.keys)

    # --- tokens ---

    def _open(self, rows: list[_Row], states: Tensor) -> None:
        """Set each block's first token from the state before it [R, H], greedily at any temperature (Fast-dLLM v2)."""
        found = propose(self.model, states, None, self.num_tokens, max(row.params.top_logprobs for row in rows))
        at = ([row.slot for row in rows], [row.start for row in rows])
        self.canvas[at], self.logps[at], self.steps[at] = found.tokens, found.logps.float(), GIVEN
        for number, row in enumerate(rows):
            if row.params.top_logprobs:
                row.top[row.start - row.prompt_len] = found.alternatives(number, row.params.top_logprobs)

    def _denoise(self, rows: list[_Row], states: Tensor) -> list[tuple[_Row, DecoderEvent]]:
        """Run one denoising step of rows whose current blocks have the states [R, B, H]."""
        positions, open_ = self._open_positions(rows)
        small = self._column([row.small for row in rows])
        sub_block = torch.arange(states.shape[1], device=self.device) // small
        masked = open_ & (sub_block == sub_block.gather(1, open_.int().argmax(1, keepdim=True)))
        alternatives = max(row.params.top_logprobs for row in rows)
        entropy = any(row.params.entropy_bound is not None for row in rows)
        draw = self._draw(rows, masked)
        found = propose(self.model, states[masked], draw, self.num_tokens, alternatives=alternatives, entropy=entropy)
        found = found.scatter(masked)
        take = self._select(rows, Candidates(masked, found.logps, found.entropy, open_.sum(-1)))
        where = (self._column([row.slot for row in rows]).expand_as(positions)[take], positions[take])
        self.canvas[where], self.logps[where] = found.tokens[take], found.logps[take].float()
        self.steps[where] = self._column([row.forwards for row in rows]).expand_as(positions)[take]
        events = self._report_step(rows, take, found)
        for row in rows:
            row.forwards += 1
            row.block_steps += 1
        self.counters.denoising_steps += len(rows)
        self.counters.steps_with_commits += len(rows)
        self.counters.positions_with_commits += take.numel()
        return events

    def _open_positions(self, rows: list[_Row]) -> tuple[Tensor, Tensor]:
        """Return the positions [R, B] of the rows' current blocks, and which of those are to unmask.

        A mask token in a prompt is read as it is, never filled in.
        """
        positions = self._column([row.start for row in rows]) + torch.arange(rows[0].block, device=self.device)
        hidden = self.canvas[self._column([row.slot for row in rows]), positions] == self.model.mask_id
        return positions, hidden & (positions >= self._column([row.prompt_len for row in rows]))

    def _draw(self, rows: list[_Row], masked: Tensor) -> Draw | None:
        """Return the sampling of each masked position; each row draws one uniform number per position of its block."""
        if all(row.params.temperature == 0 for row in rows):
            return None
        width, count = masked.shape[1], masked.sum(1)
        uniform = np.stack([row.rng.random(width) if row.params.temperature else np.zeros(width) for row in rows])

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
            part = candidates if len(places) == len(rows) else Candidates(*(plane[places] for plane in candidates))
            take[places] = apply_policy(POLICIES[name], part, amount)
        return take

    def _report_step(self, rows: list[_Row], take: Tensor, found: Proposal) -> list[tuple[_Row, DecoderEvent]]:
        """Report the step of watched rows; store the alternatives of rows that ask for them."""
        events: list[tuple[_Row, DecoderEvent]] = []
        for number, row in enumerate(rows):
            count = row.params.top_logprobs
            if not (row.watch or count):
                continue
            columns = take[number].nonzero()[:, 0].tolist()
            places = [row.start + column - row.prompt_len for column in columns]
            if count:
                best = [found.alternatives((number, column), count) for column in columns]
                row.top |= dict(zip(places, best, strict=True))
            if row.watch:
                ids, logps = found.tokens[number, columns].tolist(), found.logps[number, columns].tolist()
                events.append((row, Unmasked(row.forwards, places, ids, logps)))
        return events

    def _finish_blocks(self, rows: list[_Row]) -> list[tuple[_Row, DecoderEvent]]:
        """Commit blocks without a mask; their rows go on to the next block, or finish."""
        unfinished = self._open_positions(rows)[1].any(1).tolist() if rows else []
        done = [row for row, is_open in zip(rows, unfinished, strict=True) if not is_open]
        return [(row, event) for row in done for event in self._commit(row)]

    def _commit(self, row: _Row) -> list[DecoderEvent]:
        first = max(row.start, row.prompt_len)
        row.start, row.block_steps = row.start + row.block, 0
        ids, steps, logps = self._response(row, first)
        top = {place: best for place, best in row.top.items() if place >= first - row.prompt_len}
        block = Committed(ids, steps, logps, top)
        self.counters.committed_tokens += len(ids)
        self.counters.steps_with_commits += 1
        self.counters.positions_with_commits += row.block
        if row.start < row.end and row.stops.isdisjoint(ids):
            return [block]
        ids, steps, logps = self._response(row, row.prompt_len)
        most = row.params.max_new_tokens
        cut = next((place for place, token in enumerate(ids[:most]) if token in row.stops), most)
        self._leave(row)
        return [block, Generation(ids, steps, logps, row.forwards, text_ids=ids[:cut], top=row.top)]

    def _response(self, row: _Row, first: int) -> tuple[list[int], list[int], list[float]]:
        """Return the ids, steps and log mu of the finished blocks from the position `first` on."""
        ids, steps, logps = (plane[row.slot, first : row.start] for plane in (self.canvas, self.steps, self.logps))
        return ids.tolist(), steps.tolist(), logps.tolist()


def _widen(plane: Tensor, width: int, fill: int) -> Tensor:
    """Return the plane [rows, old width] at least `width` wide; it grows by doubling."""
    old = plane.shape[1]
    return plane if width <= old else F.pad(plane, (0, max(width, 2 * old) - old), value=fill)


def decode_all(
    model: DiffusionLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    seeds: Sequence[int],
    num_tokens: int | None = None,
) -> list[Generation]:
    """Decode prompts [ids] side by side, with one seed each; a prefix that prompts share is computed once."""
    pages = sum(pages_needed(model, len(prompt), params.max_new_tokens) for prompt in prompts)
    decoder = Decoder[int](model, len(prompts), pages, num_tokens)
    for key, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        admitted = decoder.admit(key, prompt, params, seed)
        assert admitted
    generations: dict[int, Generation] = {}
    while decoder.rows:
        generations |= {key: event for key, event in decoder.step() if isinstance(event, Generation)}
    return [generations[key] for key in range(len(prompts))]
