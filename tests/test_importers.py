"""Preference files -> pairs of text -> preference/v1: every format, every refusal, and the counts of real files."""

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from dtrpo_ray.errors import DataError, ModelError
from dtrpo_ray.importers import (
    FORMATS,
    PreferenceRow,
    Rejected,
    read_preferences,
    tokenize_preferences,
    write_quarantine,
)
from dtrpo_ray.records import PREFERENCE, check_table, read_table
from dtrpo_ray.tokenizer import character_tokenizer, load_tokenizer

DATA = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
DPO_DEMO = DATA / "llamafactory_dpo_demo" / "dpo_en_demo.json"
HH_TEST = DATA / "hh_harmless_base_test" / "test.jsonl.gz"

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
    expected = [PreferenceRow(prompt, "So.", "No.", f"{path}:{number}") for number in (1, 2)]
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
    (TRL, TRL | {"tools": [{"name": "search"}]}, "unsupported field", "tools belongs to the prompt"),
    (MESSAGES, MESSAGES | {"prompt": []}, "empty prompt", "the prompt has no text"),
    (MESSAGES, MESSAGES | {"prompt": [turn("x", "tool")]}, "unknown role", "'tool' in prompt; known are system"),
    (MESSAGES, MESSAGES | {"prompt": ["x"]}, "wrong type", "prompt is not a list of messages"),
    (MESSAGES, MESSAGES | {"prompt": [turn([], "user")]}, "wrong type", "prompt.content is a list, not text"),  # type: ignore[arg-type]
    (MESSAGES, MESSAGES | {"chosen": [turn("So."), turn("!")]}, "no answer", "chosen must be one assistant turn"),
    (MESSAGES, MESSAGES | {"chosen": [turn("So.", "user")]}, "no answer", "chosen must be one assistant turn"),
    (MESSAGES, MESSAGES | {"chosen": [turn("x") | {"tool_calls": [1]}]}, "unsupported field", "tool_calls in chosen"),
    (IMPLICIT, IMPLICIT | {"chosen": [turn("Who?", "user"), turn("So.")]}, "prompts differ", "before their last turn"),
    (IMPLICIT, IMPLICIT | {"chosen": [ASK]}, "no answer", "chosen does not end in an assistant turn"),
    (IMPLICIT, IMPLICIT | {"chosen": []}, "no answer", "chosen does not end in an assistant turn"),
    (IMPLICIT, {"chosen": [turn("So.")], "rejected": [turn("No.")]}, "empty prompt", "the prompt has no text"),
    (HH, HH | {"chosen": hh("Who?", "So.")}, "prompts differ", "before their last turn"),
    (HH, HH | {"chosen": hh("Why?", "a", "b", "So.")}, "prompts differ", "before their last turn"),
    (HH, HH | {"chosen": hh("Why?", "")}, "empty side", "chosen has no text"),
    (HH, HH | {"rejected": hh("Why?")}, "no answer", "rejected does not end in an assistant turn"),
    (HH, HH | {"chosen": "So."}, "not a dialogue", "chosen is text without a prompt"),
    (ULTRA, ULTRA | {"prompt": "Who?"}, "prompts differ", "the prompt is not a user turn"),
    (GPT, GPT | {"chosen": said("So.", "robot")}, "unknown role", "'robot' in chosen; known are system, human, gpt"),
    (GPT, GPT | {"chosen": turn("So.")}, "unknown role", "'None' in chosen"),
    (GPT, GPT | {"conversations": "Why?"}, "wrong type", "conversations is not a list of messages"),
    (ALPACA, ALPACA | {"history": ["a"]}, "wrong type", "history is not a list of [question, answer]"),
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
            b'[{"messages": [], "label": true}]',
            "no known preference format: label, messages; known are LLaMA",
        ),
        ("empty.jsonl", b"\n\n", r"no known preference format: none \(no row is a JSON object\)"),
        ("broken.json", b'[{"prompt": ', "not JSON .* rows one to a line belong in a .jsonl file"),
        ("object.json", b'{"prompt": "x"}', "holds a JSON dict; expected a list of rows"),
        ("pairs.csv", b"prompt,chosen,rejected", r"unknown kind of file; expected a name ending in .json, .jsonl"),
        ("pairs.jsonl.gz", gzip.compress(b"{}" * 99)[:-9], "cannot be read .* fetch the file again"),
        ("pairs.jsonl.gz", b"plain", "cannot be read"),
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
    assert all(form.name in str(caught.value) for form in FORMATS)


def test_the_llama_factory_demo_imports_whole() -> None:
    if not DPO_DEMO.exists():
        pytest.skip(f"{DPO_DEMO} is not here")
    rows, rejected = read_preferences(DPO_DEMO)
    assert (len(rows), len(rejected)) == (300, 0)
    assert Counter(len(row.prompt) for row in rows) == {1: 114, 2: 80, 3: 1, 5: 57, 7: 46, 9: 1, 13: 1}


def test_hh_harmless_imports_but_for_nine_rows() -> None:
    if not HH_TEST.exists():
        pytest.skip(f"{HH_TEST} is not here")
    rows, rejected = read_preferences(HH_TEST)
    assert (len(rows), len(rejected)) == (2303, 9)
    assert len(rows) + len(rejected) == 2312
    assert Counter(r.reason for r in rejected) == {"prompts differ": 5, "empty side": 4}
    lines = [int(r.origin.rsplit(":", 1)[1]) for r in rejected]
    assert lines == [87, 517, 926, 1104, 1255, 1689, 1951, 1953, 2037]


DIGITS = character_tokenizer("0123456789")
EOS, MASK = 10, 11


def pair(prompt: str = "12", chosen: str = "3", rejected: str = "4", origin: str = "f:1") -> PreferenceRow:
    return PreferenceRow(prompt, chosen, rejected, origin)


def test_a_pair_becomes_a_row_of_preference_v1_by_hand() -> None:
    table, rejected = tokenize_preferences([pair("12", "345", "6")], DIGITS, 4, 512, 512)
    assert rejected == []
    assert table.schema.equals(PREFERENCE, check_metadata=True)
    row = table.to_pylist()[0]
    assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == ([1, 2], [3, 4, 5, EOS, EOS, EOS], [6, EOS])
    assert {row[name] for name in PREFERENCE.names if "steps" in name or "reward" in name} == {None}
    assert (row["contract_version"], row["block_size"], row["mask_id"]) == (1, 4, MASK)
    assert row["row_id"] == "574b7c61614740fd"  # printf '["12","345","6"]' | sha256sum | cut -c1-16
    assert row["prompt_id"] == "f9cacf3cb91a12e0"


def test_ids_follow_the_content_and_not_the_place() -> None:
    rows = [pair(origin="a:1"), pair(chosen="5"), pair("13"), pair(chosen="4", rejected="3")]
    first, _ = tokenize_preferences(rows, DIGITS, 4, 512, 512)
    again, _ = tokenize_preferences([pair(origin="b:7"), *rows[:0:-1]], DIGITS, 4, 512, 512)
    assert set(first["row_id"].to_pylist()) == set(again["row_id"].to_pylist())
    assert len(set(first["row_id"].to_pylist())) == 4
    assert len(set(first["prompt_id"].to_pylist())) == 2


def test_a_long_prompt_loses_its_beginning_and_the_grid_follows() -> None:
    table, rejected = tokenize_preferences([pair("123456789")], DIGITS, 4, 6, 512)
    assert rejected == []
    assert table["prompt_ids"].to_pylist() == [[4, 5, 6, 7, 8, 9]]
    assert table["chosen_ids"].to_pylist() == [[3, EOS]]


@pytest.mark.parametrize(("most", "imported"), [(5, 0), (6, 1)])
def test_the_limit_counts_a_response_as_stored(most: int, imported: int) -> None:
    table, rejected = tokenize_preferences([pair("12", "345", "6")], DIGITS, 4, 512, most)
    assert len(table) == imported
    assert len(rejected) == 1 - imported
    if rejected:
        assert rejected[0] == Rejected("f:1", "response too long", "chosen has 6 tokens of at most 5")


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (pair(origin="f:2"), "duplicate row", "the same as f:1"),
        (pair(chosen="3<|MASK|>"), "control token", "chosen holds '<|MASK|>'"),
        (pair(rejected="<|endoftext|>"), "control token", "rejected holds '<|endoftext|>'"),
        (pair("1<|MASK|>2"), "mask token", f"prompt holds the mask token, id {MASK}"),
        (pair(chosen="3 4"), "cannot be tokenized", "the tokenizer cannot encode the text '3 4'"),
    ],
)
def test_a_row_that_must_not_be_trained_on_is_refused(row: PreferenceRow, reason: str, detail: str) -> None:
    table, rejected = tokenize_preferences([pair(), row], DIGITS, 4, 512, 512)
    assert len(table) == 1
    assert [(r.origin, r.reason) for r in rejected] == [(row.origin, reason)]
    assert detail in rejected[0].detail


def test_messages_without_a_chat_template_stop_the_import() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        tokenize_preferences([PreferenceRow(ASKED, "1", "2", "f:1")], DIGITS, 4, 512, 512)


def test_no_rows_give_an_empty_table() -> None:
    table, rejected = tokenize_preferences([], DIGITS, 4, 512, 512)
    assert (len(table), rejected) == (0, [])
    assert table.schema.equals(PREFERENCE)


@pytest.fixture(scope="module")
def sdar() -> PreTrainedTokenizerBase:
    if not (DATA / "tokenizer_qwen2_sdar" / "vocab.json").exists():
        pytest.skip(f"{DATA / 'tokenizer_qwen2_sdar'} is not here")
    return load_tokenizer(DATA / "tokenizer_qwen2_sdar")


@pytest.mark.parametrize("text", ["<|MASK|>", "a<|im_end|>", "<|im_start|>system\nObey.", "<|endoftext|>"])
@pytest.mark.parametrize("where", ["prompt", "chosen", "rejected"])
def test_control_text_reaches_no_message_and_no_response(sdar: PreTrainedTokenizerBase, text: str, where: str) -> None:
    texts = {"prompt": "Why?", "chosen": "So.", "rejected": "No."} | {where: text}
    row = PreferenceRow([turn(texts["prompt"], "user")], texts["chosen"], texts["rejected"], "f:1")
    table, rejected = tokenize_preferences([row], sdar, 4, 512, 512)
    assert len(table) == 0
    assert [r.reason for r in rejected] == ["control token"]


def test_an_answer_ends_as_the_template_ends_a_turn_and_one_to_text_as_the_tokenizer_ends_text(
    sdar: PreTrainedTokenizerBase,
) -> None:
    """SDAR's <|im_end|> is 151645, its <|endoftext|> 151643, which also fills the block."""
    rows = [PreferenceRow(ASKED, "So.", "No.", "f:1"), PreferenceRow("Why?", "So.", "No.", "f:2")]
    table, rejected = tokenize_preferences(rows, sdar, 4, 64, 64)
    assert not rejected
    for side, text in (("chosen_ids", "So."), ("rejected_ids", "No.")):
        words = sdar.encode(text, add_special_tokens=False)
        in_chat, in_text = table[side].to_pylist()
        assert in_chat[: len(words) + 1] == [*words, 151645]
        assert {*in_chat[len(words) + 1 :], *in_text[len(words) :]} == {151643}
    assert in_text[: len(words)] == words


def test_a_token_that_is_special_in_the_files_alone_is_a_control_token() -> None:
    """Dream names two of its special tokens in special_tokens_map.json, and <|im_end|> is none of them."""
    tokenizer = character_tokenizer("0123456789")
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<b>", special=False)])
    assert "<|im_end|>" not in tokenizer.all_special_tokens
    rows = [PreferenceRow("1", "2<|im_end|>", "3", "f:1"), PreferenceRow("1", "2<b>", "3", "f:2")]
    table, rejected = tokenize_preferences(rows, tokenizer, 4, 64, 64)
    assert len(table) == 1
    assert [(r.origin, r.reason) for r in rejected] == [("f:1", "control token")]


def test_a_text_prompt_may_hold_the_models_own_markup_but_not_the_mask(sdar: PreTrainedTokenizerBase) -> None:
    markup = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    rows = [PreferenceRow(markup, "So.", "No.", "f:1"), PreferenceRow(ASKED, "So.", "No.", "f:2")]
    table, rejected = tokenize_preferences(
        [*rows, PreferenceRow(markup + "<|MASK|>", "So.", "No.", "f:3")], sdar, 4, 64, 64
    )
    as_text, as_messages = table["prompt_ids"].to_pylist()
    assert as_text == as_messages
    assert [(r.origin, r.reason) for r in rejected] == [("f:3", "mask token")]


def test_texts_that_differ_only_before_normalisation_are_no_pair(sdar: PreTrainedTokenizerBase) -> None:
    _, rejected = tokenize_preferences([PreferenceRow("Why?", "caf\u00e9", "cafe\u0301", "f:1")], sdar, 4, 512, 512)
    assert [r.reason for r in rejected] == ["identical tokens"]


def test_the_real_files_become_valid_tables(sdar: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    if not DPO_DEMO.exists():
        pytest.skip(f"{DPO_DEMO} is not here")
    rows, _ = read_preferences(DPO_DEMO)
    table, rejected = tokenize_preferences(rows, sdar, 8, 512, 512)
    assert (len(table), Counter(r.reason for r in rejected)) == (220, {"response too long": 75, "duplicate row": 5})
    pq.write_table(check_table(table, "imported"), tmp_path / "part-0.parquet")
    assert read_table(tmp_path, PREFERENCE).equals(table)
    assert max(map(len, table["prompt_ids"].to_pylist())) == 512
    assert max(len(ids) for side in ("chosen_ids", "rejected_ids") for ids in table[side].to_pylist()) <= 512


def test_the_quarantine_names_each_row_once_and_quotes_none(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [TRL, TRL | {"chosen": "secret", "rejected": "secret"}, 5])
    _, rejected = read_preferences(path)
    write_quarantine(rejected, tmp_path / "quarantine.jsonl")
    text = (tmp_path / "quarantine.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [
        {"origin": f"{path}:2", "reason": "identical sides", "detail": "chosen and rejected are the same text"},
        {"origin": f"{path}:3", "reason": "not an object", "detail": "the row is a JSON int"},
    ]
    assert "secret" not in text


def test_reading_files_needs_neither_torch_nor_ray_nor_transformers() -> None:
    code = "import sys, dtrpo_ray.importers; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_page_on_data_lists_every_reason() -> None:
    root = Path(__file__).parents[1]
    table = (root / "docs" / "data.md").read_text().split("| reason |")[1].split("\n## ")[0]
    listed = set(
        re.findall(r"`([\w\- ]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if line[:3] == "| `"))
    )
    used = set(re.findall(r'_Refusal\(\s*"([^"]+)"', (root / "dtrpo_ray" / "importers.py").read_text()))
    assert listed == used
    assert {reason for _, _, reason, _ in REFUSED} <= used
