"""Files of prompts: columns, pairs, answers, refusals, and the counts of real files."""

import json
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from dtrpo_ray.config.load import load_job
from dtrpo_ray.data.formats.files import Shard
from dtrpo_ray.data.formats.parsing import Columns
from dtrpo_ray.data.formats.prompts import PromptRow, prompt_format
from dtrpo_ray.data.formats.reading import raw_rows
from dtrpo_ray.data.prepare import check_data, check_job
from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.errors import DataError
from dtrpo_ray.produce.scoring import Verifier

ASK = [{"role": "user", "content": "Why?"}]


def read(path: Path) -> list[PromptRow | Rejected]:
    return list(prompt_format(str(path)).read(Shard(str(path))))


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "Why?"}, "Why?", None),
        ({"prompt": ASK, "answer": "So."}, ASK, "So."),
        ({"question": "1+1?", "answer": "#### 2"}, "1+1?", "#### 2"),
        ({"question": "Reach 3.", "ground_truth": [[1, 2], 3]}, "Reach 3.", "[[1, 2], 3]"),
        ({"prompt": "Why?", "response": "So."}, "Why?", None),
        ({"prompt": "Why?", "turn": 2, "answer": "So."}, "Why?", "So."),
        ({"prompt": "Why?", "completion": "So.", "label": True}, "Why?", None),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "Why?", None),
        ({"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No."}, ASK, None),
    ],
)
def test_a_prompt_is_a_column_or_that_of_a_pair(tmp_path: Path, row: Any, prompt: Any, answer: str | None) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    assert read(tmp_path / "p.jsonl") == [PromptRow(prompt, answer, origin=f"{tmp_path}/p.jsonl:1")]


def test_what_is_no_prompt_is_refused_or_named(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "Why?"}, {"prompt": None}, {"prompt": " "}, {"prompt": [{"role": "cat"}]}, 7]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reasons = [row.reason for row in read(tmp_path / "p.jsonl") if isinstance(row, Rejected)]
    assert reasons == ["missing field", "empty prompt", "unknown role", "not an object"]
    (tmp_path / "p.jsonl").write_text('{"text": "Why?"}')
    with pytest.raises(
        DataError, match=r"p\.jsonl: no format of prompts, or of pairs has these columns: text; known formats: Hum"
    ):
        prompt_format(str(tmp_path / "p.jsonl"))


def test_a_row_without_the_answer_that_its_scorer_compares_with_is_refused(tmp_path: Path) -> None:
    """As prepare, rollout and `dtrpo check JOB` read it: before anything is decoded."""
    verl = {"data_source": "s", "prompt": ASK, "ability": "math", "extra_info": {"index": 0}}
    rows: list[Any] = [
        verl | {"reward_model": {"style": "rule", "ground_truth": "4"}},
        verl | {"reward_model": {"style": "model", "ground_truth": None}},
        verl | {"reward_model": {"style": "model"}},
        verl,
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        list(prompt_format(str(file), Columns(answers=answers)).read(Shard(str(file)))) for answers in (True, False)
    ]
    assert [row.reason if isinstance(row, Rejected) else row.answer for row in found[0]] == [
        "4",
        *["no reference answer"] * 3,
    ]
    assert [row.answer for row in found[1] if isinstance(row, PromptRow)] == ["4", None, None, None]
    assert len(found[1]) == 4


@pytest.mark.parametrize(("scorer", "good"), [("gsm8k", 1), ("countdown", 2)])
def test_check_of_a_job_counts_rows_without_an_answer(tmp_path: Path, scorer: str, good: int) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"question": "1+1?", "answer": "#### 2"}\n{"question": "1+2?", "answer": null}\n')
    settings = [f"task.files=['{file}']", f"score.scorer='{scorer}'"]
    (report,) = check_job(load_job(ROOT / "jobs" / "prompts.toml", settings))
    assert report.totals["good"] == good
    assert report.totals["refused"] == ({"no reference answer": 1} if good == 1 else {})


@pytest.mark.parametrize(
    ("file", "name", "count", "answered"),
    [
        ("gsm8k/test.jsonl", "prompt", 1319, 1319),
        ("llamafactory_dpo_demo/dpo_en_demo.json", "pairs with a prompt", 300, 0),
        ("humaneval/HumanEval.jsonl.gz", "HumanEval", 164, 164),
        ("mbpp/mbpp.jsonl", "MBPP", 974, 974),
        ("ifeval/input_data.jsonl", "IFEval", 541, 541),
        ("mt_bench_prompts/question.jsonl", "MT-bench", 80, 0),
    ],
)
def test_real_files(shared_data: Path, file: str, name: str, count: int, answered: int) -> None:
    rows = read(shared_data / file)
    assert prompt_format(str(shared_data / file)).name == name
    assert all(isinstance(row, PromptRow) for row in rows)
    assert (len(rows), sum(row.answer is not None for row in rows if isinstance(row, PromptRow))) == (count, answered)


def test_the_published_solutions_pass_the_published_tests(shared_data: Path) -> None:
    """Prompts of HumanEval and MBPP with the answers that the importer makes, scored by python_tests."""
    judge = Verifier("python_tests")
    for file, solution in (("humaneval/HumanEval.jsonl.gz", "canonical_solution"), ("mbpp/mbpp.jsonl", "code")):
        rows = read(shared_data / file)[:8]
        shard = Shard(str(shared_data / file), rows=8)
        solutions = [value[solution] for _, value in raw_rows(shard)][:8]
        prompts, answers = [row.prompt for row in rows], [row.answer for row in rows]  # type: ignore[union-attr]
        assert judge(prompts, solutions, answers) == [1.0] * 8  # type: ignore[arg-type]
        assert judge(prompts, ["pass"] * 8, answers) == [0.0] * 8  # type: ignore[arg-type]


def test_a_task_with_tests_becomes_a_prompt_that_shows_them(tmp_path: Path) -> None:
    for row in (
        {"text": "Add.", "test_list": ["assert add(1, 2) == 3"], "test_setup_code": "import math"},
        {"prompt": "Add.", "test_list": ["assert add(1, 2) == 3"], "test_imports": ["import math"]},
        {"prompt": "Add.", "test_list": ["assert add(1, 2) == 3"], "test_imports": "import math"},
    ):
        (tmp_path / "p.json").write_text(json.dumps(row))  # a file of one row
        answer = {"test_list": ["assert add(1, 2) == 3"], "test_setup_code": "import math"}
        prompt = "Add.\nThe code must pass these tests:\nassert add(1, 2) == 3"
        assert read(tmp_path / "p.json") == [PromptRow(prompt, json.dumps(answer), origin=f"{tmp_path}/p.json:1")]
    for row in ({"text": "Add.", "test_list": "assert"}, {"text": 3, "test_list": ["assert"]}):
        (tmp_path / "p.json").write_text(json.dumps(row))
        assert [one.reason for one in read(tmp_path / "p.json") if isinstance(one, Rejected)] == ["wrong type"]


def test_check_counts_prompts_as_a_job_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows: list[Any] = [{"question": "1+1?", "answer": "2"}, {"question": 3}, {"prompt": "no"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (report,) = check_data(str(file))
    assert (report.table, report.totals) == (
        "prompts, prompt",
        {"rows": 3, "good": 2, "refused": {"wrong type": 1}},
    )
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) + "\n")
    assert check_data(str(pairs))[0].table == "pairs with a prompt"
