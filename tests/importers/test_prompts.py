"""Files of prompts: columns, pairs, answers, refusals, and the counts of real files."""

import json
from pathlib import Path
from typing import Any

import pytest

from dtrpo_ray.checking import check_data
from dtrpo_ray.errors import DataError
from dtrpo_ray.importers.files import Shard
from dtrpo_ray.importers.prompts import PromptRow, read_shard, recognise
from dtrpo_ray.tables import Rejected

ASK = [{"role": "user", "content": "Why?"}]


def read(path: Path) -> list[PromptRow | Rejected]:
    return list(read_shard(recognise(str(path)), Shard(str(path))))


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "Why?"}, "Why?", None),
        ({"prompt": ASK, "answer": "So."}, ASK, "So."),
        ({"question": "1+1?", "answer": "#### 2"}, "1+1?", "#### 2"),
        ({"question": "Reach 3.", "ground_truth": [[1, 2], 3]}, "Reach 3.", "[[1, 2], 3]"),
        ({"prompt": "Why?", "response": "So."}, "Why?", None),
        ({"prompt": "Why?", "completion": "So.", "label": True}, "Why?", None),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "Why?", None),
        ({"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No."}, ASK, None),
    ],
)
def test_a_prompt_is_a_column_or_that_of_a_pair(tmp_path: Path, row: Any, prompt: Any, answer: str | None) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    assert read(tmp_path / "p.jsonl") == [PromptRow(f"{tmp_path}/p.jsonl:1", prompt, answer)]


def test_what_is_no_prompt_is_refused_or_named(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "Why?"}, {"prompt": None}, {"prompt": " "}, {"prompt": [{"role": "cat"}]}, 7]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reasons = [row.reason for row in read(tmp_path / "p.jsonl") if isinstance(row, Rejected)]
    assert reasons == ["missing field", "empty prompt", "unknown role", "not an object"]
    (tmp_path / "p.jsonl").write_text('{"text": "Why?"}')
    with pytest.raises(DataError, match=r"p\.jsonl: no column of prompts among text; known are prompt, question"):
        recognise(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize(
    ("file", "count"), [("gsm8k/test.jsonl", 1319), ("llamafactory_dpo_demo/dpo_en_demo.json", 300)]
)
def test_real_files(shared_data: Path, file: str, count: int) -> None:
    assert sum(isinstance(row, PromptRow) for row in read(shared_data / file)) == count


def test_check_counts_prompts_as_a_job_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows: list[Any] = [{"question": "1+1?", "answer": "2"}, {"question": 3}, {"prompt": "no"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (report,) = check_data(str(file))
    assert (report.table, report.totals) == (
        "prompts, prompt",
        {"rows": 3, "good": 1, "refused": {"missing field": 2}},
    )
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) + "\n")
    names = [check_data(str(pairs), kind=kind)[0].table for kind in (None, "preferences", "prompts")]
    assert names[0] == names[1]
    assert names[2] == f"prompts, {names[1]}"
    with pytest.raises(DataError, match=r"prompts\.jsonl: .*columns"):
        check_data(str(file), kind="preferences")
