"""The training plan: each row once an epoch, whole optimizer steps, the same order whatever the files and workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtrpo_ray.config.cluster import ClusterConfig
from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.errors import DataError, TrainError
from dtrpo_ray.train.dataset import held_out_rows, is_held_out, make_plan

IDS = [f"row-{i:03d}" for i in range(37)]


def test_each_epoch_holds_each_row_once_and_the_last_batch_is_filled_with_weight_zero() -> None:
    plan = make_plan(IDS, TrainConfig(num_epochs=3, global_batch=8), seed=0)
    assert plan.num_steps == 14  # ceil(3 * 37 / 8)
    assert len(plan.row) == 112
    assert plan.weight.sum() == 111
    for epoch in range(3):
        assert sorted(plan.row[(plan.epoch == epoch) & (plan.weight > 0)]) == list(range(37))


def test_epochs_differ_seeds_differ_and_the_same_seed_does_not() -> None:
    config = TrainConfig(num_epochs=2, global_batch=37)
    plan = make_plan(IDS, config, seed=0)
    first, second = plan.row[:37], plan.row[37:]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, make_plan(IDS, config, seed=1).row[:37])
    assert np.array_equal(plan.row, make_plan(IDS, config, seed=0).row)


def test_the_order_belongs_to_the_ids_and_not_to_the_files() -> None:
    config = TrainConfig(global_batch=37)
    shuffled = list(np.random.default_rng(1).permutation(IDS))
    one, other = make_plan(IDS, config, 0), make_plan(shuffled, config, 0)
    assert [IDS[i] for i in one.row] == [shuffled[i] for i in other.row]
    assert one.digest == other.digest
    changes: list[tuple[list[str], TrainConfig, int]] = [(IDS, config, 1), ([*IDS[:-1], "other"], config, 0)]
    changes += [(IDS, TrainConfig(global_batch=n, num_epochs=e), 0) for n, e in ((36, 1), (37, 2))]
    assert one.digest not in {make_plan(*change).digest for change in changes}


def test_max_steps_cuts_the_run() -> None:
    plan = make_plan(IDS, TrainConfig(num_epochs=3, global_batch=8, max_steps=2), seed=0)
    assert (plan.num_steps, len(plan.row), plan.weight.sum()) == (2, 16, 16)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_every_rank_gets_its_part_of_every_step(tmp_path: Path, num_workers: int, local_ray: None) -> None:
    from dtrpo_ray.train.dataset import rank_batches, shard

    config = TrainConfig(num_epochs=2, global_batch=8)
    for number, part in enumerate((IDS[20:], IDS[:20])):
        table = pa.table({"row_id": part, "value": [int(i[4:]) for i in part]})
        pq.write_table(table, tmp_path / f"part-{number}.parquet")
    shards, plan = shard(tmp_path, config, 0, num_workers)
    assert plan.digest == make_plan(sorted(IDS), config, 0).digest
    num_steps, plan = plan.num_steps, make_plan(sorted(IDS), config, 0)
    steps: list[list[int]] = [[] for _ in range(num_steps)]
    for rows in shards:
        for step, batch in enumerate(rank_batches(rows.iterator(), config, num_workers, 0)):
            steps[step] += [row["value"] for row in batch]
            assert {row["batch_weight"] for row in batch} == {plan.weight[8 * step : 8 * step + 8].sum()}
    assert [sorted(s) for s in steps] == [sorted(plan.row[8 * s : 8 * s + 8].tolist()) for s in range(num_steps)]
    resumed = list(rank_batches(shards[0].iterator(), config, num_workers, num_steps - 1))
    assert len(resumed) == 1


def test_rows_of_another_step_are_an_error_and_not_trained_on() -> None:
    from dtrpo_ray.train.dataset import rank_batches

    class Wrong:
        def iter_batches(self, **_: Any) -> list[pa.Table]:
            return [pa.table({"ordinal": [0, 9]})]

    with pytest.raises(TrainError, match="data order is broken"):
        list(rank_batches(Wrong(), TrainConfig(global_batch=4), 2, 0))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_any_number_of_workers_shares_a_batch_exactly_once(num_workers: int) -> None:
    """An elastic run: every rank reads all rows and takes its part, filled with weight 0 where it comes out short."""
    from dtrpo_ray.train.dataset import rank_batches

    class Whole:
        def iter_batches(self, **_: Any) -> list[pa.Table]:
            table = pa.table({"ordinal": list(range(16)), "row_weight": [1.0] * 16})
            return [table.slice(0, 8), table.slice(8, 8)]

    config = TrainConfig(global_batch=8)
    shares: list[Any] = [
        list(rank_batches(Whole(), config, num_workers, 0, (rank, num_workers)))  # type: ignore[arg-type]
        for rank in range(num_workers)
    ]
    assert {len(rows) for share in shares for rows in share} == {-(-8 // num_workers)}
    for step in range(2):
        taken = [row["ordinal"] for share in shares for row in share[step] if row["row_weight"]]
        assert sorted(taken) == list(range(8 * step, 8 * step + 8))


def test_the_default_cluster_is_this_machine() -> None:
    assert ClusterConfig().address == "local"


def test_the_rows_held_out_belong_to_the_ids_alone_and_are_never_trained_on() -> None:
    """A larger share holds out the same rows and more, about as many as it says; no order and no seed matters."""
    ids = [f"row-{i}" for i in range(4000)]
    held = {share: {name for name in ids if is_held_out(name, share)} for share in (0.0, 0.1, 0.3)}
    assert not held[0.0]
    assert held[0.1] < held[0.3]
    assert [len(held[share]) / 4000 for share in (0.1, 0.3)] == pytest.approx([0.1, 0.3], abs=0.02)
    config = TrainConfig(held_out=0.3, num_epochs=2, global_batch=7)
    plan = make_plan(ids, config, seed=5)
    read = [ids[row] for row in plan.row[plan.weight > 0]]
    assert sorted(read) == sorted([*(set(ids) - held[0.3])] * 2)
    for few, count in ((["row-0"], 0), ([next(iter(held[0.1]))], 1)):
        with pytest.raises(DataError, match=f"held_out = 0.1 holds {count} of 1 rows out; give another"):
            make_plan(few, TrainConfig(held_out=0.1), seed=0)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 50])
def test_ranks_share_the_rows_held_out_and_each_has_as_many(num_workers: int, tmp_path: Path) -> None:
    ids = [f"row-{i}" for i in range(100)]
    for part in (0, 1):  # in any files
        rows = {"row_id": ids[part::2], "prompt_ids": [[int(name[4:])] for name in ids[part::2]]}
        pq.write_table(pa.table(rows), tmp_path / f"part-{part}.parquet")
    shares = [held_out_rows(tmp_path, 0.3, rank, num_workers) for rank in range(num_workers)]
    held = sorted(name for name in ids if is_held_out(name, 0.3))
    assert len({len(share) for share in shares}) == 1
    real = [row for share in shares for row in share if row["row_weight"]]
    assert sorted(row["row_id"] for row in real) == held
    assert all(row["prompt_ids"] == [int(row["row_id"][4:])] for share in shares for row in share)
    assert {(row["epoch"], row["batch_weight"]) for share in shares for row in share} == {(0, len(held))}
