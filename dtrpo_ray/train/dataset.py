"""Ray Data: a Parquet table -> each rank's rows of each optimizer step, in an order fixed by the seed.

An epoch's order is the order of hash(seed, epoch, row id), so it depends on neither files, blocks nor workers.
Optimizer step s takes ordinals [s G, (s + 1) G) of global batch size G, and rank r the r-th part of them. The last
batch of the run is filled with rows of weight zero, never cut. The plan is sorted by (rank, ordinal), materialised in
the object store (which spills to disk) and cut into one exact piece a rank: Ray's own streaming split hands out
blocks first come, first served, which would tie a batch to timing.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray.data
from ray.data import DataIterator

from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.data.tables import table_files
from dtrpo_ray.errors import DataError, TrainError
from dtrpo_ray.method.trajectory import row_generator

_BLOCK_BYTES = 32 << 20  # of the files on disk, for each block at first


@dataclass(frozen=True, slots=True)
class Plan:
    """The order of rows: ordinal -> (epoch, row number, weight), and the number of optimizer steps.

    Two plans of one `digest` read the same rows, by their ids, in the same optimizer steps.
    """

    epoch: np.ndarray
    row: np.ndarray
    weight: np.ndarray
    num_steps: int
    digest: str


def make_plan(row_ids: list[str], config: TrainConfig, seed: int) -> Plan:
    """Order every epoch of the rows not held out by hash, and cut or fill the run to whole optimizer steps.

    Raises DataError if no row is left, or if none is held out though a share should be.
    """
    held_out = np.array([is_held_out(row_id, config.held_out) for row_id in row_ids], dtype=bool)
    if config.held_out and held_out.all() | ~held_out.any():
        raise DataError(f"held_out = {config.held_out} holds {held_out.sum()} of {len(row_ids)} rows out; give another")
    orders = [_epoch_order(row_ids, seed, epoch) for epoch in range(config.num_epochs)]
    order = [rows[~held_out[rows]] for rows in orders]
    rows, epochs = np.concatenate(order), np.repeat(np.arange(config.num_epochs), len(order[0]))
    num_steps = -(-len(rows) // config.global_batch)
    num_steps = min(num_steps, config.max_steps or num_steps)
    total = num_steps * config.global_batch
    real = min(total, len(rows))
    fill = np.resize(rows[:real], total)
    weight = (np.arange(total) < real).astype(np.float64)
    text = "\n".join([f"{config.global_batch} {num_steps}", *(row_ids[row] for row in rows[:real])])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Plan(np.resize(epochs[:real], total), fill, weight, num_steps, digest)


def is_held_out(row_id: str, share: float) -> bool:
    """Return True for a share of all ids, by their SHA-256 alone; a larger share holds out the same rows and more."""
    return share > 0 and int(hashlib.sha256(row_id.encode()).hexdigest()[:8], 16) < share * 16**8


def held_out_rows(table_dir: Path, share: float, rank: int, num_workers: int) -> list[dict[str, Any]]:
    """Return this rank's part of the rows held out, as many for each rank: the last are filled with rows of weight 0.

    Their epoch is 0, so that every look at a row takes the same draws.
    """
    files = table_files(table_dir)
    ids = pq.read_table(files, columns=["row_id"])["row_id"].to_pylist()
    held = sorted((row_id, place) for place, row_id in enumerate(ids) if is_held_out(row_id, share))
    own = [held[at % len(held)][1] for at in range(rank, -(-len(held) // num_workers) * num_workers, num_workers)]
    rows = pads.dataset(files).take(pa.array(own)).to_pylist()
    last = len(rows) if rank + (len(rows) - 1) * num_workers < len(held) else len(rows) - 1
    facts = {"epoch": 0, "batch_weight": float(len(held))}
    return [{**row, **facts, "row_weight": float(at < last)} for at, row in enumerate(rows)]


def _epoch_order(row_ids: list[str], seed: int, epoch: int) -> np.ndarray:
    keys = row_generator(seed, "order", epoch, "epoch").random(len(row_ids))
    by_id = np.argsort(np.array(row_ids), kind="stable")  # files may come in any order; ids may not
    order: np.ndarray = by_id[np.argsort(keys, kind="stable")]
    return order


def shard(table_dir: Path, config: TrainConfig, seed: int, num_workers: int) -> tuple[list[ray.data.Dataset], Plan]:
    """Return one materialised dataset for each rank, and their plan."""
    files = sorted(str(p) for p in table_dir.glob("*.parquet"))
    ids = pq.read_table(files, columns=["row_id"])["row_id"].to_pylist()
    plan = make_plan(ids, config, seed)
    places: dict[str, list[int]] = {}
    for ordinal, row in enumerate(plan.row.tolist()):
        places.setdefault(ids[row], []).append(ordinal)
    per_rank, size = config.rows_per_rank(num_workers), config.global_batch
    batch_weight = np.repeat(np.add.reduceat(plan.weight, np.arange(0, len(plan.weight), size)), size)
    # arrays alone: a task that unpickles a class of ours imports torch with it
    shared = ray.put((places, plan.epoch, plan.weight, batch_weight))

    def place(table: pa.Table) -> pa.Table:
        where, epoch, weight, batch_weight = ray.get(shared)
        taken = [(row, o) for row, row_id in enumerate(table["row_id"].to_pylist()) for o in where.get(row_id, ())]
        ordinal = np.array([o for _, o in taken], dtype=np.int64)
        out = table.take(pa.array([row for row, _ in taken], type=pa.int64()))
        rank = ordinal % size // per_rank
        columns = {"ordinal": ordinal, "epoch": epoch[ordinal], "row_weight": weight[ordinal]}
        columns |= {"batch_weight": batch_weight[ordinal], "place": rank * len(epoch) + ordinal}
        for name, values in columns.items():
            out = out.append_column(name, pa.array(values))
        return out

    # one block for a small table: by default Ray cuts it in eight, and starts processes for them that take ten seconds
    blocks = -(-sum(Path(file).stat().st_size for file in files) // _BLOCK_BYTES)
    rows = ray.data.read_parquet(files, override_num_blocks=blocks)
    ordered = rows.map_batches(place, batch_format="pyarrow").sort("place").materialize()
    cuts = [plan.num_steps * per_rank * r for r in range(1, num_workers)]
    return ordered.split_at_indices(cuts) if cuts else [ordered], plan


def rank_batches(
    rows: DataIterator, config: TrainConfig, num_workers: int, start_step: int, share: tuple[int, int] | None = None
) -> Iterator[Any]:
    """Yield this rank's rows of each optimizer step from `start_step` on, checked against the plan.

    `rows` are one rank's, or with `share` = (rank, number of workers) all rows, of which this rank takes its part, so
    the number of workers may change within a run. A short part is filled with rows of weight 0.
    """
    per_rank = config.rows_per_rank(num_workers)
    size = config.global_batch if share else per_rank
    batches: Any = rows.iter_batches(batch_size=size, batch_format="pyarrow", prefetch_batches=2)
    for step, table in enumerate(batches):
        if step < start_step:
            continue
        steps = np.unique(table["ordinal"].to_numpy() // config.global_batch)
        if steps.tolist() != [step]:
            raise TrainError(f"data order is broken: optimizer step {step} was given rows of steps {steps.tolist()}")
        if share is None:
            yield table.to_pylist()
            continue
        part = table.slice(share[0] * per_rank, per_rank).to_pylist()
        filler = {**(part or table.slice(0, 1).to_pylist())[0], "row_weight": 0.0}
        yield part + [filler] * (per_rank - len(part))
