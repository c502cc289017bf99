"""Word problems of one and two steps, written from templates, with answers in GSM8K's format.

An answer is a sentence with an equation for each step and then `#### N` (Cobbe et al. 2021, arXiv:2110.14168, without
its calculator annotations). Every number and result is an integer from 2 up to `largest`. The splits share no name, no
set of numbers and no pair of templates.
"""

import hashlib
import random
import re
from typing import NamedTuple

SCORER = "dtrpo_ray.produce.verifiers.gsm8k:score"
FIXED_LENGTH = False  # an end token closes the response

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack", "Karen", "Liam", "Mia", "Noah",
    "Olivia", "Peter", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Victor", "Wendy", "Xavier", "Yara", "Zoe", "Alice",
    "Bob", "Carol", "Daniel", "Ella", "Frank", "Gina", "Hugo", "Irene", "James", "Kate", "Leo", "Maria", "Nick",
)  # fmt: skip
THINGS = (
    "apples", "balls", "beads", "books", "buttons", "cards", "coins", "cookies", "cups", "eggs", "flags", "flowers",
    "keys", "lemons", "marbles", "nuts", "pears", "pencils", "pens", "plums", "roses", "shells", "stamps", "stickers",
    "stones", "tickets", "toys", "trees",
)  # fmt: skip


class Start(NamedTuple):
    """A first step: what happens to the numbers a and b, and thus how many things the person has."""

    sign: str
    story: str


class End(NamedTuple):
    """A second step: what happens to the first result and the number c, what is asked, and the answer's sentence."""

    sign: str
    story: str
    question: str
    sentence: str


STARTS = (
    Start("+", "{name} has {a} {things} and buys {b} more."),
    Start("+", "{name} finds {a} {things} in the morning and {b} in the evening."),
    Start("+", "{name} gets {a} {things} from a neighbor and {b} from an uncle."),
    Start("+", "There are {a} {things} in the box of {name}. {name} puts in {b} more."),
    Start("-", "{name} has {a} {things} and gives {b} away."),
    Start("-", "{name} takes {a} {things} home and loses {b} on the way."),
    Start("-", "{name} brings {a} {things} to the market and sells {b}."),
    Start("*", "{name} buys {a} boxes with {b} {things} each."),
    Start("*", "For {a} days {name} gets {b} {things} a day."),
    Start("*", "{name} fills {a} shelves with {b} {things} each."),
    Start("*", "{name} owns {a} bags. Each bag holds {b} {things}."),
    Start("/", "{name} and the others in a group of {b} share {a} {things} equally."),
    Start("/", "{name} packs {a} {things} equally into {b} bags and keeps one bag."),
)
NOW = End("", "", "How many {things} does {name} have now?", "{name} has {sum} {things}.")  # of a problem of one step
FRIEND = End("", "", "How many {things} does {friend} have?", "{friend} has {sum} {things}.")
ENDS = (
    NOW._replace(sign="+", story="Then {name} finds {c} more."),
    NOW._replace(sign="-", story="Then {name} loses {c} of them."),
    FRIEND._replace(sign="+", story="{friend} has {c} more than {name}."),
    FRIEND._replace(sign="-", story="{friend} has {c} fewer than {name}."),
    FRIEND._replace(sign="*", story="{friend} has {c} times as many."),
    End("-", "{name} gives {c} of them to {friend}.", "How many {things} are left?", "{sum} {things} are left."),
    End("*", "Each of them costs {c} dollars.", "How many dollars do they cost?", "They cost {sum} dollars."),
    End("/", "{name} lays them in {c} equal rows.", "How many {things} are in a row?", "A row has {sum} {things}."),
    End("/", "{name} shares them equally among {c} children.", "How many {things} does a child get?",
        "A child gets {sum} {things}."),
)  # fmt: skip


def held_out(key: str) -> bool:
    """The split rule: 30 % of names, of sets of numbers and of pairs of templates by SHA-256."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10 < 3


def numbers_key(prompt: str) -> str:
    """Return the numbers of a problem in rising order, by which it is held out ("3,12")."""
    return ",".join(sorted(re.findall("[0-9]+", prompt), key=int))


def is_test_prompt(prompt: str) -> bool:
    """Whether the numbers of a problem are held out, so that no order of them is trained on."""
    return held_out(numbers_key(prompt))


def generate(count: int, split: str, steps: tuple[int, int], largest: int, seed: int) -> list[dict[str, str]]:
    """`count` rows {prompt, answer} of `split` ("train" or "test") with from steps[0] to steps[1] steps."""
    rng = random.Random(f"{seed}/{split}")  # a text seeds the same everywhere
    rows = []
    for _ in range(count):
        wanted = rng.randint(*steps)
        while (row := _problem(rng, split == "test", wanted, largest)) is None:
            pass
        rows.append(row)
    return rows


def _problem(rng: random.Random, test: bool, steps: int, largest: int) -> dict[str, str] | None:
    """Draw a problem at random; None where there is no whole result, or where it is of the other split."""
    start, end, a = rng.choice(STARTS), rng.choice(ENDS) if steps == 2 else NOW, rng.randint(2, largest)
    if steps == 2 and held_out(start.story + end.story) != test:
        return None
    first = _step(rng, a, start.sign, largest)
    second = _step(rng, first[1], end.sign, largest) if first and steps == 2 else first
    if first is None or second is None:
        return None
    name, friend = rng.sample([name for name in NAMES if held_out(name) == test], 2)
    words = {"name": name, "friend": friend, "things": rng.choice(THINGS), "a": a, "b": first[0], "c": second[0]}
    prompt = " ".join(part.format(**words) for part in (start.story, end.story, end.question) if part)
    if is_test_prompt(prompt) != test:
        return None
    lines = [NOW.sentence.format(**words, sum=f"{a} {start.sign} {first[0]} = {first[1]}")]
    if steps == 2:
        lines.append(end.sentence.format(**words, sum=f"{first[1]} {end.sign} {second[0]} = {second[1]}"))
    return {"prompt": prompt, "answer": "\n".join([*lines, f"#### {second[1]}"])}


def _step(rng: random.Random, value: int, sign: str, largest: int) -> tuple[int, int] | None:
    """Draw (number, result of value SIGN number), both whole and from 2 to `largest`; None where there are none."""
    results = {
        "+": lambda n: value + n,
        "-": lambda n: value - n,
        "*": lambda n: value * n,
        "/": lambda n: value // n if value % n == 0 else 0,
    }
    found = [(n, result) for n in range(2, largest + 1) if 2 <= (result := results[sign](n)) <= largest]
    return rng.choice(found) if found else None


def parse_public(record: dict[str, str]) -> dict[str, str]:
    """A row of a public test file: a problem and its answer, which ends in `#### N` as in GSM8K."""
    prompt, answer = record["input"], record["output"]
    if not re.search(r"####\s*-?\d", answer):
        raise ValueError(f"output {answer[-20:]!r} has no #### N")
    return {"prompt": prompt, "answer": answer}
