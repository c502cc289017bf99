"""Lists of numbers against Python's own, whatever they hold."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from dtrpo_ray.data.ragged import Ragged

LISTS = st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=6)
INTS = pa.list_(pa.int32())


def python(ragged: Ragged) -> list[list[int]]:
    found: list[list[int]] = ragged.to_arrow(INTS).to_pylist()
    return found


@given(LISTS, st.data())
def test_lists_of_numbers_do_what_python_s_lists_do(lists: list[list[int]], data: st.DataObject) -> None:
    ragged, rows = Ragged.of(lists), range(len(lists))
    assert python(ragged) == python(Ragged.from_arrow(pa.array(lists, INTS))) == lists
    order = data.draw(st.lists(st.sampled_from(list(rows)), max_size=6)) if lists else []
    picked = ragged.take(np.array(order, dtype=np.int64))
    assert python(picked) == [lists[row] for row in order]
    cut = [data.draw(st.integers(0, len(lists[row]))) for row in order]
    shorter = picked.without_first(np.array(cut, dtype=np.int64))
    assert python(shorter) == [lists[row][n:] for row, n in zip(order, cut, strict=True)]
    assert python(shorter.append(np.array(cut, dtype=np.int64), np.array(order, dtype=np.int64))) == [
        lists[row][n:] + [row] * n for row, n in zip(order, cut, strict=True)
    ]
    assert python(ragged.append(1, 9)) == [[*numbers, 9] for numbers in lists]
    other = ragged.take(np.array(list(rows)[::-1], dtype=np.int64))
    assert ragged.same_as(other).tolist() == [a == b for a, b in zip(lists, lists[::-1], strict=True)]
    first = np.array([row % 2 == 0 for row in rows], dtype=bool)
    assert python(Ragged.where(first, ragged, other)) == [(lists if row % 2 == 0 else lists[::-1])[row] for row in rows]
    assert ragged.any(ragged.flat == 3).tolist() == [3 in numbers for numbers in lists]
    known = ragged.to_arrow(INTS, first).to_pylist()
    assert known == [numbers if row % 2 == 0 else None for row, numbers in enumerate(lists)]


@given(st.lists(LISTS, max_size=4))
def test_rows_that_are_joined_follow_each_other(groups: list[list[list[int]]]) -> None:
    rows = Ragged.of([row for group in groups for row in group])
    joined = rows.join(np.array([len(group) for group in groups], dtype=np.int64))
    assert python(joined) == [[number for row in group for number in row] for group in groups]
