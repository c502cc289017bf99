"""Word problems: equations and answers that hold, splits that share nothing, and the tokens of a chat model."""

import json
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT

from dtrpo_ray.config.job import Job
from dtrpo_ray.config.load import load_job
from dtrpo_ray.config.task import WordProblemsTask
from dtrpo_ray.data import prepare
from dtrpo_ray.data.schemas import EXAMPLE
from dtrpo_ray.data.tables import read_table
from dtrpo_ray.data.tasks import word_problems
from dtrpo_ray.data.tasks.puzzles import generate_puzzles, read_public, scorer_path
from dtrpo_ray.errors import ConfigError, DataError
from dtrpo_ray.models.tokenizer import load_tokenizer

TASK = WordProblemsTask(type="word_problems")
SMOLLM2 = ROOT / "models" / "smollm2-block4"
Row = dict[str, str]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    return {split: generate_puzzles(TASK, 3000, split, seed=1) for split in ("train", "test")}


@pytest.fixture(scope="module")
def score() -> Callable[[str, str, str], float]:
    found: Callable[[str, str, str], float] = pkgutil.resolve_name(scorer_path(TASK))
    return found


def names(row: Row) -> set[str]:
    return set(re.findall(r"\b[A-Z][a-z]+\b", row["prompt"])) & set(word_problems.NAMES)


def skeleton(row: Row) -> str:
    """The templates of a problem: its text without names, numbers and things."""
    words = "|".join((*word_problems.NAMES, *word_problems.THINGS, "[0-9]+"))
    return re.sub(rf"\b(?:{words})\b", "_", row["prompt"])


def test_equations_hold_use_the_numbers_given_and_end_in_the_answer(rows: dict[str, list[Row]]) -> None:
    for row in rows["train"] + rows["test"]:
        *lines, last = row["answer"].split("\n")
        given = [int(number) for number in re.findall("[0-9]+", row["prompt"])]
        value = None
        for line in lines:
            left, sign, right, result = re.fullmatch(r"\D*(\d+) ([-+*/]) (\d+) = (\d+) \D*", line).groups()  # type: ignore[union-attr]
            assert value is None or int(left) == value
            value = int(result)
            assert eval(f"{left} {sign} {right}") == value
            assert int(right) in given
            assert {int(left), int(right), value} <= set(range(2, 100))
        assert last == f"#### {value}"
        assert len(given) == len(lines) + 1


def test_every_answer_scores_one_and_a_changed_or_doubled_digit_zero(
    rows: dict[str, list[Row]], score: Callable[[str, str, str], float]
) -> None:
    for row in rows["test"][:500]:
        assert score(row["prompt"], row["answer"], row["answer"]) == 1
        assert score(row["prompt"], row["answer"] + row["answer"][-1], row["answer"]) == 0
        assert score(row["prompt"], row["answer"][:-1] + str((int(row["answer"][-1]) + 1) % 10), row["answer"]) == 0


def test_the_splits_share_no_name_no_numbers_and_no_pair_of_templates(rows: dict[str, list[Row]]) -> None:
    train, test = rows["train"], rows["test"]
    of_names, of_numbers = ({kind: set() for kind in rows} for _ in range(2))
    for kind, made in rows.items():
        of_names[kind] = set().union(*map(names, made))
        of_numbers[kind] = {tuple(sorted(re.findall("[0-9]+", row["prompt"]))) for row in made}
    assert not of_names["train"] & of_names["test"]
    assert not of_numbers["train"] & of_numbers["test"]
    assert of_names["train"] | of_names["test"] == set(word_problems.NAMES)
    one, two = (
        [{skeleton(row) for row in made if row["answer"].count("=") == steps} for made in (train, test)]
        for steps in (1, 2)
    )
    assert one[0] == one[1]  # a template alone is of both
    assert len(one[0]) == len(word_problems.STARTS)
    assert not two[0] & two[1]
    assert 110 < len(two[0] | two[1]) <= len(word_problems.STARTS) * len(word_problems.ENDS)  # a few are rare


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("steps", [(1, 1), (2, 2)])
def test_the_smallest_numbers_give_problems_of_both_splits(split: str, steps: tuple[int, int]) -> None:
    made = generate_puzzles(WordProblemsTask(type="word_problems", steps=steps, largest=12), 50, split, seed=0)
    assert {row["answer"].count("=") for row in made} == set(steps)
    assert all(int(number) <= 12 for row in made for number in re.findall("[0-9]+", row["answer"]))
    assert all(word_problems.is_test_prompt(row["prompt"]) == (split == "test") for row in made)


def test_the_seed_alone_decides_the_problems() -> None:
    first, again, other = (generate_puzzles(TASK, 50, "train", seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_problem_is_read_as_written() -> None:
    """A change of the generator changes every held-out set, and needs a new CODE_CONTRACT."""
    assert generate_puzzles(TASK, 1, "test", seed=1) == [
        {
            "prompt": "Gina buys 28 boxes with 2 coins each. How many coins does Gina have now?",
            "answer": "Gina has 28 * 2 = 56 coins.\n#### 56",
        }
    ]


def test_public_problems_need_an_answer_in_gsm8ks_format(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"input": "2 and 3?", "output": "2 + 3 = 5\n#### 5"}) + "\n")
    assert read_public("word_problems", path) == [{"prompt": "2 and 3?", "answer": "2 + 3 = 5\n#### 5"}]
    path.write_text(json.dumps({"input": "2 and 3?", "output": "5"}) + "\n")
    with pytest.raises(DataError, match=r"problems\.jsonl:1: .* has no #### N"):
        read_public("word_problems", path)


def job_of(model: Path, *overrides: str) -> Job:
    settings = [f"model={{path='{model}'}}", "task={type='word_problems'}", "sft.num_examples=20"]
    return load_job(ROOT / "jobs" / "sudoku.toml", [*settings, *overrides])


def test_a_new_model_needs_a_tokenizer_of_words() -> None:
    settings = ["task={type='word_problems'}", "rollout.max_new_tokens=48", "eval.max_new_tokens=48"]
    with pytest.raises(ConfigError, match=r"word_problems' with model.init needs model.tokenizer"):
        load_job(ROOT / "jobs" / "sudoku.toml", settings)
    assert load_job(ROOT / "jobs" / "sudoku.toml", [*settings, "model.tokenizer=jobs/data/tokenizer"]).puzzle


@pytest.mark.parametrize("model", [ROOT / "jobs" / "data" / "tokenizer", SMOLLM2], ids=["ours", "smollm2"])
def test_examples_and_requests_are_a_chat_in_the_models_template(model: Path, tmp_path: Path) -> None:
    """A rollout asks what the examples begin with, and the answer's tokens read back as its text, closed by its end."""
    if not model.exists():
        pytest.skip(f"{model} is not here; `make language` makes it")
    tokenizer = load_tokenizer(model)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").touch()
    job = job_of(folder)
    assert job.puzzle is not None
    prepare.write_examples(job, tokenizer, 4, "global", tmp_path)
    made = read_table(tmp_path, EXAMPLE).to_pylist()
    puzzles = generate_puzzles(job.puzzle, 20, "train", job.seed)
    for row, puzzle in zip(made, puzzles, strict=True):
        request = prepare.puzzle_request(job.puzzle, tokenizer, "p", puzzle)
        assert request["prompt_ids"] == row["prompt_ids"]
        assert request["answer"] == puzzle["answer"]
        text = tokenizer.decode(row["prompt_ids"])
        assert text.endswith(f"<|im_start|>user\n{puzzle['prompt']}<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.decode(row["chosen_ids"], skip_special_tokens=True) == puzzle["answer"]
        ends = tokenizer.decode(row["chosen_ids"]).removeprefix(puzzle["answer"])
        assert ends.startswith("<|im_end|>")
        assert (len(row["prompt_ids"]) + len(row["chosen_ids"])) % 4 == 0
