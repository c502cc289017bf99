"""The two tables the pipeline hands over, as Arrow schemas, and the rules each row must pass. No torch, no ray.

`TRAJECTORY` (rollout writes, pair reads): one decoded response, whole: ids up to the end of its terminal block and
the denoising step at which each was unmasked. `PREFERENCE` (pair or an importer writes, train reads): a prompt and
two sides. `docs/data.md` describes every field.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dtrpo_ray.errors import DataError

CONTRACT_VERSION = 1

Rule = Callable[[np.ndarray, str], Iterator[tuple[int, str]]]

_IDS, _STEPS = pa.list_(pa.int32()), pa.list_(pa.int32())

TRAJECTORY = pa.schema(
    [
        ("contract_version", pa.int32()),
        ("row_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("prompt_ids", _IDS),
        ("response_ids", _IDS),
        ("steps", _STEPS),
        ("logps", pa.list_(pa.float32())),
        ("num_forwards", pa.int32()),
        ("reward", pa.float64()),
        ("reward_source", pa.string()),
        ("block_size", pa.int32()),
        ("block_origin", pa.string()),
        ("mask_id", pa.int32()),
        ("temperature", pa.float64()),
        ("denoising_steps", pa.int32()),
        ("seed", pa.int64()),
        ("engine", pa.string()),
        ("model_hash", pa.string()),
    ],
    metadata={"dtrpo.table": f"trajectory/v{CONTRACT_VERSION}"},
)

PREFERENCE = pa.schema(
    [
        ("contract_version", pa.int32()),
        ("row_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
        ("chosen_steps", _STEPS),
        ("rejected_steps", _STEPS),
        ("chosen_reward", pa.float64()),
        ("rejected_reward", pa.float64()),
        ("block_size", pa.int32()),
        ("mask_id", pa.int32()),
    ],
    metadata={"dtrpo.table": f"preference/v{CONTRACT_VERSION}"},
)

EXAMPLE = pa.schema(
    [
        ("contract_version", pa.int32()),
        ("row_id", pa.string()),
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
    ],
    metadata={"dtrpo.table": f"example/v{CONTRACT_VERSION}"},
)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read every Parquet file of a folder (or one file) and check it against `schema`.

    Raises DataError naming the file for a missing or unreadable file, another table or version, or a broken row.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: no Parquet files here")
    tables = []
    for file in files:
        try:
            table = pq.read_table(file)
        except FileNotFoundError:
            raise DataError(f"{file}: no such file") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file}: not a readable Parquet file ({error}); write it anew") from None
        missing = sorted(set(schema.names) - set(table.schema.names))
        if missing:
            raise DataError(f"{file}: column {missing[0]} is missing; expected the table {table_name(schema)}")
        tables.append(check_table(table.select(schema.names).cast(schema), str(file)))
    whole = pa.concat_tables(tables)
    duplicates = len(whole) - pc.count_distinct(whole["row_id"]).as_py()
    if duplicates:
        raise DataError(f"{path}: {duplicates} row(s) repeat a row_id; each row needs its own")
    return whole


def table_name(schema: pa.Schema) -> str:
    """For example `trajectory/v1`."""
    return str((schema.metadata or {}).get(b"dtrpo.table", b"?").decode())


def check_table(table: pa.Table, where: str) -> pa.Table:
    """Return `table` if every row passes every rule, else raise DataError naming the first row and the rule."""
    for row, rule in violations(table):
        raise DataError(f"{where}: row {table['row_id'][row].as_py()}: {rule}")
    return table


def violations(table: pa.Table) -> Iterator[tuple[int, str]]:
    """(row number, broken rule) for each broken rule, vectorised per rule: the first offender of each is named."""

    def first(bad: np.ndarray, rule: str) -> Iterator[tuple[int, str]]:
        if bad.any():
            yield int(np.argmax(bad)), rule

    version = table["contract_version"].to_numpy(zero_copy_only=False)
    yield from first(version != CONTRACT_VERSION, f"contract_version is not {CONTRACT_VERSION}; convert the store")
    for name in table.schema.names:
        if table[name].null_count and name not in ("chosen_steps", "rejected_steps", "logps", "reward"):
            yield from first(table[name].is_null().to_numpy(zero_copy_only=False), f"{name} is null")
            return
    for side in ("response", "chosen", "rejected"):
        ids = f"{side}_ids"
        if ids in table.schema.names:
            steps = "steps" if side == "response" else f"{side}_steps"
            yield from _side_violations(table, ids, steps if steps in table.schema.names else None, first)
    if "rejected_ids" in table.schema.names:
        same = [a == b for a, b in zip(table["chosen_ids"].to_pylist(), table["rejected_ids"].to_pylist(), strict=True)]
        yield from first(np.array(same, dtype=bool), "chosen_ids and rejected_ids are identical: nothing to prefer")


def _side_violations(table: pa.Table, ids: str, steps: str | None, first: Rule) -> Iterator[tuple[int, str]]:
    lengths = pc.list_value_length(table[ids]).to_numpy(zero_copy_only=False)
    yield from first(lengths == 0, f"{ids} is empty")
    if "mask_id" in table.schema.names:
        flat = pc.list_flatten(table[ids]).to_numpy(zero_copy_only=False)
        owner = np.repeat(np.arange(len(table)), lengths)
        masked = np.bincount(owner, flat == table["mask_id"].to_numpy()[owner], minlength=len(table)) > 0
        yield from first(masked, f"{ids} holds the mask token: the response was never finished")
        whole = (pc.list_value_length(table["prompt_ids"]).to_numpy(zero_copy_only=False) + lengths) % table[
            "block_size"
        ].to_numpy()
        yield from first(whole != 0, f"{ids} does not end on the block grid: the terminal block must be whole")
    if steps is not None:
        step_lengths = pc.list_value_length(table[steps]).fill_null(-1).to_numpy(zero_copy_only=False)
        yield from first((step_lengths != -1) & (step_lengths != lengths), f"{steps} and {ids} differ in length")
