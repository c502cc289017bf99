"""Rewards: a verifier and a reward model over a file of trajectories, and the rows they cannot score."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from example_rows import trajectory
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from dtrpo_ray.config.produce import JudgeConfig, ScoreConfig
from dtrpo_ray.data.schemas import TRAJECTORY
from dtrpo_ray.data.tables import TablePart, file_parts, prompt_parts, read_table
from dtrpo_ray.errors import DataError, ModelError
from dtrpo_ray.models.hub import ModelSource
from dtrpo_ray.models.tokenizer import character_tokenizer, prompt_messages
from dtrpo_ray.produce.scoring import RewardModel, Scorer, Unscorable, Verifier, conversation, find_source, label_index


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


def classifier(folder: Path, **settings: Any) -> ModelSource:
    character_tokenizer("0123456789\n").save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=11, initializer_range=0.5, **settings,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2ForSequenceClassification(config).save_pretrained(folder)
    return ModelSource(folder, folder.name)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return classifier(tmp_path_factory.mktemp("reward-model"), num_labels=1)


def test_a_reward_does_not_depend_on_the_batch_it_is_in(reward_model: ModelSource) -> None:
    prompts, responses = ["1", "22", "3333"], ["9", "12345678", "7"]
    apart = [RewardModel(reward_model, 1)([p], [r], [None])[0] for p, r in zip(prompts, responses, strict=True)]
    assert RewardModel(reward_model, 2)(prompts, responses, [None] * 3) == pytest.approx(apart, abs=1e-5)
    assert len(set(apart)) == 3


def test_a_conversation_longer_than_the_reward_model_reads_is_named(reward_model: ModelSource, tmp_path: Path) -> None:
    config = ScoreConfig(scorer="reward_model", reward_model=str(reward_model.path))
    source = write(tmp_path / "part-0.parquet", [{"response": "1"}, {"response": "1" * 40}])
    # "12", a newline that this tokenizer drops once transformers takes it for Qwen2's, and 40 digits
    with pytest.raises(DataError, match=r"row 1: 42 tokens; the reward model reads 32"):
        Scorer(config, find_source(config))(*file_parts([source]), tmp_path)
    with pytest.raises(ModelError, match="not a sequence-classification model"):
        RewardModel(ModelSource(tmp_path, "empty"), 1)
    with pytest.raises(ModelError, match=r"gone: this node has no .*; put the model, or the hub's cache"):
        Scorer(config, ModelSource(tmp_path / "gone", "gone"))


def test_pickled_weights_are_not_read(reward_model: ModelSource, tmp_path: Path) -> None:
    copy = shutil.copytree(reward_model.path, tmp_path / "pickled")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="not a sequence-classification model"):
        RewardModel(ModelSource(copy, "pickled"), 1)


LABELS = {0: "negative", 1: "neutral", 2: "positive"}


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_the_reward_of_a_label_is_its_log_probability(kind: str, tmp_path: Path) -> None:
    """Probabilities of exclusive labels add up to 1; of independent ones each is the sigmoid of its logit."""
    source = classifier(tmp_path, id2label=LABELS, problem_type=kind)
    texts: Any = (["1", "22"], ["34", "567"], [None] * 2)
    rewards = torch.tensor([RewardModel(source, 2, name)(*texts) for name in LABELS.values()], dtype=torch.float64)
    model = RewardModel(source, 1, "neutral")
    ids = [model.tokenizer(p + "\n" + r, return_tensors="pt")["input_ids"] for p, r in zip(*texts[:2], strict=True)]
    with torch.no_grad():
        logits = torch.cat([model.model(i).logits for i in ids]).double().T
    odds = logits.exp()
    wanted = odds / odds.sum(0) if kind.startswith("single") else odds / (1 + odds)
    torch.testing.assert_close(rewards.exp(), wanted, rtol=0, atol=1e-6)
    assert [RewardModel(source, 2, number)(*texts) for number in LABELS] == rewards.tolist()


@pytest.mark.parametrize(
    ("labels", "label", "message"),
    [
        (LABELS, None, r"has 3 labels, negative, neutral, positive .0 to 2.; set score\.reward_label"),
        (LABELS, "good", "'good' is none of them"),
        (LABELS, 3, "3 is none of them"),
        ({0: "score"}, "score", "has one label, whose logit is the reward; remove score"),
    ],
)
def test_a_label_that_the_model_has_not_is_refused(labels: Any, label: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        label_index(Qwen2Config(id2label=labels), label, "model")


def test_prompts_are_text_or_messages_as_json() -> None:
    messages = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "Why?"}]
    assert prompt_messages(json.dumps(messages)) == messages
    assert prompt_messages("[{") == [{"role": "user", "content": "[{"}]
    assert conversation(character_tokenizer("1"), "Why?", "So.") == "Why?\nSo."


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
    (tmp_path / "judge").mkdir()
    judge = JudgeConfig(model=Path("judge"))
    scorer = Scorer(ScoreConfig(scorer="judge", judge=judge), ModelSource(tmp_path / "judge", "judge"))
    (part,) = prompt_parts(files, 10)
    assert scorer(part, tmp_path / "out") == {"rows": 3, "scored": 2, "sum": 1.0, "comparisons": {"decided": 1}}
    table = read_table(tmp_path / "out", TRAJECTORY)
    assert table["reward"].to_pylist() == [0.0, None, 1.0]
    assert table["reward_source"].to_pylist() == ["judge judge", None, "judge judge"]
