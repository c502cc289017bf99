"""The decoder's inputs and outputs: sampling parameters, responses, and the events on the way. Data only."""

from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, Field

from dtrpo_ray.config.decode import Sampling

DECODER_NAME = "dtrpo_ray.sampler/2"  # raise the number when decoding changes what a seed gives

Alternatives = list[tuple[int, float]]  # (id, log mu), most probable first


class SamplingParams(Sampling):
    """Decoding parameters of one request."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int
    """Most tokens of text."""
    denoising_steps: int
    """Denoising steps per block, for the policies that are measured in steps."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, beside the model's own `stop_ids`."""
    ignore_eos: bool = False
    """Decode on past the model's own `stop_ids`."""
    top_logprobs: int = Field(0, ge=0)
    """Most probable alternatives to report for each token."""

    def stops(self, own: frozenset[int]) -> frozenset[int]:
        """Return the tokens that end a response of a model with its `own` end tokens."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else own)


def to_params(sampling: Sampling, *, max_new_tokens: int, denoising_steps: int, **more: Any) -> SamplingParams:
    """Return the decoder's parameters for a section of a job or an HTTP request."""
    shared = {name: getattr(sampling, name) for name in Sampling.model_fields} | {"remasking": sampling.policy}
    return SamplingParams(**shared, max_new_tokens=max_new_tokens, denoising_steps=denoising_steps, **more)


@dataclass(frozen=True, slots=True)
class Generation:
    """One response, the last event of its request. `ids` and `steps` end on the block grid, so the last block is whole.
    `steps` counts denoising forwards from 0: NEVER where no step unmasked the token, GIVEN where it was known before
    its block's first step. `logps` are log mu at temperature 1; `text_ids` stops before the token that ends the text;
    `top` holds the alternatives by place if the request asks for them."""

    ids: list[int]
    steps: list[int]
    logps: list[float]
    num_forwards: int
    text_ids: list[int]
    top: dict[int, Alternatives] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Unmasked:
    """One denoising step of a watched request: places in the response, their tokens and log mu."""

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


DecoderEvent = Unmasked | Committed | Generation


@dataclass(slots=True)
class Counters:
    """Work of a decoder: passes are forwards of the model, the rest is summed over requests.

    vLLM counts the commit of a block as a step over its canvas too, and `vllm bench serve` subtracts those again.
    """

    passes: int = 0
    pass_tokens: int = 0
    denoising_steps: int = 0
    steps_with_commits: int = 0
    positions_with_commits: int = 0
    committed_tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
