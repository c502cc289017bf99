"""The HTTP bodies: OpenAI completions and chat completions, with the decoding knobs of a diffusion model."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# fields of the OpenAI API that change what is asked for and that we cannot honour yet: refused, never ignored
REFUSED = {"stream": False, "logprobs": None, "echo": False, "best_of": None, "logit_bias": None, "top_logprobs": None}


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str
    temperature: float = Field(0.0, ge=0, le=2)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    steps: int | None = Field(None, ge=1)
    threshold: float | None = Field(None, ge=0, le=1)
    return_trajectory: bool = False

    @model_validator(mode="after")
    def _only_what_we_can_do(self) -> "_Request":
        for name, neutral in REFUSED.items():
            value = (self.model_extra or {}).get(name, neutral)
            if value not in (neutral, None):
                raise ValueError(f"{name} = {value!r} is not supported by this server")
        return self

    def stops(self) -> list[str]:
        """The stop strings, empty ones left out."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]


class CompletionRequest(_Request):
    """Body of POST /v1/completions."""

    prompt: str | list[str]
    max_tokens: int = Field(16, ge=1)


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(_Request):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int = Field(256, ge=1)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error object OpenAI clients read."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
