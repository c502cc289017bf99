"""Reviews: an opinion of each of some things. Every answer is possible; the reward says how favourable it is.

A prompt names the things ("room staff pool :"); an answer has an adverb and an adjective before each of them, in the
same order ("fairly plain room sadly poor staff truly lovely pool"). The examples seldom praise, so a model that copies
them does not; and an adverb and an adjective fit only within a line of OPINIONS, so that words unmasked together may
contradict each other.
"""

import hashlib
import random

THINGS = (
    "room", "food", "staff", "pool", "view", "bar", "bed", "lobby", "garden", "price", "lift", "music",
)  # fmt: skip
END = ":"  # of a prompt
# reward -> adverbs and adjectives that fit together
OPINIONS = {
    1.0: (("truly", "simply"), ("great", "lovely", "superb")),
    0.5: (("fairly", "mostly"), ("plain", "usual", "modest")),
    0.0: (("utterly", "sadly"), ("awful", "dirty", "poor")),
}
SHARES = {1.0: 0.2, 0.5: 0.5, 0.0: 0.3}  # of the opinions in the examples
REWARDS = {f"{adverb} {word}": r for r, (adverbs, words) in OPINIONS.items() for adverb in adverbs for word in words}
ALPHABET = (*THINGS, *(word for pair in OPINIONS.values() for words in pair for word in words), END)
FIXED_LENGTH = False  # an end-of-sequence token closes the response


def is_test_prompt(prompt: str) -> bool:
    """The split rule, public so that others can test on what we never trained on: 30 % of sets of things by SHA-256."""
    things = " ".join(sorted(prompt.removesuffix(END).split()))
    return int(hashlib.sha256(things.encode()).hexdigest(), 16) % 10 < 3


def opinions(prompt: str, response: str) -> list[str] | None:
    """Return the adverb and adjective for each thing of the prompt, or None if the response is no such list."""
    things, words = prompt.removesuffix(END).split(), response.split()
    if not things or words[2::3] != things or len(words) != 3 * len(things):
        return None
    return [f"{adverb} {adjective}" for adverb, adjective in zip(words[::3], words[1::3], strict=True)]


def score(prompt: str, response: str, answer: str = "") -> float:
    """Return the mean reward of the opinions, from 0 to 1.

    Words that do not fit together are worth 0, and so is an answer that does not name the prompt's things in order. The
    answer of the example is not read.
    """
    found = opinions(prompt, response)
    return sum(REWARDS.get(opinion, 0.0) for opinion in found) / len(found) if found else 0.0


def generate(count: int, split: str, things: int, seed: int) -> list[dict[str, str]]:
    """`count` rows {prompt, answer} of `split` ("train" or "test") about that many things; they share no set."""
    rng = random.Random(f"{seed}/{split}")  # a text seeds the same everywhere
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        drawn = rng.sample(THINGS, things)
        prompt = " ".join([*drawn, END])
        if is_test_prompt(prompt) == (split == "test"):
            rows.append({"prompt": prompt, "answer": " ".join(f"{_opinion(rng)} {thing}" for thing in drawn)})
    return rows


def _opinion(rng: random.Random) -> str:
    (reward,) = rng.choices(list(SHARES), list(SHARES.values()))
    adverbs, adjectives = OPINIONS[reward]
    return f"{rng.choice(adverbs)} {rng.choice(adjectives)}"


def parse_public(record: dict[str, str]) -> dict[str, str]:
    """A row of a test file: things and an answer, in words that the task has."""
    prompt, answer = record["input"], record["output"]
    if set(f"{prompt} {answer}".split()) - set(ALPHABET) or not prompt.endswith(END):
        raise ValueError(f"input {prompt!r} and output {answer!r}: words that the task lacks, or no {END} at the end")
    return {"prompt": prompt, "answer": answer}
