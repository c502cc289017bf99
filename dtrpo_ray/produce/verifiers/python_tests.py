"""Verify Python code (HumanEval, MBPP): run the reference's unit tests against the response in another process.

The process has an empty environment and folder, and limits on processor time, memory, and the size and number of files
and processes. Linux namespaces keep it from the network, other processes, /tmp, /run and from writing outside its
folder, and end with it all that it started. If the machine does not permit namespaces, scoring warns and only the
limits hold: they stop accidents, not hostile code. Either way the code can read this user's files, and reach this
user's sockets and devices elsewhere.
"""

import json
import os
import re
import secrets
import signal
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from tempfile import TemporaryDirectory, TemporaryFile

from dtrpo_ray.errors import ConfigError
from dtrpo_ray.produce.verifiers.extract import answer_error, json_object

CPU_SECONDS, WALL_SECONDS = 5, 10
_LIMITS = {
    "RLIMIT_CPU": CPU_SECONDS,
    "RLIMIT_AS": 1 << 30,
    "RLIMIT_FSIZE": 1 << 20,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_CORE": 0,
    "RLIMIT_NPROC": 64,  # without namespaces it counts all processes of this user; root has no such limit
}
_PROBE_SECONDS, _BACKSTOP_SECONDS = 60, 5
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|$)", re.DOTALL)
_SANDBOX = Path(__file__).with_name("sandbox.py")


def score(prompt: str, response: str, answer: str) -> float:
    """1.0 if the tests pass. `answer` is JSON: HumanEval's {prompt, test, entry_point} or MBPP's {test_list}."""
    given = json_object(answer, "python_tests")
    code = "\n\n".join(_FENCE.findall(response) or [response])  # all code blocks, or else the whole response
    is_text = {name for name, value in given.items() if isinstance(value, str)}
    if is_text >= {"entry_point", "prompt", "test"}:
        if f"def {given['entry_point']}(" not in code:  # a completion of the prompt's signature
            code = given["prompt"] + code
        tests = f"{given['test']}\ncheck({given['entry_point']})"
    elif isinstance(given.get("test_list"), list) and given["test_list"]:
        tests = "\n".join(map(str, [given.get("test_setup_code") or "", *given["test_list"]]))
    else:
        raise answer_error("python_tests", "neither prompt, test and entry_point as text, nor a test_list")
    return float(passes(code, tests))


def passes(code: str, tests: str, wall_seconds: float = WALL_SECONDS) -> bool:
    """Return True if `tests` run to their end after `code`, within the limits."""
    return _run(code, tests, wall_seconds, isolated=namespaces())


@cache
def namespaces() -> bool:
    """Return True if this machine permits the namespaces, in one of two tries.

    Raises ConfigError if not even an empty test passes, since every response would then fail.
    """
    permitted = any(_run("", "", _PROBE_SECONDS, isolated=True) for _ in range(2))
    if not permitted and not _run("", "", _PROBE_SECONDS, isolated=False):
        raise ConfigError(
            f"python_tests: {sys.executable} fails on an empty test within the limits {_LIMITS}; repair it"
        )
    return permitted


def caution() -> str:
    """Return a warning about scoring on this machine, or ""."""
    if namespaces():
        return ""
    return (
        "code under test ran without namespaces, which this machine does not permit (docs/data.md): it could reach the "
        "network, other processes and this user's files; score untrusted responses elsewhere"
    )


def _run(code: str, tests: str, wall_seconds: float, isolated: bool) -> bool:
    word, how = secrets.token_hex(16), "isolated" if isolated else "limited"
    job = {"code": code, "tests": tests, "word": word, "limits": _LIMITS}
    command = [sys.executable, "-I", "-S", str(_SANDBOX), how, str(wall_seconds)]
    # the verdict is not a pipe: the limit on file sizes holds for a file
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, TemporaryFile() as verdict:
        process = Popen(command, stdin=PIPE, stdout=verdict, stderr=DEVNULL, cwd=folder, env={}, start_new_session=True)
        try:
            process.communicate(json.dumps(job).encode(), timeout=wall_seconds + (_BACKSTOP_SECONDS if isolated else 0))
        except TimeoutExpired:
            return False
        finally:
            process.terminate()  # it ends its namespace
            with suppress(TimeoutExpired):
                process.wait(1)
            with suppress(ProcessLookupError):  # and the processes that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        verdict.seek(0)
        return process.returncode == 0 and verdict.read(len(word) + 1) == word.encode()
