"""Scored trajectories -> preference pairs: best against worst of a prompt, ties never, duplicates once."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from dtrpo_ray.config import PairConfig
from dtrpo_ray.records import CONTRACT_VERSION, PREFERENCE


def make_pairs(trajectories: pa.Table, config: PairConfig) -> pa.Table:
    """Pairs (the table preference/v1) of a trajectory table.

    Within a prompt the distinct responses are ranked by reward; the best meets the worst, the second best the second
    worst, and so on, up to `max_pairs_per_prompt`, while rewards differ by `min_margin` or more.
    """
    columns = ["row_id", "prompt_id", "prompt_ids", "response_ids", "steps", "reward", "block_size", "mask_id"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in trajectories.select(columns).sort_by("row_id").to_pylist():
        groups.setdefault(row["prompt_id"], []).append(row)
    rows = [pair for group in groups.values() for pair in _pairs_of_prompt(group, config)]
    return pa.Table.from_pylist(rows, schema=PREFERENCE)


def _pairs_of_prompt(group: list[dict[str, Any]], config: PairConfig) -> Iterator[dict[str, Any]]:
    distinct = {tuple(row["response_ids"]): row for row in reversed(group)}
    ranked = sorted(distinct.values(), key=lambda row: (-row["reward"], row["row_id"]))
    for number in range(min(config.max_pairs_per_prompt, len(ranked) // 2)):
        chosen, rejected = ranked[number], ranked[-1 - number]
        if chosen["reward"] - rejected["reward"] < config.min_margin:
            return
        yield {
            "contract_version": CONTRACT_VERSION,
            "row_id": f"{chosen['row_id']}>{rejected['row_id']}",
            "prompt_id": chosen["prompt_id"],
            "prompt_ids": chosen["prompt_ids"],
            "chosen_ids": chosen["response_ids"],
            "rejected_ids": rejected["response_ids"],
            "chosen_steps": chosen["steps"],
            "rejected_steps": rejected["steps"],
            "chosen_reward": chosen["reward"],
            "rejected_reward": rejected["reward"],
            "block_size": chosen["block_size"],
            "mask_id": chosen["mask_id"],
        }
