"""The rules that every row of a table must pass, each vectorised over a whole table. No torch, no ray.

`verdicts` finds the first broken rule of each row, so that the counts by rule and the good rows add up to the table.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrpo_ray.data import schemas
from dtrpo_ray.data.ragged import Ragged
from dtrpo_ray.errors import DataError
from dtrpo_ray.method.trajectory import GIVEN

GOOD = -1  # in `verdicts`
_ROUNDING = 1e-4  # by which a log-probability in float32 may be above 0
_GRID = ("block_size", "block_origin", "prompt_ids")


@dataclass(frozen=True, slots=True)
class Rule:
    """`find` maps `columns` to bool [rows], the rows that break the rule; it may rely on all earlier rules.

    It gets numpy arrays, lists as `Ragged`. A row with a null among the columns passes, unless the rule is `on_nulls`:
    then `find` gets the columns as they are in Arrow.
    """

    name: str
    says: str
    columns: Sequence[str]
    find: Callable[..., Any]
    on_nulls: bool = False

    def broken_by(self, table: pa.Table) -> np.ndarray:
        """Return bool [rows]: which rows break the rule."""
        columns = table.select(list(self.columns))
        if self.on_nulls:
            return np.asarray(self.find(*columns.columns), dtype=bool)
        found = np.all([column.is_valid().to_numpy() for column in columns.columns], axis=0)
        found[found] = self.find(*map(_to_numpy, columns.drop_null().columns))
        return found


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray | Ragged:
    return Ragged.from_arrow(column) if pa.types.is_list(column.type) else column.to_numpy()


@dataclass(frozen=True, slots=True)
class Expected:
    """Limits that only the caller knows: the tokenizer of the ids, and the longest row (prompt and a side)."""

    tokenizer_hash: str | None = None
    max_tokens: int | None = None


def rules_of(schema: pa.Schema, expected: Expected | None = None) -> list[Rule]:
    """Return the rules of a table, in the order they are applied: those whose columns it has."""
    rules = [*_column_rules(schema), *_value_rules()]
    for side in ("response", "chosen", "rejected"):
        rules += _side_rules(f"{side}_ids", "" if side == "response" else f"{side}_")
    rules += _row_rules([name for name in schemas.ID_COLUMNS if name in schema.names], expected or Expected())
    return [rule for rule in rules if set(rule.columns) <= set(schema.names)]


def verdicts(table: pa.Table, rules: list[Rule]) -> np.ndarray:
    """Return int [rows], the index of the first rule that each row breaks, or GOOD."""
    found = np.full(len(table), GOOD)
    alive, rest = np.arange(len(table)), table
    for number, rule in enumerate(rules):
        bad = rule.broken_by(rest)
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
        row_id = table["row_id"].cast(pa.binary())[row].as_py()  # need not be UTF-8
        name = row_id.decode(errors="backslashreplace") if row_id else f"number {row + 1}"
        raise DataError(f"{where}: row {name}: {rules[found[row]].says}")
    return table


def block_ranks(steps: Ragged, starts: np.ndarray, block_size: np.ndarray) -> np.ndarray:
    """Return the dense ranks of a whole column as int [tokens]: 0, 1, .. within each block; negative steps stay.

    `starts` (int [rows]) has the place of each response's first token on its grid, `block_size` the size of its blocks.
    """
    row, flat = steps.owner, steps.flat
    place = np.arange(len(flat)) - np.repeat(np.cumsum(steps.lengths) - steps.lengths, steps.lengths)
    block = (place + starts[row]) // block_size[row]
    ranks, done = flat.astype(np.int64), np.flatnonzero(flat >= 0)
    order = done[np.lexsort((flat[done], block[done], row[done]))]
    new_block = np.diff(row[order], prepend=-1).astype(bool) | np.diff(block[order], prepend=-1).astype(bool)
    rises = np.cumsum(new_block | np.diff(flat[order], prepend=-1).astype(bool))
    ranks[order] = rises - np.maximum.accumulate(np.where(new_block, rises, 0))
    return ranks


def row_tokens(prompt: np.ndarray, *sides: np.ndarray) -> np.ndarray:
    """Return int [rows], the tokens of the prompt and its longest side; all are int [rows]."""
    return np.asarray(prompt + np.max(sides, axis=0))


def _starts(origins: np.ndarray, prompts: Ragged) -> np.ndarray:
    """Return int [rows], the place of each response's first token on its grid of blocks."""
    return np.asarray(prompts.lengths * (origins == "global"))  # else the grid starts at the response


# === the rules ===


def _column_rules(schema: pa.Schema) -> Iterator[Rule]:
    version = schemas.CONTRACT_VERSION
    says = f"contract_version is not {version}; convert the store"
    yield Rule("unknown version", says, ["contract_version"], lambda v: pc.not_equal(v, version).fill_null(True), True)
    for name, kind in zip(schema.names, schema.types, strict=True):
        if name not in schemas.MAY_BE_NULL:
            yield Rule("missing value", f"{name} is null", [name], pc.is_null, on_nulls=True)
        if pa.types.is_list(kind):
            yield Rule("missing value", f"{name} holds a null", [name], _holds_null, on_nulls=True)
    for field in schema:
        if pa.types.is_string(field.type):
            yield Rule("bad UTF-8", f"{field.name} is not UTF-8", [field.name], _not_utf8, on_nulls=True)


def _holds_null(lists: pa.ChunkedArray) -> np.ndarray:
    return Ragged.from_arrow(lists).any(pc.list_flatten(lists).is_null().to_numpy())


def _not_utf8(texts: pa.ChunkedArray) -> list[bool]:
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        values = texts.cast(pa.binary()).fill_null(b"").to_pylist()
        return [value.decode(errors="ignore").encode() != value for value in values]
    return [False] * len(texts)


def _value_rules() -> Iterator[Rule]:
    yield _value_rule("row_id", "is empty", lambda ids: ids == "")
    for name in schemas.ID_COLUMNS:
        yield _value_rule(name, "holds a number below 0", lambda ids: ids.any(ids.values < 0))
    for name in ("mask_id", "num_forwards", "denoising_steps"):
        yield _value_rule(name, "is below 0", lambda values: values < 0)
    yield _value_rule("temperature", "is below 0 or not finite", lambda values: ~((values >= 0) & (values < np.inf)))
    yield _value_rule("shift", "is neither 0 nor 1", lambda values: ~np.isin(values, (0, 1)))
    says = "holds a number above 0, or NaN"
    yield _value_rule("logps", says, lambda logps: logps.any(~(logps.values <= _ROUNDING)))
    yield _value_rule("block_size", "is below 1", lambda sizes: sizes < 1)
    for name, known in (("block_origin", schemas.BLOCK_ORIGINS), ("support", schemas.SUPPORTS)):
        yield _value_rule(name, f"is not {' or '.join(known)}", lambda values, known=known: ~np.isin(values, known))


def _value_rule(name: str, says: str, find: Callable[..., np.ndarray]) -> Rule:
    return Rule("bad value", f"{name} {says}", [name], find)


def _mask_rule(name: str, says: str) -> Rule:
    says = f"{name} holds the mask token: {says}"
    return Rule("mask token", says, [name, "mask_id"], lambda ids, mask: ids.any(ids.values == mask[ids.owner]))


def _side_rules(ids: str, prefix: str) -> Iterator[Rule]:
    """Yield the rules of a response's ids and of the columns that go with them, named `prefix` and a word."""
    steps, ranks, types, logps = (f"{prefix}{word}" for word in ("steps", "ranks", "types", "logps"))
    yield Rule("empty side", f"{ids} is empty", [ids], lambda ids: ids.lengths == 0)
    for name in (steps, ranks, types, logps):
        says = f"{name} and {ids} differ in length"
        yield Rule("lengths differ", says, [name, ids], lambda values, ids: values.lengths != ids.lengths)
    yield _mask_rule(ids, "the response was never finished")
    says = f"{ids} does not end on the block grid: the terminal block must be whole"
    yield Rule("off the grid", says, [ids, *_GRID], _off_the_grid)
    yield _value_rule(steps, f"holds a number below {GIVEN}", lambda steps: steps.any(steps.values < GIVEN))
    says = f"holds a number that is not {', '.join(map(str, schemas.TOKEN_TYPES))}"
    yield _value_rule(types, says, lambda types: types.any(~np.isin(types.values, schemas.TOKEN_TYPES)))
    says = f"{types} and {steps} disagree: {GIVEN} is the step of a token that no step chose, and of no other"
    yield Rule("token types", says, [types, steps], _types_disagree)
    says = f"{ranks} are not a partition: each block's must be 0, 1, .. in the order of its {steps}"
    yield Rule("not a partition", says, [ranks, steps], _only_first, on_nulls=True)
    yield Rule("not a partition", says, [ranks, steps, *_GRID], _not_a_partition)


def _off_the_grid(ids: Ragged, sizes: np.ndarray, origins: np.ndarray, prompts: Ragged) -> np.ndarray:
    return np.asarray((_starts(origins, prompts) + ids.lengths) % sizes != 0)


def _types_disagree(types: Ragged, steps: Ragged) -> np.ndarray:
    return types.any((types.values != schemas.DIFFUSION) != (steps.values == GIVEN))


def _only_first(one: pa.ChunkedArray, other: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.and_not(one.is_valid(), other.is_valid())


def _not_a_partition(ranks: Ragged, steps: Ragged, sizes: np.ndarray, *start: Any) -> np.ndarray:
    return ranks.any(ranks.values != block_ranks(steps, _starts(*start), sizes))


def _identical(*sides: pa.ChunkedArray) -> np.ndarray:
    chosen, rejected, *steps = map(Ragged.from_arrow, sides)
    known = pc.and_(*(side.is_valid() for side in sides[2:])).to_numpy()
    return np.asarray(chosen.same_as(rejected) & (steps[0].same_as(steps[1]) | ~known))


def _row_rules(ids: list[str], expected: Expected) -> Iterator[Rule]:
    """Yield the rules on a whole row; `ids` are the columns of its prompt and sides."""
    digest, limit = expected.tokenizer_hash, expected.max_tokens
    yield _mask_rule("prompt_ids", "nothing would fill it")
    for name in ("reward", "chosen_reward", "rejected_reward"):
        yield _value_rule(name, "is not finite", lambda rewards: ~np.isfinite(rewards))
        pair, says = [name, "reward_source"], f"{name} has no reward_source: name its source"
        yield Rule("missing value", says, pair, _only_first, on_nulls=True)
        yield Rule("missing value", says, pair, lambda _, sources: sources == "")
    says = "chosen_ids and rejected_ids are identical, and no steps tell them apart: nothing to prefer"
    sides = [f"{side}_{name}" for name in ("ids", "steps") for side in ("chosen", "rejected")]
    yield Rule("identical sides", says, sides, _identical, on_nulls=True)
    if digest:
        says = f"tokenizer_hash is not {digest[:12]}...: the ids belong to another tokenizer"
        yield Rule("hash mismatch", says, ["tokenizer_hash"], lambda c: pc.not_equal(c, digest).fill_null(True), True)
    if limit:
        says = f"prompt and response have more than {limit} tokens"
        yield Rule("too long", says, ids, lambda *lists: row_tokens(*(ids.lengths for ids in lists)) > limit)
