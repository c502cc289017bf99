"""OpenAI request bodies -> validated requests, and the shapes of every answer. Pydantic only; `app.py` calls it.

A field that would change the meaning of an answer and is not served is refused by name; any other unknown field is
ignored, since clients send many. `null` means absent.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 64  # sequences one request may decode: prompts times n
UNSUPPORTED = "unsupported_parameter"


def _only(*neutral: Any) -> AfterValidator:
    """Accept the values that ask for nothing, refuse every other."""

    def check(value: Any) -> Any:
        # `True == 1`, and `logprobs = 0` asks for something that `logprobs = false` does not
        if any(type(value) is type(allowed) and value == allowed for allowed in neutral):
            return value
        raise PydanticCustomError(UNSUPPORTED, "is not supported by this server; leave the field out")

    return AfterValidator(check)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Request(BaseModel):
    """What both endpoints share: `steps`, `threshold` and `return_trajectory` are this server's own."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, use_attribute_docstrings=True)

    model: str | None = None
    """The served model's name; absent: whatever is served."""
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    """0 is greedy."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """The same seed and request give the same text; absent: a random one."""
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    """Choices for each prompt."""
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)] = Field([], max_length=16)
    """The text ends before the first of these."""
    steps: int | None = Field(None, ge=1)
    """Denoising steps per block; fewer are faster. Absent: the server's default."""
    threshold: float | None = Field(None, gt=0, lt=1, allow_inf_nan=False)
    """Instead of `steps`: each step unmasks every token more probable than this."""
    return_trajectory: bool = False
    """Also return the denoising step of each token."""

    stream: Annotated[Any, _only(False)] = None
    echo: Annotated[Any, _only(False)] = None
    logprobs: Annotated[Any, _only(False)] = None
    top_logprobs: Annotated[Any, _only(0)] = None
    best_of: Annotated[Any, _only(1)] = None
    logit_bias: Annotated[Any, _only({})] = None
    suffix: Annotated[Any, _only("")] = None
    top_p: Annotated[Any, _only(1, 1.0)] = None
    top_k: Annotated[Any, _only(-1, 0)] = None
    min_p: Annotated[Any, _only(0, 0.0)] = None
    frequency_penalty: Annotated[Any, _only(0, 0.0)] = None
    presence_penalty: Annotated[Any, _only(0, 0.0)] = None
    repetition_penalty: Annotated[Any, _only(1, 1.0)] = None
    min_tokens: Annotated[Any, _only(0)] = None
    ignore_eos: Annotated[Any, _only(False)] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    tools: Annotated[Any, _only([])] = None
    functions: Annotated[Any, _only([])] = None
    block_length: Annotated[Any, _only()] = None
    remasking: Annotated[Any, _only("low_confidence")] = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body

    @model_validator(mode="after")
    def _one_schedule(self) -> "_Request":
        if self.steps is not None and self.threshold is not None:
            raise ValueError(f"steps = {self.steps} and threshold = {self.threshold} exclude each other; give one")
        return self


class CompletionRequest(_Request):
    """The body of POST /v1/completions."""

    prompt: Annotated[list[str], BeforeValidator(_as_list)] = Field(min_length=1, max_length=MAX_CHOICES)
    """A text, or several."""
    max_tokens: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _bounded(self) -> "CompletionRequest":
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise ValueError(
                f"{len(self.prompt)} prompts x n = {self.n} exceed {MAX_CHOICES} choices; split the request"
            )
        return self


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """Absent: as many as the server and the model's context allow."""
    max_tokens: int | None = Field(None, ge=1)
    """The older name of `max_completion_tokens`."""


class Trajectory(BaseModel):
    """How a choice was decoded: each generated token, and the denoising forward (from 0) that unmasked it.

    It holds every token that `usage` counts, those after a stop text too.
    """

    token_ids: list[int]
    tokens: list[str]
    steps: list[int]
    num_forwards: int


class _Choice(BaseModel):
    index: int
    logprobs: None = None
    finish_reason: Literal["stop", "length"]
    trajectory: Trajectory | None = None


class CompletionChoice(_Choice):
    text: str


class ChatChoice(_Choice):
    message: Message


class Usage(BaseModel):
    """Tokens: each prompt once, each choice up to its end of sequence (not counted) or its most tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dtrpo"
    max_model_len: int
    """Most tokens of a prompt and its answer together."""
    block_size: int


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What went wrong; `param` is the field to mend."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not 200."""

    error: ErrorDetail
