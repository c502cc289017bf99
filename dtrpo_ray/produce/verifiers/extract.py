r"""Find the answer in a model's text: the last `\boxed{}`, the last <answer>, or what follows the last ####.

A verifier raises DataError for a reference answer that it cannot read; the scorer adds the row.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from dtrpo_ray.errors import DataError

_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)


def last_box(text: str) -> str | None:
    r"""Return the content of the last whole `\boxed{...}` or `\fbox{...}`, braces balanced."""
    found = None
    for start in (match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)):
        depth = 1
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                found = text[start:at]
                break
    return found


def marked_answers(text: str) -> Iterator[str]:
    """Yield the marked answers, the most explicit mark first."""
    if (inside := last_box(text)) is not None:
        yield inside
    if tags := _TAG.findall(text):
        yield tags[-1].strip()
    if "####" in text:
        yield text.rsplit("####", 1)[1].strip()


def answer_error(verifier: str, why: object) -> DataError:
    """Make the error of a reference answer that a verifier cannot read."""
    return DataError(f"{verifier} cannot read this answer ({why}); see docs/data.md")


def json_object(answer: str, verifier: str) -> dict[str, Any]:
    """Parse a reference answer that is a JSON object. Raises DataError for any other."""
    try:
        given = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise answer_error(verifier, repr(error)) from None
    if not isinstance(given, dict):
        raise answer_error(verifier, f"a JSON {type(given).__name__}, not an object")
    return given
