"""A model directory -> an `Engine` that turns texts into decoded responses, for rollout, evaluation and serving."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dtrpo_ray.config.decode import Sampling
from dtrpo_ray.decode.decoder import decode_all
from dtrpo_ray.decode.types import Generation, SamplingParams
from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.models.lora import with_adapter
from dtrpo_ray.models.registry import load_model, skeleton
from dtrpo_ray.models.tokenizer import (
    Conversation,
    control_tokens,
    encode_prompt,
    eos_token_id,
    load_tokenizer,
    mask_token_id,
    turn_end_id,
)

DEFAULT_CONTEXT_TOKENS = 4096  # where config.json gives no context length


def block_size_error(model: DiffusionLM, sampling: Sampling, steps: int | None) -> tuple[str, str] | None:
    """Return (field, message) of a setting that the model's blocks do not allow; `steps` are denoising steps."""
    size, small = sampling.block_length or model.block_size, sampling.small_block_size
    if model.attention == "block" and size != model.block_size:
        remedy = f"this model was trained on blocks of {model.block_size}; leave it out"
        return "block_length", f"block_length = {size}, but {remedy}"
    if small is not None and size % small:
        message = f"small_block_size = {small} does not divide the block of {size} tokens; give one that does"
        return "small_block_size", message
    for name, value in ((sampling.steps_field, steps), ("tokens_per_step", sampling.tokens_per_step)):
        if value is not None and value > size:
            return name, f"{name} = {value} exceeds the model's block of {size} tokens; ask for fewer"
    return None


class Engine:
    """A model, its tokenizer and the device they decode on."""

    def __init__(self, model: DiffusionLM, tokenizer: PreTrainedTokenizerBase) -> None:
        if mask_token_id(tokenizer) != model.mask_id:
            raise ModelError(
                f"tokenizer mask id {mask_token_id(tokenizer)} and config.json mask_token_id {model.mask_id} disagree"
            )
        if eos_token_id(tokenizer) not in model.stop_ids:
            raise ModelError(
                f"tokenizer end-of-sequence id {eos_token_id(tokenizer)} and the model's eos_token_id "
                f"{', '.join(map(str, sorted(model.stop_ids)))} disagree"
            )
        turn_end = turn_end_id(tokenizer)
        model.other_ends |= set() if turn_end is None else {turn_end}
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def load(cls, path: Path) -> "Engine":
        """Load a model directory: bf16 on a GPU where there is one, else float32 on the CPU."""
        gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if gpu else torch.float32
        return cls(load_model(path, dtype, "cuda" if gpu else "cpu"), load_tokenizer(path))

    def load_adapter(self, adapter: Path) -> "Engine":
        """Return the engine of a LoRA adapter that shares this model's weights. Raises ModelError; see `lora`."""
        model = skeleton(self.model.config)
        model.other_ends |= self.model.other_ends
        with_adapter(self.model, model, adapter)
        return Engine(model, self.tokenizer)

    def encode(self, prompt: str | Conversation) -> list[int]:
        """Return the prompt ids of a text, or of chat messages through the chat template."""
        return encode_prompt(self.tokenizer, prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """Return the text of one id; that of a special token is its spelling."""
        return str(self.tokenizer.decode([token]))

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Generation]:
        """Decode prompts [ids] side by side, with one seed each."""
        return decode_all(self.model, prompts, params, seeds, self.num_tokens)

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Return a pattern of the spellings that the tokenizer reads as control tokens."""
        return control_tokens(self.tokenizer)

    @property
    def num_tokens(self) -> int:
        """Number of ids that have a text; a model's vocabulary may be padded beyond them."""
        return min(len(self.tokenizer), self.model.vocab_size)

    @property
    def context_tokens(self) -> int:
        """Most tokens of a prompt and its answer together, whole blocks."""
        config: dict[str, Any] = getattr(self.model, "config", {})
        size = self.model.block_size
        limit = config.get("max_position_embeddings") or config.get("max_sequence_length") or DEFAULT_CONTEXT_TOKENS
        return int(limit) // size * size
