"""Rewards by models of transformers: independent of the batch, exact, and only by weights that the files hold."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from example_rows import trajectory
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from dtrpo_ray.config.produce import ScoreConfig
from dtrpo_ray.data.schemas import TRAJECTORY
from dtrpo_ray.data.tables import file_parts, read_table
from dtrpo_ray.errors import DataError, ModelError
from dtrpo_ray.models.hub import ModelSource
from dtrpo_ray.models.tokenizer import character_tokenizer
from dtrpo_ray.produce.function import Unscorable
from dtrpo_ray.produce.reward_model import LogLikelihood, RewardModel, conversation, label_index
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
    with pytest.raises(DataError, match=r"row 1: 42 tokens; score\.reward_model reads 32"):
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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tmp_path_factory.mktemp("llama")
    character_tokenizer("0123456789\n").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return ModelSource(folder, folder.name)


def by_hand(source: ModelSource, prompt: list[int], response: list[int]) -> float:
    """Mean log-probability of a response's tokens, one plain forward for each."""
    model, ids, total = LlamaForCausalLM.from_pretrained(source.path), list(prompt), 0.0
    for token in response:
        with torch.no_grad():
            total += float(model(torch.tensor([ids])).logits[0, -1].log_softmax(0)[token])
        ids.append(token)
    return total / len(response)


@pytest.mark.parametrize("size", [1, 2, 16])
def test_the_likelihood_is_that_of_a_plain_loop_whatever_the_batch(size: int, llama: ModelSource) -> None:
    prompts, responses = ["1", "22", "3333", "5", "6"], ["9", "12345678", "7", "", "555"]
    rewards = LogLikelihood(llama, size)(prompts, responses, [None] * 5)
    digits = [([int(c) for c in p], [int(c) for c in r]) for p, r in zip(prompts, responses, strict=True)]
    wanted = [by_hand(llama, *pair) if pair[1] else None for pair in digits]
    assert rewards[3] is wanted[3] is None
    for reward, value in zip(rewards, wanted, strict=True):
        assert reward == (value if value is None else pytest.approx(value, abs=1e-5))


def test_messages_go_through_the_chat_template_and_without_one_are_lines(llama: ModelSource, tmp_path: Path) -> None:
    messages = json.dumps([{"role": "system", "content": "1"}, {"role": "user", "content": "2"}])
    newline = 10  # the id
    [reward] = LogLikelihood(llama, 1)([messages], ["34"], [None])
    assert reward == pytest.approx(by_hand(llama, [1, newline, 2, newline], [3, 4]), abs=1e-5)
    chats = ModelSource(shutil.copytree(llama.path, tmp_path / "chats"), "chats")
    template = "{% for m in messages %}{{ m.content }}0{% endfor %}{% if add_generation_prompt %}99{% endif %}"
    (chats.path / "chat_template.jinja").write_text(template)
    rewards = LogLikelihood(chats, 2)([messages, "2"], ["34", "5"], [None] * 2)
    wanted = [by_hand(llama, [1, 0, 2, 0, 9, 9], [3, 4]), by_hand(llama, [2, 0, 9, 9], [5])]
    assert rewards == pytest.approx(wanted, abs=1e-5)


def test_what_has_no_likelihood_is_refused(llama: ModelSource, reward_model: ModelSource, tmp_path: Path) -> None:
    for prompt, response, message in (
        ("", "1", "the prompt has no tokens"),
        ("1", "2" * 32, "33 tokens; score.reward"),
    ):
        with pytest.raises(Unscorable, match=message):
            LogLikelihood(llama, 1)([prompt], [response], [None])
    with pytest.raises(ModelError, match=r"not a causal language model: its files lack lm_head\.weight"):
        LogLikelihood(reward_model, 1)
    config = ScoreConfig(scorer="log_likelihood", reward_model=str(llama.path))
    (tmp_path / "out").mkdir()
    scorer = Scorer(config, find_source(config, Path()))
    done = scorer(*file_parts([write(tmp_path / "part-0.parquet", "1", "")]), tmp_path / "out")
    assert (done["rows"], done["scored"]) == (2, 1)
    assert done["sum"] == pytest.approx(by_hand(llama, [1, 2], [1]), abs=1e-5)


def test_without_a_chat_template_a_conversation_is_lines_of_text() -> None:
    assert conversation(character_tokenizer("1"), "Why?", "So.") == "Why?\nSo."


def test_an_encoder_gets_the_special_tokens_that_its_head_reads(tmp_path: Path) -> None:
    """BERT's head reads [CLS]: without a chat template the tokenizer's own special tokens are added."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, num_labels=2, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    found = RewardModel(ModelSource(tmp_path, "bert"), 2, 1)(["1", "2"], ["9", "8 7"], [None, None])
    with torch.inference_mode():
        ids = [[2, vocab.index("1"), vocab.index("9"), 3], [2, *(vocab.index(digit) for digit in "287"), 3]]
        wanted = [float(model(torch.tensor([row])).logits.log_softmax(1)[0, 1]) for row in ids]
    assert found == pytest.approx(wanted, abs=1e-5)
