"""Countdown: reach a target from numbers with + - * /, each used once; puzzles by combining numbers drawn at random.

A prompt is the numbers and then the target, closed by a colon ("15,44,79,50:"), without which the target's digits would
run into the answer's; a response is one equation per step, results usable further on ("44-15=29,79-29=50"). All values
are integers from 0 up; the last result is the target. `score` and the split rule take a prompt without its colon too.
"""

import hashlib
import random
import re

ALPHABET = "0123456789,+-*/=:"
END = ":"  # of a prompt
RESPONSE_CHARS = 36  # the longest answer of `generate`, for four numbers
FIXED_LENGTH = False  # an end-of-sequence token closes the response

# the ranges of the public files, and of our intermediate results
_NUMBERS, _TARGETS, _LARGEST = (1, 99), (10, 99), 9999
_LONGEST = 128  # characters of a response worth reading; also keeps integers small
_INTEGER = "(0|[1-9][0-9]{0,8})"
_PROMPT = re.compile(f"{_INTEGER}(,{_INTEGER}){{2,8}}")
_EQUATION = re.compile(f"{_INTEGER}([-+*/]){_INTEGER}={_INTEGER}")


def is_test_prompt(prompt: str) -> bool:
    """The split rule, public so that others can test on what we never trained on: 30 % of puzzles by SHA-256.

    The numbers are sorted first (as text), so that no reordering of a held-out puzzle is trained on.
    """
    *numbers, target = prompt.removesuffix(END).split(",")
    return int(hashlib.sha256(",".join([*sorted(numbers), target]).encode()).hexdigest(), 16) % 10 < 3


def score(prompt: str, response: str, answer: str | None = None) -> float:
    """1.0 if the equations hold, use every number once and end in the target, else 0.0. Any derivation counts."""
    puzzle = prompt.removesuffix(END)
    if len(response) > _LONGEST or not _PROMPT.fullmatch(puzzle):
        return 0.0
    *pool, target = map(int, puzzle.split(","))
    for equation in response.split(","):
        parts = _EQUATION.fullmatch(equation)
        if parts is None:
            return 0.0
        left, right, result = int(parts[1]), int(parts[3]), int(parts[4])
        if _apply(left, parts[2], right) != result:
            return 0.0
        for used in (left, right):
            if used not in pool:
                return 0.0
            pool.remove(used)
        pool.append(result)
    return float(pool == [target])


def _apply(left: int, sign: str, right: int) -> int | None:
    """The result, or None where it is not an integer from 0 up."""
    if sign == "/":
        return left // right if right and left % right == 0 else None
    result = {"+": left + right, "-": left - right, "*": left * right}[sign]
    return result if result >= 0 else None


def generate(count: int, split: str, numbers: int, seed: int) -> list[dict[str, str]]:
    """`count` rows {prompt, answer} of `split` ("train" or "test") with that many numbers; targets 10 to 99.

    The two splits share no puzzle. A public test file follows no such rule: of its prompts, only those that
    `is_test_prompt` holds for are certain never to be generated for training.
    """
    rng = random.Random(f"{seed}/{split}")  # a text seeds the same everywhere
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        drawn = [rng.randint(*_NUMBERS) for _ in range(numbers)]
        target, answer = _combine(drawn, rng)
        prompt = ",".join(map(str, [*drawn, target])) + END
        if _TARGETS[0] <= target <= _TARGETS[1] and is_test_prompt(prompt) == (split == "test"):
            rows.append({"prompt": prompt, "answer": answer})
    return rows


def _combine(numbers: list[int], rng: random.Random) -> tuple[int, str]:
    """Two values at a time, larger first, through a legal operation drawn at random, until one is left."""
    pool, equations = list(numbers), []
    while len(pool) > 1:
        rng.shuffle(pool)
        right, left = sorted([pool.pop(), pool.pop()])
        results = {sign: _apply(left, sign, right) for sign in "+-*/"}
        legal = {sign: value for sign, value in results.items() if value is not None and value <= _LARGEST}
        sign = rng.choice(list(legal))
        pool.append(legal[sign])
        equations.append(f"{left}{sign}{right}={legal[sign]}")
    return pool[0], ",".join(equations)


def parse_public(record: dict[str, str]) -> dict[str, str]:
    """A row of a public test file.

    Dream's (eval/data) give numbers and target as input and a derivation as output; d1's give the target as output
    and no derivation, so their answer is empty.
    """
    given, output = record["input"], record["output"]
    is_target = re.fullmatch("[0-9]+", output) is not None
    puzzle, answer = (f"{given},{output}", "") if is_target else (given, output)
    if not _PROMPT.fullmatch(puzzle):
        raise ValueError(f"input {given!r}")
    return {"prompt": puzzle + END, "answer": answer}
