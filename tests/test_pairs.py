"""Pairs: better first, ties never, duplicates once, and the steps travel with their tokens."""

import pyarrow as pa
import pytest

from dtrpo_ray.config import PairConfig
from dtrpo_ray.pairs import make_pairs
from dtrpo_ray.records import TRAJECTORY, check_table


def trajectories(*rows: tuple[str, list[int], float, int]) -> pa.Table:
    """(prompt id, response ids, reward, denoising steps) -> a trajectory table."""
    made = [
        {
            "contract_version": 1, "row_id": f"{prompt}-{i}", "prompt_id": prompt, "prompt": prompt, "response": "",
            "prompt_ids": [1, 2, 3, 4], "response_ids": ids, "steps": list(range(len(ids))), "logps": [0.0] * len(ids),
            "num_forwards": 4, "reward": reward, "reward_source": "test", "block_size": 4, "block_origin": "global",
            "mask_id": 6, "temperature": 1.0, "denoising_steps": k, "seed": 0, "engine": "test", "model_hash": "",
        }
        for i, (prompt, ids, reward, k) in enumerate(rows)
    ]  # fmt: skip
    return pa.Table.from_pylist(made, schema=TRAJECTORY)


def test_the_closest_good_and_bad_responses_meet() -> None:
    table = trajectories(
        ("a", [1, 1, 1, 1], 1.0, 2),
        ("a", [2, 2, 2, 2], 1.0, 2),
        ("a", [2, 2, 2, 3], 0.0, 2),
        ("a", [4, 4, 4, 4], 0.0, 2),
    )
    pairs = make_pairs(table, PairConfig(max_pairs_per_prompt=1)).to_pylist()
    assert [(p["chosen_ids"], p["rejected_ids"]) for p in pairs] == [([2, 2, 2, 2], [2, 2, 2, 3])]
    assert pairs[0]["chosen_steps"] == [0, 1, 2, 3]
    check_table(make_pairs(table, PairConfig()), "pairs")


def test_a_response_is_used_once_and_the_number_is_bounded() -> None:
    table = trajectories(
        ("a", [1, 1, 1, 1], 1.0, 2),
        ("a", [2, 2, 2, 2], 1.0, 2),
        ("a", [3, 3, 3, 3], 0.0, 2),
        ("a", [4, 4, 4, 4], 0.0, 2),
    )
    pairs = make_pairs(table, PairConfig(max_pairs_per_prompt=5)).to_pylist()
    assert len(pairs) == 2
    assert len({tuple(p["chosen_ids"]) for p in pairs}) == len({tuple(p["rejected_ids"]) for p in pairs}) == 2


def test_only_trajectories_of_the_same_settings_pair() -> None:
    table = trajectories(("a", [1, 1, 1, 1], 1.0, 1), ("a", [2, 2, 2, 2], 0.0, 2))
    assert len(make_pairs(table, PairConfig())) == 0


@pytest.mark.parametrize("rewards", [(1.0, 1.0), (0.0, 0.0), (0.6, 0.3)])
def test_ties_and_small_margins_never_pair(rewards: tuple[float, float]) -> None:
    table = trajectories(("a", [1, 1, 1, 1], rewards[0], 2), ("a", [2, 2, 2, 2], rewards[1], 2))
    assert len(make_pairs(table, PairConfig(min_margin=0.5))) == 0


def test_prompts_do_not_mix_and_row_order_does_not_matter() -> None:
    table = trajectories(("a", [1, 1, 1, 1], 1.0, 2), ("b", [2, 2, 2, 2], 0.0, 2), ("a", [3, 3, 3, 3], 0.0, 2))
    pairs = make_pairs(table, PairConfig())
    assert len(pairs) == 1
    assert make_pairs(table.take(pa.array([2, 1, 0])), PairConfig()).equals(pairs)
