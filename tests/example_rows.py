"""A valid row of each table, and tables of three rows of which the middle one is changed."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from dtrpo_ray.data.schemas import EXAMPLE, PREFERENCE, TRAJECTORY

Row = dict[str, Any]
MASK, BLOCK = 9, 4


def trajectory(row_id: str = "a") -> Row:
    return {
        "contract_version": 1,
        "row_id": row_id,
        "prompt_id": "p",
        "origin": None,
        "prompt": "12",
        "response": "345",
        "answer": None,
        "prompt_ids": [1, 2],
        "response_ids": [3, 4, 5, 8, 8, 8],
        "steps": [0, 1, 2, 2, 3, -1],
        "ranks": [0, 1, 0, 0, 1, -1],
        "types": [0] * 6,
        "logps": [-0.5] * 6,
        "num_forwards": 4,
        "reward": 1.0,
        "reward_source": "module:score",
        "block_size": BLOCK,
        "block_origin": "global",
        "mask_id": MASK,
        "shift": 0,
        "denoising_steps": 2,
        "temperature": 1.0,
        "sampler": {"remasking": "low_confidence_static", "top_p": 1.0, "top_k": 0, "max_new_tokens": 6},
        "support": "full",
        "seed": 7,
        "engine": "engine/1",
        "model_hash": "0" * 64,
        "tokenizer_hash": "1" * 64,
        "data_hash": "2" * 64,
    }


def preference(row_id: str = "a") -> Row:
    return {
        "contract_version": 1,
        "row_id": row_id,
        "prompt_id": "p",
        "origin": None,
        "prompt_ids": [1, 2],
        "chosen_ids": [3, 8],
        "rejected_ids": [4, 5, 6, 7, 8, 8],
        "chosen_steps": [1, 0],
        "rejected_steps": [0, 1, 0, 1, 2, 3],
        "chosen_types": [0, 0],
        "rejected_types": [0] * 6,
        "chosen_reward": 1.0,
        "rejected_reward": 0.0,
        "reward_source": "module:score",
        "block_size": BLOCK,
        "block_origin": "global",
        "mask_id": MASK,
        "model_hash": "0" * 64,
        "tokenizer_hash": "1" * 64,
        "data_hash": "2" * 64,
    }


def example(row_id: str = "a") -> Row:
    row = {"contract_version": 1, "row_id": row_id, "origin": None, "prompt_ids": [1, 2], "chosen_ids": [3, 8]}
    row |= {"block_size": BLOCK, "block_origin": "global", "mask_id": MASK}
    return row | {"tokenizer_hash": "1" * 64, "data_hash": "2" * 64}


KINDS: dict[str, tuple[pa.Schema, Callable[..., Row]]] = {
    "trajectory/v1": (TRAJECTORY, trajectory),
    "preference/v1": (PREFERENCE, preference),
    "example/v1": (EXAMPLE, example),
}


def table_of(kind: str, change: Row) -> pa.Table:
    """Three rows of which the middle one, "b", is changed."""
    schema, make = KINDS[kind]
    return pa.Table.from_pylist([make("a"), make("b") | change, make("c")], schema=schema)
