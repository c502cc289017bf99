"""The table of puzzles. A new one is a module beside this one, a line of PUZZLES and a section of config/task.py."""

from types import ModuleType

from dtrpo_ray.config.task import PuzzleTask
from dtrpo_ray.data.tasks import countdown, sudoku

PUZZLES: dict[str, ModuleType] = {"sudoku": sudoku, "countdown": countdown}  # by `task.type`


def puzzle_module(task: PuzzleTask) -> ModuleType:
    """Return the module of the task's puzzle: ALPHABET, FIXED_LENGTH, generate, score, read_public."""
    return PUZZLES[task.type]


def scorer_path(task: PuzzleTask) -> str:
    """Return the puzzle's scorer as "module:function", the form that crosses processes."""
    return f"{puzzle_module(task).__name__}:score"


def generate_puzzles(task: PuzzleTask, count: int, split: str, seed: int) -> list[dict[str, str]]:
    """Return `count` puzzles {prompt, answer} of the split "train" or "test", as difficult as the task says."""
    rows: list[dict[str, str]] = puzzle_module(task).generate(count, split, seed=seed, **task.options())
    return rows


def read_public_tests(task: PuzzleTask) -> dict[str, list[dict[str, str]]]:
    """Return file name -> puzzles {prompt, answer} of the public test files that exist. Raises DataError."""
    read = puzzle_module(task).read_public
    return {path.name: read(path) for path in task.public_tests if path.exists()}
