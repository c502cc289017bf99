"""The table of puzzles. A new one is a module beside this one, a line of PUZZLES and a section of config/task.py."""

import json
from pathlib import Path
from types import ModuleType

from dtrpo_ray.config.task import PuzzleTask
from dtrpo_ray.data.tasks import countdown, reviews, sudoku, word_problems
from dtrpo_ray.errors import DataError
from dtrpo_ray.files import read_lines

# by `task.type`
PUZZLES: dict[str, ModuleType] = {
    "sudoku": sudoku,
    "countdown": countdown,
    "reviews": reviews,
    "word_problems": word_problems,
}


def puzzle_module(task: PuzzleTask) -> ModuleType:
    """Return the module of the task's puzzle: FIXED_LENGTH, generate, parse_public; score, or the path SCORER of one.

    One that is not in words of a language has as ALPHABET the characters of its texts, or a tuple of their words.
    """
    return PUZZLES[task.type]


def scorer_path(task: PuzzleTask) -> str:
    """Return the puzzle's scorer as "module:function", the form that crosses processes.

    The function takes (prompt, response, answer), all texts, and returns a reward from 0 to 1; 1 is correct.
    """
    module = puzzle_module(task)
    return str(getattr(module, "SCORER", f"{module.__name__}:score"))


def generate_puzzles(task: PuzzleTask, count: int, split: str, seed: int) -> list[dict[str, str]]:
    """Return `count` puzzles {prompt, answer} of the split "train" or "test", as difficult as the task says."""
    rows: list[dict[str, str]] = puzzle_module(task).generate(count, split, seed=seed, **task.options())
    return rows


def read_public_tests(task: PuzzleTask) -> dict[str, list[dict[str, str]]]:
    """Return file name -> puzzles {prompt, answer} of the public test files that exist. Raises DataError."""
    return {path.name: read_public(task.type, path) for path in task.public_tests if path.exists()}


def read_public(puzzle: str, path: Path) -> list[dict[str, str]]:
    """Return the puzzles of a public test file, JSONL of {input, output}. Raises DataError naming a bad line."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            rows.append(PUZZLES[puzzle].parse_public(json.loads(line)))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            says = f"not a row of a {puzzle.title()} test file ({error!r}); expected input and output"
            raise DataError(f"{path}:{number}: {says}") from None
    return rows
