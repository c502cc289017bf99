"""Countdown: the checker against an enumeration of all derivations, the split, the puzzles, the public files."""

import itertools
import json
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import SHARED

from dtrpo_ray.data.tasks import countdown
from dtrpo_ray.data.tasks.puzzles import read_public
from dtrpo_ray.errors import DataError

DATA = SHARED / "puzzles"


def derivations(numbers: tuple[int, ...], target: int) -> Iterator[str]:
    """Every derivation, by trying each ordered pair and each sign in rational arithmetic."""
    if len(numbers) == 1:
        yield from [""] if numbers[0] == target else []
        return
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        values = {
            "+": Fraction(a + b),
            "-": Fraction(a - b),
            "*": Fraction(a * b),
            "/": Fraction(a, b) if b else Fraction(-1),
        }
        for sign, value in values.items():
            if value >= 0 and value.denominator == 1:
                for tail in derivations((*rest, int(value)), target):
                    yield f"{a}{sign}{b}={value}" + ("," + tail if tail else "")


@cache
def solutions(prompt: str) -> frozenset[str]:
    *numbers, target = map(int, prompt.removesuffix(":").split(","))
    return frozenset(derivations(tuple(numbers), target))


PUZZLES = [row["prompt"] for n in (2, 3) for row in countdown.generate(20, "train", n, seed=5)] + [
    "2,2,2,2,8",
    "5,5,0,5",
]


@pytest.mark.parametrize("prompt", PUZZLES)
def test_every_derivation_there_is_scores_one(prompt: str) -> None:
    assert solutions(prompt)
    assert all(countdown.score(prompt, solution) == 1.0 for solution in solutions(prompt))


@given(st.sampled_from(PUZZLES), st.data())
def test_an_edited_derivation_scores_one_only_if_it_is_another_derivation(prompt: str, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(sorted(solutions(prompt))))
    at = data.draw(st.integers(0, len(text)))
    removed = data.draw(st.integers(0, 2))
    edited = text[:at] + data.draw(st.text(countdown.ALPHABET, max_size=2)) + text[at + removed :]
    assert countdown.score(prompt, edited) == float(edited in solutions(prompt))


@given(st.text(max_size=40), st.text(max_size=40))
def test_garbage_scores_zero_and_never_raises(prompt: str, response: str) -> None:
    assert countdown.score(prompt, response) == 0.0


@given(st.text(countdown.ALPHABET, max_size=200), st.text(countdown.ALPHABET, max_size=200))
def test_garbage_of_the_alphabet_never_raises(prompt: str, response: str) -> None:
    assert countdown.score(prompt, response) in (0.0, 1.0)
    assert countdown.score("15,44,79,50", response) == float(response in solutions("15,44,79,50"))


@pytest.mark.parametrize(
    ("prompt", "response", "why"),
    [
        ("3,4,7,14", "3+4=7,7+7=14", None),
        ("3,4,5,7", "3+4=7", "5 is left over"),
        ("3,4,14", "3+4=7,7+7=14", "7 is used twice"),
        ("3,4,8", "3+4=8", "the sum is wrong"),
        ("3,4,8", "3+4=7", "the target is missed"),
        ("7,2,3", "7/2=3", "the division is not exact"),
        ("7,0,0", "7/0=0", "division by zero"),
        ("3,4,1", "3-4=-1", "below zero"),
        ("3,4,7", "03+4=7", "a leading zero"),
        ("3,4,7", "3+4=7\n", "a line break at the end"),
        ("3,4,7", "3+4=7,", "an empty equation"),
        ("3,4,7", "", "nothing"),
        ("7,7", "", "one number and nothing to do"),
        ("3,4,7", "\u0663+4=7", "a digit of another script"),
        ("3,4,7", "3**4=7", "no operation of ours"),
        ("1,1,1", "1*1=1," * 10**6, "too long to read"),
    ],
)
def test_the_checker_refuses(prompt: str, response: str, why: str | None) -> None:
    assert countdown.score(prompt, response) == float(why is None)


@pytest.mark.parametrize(("numbers", "longest"), [(2, 8), (3, 21), (4, 36)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_generated_puzzles_keep_their_split_their_ranges_and_their_answers(
    split: str, numbers: int, longest: int
) -> None:
    rows = countdown.generate(1000, split, numbers, seed=7)
    assert len(rows) == 1000
    assert all(countdown.score(row["prompt"], row["answer"]) == 1.0 for row in rows)
    assert all(countdown.is_test_prompt(row["prompt"]) == (split == "test") for row in rows)
    for row in rows:
        assert row["prompt"].endswith(":")
        *given_numbers, target = map(int, row["prompt"][:-1].split(","))
        assert len(given_numbers) == numbers
        assert 1 <= min(given_numbers) <= max(given_numbers) <= 99
        assert 10 <= target <= 99
        assert len(row["answer"]) <= longest <= countdown.RESPONSE_CHARS
        assert set(row["prompt"] + row["answer"]) <= set(countdown.ALPHABET)


def test_the_split_holds_out_30_percent_and_every_reordering_with_it() -> None:
    held_out = sum(countdown.is_test_prompt(f"{a},{b},{a + b}") for a in range(1, 100) for b in range(a, 100))
    assert held_out / 4950 == pytest.approx(0.3, abs=0.02)
    for order in itertools.permutations(["15", "44", "79"]):
        assert countdown.is_test_prompt(",".join([*order, "50"])) == countdown.is_test_prompt("15,44,79,50")


def test_the_seed_alone_decides_the_puzzles() -> None:
    first, again, other = (countdown.generate(50, "train", 3, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(("name", "numbers", "held_out"), [("cd3_test.jsonl", 3, 315), ("cd4_test.jsonl", 4, 306)])
def test_every_answer_of_the_public_files_scores_one(name: str, numbers: int, held_out: int) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not here")
    rows = read_public("countdown", DATA / name)
    assert len(rows) == 1000
    assert {row["prompt"].count(",") for row in rows} == {numbers}
    assert sum(countdown.score(row["prompt"], row["answer"]) for row in rows) == 1000
    assert sum(countdown.is_test_prompt(row["prompt"]) for row in rows) == held_out


def test_the_public_file_without_derivations_is_solvable() -> None:
    path = DATA / "d1_countdown_cd3_test.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = read_public("countdown", path)
    assert len(rows) == 256
    assert rows[0] == {"prompt": "30,100,93,23:", "answer": ""}
    solved = [solutions(row["prompt"]) for row in rows]
    assert sum(map(bool, solved)) == 256
    assert all(countdown.score(r["prompt"], min(found)) == 1.0 for r, found in zip(rows, solved, strict=True))


@pytest.mark.parametrize(
    "line", ["{", "[1]", "7", '{"input": "1,2"}', '{"input": 1, "output": 2}', '{"input": "a", "output": "1"}']
)
def test_a_broken_public_file_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "puzzles.jsonl"
    path.write_text(json.dumps({"input": "3,4", "output": "7"}) + "\n" + line + "\n")
    with pytest.raises(
        DataError, match=r"puzzles\.jsonl:2: not a row of a Countdown test file .* expected input and output"
    ):
        read_public("countdown", path)
