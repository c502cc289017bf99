"""Prompts -> drafts with a model that stands in for vLLM: rows, seeds, and what is refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dtrpo_ray.config.produce import DraftsConfig
from dtrpo_ray.config.task import PromptsTask
from dtrpo_ray.data import prepare
from dtrpo_ray.data.formats.tokenize import content_id
from dtrpo_ray.data.schemas import TRAJECTORY
from dtrpo_ray.data.tables import QUARANTINE, read_table
from dtrpo_ray.models.tokenizer import character_tokenizer
from dtrpo_ray.produce import drafts
from dtrpo_ray.produce.drafts import Drafter, draft_id, draft_seed
from dtrpo_ray.produce.llm import GenerateParams, Reply

PROMPTS: list[Any] = ["1+1", "2+2", {"prompt": "3"}, "1+1", "x", "4444444444", "5", "6", {"prompt": 7}]
GRID = {"block_size": 4, "block_origin": "global", "shift": 0}


class Echo:
    """Answers with the last digits of the seed; never ends an answer to 5, says nothing to 6."""

    longest = 16

    def __init__(self, path: Path, engine: dict[str, Any]) -> None:
        assert (path, engine) == (Path("drafter"), {"enforce_eager": True})
        self.tokenizer = character_tokenizer("0123456789+x")

    def encode(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt)["input_ids"])

    def generate(self, prompts: list[list[int]], how: GenerateParams, seeds: list[int]) -> list[Reply]:
        assert how == GenerateParams(8, 0.5, 0.9, 0)
        texts = [self.tokenizer.decode(ids) for ids in prompts]
        return [Reply("" if t == "6" else str(s)[-5:], t != "5") for t, s in zip(texts, seeds, strict=True)]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PromptsTask, tuple[Any, ...]]:
    monkeypatch.setattr(drafts, "LanguageModel", Echo)
    character_tokenizer("0123456789+").save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": row, "answer": i} if isinstance(row, str) else row for i, row in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = PromptsTask.model_validate({"type": "prompts", "files": [str(tmp_path / "prompts.jsonl")]})
    return task, (task, tmp_path / "tokenizer", GRID, {task.files[0]: "data"})


def drafted(job: tuple[PromptsTask, tuple[Any, ...]], size: int, out: Path, seed: int = 3) -> tuple[Any, Any]:
    sampling = {"num_samples": 2, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 8}
    config = DraftsConfig(model=Path("drafter"), engine={"enforce_eager": True}, batch_size=size, **sampling)
    out.mkdir()
    drafter = Drafter(prepare.ImportJob(*job[1]), config, "model", seed)
    done = [drafter(part, out) for part in prepare.import_parts(job[0], size)]
    counts = prepare.finish_import(done, TRAJECTORY, out)
    return counts, read_table(out, TRAJECTORY).sort_by("row_id")


def test_a_draft_is_a_trajectory_without_steps(job: Any, tmp_path: Path) -> None:
    _, table = drafted(job, 100, tmp_path / "out")
    rows = {(row["prompt"], row["row_id"][-3:]): row for row in table.to_pylist()}
    assert sorted(rows) == [(p, n) for p in ("1+1", "2+2", "3") for n in ("001", "002")]
    row = rows["2+2", "002"]
    assert row["row_id"] == draft_id(content_id("2+2"), 2)
    assert row["seed"] == draft_seed(3, row["row_id"])
    assert row["response"] == str(row["seed"])[-5:] != rows["2+2", "001"]["response"]
    same = {"engine": "vllm", "model_hash": "model", "data_hash": "data", "answer": "1", "temperature": 0.5}
    same |= {"support": "truncated", "steps": None, "ranks": None, "types": None, "logps": None, "reward": None}
    assert {name: row[name] for name in same} == same
    assert (row["sampler"]["top_p"], row["sampler"]["max_new_tokens"]) == (0.9, 8)
    assert (len(row["prompt_ids"]) + len(row["response_ids"])) % 4 == 0


def test_every_prompt_is_drafted_or_refused_by_name(job: Any, tmp_path: Path) -> None:
    counts, _ = drafted(job, 100, tmp_path / "out")
    refused = {"duplicate row": 1, "cannot be tokenized": 2, "prompt too long": 1, "unfinished": 2}
    refused |= {"empty side": 2, "wrong type": 1}
    assert counts == {"rows": 15, "good": 6, "refused": refused}
    lines = [json.loads(line) for line in (tmp_path / "out" / QUARANTINE).read_text().splitlines()]
    assert Counter(line["reason"] for line in lines) == refused
    origins = {line["reason"]: line["origin"].removeprefix(job[0].files[0]) for line in lines}
    assert (origins["unfinished"], origins["prompt too long"]) == (":7#2", ":6")


def test_parts_change_nothing_and_the_seed_does(job: Any, tmp_path: Path) -> None:
    counts, whole = drafted(job, 100, tmp_path / "whole")
    again, apart = drafted(job, 2, tmp_path / "apart")
    assert apart.equals(whole)
    assert again["good"] == counts["good"]
    assert not drafted(job, 100, tmp_path / "other", seed=4)[1].equals(whole)
