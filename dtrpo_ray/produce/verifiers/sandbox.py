"""Judges one response's code by its tests, as a script of its own, in two steps: it closes itself in, and becomes
`judge`, which reads the job from stdin, runs code and tests, and then writes a word to what was its stdout.

The word shows that the tests ran to their end. No frame and no module holds it, nor what is still to run: both are
bound in C objects before the code begins, and the ways into those (gc, ctypes, tracing, new code objects) are refused.
That stops accidents and simple cheats, and no adversary: code can deceive the tests (by an object that equals
everything, or by replacing a builtin that they call), and a process that it starts can read the judge's memory.
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
_HIDDEN = ("/proc", "/run", "/var/tmp")  # which show other processes, and their sockets
_FOLDER_BYTES = 64 << 20
_MOUNT_SETATTR, _HERE, _AT_RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1
_DIES_WITH_PARENT, _NO_NEW_PRIVILEGES = 1, 38  # of prctl(2)
_NOBODY = 65534
_REFUSED = frozenset(
    ("gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys.settrace", "sys.setprofile", "code.__new__")
)


def close_in(isolated: bool, seconds: float) -> None:
    """Namespaces if `isolated` (see python_tests), no new privileges, an end when the parent ends; then the judge.

    Isolated, everything ends after `seconds`. Raises OSError for what the machine does not permit.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with open(__file__) as file:
        source = file.read()  # which the namespace may hide

    def call(name: str, *arguments: Any) -> None:
        if getattr(libc, name)(*arguments) < 0:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    def mount(place: str, options: str = "") -> None:
        call("mount", b"none", place.encode(), b"tmpfs", _PLAIN, options.encode() or None)

    if isolated:
        call("prctl", _DIES_WITH_PARENT, signal.SIGTERM, 0, 0, 0)
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
        if child := os.fork():  # the first process of the namespace: with it all others end
            _end_with(child, watched, time.monotonic() + seconds)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
    call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    call("prctl", _DIES_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", source, "judge"])


def _end_with(child: int, watched: set[signal.Signals], deadline: float) -> None:
    """Exit as the child does; kill it at the deadline, or when this process is told to end. Nothing inside sees it."""
    while (left := deadline - time.monotonic()) > 0:
        told = signal.sigtimedwait(watched, left)
        if told is None or told.si_signo == signal.SIGTERM:
            break
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            os._exit(status != 0)
    os.kill(child, signal.SIGKILL)
    os._exit(1)


def steps(job: dict[str, Any]) -> list[partial[Any]]:
    """What is called one after the other, up to the first that raises; the last two are C functions."""
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    verdict = os.dup(1)
    os.dup2(2, 1)
    space = {"__name__": "__main__"}
    runs = [partial(exec, compile(job[name], f"<{name}>", "exec"), space) for name in ("code", "tests")]
    refuse_to_look()
    return [*runs, partial(os.write, verdict, job["word"].encode()), partial(os._exit, 0)]


def refuse_to_look() -> None:
    """Refuse for ever what would show or change what C objects hold."""
    refused = _REFUSED  # of this frame: a module's globals could be replaced

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in refused or event.startswith("ctypes.") or (event == "import" and arguments[0] == "_ctypes"):
            raise RuntimeError(f"{event} is not allowed here")

    sys.addaudithook(hook)


if __name__ == "__main__":
    if sys.argv[1] == "judge":
        deque(map(partial.__call__, steps(json.load(sys.stdin))), maxlen=0)
    else:
        close_in(sys.argv[1] == "isolated", float(sys.argv[2]))
