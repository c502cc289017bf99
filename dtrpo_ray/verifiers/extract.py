r"""Where a model's text says its answer: the last `\boxed{}`, the last <answer>, or what follows the last ####."""

import re
from collections.abc import Iterator

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
