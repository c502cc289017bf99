"""Run one response's code and tests, as a script: first confine this process, then become `judge`.

`judge` reads the job from stdin, runs code and tests, and then writes a secret word to its former stdout, which proves
that the tests ran to their end. No frame and no module holds the word or the calls still to come: C objects do, bound
before the code begins, and the ways into them (gc, ctypes, tracing, new code objects) are refused. This stops accidents
and simple cheats, not an adversary: code can deceive the tests (by an object that equals everything, or by replacing a
builtin that they call), and a process that it starts can read the judge's memory.
"""

import json
import os
import resource
import signal
import sys
import time
from collections import deque
from functools import partial
from typing import Any

_USER, _OTHERS = 0x10000000, 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000  # mounts, IPC, processes, network
_PRIVATE, _RECURSIVE, _PLAIN = 1 << 18, 1 << 14, 2 | 4 | 8  # of mount(2); no setuid, no devices, no programs
_FOLDER = "/tmp"  # the code's own, empty
_HIDDEN = ("/proc", "/run", "/var/tmp")  # they show other processes and their sockets
_FOLDER_BYTES = 64 << 20
_MOUNT_SETATTR, _HERE, _AT_RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1
_DIES_WITH_PARENT, _NO_NEW_PRIVILEGES = 1, 38  # of prctl(2)
_NOBODY = 65534
_REFUSED = frozenset(
    ("gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys.settrace", "sys.setprofile", "code.__new__")
)


def close_in(isolated: bool, seconds: float) -> None:
    """Confine this process, in namespaces if `isolated` (see python_tests), and become the judge.

    It gains no privileges and ends with its parent; isolated, all ends after `seconds`. Raises OSError for what the
    machine does not permit.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with open(__file__) as file:
        source = file.read()  # the namespace may hide this file

    def call(name: str, *arguments: Any) -> None:
        if getattr(libc, name)(*arguments) < 0:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    def prctl(option: int, value: int) -> None:
        call("prctl", option, value, *(0, 0, 0))

    def mount(place: str, options: str = "") -> None:
        call("mount", b"none", place.encode(), b"tmpfs", _PLAIN, options.encode() or None)

    if isolated:
        prctl(_DIES_WITH_PARENT, signal.SIGTERM)
        users, groups = f"{_NOBODY} {os.getuid()} 1", f"{_NOBODY} {os.getgid()} 1"
        call("unshare", _USER | _OTHERS)
        for name, line in (("setgroups", "deny"), ("uid_map", users), ("gid_map", groups)):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
        call("mount", None, b"/", None, _PRIVATE | _RECURSIVE, None)
        for place in filter(os.path.isdir, _HIDDEN):
            mount(place)
        mount(_FOLDER, f"size={_FOLDER_BYTES},mode=700")
        for place, wanted in (("/", (_READ_ONLY, 0, 0, 0)), (_FOLDER, (0, _READ_ONLY, 0, 0))):
            attributes = (ctypes.c_uint64 * 4)(*wanted)
            call("syscall", _MOUNT_SETATTR, _HERE, place.encode(), _AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
        os.chdir(_FOLDER)
        watched = {signal.SIGCHLD, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        if child := os.fork():  # the child is the namespace's first process: all others end with it
            _end_with(child, watched, time.monotonic() + seconds)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
    prctl(_NO_NEW_PRIVILEGES, 1)
    prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", source, "judge"])


def _end_with(child: int, watched: set[signal.Signals], deadline: float) -> None:
    """Exit like the child; kill it at the deadline, or when this process is asked to end. The child cannot see this."""
    while (left := deadline - time.monotonic()) > 0:
        caught = signal.sigtimedwait(watched, left)
        if caught is None or caught.si_signo == signal.SIGTERM:
            break
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            os._exit(status != 0)
    os.kill(child, signal.SIGKILL)
    os._exit(1)


def make_calls(job: dict[str, Any]) -> list[partial[Any]]:
    """Bind the calls to run in turn, up to the first that raises; the last two are C functions."""
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    verdict = os.dup(1)
    os.dup2(2, 1)
    space = {"__name__": "__main__"}
    runs = [partial(exec, compile(job[name], f"<{name}>", "exec"), space) for name in ("code", "tests")]
    refuse_to_look()
    return [*runs, partial(os.write, verdict, job["word"].encode()), partial(os._exit, 0)]


def refuse_to_look() -> None:
    """Install a hook that refuses, for good, the ways to see or change what C objects hold."""
    refused = _REFUSED  # a local: the code could replace a module's globals

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in refused or event.startswith("ctypes.") or (event == "import" and arguments[0] == "_ctypes"):
            raise RuntimeError(f"{event} is not allowed here")

    sys.addaudithook(hook)


if __name__ == "__main__":
    if sys.argv[1] == "judge":
        deque(map(partial.__call__, make_calls(json.load(sys.stdin))), maxlen=0)
    else:
        close_in(sys.argv[1] == "isolated", float(sys.argv[2]))
