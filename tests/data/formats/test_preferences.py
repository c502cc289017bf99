"""Preference files -> pairs of text: every format, every refusal, pairing, and the counts of real files."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import SHARED
from read_rows import read_preferences

from dtrpo_ray.data.formats import files
from dtrpo_ray.data.formats.dialogue import PROMPTS
from dtrpo_ray.data.formats.files import Shard
from dtrpo_ray.data.formats.parsing import Columns, is_about
from dtrpo_ray.data.formats.preferences import PREFERENCE_FORMATS, PreferenceRow, preference_format
from dtrpo_ray.data.prepare import check_data
from dtrpo_ray.data.tables import quarantine_lines
from dtrpo_ray.errors import DataError

Value = dict[str, Any]
ASK = {"role": "user", "content": "Why?"}
ASKED = [ASK]


def turn(text: str, role: str = "assistant") -> Value:
    return {"role": role, "content": text}


def said(text: str, speaker: str = "gpt") -> Value:
    return {"from": speaker, "value": text}


def hh(*turns: str) -> str:
    return "".join(
        f"\n\n{name}: {text}" for name, text in zip(("Human", "Assistant") * len(turns), turns, strict=False)
    )


# Each format: its rows, and what they become.
LAYOUTS: dict[str, tuple[Value, Any]] = {
    "TRL text": ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "Why?"),
    "TRL messages": ({"prompt": ASKED, "chosen": [turn("So.")], "rejected": [turn("No.")]}, ASKED),
    "TRL without a prompt": ({"chosen": [ASK, turn("So.")], "rejected": [ASK, turn("No.")]}, ASKED),
    "HH-RLHF": ({"chosen": hh("Why?", "So."), "rejected": hh("Why?", "No.")}, ASKED),
    "UltraFeedback": (
        {"prompt": "Why?", "prompt_id": "7", "chosen": [ASK, turn("So.")], "rejected": [ASK, turn("No.")]}
        | {"messages": [ASK, turn("So.")], "score_chosen": 8.0, "score_rejected": 3.0},
        ASKED,
    ),
    "UltraFeedback, answers alone": ({"prompt": "Why?", "chosen": [turn("So.")], "rejected": [turn("No.")]}, ASKED),
    "ShareGPT": ({"conversations": [said("Why?", "human")], "chosen": said("So."), "rejected": said("No.")}, ASKED),
    "Alpaca": ({"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No."}, ASKED),
}
TRL = LAYOUTS["TRL text"][0]


def write(path: Path, rows: list[Any]) -> Path:
    """The same rows as whatever kind of file the name asks for."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_format_in_every_kind_of_file_gives_the_same_pair(tmp_path: Path, layout: str, name: str) -> None:
    row, prompt = LAYOUTS[layout]
    path = write(tmp_path / name, [row, row])
    expected = [PreferenceRow(prompt, "So.", "No.", origin=f"{path}:{number}") for number in (1, 2)]
    assert read_preferences(path) == (expected, [])


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (
            {"chosen": hh("a", "b", "c", " So. "), "rejected": hh("a", "b", "c", "No.")},
            [turn("a", "user"), turn("b"), turn("c", "user")],
        ),
        (
            {"conversations": [said("Rules.", "system"), said("a", "human"), said("b"), said("c", "human")]}
            | {"chosen": said("So."), "rejected": said("No.")},
            [turn("Rules.", "system"), turn("a", "user"), turn("b"), turn("c", "user")],
        ),
        (
            {"instruction": "c", "input": "d", "system": "Rules.", "history": [["a", "b"]], "chosen": "So."}
            | {"rejected": "No."},
            [turn("Rules.", "system"), turn("a", "user"), turn("b"), turn("c\nd", "user")],
        ),
    ],
    ids=["HH-RLHF", "ShareGPT", "Alpaca"],
)
def test_a_longer_dialogue_keeps_its_turns(tmp_path: Path, row: Value, prompt: Any) -> None:
    (pair,), rejected = read_preferences(write(tmp_path / "pairs.jsonl", [row]))
    assert (pair.prompt, pair.chosen, pair.rejected, rejected) == (prompt, "So.", "No.", [])


MESSAGES, GPT = LAYOUTS["TRL messages"][0], LAYOUTS["ShareGPT"][0]
IMPLICIT, ULTRA, ALPACA = (LAYOUTS[name][0] for name in ("TRL without a prompt", "UltraFeedback", "Alpaca"))
HH = LAYOUTS["HH-RLHF"][0]
REFUSED: list[tuple[Value, Any, str, str]] = [
    (TRL, {k: v for k, v in TRL.items() if k != "prompt"}, "missing field", "prompt"),
    (TRL, TRL | {"rejected": None}, "missing field", "rejected"),
    (TRL, [1, 2], "not an object", "the row is a JSON list"),
    (TRL, TRL | {"chosen": 3}, "wrong type", "chosen is not a list of messages"),
    (TRL, TRL | {"chosen": " \n"}, "empty side", "chosen has no text"),
    (TRL, TRL | {"rejected": ""}, "empty side", "rejected has no text"),
    (TRL, TRL | {"prompt": " "}, "empty prompt", "the prompt has no text"),
    (TRL, TRL | {"rejected": "So. "}, "identical sides", "chosen and rejected are the same text"),
    (TRL, TRL | {"chosen": "\ud83d"}, "bad UTF-8", "surrogates not allowed"),
    (TRL, TRL | {"images": [1]}, "unsupported field", "images belongs to the prompt"),
    (TRL, TRL | {"tools": "search"}, "wrong type", "tools is text that is no JSON"),
    (MESSAGES, MESSAGES | {"prompt": []}, "empty prompt", "the prompt has no text"),
    (
        MESSAGES,
        MESSAGES | {"prompt": [turn("x", "function")]},
        "unknown role",
        "'function' in prompt; known are system",
    ),
    (MESSAGES, MESSAGES | {"prompt": ["x"]}, "wrong type", "prompt is not a list of messages"),
    (MESSAGES, MESSAGES | {"prompt": [turn([], "user")]}, "wrong type", "prompt.content is a list, not text"),  # type: ignore[arg-type]
    (MESSAGES, MESSAGES | {"chosen": [turn("So."), turn("!")]}, "no answer", "chosen must be one assistant turn"),
    (MESSAGES, MESSAGES | {"chosen": [turn("So.", "user")]}, "no answer", "chosen does not end in an assistant"),
    (
        MESSAGES,
        MESSAGES | {"chosen": [turn("x") | {"tool_calls": [1]}]},
        "wrong type",
        "chosen.tool_calls is not a list of objects",
    ),
    (
        IMPLICIT,
        IMPLICIT | {"chosen": [turn("Who?", "user"), turn("So.")]},
        "prompts differ",
        "in a turn that is not the assistant's",
    ),
    (IMPLICIT, IMPLICIT | {"chosen": [ASK]}, "no answer", "chosen does not end in an assistant turn"),
    (IMPLICIT, IMPLICIT | {"chosen": []}, "no answer", "chosen does not end in an assistant turn"),
    (IMPLICIT, {"chosen": [turn("So.")], "rejected": [turn("No.")]}, "empty prompt", "the prompt has no text"),
    (HH, HH | {"chosen": hh("Who?", "So.")}, "prompts differ", "in a turn that is not the assistant's"),
    (HH, HH | {"chosen": hh("Why?", "No.", "b", "So.")}, "prompts differ", "is the beginning of the other"),
    (HH, HH | {"chosen": hh("Why?", "")}, "empty side", "chosen has no text"),
    (HH, HH | {"rejected": hh("Why?")}, "no answer", "rejected does not end in an assistant turn"),
    (HH, HH | {"chosen": "So."}, "not a dialogue", "chosen is text without a prompt"),
    (ULTRA, ULTRA | {"prompt": "Who?"}, "prompts differ", "the prompt is not the beginning"),
    (GPT, GPT | {"chosen": said("So.", "robot")}, "unknown role", "'robot' in chosen; known are system, developer"),
    (GPT, GPT | {"chosen": {"value": "So."}}, "unknown role", "'None' in chosen"),
    (GPT, GPT | {"chosen": said("So.") | {"role": "user"}}, "unknown role", "in chosen"),
    (GPT, GPT | {"conversations": 5}, "wrong type", "conversations is not a list of messages"),
    (ALPACA, ALPACA | {"history": ["a"]}, "wrong type", "history is not a list of [question, answer]"),
    (ALPACA, ALPACA | {"history": 5}, "wrong type", "history is not a list of [question, answer]"),
    (ALPACA, ALPACA | {"instruction": "", "input": ""}, "empty prompt", "the prompt has no text"),
]


@pytest.mark.parametrize(("good", "bad", "reason", "detail"), REFUSED)
def test_a_bad_row_is_refused_by_name_and_the_others_are_imported(
    tmp_path: Path, good: Value, bad: Any, reason: str, detail: str
) -> None:
    path = write(tmp_path / "pairs.jsonl", [good, bad, good])
    rows, rejected = read_preferences(path)
    assert [row.origin for row in rows] == [f"{path}:1", f"{path}:3"]
    assert [(r.origin, r.reason) for r in rejected] == [(f"{path}:2", reason)]
    assert detail in rejected[0].detail


def test_lines_that_cannot_be_decoded_spoil_themselves_alone(tmp_path: Path) -> None:
    good = json.dumps(TRL).encode()
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + b"\n".join([good, b"{", good.replace(b"So.", b"S\xff."), b"", b"[" * 10**5, good])
    )
    rows, rejected = read_preferences(path)
    assert [row.origin for row in rows] == [f"{path}:1", f"{path}:6"]
    found = [(r.origin, r.reason) for r in rejected]
    assert found == [(f"{path}:2", "bad JSON"), (f"{path}:3", "bad UTF-8"), (f"{path}:5", "bad JSON")]


def test_a_stray_byte_in_a_json_list_or_a_parquet_column_spoils_its_row_alone(tmp_path: Path) -> None:
    listed = tmp_path / "pairs.json"
    listed.write_bytes(json.dumps([TRL, TRL | {"chosen": "@"}]).encode().replace(b"@", b"\xff"))
    table = pa.table({"prompt": ["Why?"] * 2, "chosen": _unchecked([b"So.", b"\xff"]), "rejected": ["No."] * 2})
    pq.write_table(table, tmp_path / "pairs.parquet")
    for path in (listed, tmp_path / "pairs.parquet"):
        rows, rejected = read_preferences(path)
        assert [row.origin for row in rows] == [f"{path}:1"]
        assert [(r.origin, r.reason) for r in rejected] == [(f"{path}:2", "bad UTF-8")]


def _unchecked(values: list[bytes]) -> pa.Array:
    """A string array of bytes that are no UTF-8, as other writers make them."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
columns = st.sampled_from(
    ["prompt", "chosen", "rejected", "conversations", "instruction", "history", "system", "tools"]
)


@given(
    st.lists(json_values | st.dictionaries(columns, json_values, max_size=6), max_size=8),
    st.sampled_from(list(LAYOUTS)),
)
def test_whatever_the_rows_imported_and_rejected_add_up(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], layout: str
) -> None:
    path = write(tmp_path_factory.mktemp("any") / "pairs.jsonl", [LAYOUTS[layout][0], *values])
    rows, rejected = read_preferences(path)
    assert len(rows) + len(rejected) == 1 + len(values)
    lines = sorted(int(item.origin.rsplit(":", 1)[1]) for item in [*rows, *rejected])
    assert lines == list(range(1, len(values) + 2))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "kto.json",
            b'[{"messages": []}]',
            "no format of preferences has these columns: messages; known formats: pairs",
        ),
        ("empty.jsonl", b"\n\n", r"no format of preferences has these columns: none \(no row is a JSON object\)"),
        (
            "broken.json",
            b'[{"prompt": ',
            r"no JSON list of rows \(Expecting value\); rows one to a line belong in a .jsonl file",
        ),
        ("text.json", b'"x"', r"no JSON list of rows \(found str\); rows one"),
        (
            "pairs.xlsx",
            b"PK",
            r"unknown kind of file; expected a name ending in .json, .jsonl, .csv \(also .gz, .zst\)",
        ),
        ("pairs.csv", b"prompt,chosen,rejected", r"no format of preferences has these columns: none"),
        ("pairs.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "cannot be read .* fetch the file again"),
        ("pairs.jsonl.gz", b"plain", "cannot be read"),
        ("pairs.jsonl.zst", b"plain", "cannot be read"),
        ("pairs.parquet", b"PAR1", "cannot be read"),
        ("gone.jsonl", None, "cannot be read .*No such file"),
    ],
)
def test_a_file_that_gives_no_rows_is_an_error_that_names_it(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_preferences(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_an_unknown_file_is_told_every_known_format(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_preferences(write(tmp_path / "pairs.parquet", [{"question": "a", "answer": "b"}]))
    assert "answer, question" in str(caught.value)
    assert all(form.name in str(caught.value) for form in PREFERENCE_FORMATS)


def test_the_llama_factory_demo_imports_whole(shared_data: Path) -> None:
    rows, rejected = read_preferences(shared_data / "llamafactory_dpo_demo" / "dpo_en_demo.json")
    assert (len(rows), len(rejected)) == (300, 0)
    assert Counter(len(row.prompt) for row in rows) == {1: 114, 2: 80, 3: 1, 5: 57, 7: 46, 9: 1, 13: 1}


def test_hh_harmless_imports_but_for_four_rows(shared_data: Path) -> None:
    rows, rejected = read_preferences(shared_data / "hh_harmless_base_test" / "test.jsonl.gz")
    assert (len(rows), len(rejected)) == (2308, 4)
    assert Counter(r.reason for r in rejected) == {"empty side": 4}
    assert sum("turns after the first that differ" in row.ignored for row in rows) == 5


def test_the_quarantine_names_each_row_once_and_quotes_none(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [TRL, TRL | {"chosen": "secret", "rejected": "secret"}, 5])
    _, rejected = read_preferences(path)
    (tmp_path / "quarantine.jsonl").write_text(quarantine_lines(rejected))
    text = (tmp_path / "quarantine.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [
        {"origin": f"{path}:2", "reason": "identical sides", "detail": "chosen and rejected are the same text"},
        {"origin": f"{path}:3", "reason": "not an object", "detail": "the row is a JSON int"},
    ]
    assert "secret" not in text


def test_reading_files_needs_neither_torch_nor_ray_nor_transformers() -> None:
    code = "import sys, dtrpo_ray.data.formats.responses; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


KTO: dict[str, tuple[Value, str, Any]] = {
    "TRL unpaired": ({"prompt": "Why?", "completion": "So.", "label": True}, "completion", "Why?"),
    "TRL unpaired messages": ({"prompt": ASKED, "completion": [turn("So.")], "label": True}, "completion", ASKED),
    "messages": ({"messages": [ASK, turn("So.")], "label": True}, "messages", ASKED),
    "ShareGPT KTO": ({"conversations": [said("Why?", "human"), said("So.")], "kto_tag": True}, "conversations", ASKED),
    "Alpaca KTO": ({"instruction": "Why?", "output": "So.", "kto_tag": True}, "output", ASKED),
}


def answered(row: Value, column: str, text: str, good: bool) -> Value:
    return {k: good if isinstance(v, bool) else v for k, v in row.items()} | {
        column: json.loads(json.dumps(row[column]).replace("So.", text))
    }


@pytest.mark.parametrize("layout", KTO)
def test_unpaired_answers_of_a_prompt_meet_in_order_and_the_rest_is_refused(tmp_path: Path, layout: str) -> None:
    row, column, prompt = KTO[layout]
    labels = [("a", True), ("b", True), ("x", False), ("c", True), ("y", False)]
    path = write(tmp_path / "kto.jsonl", [answered(row, column, text, good) for text, good in labels])
    rows, rejected = read_preferences(path)
    assert rows == [
        PreferenceRow(prompt, "a", "x", f"{path}:3", origin=f"{path}:1"),
        PreferenceRow(prompt, "b", "y", f"{path}:5", origin=f"{path}:2"),
    ]
    assert [(r.origin, r.reason) for r in rejected] == [(f"{path}:4", "no partner")]
    assert sum(1 + (r.rejected_origin is not None) for r in rows) + len(rejected) == len(labels)


def test_unpaired_answers_read_share_by_share_make_the_same_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file is read several times, each time for a share of its prompts; a row without a prompt is in one."""
    rows: list[Any] = [{"prompt": f"{i % 17}", "completion": f"{i}", "label": i % 3 == 0} for i in range(120)] + [
        {"prompt": "x"},
        "text",
    ]
    path = write(tmp_path / "kto.jsonl", rows)
    pairs, refused = read_preferences(path)
    monkeypatch.setattr(files, "SHARE_BYTES", path.stat().st_size // 5)
    form = preference_format(str(path))
    shards = form.shards(str(path))
    assert len(shards) == 6
    assert [bool(list(form.read(shard))) for shard in shards] == [True] * 6
    shared_pairs, shared_refused = read_preferences(path)
    assert sorted(shared_pairs, key=str) == sorted(pairs, key=str)
    assert sorted(shared_refused, key=str) == sorted(refused, key=str)
    assert 2 * len(pairs) + len(refused) == 122


def test_the_real_kto_file_has_one_prompt_with_both_labels(shared_data: Path) -> None:
    rows, rejected = read_preferences(shared_data / "llamafactory_dpo_demo" / "kto_en_demo.json")
    assert (len(rows), Counter(r.reason for r in rejected)) == (1, {"no partner": 298})
    assert sum(1 + (r.rejected_origin is not None) for r in rows) + len(rejected) == 300


def test_texts_without_a_prompt_share_their_first_words() -> None:
    rows = [{"chosen": "The sky is blue.", "rejected": "The sky is bright green."}]
    (row,), rejected = _read(rows)
    assert (row.prompt, row.chosen, row.rejected, rejected) == ("The sky is", " blue.", " bright green.", [])
    _, (refused,) = _read([{"chosen": "Blue.", "rejected": "Green."}])
    assert refused.reason == "no shared prompt"


def _read(rows: list[Any]) -> Any:
    with TemporaryDirectory() as folder:
        return read_preferences(write(Path(folder) / "pairs.jsonl", rows))


SYSTEM = turn("Rules.", "system")
# the columns of public sets -> the pair, and what is left out
PUBLIC: dict[str, tuple[Value, Any, list[str]]] = {
    "orca_dpo_pairs": (
        {"system": "Rules.", "question": "Why?", "chosen": "So.", "rejected": "No."},
        [SYSTEM, ASK],
        [],
    ),
    "orca, no system prompt": ({"system": "", "question": "Why?", "chosen": "So.", "rejected": "No."}, ASKED, []),
    "distilabel orca": (
        {"system": "", "input": "Why?", "chosen": "So.", "rejected": "No.", "rating": [9.0, 1.0], "status": "x"}
        | {"generations": ["So.", "No."], "labelling_model": "m", "original_chosen": "So."},
        ASKED,
        ["generations", "labelling_model", "original_chosen", "rating", "status"],
    ),
    "truthy-dpo": (
        {"id": "1", "source": "t", "system": "Rules.", "prompt": "Why?", "chosen": "So.", "rejected": "No."},
        [SYSTEM, ASK],
        ["id", "source"],
    ),
    "TRL#2385": (MESSAGES | {"system": [SYSTEM]}, [SYSTEM, ASK], []),
    "a system prompt beside sides": (IMPLICIT | {"system_prompt": "Rules."}, [SYSTEM, ASK], []),
    "orpo-dpo-mix": (IMPLICIT | {"prompt": None, "question": "Why?", "source": "m"}, ASKED, ["source"]),
    "a prompt with white space": (ULTRA | {"prompt": " Why?\n"}, ASKED, ["messages", "prompt_id"]),
    "Skywork": (IMPLICIT | {"source": "m"}, ASKED, ["source"]),
    "Tulu 3": (IMPLICIT | {"prompt": "Why?", "id": "1", "chosen_model": "m"}, ASKED, ["chosen_model", "id"]),
    "roles with capitals": (
        {"chosen": [turn("Why?", "Human"), turn("So.", "Assistant")], "rejected": IMPLICIT["rejected"]},
        ASKED,
        [],
    ),
    "user and assistant in `from`": (
        {"conversations": [said("Why?", "user")], "chosen": said("So.", "assistant"), "rejected": said("No.")},
        ASKED,
        [],
    ),
    "developer": (MESSAGES | {"prompt": [turn("Rules.", "developer"), ASK]}, [SYSTEM, ASK], []),
    "parts of text": (
        MESSAGES | {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?", "image": None}]}]},
        ASKED,
        [],
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_set_comes_in_whole(tmp_path: Path, name: str) -> None:
    row, prompt, ignored = PUBLIC[name]
    (pair,), rejected = read_preferences(write(tmp_path / "pairs.jsonl", [row]))
    assert (pair.prompt, pair.chosen, pair.rejected, rejected) == (prompt, "So.", "No.", [])
    assert set(pair.ignored) - {"score_chosen", "score_rejected"} == set(ignored)


@pytest.mark.parametrize("good", [TRL, MESSAGES, IMPLICIT, ULTRA, GPT, ALPACA, HH, *(row for row, *_ in KTO.values())])
@given(name=st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12) | st.sampled_from([*PROMPTS, "tools"]))
def test_no_column_disappears(tmp_path_factory: pytest.TempPathFactory, good: Value, name: str) -> None:
    """A column that no format reads refuses its row, unless its name is on the written list or the task's."""
    path = write(tmp_path_factory.mktemp("any") / "pairs.jsonl", [{name: "SECRET"} | good] * 2)
    rows, rejected = read_preferences(path)
    for row in rows:
        assert "SECRET" not in good.values()
        assert "SECRET" in str(row) or name in good or (name in row.ignored and is_about(name))
    assert rows or rejected
    columns = Columns(ignored=frozenset([name]))
    if name not in good:
        named = {"unknown column", "unsupported field"}
        assert {r.reason for r in rejected} <= named | {"no partner", "prompts differ", "wrong type"}
        form = preference_format(str(path), columns)
        assert all(not isinstance(row, PreferenceRow) or name in row.ignored for row in form.read(Shard(str(path))))


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "function_call", "name", "weight"])
@pytest.mark.parametrize("value", ["SECRET", 0.5, {"name": "SECRET"}])
def test_no_field_of_a_message_disappears(key: str, value: Any) -> None:
    """Text goes to the chat template, which writes it or refuses its row; anything else is refused here."""
    for field in ("prompt", "chosen", "rejected"):
        row = MESSAGES | {field: [message | {key: value} for message in MESSAGES[field]]}
        rows, refused = _read([row])
        if value == "SECRET":
            assert ("SECRET" in str(rows), refused) == (True, [])
        else:
            assert (rows, refused[0].reason, key in refused[0].detail) == ([], "unsupported field", True)
        assert not _read([MESSAGES | {field: [message | {key: None} for message in MESSAGES[field]]}])[1]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "default": None}}}


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_tool_calls_go_with_the_messages_without_the_nulls_of_parquet(as_text: bool) -> None:
    calls, tools = (json.dumps([value]) if as_text else [value] for value in (CALL, TOOL))
    asked = [ASK, turn("", "assistant") | {"content": None, "tool_calls": calls}, turn("2", "tool") | {"name": "add"}]
    (pair,), _ = _read([MESSAGES | {"prompt": asked, "tools": tools}])
    assert pair.prompt == [
        ASK | {"tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]},
        turn("") | {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
        turn("2", "tool") | {"name": "add"},
    ]
    openai = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}  # JSON text in JSON
    asked[1] = turn("", "assistant") | {"content": None, "tool_calls": [openai]}
    (same,), _ = _read([MESSAGES | {"prompt": asked, "tools": tools}])
    assert same.prompt == pair.prompt
    openai["function"] = {"name": "add", "arguments": "1, 2"}
    assert "arguments '1, 2' is no JSON object" in _read([MESSAGES | {"prompt": asked}])[1][0].detail
    (pair,), _ = _read([TRL | {"tools": tools}])
    assert [message["role"] for message in pair.prompt] == ["user"]


def test_a_task_names_its_columns(tmp_path: Path) -> None:
    row = {"asked": "Why?", "notes": "x", "chosen": "It is so.", "rejected": "It is not."}
    path = write(tmp_path / "pairs.jsonl", [row])
    assert [r.reason for r in read_preferences(path)[1]] == ["unknown column"]
    columns = Columns({"prompt": "asked"}, frozenset(["notes"]))
    (pair,) = preference_format(str(path), columns).read(Shard(str(path)))
    assert pair == PreferenceRow("Why?", "It is so.", "It is not.", origin=f"{path}:1")
    assert pair.ignored == ("notes",)
    with pytest.raises(DataError, match=r"has no column 'asekd', which task\.columns names"):
        preference_format(str(path), Columns({"prompt": "asekd"}))


def test_a_misspelt_pair_is_no_prompt() -> None:
    with TemporaryDirectory() as folder:
        file = write(Path(folder) / "pairs.jsonl", [{"prompt": "Why?", "choosen": "So.", "rejected": "No."}])
        (report,) = check_data(str(file))
    assert report.totals == {"rows": 1, "good": 0, "refused": {"unknown column": 1}}
    assert "choosen" in report.refused[0].detail


CASES = SHARED.parent / "cases" / "data"


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases of the field are not beside this clone")
@pytest.mark.parametrize(
    ("file", "good", "reasons", "prompt"),
    [
        ("01-orca/orca.jsonl", 4, {}, [turn("How much does a cup of coffee cost in Paris?", "user")]),
        ("01-orca/distilabel.jsonl", 2, {}, None),
        ("03-system-column/truthy.jsonl", 2, {}, None),
        ("03-system-column/trl2385.jsonl", 1, {}, [turn("Talk like a pirate.", "system"), turn("Hi", "user")]),
        ("03-system-column/system_prompt.jsonl", 1, {}, [turn("Talk like a pirate.", "system"), turn("Hi", "user")]),
        ("03-system-column/implicit.jsonl", 1, {}, [turn("Talk like a pirate.", "system"), turn("Hi", "user")]),
        ("05-roles/caps.jsonl", 1, {}, None),
        ("05-roles/chatgpt.jsonl", 1, {}, None),
        ("05-roles/developer.jsonl", 1, {}, [turn("Be brief.", "system"), turn("Hi", "user")]),
        ("06-null-prompt/orpo.jsonl", 3, {}, None),
        ("10-reasoning-field/reasoning.jsonl", 3, {}, None),
        ("10-reasoning-field/reasoning.parquet", 3, {}, None),
        ("12-sharegpt-system/sg.jsonl", 1, {"prompts differ": 1}, None),
        ("14-prefill/empty_assistant.jsonl", 2, {}, None),
        ("15-content-parts/parts.jsonl", 1, {}, [turn("Hi", "user")]),
        ("16-files/jsonl_named_json.json", 4, {}, "train q0"),
        ("16-files/pairs.csv", 1, {}, "q"),
        ("16-files/clone", 4, {}, "train q0"),
        ("16-files/clone2", 4, {}, "train q0"),
        ("18-chatml-text/with_end.jsonl", 1, {}, None),
    ],
)
def test_the_cases_of_the_field(file: str, good: int, reasons: dict[str, int], prompt: Any) -> None:
    rows, rejected = read_preferences(CASES / file)
    assert (len(rows), Counter(r.reason for r in rejected)) == (good, reasons)
    assert prompt is None or rows[0].prompt == prompt
