"""The reference's log-probabilities, written beforehand to a Parquet file or folder, at every state of a training.

`ReferenceScorer` is the worker of a part; a training reads its files as a `ReferenceCache`. A value belongs to
(row id, side, epoch), the seed of the draws, the reference's hash and its dtype. `draws` is a digest of the states and
tokens that were scored, so that another objective, table or code is noticed.
"""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.data.schemas import PREFERENCE
from dtrpo_ray.data.tables import TablePart, row_parts, write_whole
from dtrpo_ray.errors import DataError
from dtrpo_ray.method.batch import SIDES, MicroBatch
from dtrpo_ray.method.step import scored_logps
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.models.registry import load_model
from dtrpo_ray.session import cpu_threads
from dtrpo_ray.train import dataset, loop
from dtrpo_ray.train.backend import uses_bf16
from dtrpo_ray.train.loop import Collate, Rows

PART_PAIRS = 512  # independent of the micro-batch, which names no stage
Key = tuple[str, str, int]  # row id, side, epoch

LOGPS_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("side", pa.string()),
        ("epoch", pa.int32()),
        ("seed", pa.int64()),
        ("reference", pa.string()),
        ("draws", pa.string()),
        ("logps", pa.list_(pa.float32())),
    ],
    metadata={"dtrpo.table": "reference/v1"},
)
REMEDY = "write it anew with dtrpo ref-logps"


def reference_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the reference, always the policy's: in another one, equal weights give other log-probs."""
    return torch.bfloat16 if uses_bf16(precision, device) else torch.float32


def load_reference(base: Path, precision: str, device: torch.device) -> DiffusionLM:
    """Load the frozen reference."""
    reference = load_model(base, reference_dtype(precision, device), str(device))
    return reference.eval().requires_grad_(False)


def reference_key(reference_hash: str, precision: str, device: torch.device) -> str:
    """Return the name of a reference in a cache: its hash and the dtype that it computed in."""
    return f"{reference_hash} {str(reference_dtype(precision, device)).removeprefix('torch.')}"


def reference_values(reference: DiffusionLM, rows: Rows, to_batch: Collate, seed: int, key: str) -> pa.Table:
    """Compute the cache's rows, one for each side of each row, in one no-grad forward; `key` is `reference_key`."""
    batch = to_batch(rows)
    with torch.no_grad():
        logps = scored_logps(reference, batch.to(next(reference.parameters()).device)).float().cpu().numpy()
    cached = [(*place, seed, key, draws, logps[where]) for place, where, draws in _sides(batch, rows)]
    return pa.table(list(zip(*cached, strict=True)), schema=LOGPS_SCHEMA)


@dataclass(frozen=True, slots=True)
class ReferenceCache:
    """The log-probs of a cache by key, each with the digest of its draws."""

    path: Path
    values: dict[Key, tuple[str, np.ndarray]]

    @classmethod
    def load(cls, path: Path, seed: int, reference: str) -> "ReferenceCache":
        """Read a cache. Raises DataError if it is missing, or of another seed or `reference_key`."""
        try:
            table = pq.read_table(sorted(path.glob("*.parquet")) if path.is_dir() else path)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: no readable cache of reference log-probs ({error}); {REMEDY}") from None
        if table.schema.names != LOGPS_SCHEMA.names:
            raise DataError(f"{path}: columns {table.schema.names} are not those of a reference cache; {REMEDY}")
        for name, wanted in (("seed", seed), ("reference", reference)):
            found = table[name].unique().to_pylist()
            if found != [wanted]:
                raise DataError(f"{path}: {name} = {found[0] if found else None}, this run has {wanted}; {REMEDY}")
        keys = zip(*(table[name].to_pylist() for name in ("row_id", "side", "epoch")), strict=True)
        logps = table["logps"].combine_chunks()
        ends = logps.offsets.to_numpy()
        flat = logps.values.to_numpy(zero_copy_only=False)
        values = [flat[a:b] for a, b in itertools.pairwise(ends)]
        return cls(path, dict(zip(keys, zip(table["draws"].to_pylist(), values, strict=True), strict=True)))

    def fill(self, batch: MicroBatch, rows: Rows) -> MicroBatch:
        """Return the batch with its `ref_logp`. Raises DataError for a row that is missing or has other draws."""
        ref_logp = torch.empty(len(batch.target))
        for key, where, draws in _sides(batch, rows):
            row_id, side, epoch = key
            name = f"{self.path}: row {row_id}, {side}, epoch {epoch}"
            if key not in self.values:
                raise DataError(f"{name}: no reference log-probs here; {REMEDY}")
            cached, logps = self.values[key]
            if cached != draws:
                raise DataError(
                    f"{name}: written for draws {cached}, this run's are {draws}: the table or the objective has "
                    f"changed; {REMEDY}"
                )
            ref_logp[where] = torch.from_numpy(logps.copy())
        return replace(batch, ref_logp=ref_logp)


def _sides(batch: MicroBatch, rows: Rows) -> Iterable[tuple[Key, np.ndarray, str]]:
    """Yield (key, places in the scored tokens, digest of the draws) of each side of each row, however packed."""
    planes = {name: getattr(batch, name).numpy() for name in ("ids", "side", "stream", "pair")}
    scored = {n: getattr(batch, n).numpy() for n in ("scored_row", "scored_col", "target", "weight", "nll_weight")}
    slot, num_sides = batch.slot.numpy(), batch.tokens.shape[1]
    for b, row in enumerate(rows):
        for s in range(num_sides):
            where = np.flatnonzero(slot == b * num_sides + s)
            digest = hashlib.blake2b(digest_size=12)
            if len(where):
                r, column = (int(scored[name][where[0]]) for name in ("scored_row", "scored_col"))
                pair = planes["pair"][r] == planes["pair"][r, column]
                mine = pair & ((planes["side"][r] == s) | (planes["side"][r] == -1))
                places = np.cumsum(mine)[scored["scored_col"][where]]
                parts = (planes["ids"][r][mine], planes["stream"][r][mine], places)
                values = (*parts, *(scored[name][where] for name in ("target", "weight", "nll_weight")))
                for value in values:
                    digest.update(np.ascontiguousarray(value).tobytes())
            yield (str(row["row_id"]), SIDES[s], int(row["epoch"])), where, digest.hexdigest()


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
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_reference(base, config.precision, device)
        to_batch = loop.collate(config, self.model, seed, self.model, device=device)
        self.known, self.config = (to_batch, seed, reference_key(reference_hash, config.precision, device)), config

    def __call__(self, part: PairsPart, out: Path) -> dict[str, int]:
        """Write the values of one part."""
        pairs = part.pairs.read(PREFERENCE)
        rows = pairs.append_column("epoch", pa.array(np.full(len(pairs), part.epoch), pa.int32())).to_pylist()
        batches = loop.micro_batches(rows, self.config, self.model.attention, most=lambda count: count)
        values = pa.concat_tables(reference_values(self.model, batch, *self.known) for batch in batches)
        write_whole(values, out / f"epoch-{part.epoch:03d}-{part.pairs.name}")
        return {"rows": len(rows), "values": len(values)}
