"""The two tables the pipeline hands over, as Arrow schemas, and the rules each row must pass. No torch, no ray.

`TRAJECTORY` (rollout writes, pair reads): one decoded response, whole: ids up to the end of its terminal block and
the denoising step at which each was unmasked. `PREFERENCE` (pair or an importer writes, train reads): a prompt and
two sides. `docs/data.md` describes every field.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dtrpo_ray.errors import DataError

CONTRACT_VERSION = 1
BLOCK_ORIGINS = ("global", "response")  # the grid of blocks starts at the prompt's first token, or the response's
MAY_BE_NULL = ("chosen_steps", "rejected_steps", "chosen_reward", "rejected_reward", "logps", "reward")

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
        ("block_origin", pa.string()),
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
        try:
            table = table.select(schema.names).cast(schema)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"{file}: not the types of {table_name(schema)} ({error}); write it anew") from None
        tables.append(check_table(table, str(file)))
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
    if holes := list(_hole_violations(table, first)):
        yield from holes
        return  # the rules below compute with these values
    for side in ("response", "chosen", "rejected"):
        ids = f"{side}_ids"
        if ids in table.schema.names:
            along = ("steps", "logps") if side == "response" else (f"{side}_steps",)
            yield from _side_violations(table, ids, [name for name in along if name in table.schema.names], first)
    if "mask_id" in table.schema.names:
        yield from first(_masked(table, "prompt_ids"), "prompt_ids holds the mask token: nothing would fill it")
    if "rejected_ids" in table.schema.names:
        same = [a == b for a, b in zip(table["chosen_ids"].to_pylist(), table["rejected_ids"].to_pylist(), strict=True)]
        yield from first(np.array(same, dtype=bool), "chosen_ids and rejected_ids are identical: nothing to prefer")


def _hole_violations(table: pa.Table, first: Rule) -> Iterator[tuple[int, str]]:
    for name, column in zip(table.schema.names, table.columns, strict=True):
        if column.null_count and name not in MAY_BE_NULL:
            yield from first(column.is_null().to_numpy(zero_copy_only=False), f"{name} is null")
        elif pa.types.is_list(column.type):
            yield from first(_rows_where(column, pc.is_null(pc.list_flatten(column))), f"{name} holds a null")
        elif name == "block_size":
            yield from first(column.to_numpy() < 1, "block_size is below 1")
        elif name == "block_origin":
            known = pc.is_in(column, pa.array(BLOCK_ORIGINS)).to_numpy()
            yield from first(~known, f"block_origin is not {' or '.join(BLOCK_ORIGINS)}")


def _rows_where(column: pa.ChunkedArray, flat: Any) -> np.ndarray:
    """Which rows of a list column have a True among the flattened values."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(column)), lengths)
    return np.bincount(owner, np.asarray(flat, dtype=bool), minlength=len(column)) > 0


def _masked(table: pa.Table, ids: str) -> np.ndarray:
    mask_of_value = np.repeat(table["mask_id"].to_numpy(), pc.list_value_length(table[ids]).to_numpy())
    return _rows_where(table[ids], pc.list_flatten(table[ids]).to_numpy() == mask_of_value)


def _side_violations(table: pa.Table, ids: str, along: list[str], first: Rule) -> Iterator[tuple[int, str]]:
    lengths = pc.list_value_length(table[ids]).to_numpy()
    yield from first(lengths == 0, f"{ids} is empty")
    if "mask_id" in table.schema.names:
        yield from first(_masked(table, ids), f"{ids} holds the mask token: the response was never finished")
        shared_grid = np.array(table["block_origin"].to_pylist()) == "global"  # else the grid starts at the response
        ends = pc.list_value_length(table["prompt_ids"]).to_numpy() * shared_grid + lengths
        rule = f"{ids} does not end on the block grid: the terminal block must be whole"
        yield from first(ends % table["block_size"].to_numpy() != 0, rule)
    for name in along:
        other = pc.list_value_length(table[name]).fill_null(-1).to_numpy()
        yield from first((other != -1) & (other != lengths), f"{name} and {ids} differ in length")
