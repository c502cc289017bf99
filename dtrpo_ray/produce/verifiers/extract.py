r"""Where a model's text says its answer: the last `\boxed{}`, the last <answer>, or what follows the last ####.

A verifier raises DataError for a reference answer that it cannot read, so that the row is named.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from dtrpo_ray.errors import DataError

_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)


def boxed(text: str) -> str | None:
    r"""What the last whole `\boxed{...}` or `\fbox{...}` holds, braces balanced."""
    found = None
    for start in (match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)):
        depth = 1
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                found = text[start:at]
                break
    return found


def marked(text: str) -> Iterator[str]:
    """The places that mark an answer, the most explicit first."""
    if (inside := boxed(text)) is not None:
        yield inside
    if tags := _TAG.findall(text):
        yield tags[-1].strip()
    if "####" in text:
        yield text.rsplit("####", 1)[1].strip()


def unreadable(verifier: str, why: object) -> DataError:
    """The error of a reference answer that a verifier cannot read."""
    return DataError(f"answer is not what {verifier} reads ({why}); see docs/data.md")


def json_object(answer: str, verifier: str) -> dict[str, Any]:
    """A reference answer that is a JSON object. Raises DataError for another."""
    try:
        given = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise unreadable(verifier, repr(error)) from None
    if not isinstance(given, dict):
        raise unreadable(verifier, f"a JSON {type(given).__name__}, not an object")
    return given
