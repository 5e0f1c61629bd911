"""Run generated code and its tests in bubblewrap, as nobody, with resource limits."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mtp_graft.errors import GraftError

_BUBBLEWRAP = "bwrap"
#: Where Python and its shared libraries lie; everything else is out of sight.
_READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")
_SOURCE = Path(__file__).with_name("sandboxed.py").read_text(encoding="utf-8")


class Failure(NamedTuple):
    """What is wrong with an answer: a kind of failure, or an exception's name."""

    kind: str
    detail: str = ""


def run_tests(
    task: Mapping[str, Any], seconds: float = 60.0, python: str | None = None
) -> Failure | None:
    """Run a program's tests for at most `seconds`; return what failed, or None.

    `task` has the `program`, its `entry_point`, the `test`, which defines `check(candidate)`, and
    the `prompt`, code that the tests may use. Raises GraftError if there is no sandbox.
    """
    python, deadline = python or find_python(), time.monotonic() + seconds
    with _sandboxed(python, "program", seconds) as program:
        assert program.stdin is not None and program.stdout is not None
        ends = (program.stdin.fileno(), program.stdout.fileno())
        with _sandboxed(python, "tests", seconds, ends) as tests:
            program.stdin.close()  # the tests' now: when they end, the program does
            program.stdout.close()
            message = json.dumps({**task, "requests": ends[0], "answers": ends[1]})
            left = max(0.0, deadline - time.monotonic())
            try:
                out, errors = tests.communicate(message.encode() + b"\n", timeout=left)
            except subprocess.TimeoutExpired:
                return Failure("TimeoutError", f"not done after {seconds:g} s")
        program.kill()
        assert program.stderr is not None
        errors = errors or program.stderr.read()
    if errors:  # bubblewrap's or Python's: the code's own go nowhere
        raise GraftError(f"sandbox: {errors.decode(errors='replace').strip()[-600:]}")
    if not out:  # the tests themselves met a limit
        return Failure("ProcessEnded", "the tests ended without a verdict")
    found = json.loads(out)
    return found and Failure(*found)


@contextmanager
def _sandboxed(
    python: str, role: str, seconds: float, pass_fds: Sequence[int] = ()
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a process with pipes as its streams; it is gone after the block."""
    command = [_BUBBLEWRAP, "--unshare-all", "--unshare-user", "--disable-userns", "--clearenv"]
    # As process 1 it has no other in sight, not even bubblewrap's, which has no limits.
    command += ["--as-pid-1", "--die-with-parent", "--new-session"]
    for path in (*_READABLE, *([] if python.startswith("/usr/") else [sys.base_prefix])):
        command += ["--ro-bind-try", path, path]
    command += ["--dev-bind", "/dev/null", "/dev/null", "--remount-ro", "/", "--chdir", "/"]
    command += [python, "-I", "-S", "-B", "-X", "utf8", "-c", _SOURCE, role, str(int(seconds) + 1)]
    options: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    if os.geteuid() == 0:  # root is exempt from the limit on processes, in any namespace
        options |= {"user": 65534, "group": 65534, "extra_groups": ()}
    with subprocess.Popen(command, pass_fds=pass_fds, **options) as process:
        try:
            yield process
        finally:
            process.kill()  # and with bubblewrap all that it started


@cache
def find_python() -> str:
    """Return a Python that runs in the sandbox: this or Debian's; GraftError if there is none."""
    if shutil.which(_BUBBLEWRAP) is None:
        cure = "`apt-get install bubblewrap` (Linux only)"
        raise GraftError(f"generated code is run in bubblewrap, which is not installed: {cure}")
    probe = {"program": "f = int", "entry_point": "f", "prompt": "", "test": "check = callable"}
    said = []
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        try:
            if (failure := run_tests(probe, 30.0, python)) is None:
                return python
            said.append(f"sandbox: {failure.kind} {failure.detail}")
        except GraftError as error:
            said.append(str(error))
    raise GraftError(
        f"generated code is not run without a sandbox, and none can be made here: {said[0]}. "
        "bubblewrap 0.8 or later needs user namespaces: in Docker, `--security-opt "
        "seccomp=unconfined --security-opt apparmor=unconfined`; on Ubuntu 24.04, "
        "`sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
    )
