"""Scored trajectories -> preference pairs by a strategy. Ties never pair, and equal responses count once."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtrpo_ray.config.produce import PairConfig
from dtrpo_ray.data.schemas import PREFERENCE, SIDES, TRAJECTORY
from dtrpo_ray.data.tables import TablePart, write_whole
from dtrpo_ray.errors import DataError

_COMPARED_IDS = 1 << 24  # ids that are compared at once
_MOST = 256  # responses to a prompt at a setting that are looked at from either end of the rewards

CORRECT = 1.0  # the least reward of a correct response, as in an evaluation
SAME_PROMPT = ("prompt_ids", "mask_id", "block_size", "block_origin", "tokenizer_hash", "reward_source")


class PairCounts(TypedDict):
    """The counts of one part: responses read, pairs made, and responses without a reward."""

    rows: int
    pairs: int
    unscored: int


@dataclass(frozen=True, slots=True)
class Pairer:
    """Pairs the responses of a part, which holds whole prompts; writes a file of the part's name if there are pairs."""

    config: PairConfig

    def __call__(self, part: TablePart, out: Path) -> PairCounts:
        """Pair one part. Raises DataError as `make_pairs` does, or naming a row that breaks a rule."""
        table = part.read(TRAJECTORY)
        pairs = make_pairs(table, self.config)
        if len(pairs):
            write_whole(pairs, out / part.name)
        return {"rows": len(table), "pairs": len(pairs), "unscored": table["reward"].null_count}


def make_pairs(trajectories: pa.Table, config: PairConfig) -> pa.Table:
    """Return the pairs (preference/v1) of a trajectory table.

    Only responses to the same prompt, by the same model at the same settings (the length allowed aside), pair, and only
    where rewards differ by `min_margin` or more; `config.strategy` says which of them. With "faster" these are correct
    responses of equal reward whose numbers of forwards differ by `min_margin`; the same ids in other steps are another
    response. Raises DataError for rows of one prompt_id that differ in their prompt, grid, tokenizer or scorer.
    """
    faster = config.strategy == "faster"
    usable = pc.is_finite(trajectories["reward"])
    if faster:
        correct = pc.greater_equal(trajectories["reward"], CORRECT)
        usable = pc.and_(usable, pc.and_(correct, pc.is_valid(trajectories["num_forwards"])))
    table = trajectories.filter(usable).sort_by("row_id")
    prompt = _codes(table["prompt_id"])
    _require_one_prompt(table, _first_equal(prompt))
    settings = table.select(["denoising_steps", "temperature", "model_hash", "engine", "sampler"]).flatten()
    alike = [] if config.strategy == "references" else settings.drop_columns("sampler.max_new_tokens").columns
    group = _first_equal(prompt, *map(_codes, [*alike, table["reward"]] if faster else alike))
    same = [table["response_ids"], table["steps"]] if faster else [table["response_ids"]]
    rows = np.unique(_first_equal(group, *map(_codes, same)))
    table, group = table.take(pa.array(rows)), group[rows]
    pairs = list(_select(table, group, *_candidates(table, group, config), config))
    return _pairs_table(table, np.array(pairs, dtype=np.int64).reshape(-1, 2))


def _first_equal(*columns: np.ndarray) -> np.ndarray:
    """Return int [rows], the first row that has the same values in these columns, int [rows] each."""
    _, first, value = np.unique(np.stack(columns), axis=1, return_index=True, return_inverse=True)
    return np.asarray(first[value.ravel()])


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Return an integer for each value; equal values have equal ones."""
    values = column.combine_chunks()
    keys = _list_keys(values) if pa.types.is_list(values.type) else values
    return np.asarray(keys.dictionary_encode(null_encoding="encode").indices.to_numpy())


def _require_one_prompt(table: pa.Table, first: np.ndarray) -> None:
    """Raise DataError for the first row that differs from the `first` (int [rows]) row of its prompt_id."""
    for name in SAME_PROMPT:
        codes = _codes(table[name])
        for row in np.flatnonzero(codes != codes[first])[:1].tolist():
            row_id, prompt_id = (table[column][row].as_py() for column in ("row_id", "prompt_id"))
            says = f"{name} differs from other rows of prompt_id {prompt_id}, so they cannot pair"
            raise DataError(f"row {row_id}: {says}")


def _list_keys(column: pa.ListArray) -> pa.Array:
    """Return lists of ids as bytes, which Arrow can compare."""
    data = np.ascontiguousarray(column.flatten().to_numpy())
    offsets = (np.asarray(column.offsets, dtype=np.int64) - column.offsets[0].as_py()) * data.itemsize
    return pa.Array.from_buffers(pa.large_binary(), len(column), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def _candidates(table: pa.Table, group: np.ndarray, config: PairConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return every (good, bad) of rows that may pair, from the best and the worst of each group, group by group."""
    worth, rows = _worth(table, config), np.arange(len(table))
    most = max(_MOST, config.max_pairs_per_prompt)  # no strategy but `closest` would take further ones
    good = bad = rows
    if config.strategy == "references":
        reference = pc.equal(table["engine"], config.reference_engine).to_numpy()
        good, bad = rows[reference], rows[~reference]
    better, worse = _first(group, good, -worth, most), _first(group, bad, worth, most)
    begin = np.searchsorted(group[worse], group[better])
    partners = np.searchsorted(group[worse], group[better], side="right") - begin
    good = np.repeat(better, partners)
    place = np.arange(len(good)) - np.repeat(np.cumsum(partners) - partners, partners)
    bad = worse[np.repeat(begin, partners) + place]
    keep = worth[good] - worth[bad] >= config.min_margin
    return good[keep], bad[keep]


def _worth(table: pa.Table, config: PairConfig) -> np.ndarray:
    """Return float [rows], what a response is better by: its reward or, among equal ones, its few forwards."""
    if config.strategy == "faster":
        return -table["num_forwards"].to_numpy().astype(float)
    return np.asarray(table["reward"].to_numpy())


def _first(group: np.ndarray, rows: np.ndarray, key: np.ndarray, most: int) -> np.ndarray:
    """Return the `most` rows of the smallest key of each group, group by group."""
    rows = rows[np.lexsort([rows, key[rows], group[rows]])]
    return rows[np.arange(len(rows)) - np.searchsorted(group[rows], group[rows]) < most]


def _select(
    table: pa.Table, group: np.ndarray, good: np.ndarray, bad: np.ndarray, config: PairConfig
) -> Iterator[tuple[int, int]]:
    """Yield the pairs that a strategy takes, in its order. Ties go to the smaller row_ids (rows are sorted by them)."""
    worth = _worth(table, config)
    keys = [worth[bad], -worth[good]]  # the last one counts most
    if config.strategy == "closest":
        keys = [_distances(table["response_ids"], good, bad)]
    elif config.strategy == "all":
        keys = [worth[bad] - worth[good]]
    order = np.lexsort([bad, good, *keys, group[good]])
    used, made = set[int](), Counter[int]()
    for g, b in zip(good[order].tolist(), bad[order].tolist(), strict=True):
        if made[group[g]] < config.max_pairs_per_prompt and (config.strategy == "all" or not {g, b} & used):
            used |= {g, b}
            made[group[g]] += 1
            yield g, b


def _distances(ids: pa.ChunkedArray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the number of positions in which two responses differ, missing ones included."""
    lengths = pc.list_value_length(ids).to_numpy()
    width = int(lengths.max(initial=0))
    padded = np.full((len(ids), width), -1, dtype=np.int32)
    padded[np.arange(width) < lengths[:, None]] = pc.list_flatten(ids).to_numpy()
    step = max(1, _COMPARED_IDS // max(width, 1))
    parts = [(padded[one[i : i + step]] != padded[other[i : i + step]]).sum(1) for i in range(0, len(one), step)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _pairs_table(table: pa.Table, pairs: np.ndarray) -> pa.Table:
    better, worse = table.take(pa.array(pairs[:, 0])), table.take(pa.array(pairs[:, 1]))
    columns: dict[str, pa.Array] = {name: better[name] for name in PREFERENCE.names if name in TRAJECTORY.names}
    columns |= {name: (better if name.startswith("chosen") else worse)[source] for name, source in SIDES.items()}
    columns["row_id"] = pc.binary_join_element_wise(better["row_id"], worse["row_id"], ">")
    columns["origin"] = pa.nulls(len(pairs), pa.string())
    return pa.table(columns, schema=PREFERENCE)
