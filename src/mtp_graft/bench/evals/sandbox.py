"""Whether generated code passes its tests, run where it can do no harm and cannot cheat."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from mtp_graft.errors import GraftError

#: The kind of a verdict on code that was not done in time.
TIMED_OUT = TimeoutError.__name__
LAYERS = ("namespaces", "landlock", "seccomp", "limits")
_SCRIPT = Path(__file__).with_name("jail.py")
_GUEST = Path(__file__).with_name("guest.py")
#: What a jail may take to say that it holds, on a machine that is busy.
_START_S = 30.0


@dataclass(frozen=True)
class Task:
    """A program, and tests that define `check(candidate)`.

    `prompt` is code that the tests may use; it is executed beside them, not beside the program.
    """

    program: str
    entry_point: str
    tests: str
    prompt: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether the tests passed; if not, the exception's name, `TimeoutError` included."""

    passed: bool
    kind: str | None
    message: str


@dataclass(frozen=True)
class Sandbox:
    """Two jails a task, one for the program and one for its tests (`jail.py`, `guest.py`)."""

    without: frozenset[str] = frozenset()  # layers that the user gave up
    seconds: float = 60.0  # wall clock, starting the jails included
    memory_bytes: int = 2**30  # of each process
    disk_bytes: int = 2**24  # of the folder in memory, the only one it can write

    def require(self) -> None:
        """Raise GraftError, naming the layer, if this machine cannot confine as asked."""
        unknown = self.without - set(LAYERS)
        if unknown:
            raise GraftError(
                f"sandbox layer {sorted(unknown)[0]!r} is unknown; expected one of "
                f"{', '.join(LAYERS)}"
            )
        if sys.platform != "linux":
            raise GraftError(f"the sandbox needs Linux, found {sys.platform}")
        with self._jail("ready") as ready:
            try:
                out, errors = ready.communicate(timeout=_START_S)
            except subprocess.TimeoutExpired:
                raise GraftError(f"sandbox: a jail was not ready after {_START_S:.0f} s") from None
        if out != b'"ready"\n':
            raise _refusal(errors)

    def judge(self, task: Task) -> Verdict:
        """Run the tests on the program. Raises GraftError if a jail cannot be made."""
        deadline = time.monotonic() + self.seconds
        with self._jail("candidate") as candidate:
            assert candidate.stdin is not None and candidate.stdout is not None
            ends = (candidate.stdin.fileno(), candidate.stdout.fileno())
            with self._jail("checker", ends) as checker:
                candidate.stdin.close()  # the checker's now: when it ends, the candidate does
                candidate.stdout.close()
                message = _message(task, *ends)
                left = max(0.0, deadline - time.monotonic())
                try:
                    out, errors = checker.communicate(message, timeout=left)
                except subprocess.TimeoutExpired:
                    return Verdict(False, TIMED_OUT, f"not done after {self.seconds:g} s")
            _kill(candidate)
            assert candidate.stderr is not None
            errors = errors or candidate.stderr.read()
        if errors:  # a jail that holds says nothing
            raise _refusal(errors)
        try:
            verdict = json.loads(out)
        except ValueError:  # the tests themselves met a limit
            return Verdict(False, "ProcessEnded", "the tests ended without a verdict")
        return Verdict(verdict["passed"] is True, verdict["kind"], verdict["message"])

    @contextmanager
    def _jail(self, role: str, ends: Sequence[int] = ()) -> Iterator["subprocess.Popen[bytes]"]:
        """Start a jail that plays `role` with pipes as its streams; it is gone after the block."""
        settings = {
            "parent": os.getpid(),
            "without": sorted(self.without),
            "cpu_s": int(self.seconds) + 1,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
        }
        # Isolated: no site-packages, no environment variables, no current folder on the path.
        flags = ("-I", "-S", "-B", "-X", "utf8")
        with subprocess.Popen(
            [sys.executable, *flags, _SCRIPT, json.dumps(settings), _GUEST, role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            pass_fds=ends,
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                _kill(process)


def _message(task: Task, calls: int, results: int) -> bytes:
    ends = {"calls": calls, "results": results}
    return json.dumps(asdict(task) | ends).encode() + b"\n"


def _refusal(errors: bytes) -> GraftError:
    said = errors.decode(errors="replace").strip()[-600:] or "it ended without a word"
    layer = said.partition(":")[0]
    cure = (
        f"leave that layer out with --sandbox-without {layer}, if you trust the code"
        if layer in LAYERS
        else "generated code is not run without it"
    )
    return GraftError(f"sandbox: a jail cannot be made on this machine: {said}; {cure}")


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End a jail with all that is in it."""
    if process.poll() is None:  # else its number may be another's by now
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
