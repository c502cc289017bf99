"""Reviews: the reward, the split, the share of praise in the examples, the tokenizer of words."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrpo_ray.data.tasks import reviews
from dtrpo_ray.data.tasks.puzzles import read_public
from dtrpo_ray.errors import DataError
from dtrpo_ray.models.tokenizer import load_tokenizer, word_tokenizer

GOOD, PLAIN, BAD = "truly great", "mostly usual", "sadly dirty"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (f"{GOOD} room {GOOD} pool", 1.0),
        (f"{GOOD} room {PLAIN} pool", 0.75),
        (f"{PLAIN} room {BAD} pool", 0.25),
        (f"{GOOD} room truly dirty pool", 0.5),  # the two words do not fit together
        (f"{GOOD} pool {GOOD} room", 0.0),
        (f"{GOOD} room", 0.0),
        (f"{GOOD} room {GOOD} pool {GOOD} bar", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_is_the_mean_of_the_opinions_in_the_order_that_was_asked(response: str, reward: float) -> None:
    assert reviews.score("room pool :", response) == reward


@given(st.lists(st.sampled_from(reviews.ALPHABET), max_size=12), st.integers(1, 4))
def test_no_list_of_words_is_worth_more_than_its_opinions(words: list[str], things: int) -> None:
    prompt = " ".join([*reviews.THINGS[:things], reviews.END])
    praise = sum(f"{a} {b}" in reviews.REWARDS for a, b in itertools.pairwise(words))
    assert 0 <= reviews.score(prompt, " ".join(words)) <= min(1, praise / things)


def test_examples_praise_as_seldom_as_they_should_and_fit_together() -> None:
    rows = reviews.generate(2000, "train", things=6, seed=3)
    found = [opinion for row in rows for opinion in reviews.opinions(row["prompt"], row["answer"]) or ()]
    shares = Counter(reviews.REWARDS[opinion] for opinion in found)
    assert len(found) == 12_000
    assert {reward: count / 12_000 for reward, count in shares.items()} == pytest.approx(reviews.SHARES, abs=0.015)
    assert rows == reviews.generate(2000, "train", things=6, seed=3)
    assert rows != reviews.generate(2000, "train", things=6, seed=4)


def test_the_splits_share_no_set_of_things_in_any_order() -> None:
    train, test = ({frozenset(row["prompt"].split()) for row in reviews.generate(2000, split, 6, seed=0)}
                   for split in ("train", "test"))  # fmt: skip
    assert not train & test
    assert len(train) > 500
    assert reviews.is_test_prompt("room pool :") == reviews.is_test_prompt("pool room :")


def test_a_word_is_a_token_and_survives_its_files(tmp_path: Path) -> None:
    word_tokenizer(reviews.ALPHABET).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = f"room pool : {GOOD} room {BAD} pool"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 9
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == len(reviews.ALPHABET) + 2


def test_a_public_file_is_read_or_its_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"input": "room :", "output": "truly great room"}\n{"input": "roof :", "output": ""}\n')
    with pytest.raises(DataError, match=r"own\.jsonl:2: not a row of a Reviews test file"):
        read_public("reviews", file)
    file.write_text('{"input": "room :", "output": "truly great room"}\n')
    assert read_public("reviews", file) == [{"prompt": "room :", "answer": "truly great room"}]
