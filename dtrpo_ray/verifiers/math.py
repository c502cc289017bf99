"""MATH: an expression against the reference's, compared as mathematics by the library math-verify."""

from functools import cache
from typing import Any

from dtrpo_ray.errors import ConfigError
from dtrpo_ray.verifiers.extract import marked


def score(prompt: str, response: str, answer: str) -> float:
    """1.0 if the marked answer (the whole response if none is) equals the reference; else 0.0."""
    parse, verify = _library()
    # no timeouts of its own: they are signals, which only a main thread may set
    gold = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)
    given = next(marked(response), None)
    found = parse(rf"\boxed{{{given}}}" if given is not None else response, parsing_timeout=None)
    return float(bool(gold) and bool(found) and verify(gold, found, timeout_seconds=None))


@cache
def _library() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ConfigError(
            "score.scorer = 'math' needs math-verify: pip install 'dtrpo-ray[verifiers]' (every node of the cluster)"
        ) from None
    return parse, verify
