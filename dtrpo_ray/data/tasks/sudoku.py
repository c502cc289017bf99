"""4x4 Sudoku: 288 grids, a fixed split by hash, puzzles by blanking, a checker that accepts any valid completion.

A prompt is the puzzle's 16 digits with 0 for a blank; a response is the completed grid's 16 digits.
"""

import hashlib
import itertools
from functools import cache

import numpy as np

ALPHABET = "01234"
RESPONSE_CHARS = 16
FIXED_LENGTH = True  # the response needs no end-of-sequence token

_UNITS = [
    *[[4 * r + c for c in range(4)] for r in range(4)],
    *[[4 * r + c for r in range(4)] for c in range(4)],
    *[[4 * (r + i) + c + j for i in range(2) for j in range(2)] for r in (0, 2) for c in (0, 2)],
]


def is_grid(text: str) -> bool:
    """16 digits of which every row, column and box holds 1 to 4 once."""
    return len(text) == 16 and all({text[i] for i in unit} == set("1234") for unit in _UNITS)


def is_test_grid(grid: str) -> bool:
    """The split rule, public so that others can test on what we never trained on: 30 % of grids by SHA-256."""
    return int(hashlib.sha256(grid.encode()).hexdigest(), 16) % 10 < 3


@cache
def all_grids() -> tuple[str, ...]:
    """All 288 completed grids in lexicographic order."""
    rows = ["".join(p) for p in itertools.permutations("1234")]
    bands = [a + b for a, b in itertools.product(rows, repeat=2) if len({*a[:2], *b[:2]}) == 4]  # two rows, two boxes
    return tuple(g for a, b in itertools.product(bands, repeat=2) if is_grid(g := a + b))


def score(prompt: str, response: str, answer: str | None = None) -> float:
    """1.0 if the response is a valid grid that keeps every given, else 0.0. Any valid completion counts."""
    keeps_givens = all(given in ("0", digit) for given, digit in zip(prompt, response, strict=False))
    return float(keeps_givens and is_grid(response))


def generate(count: int, split: str, blanks: tuple[int, int], seed: int) -> list[dict[str, str]]:
    """`count` rows {prompt, answer} from the grids of `split` ("train" or "test"), blanks uniform in the range."""
    grids = [g for g in all_grids() if is_test_grid(g) == (split == "test")]
    rng = np.random.default_rng([seed, split == "test"])
    rows = []
    for grid in rng.choice(grids, size=count):
        hidden = set(rng.permutation(16)[: rng.integers(blanks[0], blanks[1] + 1)].tolist())
        rows.append({"prompt": "".join("0" if i in hidden else d for i, d in enumerate(grid)), "answer": str(grid)})
    return rows


def parse_public(record: dict[str, str]) -> dict[str, str]:
    """A row of a public test file: input and output, each four lines of four digits (Dream, eval/data)."""
    row = {"prompt": record["input"].replace("\n", ""), "answer": record["output"].replace("\n", "")}
    if any(len(grid) != 16 or set(grid) - set(ALPHABET) for grid in row.values()):
        raise ValueError("not two grids of 16 digits from 0 to 4")
    return row
