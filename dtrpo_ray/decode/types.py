"""What is asked of a decoder and what it says: how to decode, a response, and the events on the way. Data only."""

from dataclasses import dataclass, field, fields
from typing import Literal

Remasking = Literal[
    "low_confidence_static", "low_confidence_dynamic", "low_confidence_top_k", "entropy_bounded", "sequential"
]
SCHEDULES: dict[str, Remasking] = {  # the field that says how much -> the policy it is for
    "threshold": "low_confidence_dynamic",
    "tokens_per_step": "low_confidence_top_k",
    "entropy_bound": "entropy_bounded",
}
ENGINE_NAME = "dtrpo_ray.sampler/2"  # raise the number when decoding changes what a seed gives

Alternatives = list[tuple[int, float]]  # (id, log mu), most probable first


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to decode. `denoising_steps` per block (fixed schedule, most confident first) or, if `threshold` is set,
    every token whose probability exceeds it and always the most confident one. `temperature` 0 is greedy.

    `remasking` names another policy of `unmasking/`; `tokens_per_step` goes with low_confidence_top_k, `entropy_bound`
    (nats) with entropy_bounded. `stop_token_ids` end a response as the model's own `stop_ids` do; `ignore_eos` lets it
    decode on past those. `block_length` is for full-attention models, which were trained on none; the model's own if
    absent. `small_block_size` divides the block into sub-blocks that are unmasked one after the other, each in at least
    one step; the model's own if absent, the block's size for none. `top_logprobs` asks for the most probable
    alternatives of each token, `max_new_tokens` counts tokens of text.
    """

    max_new_tokens: int
    denoising_steps: int
    temperature: float = 0.0
    threshold: float | None = None
    remasking: Remasking = "low_confidence_static"
    tokens_per_step: int = 1
    entropy_bound: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    block_length: int | None = None
    top_logprobs: int = 0
    small_block_size: int | None = None

    @property
    def policy(self) -> Remasking:
        """The unmasking policy; a threshold alone means the dynamic one."""
        return "low_confidence_dynamic" if self.threshold is not None else self.remasking


@dataclass(frozen=True, slots=True)
class Generation:
    """One response. `ids` and `steps` end on the block grid (the terminal block whole); `steps` counts denoising
    forwards from 0 within the response, NEVER where no step unmasked, GIVEN where the token was shown from its block's
    first step on; `logps` are the tokens' log mu at temperature 1; `num_forwards` counts denoising forwards;
    `text_ids` stops before the token that ends it. `top` holds (id, log mu) alternatives by place, where asked."""

    ids: list[int]
    steps: list[int]
    logps: list[float]
    num_forwards: int
    text_ids: list[int]
    top: dict[int, Alternatives] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Unmasked:
    """One denoising step of a watched request: places in the response, their tokens and log-probabilities."""

    step: int
    places: list[int]
    ids: list[int]
    logps: list[float]


@dataclass(frozen=True, slots=True)
class Committed:
    """A finished block of a request: its part of `Generation.ids`, `steps`, `logps` and `top`."""

    ids: list[int]
    steps: list[int]
    logps: list[float]
    top: dict[int, Alternatives]


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request."""

    generation: Generation


Event = Unmasked | Committed | Finished


@dataclass(slots=True)
class Counters:
    """What a decoder has done: passes are forwards of the model, the rest is summed over requests.

    vLLM counts the commit of a block as a step over its canvas too, and `vllm bench serve` takes those off again.
    """

    passes: int = 0
    pass_tokens: int = 0
    denoising_steps: int = 0
    canvas_positions: int = 0
    committed_tokens: int = 0
    committed_blocks: int = 0
    committed_positions: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0

    @property
    def steps_with_commits(self) -> int:
        return self.denoising_steps + self.committed_blocks

    @property
    def positions_with_commits(self) -> int:
        return self.canvas_positions + self.committed_positions

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))
