"""The tables the pipeline hands over, as Arrow schemas. No torch, no ray; `rules` says what each row must pass.

`TRAJECTORY` (rollout or an import writes, score and pair read): one response, whole: ids up to the end of its terminal
block, the denoising step at which each was unmasked, and how it was decoded. `PREFERENCE` (pair or an import writes,
train reads): a prompt and two sides. `EXAMPLE`: a prompt and its answer. `docs/data.md` describes every field.
"""

from types import UnionType
from typing import Any, TypedDict, get_args, get_type_hints, is_typeddict

import pyarrow as pa

CONTRACT_VERSION = 1
BLOCK_ORIGINS = ("global", "response")  # the grid of blocks starts at the prompt's first token, or the response's
SUPPORTS = ("full", "truncated")  # at each place any token but the mask could be drawn, or top-p or top-k cut some off

# types: how a token came to its place
DIFFUSION = 0  # a denoising step unmasked it, or none ever reached it
FIRST = 1  # the model wrote it before its block's first denoising step: an autoregressive first token
FORCED = 2  # it was put there and not drawn
TOKEN_TYPES = (DIFFUSION, FIRST, FORCED)

_ARROW: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int32(),
    float: pa.float64(),
    list[int]: pa.list_(pa.int32()),
    list[float]: pa.list_(pa.float32()),
    list[str]: pa.list_(pa.string()),
}


def arrow_fields(row: type) -> list[pa.Field]:
    """Return the columns of a TypedDict in its order; every column may be null to Arrow."""
    hints = get_type_hints(row).items()
    kinds = {name: get_args(hint)[0] if isinstance(hint, UnionType) else hint for name, hint in hints}
    return [pa.field(n, pa.struct(arrow_fields(k)) if is_typeddict(k) else _ARROW[k]) for n, k in kinds.items()]


class SamplerRow(TypedDict, total=False):
    """The column `sampler`: how a response was decoded."""

    remasking: str
    threshold: float | None
    tokens_per_step: int
    small_block_size: int | None
    entropy_bound: float
    top_p: float
    top_k: int
    max_new_tokens: int


class TrajectoryRow(TypedDict, total=False):
    """A row of TRAJECTORY, or a part of one. An import leaves null what it cannot know, and only scoring rewards."""

    contract_version: int
    row_id: str
    prompt_id: str
    origin: str | None
    prompt: str
    response: str
    answer: str | None
    prompt_ids: list[int]
    response_ids: list[int]
    steps: list[int] | None
    ranks: list[int] | None
    types: list[int] | None
    logps: list[float] | None
    num_forwards: int | None
    reward: float | None
    reward_source: str | None
    block_size: int
    block_origin: str
    mask_id: int
    shift: int | None
    denoising_steps: int | None
    temperature: float | None
    sampler: SamplerRow | None
    support: str | None
    seed: int | None
    engine: str
    model_hash: str | None
    tokenizer_hash: str | None
    data_hash: str | None


_NAME = "dtrpo.table"  # in a schema's metadata
_COLUMNS = pa.schema(arrow_fields(TrajectoryRow), metadata={_NAME: f"trajectory/v{CONTRACT_VERSION}"})
TRAJECTORY = _COLUMNS.set(_COLUMNS.get_field_index("seed"), pa.field("seed", pa.int64()))

# the columns of a pair's sides -> the columns of the two trajectories that they come from
SIDES = {
    f"{side}_{name}": source
    for name, source in {"ids": "response_ids", "steps": "steps", "types": "types", "reward": "reward"}.items()
    for side in ("chosen", "rejected")
}
PREFERENCE = pa.schema(
    [
        *map(TRAJECTORY.field, ("contract_version", "row_id", "prompt_id", "origin", "prompt_ids")),
        *(pa.field(name, TRAJECTORY.field(source).type) for name, source in SIDES.items()),
        *map(TRAJECTORY.field, ("reward_source", "block_size", "block_origin", "mask_id")),
        *map(TRAJECTORY.field, ("model_hash", "tokenizer_hash", "data_hash")),
    ],
    metadata={_NAME: f"preference/v{CONTRACT_VERSION}"},
)
EXAMPLE = pa.schema(
    [
        *map(PREFERENCE.field, ("contract_version", "row_id", "origin", "prompt_ids", "chosen_ids")),
        *map(PREFERENCE.field, ("block_size", "block_origin", "mask_id", "tokenizer_hash", "data_hash")),
    ],
    metadata={_NAME: f"example/v{CONTRACT_VERSION}"},
)
ID_COLUMNS = ("prompt_ids", "response_ids", "chosen_ids", "rejected_ids")
_NULLABLE = {name for name, hint in get_type_hints(TrajectoryRow).items() if isinstance(hint, UnionType)}
MAY_BE_NULL = frozenset(_NULLABLE | {name for name, source in SIDES.items() if source in _NULLABLE})

SCHEMAS = (TRAJECTORY, PREFERENCE, EXAMPLE)


def table_name(schema: pa.Schema) -> str:
    """Return a table's name and version, such as `trajectory/v1`."""
    return str((schema.metadata or {}).get(_NAME.encode(), b"?").decode())
