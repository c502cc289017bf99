"""Python unit tests (HumanEval, MBPP): the response's code runs against the reference's tests in another process.

The process has no environment, an empty folder of its own, and limits on time, memory, files and processes. That stops
accidents and endless loops; it is no wall against hostile code, which can still read files and reach the network.
"""

import json
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

CPU_SECONDS, WALL_SECONDS = 5, 10
_MEMORY_BYTES, _FILE_BYTES, _OPEN_FILES = 1 << 30, 1 << 20, 64
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|$)", re.DOTALL)

# the verdict is a word only this process knows, so that code that exits early has not passed
_HARNESS = """
import json, sys
job = json.load(sys.stdin)
word = job.pop("word")
space = {"__name__": "__main__"}
exec(compile(job["code"], "<response>", "exec"), space)
exec(compile(job["tests"], "<tests>", "exec"), space)
print(word)
"""


def score(prompt: str, response: str, answer: str) -> float:
    """1.0 if the tests pass. `answer` is JSON: HumanEval's {prompt, test, entry_point} or MBPP's {test_list}."""
    given = json.loads(answer)
    code = code_of(response)
    if "entry_point" in given:
        if f"def {given['entry_point']}(" not in code:  # a completion of the prompt's signature
            code = given["prompt"] + code
        tests = f"{given['test']}\ncheck({given['entry_point']})"
    else:
        tests = "\n".join([given.get("test_setup_code") or "", *given["test_list"]])
    return float(passes(code, tests))


def code_of(response: str) -> str:
    """The code blocks of a response, joined; the whole response if it has none."""
    blocks = _FENCE.findall(response)
    return "\n\n".join(blocks) if blocks else response


def passes(code: str, tests: str, wall_seconds: float = WALL_SECONDS) -> bool:
    """Whether `tests` run to their end after `code`, within the limits."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _HARNESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
            preexec_fn=_limit,
        )
        try:
            out, _ = process.communicate(
                json.dumps({"word": word, "code": code, "tests": tests}).encode(), timeout=wall_seconds
            )
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):  # what it started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
    return process.returncode == 0 and out.decode(errors="replace").rstrip().endswith(word)


def _limit() -> None:
    limits = {
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_AS: _MEMORY_BYTES,
        resource.RLIMIT_FSIZE: _FILE_BYTES,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
