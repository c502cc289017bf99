"""Whole columns against row by row: the same rows from any file, and as many steps of Python for many as for few."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dtrpo_ray
from dtrpo_ray.data.formats import preferences, responses
from dtrpo_ray.data.formats.files import Shard
from dtrpo_ray.data.formats.parsing import parted
from dtrpo_ray.data.formats.tokenize import Target, tokenize_preferences, tokenize_responses
from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.models.tokenizer import load_tokenizer

# --- rows of every layout that has a view, good ones and nearly good ones ---

TEXTS = st.sampled_from(["Why?", "So.", "No.", " So. ", "caf\u00e9\x00", "\U0001f600", "2026-11-26", "\x1cSo.\u2003"])
EDGES = TEXTS | st.sampled_from(["", " \n", "\u2003", "\x1c", "\x1eu", "\u200b"])
ODD = st.sampled_from([None, 5, 1.5, True, [], {}, [None], ["a"], "\ud83d", 10**400])
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": EDGES},
    optional={"name": st.just("x"), "tool_calls": st.sampled_from([None, None, [], [{"a": 1}]])},
)
ASKED = TEXTS.map(lambda text: {"role": "user", "content": text})
SAID = TEXTS.map(lambda text: {"role": "assistant", "content": text})
CHAT = st.lists(ASKED | TURN, min_size=1, max_size=3)
TURNS = CHAT | st.lists(TURN, max_size=3)
SHARED = st.tuples(CHAT, SAID, SAID) | st.tuples(CHAT, TURN, TURN)
SHAREGPT = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "gpt", "system"]), "value": TEXTS})
SPOKEN = st.lists(
    st.sampled_from(
        ["\n\nHuman: Why? ", "\n\nAssistant:\u2003So.\x1f", "\n\nHuman:", "No.", "\x1e", "\n\nAssistant: Yes"]
    ),
    max_size=2,
).map("".join)
INTS = st.integers(0, 9) | st.sampled_from([0, -1, -2, 2**31 - 1, 2**31, 2**63, -5])
NUMBERS = st.sampled_from([None, 0, 1, -0.5, 1e300, 2**60 + 1, float("nan"), float("inf")])


def lists(of: st.SearchStrategy[Any], size: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(of, min_size=size, max_size=size)


def record(optional: dict[str, st.SearchStrategy[Any]] | None = None, **known: Any) -> Any:
    return st.fixed_dictionaries(known, optional=optional or {})


def two_chats(shared: tuple[list[Any], Any, Any], other: list[Any] | None = None) -> dict[str, Any]:
    turns, chosen, rejected = shared
    return {"chosen": [*turns, chosen], "rejected": [*(turns if other is None else other), rejected]}


# the rows of a file have one of these shapes
LAYOUTS: dict[str, list[st.SearchStrategy[dict[str, Any]]]] = {
    "TRL with a prompt, UltraFeedback": [
        record(prompt=EDGES, chosen=EDGES, rejected=EDGES),
        record(prompt=CHAT, chosen=EDGES, rejected=EDGES),
        record(prompt=TURNS, chosen=lists(SAID, 1), rejected=st.lists(SAID | TURN, max_size=2)),
        record(prompt=CHAT, chosen=lists(SAID, 1), rejected=lists(SAID, 1)),
        SHARED.map(lambda t: {"prompt": t[0][-1]["content"], **two_chats(t)}),
        st.tuples(SHARED, TEXTS).map(lambda t: {"prompt": t[1], **two_chats(t[0])}),
    ],
    "TRL without a prompt, HH-RLHF": [
        SHARED.map(two_chats),
        st.tuples(SHARED, ASKED | TURN).map(lambda t: two_chats(t[0], [*t[0][0][:-1], t[1]])),
        record(chosen=TURNS, rejected=TURNS),
        record(chosen=EDGES, rejected=EDGES),
        st.tuples(SPOKEN, SPOKEN, EDGES, EDGES).map(
            lambda t: {
                "chosen": f"\n\nHuman: Why?{t[0]}\n\nAssistant:{t[2]}",
                "rejected": f"\n\nHuman: Why?{t[0] or t[1]}\n\nAssistant:{t[3]}",
            }
        ),
    ],
    "LLaMA-Factory ranking, ShareGPT": [
        record({"system": EDGES}, conversations=lists(SHAREGPT, 1), chosen=SHAREGPT, rejected=SHAREGPT),
        record(conversations=st.lists(SHAREGPT, max_size=3), chosen=SHAREGPT, rejected=SHAREGPT),
    ],
    "LLaMA-Factory ranking, Alpaca": [
        record({"input": EDGES}, instruction=EDGES, chosen=TEXTS, rejected=TEXTS),
        record({"system": EDGES, "history": st.just([["a", "b"]])}, instruction=TEXTS, chosen=EDGES, rejected=EDGES),
    ],
    "generations": [
        record({"answer": EDGES, "reward": NUMBERS}, prompt=prompt, response=EDGES) for prompt in (EDGES, TURNS)
    ] + [record({"answer": NUMBERS}, prompt=EDGES, response=EDGES)],
    "d1 generations": [
        record(
            question=EDGES,
            generations=EDGES | st.sampled_from(["So.<|eot_id|><|eot_id|>", "A\nB<|endoftext|>\nC", "<|eot_id|>"]),
            ground_truth=EDGES,
            gen_length=INTS | st.just(256),
            steps=INTS | st.just(128),
        )
    ],
    "dLLM-RL training rows": [
        record({"ground_truth_answer": EDGES, "reward": NUMBERS}, prompt=asked, response=EDGES, step_map=lists(INTS, n))
        for asked, n in ((EDGES, 2), (TURNS, 1))
    ],
    "JetEngine": [
        st.integers(0, 3).flatmap(
            lambda n, prompt=prompt: record(
                {"prompt": prompt, "prompt_ids": lists(INTS, 2), "input_ids": lists(INTS, 2), "text": EDGES,
                 "logprobs": lists(st.floats(-9, 0), n) | lists(NUMBERS, 2)},
                token_ids=lists(INTS, n), first_unmask_times=lists(INTS, n) | lists(INTS, 2),
            )
        )
        for prompt in (EDGES, TURNS)
    ],
}  # fmt: skip
FORMS: dict[str, tuple[ModuleType, Any]] = {
    form.name: (module, form) for module in (preferences, responses) for form in module.FORMATS if form.views
}


@st.composite
def spoiled(draw: st.DrawFn, name: str) -> list[dict[str, Any]]:
    """Rows of a layout, some of which have a field of another type, one too many or one too few."""
    rows = draw(st.lists(draw(st.sampled_from(LAYOUTS[name])), min_size=1, max_size=5))
    for row in rows:
        match draw(st.integers(0, 49)):
            case 0:
                row[draw(st.sampled_from(sorted(row)))] = draw(ODD)
            case 1:
                row[draw(st.sampled_from(["tools", "images", "notes"]))] = draw(ODD)
            case 2:
                del row[draw(st.sampled_from(sorted(row)))]
    return rows


def by_columns(module: ModuleType, form: Any, shard: Shard) -> tuple[list[dict[str, Any]], list[Rejected]]:
    found = list(module.read_tables(form, shard))
    assert len({table.schema for table, _ in found}) <= 1
    return [row for table, _ in found for row in table.to_pylist()], [row for _, bad in found for row in bad]


def row_by_row(module: ModuleType, form: Any, shard: Shard) -> tuple[list[dict[str, Any]], list[Rejected]]:
    good, bad = parted(module.read_shard(form, shard))
    return module.as_table(good).to_pylist(), bad


def same(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)  # NaN is not equal to itself


def test_every_layout_with_a_view_is_looked_at() -> None:
    assert set(FORMS) == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_lines_read_in_columns_are_those_read_one_by_one(tmp_path: Path, name: str, data: st.DataObject) -> None:
    rows = data.draw(spoiled(name))
    ends = st.sampled_from([*["\n", "\r\n"] * 15, "\n\n", " \n", "\n \n", "x\n", "\n{", ""])
    file = tmp_path / "rows.jsonl"
    ascii_only = data.draw(st.booleans())  # else half a surrogate is bytes that are not UTF-8
    lines = (json.dumps(row, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass") for row in rows)
    file.write_bytes(b"".join(line + data.draw(ends).encode() for line in lines))
    found = by_columns(*FORMS[name], Shard(str(file)))
    expected = row_by_row(*FORMS[name], Shard(str(file)))
    assert same(found[0], expected[0])
    assert found[1] == expected[1]


ROW = b'{"prompt": "a", "chosen": "b", "rejected": "c"}'
STEPPED = b'{"token_ids": [1, 2], "first_unmask_times": [0, 1], "prompt_ids": [%s], "logprobs": %s}'


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("TRL with a prompt, UltraFeedback", ROW + ROW + b"\n\n" + ROW + b"\n"),  # three rows on three lines
        ("TRL with a prompt, UltraFeedback", ROW[:-1] + b"\n}\n" + ROW + ROW + b"\n"),
        ("TRL with a prompt, UltraFeedback", ROW + b"\n" + ROW.replace(b"b", b"\xff") + b"\n" + ROW),
        ("TRL with a prompt, UltraFeedback", ROW.replace(b'"b"', b'"b", "chosen": "d"') + b"\n" + ROW),
        ("TRL with a prompt, UltraFeedback", b"\xef\xbb\xbf" + ROW + b"\r\n" + ROW.replace(b'"b"', b'"\\u001cc"')),
        (
            "TRL with a prompt, UltraFeedback",
            b'{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "user", "content": "b"}, {"role": '
            b'"assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}\n',
        ),
        ("JetEngine", STEPPED % (b"3", b"[-1, -0.5]") + b"\n" + STEPPED % (b"3", b"[-1, -0.5, -2]")),
        ("JetEngine", STEPPED % (b"3", b"[-1, -0.5]") + b"\n" + STEPPED % (b"3", b"[-1, null]")),
        ("JetEngine", STEPPED % (b"3", b"[-1, -0.5]") + b"\n" + STEPPED % (b"2147483648", b"null")),
        ("JetEngine", STEPPED % (b"3, null", b"null") + b"\n" + STEPPED % (b"3", b"null") + b"\n"),
        (
            "JetEngine",
            STEPPED % (b"3", b"null")
            + b"\n"
            + STEPPED.replace(b"{", b'{"prompt": [{"role": "user", "content": "q"}], ') % (b"4", b"null"),
        ),
        *(
            ("generations", b"%s\n%s" % (line, line.replace(b"{", b'{"%s": %s, ' % odd)))
            for line in [b'{"prompt": "a", "response": "b"}']
            for odd in (
                *((b"notes", value) for value in (b"Inf", b"-Inf", b"-NaN", b"NaN", b"Infinity", b"1" * 5_000)),
                *((b"reward", value) for value in (b"Inf", b"-0", b"-0.0", b"1" * 400, b"NaN", b"-Infinity")),
                (b"notes", b"[" * 99_999 + b"]" * 99_999),
                (b"notes", b'{"a": ' * 2_000 + b"1" + b"}" * 2_000),
            )
        ),
    ],
)
def test_lines_at_the_edge_are_read_alike(tmp_path: Path, name: str, lines: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines)
    shard = Shard(str(tmp_path / "rows.jsonl"))
    found, expected = by_columns(*FORMS[name], shard), row_by_row(*FORMS[name], shard)
    assert same(found, expected)
    assert found[0] or found[1]


SAID_SO = {"prompt": "Why?", "response": "So."}


def doubled(name: str, *columns: list[Any]) -> pa.Table:
    """Two good rows, and a name that several columns have."""
    known = pa.Table.from_pylist([SAID_SO, SAID_SO | {"response": "No."}])
    for column in columns:
        known = known.append_column(name, pa.array(column))
    return known


@pytest.mark.parametrize(
    "table",
    [
        doubled("answer", ["1", "2"], ["3", "4"]),
        doubled("tools", [None, None], ["x", ""]),
        doubled("tools", ["", ""]),
        doubled("images", [[], [1]]),
        doubled("notes", pa.array(["a", "b"], pa.string_view())),
        doubled("notes", pa.array([b"\xff", b"b"]).view(pa.string())),
        doubled("reward", pa.array([1, 2], pa.int8())).slice(1),
        doubled("answer", pa.array([["a"], None], pa.large_list(pa.large_string()))),
    ],
)
def test_arrow_s_own_ways_are_read_alike(tmp_path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    shard = Shard(str(tmp_path / "rows.arrow"))
    found, expected = by_columns(*FORMS["generations"], shard), row_by_row(*FORMS["generations"], shard)
    assert found == expected
    assert len(found[0]) + len(found[1]) == len(table)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_arrow_columns_are_read_as_their_rows_are(tmp_path: Path, name: str, data: st.DataObject) -> None:
    rows = data.draw(spoiled(name))
    file = tmp_path / "rows.parquet"
    try:
        table = pa.Table.from_pylist(rows)
        for at, field in enumerate(table.schema):
            if pa.types.is_string(field.type) and data.draw(st.booleans()):
                other = table.column(at).cast(pa.large_string()).dictionary_encode()
                table = table.set_column(at, field.name, other)
        pq.write_table(table, file)
    except (pa.ArrowException, UnicodeError, OverflowError):
        return  # no table holds such rows
    found = by_columns(*FORMS[name], Shard(str(file)))
    expected = row_by_row(*FORMS[name], Shard(str(file)))
    assert same(found[0], expected[0])
    assert found[1] == expected[1]


# --- steps of Python ---


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts the lines of the package that Python runs, each time that it does."""
    package, lines = str(Path(dtrpo_ray.__file__).parent), {"run": 0}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(package):
            return None
        lines["run"] += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def chat(number: int, *sides: str) -> list[list[dict[str, str]]]:
    prompt = [{"role": "user", "content": f"Why {number}?"}]
    return [[*prompt, {"role": "assistant", "content": side}] for side in sides]


PLAIN: dict[str, Any] = {
    "text": lambda i: {"prompt": f"Why {i}?", "chosen": "So.", "rejected": "No."},
    "messages": lambda i: dict(zip(("chosen", "rejected"), chat(i, "So.", "No."), strict=True)),
    "UltraFeedback": lambda i: {"prompt": f"Why {i}?", **PLAIN["messages"](i)},
    "explicit": lambda i: {
        "prompt": [{"role": "user", "content": f"Why {i}?"}],
        "chosen": [{"role": "assistant", "content": "So."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    "HH-RLHF": lambda i: {s: f"\n\nHuman: Why {i}?\n\nAssistant: {s}" for s in ("chosen", "rejected")},
    "ShareGPT": lambda i: {
        "conversations": [{"from": "human", "value": f"Why {i}?"}],
        "chosen": {"from": "gpt", "value": "So."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "Alpaca": lambda i: {"instruction": f"Why {i}?", "input": "", "chosen": "So.", "rejected": "No."},
    "generations": lambda i: {"prompt": f"Why {i}?", "response": "So.", "reward": 1},
    "d1": lambda i: {
        **{"question": f"Why {i}?", "generations": "So.<|eot_id|>", "ground_truth": "1"},
        **{"gen_length": 128, "steps": 64},
    },
    "training rows": lambda i: {"prompt": f"Why {i}?", "response": "So.", "step_map": [1, 0]},
    "JetEngine": lambda i: {"prompt_ids": [i], "token_ids": [1, 2], "first_unmask_times": [1, 0], "text": "So."},
}


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", PLAIN)
def test_many_rows_take_as_many_lines_of_python_as_few(
    tmp_path: Path, shared_data: Path, name: str, ending: str
) -> None:
    """Reading, checks, ids and the table: of one batch, whatever its rows. Only the libraries see them one by one."""
    module, tokenize = (
        (responses, tokenize_responses)
        if name in ("generations", "d1", "training rows", "JetEngine")
        else (preferences, tokenize_preferences)
    )
    target = Target(load_tokenizer(shared_data / "tokenizer_qwen2_sdar"), 4, 512, 512, shift=0)
    run = []
    for count in (1, 10, 1_000):
        file, rows = tmp_path / f"rows{count}{ending}", [PLAIN[name](i) for i in range(count)]
        if ending == ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), file)
        form = module.recognise(str(file))
        with counted() as lines:
            [(table, refused)] = module.read_tables(form, Shard(str(file)))
            made, unfit = tokenize(table, target)
        assert (len(made), refused, unfit) == (count, [], [])
        run.append(lines["run"])
    assert run[1] == run[2]  # the first one also fills what the target keeps
