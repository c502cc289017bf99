"""A finished response and the order it was unmasked in -> sampled states of its blocks, what to score there, how much.

State Reduction (arXiv 2603.18806): one denoising step per block, drawn at random, stands for the whole trajectory.
`ranks` give that order: within each block 0 is unmasked first; NEVER marks tokens that no step unmasked, GIVEN those
that no denoising step chose. The state before step t of a block hides every token of rank >= t; the newly unmasked
tokens have rank == t. A model that cannot show later blocks as absent (full attention) has one block: the response.
Everything random comes from a `numpy.random.Generator` for each block; `block_generators` derives them from (seed, row
id, epoch) and the block's number, so that like blocks of two sides take like draws whatever came before.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

NEVER = -1  # rank of a token that was never unmasked
GIVEN = -2  # rank of a token shown from its block's first step on that no denoising step chose: autoregressive, forced

Weighting = Literal["steps", "tokens", "unit"]
Origin = Literal["global", "response"]
NumDraws = int | Literal["all"]
Draws = Callable[[int], np.random.Generator]  # the generator of a block, by its number


@dataclass(frozen=True, slots=True)
class State:
    """One sampled state of a response of n tokens.

    `hidden` (bool [n]) is masked in it; `scored` (bool [n]) enters the ratio with `weight` (float [n]); `coverage`
    (float [n]) is the weight B_b / |hidden in b| of each hidden token in the masked-diffusion likelihood, times the
    share of the block's steps that this draw stands for (1 for a single draw). `exact` (bool [n]) marks the tokens of
    blocks whose every step is taken, where nothing is left to chance.
    """

    hidden: np.ndarray
    scored: np.ndarray
    weight: np.ndarray
    coverage: np.ndarray
    exact: np.ndarray


def row_generator(seed: int, row_id: str, epoch: int, tag: str) -> np.random.Generator:
    """The generator of one row's draws, the same on any worker, in any order, at any world size."""
    digest = hashlib.blake2b(f"{seed}|{row_id}|{epoch}|{tag}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def block_generators(seed: int, row_id: str, epoch: int, tag: str) -> Draws:
    """The generators of one row's blocks; each goes on where it stands when it is asked for again."""
    return cache(lambda block: row_generator(seed, row_id, epoch, f"{tag}-{block}"))


def block_slices(prompt_len: int, response_len: int, block_size: int, origin: Origin = "global") -> list[slice]:
    """The response's blocks on the grid that starts at position 0, or at the response, as slices of the response.

    The last one may be short, and on the global grid the first one too.
    """
    start = prompt_len if origin == "response" else prompt_len // block_size * block_size
    edges = range(start, prompt_len + response_len, block_size)
    return [slice(max(e - prompt_len, 0), min(e + block_size - prompt_len, response_len)) for e in edges]


def dense_ranks(raw_steps: np.ndarray, blocks: list[slice]) -> np.ndarray:
    """Recorded step numbers (any base, any gaps) -> dense ranks 0..K_b-1 within each block; NEVER, GIVEN stay."""
    ranks = np.array(raw_steps, dtype=np.int64)
    for block in blocks:
        done = raw_steps[block] >= 0
        ranks[block][done] = np.unique(raw_steps[block][done], return_inverse=True)[1]
    return ranks


def random_ranks(blocks: list[slice], tokens_per_step: int, rng: Draws, given: np.ndarray | None = None) -> np.ndarray:
    """A random order for text that has none: each block shuffled into groups of `tokens_per_step`.

    `given` (bool [n]) marks tokens that no step chooses; they get GIVEN and the groups are made of the others.
    """
    return _group(blocks, tokens_per_step, given, lambda block, free: rng(block).permutation(len(free)))


def left_to_right_ranks(blocks: list[slice], tokens_per_step: int, given: np.ndarray | None = None) -> np.ndarray:
    """Each block from left to right in sub-blocks of `tokens_per_step`."""
    return _group(blocks, tokens_per_step, given, lambda block, free: np.arange(len(free)))


def confidence_ranks(
    confidence: np.ndarray, blocks: list[slice], tokens_per_step: int, given: np.ndarray | None = None
) -> np.ndarray:
    """Each block by falling `confidence` (float [n]) in groups of `tokens_per_step`; ties from left to right."""

    def order(block: int, free: np.ndarray) -> np.ndarray:
        return np.argsort(np.argsort(-confidence[free], kind="stable"), kind="stable")

    return _group(blocks, tokens_per_step, given, order)


def _group(
    blocks: list[slice], size: int, given: np.ndarray | None, order: Callable[[int, np.ndarray], np.ndarray]
) -> np.ndarray:
    """`order` maps a block's number and free positions to places 0, 1, ..; each `size` of them make one step."""
    ranks = np.full(blocks[-1].stop if blocks else 0, GIVEN, dtype=np.int64)
    for number, block in enumerate(blocks):
        free = np.arange(block.start, block.stop)
        free = free if given is None else free[~given[block]]
        ranks[free] = order(number, free) // size
    return ranks


def sequential_ranks(ranks: np.ndarray, blocks: list[slice]) -> np.ndarray:
    """Ranks within blocks -> ranks within the response, whose blocks are finished one after the other."""
    out, done = ranks.copy(), 0
    for block in blocks:
        free = ranks[block] >= 0
        out[block][free] += done
        done += int(ranks[block][free].max()) + 1 if free.any() else 0
    return out


def sample_step_states(
    ranks: np.ndarray, blocks: list[slice], weighting: Weighting, rng: Draws, num_draws: NumDraws = 1
) -> list[State]:
    """dTRPO's states: m of the K_b denoising steps of each block b, one in each `State`, scored at I_t.

    The steps of a block are cut into m strata of neighbours, sizes differing by one at most, and one step is drawn
    in each: without replacement, and with weight the stratum's size unbiased. A block of fewer steps than draws, or
    `num_draws` = "all", takes every step once: the exact sum. For m = 1 (docs/method.md) the weights are: `steps` K_b
    with t_b uniform over steps; `tokens` B_b / |I_t| with t_b the step of a uniformly drawn token, the strata being
    made of tokens in the order they were unmasked; `unit` is `steps` divided by K_b (the figure of the paper; biased
    where K_b differs between blocks).
    """
    drawn = [_draw_steps(ranks[block], weighting, rng(b), num_draws) for b, block in enumerate(blocks)]
    states = []
    for draw in range(max([1, *map(len, drawn)])):
        hidden, scored = ranks == NEVER, np.zeros(len(ranks), dtype=bool)
        weight, coverage = np.zeros(len(ranks)), np.zeros(len(ranks))
        exact = np.zeros(len(ranks), dtype=bool)
        for block, steps in zip(blocks, drawn, strict=True):
            if draw < len(steps):
                step, step_weight, share = steps[draw]
                rank = ranks[block]
                to_come = rank >= step
                hidden[block] |= to_come
                scored[block] = rank == step
                weight[block] = step_weight
                coverage[block] = to_come * share * np.count_nonzero(rank >= 0) / np.count_nonzero(to_come)
                exact[block] = len(steps) > rank.max()
        states.append(State(hidden, scored, weight * scored, coverage, exact))
    return states


def _draw_steps(
    rank: np.ndarray, weighting: Weighting, rng: np.random.Generator, num_draws: NumDraws
) -> list[tuple[int, float, float]]:
    """(step, weight, share of the block it stands for) of each draw in one block."""
    unmasked = rank[rank >= 0]
    if not len(unmasked):
        return []
    num_steps = int(unmasked.max()) + 1
    if num_draws == "all" or 1 < num_draws >= num_steps:
        return [(t, 1 / num_steps if weighting == "unit" else 1.0, 1 / num_steps) for t in range(num_steps)]
    if weighting == "tokens":
        # a single stratum keeps the text's order: the draws of m = 1 stay what they were
        strata = np.array_split(np.sort(unmasked) if num_draws > 1 else unmasked, num_draws)
        steps = [int(rng.choice(tokens)) for tokens in strata]
        sizes = [np.count_nonzero(rank == step) for step in steps]
        return [(t, len(s) / n, len(s) / len(unmasked)) for t, s, n in zip(steps, strata, sizes, strict=True)]
    strata = np.array_split(np.arange(num_steps), num_draws)
    scale = num_steps if weighting == "unit" else 1
    return [(int(s[0] + rng.integers(len(s))), len(s) / scale, len(s) / num_steps) for s in strata]


def sample_step_state(ranks: np.ndarray, blocks: list[slice], weighting: Weighting, rng: Draws) -> State:
    """`sample_step_states` with one draw: one state of all blocks."""
    return sample_step_states(ranks, blocks, weighting, rng)[0]


def sample_elbo_states(
    num_tokens: int, blocks: list[slice], rng: Draws, num_draws: int = 1, given: np.ndarray | None = None
) -> list[State]:
    """n independent Monte-Carlo draws of the block ELBO, each with its share 1 / n (VRPO, arXiv 2505.19223)."""
    states = [sample_elbo_state(num_tokens, blocks, rng, given) for _ in range(num_draws)]
    return [replace(s, weight=s.weight / num_draws, coverage=s.coverage / num_draws) for s in states]


def sample_elbo_state(num_tokens: int, blocks: list[slice], rng: Draws, given: np.ndarray | None = None) -> State:
    """The block ELBO's state: per block l ~ U{1..B_b} random tokens hidden and all of them scored, weight B_b / l.

    The discrete form of the masked-diffusion bound (LLaDA, arXiv 2502.09992, eq. 14) applied per block; the control
    for dTRPO and, averaged per token, the SFT objective. `given` (bool [n]) marks tokens that are shown and not
    counted, as in `random_ranks`.
    """
    hidden = np.zeros(num_tokens, dtype=bool)
    weight = np.zeros(num_tokens)
    for number, block in enumerate(blocks):
        free = np.arange(block.start, block.stop)
        free = free if given is None else free[~given[block]]
        if len(free):
            own = rng(number)
            count = int(own.integers(1, len(free) + 1))
            hidden[free[own.permutation(len(free))[:count]]] = True
            weight[free] = len(free) / count
    return State(hidden, hidden.copy(), weight * hidden, weight * hidden, np.zeros(num_tokens, dtype=bool))
