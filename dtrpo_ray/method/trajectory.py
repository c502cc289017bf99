"""Sample states of a finished response from the order in which its tokens were unmasked.

State Reduction (arXiv 2603.18806): one denoising step per block, drawn at random, stands for the whole trajectory.
`steps[i]` is the denoising step, counted from 0 within its block, that unmasked token i; NEVER marks tokens that no
step unmasked, GIVEN tokens that no denoising step chose. The state before step t of a block hides every token with
steps >= t; the newly unmasked tokens are those with steps == t. Full attention cannot show later blocks as absent, so
there the response is one block.
Each block draws from its own `numpy.random.Generator`, derived from (seed, row id, epoch, block number): equal blocks
of the two sides then take equal draws, whatever precedes them.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

NEVER = -1  # step of a token that was never unmasked
GIVEN = -2  # step of a token that its block shows from the start: autoregressive or forced, not chosen by denoising

Weighting = Literal["steps", "tokens", "unit"]
Origin = Literal["global", "response"]
NumDraws = int | Literal["all"]
BlockGenerators = Callable[[int], np.random.Generator]  # block number -> its generator


@dataclass(frozen=True, slots=True)
class State:
    """One sampled state of a response of n tokens.

    hidden: bool [n], the tokens masked in this state.
    scored: bool [n], the tokens that enter the ratio, with `weight`, float [n].
    coverage: float [n], the weight B_b / |hidden in b| of each hidden token in the masked-diffusion likelihood, times
        the share of the block's steps that this draw stands for (1 for a single draw).
    exact: bool [n], the tokens of blocks whose every step is taken, where nothing is left to chance.
    """

    hidden: np.ndarray
    scored: np.ndarray
    weight: np.ndarray
    coverage: np.ndarray
    exact: np.ndarray


def row_generator(seed: int, row_id: str, epoch: int, tag: str) -> np.random.Generator:
    """Return the generator of one row's draws: the same on any worker, in any order, at any world size."""
    digest = hashlib.blake2b(f"{seed}|{row_id}|{epoch}|{tag}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def block_generators(seed: int, row_id: str, epoch: int, tag: str) -> BlockGenerators:
    """Return the generators of one row's blocks; asking for a block again continues its stream."""
    return cache(lambda block: row_generator(seed, row_id, epoch, f"{tag}-{block}"))


def block_slices(prompt_len: int, response_len: int, block_size: int, origin: Origin = "global") -> list[slice]:
    """Cut the response at the block grid, which starts at position 0 ("global") or at the response.

    The last block may be short, and on the global grid the first one too.
    """
    start = prompt_len if origin == "response" else prompt_len // block_size * block_size
    edges = range(start, prompt_len + response_len, block_size)
    return [slice(max(e - prompt_len, 0), min(e + block_size - prompt_len, response_len)) for e in edges]


def dense_steps(raw_steps: np.ndarray, blocks: list[slice]) -> np.ndarray:
    """Renumber recorded steps (any base, any gaps) as 0..K_b-1 within each block; NEVER and GIVEN stay."""
    steps = np.array(raw_steps, dtype=np.int64)
    for block in blocks:
        done = raw_steps[block] >= 0
        steps[block][done] = np.unique(raw_steps[block][done], return_inverse=True)[1]
    return steps


def ordered_steps(
    blocks: list[slice], size: int, given: np.ndarray, key: Callable[[int, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Make up an order for text that has none: by rising `key`, each `size` tokens of a block at one step.

    `key` maps a block's number and free positions to numbers; ties go left to right. `given` (bool [n]) marks tokens
    that no step chooses; they get GIVEN, and the others form the groups.
    """
    steps = np.full(len(given), GIVEN, dtype=np.int64)
    for number, free in enumerate(_free(blocks, given)):
        steps[free[np.argsort(key(number, free), kind="stable")]] = np.arange(len(free)) // size
    return steps


def _free(blocks: list[slice], given: np.ndarray) -> list[np.ndarray]:
    """Return the positions of each block that are not given."""
    return [block.start + np.flatnonzero(~given[block]) for block in blocks]


def sequential_steps(steps: np.ndarray, blocks: list[slice]) -> np.ndarray:
    """Number the steps through the whole response, whose blocks are finished one after the other."""
    out, done = steps.copy(), 0
    for block in blocks:
        free = steps[block] >= 0
        out[block][free] += done
        done += int(steps[block][free].max()) + 1 if free.any() else 0
    return out


def sample_step_states(
    steps: np.ndarray, blocks: list[slice], weighting: Weighting, rng: BlockGenerators, num_draws: NumDraws = 1
) -> list[State]:
    """Sample dTRPO's states: m of the K_b denoising steps of each block b, one in each `State`, scored at I_t.

    The steps of a block are cut into m strata of neighbours, sizes differing by one at most, and one step is drawn
    from each: without replacement, and unbiased because its weight is the stratum's size. A block of fewer steps than
    draws, or `num_draws` = "all", takes every step once: the exact sum. The weights for m = 1 (docs/method.md) are

    steps: K_b, with t_b uniform over steps;
    tokens: B_b / |I_t|, with t_b the step of a uniformly drawn token; strata are of tokens in the order of unmasking;
    unit: 1, with t_b uniform over steps (the paper's figure; biased where K_b differs between blocks).
    """
    draws = [_draw_steps(steps[block], weighting, rng(b), num_draws) for b, block in enumerate(blocks)]
    states = []
    for draw in range(max([1, *map(len, draws)])):
        weight, coverage, hidden = np.zeros(len(steps)), np.zeros(len(steps)), steps == NEVER
        scored, exact = np.zeros_like(hidden), np.zeros_like(hidden)
        for block, drawn in zip(blocks, draws, strict=True):
            if draw < len(drawn):
                step, step_weight, share = drawn[draw]
                own = steps[block]
                to_come = own >= step
                hidden[block] |= to_come
                scored[block] = own == step
                weight[block] = step_weight
                coverage[block] = to_come * share * np.count_nonzero(own >= 0) / np.count_nonzero(to_come)
                exact[block] = len(drawn) > own.max()
        states.append(State(hidden, scored, weight * scored, coverage, exact))
    return states


def _draw_steps(
    steps: np.ndarray, weighting: Weighting, rng: np.random.Generator, num_draws: NumDraws
) -> list[tuple[int, float, float]]:
    """Draw the steps of one block: (step, weight, share of the block's steps or tokens it stands for) each."""
    unmasked = steps[steps >= 0]
    if not len(unmasked):
        return []
    num_steps = int(unmasked.max()) + 1
    if num_draws == "all" or 1 < num_draws >= num_steps:
        return [(t, 1 / num_steps if weighting == "unit" else 1.0, 1 / num_steps) for t in range(num_steps)]
    if weighting == "tokens":
        # a single stratum keeps the text's order, so that m = 1 draws the same steps for the same seed
        strata = np.array_split(np.sort(unmasked) if num_draws > 1 else unmasked, num_draws)
        drawn = [int(rng.choice(tokens)) for tokens in strata]
        sizes = [np.count_nonzero(steps == step) for step in drawn]
        return [(t, len(s) / n, len(s) / len(unmasked)) for t, s, n in zip(drawn, strata, sizes, strict=True)]
    strata = np.array_split(np.arange(num_steps), num_draws)
    scale = num_steps if weighting == "unit" else 1
    return [(int(s[0] + rng.integers(len(s))), len(s) / scale, len(s) / num_steps) for s in strata]


def sample_elbo_states(blocks: list[slice], rng: BlockGenerators, num_draws: int, given: np.ndarray) -> list[State]:
    """Sample the block ELBO's state: per block l ~ U{1..B_b} random tokens hidden and all scored, weight B_b / l.

    This is the masked-diffusion bound (LLaDA, arXiv 2502.09992, eq. 14) applied per block: the control for dTRPO and,
    averaged per token, the SFT objective. The draws are independent, each with its share 1 / `num_draws` (VRPO, arXiv
    2505.19223). `given` (bool [n]) marks tokens that are shown and not counted, as in `ordered_steps`.
    """
    states = []
    for _ in range(num_draws):
        hidden, weight = np.zeros(len(given), dtype=bool), np.zeros(len(given))
        for number, free in enumerate(_free(blocks, given)):
            if len(free):
                own = rng(number)
                count = int(own.integers(1, len(free) + 1))
                hidden[free[own.permutation(len(free))[:count]]] = True
                weight[free] = len(free) / count
        weight = weight * hidden / num_draws
        states.append(State(hidden, hidden, weight, weight, np.zeros(len(given), dtype=bool)))
    return states


def sample_complementary_states(
    blocks: list[slice], rng: BlockGenerators, num_pairs: int, given: np.ndarray
) -> list[State]:
    """Sample pairs of states of which one hides what the other shows, as Fast-dLLM v2 trains (arXiv 2509.26328).

    Per block the first of a pair hides l ~ U{0..B_b} random tokens and the second the other B_b - l, so each token is
    hidden and scored in exactly one of the two, with weight 1 / `num_pairs`. The mean is sum_l 2 l / (B_b (B_b + 1))
    of the mean loss of l hidden tokens: states that hide more weigh more than in the ELBO, whose l are equally likely.
    `given` (bool [n]) marks tokens that are shown and not counted, as in `ordered_steps`.
    """
    states = []
    for _ in range(num_pairs):
        first = np.zeros(len(given), dtype=bool)
        for number, free in enumerate(_free(blocks, given)):
            own = rng(number)
            first[free[own.permutation(len(free))[: own.integers(0, len(free) + 1)]]] = True
        for hidden in (first, ~first & ~given):
            weight = hidden / num_pairs
            states.append(State(hidden, hidden, weight, weight, np.zeros(len(given), dtype=bool)))
    return states
