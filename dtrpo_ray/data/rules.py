"""The rules that every row of a table must pass, each vectorised over a whole table. No torch, no ray.

`verdicts` finds the first broken rule of each row, so that the counts by rule and the good rows add up to the table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrpo_ray.data.schemas import BLOCK_ORIGINS, CONTRACT_VERSION, DIFFUSION, MAY_BE_NULL, SUPPORTS, TOKEN_TYPES
from dtrpo_ray.errors import DataError
from dtrpo_ray.method.trajectory import GIVEN

GOOD = -1  # in `verdicts`
_ROUNDING = 1e-4  # by which a log-probability in float32 may be above 0


Mask: TypeAlias = np.ndarray | pa.ChunkedArray  # bool [rows]; a null is False


@dataclass(frozen=True, slots=True)
class Rule:
    """`find` maps a table to the rows that break the rule; it may rely on all earlier rules."""

    name: str
    says: str
    find: Callable[[pa.Table], Mask]


@dataclass(frozen=True, slots=True)
class Expected:
    """Limits that only the caller knows: the tokenizer of the ids, and the longest row (prompt and a side)."""

    tokenizer_hash: str | None = None
    max_tokens: int | None = None


def rules_of(schema: pa.Schema, expected: Expected | None = None) -> list[Rule]:
    """Return the rules of a table, in the order they are applied."""
    names, expected = schema.names, expected or Expected()
    digest, limit = expected.tokenizer_hash, expected.max_tokens
    says = f"contract_version is not {CONTRACT_VERSION}; convert the store"
    rules = [Rule("unknown version", says, lambda t: ~_to_numpy(pc.equal(t["contract_version"], CONTRACT_VERSION)))]
    rules += (rule for field in schema for rule in _hole_rules(field))
    rules += (_utf8_rule(field.name) for field in schema if pa.types.is_string(field.type))
    rules += _value_rules(names)
    for side in ("response", "chosen", "rejected"):
        if f"{side}_ids" in names:
            rules += _side_rules(names, side)
    if "mask_id" in names:
        rules.append(_mask_rule("prompt_ids", "nothing would fill it"))
    for reward in ("reward", "chosen_reward", "rejected_reward"):
        if reward in names:
            rules += _reward_rules(reward)
    if "rejected_ids" in names:
        says = "chosen_ids and rejected_ids are identical: nothing to prefer"
        rules.append(Rule("identical sides", says, _identical))
    if digest and "tokenizer_hash" in names:
        says = f"tokenizer_hash is not {digest[:12]}...: the ids belong to another tokenizer"
        rules.append(Rule("hash mismatch", says, lambda t: ~_to_numpy(pc.equal(t["tokenizer_hash"], digest))))
    if limit:
        sides = [name for name in ("response_ids", "chosen_ids", "rejected_ids") if name in names]
        says = f"prompt and response have more than {limit} tokens"
        rules.append(Rule("too long", says, lambda t: _tokens(t, sides) > limit))
    return rules


def verdicts(table: pa.Table, rules: list[Rule]) -> np.ndarray:
    """Return int [rows], the index of the first rule that each row breaks, or GOOD."""
    found = np.full(len(table), GOOD)
    alive, rest = np.arange(len(table)), table
    for number, rule in enumerate(rules):
        bad = _to_numpy(rule.find(rest))
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


# === columns ===


def _to_numpy(mask: Mask) -> np.ndarray:
    """Return bool [rows]."""
    return mask if isinstance(mask, np.ndarray) else np.asarray(mask.fill_null(False).to_numpy())


def list_lengths(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return int [rows], the number of values of each list; a null list has none."""
    return np.asarray(pc.list_value_length(column).fill_null(0).to_numpy(), dtype=np.int64)


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.list_flatten(column).to_numpy())


def rows_where(column: pa.Array | pa.ChunkedArray, flat: Any) -> np.ndarray:
    """Return bool [rows]: whether a row of a list column has a True among the flattened values."""
    owner = np.repeat(np.arange(len(column)), list_lengths(column))
    return np.bincount(owner, np.asarray(flat, dtype=bool), minlength=len(column)) > 0


def _among(table: pa.Table, rows: Mask, find: Callable[[pa.Table], np.ndarray]) -> np.ndarray:
    """Return bool [rows]: those of `rows` that `find` finds in a table of these alone."""
    found = _to_numpy(rows).copy()
    found[found] = find(table.filter(pa.array(found)))
    return found


# === the rules of a column ===


def _hole_rules(field: pa.Field) -> Iterator[Rule]:
    name = field.name
    if name not in MAY_BE_NULL:
        yield Rule("missing value", f"{name} is null", lambda t: t[name].is_null())
    if pa.types.is_list(field.type):
        says = f"{name} holds a null"
        yield Rule("missing value", says, lambda t: rows_where(t[name], pc.list_flatten(t[name]).is_null()))


def _utf8_rule(name: str) -> Rule:
    def find(table: pa.Table) -> np.ndarray:
        try:
            table[name].validate(full=True)
        except pa.ArrowInvalid:
            return np.array([not _is_utf8(value) for value in table[name].cast(pa.binary()).to_pylist()], dtype=bool)
        return np.zeros(len(table), dtype=bool)

    return Rule("bad UTF-8", f"{name} is not UTF-8", find)


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or value.decode() is not None
    except UnicodeDecodeError:
        return False


def _value_rules(names: list[str]) -> Iterator[Rule]:
    """Yield the rules on single values; nulls pass them."""
    yield Rule("bad value", "row_id is empty", lambda t: pc.equal(pc.binary_length(t["row_id"]), 0))
    for name in (n for n in names if n.endswith("_ids")):
        yield _items_rule(name, "below 0", lambda values: values < 0)
    for name in (n for n in ("mask_id", "num_forwards", "denoising_steps", "temperature") if n in names):
        yield _number_rule(name, "is below 0" + (" or not finite" if name == "temperature" else ""), np.inf)
    if "shift" in names:
        yield _number_rule("shift", "is neither 0 nor 1", 2)
    if "logps" in names:
        yield _items_rule("logps", "above 0, or none at all (NaN)", lambda values: ~(values <= _ROUNDING))
    if "block_size" in names:
        yield Rule("bad value", "block_size is below 1", lambda t: pc.less(t["block_size"], 1))
        yield _known_rule("block_origin", BLOCK_ORIGINS)
    if "support" in names:
        yield _known_rule("support", SUPPORTS)


def _items_rule(name: str, says: str, broken: Callable[[np.ndarray], np.ndarray]) -> Rule:
    """Return the rule that no number in the lists of a column is `broken`."""
    return Rule("bad value", f"{name} holds a number {says}", lambda t: rows_where(t[name], broken(_flat(t[name]))))


def _number_rule(name: str, says: str, most: float) -> Rule:
    """Return the rule that a number is in [0, most)."""

    def find(table: pa.Table) -> np.ndarray:
        values = table[name].cast(pa.float64()).fill_null(0.0).to_numpy()
        return ~((values >= 0) & (values < most))

    return Rule("bad value", f"{name} {says}", find)


def _known_rule(name: str, known: tuple[str, ...]) -> Rule:
    says = f"{name} is not {' or '.join(known)}"
    return Rule("bad value", says, lambda t: pc.invert(pc.is_in(t[name], pa.array([*known, None]))))


def _mask_rule(ids: str, says: str) -> Rule:
    def find(table: pa.Table) -> np.ndarray:
        return rows_where(
            table[ids], _flat(table[ids]) == np.repeat(table["mask_id"].to_numpy(), list_lengths(table[ids]))
        )

    return Rule("mask token", f"{ids} holds the mask token: {says}", find)


def _reward_rules(name: str) -> Iterator[Rule]:
    def lacks_source(table: pa.Table) -> pa.ChunkedArray:
        named = pc.greater(pc.utf8_length(table["reward_source"]), 0).fill_null(False)
        return pc.and_not(table[name].is_valid(), named)

    yield Rule("bad value", f"{name} is not finite", lambda t: pc.invert(pc.is_finite(t[name])))
    yield Rule("missing value", f"{name} has no reward_source: who gave it?", lacks_source)


# === the rules of a side ===


def _side_rules(names: list[str], side: str) -> Iterator[Rule]:
    ids, prefix = f"{side}_ids", "" if side == "response" else f"{side}_"
    steps, ranks, types, logps = (f"{prefix}{n}" for n in ("steps", "ranks", "types", "logps"))
    yield Rule("empty side", f"{ids} is empty", lambda t: list_lengths(t[ids]) == 0)
    for name in (n for n in (steps, ranks, types, logps) if n in names):
        yield _lengths_rule(name, ids)
    if "mask_id" in names:
        yield _mask_rule(ids, "the response was never finished")
        says = f"{ids} does not end on the block grid: the terminal block must be whole"
        yield Rule(
            "off the grid", says, lambda t: (starts_on_grid(t) + list_lengths(t[ids])) % t["block_size"].to_numpy() != 0
        )
    if steps in names:
        yield _items_rule(steps, f"below {GIVEN}", lambda values: values < GIVEN)
    if types in names:
        allowed = f"that is not {', '.join(map(str, TOKEN_TYPES))}"
        yield _items_rule(types, allowed, lambda values: ~np.isin(values, TOKEN_TYPES))
        says = f"{types} and {steps} disagree: {GIVEN} is the step of a token that no step chose, and of no other"
        yield Rule("token types", says, lambda t: _types_disagree(t, types, steps))
    if ranks in names:
        says = f"{ranks} are not a partition: each block's must be 0, 1, .. in the order of its {steps}"
        yield Rule("not a partition", says, lambda t: _not_a_partition(t, ranks, steps))


def _lengths_rule(name: str, ids: str) -> Rule:
    def find(table: pa.Table) -> pa.ChunkedArray:
        return pc.not_equal(pc.list_value_length(table[name]), pc.list_value_length(table[ids]))

    return Rule("lengths differ", f"{name} and {ids} differ in length", find)


def _types_disagree(table: pa.Table, types: str, steps: str) -> np.ndarray:
    def find(rows: pa.Table) -> np.ndarray:
        return rows_where(rows[types], (_flat(rows[types]) != DIFFUSION) != (_flat(rows[steps]) == GIVEN))

    return _among(table, pc.and_(table[types].is_valid(), table[steps].is_valid()), find)


def _not_a_partition(table: pa.Table, ranks: str, steps: str) -> np.ndarray:
    def find(rows: pa.Table) -> np.ndarray:
        lengths, sizes = list_lengths(rows[steps]), rows["block_size"].to_numpy()
        expected, _ = block_ranks(_flat(rows[steps]), lengths, starts_on_grid(rows), sizes)
        return rows_where(rows[ranks], _flat(rows[ranks]) != expected)

    has_ranks, has_steps = table[ranks].is_valid(), table[steps].is_valid()
    return _to_numpy(pc.and_not(has_ranks, has_steps)) | _among(table, pc.and_(has_ranks, has_steps), find)


def _identical(table: pa.Table) -> np.ndarray:
    def find(rows: pa.Table) -> np.ndarray:
        return ~rows_where(rows["chosen_ids"], _flat(rows["chosen_ids"]) != _flat(rows["rejected_ids"]))

    return _among(table, list_lengths(table["chosen_ids"]) == list_lengths(table["rejected_ids"]), find)


def _tokens(table: pa.Table, sides: list[str]) -> np.ndarray:
    """Return int [rows], the tokens of the prompt and its longest side."""
    return list_lengths(table["prompt_ids"]) + np.max([list_lengths(table[side]) for side in sides], axis=0)
