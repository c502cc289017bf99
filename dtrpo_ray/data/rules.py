"""The rules that every row of a table must pass, each vectorised over a whole table. No torch, no ray.

`verdicts` finds the first broken rule of each row, so that the counts by rule and the good rows add up to the table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrpo_ray.data.schemas import BLOCK_ORIGINS, CONTRACT_VERSION, DIFFUSION, MAY_BE_NULL, SUPPORTS, TOKEN_TYPES
from dtrpo_ray.errors import DataError
from dtrpo_ray.method.trajectory import GIVEN

GOOD = -1  # in `verdicts`
_ROUNDING = 1e-4  # by which a log-probability in float32 may be above 0


@dataclass(frozen=True, slots=True)
class Rule:
    """`find` maps a table to bool [rows], True where the row breaks the rule; it may rely on all earlier rules."""

    name: str
    says: str
    find: Callable[[pa.Table], np.ndarray]


@dataclass(frozen=True, slots=True)
class Expected:
    """Limits that only the caller knows: the tokenizer of the ids, and the longest row (prompt and a side)."""

    tokenizer_hash: str | None = None
    max_tokens: int | None = None


def rules_of(schema: pa.Schema, expected: Expected | None = None) -> list[Rule]:
    """Return the rules of a table, in the order they are applied."""
    names, expected = schema.names, expected or Expected()
    rules = [
        Rule("unknown version", f"contract_version is not {CONTRACT_VERSION}; convert the store", _wrong_version),
        *_hole_rules(schema),
        *(Rule("bad UTF-8", f"{f.name} is not UTF-8", partial(_not_utf8, name=f.name)) for f in schema if _is_text(f)),
    ]
    rules += _value_rules(names)
    if "block_size" in names:
        rules.append(Rule("bad value", "block_size is below 1", lambda t: _numbers(t["block_size"]) < 1))
        says = f"block_origin is not {' or '.join(BLOCK_ORIGINS)}"
        rules.append(Rule("bad value", says, partial(_unknown_text, name="block_origin", known=BLOCK_ORIGINS)))
    if "support" in names:
        says = f"support is not {' or '.join(SUPPORTS)}"
        rules.append(Rule("bad value", says, partial(_unknown_text, name="support", known=SUPPORTS)))
    for side in ("response", "chosen", "rejected"):
        if f"{side}_ids" in names:
            rules += _side_rules(names, side)
    if "mask_id" in names:
        says = "prompt_ids holds the mask token: nothing would fill it"
        rules.append(Rule("mask token", says, partial(_holds_mask, ids="prompt_ids")))
    for reward in ("reward", "chosen_reward", "rejected_reward"):
        if reward in names:
            rules.append(Rule("bad value", f"{reward} is not finite", partial(_not_finite, name=reward)))
            says = f"{reward} has no reward_source: who gave it?"
            rules.append(Rule("missing value", says, partial(_lacks_source, name=reward)))
    if "rejected_ids" in names:
        says = "chosen_ids and rejected_ids are identical: nothing to prefer"
        rules.append(Rule("identical sides", says, _identical))
    if expected.tokenizer_hash and "tokenizer_hash" in names:
        says = f"tokenizer_hash is not {expected.tokenizer_hash[:12]}...: the ids belong to another tokenizer"
        rules.append(Rule("hash mismatch", says, partial(_other_tokenizer, expected=expected.tokenizer_hash)))
    if expected.max_tokens:
        says = f"prompt and response have more than {expected.max_tokens} tokens"
        rules.append(Rule("too long", says, partial(_too_long, limit=expected.max_tokens)))
    return rules


def verdicts(table: pa.Table, rules: list[Rule]) -> np.ndarray:
    """Return int [rows], the index of the first rule that each row breaks, or GOOD."""
    found = np.full(len(table), GOOD)
    alive, rest = np.arange(len(table)), table
    for number, rule in enumerate(rules):
        bad = rule.find(rest)
        if bad.any():
            found[alive[bad]] = number
            alive, rest = alive[~bad], rest.filter(pa.array(~bad))
    return found


def check_table(table: pa.Table, where: str) -> pa.Table:
    """Return `table` if every row passes every rule, else raise DataError naming the first bad row and its rule."""
    rules = rules_of(table.schema)
    found = verdicts(table, rules)
    if (found != GOOD).any():
        row = int(np.argmax(found != GOOD))
        raise DataError(f"{where}: row {_row_name(table, row)}: {rules[found[row]].says}")
    return table


def _row_name(table: pa.Table, row: int) -> str:
    """Return a row's id, which need not be UTF-8, or its number from 1 if it has none."""
    name = table["row_id"].cast(pa.binary())[row].as_py()
    return name.decode(errors="backslashreplace") if name else f"number {row + 1}"


def block_ranks(
    steps: np.ndarray, lengths: np.ndarray, starts: np.ndarray, block_size: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the dense ranks of a whole column as int [tokens], and the row of each token as int [tokens].

    `steps` (int [tokens]) are the flattened steps of all rows, `lengths` (int [rows]) how many each has, `starts` the
    place of each response's first token on its grid. Ranks count 0, 1, .. within each block; negative steps stay.
    """
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(steps)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    block = (place + starts[row]) // block_size[row]
    ranks, done = steps.astype(np.int64), np.flatnonzero(steps >= 0)
    order = done[np.lexsort((steps[done], block[done], row[done]))]
    new_block = np.diff(row[order], prepend=-1).astype(bool) | np.diff(block[order], prepend=-1).astype(bool)
    rises = np.cumsum(new_block | np.diff(steps[order], prepend=-1).astype(bool))
    first = np.maximum.accumulate(np.where(new_block, rises, 0))
    ranks[order] = rises - first
    return ranks, row


def starts_on_grid(table: pa.Table) -> np.ndarray:
    """Return int [rows], the place of each response's first token on its grid of blocks."""
    on_global = np.array(table["block_origin"].to_pylist()) == "global"  # else the grid starts at the response
    return list_lengths(table["prompt_ids"]) * on_global


# === the rules' predicates: table -> bool [rows] ===


def _hole_rules(schema: pa.Schema) -> Iterator[Rule]:
    for field in schema:
        if field.name not in MAY_BE_NULL:
            yield Rule("missing value", f"{field.name} is null", partial(_null, name=field.name))
        if pa.types.is_list(field.type):
            yield Rule("missing value", f"{field.name} holds a null", partial(_holds_null, name=field.name))


def _value_rules(names: list[str]) -> Iterator[Rule]:
    """Yield the rules on single numbers; nulls pass them."""
    yield Rule("bad value", "row_id is empty", lambda t: np.asarray(pc.equal(pc.binary_length(t["row_id"]), 0)))
    for name in (n for n in names if n.endswith("_ids")):
        yield Rule("bad value", f"{name} holds a number below 0", partial(_holds_negative, name=name))
    for name in (n for n in ("mask_id", "num_forwards", "denoising_steps", "temperature") if n in names):
        says = f"{name} is below 0" + (" or not finite" if name == "temperature" else "")
        yield Rule("bad value", says, partial(_outside, name=name, most=np.inf))
    if "shift" in names:
        yield Rule("bad value", "shift is neither 0 nor 1", partial(_outside, name="shift", most=2))
    if "logps" in names:
        says = "logps holds a number above 0, or none at all (NaN)"
        yield Rule("bad value", says, lambda t: rows_where(t["logps"], ~(_flat(t["logps"]) <= _ROUNDING)))


def _side_rules(names: list[str], side: str) -> Iterator[Rule]:
    ids, prefix = f"{side}_ids", "" if side == "response" else f"{side}_"
    yield Rule("empty side", f"{ids} is empty", lambda t: list_lengths(t[ids]) == 0)
    along = [n for n in (f"{prefix}steps", f"{prefix}ranks", f"{prefix}types", f"{prefix}logps") if n in names]
    for name in along:
        says = f"{name} and {ids} differ in length"
        yield Rule("lengths differ", says, partial(_lengths_differ, name=name, ids=ids))
    if "mask_id" in names:
        says = f"{ids} holds the mask token: the response was never finished"
        yield Rule("mask token", says, partial(_holds_mask, ids=ids))
        says = f"{ids} does not end on the block grid: the terminal block must be whole"
        yield Rule("off the grid", says, partial(_off_grid, ids=ids))
    steps, ranks, types = (f"{prefix}{n}" for n in ("steps", "ranks", "types"))
    if steps in names:
        says = f"{steps} holds a number below {GIVEN}"
        yield Rule("bad value", says, lambda t: rows_where(t[steps], _flat(t[steps]) < GIVEN))
    if types in names:
        says = f"{types} holds a number that is not {', '.join(map(str, TOKEN_TYPES))}"
        yield Rule("bad value", says, lambda t: rows_where(t[types], ~np.isin(_flat(t[types]), TOKEN_TYPES)))
        says = f"{types} and {steps} disagree: {GIVEN} is the step of a token that no step chose, and of no other"
        yield Rule("token types", says, partial(_types_disagree, types=types, steps=steps))
    if ranks in names:
        says = f"{ranks} are not a partition: each block's must be 0, 1, .. in the order of its {steps}"
        yield Rule("not a partition", says, partial(_not_a_partition, ranks=ranks, steps=steps))


def _is_text(field: pa.Field) -> bool:
    return bool(pa.types.is_string(field.type))


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy())


def list_lengths(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return int [rows], the number of values of each list; a null list has none."""
    return np.asarray(pc.list_value_length(column).fill_null(0).to_numpy(), dtype=np.int64)


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.list_flatten(column).to_numpy())


def rows_where(column: pa.Array | pa.ChunkedArray, flat: Any) -> np.ndarray:
    """Return bool [rows]: whether a row of a list column has a True among the flattened values."""
    owner = np.repeat(np.arange(len(column)), list_lengths(column))
    return np.bincount(owner, np.asarray(flat, dtype=bool), minlength=len(column)) > 0


def _null(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(table[name].is_null().to_numpy())


def _holds_null(table: pa.Table, name: str) -> np.ndarray:
    return rows_where(table[name], pc.is_null(pc.list_flatten(table[name])).to_numpy())


def _holds_negative(table: pa.Table, name: str) -> np.ndarray:
    return rows_where(table[name], _flat(table[name]) < 0)


def _outside(table: pa.Table, name: str, most: float) -> np.ndarray:
    """Return bool [rows]: whether a value is outside [0, most); a null is not."""
    values = table[name].cast(pa.float64()).fill_null(0.0).to_numpy()
    return ~((values >= 0) & (values < most))


def _wrong_version(table: pa.Table) -> np.ndarray:
    return np.asarray(pc.not_equal(table["contract_version"], CONTRACT_VERSION).fill_null(True).to_numpy())


def _not_utf8(table: pa.Table, name: str) -> np.ndarray:
    try:
        table[name].validate(full=True)
    except pa.ArrowInvalid:
        return np.array([not _is_utf8(value) for value in table[name].cast(pa.binary()).to_pylist()], dtype=bool)
    return np.zeros(len(table), dtype=bool)


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or value.decode() is not None
    except UnicodeDecodeError:
        return False


def _unknown_text(table: pa.Table, name: str, known: tuple[str, ...]) -> np.ndarray:
    column = table[name]
    return ~np.asarray(pc.or_(pc.is_in(column, pa.array(known)), column.is_null()).to_numpy())


def _lengths_differ(table: pa.Table, name: str, ids: str) -> np.ndarray:
    differ = pc.not_equal(pc.list_value_length(table[name]), pc.list_value_length(table[ids]))
    return np.asarray(differ.fill_null(False).to_numpy())


def _holds_mask(table: pa.Table, ids: str) -> np.ndarray:
    mask_of_value = np.repeat(_numbers(table["mask_id"]), list_lengths(table[ids]))
    return rows_where(table[ids], _flat(table[ids]) == mask_of_value)


def _off_grid(table: pa.Table, ids: str) -> np.ndarray:
    return np.asarray((starts_on_grid(table) + list_lengths(table[ids])) % _numbers(table["block_size"]) != 0)


def _both(table: pa.Table, one: str, other: str) -> np.ndarray:
    return np.asarray(pc.and_(table[one].is_valid(), table[other].is_valid()).to_numpy())


def _types_disagree(table: pa.Table, types: str, steps: str) -> np.ndarray:
    found, where = np.zeros(len(table), dtype=bool), _both(table, types, steps)
    rows = table.filter(pa.array(where))
    found[where] = rows_where(rows[types], (_flat(rows[types]) != DIFFUSION) != (_flat(rows[steps]) == GIVEN))
    return found


def _not_a_partition(table: pa.Table, ranks: str, steps: str) -> np.ndarray:
    found = np.asarray(pc.and_not(table[ranks].is_valid(), table[steps].is_valid()).to_numpy()).copy()
    where = _both(table, ranks, steps)
    rows = table.filter(pa.array(where))
    expected, _ = block_ranks(
        _flat(rows[steps]), list_lengths(rows[steps]), starts_on_grid(rows), _numbers(rows["block_size"])
    )
    found[where] = rows_where(rows[ranks], _flat(rows[ranks]) != expected)
    return found


def _not_finite(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(pc.invert(pc.is_finite(table[name])).fill_null(False).to_numpy())


def _lacks_source(table: pa.Table, name: str) -> np.ndarray:
    named = pc.greater(pc.utf8_length(table["reward_source"]), 0).fill_null(False)
    return np.asarray(pc.and_not(table[name].is_valid(), named).to_numpy())


def _identical(table: pa.Table) -> np.ndarray:
    chosen, rejected = table["chosen_ids"], table["rejected_ids"]
    lengths = list_lengths(chosen)
    same = lengths == list_lengths(rejected)
    if same.any():
        rows = table.filter(pa.array(same))
        same[same] = ~rows_where(rows["chosen_ids"], _flat(rows["chosen_ids"]) != _flat(rows["rejected_ids"]))
    return np.asarray(same)


def _other_tokenizer(table: pa.Table, expected: str) -> np.ndarray:
    return np.asarray(pc.not_equal(table["tokenizer_hash"], expected).fill_null(True).to_numpy())


def _too_long(table: pa.Table, limit: int) -> np.ndarray:
    sides = [name for name in ("response_ids", "chosen_ids", "rejected_ids") if name in table.schema.names]
    return np.asarray(
        list_lengths(table["prompt_ids"]) + np.max([list_lengths(table[s]) for s in sides], axis=0) > limit
    )
