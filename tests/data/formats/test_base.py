"""Rows split from refusals; files whose lines, numbers or Arrow types are at the edge of what can be read."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dtrpo_ray.data.formats.base import split_batches
from dtrpo_ray.data.formats.files import Shard
from dtrpo_ray.data.formats.preferences import PREFERENCE_FORMATS
from dtrpo_ray.data.formats.responses import RESPONSE_FORMATS
from dtrpo_ray.data.tables import Rejected


def test_batches_of_rows_are_split_in_order() -> None:
    bad = [Rejected(f"f:{i}", "why", "") for i in range(2)]
    rows: list[Any] = [1, bad[0], 2, 3, bad[1]]
    assert list(split_batches(iter(rows), 2)) == [([1], [bad[0]]), ([2, 3], []), ([], [bad[1]])]


PAIR = b'{"prompt": "a", "chosen": "b", "rejected": "c"}'
STEPPED = b'{"token_ids": [1, 2], "first_unmask_times": [0, 1], "prompt_ids": [%s], "logprobs": %s}\n'
SAID = b'{"prompt": "a", "response": "b"}\n'
FORMS = {form.name: form for form in (*PREFERENCE_FORMATS, *RESPONSE_FORMATS)}
Refused = list[tuple[int, str]]  # (line, reason)


@pytest.mark.parametrize(
    ("name", "lines", "good", "refused"),
    [
        ("pairs with a prompt", PAIR + PAIR + b"\n\n" + PAIR + b"\n", 1, [(1, "bad JSON")]),
        (
            "pairs with a prompt",
            PAIR[:-1] + b"\n}\n" + PAIR + PAIR + b"\n",
            0,
            [(1, "bad JSON"), (2, "bad JSON"), (3, "bad JSON")],
        ),
        (
            "pairs with a prompt",
            PAIR + b"\n" + PAIR.replace(b"b", b"\xff") + b"\n" + PAIR,
            2,
            [(2, "bad UTF-8")],
        ),
        ("pairs with a prompt", PAIR.replace(b'"b"', b'"b", "chosen": "d"') + b"\n" + PAIR, 2, []),
        (
            "pairs with a prompt",
            b"\xef\xbb\xbf" + PAIR + b"\r\n" + PAIR.replace(b'"b"', b'"\\u001cc"'),
            1,
            [(2, "identical sides")],
        ),
        ("pairs with a prompt", PAIR + b"\n" + PAIR.replace(b'"a"', b"null"), 1, [(2, "missing field")]),
        ("JetEngine", STEPPED % (b"3", b"[-1, 0]") + STEPPED % (b"3", b"[-1, 0, -2]"), 1, [(2, "lengths differ")]),
        ("JetEngine", STEPPED % (b"3", b"[-1, 0]") + STEPPED % (b"3", b"[-1, null]"), 1, [(2, "wrong type")]),
        ("JetEngine", STEPPED % (b"3", b"[-1, 0]") + STEPPED % (b"2147483648", b"null"), 1, [(2, "bad value")]),
        ("JetEngine", STEPPED % (b"3, null", b"null") + STEPPED % (b"3", b"null"), 1, [(1, "wrong type")]),
        *(
            ("generations", SAID + SAID.replace(b"{", b'{"%s": %s, ' % (field, value)), good, refused)
            for good, refused, odd in (
                (2, [], [(b"metadata", value) for value in (b"NaN", b"Infinity", b"-0")]),
                (2, [], [(b"reward", value) for value in (b"NaN", b"-Infinity", b"-0", b"-0.0")]),
                (1, [(2, "bad JSON")], [(b"metadata", v) for v in (b"Inf", b"-Inf", b"-NaN", b"1" * 5_000)]),
                (1, [(2, "bad JSON")], [(b"metadata", b"[" * 99_999 + b"]" * 99_999), (b"reward", b"Inf")]),
                (1, [(2, "bad value")], [(b"reward", b"1" * 400)]),
            )
            for field, value in odd
        ),
    ],
)
def test_lines_at_the_edge_spoil_no_other(tmp_path: Path, name: str, lines: bytes, good: int, refused: Refused) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines)
    [(rows, bad)] = FORMS[name].batches(Shard(str(tmp_path / "rows.jsonl")))
    assert len(rows) == good
    assert [(int(row.origin.rsplit(":", 1)[1]), row.reason) for row in bad] == refused


def two_rows(name: str, *columns: Any) -> pa.Table:
    """Two good rows, and a name that several columns have."""
    known = pa.Table.from_pylist([{"prompt": "Why?", "response": "So."}, {"prompt": "Why?", "response": "No."}])
    for column in columns:
        known = known.append_column(name, pa.array(column))
    return known


@pytest.mark.parametrize(
    ("table", "answers", "refused"),
    [
        (two_rows("answer", ["1", "2"], ["3", "4"]), ["3", "4"], []),
        (two_rows("tools", [None, None], ["x", ""]), [None], [(1, "unsupported field")]),
        (two_rows("tools", ["", ""]), [None, None], []),
        (two_rows("images", [[], [1]]), [None], [(2, "unsupported field")]),
        (two_rows("metadata", pa.array(["a", "b"], pa.string_view())), [None, None], []),
        (two_rows("metadata", pa.array([b"\xff", b"b"]).view(pa.string())), [None], [(1, "bad UTF-8")]),
        (two_rows("answer", pa.array(["a", "b"]).dictionary_encode()), ["a", "b"], []),
        (two_rows("reward", pa.array([1, 2], pa.int8())).slice(1), [None], []),
        (two_rows("answer", pa.array([["a"], None], pa.large_list(pa.large_string()))), ['["a"]', None], []),
    ],
)
def test_odd_types_of_arrow_are_read_or_refused(
    tmp_path: Path, table: pa.Table, answers: list[str | None], refused: Refused
) -> None:
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    [(found, bad)] = FORMS["generations"].batches(Shard(str(tmp_path / "rows.arrow")))
    assert [row.answer for row in found] == answers
    assert [(int(row.origin.rsplit(":", 1)[1]), row.reason) for row in bad] == refused
