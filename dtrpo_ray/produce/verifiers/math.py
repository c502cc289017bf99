"""MATH: an expression against the reference's, compared as mathematics by the library math-verify.

Some expressions are never done (9^{9^{9^9}}), and nothing but the end of a process stops them: a worker of this process
compares, one row after the other, and another takes its place when its alarm has ended it.
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
from dtrpo_ray.produce.verifiers.extract import marked, unreadable

SECONDS = 10  # of the clock for a row
MEMORY_BYTES = 4 << 30

# an alarm that nobody handles ends the process, whatever it is at; so it does when this process has ended
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
        if read != gold:  # responses to a prompt come one after the other
            known = parse(gold, parsing_timeout=None)
            verify(known, one, timeout_seconds=None)  # one that is never done is not the response's fault
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

    Raises DataError for a reference that is no mathematics or not read within SECONDS, and ArithmeticError for a
    response that is not compared within SECONDS or that the library breaks at.
    """
    given = next(marked(response), None)
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
    """A process that compares; starting it costs a second, so that it is kept."""

    def __init__(self) -> None:
        self.lock, self.process = Lock(), self._start()

    def compare(self, gold: str, found: str) -> bool:
        """Whether the two are equal. Raises what `score` does."""
        with self.lock:
            if self.process.poll() is not None:
                self.process = self._start()
            reference = self._ask(json.dumps([SECONDS, gold, found]))
            if reference is not True:
                why = "it holds no mathematics" if reference is False else reference
                raise unreadable("math", why or f"it takes longer than {SECONDS} s")
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
            raise ConfigError(f"score.scorer = 'math': {sys.executable} cannot import math_verify; install it anew")
        return process

    def _ask(self, line: str) -> bool | str | None:
        """The worker's first reply."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        return self._reply()

    def _reply(self) -> bool | str | None:
        """The next line of the worker; None if it has ended."""
        assert self.process.stdout
        if line := self.process.stdout.readline():
            told: bool | str = json.loads(line)
            return told
        self.end()
        return None
