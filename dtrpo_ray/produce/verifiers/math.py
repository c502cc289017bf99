"""Verify MATH: compare an expression with the reference's as mathematics, by the library math-verify.

Some expressions never finish (9^{9^{9^9}}), and only killing the process stops them. So a worker process compares, one
row after the other; its own alarm ends it when a row takes too long, and a new worker takes its place.
"""

import atexit
import importlib.util
import json
import subprocess
import sys
from contextlib import suppress
from functools import cache
from threading import Lock

from dtrpo_ray.errors import ConfigError
from dtrpo_ray.produce.verifiers.extract import answer_error, marked_answers

SECONDS = 10  # wall-clock time for a row
MEMORY_BYTES = 4 << 30

# an unhandled alarm ends the process whatever it is doing, also after this process has ended
_WORKER = """
import json, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from math_verify import parse, verify
one, read, known = parse("$1$", parsing_timeout=None), None, []
print("ready", flush=True)

def tell(seconds, action):
    signal.alarm(seconds)
    try:
        told = action()
    except Exception as error:
        told = repr(error)[:200]
    signal.alarm(0)
    print(json.dumps(told), flush=True)
    return told

for line in sys.stdin:
    seconds, gold, found = json.loads(line)

    # no timeouts of the library: they are alarms that its own code may catch
    def reference():
        global read, known
        if read != gold:  # responses to one prompt follow each other
            known = parse(gold, parsing_timeout=None)
            verify(known, one, timeout_seconds=None)  # a reference that never finishes is not the response's fault
            read = gold
        return bool(known)

    def equal():
        other = parse(found, parsing_timeout=None)
        return bool(other and verify(known, other, timeout_seconds=None))

    if tell(seconds, reference) is True:
        tell(seconds, equal)
"""


def score(prompt: str, response: str, answer: str) -> float:
    """1.0 if the marked answer (the whole response if none is) equals the reference; else 0.0.

    Raises DataError for a reference that is no mathematics or takes longer than SECONDS, and ArithmeticError for a
    response that takes longer than SECONDS or makes the library fail.
    """
    given = next(marked_answers(response), None)
    found = rf"\boxed{{{given}}}" if given is not None else response
    return float(_worker().compare(rf"\boxed{{{answer}}}", found))


@cache
def _worker() -> "_Worker":
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            "score.scorer = 'math' needs math-verify: pip install 'dtrpo-ray[verifiers]' (every node of the cluster)"
        )
    worker = _Worker()
    atexit.register(worker.end)
    return worker


class _Worker:
    """A process that compares; it is kept because starting it takes a second."""

    def __init__(self) -> None:
        self.lock, self.process = Lock(), self._start()

    def compare(self, gold: str, found: str) -> bool:
        """Return True if the two are equal. Raises the errors of `score`."""
        with self.lock:
            if self.process.poll() is not None:
                self.process = self._start()
            assert self.process.stdin
            with suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps([SECONDS, gold, found]) + "\n")
                self.process.stdin.flush()
            reference = self._reply()
            if reference is not True:
                why = "it holds no mathematics" if reference is False else reference
                raise answer_error("math", why or f"it takes longer than {SECONDS} s")
            equal = self._reply()
            if not isinstance(equal, bool):
                raise ArithmeticError(equal or f"not compared within {SECONDS} s")
            return equal

    def end(self) -> None:
        """End the process; the next question starts another."""
        self.process.kill()
        self.process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _WORKER, str(MEMORY_BYTES)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout
        if process.stdout.readline() != "ready\n":
            raise ConfigError(f"score.scorer = 'math': {sys.executable} cannot import math_verify; reinstall it")
        return process

    def _reply(self) -> bool | str | None:
        """Return the worker's next reply; None if it has ended."""
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.end()
        return None
