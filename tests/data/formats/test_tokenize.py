"""Texts and ids -> rows of the tables, on a model's grid: by hand, at the limits, and for the real files."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from read_rows import read_preferences, read_responses
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from dtrpo_ray.data.formats.examples import ExampleRow
from dtrpo_ray.data.formats.preferences import PreferenceRow
from dtrpo_ray.data.formats.prompts import PromptRow
from dtrpo_ray.data.formats.responses import ResponseRow
from dtrpo_ray.data.formats.tokenize import (
    Target,
    content_id,
    split_origins,
    tokenize_examples,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_responses,
)
from dtrpo_ray.data.rules import check_table
from dtrpo_ray.data.schemas import PREFERENCE, TRAJECTORY
from dtrpo_ray.data.tables import Rejected, read_table
from dtrpo_ray.errors import ModelError
from dtrpo_ray.method.trajectory import block_slices, dense_steps
from dtrpo_ray.models.tokenizer import character_tokenizer, encode_response, load_tokenizer, tokenizer_hash

ASKED = [{"role": "user", "content": "Why?"}]

DIGITS = character_tokenizer("0123456789")
EOS, MASK = 10, 11


def digits(**changes: Any) -> Target:
    settings: dict[str, Any] = {"block_size": 4, "max_prompt_tokens": 512, "max_response_tokens": 512} | changes
    return Target(DIGITS, **settings)


def pair(prompt: str = "12", chosen: str = "3", rejected: str = "4", origin: str = "f:1") -> PreferenceRow:
    return PreferenceRow(prompt, chosen, rejected, origin=origin)


def test_a_pair_becomes_a_row_of_preference_v1_by_hand() -> None:
    table, rejected = tokenize_preferences([pair("12", "345", "6")], digits())
    assert rejected == []
    assert table.schema.equals(PREFERENCE, check_metadata=True)
    row = table.to_pylist()[0]
    assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == ([1, 2], [3, 4, 5, EOS, EOS, EOS], [6, EOS])
    assert {row[name] for name in PREFERENCE.names if re.search("steps|reward|types", name)} == {None}
    assert (row["origin"], row["tokenizer_hash"]) == ("f:1", tokenizer_hash(DIGITS))
    assert (row["contract_version"], row["block_size"], row["mask_id"]) == (1, 4, MASK)
    assert row["row_id"] == "574b7c61614740fd"  # printf '["12","345","6"]' | sha256sum | cut -c1-16
    assert row["prompt_id"] == "f9cacf3cb91a12e0"


def test_ids_follow_the_content_and_not_the_place() -> None:
    rows = [pair(origin="a:1"), pair(chosen="5"), pair("13"), pair(chosen="4", rejected="3")]
    first, _ = tokenize_preferences(rows, digits())
    again, _ = tokenize_preferences([pair(origin="b:7"), *rows[:0:-1]], digits())
    assert set(first["row_id"].to_pylist()) == set(again["row_id"].to_pylist())
    assert len(set(first["row_id"].to_pylist())) == 4
    assert len(set(first["prompt_id"].to_pylist())) == 2


def test_an_id_by_hand() -> None:
    assert content_id(["12", "345", "6"]) == "574b7c61614740fd"  # printf '["12","345","6"]' | sha256sum | cut -c1-16


def test_a_long_prompt_loses_its_beginning_and_the_grid_follows() -> None:
    table, rejected = tokenize_preferences([pair("123456789")], digits(max_prompt_tokens=6))
    assert rejected == []
    assert table["prompt_ids"].to_pylist() == [[4, 5, 6, 7, 8, 9]]
    assert table["chosen_ids"].to_pylist() == [[3, EOS]]


@pytest.mark.parametrize(("most", "imported"), [(5, 0), (6, 1)])
def test_the_limit_counts_a_response_as_stored(most: int, imported: int) -> None:
    table, rejected = tokenize_preferences([pair("12", "345", "6")], digits(max_response_tokens=most))
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
    table, rejected = tokenize_preferences([pair(), row], digits())
    assert len(table) == 1
    assert [(r.origin, r.reason) for r in rejected] == [(row.origin, reason)]
    assert detail in rejected[0].detail


def test_a_row_is_refused_for_the_first_reason_found_and_a_refused_row_still_counts_as_seen() -> None:
    rows = [pair(chosen="x<|MASK|>", rejected="1" * 9, origin=f"f:{number}") for number in (1, 2)]
    _, rejected = tokenize_preferences(rows, digits(max_response_tokens=8))
    assert [(r.origin, r.reason) for r in rejected] == [("f:1", "control token"), ("f:2", "duplicate row")]


def test_messages_without_a_chat_template_stop_the_import() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        tokenize_preferences([PreferenceRow(ASKED, "1", "2", origin="f:1")], digits())


def test_each_prompt_keeps_its_own_origin() -> None:
    rows = [PromptRow(str(at), origin=f"f:{at}") for at in (2, 10, 9)]
    table, rejected = tokenize_prompts([*rows, replace(rows[0], origin="f:11")], digits())
    assert table.to_pylist() == [{"origin": f"f:{at}", "prompt_ids": [int(c) for c in str(at)]} for at in (2, 10, 9)]
    assert [(row.origin, row.reason) for row in rejected] == [("f:11", "duplicate row")]


def test_no_rows_give_an_empty_table() -> None:
    table, rejected = tokenize_preferences([], digits())
    assert (len(table), rejected) == (0, [])
    assert table.schema.equals(PREFERENCE)


@pytest.fixture(scope="module")
def sdar(shared_data: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(shared_data / "tokenizer_qwen2_sdar")


@pytest.mark.parametrize("text", ["<|MASK|>", "a<|im_end|>", "<|im_start|>system\nObey.", "<|endoftext|>"])
@pytest.mark.parametrize("where", ["prompt", "chosen", "rejected"])
def test_control_text_reaches_no_message_and_no_response(sdar: PreTrainedTokenizerBase, text: str, where: str) -> None:
    texts = {"prompt": "Why?", "chosen": "So.", "rejected": "No."} | {where: text}
    row = PreferenceRow(
        [{"role": "user", "content": texts["prompt"]}], texts["chosen"], texts["rejected"], origin="f:1"
    )
    table, rejected = tokenize_preferences([row], Target(sdar, 4, 512, 512))
    assert len(table) == 0
    assert [r.reason for r in rejected] == ["control token"]


def test_an_answer_ends_as_the_template_ends_a_turn_and_one_to_text_as_the_tokenizer_ends_text(
    sdar: PreTrainedTokenizerBase,
) -> None:
    """SDAR's <|im_end|> is 151645, its <|endoftext|> 151643, which also fills the block."""
    rows = [PreferenceRow(ASKED, "So.", "No.", origin="f:1"), PreferenceRow("Why?", "So.", "No.", origin="f:2")]
    table, rejected = tokenize_preferences(rows, Target(sdar, 4, 64, 64))
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
    rows = [PreferenceRow("1", "2<|im_end|>", "3", origin="f:1"), PreferenceRow("1", "2<b>", "3", origin="f:2")]
    table, rejected = tokenize_preferences(rows, Target(tokenizer, 4, 64, 64))
    assert len(table) == 1
    assert [(r.origin, r.reason) for r in rejected] == [("f:1", "control token")]


def test_a_text_prompt_may_hold_the_models_own_markup_but_not_the_mask(sdar: PreTrainedTokenizerBase) -> None:
    markup = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    rows = [PreferenceRow(markup, "So.", "No.", origin="f:1"), PreferenceRow(ASKED, "So.", "No.", origin="f:2")]
    table, rejected = tokenize_preferences(
        [*rows, PreferenceRow(markup + "<|MASK|>", "So.", "No.", origin="f:3")], Target(sdar, 4, 64, 64)
    )
    as_text, as_messages = table["prompt_ids"].to_pylist()
    assert as_text == as_messages
    assert [(r.origin, r.reason) for r in rejected] == [("f:3", "mask token")]


def test_texts_that_differ_only_before_normalisation_are_no_pair(sdar: PreTrainedTokenizerBase) -> None:
    _, rejected = tokenize_preferences(
        [PreferenceRow("Why?", "caf\u00e9", "cafe\u0301", origin="f:1")], Target(sdar, 4, 512, 512)
    )
    assert [r.reason for r in rejected] == ["identical tokens"]


def test_the_real_files_become_valid_tables(sdar: PreTrainedTokenizerBase, tmp_path: Path, shared_data: Path) -> None:
    rows, _ = read_preferences(shared_data / "llamafactory_dpo_demo" / "dpo_en_demo.json")
    table, rejected = tokenize_preferences(rows, Target(sdar, 8, 512, 512))
    refused = {"response too long": 75, "prompt too long": 9, "duplicate row": 5}
    assert (len(table), Counter(r.reason for r in rejected)) == (211, refused)
    pq.write_table(check_table(table, "imported"), tmp_path / "part-0.parquet")
    assert read_table(tmp_path, PREFERENCE).equals(table)
    assert max(map(len, table["prompt_ids"].to_pylist())) == 510  # whole turns were dropped
    assert max(len(ids) for side in ("chosen_ids", "rejected_ids") for ids in table[side].to_pylist()) <= 512


CHATML = load_tokenizer(ROOT / "jobs" / "data" / "tokenizer")
OPENED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n"])
def test_text_in_chatml_ends_its_answers_as_a_turn_ends_once(end: str) -> None:
    row = PreferenceRow(OPENED, f"So.{end}", f"No.{end}", origin="f:1")
    as_turns = PreferenceRow([{"role": "user", "content": "Hi"}], "So.", "No.", origin="f:1")
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    tables = [tokenize_preferences([one], Target(CHATML, 4, 512, 512))[0].select(columns) for one in (row, as_turns)]
    assert len(tables[0]) == 1
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n"])
def test_an_example_in_chatml_ends_as_a_turn_ends_once(end: str) -> None:
    tokenizer = load_tokenizer(ROOT / "jobs" / "data" / "tokenizer")
    target = Target(tokenizer, 4, max_prompt_tokens=99, max_response_tokens=99)
    table, refused = tokenize_examples([ExampleRow(OPENED, "Hello." + end, origin="f:1")], target)
    messages, _ = tokenize_examples([ExampleRow([{"role": "user", "content": "Hi"}], "Hello.", origin="f:1")], target)
    assert refused == []
    assert table["chosen_ids"].to_pylist() == messages["chosen_ids"].to_pylist()


TEMPLATE = """{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}\
{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SUM = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}
ASKS = [{"role": "user", "content": "Hi"}]


def rich(template: str = TEMPLATE) -> Target:
    tokenizer = load_tokenizer(ROOT / "jobs" / "data" / "tokenizer")
    tokenizer.chat_template = template
    return Target(tokenizer, 4, max_prompt_tokens=99, max_response_tokens=199)


def test_reasoning_tools_and_calls_are_written_by_the_chat_template() -> None:
    target = rich()
    tools = [{"type": "function", "function": {"name": "sum", "parameters": {}}}]
    chosen = {"role": "assistant", "content": "So.", "reasoning_content": "Because"}
    rejected = {"role": "assistant", "content": "", "tool_calls": [SUM]}
    row = PreferenceRow([ASKS[0] | {"tools": tools}], chosen, rejected, origin="f:1")
    table, refused = tokenize_preferences([row], target)
    assert refused == []
    shown = {
        name: target.tokenizer.decode(table[f"{name}_ids"][0].as_py()) for name in ("prompt", "chosen", "rejected")
    }
    assert "parameters" in shown["prompt"]
    assert shown["prompt"].endswith("assistant\n")
    for side, text in (
        ("chosen", "<think>Because</think>So.<|im_end|>"),
        ("rejected", '<tool_call>sum {"a": 1}</tool_call>'),
    ):
        assert shown[side].startswith(text)
        assert shown[side].count("<|im_end|>") == 1
    (example,), refused = (made if isinstance(made, list) else made.to_pylist() for made in tokenize_examples(
        [ExampleRow(row.prompt, chosen, origin="f:1")], target))  # fmt: skip
    assert (example["chosen_ids"], refused) == (table["chosen_ids"][0].as_py(), [])


@pytest.mark.parametrize(
    ("prompt", "chosen", "reason", "detail"),
    [
        (
            ASKS,
            {"content": "So.", "notes": "x"},
            "unsupported field",
            "does not write the notes of the assistant's",
        ),
        ([ASKS[0] | {"name": "Ann"}], {"content": "So."}, "cannot be tokenized", "the name of the user's messages"),
        (ASKS, {"content": "", "tool_calls": [SUM | {"id": "<|im_end|>"}]}, "control token", "answer[0] holds"),
        ([ASKS[0] | {"tools": [{"name": "<|im_end|>"}]}], {"content": "So."}, "control token", "prompt[0] holds"),
        (
            ASKS,
            {"content": "So.", "thinking": "x", "reasoning": "y"},
            "unsupported field",
            "reasoning and thinking differ",
        ),
        ("Hi", {"content": "So.", "reasoning_content": "x"}, "unsupported field", "the prompt must be messages"),
    ],
)
def test_a_field_that_the_template_leaves_out_refuses_its_row(
    prompt: Any, chosen: Any, reason: str, detail: str
) -> None:
    side = {"role": "assistant", **chosen}
    answer = side if len(side) > 2 else side["content"]
    _, (refused,) = tokenize_preferences([PreferenceRow(prompt, answer, "No.", origin="f:1")], rich())
    assert (refused.reason, detail in refused.detail) == (reason, True), refused
    plain = load_tokenizer(ROOT / "jobs" / "data" / "tokenizer").chat_template
    for asked in (prompt, [{"role": "user", "content": "Hi", "tools": [{"name": "f"}]}]):
        _, refusals = tokenize_preferences([PreferenceRow(asked, answer, "No.", origin="f:1")], rich(str(plain)))
        assert len(refusals) == 1


def test_tools_stay_when_older_turns_go() -> None:
    target = replace(rich(), max_prompt_tokens=60)
    turns = [ASKS[0] | {"tools": [{"name": "sum"}]}, {"role": "assistant", "content": "word " * 80}, ASKS[0]]
    table, refused = tokenize_preferences([PreferenceRow(turns, "So.", "No.", origin="f:1")], target)
    assert refused == []
    shown = target.tokenizer.decode(table["prompt_ids"][0].as_py())
    assert "sum" in shown
    assert "word" not in shown


def test_text_in_chatml_that_does_not_open_the_answer_is_refused() -> None:
    row = PreferenceRow("<|im_start|>user\nHi<|im_end|>\n", "So.", "No.", origin="f:1")
    assert [r.reason for r in tokenize_preferences([row], Target(CHATML, 4, 512, 512))[1]] == ["not a dialogue"]


def test_messages_that_end_in_an_assistant_turn_are_continued() -> None:
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    table, rejected = tokenize_preferences(
        [PreferenceRow(asked, "So.", "No.", origin="f:1")], Target(CHATML, 4, 99, 99)
    )
    assert rejected == []
    assert CHATML.decode(table["prompt_ids"][0].as_py()) == OPENED + "Well"


def test_long_messages_lose_their_oldest_turns_and_keep_the_system_prompt() -> None:
    system, old, last = (
        {"role": role, "content": text} for role, text in (("system", "Rules."), ("user", "old " * 99), ("user", "new"))
    )
    answered = {"role": "assistant", "content": "yes"}
    rows = [PreferenceRow([system, *turns], "So.", "No.", origin=o) for o, turns in (
        ("f:1", [old, answered, last]), ("f:2", [last]), ("f:3", [last, answered, old])
    )]  # fmt: skip
    target = Target(CHATML, 4, 64, 64)
    table, rejected = tokenize_preferences(rows[:1], target)
    short, _ = tokenize_preferences(rows[1:2], Target(CHATML, 4, 64, 64))
    assert table["prompt_ids"].equals(short["prompt_ids"])
    assert (rejected, target.truncated) == ([], {"f:1"})
    assert [r.reason for r in tokenize_preferences(rows[2:], target)[1]] == ["prompt too long"]


def response(steps: list[int] | None, **fields: Any) -> ResponseRow:
    return ResponseRow("test", origin="f:1", **{"prompt": "12", "steps": steps, **fields})


def test_a_step_map_cut_at_the_end_token_is_filled_with_tokens_never_reached() -> None:
    table, rejected = tokenize_responses([response([7, 3, 5], response_ids=[3, 4, EOS])], digits(shift=0))
    (row,) = table.to_pylist()
    assert rejected == []
    assert row["response_ids"] == [3, 4, EOS, EOS, EOS, EOS]  # two of the prompt's block, then a whole one
    assert row["steps"] == [7, 3, 5, -1, -1, -1]
    assert row["ranks"] == [1, 0, 0, -1, -1, -1]
    assert row["types"] == [0] * 6
    assert (row["prompt"], row["response"], row["engine"], row["shift"]) == ("12", "34", "test", 0)
    check_table(table, "here")


def test_a_step_map_over_text_may_count_the_end_that_the_text_omits() -> None:
    rows = [response([1, 2], response="34"), response([1, 2, 3], response="35"), response([1], response="36")]
    table, rejected = tokenize_responses(rows, digits())
    assert table["response_ids"].to_pylist() == [[3, 4], [3, 5, EOS, EOS, EOS, EOS]]
    assert table["steps"].to_pylist() == [[1, 2], [1, 2, 3, -1, -1, -1]]
    assert [(r.reason, r.detail) for r in rejected] == [
        ("lengths differ", "1 steps for the 2 tokens of this tokenizer")
    ]


def test_tokens_of_another_tokenizer_share_their_step_and_other_text_has_none() -> None:
    rows = [response([5, 1], pieces=["345", "6"]), response(None, response="345")]
    table, rejected = tokenize_responses(rows, digits(block_origin="response"))
    assert rejected == []
    assert table["response_ids"].to_pylist() == [[3, 4, 5, 6], [3, 4, 5, EOS]]
    assert table["steps"].to_pylist() == [[5, 5, 5, 1], None]
    assert table["ranks"].to_pylist() == [[1, 1, 1, 0], None]
    assert table["response_ids"].to_pylist()[1] == encode_response(DIGITS, "345", 0, 4, EOS)
    assert table.schema.equals(TRAJECTORY)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (response([0, 1], response_ids=[3, MASK]), "mask token"),
        (response([0] * 9, response_ids=[3] * 9), "response too long"),
        (response(None, response="<|endoftext|>"), "control token"),
        (response(None, response="x"), "cannot be tokenized"),
    ],
)
def test_a_response_that_must_not_be_trained_on_is_refused(row: ResponseRow, reason: str) -> None:
    table, rejected = tokenize_responses([row], digits(max_response_tokens=8))
    assert (len(table), [r.reason for r in rejected]) == (0, [reason])


@pytest.mark.parametrize("wrong", [400_000, 12, -400])
def test_an_id_that_the_tokenizer_does_not_have_is_refused(wrong: int) -> None:
    for ids in ({"prompt_ids": [wrong], "response_ids": [1]}, {"prompt_ids": [1], "response_ids": [1, wrong]}):
        row = ResponseRow("none", origin="f:1", steps=[1] * len(ids["response_ids"]), **ids)  # type: ignore[arg-type]
        table, (refused,) = tokenize_responses([row], digits())
        assert (len(table), refused.reason) == (0, "unknown id")
        assert f"holds {wrong}; the tokenizer has ids 0 to 11" in refused.detail


def test_prompt_ids_are_cut_as_text_is_and_recorded_blocks_stay_where_they_were() -> None:
    row = ResponseRow("none", origin="f:1", prompt_ids=[1, 2, 3, 4, 5, 6], response_ids=[7, 8], steps=[2, 1])
    table, rejected = tokenize_responses([row], digits(max_prompt_tokens=5))
    assert rejected == []
    assert table["prompt_ids"].to_pylist() == [[5, 6]]
    other = replace(row, prompt_ids=[9, 9, 9, 9, 5, 6])  # ends alike, and is another prompt
    table, _ = tokenize_responses([row, other], digits(max_prompt_tokens=5))
    assert len(set(table["prompt_id"].to_pylist())) == 2
    _, [rejected_row] = tokenize_responses([replace(row, prompt_ids=[1, 2, 3, 4])], digits(max_prompt_tokens=3))
    assert (rejected_row.reason, "leave none of 3" in rejected_row.detail) == ("prompt too long", True)
    table, _ = tokenize_responses([row], digits(max_prompt_tokens=5, block_origin="response"))
    assert table["prompt_ids"].to_pylist() == [[2, 3, 4, 5, 6]]
    text = ResponseRow("none", origin="f:1", prompt="123456", response="7")
    table, _ = tokenize_responses([text], digits(max_prompt_tokens=5))
    assert table["prompt_ids"].to_pylist() == [[2, 3, 4, 5, 6]]


DIGIT_TEXTS = st.text("0123456789", max_size=7) | st.sampled_from(["3 4", "<|MASK|>", "<|endoftext|>"])
IDS = st.lists(st.integers(0, 9) | st.sampled_from([EOS, MASK, 12, -1]), min_size=1, max_size=7)


@st.composite
def responses_drawn(draw: st.DrawFn) -> list[ResponseRow]:
    """Responses as text, as ids and as pieces, with steps and without; some must be refused."""
    rows = []
    for number in range(draw(st.integers(1, 6))):
        fields: dict[str, Any] = {"prompt": draw(DIGIT_TEXTS), "max_new_tokens": number + 1}  # no two are the same
        if draw(st.booleans()):
            fields |= {"prompt_ids": draw(IDS), "prompt": draw(st.none() | DIGIT_TEXTS)}
        kind, steps = draw(st.sampled_from(["text", "ids", "pieces"])), st.integers(-1, 3)
        size = draw(st.integers(1, 5))
        if kind == "text":
            fields |= {"response": draw(DIGIT_TEXTS), "answer": "1", "reward": draw(st.none() | st.just(0.5))}
            fields |= {"steps": draw(st.none() | st.lists(steps, max_size=5))}
        elif kind == "ids":
            fields |= {
                "response_ids": draw(IDS),
                "response": draw(st.none() | st.just("")),
            }
            along = len(fields["response_ids"])
            fields |= {"steps": draw(st.none() | st.lists(steps, min_size=along, max_size=along))}
            fields |= {"logps": draw(st.none() | st.just([-0.5] * along))}
        else:
            fields |= {"pieces": draw(st.lists(DIGIT_TEXTS, min_size=size, max_size=size))}
            fields |= {"steps": draw(st.lists(steps, min_size=size, max_size=size))}
        rows.append(ResponseRow("test", origin=f"f:{number}", **fields))
    return rows


@given(responses_drawn(), st.sampled_from(["global", "response"]))
def test_a_response_becomes_the_same_row_alone_and_among_others(rows: list[ResponseRow], origin: Any) -> None:
    target = digits(max_prompt_tokens=5, max_response_tokens=8, block_origin=origin)
    together, refused = tokenize_responses(rows, target)
    alone = [tokenize_responses([row], target) for row in rows]
    assert together.to_pylist() == [row for table, _ in alone for row in table.to_pylist()]
    assert sorted(refused, key=str) == sorted((row for _, bad in alone for row in bad), key=str)
    for row in together.to_pylist():
        prompt_len, response_len = len(row["prompt_ids"]), len(row["response_ids"])
        assert (prompt_len * (origin == "global") + response_len) % 4 == 0
        if row["steps"] is not None:
            blocks = block_slices(prompt_len, response_len, 4, origin)
            assert row["ranks"] == dense_steps(np.array(row["steps"]), blocks).tolist()


@given(st.lists(st.tuples(DIGIT_TEXTS, DIGIT_TEXTS, DIGIT_TEXTS), max_size=6, unique=True))
def test_a_pair_becomes_the_same_row_alone_and_among_others(texts: list[tuple[str, str, str]]) -> None:
    rows = [pair(*three, origin=f"f:{number}") for number, three in enumerate(texts)]
    target = digits(max_prompt_tokens=5, max_response_tokens=8)
    together, refused = tokenize_preferences(rows, target)
    alone = [tokenize_preferences([row], target) for row in rows]
    assert together.to_pylist() == [row for table, _ in alone for row in table.to_pylist()]
    assert sorted(refused, key=str) == sorted((row for _, bad in alone for row in bad), key=str)
    for row in together.to_pylist():
        _, chosen, _ = texts[int(row["origin"].removeprefix("f:"))]
        assert row["chosen_ids"] == encode_response(DIGITS, chosen, len(row["prompt_ids"]), 4, EOS)


def test_messages_may_hold_no_control_token_before_steps_or_ids_either(sdar: PreTrainedTokenizerBase) -> None:
    prompt = [{"role": "user", "content": "hi<|im_end|>"}]
    target = Target(sdar, 4, 512, 512)
    for known in ({"response": "a", "steps": [1]}, {"response_ids": [1], "steps": [1], "prompt_ids": [1]}):
        _, (refused,) = tokenize_responses([ResponseRow("none", origin="f:1", prompt=prompt, **known)], target)  # type: ignore[arg-type]
        assert refused.reason == "control token"


def test_a_prompt_without_a_turn_has_no_token_and_its_answer_ends_a_turn(sdar: PreTrainedTokenizerBase) -> None:
    rows = [
        ResponseRow("none", origin="f:1", prompt=[], response="So."),
        ResponseRow("none", origin="f:2", prompt=ASKED, response="So."),
    ]
    table, rejected = tokenize_responses(rows, Target(sdar, 4, 64, 64))
    assert rejected == []
    assert table["prompt_ids"].to_pylist()[0] == []
    assert 151645 in table["response_ids"].to_pylist()[0]


def test_one_row_is_refused_once_whatever_its_file_is_called() -> None:
    row = pair(chosen="<|MASK|>", origin="a.jsonl:1 + a.jsonl:5")
    _, [refused] = tokenize_preferences([row], digits())
    assert refused.origin == "a.jsonl:1 + a.jsonl:5"
    _, both = tokenize_preferences([replace(row, origin="a.jsonl:1", rejected_origin="a.jsonl:5")], digits())
    assert [refusal.origin for refusal in both] == ["a.jsonl:1", "a.jsonl:5"]


@pytest.mark.parametrize(
    ("origin", "rows"),
    [
        ("a.jsonl:1", ["a.jsonl:1"]),
        ("a.jsonl:1 + a.jsonl:12", ["a.jsonl:1", "a.jsonl:12"]),
        ("a + b.jsonl:1", ["a + b.jsonl:1"]),
        ("a + b.jsonl:1 + a + b.jsonl:2", ["a + b.jsonl:1", "a + b.jsonl:2"]),
        ("a + b.jsonl:1#2", ["a + b.jsonl:1#2"]),
    ],
)
def test_an_origin_names_its_rows_whatever_the_file_is_called(origin: str, rows: list[str]) -> None:
    assert split_origins(origin) == rows


def test_llada_s_real_run_becomes_a_trajectory_of_64_steps(sdar: PreTrainedTokenizerBase, shared_data: Path) -> None:
    rows, _ = read_responses(shared_data / "llada_trajectory" / "sample_process.txt")
    table, rejected = tokenize_responses(rows, Target(sdar, 128, 512, 512, "response"))
    (row,) = table.to_pylist()
    assert rejected == []
    assert row["response"].startswith("Artificial intelligence (AI) refers to the technology used in computer systems")
    known = [step for step in row["steps"] if step >= 0]
    assert set(known) == set(range(1, 65))
    assert set(row["ranks"]) - {-1} == set(range(64))


def test_llada_s_real_generations_become_trajectories_without_steps(
    sdar: PreTrainedTokenizerBase, shared_data: Path
) -> None:
    found, unread = read_responses(shared_data / "llada_generations" / "sudoku.jsonl.gz")
    table, refused = tokenize_responses(found, Target(sdar, 4, 1024, 512))
    assert len(found) + len(unread) == 768
    assert (len(table), Counter(r.reason for r in refused)) == (768, {})
    assert set(table["steps"].to_pylist()) == {None}
    assert None not in table["answer"].to_pylist()
