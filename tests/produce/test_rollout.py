"""Prompts of a file -> trajectories of a tiny model: rows, seeds, settings, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from dtrpo_ray.config.decode import STEPS, EvalConfig, RolloutConfig, Setting
from dtrpo_ray.config.task import PromptsTask
from dtrpo_ray.data import prepare
from dtrpo_ray.data.formats.tokenize import content_id
from dtrpo_ray.data.schemas import TRAJECTORY
from dtrpo_ray.data.tables import read_table
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.errors import ConfigError
from dtrpo_ray.models.registry import save_model
from dtrpo_ray.models.tokenizer import character_tokenizer
from dtrpo_ray.produce.rollout import (
    DecodeJob,
    FileRecorder,
    Recorder,
    at_setting,
    request_parts,
    require_fit,
    sampling_params,
)

PROMPTS: list[Any] = ["ab", "cd", "ab", "9", "a" * 30, {"prompt": 7}, "e"]
GRID = {"block_size": 4, "block_origin": "global", "shift": 0}


@pytest.fixture
def policy(tmp_path: Path, make_model: Any) -> Path:
    folder = tmp_path / "policy"
    folder.mkdir()
    save_model(make_model(seed=1, max_position_embeddings=32), folder)
    character_tokenizer("abcdefghijklmnopqrstu").save_pretrained(folder)
    return folder


def rollout(policy: Path, out: Path, rows: int = 100, number: int = 1, **changes: Any) -> tuple[dict[str, Any], Any]:
    """(counts, table by row id) of PROMPTS in parts of `rows` prompts."""
    lines = [row if isinstance(row, dict) else {"prompt": row, "answer": i} for i, row in enumerate(PROMPTS)]
    file = policy.parent / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = PromptsTask.model_validate({"type": "prompts", "files": [str(file)]})
    how = changes or {"denoising_steps": (1, 2)}
    config = RolloutConfig.model_validate({"num_samples": 3, "max_new_tokens": 8, **how})
    job = DecodeJob(policy, "model", sampling_params(config), 4, 0)
    worker = FileRecorder(prepare.ImportJob(task, policy, GRID, {task.files[0]: "data"}), job, config, number, 1)
    out.mkdir()
    done = [worker(part, out) for part in prepare.import_parts(task, rows)]
    return prepare.finish_import(done, TRAJECTORY, out), read_table(out, TRAJECTORY).sort_by("row_id")


def test_each_prompt_of_a_file_is_sampled_and_keeps_its_answer(policy: Path, tmp_path: Path) -> None:
    counts, table = rollout(policy, tmp_path / "out")
    refused = {"duplicate row": 1, "cannot be tokenized": 1, "prompt too long": 1, "wrong type": 1}
    assert counts == {"rows": 13, "good": 9, "refused": refused}
    rows = {row["row_id"]: row for row in table.to_pylist()}
    assert sorted(rows) == sorted(f"r1-{content_id(text)}-{n:02d}" for text in ("ab", "cd", "e") for n in range(3))
    row = rows[f"r1-{content_id('cd')}-01"]
    assert (row["prompt"], row["answer"], row["origin"][-3:]) == ("cd", "1", "2#2")
    assert (row["denoising_steps"], row["reward"], row["data_hash"], row["model_hash"]) == (2, None, "data", "model")
    assert (len(row["prompt_ids"]) + len(row["response_ids"])) % 4 == 0
    assert len({tuple(row["response_ids"]) for row in rows.values()}) > 3


def test_parts_change_nothing_and_the_round_does(policy: Path, tmp_path: Path) -> None:
    _, whole = rollout(policy, tmp_path / "whole")
    _, apart = rollout(policy, tmp_path / "apart", rows=1)
    sampled = ["row_id", "response_ids", "steps", "seed", "answer", "prompt_id"]  # logps' last bits are the batch's
    assert apart.select(sampled).equals(whole.select(sampled))
    _, other = rollout(policy, tmp_path / "other", number=2)
    assert other["seed"].to_pylist() != whole["seed"].to_pylist()


def test_the_settings_reach_the_decoder_and_its_record(policy: Path, tmp_path: Path) -> None:
    settings = {"threshold": 0.9, "top_k": 5, "top_p": 0.5, "small_block_size": 2}
    assert sampling_params(RolloutConfig.model_validate(settings)) == SamplingParams(
        max_new_tokens=16,
        denoising_steps=2,
        temperature=1.0,
        threshold=0.9,
        remasking="low_confidence_dynamic",
        top_p=0.5,
        top_k=5,
        small_block_size=2,
    )
    config = RolloutConfig(remasking="sequential", denoising_steps=(3,))
    assert sampling_params(config) == SamplingParams(
        max_new_tokens=16, denoising_steps=3, temperature=1.0, remasking="sequential"
    )
    assert sampling_params(RolloutConfig(tokens_per_step=2)).policy == "low_confidence_top_k"
    row = rollout(policy, tmp_path / "out", **settings)[1].to_pylist()[0]
    assert row["denoising_steps"] is None  # its policy is not measured in steps
    assert row["num_forwards"] == max(row["steps"]) + 1
    assert {name: row["sampler"][name] for name in settings} == settings
    assert (row["sampler"]["remasking"], row["support"]) == ("low_confidence_dynamic", "truncated")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_length": 8}, "rollout.block_length = 8, but this model was trained on blocks of 4; leave it out"),
        ({"small_block_size": 3}, "rollout.small_block_size = 3 does not divide the block of 4 tokens"),
        ({"tokens_per_step": 5}, "rollout.tokens_per_step = 5 exceeds the model's block of 4 tokens"),
        ({"denoising_steps": [2, 6]}, "rollout.denoising_steps = 6 exceeds the model's block of 4 tokens"),
    ],
)
def test_what_the_blocks_do_not_allow_is_refused(policy: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_fit(policy, RolloutConfig.model_validate(settings))
    assert words in str(caught.value)
    require_fit(policy, RolloutConfig(threshold=0.5))


def test_a_request_with_a_setting_of_its_own_is_decoded_at_it(policy: Path) -> None:
    """In one pass over requests, each as if it were alone: ids, steps and forwards; and each is recorded as it was."""
    base = SamplingParams(max_new_tokens=8, denoising_steps=1, temperature=1.0)
    settings = EvalConfig(budgets=(1, 4), thresholds=(0.03, 0.2)).settings
    requests = [
        at_setting({"row_id": f"{setting}/{text}", "prompt_id": text, "prompt": text}, setting)
        for text in ("ab", "cd", "e")
        for setting in settings
    ]
    rows = Recorder(DecodeJob(policy, "model", base, 2, 0), 1).decode(requests).to_pylist()
    assert sorted(row["row_id"] for row in rows) == sorted(request["row_id"] for request in requests)
    for row in rows:
        setting = Setting.parse(row["row_id"].split("/")[0])
        alone = base.model_copy(update={setting.field: setting.value})
        own = {"row_id": row["row_id"], "prompt_id": row["prompt_id"], "prompt": row["prompt"]}
        (same,) = Recorder(DecodeJob(policy, "model", alone, 2, 0), 1).decode([own]).to_pylist()  # type: ignore[list-item]
        for name in ("response_ids", "steps", "num_forwards", "sampler", "seed"):
            assert row[name] == same[name]
        recorded = row["denoising_steps"] if setting.field == STEPS else row["sampler"]["threshold"]
        assert recorded == setting.value
    forwards = {row["row_id"]: row["num_forwards"] for row in rows}
    assert {forwards[f"threshold=0.03/{text}"] < forwards[f"threshold=0.2/{text}"] for text in ("ab", "cd", "e")} == {
        True
    }
    parts = request_parts(requests, 2)
    assert [len(part.requests) for part in parts] == [8, 4]  # two requests for each of four settings
