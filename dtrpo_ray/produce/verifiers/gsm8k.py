"""Verify GSM8K: compare a number with the number of the reference ("... #### 18", or the number alone)."""

import re
from decimal import Decimal
from fractions import Fraction

from dtrpo_ray.produce.verifiers.extract import answer_error, marked_answers

# a hyphen after a word, a number or a bracket is no sign: 5-18
_NUMBER = re.compile(r"(?<![\w.)])-?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?|-?\.\d+")
_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|\\[,!:; ])(?=\d{3})")  # of thousands in LaTeX
_FRAC = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_FRACTION = re.compile(r"\s*(-?\d+)\s*/\s*(\d+)\s*")


def number(text: str) -> Fraction | None:
    """Return the last number of a text, thousands separated or not, or the value of a text that is one fraction."""
    text = _FRAC.sub(r"\1/\2", _SEPARATOR.sub("", text))
    if whole := _FRACTION.fullmatch(text):
        over, under = (Fraction(Decimal(part)) for part in whole.groups())
        return over / under if under else None
    found = _NUMBER.findall(text)
    return Fraction(Decimal(found[-1].replace(",", ""))) if found else None


def score(prompt: str, response: str, answer: str) -> float:
    """1.0 if the marked answer, or else the last number of the response, equals the reference; else 0.0.

    Raises DataError for a reference without a number.
    """
    wanted = number(answer.rsplit("####", 1)[-1])
    if wanted is None:
        raise answer_error("gsm8k", "it holds no number")
    places = list(marked_answers(response))
    if "####" in response:
        places[-1] = places[-1].split("\n")[0]  # text below the line is no answer
    given = next((value for place in places if (value := number(place)) is not None), number(response))
    return float(given == wanted)
