"""A finished response and the order it was unmasked in -> one sampled state per block, what to score there, how much.

State Reduction (arXiv 2603.18806): one denoising step per block, drawn at random, stands for the whole trajectory.
`ranks` give that order: within each block 0 is unmasked first; NEVER marks tokens that no step unmasked.
The state before step t of a block hides every token of rank >= t; the newly unmasked tokens have rank == t.
Everything random comes from a `numpy.random.Generator`; `row_generator` derives it from (seed, row id, epoch).
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

NEVER = -1  # rank of a token that was never unmasked
GIVEN = -2  # rank of a token shown from its block's first step on that no denoising step chose: autoregressive, forced

Weighting = Literal["steps", "tokens", "unit"]


@dataclass(frozen=True, slots=True)
class State:
    """One sampled state of a response of n tokens.

    `hidden` (bool [n]) is masked in it; `scored` (bool [n]) enters the ratio with `weight` (float [n]); `coverage`
    (float [n]) is the weight B_b / |hidden in b| of each hidden token in the masked-diffusion likelihood.
    """

    hidden: np.ndarray
    scored: np.ndarray
    weight: np.ndarray
    coverage: np.ndarray


def row_generator(seed: int, row_id: str, epoch: int, tag: str) -> np.random.Generator:
    """The generator of one row's draws, the same on any worker, in any order, at any world size."""
    digest = hashlib.blake2b(f"{seed}|{row_id}|{epoch}|{tag}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def block_slices(prompt_len: int, response_len: int, block_size: int) -> list[slice]:
    """The response's blocks on the global grid, as slices of the response; the first and last may be short."""
    edges = range(prompt_len // block_size * block_size, prompt_len + response_len, block_size)
    return [slice(max(e - prompt_len, 0), min(e + block_size - prompt_len, response_len)) for e in edges]


def dense_ranks(raw_steps: np.ndarray, blocks: list[slice]) -> np.ndarray:
    """Recorded step numbers (any base, any gaps, NEVER kept) -> dense ranks 0..K_b-1 within each block."""
    ranks = np.full(len(raw_steps), NEVER, dtype=np.int64)
    for block in blocks:
        done = raw_steps[block] != NEVER
        ranks[block][done] = np.unique(raw_steps[block][done], return_inverse=True)[1]
    return ranks


def random_ranks(blocks: list[slice], tokens_per_step: int, rng: np.random.Generator) -> np.ndarray:
    """A random order for text that has none: each block shuffled into groups of `tokens_per_step`."""
    ranks = np.empty(blocks[-1].stop if blocks else 0, dtype=np.int64)
    for block in blocks:
        ranks[block] = rng.permutation(block.stop - block.start) // tokens_per_step
    return ranks


def sample_step_state(ranks: np.ndarray, blocks: list[slice], weighting: Weighting, rng: np.random.Generator) -> State:
    """dTRPO's state: per block b one step t_b of its K_b, scored at the newly unmasked tokens I_t.

    Weights of the scored tokens (docs/method.md): `steps` K_b with t_b uniform over steps (unbiased); `tokens`
    B_b / |I_t| with t_b the step of a uniformly drawn token (unbiased); `unit` 1 with t_b uniform (the figure of the
    paper; biased where K_b differs between blocks).
    """
    hidden = ranks == NEVER
    scored = np.zeros(len(ranks), dtype=bool)
    weight, coverage = np.zeros(len(ranks)), np.zeros(len(ranks))
    for block in blocks:
        rank = ranks[block]
        unmasked = rank[rank != NEVER]
        if not len(unmasked):
            continue
        num_steps = int(unmasked.max()) + 1
        step = int(rng.choice(unmasked)) if weighting == "tokens" else int(rng.integers(num_steps))
        hidden[block] |= rank >= step
        scored[block] = rank == step
        newly = int(np.count_nonzero(rank == step))
        coverage[block] = (rank >= step) * len(unmasked) / np.count_nonzero(rank >= step)
        weight[block] = {"steps": num_steps, "tokens": len(unmasked) / newly, "unit": 1.0}[weighting]
    return State(hidden, scored, weight * scored, coverage)


def sample_elbo_state(num_tokens: int, blocks: list[slice], rng: np.random.Generator) -> State:
    """The block ELBO's state: per block l ~ U{1..B_b} random tokens hidden and all of them scored, weight B_b / l.

    The discrete form of the masked-diffusion bound (LLaDA, arXiv 2502.09992, eq. 14) applied per block; the control
    for dTRPO and, averaged per token, the SFT objective.
    """
    hidden = np.zeros(num_tokens, dtype=bool)
    weight = np.zeros(num_tokens)
    for block in blocks:
        size = block.stop - block.start
        count = int(rng.integers(1, size + 1))
        hidden[block][rng.permutation(size)[:count]] = True
        weight[block] = size / count
    return State(hidden, hidden.copy(), weight * hidden, weight * hidden)
