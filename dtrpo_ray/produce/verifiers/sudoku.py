"""Verify 4x4 Sudoku in prose: the prompt holds the puzzle's 16 digits, the response the grid."""

import re

from dtrpo_ray.data.tasks import sudoku
from dtrpo_ray.errors import DataError
from dtrpo_ray.produce.verifiers.extract import marked_answers

ANSWER_OPTIONAL = True

_PUZZLE, _GRID = re.compile(r"(?<!\d)[0-4]{16}(?!\d)"), re.compile(r"(?<!\d)[1-4]{16}(?!\d)")


def score(prompt: str, response: str, answer: str | None = None) -> float:
    """1.0 if the marked grid, or else the last grid of the response, completes the prompt's puzzle; else 0.0."""
    if not (puzzles := _PUZZLE.findall(prompt)):
        raise DataError("sudoku finds no puzzle of 16 digits in the prompt; see docs/data.md")
    places = [*marked_answers(response), response]
    grids = next((found for place in places if (found := _GRID.findall(re.sub(r"[\s|]", "", place)))), None)
    return sudoku.score(puzzles[-1], grids[-1]) if grids else 0.0
