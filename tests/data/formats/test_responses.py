"""Files of responses: each format by hand, each refusal, and the counts of real files."""

import json
import re
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from paths import ROOT
from read_rows import read_prompts, read_responses

from dtrpo_ray.data.formats.base import RowFormat, split_rejected
from dtrpo_ray.data.formats.files import Shard
from dtrpo_ray.data.formats.parsing import Record
from dtrpo_ray.data.formats.responses import RESPONSE_FORMATS, ResponseRow
from dtrpo_ray.errors import DataError

Value = dict[str, Any]
META = {
    "dllm_replay_contract_version": 1,
    "dllm_replay_token_ids": [3, 4, 9, 9],
    "dllm_replay_step_maps": [2, 1, 2, 3],
    "dllm_stop_length": 3,
}
SGLANG: Value = {"text": "34", "output_ids": [3, 4, 9], "meta_info": META, "input_ids": [1, 2]}
ROLLOUT: Value = {
    "question": "What?",
    "prompt": "<user>What?",
    "ground_truth_answer": "34",
    "full_output": ["34", "56"],
    "step_map": [[1, 2], [2, 1]],
    "rewards": [1.0, 0.0],
}
DIRL: Value = ROLLOUT | {
    "prompt": ["<user>What?"] * 2,
    "ground_truth_answer": ["34", "34"],
    "prompt_ids": [[1, 2], [1, 2]],
    "token_ids": [[3, 4], [5, 6]],
    "step_map": [[1, 2], [2, -1]],
}
SNAPSHOTS: Value = {"prompt_ids": [1], "mask_id": 8, "snapshots": [[8, 4, 8], [3, 4, 8], [3, 4, 8]]}

LAYOUTS: dict[str, tuple[Value, list[Value]]] = {
    "generations": (
        {"prompt": "What?", "response": "34", "answer": 34, "reward": 1},
        [{"prompt": "What?", "response": "34", "answer": "34", "reward": 1.0}],
    ),
    "d1": (
        {"question": "What?", "generations": "34<|eot_id|><|endoftext|>\n", "ground_truth": [[3], 4]}
        | {"gen_length": 128, "steps": 64},
        [{"prompt": "What?", "response": "34", "answer": "[[3], 4]", "max_new_tokens": 128} | {"denoising_steps": 16}],
    ),
    "dLLM-RL": (
        ROLLOUT,
        [
            {"prompt": "<user>What?", "response": "34", "answer": "34", "reward": 1.0, "steps": [1, 2]},
            {"prompt": "<user>What?", "response": "56", "answer": "34", "reward": 0.0, "steps": [2, 1]},
        ],
    ),
    "dLLM-RL training": (
        {"prompt": "<user>What?", "response": "34", "step_map": [0, 0], "reward": -0.5},
        [{"prompt": "<user>What?", "response": "34", "reward": -0.5, "steps": [0, 0]}],
    ),
    "DiRL": (
        DIRL,
        [
            {"prompt": "<user>What?", "response": "34", "answer": "34", "reward": 1.0, "steps": [1, 2]}
            | {"prompt_ids": [1, 2], "response_ids": [3, 4]},
            {"prompt": "<user>What?", "response": "56", "answer": "34", "reward": 0.0, "steps": [2, -1]}
            | {"prompt_ids": [1, 2], "response_ids": [5, 6]},
        ],
    ),
    "JetEngine": (
        {"prompt": "What?", "text": "34", "token_ids": [3, 4], "first_unmask_times": [2, 1], "logprobs": [-1, 0]},
        [{"prompt": "What?", "response": "34", "response_ids": [3, 4], "steps": [2, 1], "logps": [-1.0, 0.0]}],
    ),
    "SGLang": (
        SGLANG,
        [{"prompt_ids": [1, 2], "response": "34", "response_ids": [3, 4, 9, 9], "steps": [2, 1, 2, 3]}],
    ),
    "step map over texts": (
        {"tokens": ["3", "4"], "step_map": [2, 1], "remask_events": 0},
        [{"prompt": "", "pieces": ["3", "4"], "steps": [2, 1]}],
    ),
    "snapshots of ids": (SNAPSHOTS, [{"prompt_ids": [1], "response_ids": [3, 4, 8], "steps": [2, 1, -1]}]),
}

ENGINES = {"generations": "unknown", "dLLM-RL": "dLLM-RL/DiRL", "dLLM-RL training": "dLLM-RL", "DiRL": "dLLM-RL/DiRL"}
ENGINES |= {"step map over texts": "step map", "snapshots of ids": "snapshots"}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_format_gives_its_samples(tmp_path: Path, layout: str) -> None:
    row, samples = LAYOUTS[layout]
    path = write(tmp_path / "rows.jsonl", [row])
    rows, rejected = read_responses(path)
    places = [f"{path}:1"] if len(samples) == 1 else [f"{path}:1#{n}" for n in range(1, len(samples) + 1)]
    assert rejected == []
    engine = ENGINES.get(layout, layout)
    assert rows == [ResponseRow(engine, origin=p, **sample) for p, sample in zip(places, samples, strict=True)]


def meta(**changes: Any) -> Value:
    return SGLANG | {"meta_info": META | changes}


D1 = {"question": "What?", "generations": "34", "ground_truth": "34", "gen_length": 64, "steps": 32}
GENERATION, TOKENS = {"prompt": "What?", "response": "34"}, {"tokens": ["3"], "step_map": [1]}
JETENGINE = {"prompt": "What?", "token_ids": [3, 4], "first_unmask_times": [2, 1]}
REFUSED: list[tuple[Value, Any, str, str]] = [
    (ROLLOUT, [1], "not an object", "the row is a JSON list"),
    (ROLLOUT, ROLLOUT | {"step_map": [[1, 2]]}, "lengths differ", "1 of step_map for 2 samples"),
    (ROLLOUT, ROLLOUT | {"full_output": [], "step_map": []}, "empty side", "no sample"),
    (ROLLOUT, ROLLOUT | {"step_map": [[1, 2.5], [1, 2]]}, "wrong type", "step_map is not a list of integers"),
    (ROLLOUT, ROLLOUT | {"rewards": ["good", "bad"]}, "wrong type", "the reward is a str"),
    (DIRL, DIRL | {"prompt_ids": None}, "missing field", "prompt_ids"),
    (D1, D1 | {"gen_length": 0}, "bad value", "gen_length is 0; expected 1 to 2147483647"),
    (D1, D1 | {"steps": 2**40}, "bad value", "steps is 1099511627776; expected 0 to"),
    (GENERATION, GENERATION | {"reward": 10**400}, "bad value", "the reward is a number beyond float64"),
    (GENERATION, GENERATION | {"answer": "\ud800"}, "bad UTF-8", "surrogates not allowed"),
    (JETENGINE, JETENGINE | {"logprobs": ["a", 0]}, "wrong type", "logprobs holds a str, not a number"),
    (JETENGINE, JETENGINE | {"logprobs": [None, 0]}, "wrong type", "logprobs holds a NoneType, not a number"),
    (JETENGINE, JETENGINE | {"token_ids": [3, 2**40]}, "bad value", "token_ids holds a number beyond int32"),
    (JETENGINE, JETENGINE | {"first_unmask_times": [1, 2**31]}, "bad value", "first_unmask_times holds a number"),
    (SGLANG, SGLANG | {"output_ids": 5}, "wrong type", "output_ids is a int, not a list"),
    (TOKENS, TOKENS | {"prompt": 5}, "wrong type", "prompt is not a list of messages"),
    (SGLANG, SGLANG | {"meta_info": {"step_maps": [1]}}, "missing field", "dllm_replay_contract_version"),
    (SGLANG, meta(dllm_replay_contract_version=2), "unknown version", "is 2; known is 1"),
    (SGLANG, meta(dllm_replay_step_maps=[1]), "lengths differ", "1 steps for 4 tokens"),
    (SGLANG, SGLANG | {"output_ids": [3, 5, 9]}, "tokens rewritten", "do not begin with the ids of the response"),
    (SGLANG, meta(dllm_stop_length=9) | {"output_ids": [3, 4, 9, 9]}, "tokens rewritten", "do not begin with the ids"),
    (SGLANG, SGLANG | {"input_ids": None}, "missing field", "prompt"),
    (SNAPSHOTS, SNAPSHOTS | {"snapshots": [[8, 4], [3, 5]]}, "tokens rewritten", "place 1 is 4, then 5"),
    (SNAPSHOTS, SNAPSHOTS | {"snapshots": [[8, 4], [3, 8]]}, "tokens rewritten", "place 1 is 4, then 8"),
    (SNAPSHOTS, SNAPSHOTS | {"snapshots": [[8, 4], [3]]}, "lengths differ", "snapshot 2 has 1 tokens of 2"),
    (SNAPSHOTS, SNAPSHOTS | {"snapshots": []}, "missing field", "snapshots"),
    (
        {"tokens": ["a"], "step_map": [1]},
        {"tokens": ["a"], "step_map": [-2]},
        "bad step",
        "a step is -2",
    ),
    (
        {"tokens": ["a"], "step_map": [1]},
        {"tokens": ["a"], "step_map": [1], "remask_events": 3},
        "tokens rewritten",
        "3 tokens were masked again",
    ),
    (
        {"prompt": "a", "response": "b"},
        {"prompt": "a", "response": "\ud83d"},
        "bad UTF-8",
        "surrogates not allowed",
    ),
    ({"prompt": "a", "response": "b"}, {"prompt": "a", "response": " "}, "empty side", "response has no text"),
]


@pytest.mark.parametrize(("good", "bad", "reason", "detail"), REFUSED)
def test_a_bad_row_is_refused_by_name_and_the_others_are_imported(
    tmp_path: Path, good: Value, bad: Any, reason: str, detail: str
) -> None:
    path = write(tmp_path / "rows.jsonl", [good, bad, good])
    rows, rejected = read_responses(path)
    assert {row.origin.split("#")[0] for row in rows} >= {f"{path}:1", f"{path}:3"}
    refused = [r for r in rejected if r.origin.startswith(f"{path}:2")]
    assert reason in {r.reason for r in refused}
    assert detail in refused[0].detail
    assert len(refused) == len(rejected)


def test_llada_s_snapshots_give_the_published_step_map(shared_data: Path) -> None:
    folder = shared_data / "llada_trajectory"
    (row,), rejected = read_responses(folder / "sample_process.txt")
    record = json.loads((folder / "step_map.json").read_text())
    assert rejected == []
    assert row.steps == record["step_map"]
    assert sorted(row.steps or ()) == list(range(1, 65))
    assert row.pieces is not None
    assert row.pieces[:-1] == record["tokens"][:-1]
    assert row.pieces[-1] == " "  # the file's last & closes the token; the record took it for a part of it


def test_a_text_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("First Citizen:\nSpeak.\n")
    rows, (refused,) = read_responses(tmp_path / "other.txt")
    assert (rows, refused.reason) == ([], "not a snapshot")


@pytest.mark.parametrize(("name", "samples"), [("countdown", 768), ("gsm8k", 3390), ("math500", 1500), ("sudoku", 768)])
def test_llada_s_real_generations_are_read(shared_data: Path, name: str, samples: int) -> None:
    rows, rejected = read_responses(shared_data / "llada_generations" / f"{name}.jsonl.gz")
    assert len(rows) + len(rejected) == samples
    assert Counter(row.max_new_tokens for row in rows).keys() == {128, 256, 512}
    assert {row.denoising_steps for row in rows} == {16}
    assert not any("<|endoftext|>" in (row.response or "") for row in rows)
    assert {r.reason for r in rejected} <= {"empty side"}


def test_an_unknown_file_is_told_every_known_format(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_responses(write(tmp_path / "rows.jsonl", [{"a": 1}]))
    assert all(form.name in str(caught.value) for form in RESPONSE_FORMATS)


def test_an_answer_of_parquet_that_json_does_not_know_spoils_its_row_alone(tmp_path: Path) -> None:
    for number, answer in enumerate((datetime(2026, 1, 1), b"34")):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.Table.from_pylist([GENERATION | {"answer": answer}]), path)
        assert [row.reason for row in read_responses(path)[1]] == ["wrong type"]
        assert [row.reason for row in read_prompts(path)[1]] == ["wrong type"]


def test_what_no_check_foresaw_refuses_its_row_alone(tmp_path: Path) -> None:
    def parse(row: Record) -> list[ResponseRow]:
        return [ResponseRow(prompt="What?", response=str(1 // row.require("n")))]

    path = write(tmp_path / "rows.jsonl", [{"n": 0}, {"n": 1}, {"m": 1}])
    rows, rejected = split_rejected(RowFormat("made up", (), parse).read(Shard(str(path))))
    assert [row.response for row in rows] == ["1"]
    assert [row.detail for row in rejected] == [
        "ZeroDivisionError: integer division or modulo by zero",
        "n",
    ]


def test_the_page_on_data_lists_every_reason() -> None:
    table = (ROOT / "docs" / "data.md").read_text().split("| reason |")[1].split("\n## ")[0]
    first = "\n".join(line.split(" | ")[0] for line in table.splitlines() if line[:3] == "| `")
    listed = set(re.findall(r"`([\w\- ]+)`", first))
    package = ROOT / "dtrpo_ray"
    sources = [
        *(package / "data" / "formats").glob("*.py"),
        *(package / f"{name}.py" for name in ("data/prepare", "produce/drafts", "produce/rollout")),
    ]
    used = {
        r
        for s in sources
        for r in re.findall(r'(?:Refusal\(|Rejected\(\w+, |refuse(?:_places)?\([^"]*?, )\s*"([^"]+)"', s.read_text())
    }
    assert listed == used
    assert {reason for _, _, reason, _ in REFUSED} <= used
