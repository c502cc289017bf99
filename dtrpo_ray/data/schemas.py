"""The tables the pipeline hands over, as Arrow schemas. No torch, no ray; `rules` says what each row must pass.

`TRAJECTORY` (rollout or an import writes, score and pair read): one response, whole: ids up to the end of its terminal
block, the denoising step at which each was unmasked, and how it was decoded. `PREFERENCE` (pair or an import writes,
train reads): a prompt and two sides. `EXAMPLE`: a prompt and its answer. `docs/data.md` describes every field.
"""

from typing import TypedDict

import pyarrow as pa

CONTRACT_VERSION = 1
BLOCK_ORIGINS = ("global", "response")  # the grid of blocks starts at the prompt's first token, or the response's
SUPPORTS = ("full", "truncated")  # at each place any token but the mask could be drawn, or top-p or top-k cut some off

# types: how a token came to its place
DIFFUSION = 0  # a denoising step unmasked it, or none ever reached it
FIRST = 1  # the model wrote it before its block's first denoising step: an autoregressive first token
FORCED = 2  # it was put there and not drawn
TOKEN_TYPES = (DIFFUSION, FIRST, FORCED)

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_SAMPLER = pa.struct(
    [
        ("remasking", pa.string()),
        ("threshold", pa.float64()),
        ("tokens_per_step", pa.int32()),
        ("small_block_size", pa.int32()),
        ("entropy_bound", pa.float64()),
        ("top_p", pa.float64()),
        ("top_k", pa.int32()),
        ("max_new_tokens", pa.int32()),
    ]
)

TRAJECTORY = pa.schema(
    [
        ("contract_version", pa.int32()),
        ("row_id", pa.string()),
        ("prompt_id", pa.string()),
        ("origin", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("answer", pa.string()),
        ("prompt_ids", _INTS),
        ("response_ids", _INTS),
        ("steps", _INTS),
        ("ranks", _INTS),
        ("types", _INTS),
        ("logps", _FLOATS),
        ("num_forwards", pa.int32()),
        ("reward", pa.float64()),
        ("reward_source", pa.string()),
        ("block_size", pa.int32()),
        ("block_origin", pa.string()),
        ("mask_id", pa.int32()),
        ("shift", pa.int32()),
        ("denoising_steps", pa.int32()),
        ("temperature", pa.float64()),
        ("sampler", _SAMPLER),
        ("support", pa.string()),
        ("seed", pa.int64()),
        ("engine", pa.string()),
        ("model_hash", pa.string()),
        ("tokenizer_hash", pa.string()),
        ("data_hash", pa.string()),
    ],
    metadata={"dtrpo.table": f"trajectory/v{CONTRACT_VERSION}"},
)


class SamplerRow(TypedDict):
    """The column `sampler`: how a response was decoded."""

    remasking: str
    threshold: float | None
    tokens_per_step: int
    small_block_size: int | None
    entropy_bound: float
    top_p: float
    top_k: int
    max_new_tokens: int


class DecodingRow(TypedDict):
    """The columns of a row of TRAJECTORY that say how the response was decoded."""

    ranks: list[int]
    types: list[int]
    block_size: int
    block_origin: str
    mask_id: int
    shift: int
    denoising_steps: int | None
    temperature: float
    sampler: SamplerRow
    support: str


class TrajectoryRow(DecodingRow):
    """A row of TRAJECTORY as our decoder writes it."""

    contract_version: int
    row_id: str
    prompt_id: str
    origin: str | None
    prompt: str
    response: str
    answer: str | None
    prompt_ids: list[int]
    response_ids: list[int]
    steps: list[int]
    logps: list[float] | None
    num_forwards: int
    reward: float | None
    reward_source: str | None
    seed: int
    engine: str
    model_hash: str
    tokenizer_hash: str
    data_hash: str | None


PREFERENCE = pa.schema(
    [
        ("contract_version", pa.int32()),
        ("row_id", pa.string()),
        ("prompt_id", pa.string()),
        ("origin", pa.string()),
        ("prompt_ids", _INTS),
        ("chosen_ids", _INTS),
        ("rejected_ids", _INTS),
        ("chosen_steps", _INTS),
        ("rejected_steps", _INTS),
        ("chosen_types", _INTS),
        ("rejected_types", _INTS),
        ("chosen_reward", pa.float64()),
        ("rejected_reward", pa.float64()),
        ("reward_source", pa.string()),
        ("block_size", pa.int32()),
        ("block_origin", pa.string()),
        ("mask_id", pa.int32()),
        ("model_hash", pa.string()),
        ("tokenizer_hash", pa.string()),
        ("data_hash", pa.string()),
    ],
    metadata={"dtrpo.table": f"preference/v{CONTRACT_VERSION}"},
)

EXAMPLE = pa.schema(
    [
        ("contract_version", pa.int32()),
        ("row_id", pa.string()),
        ("prompt_ids", _INTS),
        ("chosen_ids", _INTS),
    ],
    metadata={"dtrpo.table": f"example/v{CONTRACT_VERSION}"},
)

# what an import cannot know, and what only a scored or a recorded row has
MAY_BE_NULL = frozenset(
    [
        *("origin", "answer", "steps", "ranks", "types", "logps", "num_forwards", "reward", "reward_source", "shift"),
        *("denoising_steps", "temperature", "sampler", "support", "seed", "model_hash", "tokenizer_hash", "data_hash"),
        *("chosen_steps", "rejected_steps", "chosen_types", "rejected_types", "chosen_reward", "rejected_reward"),
    ]
)

SCHEMAS = (TRAJECTORY, PREFERENCE, EXAMPLE)


def table_name(schema: pa.Schema) -> str:
    """Return a table's name and version, such as `trajectory/v1`."""
    return str((schema.metadata or {}).get(b"dtrpo.table", b"?").decode())
