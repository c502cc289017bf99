"""Rewards by models of transformers: independent of the batch, exact, and only by weights that the files hold."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from example_rows import trajectory
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from dtrpo_ray.config.produce import ScoreConfig
from dtrpo_ray.data.schemas import TRAJECTORY
from dtrpo_ray.data.tables import file_parts, read_table
from dtrpo_ray.errors import DataError, ModelError
from dtrpo_ray.models.hub import ModelSource
from dtrpo_ray.models.tokenizer import character_tokenizer
from dtrpo_ray.produce.reward_model import RewardModel, conversation, label_index
from dtrpo_ray.produce.scoring import Scorer, find_source


def write(path: Path, *responses: str) -> Path:
    empty = {"reward": None, "reward_source": None}
    rows = [trajectory(str(i)) | empty | {"response": response} for i, response in enumerate(responses)]
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAJECTORY), path)
    return path


def save(folder: Path, kind: Any = Qwen2ForSequenceClassification, **settings: Any) -> ModelSource:
    character_tokenizer("0123456789\n").save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=11, initializer_range=0.5, **settings,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    return ModelSource(folder, folder.name)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return save(tmp_path_factory.mktemp("reward-model"), num_labels=1)


def test_a_reward_does_not_depend_on_the_batch_it_is_in(reward_model: ModelSource) -> None:
    prompts, responses = ["1", "22", "3333"], ["9", "12345678", "7"]
    apart = [RewardModel(reward_model, 1)([p], [r], [None])[0] for p, r in zip(prompts, responses, strict=True)]
    assert RewardModel(reward_model, 2)(prompts, responses, [None] * 3) == pytest.approx(apart, abs=1e-5)
    assert len(set(apart)) == 3


def test_a_conversation_longer_than_the_reward_model_reads_is_named(reward_model: ModelSource, tmp_path: Path) -> None:
    config = ScoreConfig(scorer="reward_model", reward_model=str(reward_model.path))
    source = write(tmp_path / "part-0.parquet", "1", "1" * 40)
    # "12", a newline that this tokenizer drops once transformers takes it for Qwen2's, and 40 digits
    with pytest.raises(DataError, match=r"row 1: 42 tokens; the reward model reads 32"):
        Scorer(config, find_source(config, Path()))(*file_parts([source]), tmp_path)
    with pytest.raises(ModelError, match=r"gone: this node has no .*; put the model, or the hub's cache"):
        Scorer(config, ModelSource(tmp_path / "gone", "gone"))


def test_the_source_of_a_reward_names_the_model(reward_model: ModelSource, tmp_path: Path) -> None:
    config = ScoreConfig(scorer="reward_model", reward_model="org/name@v1")
    named = ModelSource(reward_model.path, "org/name@0123abc", "0123abc")
    (tmp_path / "out").mkdir()
    Scorer(config, named)(*file_parts([write(tmp_path / "part-0.parquet", "1")]), tmp_path / "out")
    [found] = read_table(tmp_path / "out", TRAJECTORY)["reward_source"].to_pylist()
    assert found == "reward_model org/name@0123abc"


def test_only_weights_of_safetensors_are_read_and_none_is_made_up(reward_model: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="empty: not a sequence-classification model that transformers loads"):
        RewardModel(ModelSource(tmp_path, "empty"), 1)
    pickled = shutil.copytree(reward_model.path, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickled: not a sequence-classification model"):
        RewardModel(ModelSource(pickled, "pickled"), 1)
    base = save(tmp_path / "base", Qwen2ForCausalLM, num_labels=1)  # whose head transformers would draw at random
    with pytest.raises(ModelError, match=r"its files lack score\.weight, which would be random"):
        RewardModel(base, 1)


LABELS = {0: "negative", 1: "neutral", 2: "positive"}


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "regression", None])
def test_the_reward_of_a_label_is_its_log_probability_and_that_of_a_regression_its_value(
    kind: str | None, tmp_path: Path
) -> None:
    """Probabilities of exclusive labels add up to 1; of independent ones each is the sigmoid of its logit."""
    source = save(tmp_path, id2label=LABELS, problem_type=kind)
    texts: Any = (["1", "22"], ["34", "567"], [None] * 2)
    rewards = torch.tensor([RewardModel(source, 2, name)(*texts) for name in LABELS.values()], dtype=torch.float64)
    model = RewardModel(source, 1, "neutral")
    ids = [model.tokenizer(p + "\n" + r, return_tensors="pt")["input_ids"] for p, r in zip(*texts[:2], strict=True)]
    with torch.no_grad():
        logits = torch.cat([model.model(i).logits for i in ids]).double().T
    odds = logits.exp()
    wanted = {"regression": logits, "multi_label_classification": (odds / (1 + odds)).log()}
    torch.testing.assert_close(rewards, wanted.get(str(kind), (odds / odds.sum(0)).log()), rtol=0, atol=1e-5)
    assert [RewardModel(source, 2, number)(*texts) for number in LABELS] == rewards.tolist()


@pytest.mark.parametrize(
    ("labels", "label", "message"),
    [
        (LABELS, None, r"has 3 labels .0 'negative', 1 'neutral', 2 'positive'.; set score\.reward_label"),
        (LABELS, "good", "'good' is none of them"),
        (LABELS, 3, "3 is none of them"),
        ({0: "score"}, "score", "has one label, whose logit is the reward; remove score"),
    ],
)
def test_a_label_that_the_model_has_not_is_refused(labels: Any, label: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        label_index(Qwen2Config(id2label=labels), label, "model")


def test_without_a_chat_template_a_conversation_is_lines_of_text() -> None:
    assert conversation(character_tokenizer("1"), "Why?", "So.") == "Why?\nSo."
