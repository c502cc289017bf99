"""Scored trajectories -> preference pairs: the closest good and bad response of a prompt, ties never."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from dtrpo_ray.config import PairConfig
from dtrpo_ray.records import CONTRACT_VERSION, PREFERENCE


def make_pairs(trajectories: pa.Table, config: PairConfig) -> pa.Table:
    """Pairs (the table preference/v1) of a trajectory table.

    Only responses to the same prompt, decoded with the same settings, pair, and only where rewards differ by
    `min_margin` or more. Pairs that differ in the fewest positions come first (their difference is what the
    preference is about), each response is used once, up to `max_pairs_per_prompt` for each prompt and setting.
    """
    columns = ["row_id", "prompt_id", "prompt_ids", "response_ids", "steps", "reward", "block_size"]
    columns += ["block_origin", "mask_id"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in trajectories.select([*columns, "denoising_steps", "temperature"]).sort_by("row_id").to_pylist():
        groups.setdefault((row["prompt_id"], row["denoising_steps"], row["temperature"]), []).append(row)
    rows = [pair for group in groups.values() for pair in _pairs_of_group(group, config)]
    return pa.Table.from_pylist(rows, schema=PREFERENCE)


def _pairs_of_group(group: list[dict[str, Any]], config: PairConfig) -> Iterator[dict[str, Any]]:
    distinct = list({tuple(row["response_ids"]): row for row in reversed(group)}.values())
    candidates = [
        (_distance(good["response_ids"], bad["response_ids"]), good["row_id"], bad["row_id"], good, bad)
        for good in distinct
        for bad in distinct
        if good["reward"] - bad["reward"] >= config.min_margin
    ]
    used: set[str] = set()
    made = 0
    for _, good_id, bad_id, good, bad in sorted(candidates, key=lambda candidate: candidate[:3]):
        if made < config.max_pairs_per_prompt and not {good_id, bad_id} & used:
            used |= {good_id, bad_id}
            made += 1
            yield _pair(good, bad)


def _distance(one: list[int], other: list[int]) -> int:
    """Positions that differ, missing ones included."""
    return sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))


def _pair(chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    return {
        "contract_version": CONTRACT_VERSION,
        "row_id": f"{chosen['row_id']}>{rejected['row_id']}",
        **{name: chosen[name] for name in ("prompt_id", "prompt_ids", "block_size", "block_origin", "mask_id")},
        **{f"chosen_{name}": chosen[key] for name, key in _SIDE.items()},
        **{f"rejected_{name}": rejected[key] for name, key in _SIDE.items()},
    }


_SIDE = {"ids": "response_ids", "steps": "steps", "reward": "reward"}
