"""responses: pieces add up to the text, tokens go with their text, and nothing is taken back."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import Committed, SamplingParams
from dtrpo_ray.serve.responses import MOST_HELD, PIECE, Choice, Detokenizer, NewText, alternatives, sse
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


# --- text of ids -------------------------------------------------------------------------------------------------

Decode = Callable[[Sequence[int]], str]


def decoder_of(vocabulary: list[str], decoder: decoders.Decoder) -> Decode:
    """A tokenizer's decode; the last token is special, and has no text."""
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate([*vocabulary, "<end>"])}))
    backend.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", clean_up_tokenization_spaces=False)
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


class Counting:
    """Stands for an engine; counts the tokens that it decodes."""

    def __init__(self, decode: Decode) -> None:
        self.inside, self.count = decode, 0

    def decode(self, ids: Sequence[int]) -> str:
        self.count += len(ids)
        return self.inside(ids)


BYTES = [bytes_to_unicode()[byte] for byte in range(256)]  # as in GPT-2 and Qwen
WORDS = ["\u2581a", "b", "\u2581", "\u2581c", "."]  # as in Llama: the space before the first word is dropped
TEXT = "Zwei Wörter, 三个字, 🙂🙂 und e\u0301.\n" * 9


@pytest.mark.parametrize(
    ("decode", "ids"),
    [
        (decoder_of(BYTES, decoders.ByteLevel()), list(TEXT.encode())),
        (decoder_of(BYTES, decoders.ByteLevel()), [256] * 40 + [*"é".encode(), 256, *"🙂x".encode()] + [256] * 40),
        (decoder_of(BYTES, decoders.ByteLevel()), random.Random(0).choices([0x41, 0xC3, 0xA9, 256], k=300)),
        (decoder_of(WORDS, decoders.Metaspace()), random.Random(0).choices(range(6), k=300)),
    ],
    ids=["bytes", "special", "broken", "words"],
)
@pytest.mark.parametrize("most", [1, 4, 32])
def test_text_that_comes_in_pieces_is_the_text_of_all_ids(decode: Decode, ids: list[int], most: int) -> None:
    """Whatever the sizes of the pieces; and an offset is the length of the text before."""
    sizes, made = random.Random(1), Detokenizer(Counting(decode))  # type: ignore[arg-type]
    offsets, at = list[int](), 0
    while at < len(ids):
        size = sizes.randint(1, most)
        offsets += made.add(ids[at : at + size], offsets=True)
        at += size
        assert made.text == decode(ids[:at])
    assert offsets == [len(decode(ids[:place])) for place in range(len(ids))]


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("token", [0x41, 0xC3, 256], ids=["letter", "never a whole character", "special"])
def test_decoding_is_linear_in_the_length(block: int, token: int) -> None:
    """Each token is decoded a bounded number of times; with offsets too, since the pieces are short."""
    for offsets, most in ((False, 2 * (MOST_HELD + PIECE)), (True, 4 * (MOST_HELD + PIECE))):
        counts = []
        for length in (512, 1024, 2048):
            engine = Counting(decoder_of(BYTES, decoders.ByteLevel()))
            made = Detokenizer(engine)  # type: ignore[arg-type]
            for _ in range(0, length, block):
                made.add([token] * block, offsets)
            counts.append(engine.count)
            assert engine.count <= most * length
        assert all(longer <= 2.5 * shorter for shorter, longer in pairwise(counts))


def test_a_choice_is_decoded_in_linear_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, decode = list[int](), engine.decode

    def count(ids: Sequence[int]) -> str:
        counts[-1] += len(ids)
        return decode(ids)

    monkeypatch.setattr(engine, "decode", count)
    for blocks in (64, 128, 256):
        counts.append(0)
        tell(engine, [[0, 1, 2, 3]] * blocks, ["no such text"], most=4 * blocks)
    assert all(longer <= 2.5 * shorter for shorter, longer in pairwise(counts))
