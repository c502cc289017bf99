"""Files of chats and instructions for supervised fine-tuning -> `ExampleRow`s: a prompt and the answer to learn.

Each assistant turn of a conversation is an example, prompted by the turns before it; "file:line#2" is the second.
"""

from dataclasses import dataclass
from typing import Self

from dtrpo_ray.data.formats.base import Row, RowFormat, find_format
from dtrpo_ray.data.formats.dialogue import one_answer, prompt_of, with_system
from dtrpo_ray.data.formats.parsing import AS_NAMED, Answer, Columns, Messages, Prompt, Refusal, answer_of, require_text


@dataclass(frozen=True, slots=True)
class ExampleRow(Row):
    """A prompt and the answer to it."""

    prompt: Prompt
    response: Answer

    def require(self) -> Self:
        """Return the example. Raises Refusal for one without text, or whose answer follows no user or tool turn."""
        require_text(self.prompt, response=self.response)
        if not isinstance(self.prompt, str) and self.prompt[-1]["role"] not in ("user", "tool"):
            raise Refusal("no question", f"an assistant turn follows a turn of the {self.prompt[-1]['role']}")
        return self


def _conversation(turns: Messages) -> list[ExampleRow]:
    """Return an example for each assistant turn."""
    found = [ExampleRow(turns[:at], answer_of(turn)) for at, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not found:
        raise Refusal("no answer", "the conversation has no assistant turn")
    return found


EXAMPLE_FORMATS: tuple[RowFormat[ExampleRow], ...] = (
    RowFormat("messages", ("messages",), lambda row: _conversation(with_system(row, row.messages("messages")))),
    RowFormat(
        "ShareGPT",
        ("conversations",),
        lambda row: _conversation(with_system(row, row.messages("conversations"))),
    ),
    RowFormat(
        "prompt and completion",
        ("prompt", "completion"),
        lambda row: ExampleRow(prompt_of(row), one_answer(row.require("completion"), "completion")),
    ),
    RowFormat("Alpaca", ("instruction", "output"), lambda row: ExampleRow(prompt_of(row), row.text("output"))),
)


def example_format(file: str, task: Columns = AS_NAMED) -> RowFormat[ExampleRow]:
    """Return the format of a file by the columns of its first rows. Raises DataError if it has none."""
    return find_format(file, EXAMPLE_FORMATS, "examples", task)
