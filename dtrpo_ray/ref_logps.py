"""Ray Data shell: preference pairs -> the reference's log-probs at every state that their training will draw.

An actor pool holds the frozen reference; what it writes is read back as a `reference.ReferenceCache`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch

from dtrpo_ray import dataset, loop
from dtrpo_ray.config import ClusterConfig, TrainConfig
from dtrpo_ray.reference import load_reference, reference_key, reference_values
from dtrpo_ray.session import CPU_WORKER_ENV, cpu_threads, uses_gpu


class _Reference:
    """An actor of the pool: loads the reference once, then takes one forward for each batch of pairs."""

    def __init__(self, base: Path, config: TrainConfig, seed: int, reference_hash: str, sharers: int) -> None:
        torch.set_num_threads(cpu_threads(sharers))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_reference(base, config.precision, self.device)
        self.to_batch = loop.collate(config, self.model, seed, self.model, device=self.device)
        self.seed, self.key = seed, reference_key(reference_hash, config.precision, self.device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        return reference_values(self.model, rows, self.to_batch, self.seed, self.key, self.device)


def drawn_pairs(table: Path, config: TrainConfig, seed: int) -> pa.Table:
    """The rows that training will read, once for each epoch that reads them, with their `epoch`."""
    rows = pq.read_table(sorted(str(p) for p in table.glob("*.parquet")))
    plan = dataset.make_plan(rows["row_id"].to_pylist(), config, seed)
    epoch, row = np.unique(np.stack([plan.epoch, plan.row]), axis=1)
    return rows.take(pa.array(row)).append_column("epoch", pa.array(epoch, pa.int32()))


def write_reference_logps(
    base: Path, reference_hash: str, table: Path, config: TrainConfig, seed: int, cluster: ClusterConfig, out: Path
) -> int:
    """Write the folder `out`; returns the number of (row, side, epoch) values."""
    gpu, pairs = uses_gpu(cluster), drawn_pairs(table, config, seed)
    arguments: dict[str, Any] = {"base": base, "config": config, "seed": seed, "reference_hash": reference_hash}
    (
        ray.data.from_arrow(pairs)
        .repartition(-(-len(pairs) // config.micro_batch))
        .map_batches(
            _Reference,
            fn_constructor_kwargs={**arguments, "sharers": cluster.num_actors},
            batch_size=config.micro_batch,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=cluster.num_actors),
            num_cpus=1,
            num_gpus=1 if gpu else 0,
            runtime_env={"env_vars": {} if gpu else CPU_WORKER_ENV},
        )
        .write_parquet(str(out.resolve()))
    )
    return sum(pq.read_metadata(file).num_rows for file in out.glob("*.parquet"))
