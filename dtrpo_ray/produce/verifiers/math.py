"""Verify MATH: compare an expression with the reference's as mathematics, by the library math-verify.

Some expressions never finish (9^{9^{9^9}}), and only killing the process stops them. So a pool of one process compares,
and is replaced when a row takes too long; its own alarm ends it then if this process has ended before.
"""

import importlib.util
import logging
import multiprocessing
import resource
import signal
from collections.abc import Callable
from functools import cache, lru_cache
from multiprocessing.pool import Pool
from typing import Any

from dtrpo_ray.errors import ConfigError
from dtrpo_ray.produce.verifiers.extract import answer_error, marked_answers

SECONDS = 10  # wall-clock time for a row
MEMORY_BYTES = 4 << 30


def score(prompt: str, response: str, answer: str) -> float:
    """1.0 if the marked answer (the whole response if none is) equals the reference; else 0.0.

    Raises DataError for a reference that is no mathematics or takes longer than SECONDS, and ArithmeticError for a
    response that takes longer than SECONDS or makes the library fail.
    """
    given, gold = next(marked_answers(response), None), rf"\boxed{{{answer}}}"
    readable = _ask(_is_mathematics, gold)  # a reference that never finishes is not the response's fault
    if readable is not True:
        why = "it holds no mathematics" if readable is False else readable
        raise answer_error("math", why or f"it takes longer than {SECONDS} s")
    equal = _ask(_equal, gold, rf"\boxed{{{given}}}" if given is not None else response)
    if not isinstance(equal, bool):
        raise ArithmeticError(equal or f"not compared within {SECONDS} s")
    return float(equal)


def _ask(question: Callable[..., bool], *texts: str) -> bool | str | None:
    """Return the pool's answer to a question, the error that it raised, or None if it takes too long."""
    pool = _pool()
    try:
        return bool(pool.apply_async(_in_time, (question, 2 * SECONDS, *texts)).get(SECONDS))
    except multiprocessing.TimeoutError:
        pool.terminate()
        _pool.cache_clear()
        return None
    except Exception as error:
        return repr(error)[:200]


@cache
def _pool() -> Pool:
    """Start the process, which takes a second."""
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            "score.scorer = 'math' needs math-verify: pip install 'dtrpo-ray[verifiers]' (every node of the cluster)"
        )
    pool = multiprocessing.get_context("spawn").Pool(1, _prepare)
    try:
        pool.apply(_is_mathematics, ("$1$",))
    except Exception as error:
        raise ConfigError(f"score.scorer = 'math': math_verify does not work ({error!r}); reinstall it") from None
    return pool


# ---- in the process of the pool


def _prepare() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.WARNING)  # the library's, that it has no timeouts


def _in_time(question: Callable[..., bool], seconds: int, *texts: str) -> bool:
    signal.alarm(seconds)  # unhandled, it ends the process whatever that is doing
    try:
        return question(*texts)
    finally:
        signal.alarm(0)


def _is_mathematics(gold: str) -> bool:
    return bool(_reference(gold))


def _equal(gold: str, found: str) -> bool:
    from math_verify import parse, verify

    # no timeouts of the library: they are alarms that its own code may catch
    other = parse(found, parsing_timeout=None)
    return bool(other and verify(_reference(gold), other, timeout_seconds=None))


@lru_cache(maxsize=1)  # responses to one prompt follow each other
def _reference(gold: str) -> list[Any]:
    from math_verify import parse, verify

    known: list[Any] = parse(gold, parsing_timeout=None)
    verify(known, parse("$1$", parsing_timeout=None), timeout_seconds=None)
    return known
