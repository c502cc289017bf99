"""4x4 Sudoku: the grids, the split, the puzzles and the checker."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import SHARED

from dtrpo_ray.data.tasks import sudoku
from dtrpo_ray.data.tasks.puzzles import read_public
from dtrpo_ray.errors import DataError

DATA = SHARED / "puzzles"
BLANKS = (4, 12)
TEST_GRIDS = 81  # of 288, by SHA-256; another number means that training sees what was held out


def test_there_are_288_grids_in_order_of_which_81_are_held_out() -> None:
    grids = sudoku.all_grids()
    assert len(grids) == len(set(grids)) == 288
    assert list(grids) == sorted(grids)
    assert sum(map(sudoku.is_test_grid, grids)) == TEST_GRIDS


@pytest.mark.parametrize("split", ["train", "test"])
def test_generated_puzzles_keep_their_blanks_their_split_and_their_answers(split: str) -> None:
    rows = sudoku.generate(2000, split, BLANKS, seed=3)
    assert len(rows) == 2000
    assert {row["prompt"].count("0") for row in rows} == set(range(BLANKS[0], BLANKS[1] + 1))
    assert all(sudoku.is_test_grid(row["answer"]) == (split == "test") for row in rows)
    assert all(sudoku.score(row["prompt"], row["answer"]) == 1.0 for row in rows)


def test_train_and_test_share_no_grid() -> None:
    train, test = ({row["answer"] for row in sudoku.generate(5000, s, BLANKS, seed=0)} for s in ("train", "test"))
    assert not train & test
    assert (len(train), len(test)) == (288 - TEST_GRIDS, TEST_GRIDS)


def test_the_seed_alone_decides_the_puzzles() -> None:
    first, again, other = (sudoku.generate(50, "train", BLANKS, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_changing_any_digit_of_any_grid_scores_zero() -> None:
    for grid in sudoku.all_grids()[::12]:
        for cell in range(16):
            for digit in set("01234") - {grid[cell]}:
                assert sudoku.score("0" * 16, grid[:cell] + digit + grid[cell + 1 :]) == 0.0


def test_every_valid_completion_counts_and_nothing_else() -> None:
    prompt = "1200340000000000"
    fits = [grid for grid in sudoku.all_grids() if all(p in ("0", d) for p, d in zip(prompt, grid, strict=True))]
    assert len(fits) == 12
    assert sum(sudoku.score(prompt, grid) for grid in sudoku.all_grids()) == len(fits)


@given(st.text(max_size=20), st.text(max_size=20))
def test_garbage_scores_zero_and_never_raises(prompt: str, response: str) -> None:
    assert sudoku.score(prompt, response) == 0.0


@pytest.mark.parametrize("blanks", [4, 5, 6, 7, 8, 9])
def test_every_answer_of_the_public_files_scores_one(blanks: int) -> None:
    path = DATA / f"sudoku_4x4_{blanks}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = read_public("sudoku", path)
    assert len(rows) == 108
    assert all(sudoku.score(row["prompt"], row["answer"]) == 1.0 for row in rows)


@pytest.mark.parametrize(
    "line", ["{", "[1]", "7", '{"input": "1"}', '{"input": 1, "output": 2}', "null", '{"input": "1", "output": "2"}']
)
def test_a_broken_public_file_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "puzzles.jsonl"
    path.write_text(
        json.dumps({"input": "1000\n0002\n4003\n0000", "output": "1234\n3412\n4123\n2341"}) + "\n" + line + "\n"
    )
    with pytest.raises(
        DataError, match=r"puzzles\.jsonl:2: not a row of a Sudoku test file .* expected input and output"
    ):
        read_public("sudoku", path)


@pytest.mark.parametrize(
    ("content", "told"), [(b"", "is empty"), (b"\xff\xfe", "cannot be read as UTF-8 text"), (None, "cannot")]
)
def test_a_public_file_that_is_no_text_is_named(tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "puzzles.jsonl"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=rf"puzzles\.jsonl: {told}"):
        read_public("sudoku", path)
