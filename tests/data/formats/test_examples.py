"""examples: an example for each assistant turn, with all that was said before; bad rows stay in their own place."""

import json
from pathlib import Path
from typing import Any

import pytest
from read_rows import read_examples

from dtrpo_ray.errors import DataError

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye."},
]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in CHAT]


def read(tmp_path: Path, *rows: Any) -> tuple[list[Any], list[tuple[str, str]]]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, refused = read_examples(file)
    name = str(file)
    made = [(row.origin.removeprefix(name), row.prompt, row.response) for row in found]
    return made, [(row.origin.removeprefix(name), row.reason) for row in refused]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, *CHAT]},
        {"messages": CHAT, "system": "Be brief."},
        {"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT]},
        {"conversations": SHAREGPT, "system": "Be brief."},
    ],
)
def test_each_assistant_turn_is_an_example_with_all_before_it_as_its_prompt(tmp_path: Path, row: Any) -> None:
    made, refused = read(tmp_path, row)
    assert made == [(":1#1", [SYSTEM, CHAT[0]], "Hello."), (":1#2", [SYSTEM, *CHAT[:3]], "Bye.")]
    assert not refused


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "1 + 1 =", "completion": " 2"}, "1 + 1 =", " 2"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:2]}, CHAT[:1], "Hello."),
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, [{"role": "user", "content": "Add.\n1 1"}], "2"),
        (
            {
                "instruction": "And?",
                "input": "",
                "output": "Bye.",
                "system": "Be brief.",
                "history": [["Hi", "Hello."]],
            },
            [SYSTEM, *CHAT[:3]],
            "Bye.",
        ),
    ],
)
def test_a_row_of_one_answer_is_one_example(tmp_path: Path, row: Any, prompt: Any, response: str) -> None:
    assert read(tmp_path, row) == ([(":1", prompt, response)], [])


def test_bad_rows_and_bad_turns_are_refused_by_name_and_spoil_no_other(tmp_path: Path) -> None:
    opening = [CHAT[1], *CHAT[2:]]
    made, refused = read(
        tmp_path,
        {"messages": CHAT},
        {"messages": CHAT[:1]},
        {"messages": opening},
        {"messages": [*CHAT[:2], CHAT[3]]},
        {"messages": [CHAT[0], {"role": "assistant", "content": " "}]},
        {"messages": [{"role": "robot", "content": "x"}, *CHAT]},
        {"messages": "Hi"},
        {"messages": CHAT, "tools": [1]},
        {"messages": None},
    )
    assert [origin for origin, *_ in made] == [":1#1", ":1#2", ":3#2", ":4#1"]
    assert refused == [
        (":2", "no answer"),
        (":3#1", "empty prompt"),
        (":4#2", "no question"),
        (":5", "empty side"),
        (":6", "unknown role"),
        (":7", "wrong type"),
        (":8", "wrong type"),
        (":9", "missing field"),
    ]


def test_a_file_of_other_columns_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no format of examples has these columns: text; known formats: messages"):
        read(tmp_path, {"text": "Hi"})
