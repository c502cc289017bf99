"""The columns and texts of a raw row -> its prompt, as text or as messages, and its answers."""

import re
from typing import Any

from dtrpo_ray.data.formats.parsing import (
    Answer,
    Messages,
    Prompt,
    Record,
    Refusal,
    answer_of,
    as_messages,
    as_objects,
    as_prompt,
    as_text,
    is_empty,
)

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # the marks of an HH-RLHF dialogue

# the columns that public sets call the prompt, the first that holds something before the others
PROMPTS = ("prompt", "conversations", "messages", "instruction", "question", "problem", "query", "input", "context")


def prompt_of(row: Record, optional: bool = False) -> Prompt:
    """Return the prompt of a row that calls it one of PROMPTS: text as it is, or messages.

    Text becomes messages if there is a column for a system prompt, and in Alpaca's columns. Raises Refusal if there is
    none, unless it is `optional`.
    """
    there = [name for name in PROMPTS if not is_empty(row.fields.get(name))]
    if not there and optional:
        return ""
    name = there[0] if there else next((name for name in PROMPTS if name in row.fields), "prompt")
    prompt = as_prompt(row.require(name), name)
    alpaca = isinstance(prompt, str) and name in ("instruction", "input") and "instruction" in row.fields
    if alpaca:
        parts = (as_text(row.get(part) or "", part) for part in ("instruction", "input"))
        prompt = "\n".join(part for part in parts if part)
    if isinstance(prompt, str) and (alpaca or any(name in row.fields for name in (*_SYSTEMS, "history", "tools"))):
        return with_system(row, [*_history(row), {"role": "user", "content": prompt}])
    return prompt if isinstance(prompt, str) else with_system(row, prompt)


_SYSTEMS = ("system", "system_prompt")


def with_system(row: Record, turns: Messages) -> Messages:
    """Return messages after the row's system prompt, which is text or messages, and with its tools.

    Both may not have a different system prompt.
    """
    value = next((row.get(name) for name in _SYSTEMS if not is_empty(row.fields.get(name))), "")
    told = [{"role": "system", "content": value}] if isinstance(value, str) else value
    system = as_messages(told, "system")
    if system and turns and turns[0]["role"] == "system" and turns[0] != system[0]:
        raise Refusal("prompts differ", "the column of the system prompt and the messages have different ones")
    turns = turns if system == turns[:1] else system + turns
    tools = [] if is_empty(row.get("tools")) else as_objects(row.get("tools"), "tools")
    return [turns[0] | {"tools": tools}, *turns[1:]] if tools and turns else turns


def _history(row: Record) -> Messages:
    """Return Alpaca's earlier turns, [question, answer] each."""
    turns, history = Messages(), row.get("history") or []
    for turn in history if isinstance(history, list) else [None]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Refusal("wrong type", "history is not a list of [question, answer]")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            turns.append({"role": role, "content": as_text(text, "history")})
    return turns


def as_side(value: Any, where: str) -> Messages:
    """Return a side as messages: the assistant's bare text, one message, or a list of them."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return as_messages(value if isinstance(value, list) else [value], where)


def one_answer(value: Any, where: str) -> Answer:
    """Return one assistant turn: bare, a message, or a list of one message."""
    turns = as_side(value, where)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise Refusal("no answer", f"{where} must be one assistant turn")
    return answer_of(turns[0])


def last_answer(turns: Messages, where: str) -> tuple[Messages, Answer]:
    """Split a conversation before its last turn, which must be the assistant's."""
    if not turns or turns[-1]["role"] != "assistant":
        raise Refusal("no answer", f"{where} does not end in an assistant turn")
    return turns[:-1], answer_of(turns[-1])


def read_dialogue(text: str, where: str) -> Messages:
    """Split an HH-RLHF dialogue into messages; white space around a turn belongs to the layout."""
    start, *parts = re.split(f"({HUMAN}|{ASSISTANT})", text)
    if start or not parts:
        raise Refusal("not a dialogue", f"{where} is text without a prompt and does not begin with {HUMAN!r}")
    roles = {HUMAN: "user", ASSISTANT: "assistant"}
    return [{"role": roles[m], "content": turn.strip()} for m, turn in zip(parts[::2], parts[1::2], strict=True)]
