"""GSM8K: a number against the number of the reference ("... #### 18", or the number alone)."""

import re
from decimal import Decimal

from dtrpo_ray.verifiers.extract import marked

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def number(text: str) -> Decimal | None:
    """The last number of a text, thousands separated by commas or not."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def score(prompt: str, response: str, answer: str) -> float:
    """1.0 if the marked answer, or else the last number of the response, equals the reference; else 0.0."""
    places = (value for place in marked(response) if (value := number(place)) is not None)
    given = next(places, number(response))
    return float(given is not None and given == number(answer.rsplit("####", 1)[-1]))
