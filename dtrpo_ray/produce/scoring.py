"""Score recorded responses by a verifier, a function of the user's own, a reward model or a judge.

A judge scores all responses to some prompts at a time, the others a file of trajectory/v1.
"""

import importlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pyarrow as pa
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from dtrpo_ray.config.produce import ScoreConfig
from dtrpo_ray.data.schemas import TRAJECTORY
from dtrpo_ray.data.tables import TablePart, with_columns, write_whole
from dtrpo_ray.errors import ConfigError, DataError, ModelError, Unscorable
from dtrpo_ray.models.tokenizer import load_tokenizer, prompt_messages
from dtrpo_ray.produce.function import FunctionSource, RewardFunction
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


class Scorer:
    """Score the parts of a trajectory table, each into a file of the part's name, by `function` if there is one."""

    def __init__(self, config: ScoreConfig, function: FunctionSource | None = None) -> None:
        self.score: RewardFunction | RewardModel | Judge | Verifier
        if function is not None:
            self.score, model = RewardFunction(function, config.batch_size), ""
        elif config.reward_model is not None:
            self.score, model = RewardModel(config.reward_model, config.batch_size), f" {config.reward_model.name}"
        elif config.judge is not None:
            self.score, model = Judge(config.judge), f" {config.judge.model.name}"
        else:
            self.score, model = Verifier(config.scorer), ""
        self.source = config.scorer + model

    def __call__(self, part: TablePart, out: Path) -> ScoreSummary:
        """Score one part. Raises DataError naming the file and the row that cannot be scored."""
        table = part.read(TRAJECTORY)
        try:
            rewards = self._rewards(table)
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

    def _rewards(self, table: pa.Table) -> Sequence[float | None]:
        if isinstance(self.score, RewardFunction):
            return self.score(table)
        return self.score(*(table[name].to_pylist() for name in ("prompt", "response", "answer")))


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
    """Reward a conversation by the logit of a sequence-classification model of one label."""

    def __init__(self, path: Path, batch_size: int) -> None:
        self.batch_size, self.device = batch_size, "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model: Any = AutoModelForSequenceClassification.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: not a sequence-classification model ({error})") from None
        if model.config.num_labels != 1:
            raise ModelError(f"{path}: has {model.config.num_labels} labels; a reward model has one")
        self.model, self.tokenizer = model.eval().to(self.device), load_tokenizer(path)
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
            rewards[rows] = self.model(**batch).logits[:, 0].double().cpu()
        return [float(reward) for reward in rewards]


def conversation(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> str:
    """Format a prompt (text, or messages as JSON) and its answer in the reward model's chat template."""
    messages = prompt_messages(prompt)
    if tokenizer.chat_template is None:
        return "\n".join([*(turn["content"] for turn in messages), response])
    turns = [*messages, {"role": "assistant", "content": response}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))
