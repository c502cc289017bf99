"""Run a command as its entry point would, in the test's own process."""

import io
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from paths import ROOT

from dtrpo_ray import cli


def dtrpo(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `dtrpo WORDS` in `cwd`, and return what a process of its own would have left.

    A process takes ten seconds to import torch and Ray and to start Ray: a test starts one where it interrupts the
    command, or looks at its imports. A command that needs Ray joins the session of the fixture `local_ray`.
    """
    out, err = io.StringIO(), io.StringIO()
    with chdir(cwd), redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", ["dtrpo", *words]):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    assert isinstance(code, int)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
