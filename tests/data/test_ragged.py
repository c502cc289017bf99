"""Lists of numbers against Python's own, whatever they hold."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from dtrpo_ray.data.ragged import Ragged

LISTS = st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=6)
INTS = pa.list_(pa.int32())


def python(ragged: Ragged) -> list[list[int]]:
    ends = np.cumsum(ragged.lengths)[:-1]
    return [part.tolist() for part in np.split(ragged.flat, ends)] if len(ragged) else []


@given(LISTS, st.data())
def test_lists_of_numbers_do_what_python_s_lists_do(lists: list[list[int]], data: st.DataObject) -> None:
    ragged, rows = Ragged.from_arrow(pa.array(lists, INTS)), range(len(lists))
    assert python(ragged) == lists
    order = data.draw(st.lists(st.sampled_from(list(rows)), max_size=6)) if lists else []
    picked = ragged.take(np.array(order, dtype=np.int64))
    assert python(picked) == [lists[row] for row in order]
    other = ragged.take(np.array(list(rows)[::-1], dtype=np.int64))
    assert ragged.same_as(other).tolist() == [a == b for a, b in zip(lists, lists[::-1], strict=True)]
    assert ragged.any(ragged.flat == 3).tolist() == [3 in numbers for numbers in lists]
