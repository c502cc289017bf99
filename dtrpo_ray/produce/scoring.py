"""Score recorded responses by a verifier, a reward model or a judge.

Verifiers and reward models score a file of trajectory/v1 at a time; a judge all responses to some prompts at a time.
"""

import importlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedTokenizerBase

from dtrpo_ray.config.produce import ScoreConfig
from dtrpo_ray.data.schemas import TRAJECTORY
from dtrpo_ray.data.tables import TablePart, with_columns, write_whole
from dtrpo_ray.errors import ConfigError, DataError, ModelError
from dtrpo_ray.models.hub import ModelSource
from dtrpo_ray.models.tokenizer import load_tokenizer, prompt_messages
from dtrpo_ray.produce.judge import Judge

# errors caused by the response itself, which then scores 0; OSError is the machine's and not among them
_RESPONSE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, re.error)


class ScoreSummary(TypedDict):
    """The counts of a scored part."""

    rows: int
    scored: int
    sum: float
    comparisons: NotRequired[dict[str, int]]
    failed: NotRequired[int]
    caution: NotRequired[str]


def find_source(config: ScoreConfig) -> ModelSource | None:
    """Find the model that scores, and fetch it if it is named by a hub id; None for a verifier. Raises ModelError."""
    where = config.judge.model if config.judge else config.reward_model
    return ModelSource.find(str(where)) if where else None


class Scorer:
    """Score the parts of a trajectory table, each into a file of the part's name.

    `source` is what `find_source` found. A worker that does not see it raises ModelError.
    """

    def __init__(self, config: ScoreConfig, source: ModelSource | None = None) -> None:
        self.score: RewardModel | Judge | Verifier
        if source and not source.path.is_dir():
            raise ModelError(
                f"{source.name}: this node has no {source.path}; put the model, or the hub's cache (HF_HOME), on a disk "
                "that all nodes share"
            )
        if config.judge is not None:
            self.score = Judge(config.judge)
        elif source is not None:
            self.score = RewardModel(source, config.batch_size, config.reward_label)
        else:
            self.score = Verifier(config.scorer)
        self.source = f"{config.scorer} {source.name}" if source else config.scorer

    def __call__(self, part: TablePart, out: Path) -> ScoreSummary:
        """Score one part. Raises DataError naming the file and the row that cannot be scored."""
        table = part.read(TRAJECTORY)
        columns = [table[name].to_pylist() for name in ("prompt", "response", "answer")]
        try:
            rewards = self.score(*columns)
        except Unscorable as error:
            row, reason = error.args
            raise DataError(f"{part}: row {table['row_id'][row].as_py()}: {reason}") from None
        given = [reward for reward in rewards if reward is not None]
        sources = [None if reward is None else self.source for reward in rewards]
        write_whole(with_columns(table, {"reward": list(rewards), "reward_source": sources}), out / part.name)
        summary: ScoreSummary = {"rows": len(table), "scored": len(given), "sum": sum(given)}
        if isinstance(self.score, Judge):
            summary["comparisons"], self.score.counts = dict(self.score.counts), Counter()
        if isinstance(self.score, Verifier):
            summary["caution"], summary["failed"], self.score.failed = self.score.caution(), self.score.failed, 0
        return summary


class Unscorable(Exception):
    """The error of one row: (row number, reason). `Scorer` adds the file and raises DataError."""


class Verifier:
    """Score rows by a module of verifiers/. `failed` counts the responses that raised an error and scored 0.

    A module has `score(prompt, response, answer) -> float`, and may have `caution() -> str`, a warning about this
    machine ("" for none), and `ANSWER_OPTIONAL = True` if the prompt alone may be enough.
    """

    def __init__(self, name: str) -> None:
        self.name, self.failed = name, 0
        self.module = importlib.import_module(f"dtrpo_ray.produce.verifiers.{name}")
        self.caution: Callable[[], str] = getattr(self.module, "caution", str)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]) -> list[float]:
        rewards, optional = [], getattr(self.module, "ANSWER_OPTIONAL", False)
        for row, texts in enumerate(zip(prompts, responses, answers, strict=True)):
            if answers[row] is None and not optional:
                raise Unscorable(row, f"answer is null, and score.scorer = {self.name!r} compares with it")
            try:
                rewards.append(float(self.module.score(*texts)))
            except ConfigError:
                raise
            except DataError as error:  # the reference is unreadable
                raise Unscorable(row, str(error)) from None
            except _RESPONSE_ERRORS:
                self.failed += 1
                rewards.append(0.0)
        return rewards


class RewardModel:
    """Reward a conversation by a sequence-classification model.

    The reward is the logit of its only label, or the log-probability of one of several (log-softmax; log-sigmoid where
    the model's `problem_type` lets several labels hold at once). Logits of several labels have no common zero.
    """

    def __init__(self, source: ModelSource, batch_size: int, label: int | str | None = None) -> None:
        self.batch_size, self.device = batch_size, "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                str(source.path), local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"{source.name}: not a sequence-classification model ({error})") from None
        self.label = label_index(model.config, label, source.name)
        self.model, self.tokenizer = model.eval().to(self.device), load_tokenizer(source.path)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.longest = int(getattr(model.config, "max_position_embeddings", None) or 4096)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]) -> list[float]:
        """Return rewards in the order of the rows; batches are of similar length, and too long rows are refused."""
        texts = [conversation(self.tokenizer, p, r) for p, r in zip(prompts, responses, strict=True)]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for row, tokens in enumerate(ids):
            if len(tokens) > self.longest:
                raise Unscorable(row, f"{len(tokens)} tokens; the reward model reads {self.longest}")
        rewards = torch.zeros(len(ids), dtype=torch.float64)
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self.tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt").to(self.device)
            rewards[rows] = self._rewards(self.model(**batch).logits.double()).cpu()
        return [float(reward) for reward in rewards]

    def _rewards(self, logits_BL: Tensor) -> Tensor:
        if logits_BL.shape[1] == 1:
            return logits_BL[:, 0]
        several = self.model.config.problem_type == "multi_label_classification"
        logps_BL = F.logsigmoid(logits_BL) if several else logits_BL.log_softmax(1)
        return logps_BL[:, self.label]


def label_index(config: PretrainedConfig, label: int | str | None, name: str) -> int:
    """Return the index of the label that a classifier is to reward, by name or number; 0 if it has only one.

    Raises ModelError for a label that it has not, and if `label` is missing or needless.
    """
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if len(names) == 1 and label is None:
        return 0
    if len(names) == 1:
        raise ModelError(f"{name}: has one label, whose logit is the reward; remove score.reward_label = {label!r}")
    if label not in (names if isinstance(label, str) else range(len(names))):
        named = f"score.reward_label = {label!r} is none of them" if label is not None else "set score.reward_label"
        raise ModelError(f"{name}: has {len(names)} labels, {', '.join(names)} (0 to {len(names) - 1}); {named}")
    return names.index(label) if isinstance(label, str) else int(label or 0)


def conversation(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> str:
    """Format a prompt (text, or messages as JSON) and its answer in the reward model's chat template."""
    messages = prompt_messages(prompt)
    if tokenizer.chat_template is None:
        return "\n".join([*(turn["content"] for turn in messages), response])
    turns = [*messages, {"role": "assistant", "content": response}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))
