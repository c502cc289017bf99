"""Reward conversations by a sequence-classification model of transformers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedTokenizerBase

from dtrpo_ray.errors import ModelError, Unscorable, first_line
from dtrpo_ray.models.hub import ModelSource
from dtrpo_ray.models.tokenizer import load_tokenizer, prompt_messages


def load_model(source: ModelSource, kind: Any, what: str) -> Any:
    """Load a model of an Auto class, `what` in messages: safetensors, no remote code, no weight made up.

    Raises ModelError; for a model that this node does not see, with the remedy.
    """
    if not source.path.is_dir():
        raise ModelError(
            f"{source.name}: this node has no {source.path}; put the model, or the hub's cache (HF_HOME), on a disk "
            "that all nodes share"
        )
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    try:
        model, found = kind.from_pretrained(str(source.path), **options, output_loading_info=True)
    except Exception as error:  # broken files raise anything, the safetensors library's own errors among it
        raise ModelError(f"{source.name}: not {what} that transformers loads ({first_line(error)})") from None
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"{source.name}: not {what}: its files lack {missing[0]}, which would be random")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def longest_input(config: PretrainedConfig) -> int:
    """Return how many tokens a model reads."""
    return int(getattr(config, "max_position_embeddings", None) or 4096)


class RewardModel:
    """Reward a conversation by a sequence-classification model.

    The reward is the logit of its only label. Of several labels it is the log-probability of `label`: log-softmax, or
    log-sigmoid if the model's `problem_type` lets several labels hold at once; a regression's is its value.
    """

    def __init__(self, source: ModelSource, batch_size: int, label: int | str | None = None) -> None:
        self.batch_size = batch_size
        self.model = load_model(source, AutoModelForSequenceClassification, "a sequence-classification model")
        self.label = label_index(self.model.config, label, source.name)
        self.tokenizer = load_tokenizer(source.path)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.longest = longest_input(self.model.config)

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
            batch = self.tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            rewards[rows] = self._rewards(self.model(**batch.to(self.model.device)).logits.double()).cpu()
        return [float(reward) for reward in rewards]

    def _rewards(self, logits_BL: Tensor) -> Tensor:
        kind = self.model.config.problem_type
        if logits_BL.shape[1] > 1 and kind != "regression":
            several = kind == "multi_label_classification"
            logits_BL = F.logsigmoid(logits_BL) if several else logits_BL.log_softmax(1)
        return logits_BL[:, self.label]


def label_index(config: Any, label: int | str | None, name: str) -> int:
    """Return the index of the label that a classifier is to reward, by name or number; 0 if it has only one.

    Raises ModelError for a label that it has not, and if `label` is missing or needless.
    """
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if len(names) == 1 and label is None:
        return 0
    if len(names) == 1:
        raise ModelError(f"{name}: has one label, whose logit is the reward; remove score.reward_label = {label!r}")
    if isinstance(label, int) and label < len(names):
        return label
    if isinstance(label, str) and label in names:
        return names.index(label)
    named = "set score.reward_label" if label is None else f"score.reward_label = {label!r} is none of them"
    shown = ", ".join(f"{number} {known!r}" for number, known in enumerate(names[:20]))
    raise ModelError(f"{name}: has {len(names)} labels ({shown}{', ...' if len(names) > 20 else ''}); {named}")


def conversation(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> str:
    """Format a prompt (text, or messages as JSON) and its answer in the reward model's chat template."""
    messages = prompt_messages(prompt)
    if tokenizer.chat_template is None:
        return "\n".join([*(turn["content"] for turn in messages), response])
    turns = [*messages, {"role": "assistant", "content": response}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))
