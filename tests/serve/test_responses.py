"""responses: pieces add up to the text, tokens go with their text, and nothing is taken back."""

from types import SimpleNamespace
from typing import Any

import pytest

from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import Committed, SamplingParams
from dtrpo_ray.serve.responses import Choice, NewText, alternatives, sse
from tests.serve.test_app import make_engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


def tell(engine: Engine, blocks: list[list[int]], stop: list[str], **params: Any) -> tuple[Choice, list[NewText]]:
    """A choice that is given blocks of ids, a character each, until it ends; and its pieces."""
    sampling = SamplingParams(max_new_tokens=params.pop("most", 12), denoising_steps=1, **params)
    choice = Choice(engine=engine, prompt=[], params=sampling, seed=0, stop=stop, alternatives=0)
    pieces = []
    for ids in blocks:
        if not choice.finish_reason:
            pieces.append(choice.add(Committed(ids, [0] * len(ids), [-float(token) for token in ids], {})))
    return choice, [piece for piece in pieces if piece]


@pytest.mark.parametrize(
    ("blocks", "stop", "texts", "reason"),
    [
        ([[0, 1, 2, 3], [4, 0, 1, 2]], ["34"], ["012", ""], "stop"),  # across the blocks
        ([[0, 1, 2, 3], [3, 0, 1, 2], [0, 0, 0, 0]], ["34"], ["012", "33012", "0000"], "length"),  # it never came
        (
            [[0, 1, 2, 3], [4, 0, 1, 2], [0, 0, 0, 0]],
            ["2341"],
            ["01", "23401", "20000"],
            "length",
        ),  # let go, held again
        ([[0, 1, 2, 3], [4, 0, 1, 2]], ["12", "0123"], [""], "stop"),  # the earliest of two
        ([[0, 1, 5, 3]], [], ["01"], "stop"),  # the end of sequence
        ([[0, 1, 2, 3], [4, 0, 1, 2], [0, 1, 2, 3]], [], ["0123", "4012", "0123"], "length"),
    ],
    ids=str,
)
def test_tokens_go_with_their_text(
    engine: Engine, blocks: list[list[int]], stop: list[str], texts: list[str], reason: str
) -> None:
    choice, pieces = tell(engine, blocks, stop)
    assert ["".join(token.token for token in piece.tokens) for piece in pieces] == [piece.text for piece in pieces]
    assert [token for piece in pieces for token in piece.tokens] == choice.tokens
    assert [token.offset for token in choice.tokens] == list(range(len(choice.text)))
    assert [token.logprob for token in choice.tokens] == [-float(token) for token in choice.text]
    assert ([piece.finish_reason for piece in pieces][-1], choice.finish_reason) == (reason, reason)
    assert [piece.text for piece in pieces] == texts
    assert "".join(texts) == choice.text


def test_alternatives_with_the_same_text_stay_apart() -> None:
    engine: Any = SimpleNamespace(token_text={1: "a", 2: "\ufffd", 3: "\ufffd", 4: "<|im_end|>", 5: "\ufffd"}.get)
    found = alternatives(engine, [(2, -0.1), (1, -1.0), (3, -2.0), (4, -3.0), (5, -4.0)])
    assert [each.token for each in found] == ["\ufffd", "a", "token_id:3", "<|im_end|>", "token_id:5"]
    assert [each.logprob for each in found] == [-0.1, -1.0, -2.0, -3.0, -4.0]
    assert bytes(found[2].bytes).decode() == "\ufffd"


@pytest.mark.parametrize("number", [float("-inf"), float("nan")])
def test_no_event_has_a_number_that_is_no_json(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        sse({"logprob": number})
