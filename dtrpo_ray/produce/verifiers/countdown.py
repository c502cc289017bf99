"""Verify Countdown in prose: an expression, or our own derivation, reaches a target and uses every number once."""

import ast
import json
import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from dtrpo_ray.data.tasks import countdown
from dtrpo_ray.errors import DataError
from dtrpo_ray.produce.verifiers.extract import answer_error, marked_answers

ANSWER_OPTIONAL = True

_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
# 3, 3.0, 1e16 or "3", and not true
_Integer = Annotated[int, BeforeValidator(lambda v: str(int(v)) if isinstance(v, float) and v.is_integer() else str(v))]
_REFERENCE = TypeAdapter(tuple[list[_Integer], _Integer])
_LONGEST = 200  # characters of an expression
_SPELLINGS = {r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "÷": "/", "−": "-", r"\left": "", r"\right": ""}


def score(prompt: str, response: str, answer: str | None = None) -> float:
    """1.0 if the marked expression, or else the whole response, uses every number once and gives the target."""
    numbers, target = _puzzle(prompt, answer)
    if countdown.score(",".join(map(str, [*numbers, target])), response.strip()):
        return 1.0
    used: list[int] = []
    value = _value(next(marked_answers(response), response), used)
    return float(value == target and Counter(used) == Counter(numbers))


def _puzzle(prompt: str, answer: str | None) -> tuple[list[int], int]:
    """Read numbers and target from the reference [[numbers], target] if it is a list, else from the prompt.

    Raises DataError for a list of another form, and if there are no numbers.
    """
    try:
        given = json.loads(answer or "")
    except ValueError:
        given = None
    except RecursionError as error:
        raise answer_error("countdown", repr(error)) from None
    if isinstance(given, list):
        try:
            return _REFERENCE.validate_python(given)
        except ValidationError:
            raise answer_error("countdown", f"{str(given)[:60]}, not [[numbers], target] in integers") from None
    found = [int(n) for n in re.findall(r"\d+", prompt) if len(n) <= _LONGEST]
    if len(found) < 3:
        raise DataError("countdown finds numbers and a target neither in answer nor in the prompt; see docs/data.md")
    return found[:-1], found[-1]


def _value(text: str, used: list[int]) -> Fraction | None:
    for spelling, plain in _SPELLINGS.items():
        text = text.replace(spelling, plain)
    text = text.split("=")[0].strip()
    if len(text) > _LONGEST:
        return None
    try:
        return _evaluate(ast.parse(text, mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.AST, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluate(node.left, used), _evaluate(node.right, used))
    raise ValueError("only + - * / of integers")
