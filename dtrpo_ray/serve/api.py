"""OpenAI request bodies -> validated requests, and the types of every answer. No torch, no ray.

A field that is not served is refused by name, unless it is on the list of those that change no answer (`harmless`).
`null` means absent.
"""

from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.json_schema import WithJsonSchema
from pydantic_core import InitErrorDetails, PydanticCustomError

from dtrpo_ray.config.decode import Remasking, Sampling
from dtrpo_ray.data.schemas import TrajectoryRow

MAX_CHOICES = 64  # of one request: prompts times n
MAX_ALTERNATIVES = 20  # of each token
MAX_TURNS = 4096  # messages of one chat
MAX_PROMPT_IDS = 2**18  # of one prompt of token ids; a body of 1 MiB holds twice as many
MAX_NAME = 80  # characters of an unknown field's name that a refusal repeats
UNSUPPORTED = "unsupported_parameter"


def _only(*neutral: Any) -> tuple[AfterValidator, WithJsonSchema]:
    """Accept only neutral values, which ask for nothing; the specification lists them."""

    def check(value: Any) -> Any:
        # `True == 1`, and `logprobs = 0` asks for something that `logprobs = false` does not
        if any(type(value) is type(allowed) and value == allowed for allowed in neutral):
            return value
        raise PydanticCustomError(UNSUPPORTED, "is not supported by this server; leave the field out")

    listed = [*(value for value in neutral if not isinstance(value, float)), None]  # 0 is 0.0 in JSON
    return AfterValidator(check), WithJsonSchema({"enum": listed})


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _text_of_parts(value: Any) -> Any:
    """Join a message's content where a client sends it as parts of text."""
    if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        return "".join(str(part.get("text", "")) for part in value)
    return value


def _list_harmless(schema: dict[str, Any], body: type["_Body"]) -> None:
    schema["properties"] |= {name: {"description": "Taken, and changes no answer."} for name in sorted(body.harmless)}


class _Body(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, json_schema_extra=_list_harmless
    )
    harmless: ClassVar[frozenset[str]] = frozenset()  # fields that clients send and that change no answer

    @model_validator(mode="before")
    @classmethod
    def _keep_what_is_served(cls, body: Any) -> Any:
        """Drop nulls and harmless fields; refuse the first other field that the class does not have."""
        if not isinstance(body, dict):
            return body
        given = {name: value for name, value in body.items() if value is not None and name not in cls.harmless}
        if unknown := next((name for name in given if name not in cls.model_fields), None):
            raise _refuse(unknown, given[unknown], cls)
        return given


def _refuse(name: str, value: object, body: type[_Body]) -> ValidationError:
    """Return the refusal of a field, which names the served field that was probably meant."""
    shown = name[:MAX_NAME].encode(errors="replace").decode()  # JSON may hold half a character
    near = get_close_matches(shown, body.model_fields, 1, cutoff=0.8)
    remedy = f"did you mean {near[0]}?" if near else "leave the field out"
    error = PydanticCustomError(UNSUPPORTED, "is not supported by this server; {remedy}", {"remedy": remedy})
    return ValidationError.from_exception_data(body.__name__, [InitErrorDetails(type=error, loc=(shown,), input=value)])


class StreamOptions(_Body):
    """Further chunks of a stream."""

    harmless = frozenset({"include_obfuscation", "continuous_usage_stats"})  # padding; the usage is in the last chunk

    include_usage: bool = False
    """A last chunk with the usage, before `[DONE]`."""
    include_denoising: bool = False
    """A chunk without choices for every denoising step: which tokens it unmasked, and how sure the model was."""


class _Request(_Body, Sampling):
    """The fields of both endpoints; from `steps` on, and those of `Sampling` beyond OpenAI's, are this server's own."""

    harmless = frozenset(
        {
            # who asks, and records about it
            *("user", "metadata", "store", "safety_identifier", "request_id"),
            # price and caches, which this server does not have
            *("service_tier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "cache_salt"),
            # about tool calls and reasoning, which no answer of this server has
            *("parallel_tool_calls", "include_reasoning"),
        }
    )
    steps_field = "steps"

    model: str | None = None
    """A served model's name; absent: the first one."""
    temperature: float = Field(1.0, ge=0, le=2)
    """0 is greedy."""
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), AfterValidator(lambda count: max(count, 0))] = 0
    """Sample from this many tokens; 0 and -1 are all."""
    remasking: Annotated[
        Remasking | Literal["low_confidence"] | None,
        AfterValidator(lambda policy: "low_confidence_static" if policy == "low_confidence" else policy),
    ] = None
    """The unmasking policy, where the fields above do not imply it; `low_confidence` is low_confidence_static."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """The same seed and request give the same text; absent: a random one."""
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    """Choices for each prompt."""
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)] = Field([], max_length=16)
    """The text ends before the first of these."""
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([], max_length=16)
    """Tokens that end a choice, beside the model's own: end of sequence, end of turn, generation_config.json's."""
    ignore_eos: bool = False
    """Decode on past the model's own end tokens, to `max_tokens`."""
    stream: bool = False
    """Send each block when it is finished, as server-sent events."""
    stream_options: StreamOptions = StreamOptions()
    steps: int | None = Field(None, ge=1)
    """Denoising steps per block; fewer are faster. Absent: the server's default."""
    return_trajectory: bool = False
    """Also return each choice as a row of the trajectory table: ids, the denoising step of each, log-probabilities."""

    echo: Annotated[Any, *_only(False)] = None
    best_of: Annotated[Any, *_only(1)] = None
    logit_bias: Annotated[Any, *_only({})] = None
    suffix: Annotated[Any, *_only("")] = None
    min_p: Annotated[Any, *_only(0, 0.0)] = None
    frequency_penalty: Annotated[Any, *_only(0, 0.0)] = None
    presence_penalty: Annotated[Any, *_only(0, 0.0)] = None
    repetition_penalty: Annotated[Any, *_only(1, 1.0)] = None
    min_tokens: Annotated[Any, *_only(0)] = None
    response_format: Annotated[Any, *_only({"type": "text"})] = None
    tools: Annotated[Any, *_only([])] = None
    functions: Annotated[Any, *_only([])] = None
    tool_choice: Annotated[Any, *_only("none", "auto")] = None
    function_call: Annotated[Any, *_only("none", "auto")] = None
    modalities: Annotated[Any, *_only(["text"])] = None
    reasoning_effort: Annotated[Any, *_only("none")] = None
    verbosity: Annotated[Any, *_only("medium")] = None
    bad_words: Annotated[Any, *_only([])] = None
    length_penalty: Annotated[Any, *_only(1, 1.0)] = None
    use_beam_search: Annotated[Any, *_only(False)] = None
    include_stop_str_in_output: Annotated[Any, *_only(False)] = None
    skip_special_tokens: Annotated[Any, *_only(True)] = None
    add_special_tokens: Annotated[Any, *_only(False)] = None


def _as_prompts(value: Any) -> Any:
    """Make a list of prompts of one text, one list of ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return [value]
    return value


# lists are checked up to their first wrong entry: an error for each would take seconds and hundreds of megabytes
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=MAX_PROMPT_IDS, fail_fast=True)
]


class CompletionRequest(_Request):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        list[str | TokenIds],
        BeforeValidator(_as_prompts, json_schema_input_type=str | TokenIds | list[str] | list[TokenIds]),
    ] = Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)
    """A text, or its token ids, or several of them."""
    max_tokens: int = Field(16, ge=1)
    logprobs: int | Literal[False] | None = Field(None, ge=0, le=MAX_ALTERNATIVES)
    """Also return the log-probability of each token at the step that unmasked it, and this many alternatives."""
    top_logprobs: Annotated[Any, *_only(0)] = None

    @model_validator(mode="after")
    def _limit_choices(self) -> Self:
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise ValueError(
                f"{len(self.prompt)} prompts x n = {self.n} exceed {MAX_CHOICES} choices; split the request"
            )
        return self

    @property
    def num_alternatives(self) -> int | None:
        """Alternatives that each token needs; None without log-probabilities."""
        return None if self.logprobs is False else self.logprobs


class Message(_Body):
    """One turn of a chat."""

    harmless = frozenset({"name", "annotations"})  # no chat template writes them

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of_parts)]


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    """Absent: as many as the server and the model's context allow."""
    max_tokens: int | None = Field(None, ge=1)
    """The older name of `max_completion_tokens`."""
    logprobs: bool = False
    """Also return the log-probability of each token at the step that unmasked it."""
    top_logprobs: int = Field(0, ge=0, le=MAX_ALTERNATIVES)
    """Alternatives for each token; needs `logprobs`."""

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs = {self.top_logprobs} needs logprobs = true")
        return self

    @property
    def num_alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


TextRequest = CompletionRequest | ChatRequest


class TokenizeRequest(_Body):
    """The body of POST /tokenize: a prompt, or messages for the chat template."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        }
    )

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_TURNS, fail_fast=True)

    @model_validator(mode="after")
    def _check_one_text(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        return self


class Tokenized(BaseModel):
    """The answer of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


_HINTS = get_type_hints(TrajectoryRow) | {"sampler": dict}
_Row: Any = create_model("_Row", **{n: get_args(h)[0] if isinstance(h, UnionType) else h for n, h in _HINTS.items()})


class Trajectory(_Row):
    """A choice as a row of the table trajectory/v1 (docs/data.md), and the text of each token.

    `response_ids` continue to the end of the last block, past an end of sequence or a stop text. `denoising_steps` is
    null where they do not say how much a step unmasks. The endpoint knows no hashes, origin, answer or reward: null.
    """

    origin: None = None
    answer: None = None
    reward: None = None
    reward_source: str = ""
    denoising_steps: int | None
    block_origin: Literal["global", "response"]
    shift: Literal[0, 1]
    sampler: dict[str, str | float | int | None]
    support: Literal["full", "truncated"]
    model_hash: None = None
    tokenizer_hash: None = None
    data_hash: None = None
    tokens: list[str]


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion's tokens, in the order of the text."""

    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float]] | None = None
    text_offset: list[int] = []


class Alternative(BaseModel):
    """A candidate token at one place."""

    token: str
    logprob: float
    bytes: list[int]

    @classmethod
    def of(cls, token: str, logprob: float, **more: Any) -> Self:
        """Return a candidate from its text and log-probability."""
        return cls(token=token, logprob=logprob, bytes=[*token.encode()], **more)


class TokenLogprob(Alternative):
    """A token and its alternatives."""

    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a message's tokens."""

    content: list[TokenLogprob]


FinishReason = Literal["stop", "length"]


class _Choice(BaseModel):
    index: int
    finish_reason: FinishReason | None = None
    trajectory: Trajectory | None = None


class CompletionChoice(_Choice):
    """One choice, or in a stream a part of one."""

    text: str
    logprobs: CompletionLogprobs | None = None


class ChatChoice(_Choice):
    """One choice of a whole chat response."""

    message: Message
    logprobs: ChatLogprobs | None = None


class Delta(BaseModel):
    """The text that a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Choice):
    """A part of one choice of a chat stream."""

    delta: Delta
    logprobs: ChatLogprobs | None = None


class Usage(BaseModel):
    """Token counts: each prompt once; each choice up to its end of sequence, which is not counted, or its limit."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Denoising(BaseModel):
    """One denoising step of one choice: the places it unmasked, counted from the choice's first token."""

    index: int
    step: int
    places: list[int]
    token_ids: list[int]
    tokens: list[str]
    probabilities: list[float]
    block_start: int
    """First place of their block; below 0 where the prompt ends inside it."""
    block_size: int


class _Answer(BaseModel):
    id: str
    created: int
    model: str


class Completion(_Answer):
    """The answer of /v1/completions, or a chunk of it."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None
    denoising: Denoising | None = None


class ChatCompletion(_Answer):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(_Answer):
    """A chunk of /v1/chat/completions as a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    denoising: Denoising | None = None


class ModelCard(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dtrpo"
    max_model_len: int
    """Most tokens of a prompt and its answer together."""
    block_size: int
    attention: Literal["block", "full"]
    """block: decoded with an exact cache; full: every step runs the whole sequence."""


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """An error; `param` is the field to change."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail
