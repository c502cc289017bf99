"""Rewards: a verifier and a judge over files of trajectories, and the rows that a verifier cannot score."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_rows import trajectory

from dtrpo_ray.config.produce import JudgeConfig, ScoreConfig, VerifierName
from dtrpo_ray.data.schemas import TRAJECTORY
from dtrpo_ray.data.tables import TablePart, file_parts, prompt_parts, read_table
from dtrpo_ray.errors import DataError
from dtrpo_ray.models.tokenizer import prompt_messages
from dtrpo_ray.produce.function import Unscorable
from dtrpo_ray.produce.scoring import Scorer, Verifier


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    made = [trajectory(str(i)) | {"reward": None, "reward_source": None} | row for i, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(made, schema=TRAJECTORY), path)
    return path


def test_a_file_is_scored_into_a_file_of_the_same_name_and_nothing_else_changes(tmp_path: Path) -> None:
    source = write(
        tmp_path / "part-0.parquet", [{"response": "#### 4", "answer": "4"}, {"response": "5", "answer": "4"}]
    )
    (tmp_path / "out").mkdir()
    summary = Scorer(ScoreConfig(scorer="gsm8k"))(*file_parts([source]), tmp_path / "out")
    table, before = read_table(tmp_path / "out", TRAJECTORY), read_table(source, TRAJECTORY)
    assert summary == {"failed": 0, "caution": "", "rows": 2, "scored": 2, "sum": 1.0}
    assert table["reward"].to_pylist() == [1.0, 0.0]
    assert set(table["reward_source"].to_pylist()) == {"gsm8k"}
    same = [name for name in TRAJECTORY.names if not name.startswith("reward")]
    assert table.select(same).equals(before.select(same))


IFEVAL = '{"instruction_id_list": %s, "kwargs": %s}'


@pytest.mark.parametrize(
    ("scorer", "answer", "message"),
    [
        ("gsm8k", None, r"part-0\.parquet: row 1: answer is null, and score\.scorer = 'gsm8k' compares with it"),
        ("python_tests", "no JSON", r"part-0\.parquet: row 1: python_tests cannot read this answer"),
        ("instructions", "{}", r"part-0\.parquet: row 1: instructions cannot read this answer"),
        ("instructions", IFEVAL % ("[]", "[]"), "row 1: instructions cannot read this answer"),
        ("instructions", IFEVAL % ('["startend:quotation"]', "[]"), "row 1: instructions cannot read this answer"),
        ("instructions", IFEVAL % ('["startend:quotation"]', "[5]"), "row 1: instructions cannot read this answer"),
        ("instructions", IFEVAL % ('["keywords:existence"]', '[{"keywords": ["("]}]'), "row 1: .*unterminated"),
        ("instructions", IFEVAL % ('["no:such"]', "[null]"), "row 1: instruction 'no:such' is not one of"),
        ("python_tests", "[]", "row 1: python_tests cannot read this answer .a JSON list"),
        ("python_tests", '{"entry_point": "f"}', "row 1: python_tests cannot read this answer"),
        ("python_tests", '{"test_list": 5}', "row 1: python_tests cannot read this answer"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(tmp_path: Path, scorer: Any, answer: Any, message: str) -> None:
    good = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "test_list": ["assert 1"]}
    rows = [{"answer": json.dumps(good), "response": "1"}, {"answer": answer, "response": "1"}]
    with pytest.raises(DataError, match=message):
        Scorer(ScoreConfig(scorer=scorer))(*file_parts([write(tmp_path / "part-0.parquet", rows)]), tmp_path)


@pytest.mark.parametrize(
    ("scorer", "prompt", "answer", "message"),
    [
        ("gsm8k", "", "none", "gsm8k cannot read this answer .it holds no number"),
        ("sudoku", "no puzzle", None, "sudoku finds no puzzle of 16 digits"),
        ("countdown", "no puzzle", None, "countdown finds numbers and a target neither"),
        ("countdown", "1 2 3", "[[1e999], 3]", "countdown cannot read this answer"),
        ("countdown", "1 2 3", "[" * 100_000, "countdown cannot read this answer"),
        ("countdown", "1 2 3", "[[1]]", "countdown cannot read this answer"),
    ],
)
def test_a_reference_that_says_nothing_is_named(scorer: str, prompt: str, answer: str | None, message: str) -> None:
    with pytest.raises(Unscorable, match=message):
        Verifier(scorer)([prompt], ["1"], [answer])


@pytest.mark.parametrize(
    ("scorer", "answer", "response"),
    [
        ("instructions", IFEVAL % ('["detectable_format:json_format"]', "[null]"), "[" * 100_000),
        ("countdown", "[[1], 1]", "-" * 199 + "1"),
        ("countdown", "[[1], 1]", "1/0"),
        ("gsm8k", "4", "9" * 5000 + "/0"),
        ("sudoku", None, "1" * 5000),
        ("python_tests", '{"test_list": ["assert 1"]}', "x = '\ud800'"),
    ],
)
def test_a_response_may_only_score_low(scorer: str, answer: str | None, response: str) -> None:
    assert Verifier(scorer)(["1034341201434320"], [response], [answer]) == [0.0]


def test_what_a_response_does_to_a_verifier_is_its_loss_and_a_full_disk_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OverflowError("inf"), KeyError("x"), RecursionError()):
        monkeypatch.setattr("dtrpo_ray.produce.verifiers.gsm8k.score", Mock(side_effect=error))
        judge = Verifier("gsm8k")
        assert judge(["p"], ["r"], ["1"]) == [0.0]
        assert judge.failed == 1  # told in the stage's summary
    monkeypatch.setattr("dtrpo_ray.produce.verifiers.gsm8k.score", Mock(side_effect=OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        Verifier("gsm8k")(["p"], ["r"], ["1"])


def test_prompts_are_text_or_messages_as_json() -> None:
    messages = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "Why?"}]
    assert prompt_messages(json.dumps(messages)) == messages
    assert prompt_messages("[{") == [{"role": "user", "content": "[{"}]


def numbers(part: TablePart) -> dict[Path, list[int]]:
    return {file: rows.to_pylist() for file, rows in part.rows.items() if rows is not None}


def test_parts_of_a_judge_hold_whole_prompts_and_every_row_once(tmp_path: Path) -> None:
    prompts = [["p", "q", "p"], ["r"], ["q", "p", "s", "s"]]
    files = [
        write(tmp_path / f"{i}.parquet", [{"row_id": f"{i}{n}", "prompt_id": p} for n, p in enumerate(names)])
        for i, names in enumerate(prompts)
    ]
    [whole] = prompt_parts(files, 100)
    assert (whole.name, numbers(whole)) == (
        "part-00000.parquet",
        {files[0]: [0, 1, 2], files[1]: [0], files[2]: [0, 1, 2, 3]},
    )
    assert [numbers(part) for part in prompt_parts(files, 3)] == [
        {files[0]: [0, 2], files[2]: [1]},
        {files[0]: [1], files[1]: [0], files[2]: [0]},
        {files[2]: [2, 3]},
    ]


def test_a_judge_scores_a_prompt_across_files_and_leaves_a_lone_response_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Longer:
        def __init__(self, config: JudgeConfig) -> None:
            self.counts = Counter(decided=1)
            assert config.model == Path("judge")

        def __call__(self, prompts: Any, responses: Any, answers: Any) -> list[float | None]:
            return [1.0 if text == "xx" else 0.0 if text == "x" else None for text in responses]

    monkeypatch.setattr("dtrpo_ray.produce.scoring.Judge", Longer)
    files = [write(tmp_path / "a.parquet", [{"response": "x"}, {"response": "lone", "prompt_id": "q"}])]
    files += [write(tmp_path / "b.parquet", [{"response": "xx", "row_id": "2"}])]
    (tmp_path / "out").mkdir()
    scorer = Scorer(ScoreConfig(scorer="judge", judge=JudgeConfig(model=Path("judge"))))
    (part,) = prompt_parts(files, 10)
    assert scorer(part, tmp_path / "out") == {"rows": 3, "scored": 2, "sum": 1.0, "comparisons": {"decided": 1}}
    table = read_table(tmp_path / "out", TRAJECTORY)
    assert table["reward"].to_pylist() == [0.0, None, 1.0]
    assert table["reward_source"].to_pylist() == ["judge judge", None, "judge judge"]


@pytest.mark.parametrize("name", get_args(VerifierName))
def test_a_job_knows_which_verifiers_need_a_reference_answer(name: Any) -> None:
    optional = getattr(Verifier(name).module, "ANSWER_OPTIONAL", False)
    assert ScoreConfig(scorer=name).needs_answers is not optional
