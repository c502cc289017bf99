"""Reward responses by a model of transformers: a sequence classifier, or the likelihood under a language model."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from dtrpo_ray.errors import DataError, ModelError, first_line
from dtrpo_ray.models.hub import ModelSource
from dtrpo_ray.models.tokenizer import encode_prompt, encode_text, load_tokenizer, prompt_messages
from dtrpo_ray.produce.function import Unscorable


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


def batches(ids: Sequence[Sequence[int]], size: int, longest: int) -> Iterator[list[int]]:
    """Yield the rows of batches of similar length. Raises Unscorable for a row of more than `longest` tokens."""
    for row, tokens in enumerate(ids):
        if len(tokens) > longest:
            raise Unscorable(row, f"{len(tokens)} tokens; score.reward_model reads {longest}")
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    yield from (order[start : start + size] for start in range(0, len(order), size))


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
        self.longest = min(longest_input(self.model.config), self.tokenizer.model_max_length)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]) -> list[float]:
        """Return rewards in the order of the rows; batches are of similar length, and too long rows are refused."""
        texts = [conversation(self.tokenizer, p, r) for p, r in zip(prompts, responses, strict=True)]
        ids = self.tokenizer(texts, add_special_tokens=self.tokenizer.chat_template is None)["input_ids"]
        rewards = torch.zeros(len(ids), dtype=torch.float64)
        for rows in batches(ids, self.batch_size, self.longest):
            batch = self.tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            rewards[rows] = self._rewards(self.model(**batch.to(self.model.device)).logits.double()).cpu()
        return [float(reward) for reward in rewards]

    def _rewards(self, logits_BL: Tensor) -> Tensor:
        kind = self.model.config.problem_type
        if logits_BL.shape[1] > 1 and kind != "regression":
            several = kind == "multi_label_classification"
            logits_BL = F.logsigmoid(logits_BL) if several else logits_BL.log_softmax(1)
        return logits_BL[:, self.label]


class LogLikelihood:
    """Reward a response by the mean log-probability of its tokens, given the prompt, under a causal language model.

    Prompt and response are tokenized apart. A prompt goes through the chat template if there is one, with the opening
    of the assistant's turn; else it is text that the response continues. No token that would end the response counts.
    """

    def __init__(self, source: ModelSource, batch_size: int) -> None:
        self.batch_size = batch_size
        self.model = load_model(source, AutoModelForCausalLM, "a causal language model")
        self.tokenizer, self.longest = load_tokenizer(source.path), longest_input(self.model.config)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float | None]:
        """Return rewards in the order of the rows; None for a response without tokens."""
        texts = enumerate(zip(prompts, responses, strict=True))
        pairs = [self._encode(row, prompt, response) for row, (prompt, response) in texts]
        means = torch.zeros(len(pairs), dtype=torch.float64)
        for rows in batches([prompt + response for prompt, response in pairs], self.batch_size, self.longest):
            means[rows] = self._means([pairs[row] for row in rows])
        return [float(mean) if response else None for mean, (_, response) in zip(means, pairs, strict=True)]

    @torch.inference_mode()
    def _means(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """Return each response's mean log-probability, as float64 on the CPU; NaN without tokens."""
        ids_BT = pad_sequence([torch.tensor(prompt + response) for prompt, response in pairs], batch_first=True)
        lengths_B = torch.tensor([len(prompt) + len(response) for prompt, response in pairs])
        seen_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
        device = self.model.device
        given = {"input_ids": ids_BT.to(device), "attention_mask": seen_BT.long().to(device)}
        logits_BTV = self.model(**given, use_cache=False).logits
        means = []
        for logits_TV, ids_T, (prompt, response) in zip(logits_BTV, ids_BT, pairs, strict=True):
            at = slice(len(prompt) - 1, len(prompt) + len(response) - 1)  # each position predicts the next token
            logps_TV = logits_TV[at].float().log_softmax(-1)
            targets_T1 = ids_T[len(prompt) : len(prompt) + len(response), None].to(device)
            means.append(logps_TV.gather(1, targets_T1).double().mean().cpu())
        return torch.stack(means)

    def _encode(self, row: int, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt and of its response. Raises Unscorable if they cannot be encoded."""
        messages = prompt_messages(prompt)
        try:
            if self.tokenizer.chat_template is not None:
                opening = encode_prompt(self.tokenizer, messages)
            elif messages[0]["content"] == prompt:
                opening = encode_text(self.tokenizer, prompt, special=True)
            else:
                text = "".join(turn["content"] + "\n" for turn in messages)
                opening = encode_text(self.tokenizer, text, special=True)
            ids = encode_text(self.tokenizer, response) if response else []
        except DataError as error:
            raise Unscorable(row, str(error)) from None
        if not opening:
            raise Unscorable(row, "the prompt has no tokens for score.reward_model to begin with")
        return opening, ids


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
