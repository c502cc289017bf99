"""MATH: an expression against the reference's, compared as mathematics by the library math-verify.

Some expressions are never done (9^{9^{9^9}}), and nothing but the end of a process stops them: a worker of this process
compares, one row after the other, and another takes its place when its alarm has ended it.
"""

import atexit
import importlib.util
import json
import subprocess
import sys
from functools import cache
from threading import Lock

from dtrpo_ray.errors import ConfigError
from dtrpo_ray.verifiers.extract import marked, unreadable

SECONDS = 10  # of the clock for a row
MEMORY_BYTES = 4 << 30

# an alarm that nobody handles ends the process, whatever it is at; so it does when this process has ended
_WORKER = """
import json, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from math_verify import parse, verify
print("ready", flush=True)
for line in sys.stdin:
    seconds, *texts = json.loads(line)
    signal.alarm(seconds)
    try:
        # no timeouts of the library: they are alarms that its own code may catch
        gold, found = (parse(text, parsing_timeout=None) for text in texts)
        told = bool(found and verify(gold, found, timeout_seconds=None)) if gold else "no reference"
    except Exception as error:
        told = repr(error)[:200]
    signal.alarm(0)
    print(json.dumps(told), flush=True)
"""


def score(prompt: str, response: str, answer: str) -> float:
    """1.0 if the marked answer (the whole response if none is) equals the reference within SECONDS; else 0.0.

    Raises DataError for a reference that is no mathematics, ArithmeticError for what the library breaks at.
    """
    given = next(marked(response), None)
    found = rf"\boxed{{{given}}}" if given is not None else response
    told = _worker().compare(rf"\boxed{{{answer}}}", found)
    if told == "no reference":
        raise unreadable("math", "math-verify finds no mathematics in it")
    if isinstance(told, str):
        raise ArithmeticError(told)
    return float(told)


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

    def compare(self, gold: str, found: str) -> bool | str:
        """Whether the two are equal, False if that took too long; or what went wrong."""
        with self.lock:
            if self.process.poll() is not None:
                self.process = self._start()
            told = self._ask(json.dumps([SECONDS, gold, found]))
            if told is None:
                self.end()
                return False
            answer: bool | str = json.loads(told)
            return answer

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

    def _ask(self, line: str) -> str | None:
        """The worker's reply; None if it has ended."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.process.stdout.readline().strip() or None
