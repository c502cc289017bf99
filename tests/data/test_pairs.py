"""Pairs: better first, ties never, duplicates once, by each strategy; and the steps travel with their tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_rows import trajectory
from hypothesis import given
from hypothesis import strategies as st

from dtrpo_ray.config.produce import PairConfig
from dtrpo_ray.data import pairs
from dtrpo_ray.data.pairs import Pairer, make_pairs
from dtrpo_ray.data.rules import check_table
from dtrpo_ray.data.schemas import PREFERENCE, TRAJECTORY
from dtrpo_ray.data.tables import prompt_parts, read_table
from dtrpo_ray.errors import DataError


def trajectories(*rows: tuple[Any, ...]) -> pa.Table:
    """(prompt id, response ids, reward, denoising steps, further columns) -> a trajectory table."""
    made = []
    for i, (prompt, ids, reward, k, *changes) in enumerate(rows):
        columns = {"row_id": f"{prompt}-{i}", "prompt_id": prompt, "prompt_ids": [1, 2, 3, 4], "response_ids": ids}
        columns |= {"steps": list(range(len(ids))), "types": [0] * len(ids), "ranks": None, "logps": None, "mask_id": 6}
        made.append(trajectory() | columns | {"reward": reward, "denoising_steps": k} | dict(*changes))
    return pa.Table.from_pylist(made, schema=TRAJECTORY)


def sides(table: pa.Table) -> list[tuple[int, int]]:
    """The first id of each side."""
    return [(row["chosen_ids"][0], row["rejected_ids"][0]) for row in table.to_pylist()]


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


RANKED = [("a", [i] * 4, reward, 2) for i, reward in enumerate([0.0, 1.0, 0.2, 0.9, 0.5])]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("best_worst", [(1, 0), (3, 2)]),
        ("all", [(1, 0), (3, 0), (1, 2), (3, 2), (1, 4), (4, 0)]),
    ],
)
def test_a_strategy_takes_its_pairs_in_its_order(strategy: Any, expected: list[tuple[int, int]]) -> None:
    config = PairConfig(strategy=strategy, max_pairs_per_prompt=9, min_margin=0.45)
    assert sides(make_pairs(trajectories(*RANKED), config)) == expected
    for most in range(1, len(expected)):
        fewer = config.model_copy(update={"max_pairs_per_prompt": most})
        assert sides(make_pairs(trajectories(*RANKED), fewer)) == expected[:most]


def timed(prompt: str, first: int, reward: float, forwards: int | None, **changes: Any) -> tuple[Any, ...]:
    """A response that begins with `first`, unmasked in as many forwards."""
    steps = [min(i, (forwards or 1) - 1) for i in range(4)]
    return (prompt, [first, 0, 0, 0], reward, None, {"steps": steps, "num_forwards": forwards, **changes})


def test_of_correct_responses_the_one_with_fewer_forwards_is_chosen() -> None:
    """Largest difference first, each response once; wrong and untimed ones, ties and other settings never pair."""
    rows = [timed("a", i, 1.0, forwards) for i, forwards in enumerate([3, 1, 4, 2, 3])]
    rows += [timed("a", 5, 0.5, 1), timed("a", 6, 0.0, 4), timed("a", 7, 1.0, None), timed("a", 8, 2.0, 9)]
    rows += [timed("b", 1, 1.0, 2), timed("b", 2, 1.0, 2)]  # a tie
    rows += [timed("c", 1, 1.0, 1, temperature=0.5), timed("c", 2, 1.0, 4)]
    rows += [timed("d", 1, 0.5, 1), timed("d", 2, 0.5, 4)]  # equal rewards, but not correct
    config = PairConfig(strategy="faster", max_pairs_per_prompt=9)
    made = make_pairs(trajectories(*rows), config)
    assert sides(made) == [(1, 2), (3, 0)]  # 1 against 4 forwards, then 2 against 3; one of 3 is left over
    assert [(max(r["chosen_steps"]) + 1, max(r["rejected_steps"]) + 1) for r in made.to_pylist()] == [(1, 4), (2, 3)]
    assert made["chosen_reward"].to_pylist() == made["rejected_reward"].to_pylist() == [1.0, 1.0]
    apart = config.model_copy(update={"min_margin": 2.0})  # in forwards
    assert sides(make_pairs(trajectories(*rows), apart)) == [(1, 2)]
    assert sides(make_pairs(trajectories(*rows), config.model_copy(update={"max_pairs_per_prompt": 1}))) == [(1, 2)]


def test_the_same_answer_in_fewer_forwards_is_another_response() -> None:
    """The usual case of a puzzle with one solution; twice the same trajectory still counts once."""
    table = trajectories(timed("a", 1, 1.0, 4), timed("a", 1, 1.0, 2), timed("a", 1, 1.0, 2), timed("a", 1, 1.0, 4))
    made = make_pairs(table, PairConfig(strategy="faster", max_pairs_per_prompt=9))
    assert made["row_id"].to_pylist() == ["a-1>a-0"]
    check_table(made, "pairs")
    assert len(make_pairs(table, PairConfig())) == 0


def test_references_pair_with_responses_of_any_settings() -> None:
    reference = {"engine": "reference", "model_hash": None}
    rows = [
        ("a", [1] * 4, 1.0, 1),
        ("a", [2] * 4, 0.0, 2),
        ("a", [3] * 4, 1.0, None, reference),
        ("a", [4] * 4, 0.0, 1),
    ]
    config = PairConfig(strategy="references", max_pairs_per_prompt=5)
    assert sides(make_pairs(trajectories(*rows), config)) == [(3, 2)]
    assert sides(make_pairs(trajectories(*rows), PairConfig())) == [(1, 4)]


def test_what_only_the_length_allowed_sets_apart_pairs() -> None:
    def of(**sampler: Any) -> dict[str, Any]:
        return {"sampler": trajectory()["sampler"] | sampler}

    rows = [("a", [1] * 4, 1.0, 2, of(max_new_tokens=4)), ("a", [2] * 4, 0.0, 2, of(max_new_tokens=8))]
    assert len(make_pairs(trajectories(*rows), PairConfig())) == 1
    rows[1] = ("a", [2] * 4, 0.0, 2, of(top_k=5))
    assert len(make_pairs(trajectories(*rows), PairConfig())) == 0


@pytest.mark.parametrize(
    ("name", "value"), [("prompt_ids", [1, 2, 3, 5]), ("mask_id", 7), ("block_size", 2), ("reward_source", "other")]
)
def test_rows_of_a_prompt_that_cannot_be_compared_are_an_error(name: str, value: Any) -> None:
    table = trajectories(("a", [1] * 4, 1.0, 2), ("a", [2] * 4, 0.0, 2, {name: value}))
    with pytest.raises(DataError, match=f"row a-1: {name} differs from other rows of prompt_id a"):
        make_pairs(table, PairConfig())


def test_rows_without_a_reward_do_not_pair_and_no_rows_give_an_empty_table() -> None:
    table = trajectories(("a", [1] * 4, 1.0, 2), ("a", [2] * 4, None, 2, {"reward_source": None}))
    assert make_pairs(table, PairConfig()).equals(PREFERENCE.empty_table())


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.lists(st.integers(1, 2), min_size=4, max_size=4),
            st.sampled_from([0.0, 0.5, 1.0]),
            st.sampled_from([1, 2]),
        ),
        max_size=14,
    ),
    st.integers(1, 3),
)
def test_closest_pairs_are_those_of_the_plain_loop(rows: list[tuple[Any, ...]], most: int) -> None:
    """What the vectorised code must give: the same pairs in the same order as the definition, row by row."""
    table = trajectories(*rows)
    config = PairConfig(max_pairs_per_prompt=most)
    groups: dict[Any, list[Any]] = {}
    for row in table.sort_by("row_id").to_pylist():
        groups.setdefault((row["prompt_id"], row["denoising_steps"]), []).append(row)
    expected = []
    for group in groups.values():
        distinct = list({tuple(row["response_ids"]): row for row in reversed(group)}.values())
        candidates = [
            (sum(map(int.__ne__, g["response_ids"], b["response_ids"])), g["row_id"], b["row_id"])
            for g in distinct
            for b in distinct
            if g["reward"] - b["reward"] >= 0.5
        ]
        used: set[str] = set()
        made = 0
        for _, good, bad in sorted(candidates):
            if made < most and not {good, bad} & used:
                used |= {good, bad}
                made += 1
                expected.append(f"{good}>{bad}")
    assert make_pairs(table, config)["row_id"].to_pylist() == expected


@pytest.mark.parametrize("strategy", ["closest", "best_worst", "all", "references", "faster"])
def test_parts_of_whole_prompts_give_the_pairs_of_the_whole_table(tmp_path: Path, strategy: Any) -> None:
    rng, config = np.random.default_rng(0), PairConfig(strategy=strategy, max_pairs_per_prompt=2)
    engines = [{"engine": "reference" if i % 5 == 0 else "engine/1"} for i in range(120)]
    rows = [
        (
            f"p{rng.integers(12)}",
            rng.integers(0, 5, 4).tolist(),
            float(rng.integers(3)),
            1 + i % 2,
            engines[i] | {"num_forwards": i % 7},
        )
        for i in range(120)
    ]
    table = trajectories(*rows)
    files = [tmp_path / f"part-{i}.parquet" for i in range(4)]
    for i, file in enumerate(files):
        pq.write_table(table.slice(30 * i, 30), file)
    (tmp_path / "out").mkdir()
    parts, pairer = prompt_parts(files, 25), Pairer(config)
    done = [pairer(part, tmp_path / "out") for part in parts]
    assert len(parts) > 3
    assert sum(part["rows"] for part in done) == 120
    whole = make_pairs(table, config)
    assert len(whole) > 5
    assert read_table(tmp_path / "out", PREFERENCE).sort_by("row_id").equals(whole.sort_by("row_id"))


def test_a_part_without_pairs_leaves_no_file_and_counts_what_has_no_reward(tmp_path: Path) -> None:
    pq.write_table(trajectories(("a", [1, 1, 1, 1], None, 2, {"reward_source": None})), tmp_path / "part-0.parquet")
    (tmp_path / "out").mkdir()
    (part,) = prompt_parts([tmp_path / "part-0.parquet"], 10)
    assert Pairer(PairConfig())(part, tmp_path / "out") == {"rows": 1, "pairs": 0, "unscored": 1}
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("strategy", ["best_worst", "all", "references"])
@pytest.mark.parametrize("most", [1, 3])
def test_the_best_and_the_worst_are_enough_to_look_at(
    strategy: Any, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    engines = ["reference", "other"] if strategy == "references" else ["other", "other"]
    rows = [
        (p, [i % 6, i // 6, 0, 0], float(rng.integers(4)), 2, {"engine": engines[i % 3 > 1]})
        for p in "ab"
        for i in range(30)
    ]
    config = PairConfig(strategy=strategy, max_pairs_per_prompt=most)
    whole = make_pairs(trajectories(*rows), config)
    monkeypatch.setattr("dtrpo_ray.data.pairs._MOST", 1)
    assert make_pairs(trajectories(*rows), config).equals(whole)
    assert len(whole) == 2 * most


def test_many_responses_to_a_prompt_cost_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    distances = pairs._distances
    monkeypatch.setattr(pairs, "_distances", lambda *of: looked.append(len(of[1])) or distances(*of))
    rows = [("a", [i % 5, i // 5 % 5, i // 25, 0], float(i % 2), 2) for i in range(3000)]
    assert len(make_pairs(trajectories(*rows), PairConfig())) == 1
    assert looked == [256 * 256]
