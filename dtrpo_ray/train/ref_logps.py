"""Preference pairs -> the reference's log-probs at every state that their training will draw.

`ReferenceScorer` is the worker of a part; a training reads its files as a `reference.ReferenceCache`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.data.schemas import PREFERENCE
from dtrpo_ray.data.tables import TablePart, row_parts, write_whole
from dtrpo_ray.session import cpu_threads
from dtrpo_ray.train import dataset, loop
from dtrpo_ray.train.reference import load_reference, reference_key, reference_values

PART_PAIRS = 512  # independent of the micro-batch, which names no stage


@dataclass(frozen=True, slots=True)
class PairsPart:
    """Pairs that an epoch reads."""

    epoch: int
    pairs: TablePart

    def __str__(self) -> str:
        return f"epoch {self.epoch} of {self.pairs}"


def epoch_parts(files: list[Path], config: TrainConfig, seed: int) -> list[PairsPart]:
    """List the pairs that training will read, once for each epoch that reads them."""
    row_ids = pq.read_table(files, columns=["row_id"])["row_id"].to_pylist()
    plan = dataset.make_plan(row_ids, config, seed)
    parts = []
    for epoch in np.unique(plan.epoch):
        rows = np.unique(plan.row[plan.epoch == epoch])
        part = np.full(len(row_ids), -1)
        part[rows] = np.arange(len(rows)) // PART_PAIRS
        parts += [PairsPart(int(epoch), pairs) for pairs in row_parts(files, part)]
    return parts


class ReferenceScorer:
    """Loads the reference once, then takes one forward for each micro-batch of a part."""

    def __init__(self, base: Path, config: TrainConfig, seed: int, reference_hash: str, sharers: int) -> None:
        torch.set_num_threads(cpu_threads(sharers))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_reference(base, config.precision, self.device)
        to_batch = loop.collate(config, self.model, seed, self.model, device=self.device)
        key = reference_key(reference_hash, config.precision, self.device)
        self.known, self.config = (to_batch, seed, key, self.device), config

    def __call__(self, part: PairsPart, out: Path) -> dict[str, int]:
        """Write the values of one part."""
        pairs = part.pairs.read(PREFERENCE)
        rows = pairs.append_column("epoch", pa.array(np.full(len(pairs), part.epoch), pa.int32())).to_pylist()
        batches = loop.micro_batches(rows, self.config, self.model.attention, most=lambda count: count)
        values = pa.concat_tables(reference_values(self.model, batch, *self.known) for batch in batches)
        write_whole(values, out / f"epoch-{part.epoch:03d}-{part.pairs.name}")
        return {"rows": len(rows), "values": len(values)}
