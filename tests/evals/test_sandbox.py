"""Hostile programs in the sandbox: what they reach for, and how they try to pass."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from textwrap import indent

import pytest

from mtp_graft.bench.evals import sandbox as module
from mtp_graft.bench.evals.sandbox import Failure, find_python, run_tests
from mtp_graft.errors import GraftError

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("sandbox")]
TELL = "def check(candidate):\n    raise LookupError(candidate())\n"
EXPECT_SEVEN = "def check(candidate):\n    assert candidate(3) == 7\n    assert candidate(4) == 9\n"


def judge(program: str, test: str, seconds: float = 60.0) -> Failure | None:
    task = {"program": program, "entry_point": "f", "test": test, "prompt": ""}
    return run_tests(task, seconds)


def those_that_work(*attempts: str) -> str:
    """Return which of these lines can be executed inside."""
    tried = "".join(
        f"try:\n    {line}\n    worked.append({line!r})\n"
        "except (OSError, ImportError, RuntimeError, ValueError, AssertionError):\n    pass\n"
        for line in attempts
    )
    program = (
        "import ctypes, os, resource, socket, subprocess, sys, threading\n"
        "libc = ctypes.CDLL(None)\ndef f():\n    worked = []\n"
        f"{indent(tried, '    ')}    return str(worked)\n"
    )
    failure = judge(program, TELL)
    assert failure is not None
    return failure.detail if failure.kind == "LookupError" else failure.kind


def test_no_connection_leaves_the_sandbox() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        found = those_that_work(
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)",
            "socket.create_connection(('192.0.2.1', 53), 2)",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        )
        assert found == "[]"
        with pytest.raises(BlockingIOError):
            server.accept()


def test_files_are_out_of_reach_and_nothing_can_be_written(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("canary")
    at_home = [str(path) for path in Path.home().iterdir() if path.is_file()]
    files = ["/etc/passwd", "/etc/hostname", str(secret), __file__, "/proc/self/environ", *at_home]
    folders = (".", "/tmp", "/dev", "/dev/shm", "/var/tmp", "/run", "/usr", str(Path.home()))
    found = those_that_work(
        *(f"open({file!r}).read(1)" for file in files),
        *(f"os.listdir({folder!r})" for folder in (str(tmp_path), "/proc", "/home", "/root")),
        *(f"open({folder + '/planted'!r}, 'w')" for folder in folders),
        f"open({str(secret)!r}, 'a')",
        f"os.truncate({str(secret)!r}, 0)",
        f"os.unlink({str(secret)!r})",
        f"os.rename({str(secret)!r}, {str(tmp_path / 'moved')!r})",
        f"os.chmod({str(secret)!r}, 0)",
        f"os.symlink({str(secret)!r}, 'link') or open('link').read()",
        "open(os.path.join(os.path.dirname(os.__file__), 'planted.py'), 'w')",
        "os.write(os.memfd_create('x'), b'x')",
    )
    assert found == "[]"
    assert secret.read_text() == "canary" and os.listdir(tmp_path) == ["secret"]


def test_no_process_or_limit_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTP_GRAFT_CANARY", "canary")
    pids, limits = (os.getpid(), os.getppid()), ("AS", "FSIZE", "CPU", "NPROC")
    found = those_that_work(
        *(f"os.kill({pid}, 0)" for pid in pids),
        *(f"open('/proc/{pid}/mem', 'rb')" for pid in (*pids, 1)),
        *(f"assert libc.ptrace(16, {pid}, 0, 0) == 0" for pid in (*pids, 1)),
        "assert 'MTP_GRAFT_CANARY' in os.environ or 'HOME' in os.environ",
        "assert libc.unshare(0x10000000) == 0",  # a namespace of users
        "os.fork()",
        "subprocess.run(['/usr/bin/true'])",
        "os.posix_spawn('/usr/bin/true', ['true'], {})",
        "threading.Thread(target=print).start()",
        *(f"resource.setrlimit(resource.RLIMIT_{name}, (1 << 40, 1 << 40))" for name in limits),
    )
    assert found == "[]"


@pytest.mark.parametrize(
    ("bomb", "kind"),
    [
        ("import os\n    while True: os.fork()", "BlockingIOError"),
        ("x = [0]\n    while True: x += x", "MemoryError"),
        ("import mmap\n    x = [mmap.mmap(-1, 1 << 24) for _ in range(1000)]", "OSError"),
    ],
)
def test_bombs_end_at_their_limit(bomb: str, kind: str) -> None:
    failure = judge(f"def f():\n    {bomb}\n", TELL)
    assert failure is not None and failure.kind == kind


@pytest.mark.parametrize(
    "program",
    [
        "def f(x):\n    while True: print('x' * 10_000, flush=True)",
        "import time\ndef f(x): time.sleep(1000)",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
    ],
)
def test_a_program_that_does_not_end_is_a_timeout_and_leaves_no_process(program: str) -> None:
    failure = judge(program, EXPECT_SEVEN, 4.2)
    assert failure is not None and failure.kind == "TimeoutError"
    wait_for_sandboxed(0, cpu_s=5)


def wait_for_sandboxed(number: int, cpu_s: int) -> None:
    """Wait until so many Python processes that may use this much CPU time are in a sandbox."""
    ends = tuple(b"\0%s\0%d\0" % (role, cpu_s) for role in (b"program", b"tests"))
    deadline, found = time.monotonic() + 120, -1
    while found != number:
        assert time.monotonic() < deadline, f"{found} processes"
        time.sleep(0.05)
        found = 0
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended
                command = file.read_bytes()
                found += command.endswith(ends) and not command.startswith(b"bwrap")


def test_a_killed_client_leaves_no_process() -> None:
    task = {"program": "while True: pass", "entry_point": "f", "prompt": "", "test": TELL}
    code = f"from mtp_graft.bench.evals.sandbox import run_tests\nrun_tests({task!r}, 911.0)"
    client = subprocess.Popen([sys.executable, "-c", code])
    wait_for_sandboxed(2, cpu_s=912)  # killed before, bubblewrap's child would not know
    client.send_signal(signal.SIGKILL)
    client.wait()
    wait_for_sandboxed(0, cpu_s=912)


def test_without_a_sandbox_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for program, message in (
        ("no-bwrap", "apt-get install bubblewrap"),
        ("/usr/bin/setpriv", r"(?s)unrecognized option.*seccomp=unconfined"),  # of bubblewrap's
    ):
        monkeypatch.setattr(module, "_BUBBLEWRAP", program)
        monkeypatch.setattr(module, "find_python", cache(find_python.__wrapped__))
        with pytest.raises(GraftError, match=message):
            judge("def f(): pass", TELL)


def saying(message: str) -> str:
    """Return a program that writes a message to all that is open, for more than it is asked."""
    said = 9 * f"{message}\n".encode()
    write = f"for n in range(64):\n    try: os.write(n, {said!r})\n    except OSError: pass"
    return f"import os\n{write}\ndef f(x): return 1"


ANY_EQUAL = "    def __eq__(self, other): return True\n"
IN_THE_CALLER = """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        frame.f_globals['check'] = lambda c: None
        frame.f_builtins['AssertionError'] = ZeroDivisionError
        frame = frame.f_back
    return 1
"""
FORGERIES = {
    "sys.exit in the call": "import sys\ndef f(x): sys.exit(0)",
    "os._exit in the call": "import os\ndef f(x): os._exit(0)",
    "a foreign object": f"class A:\n{ANY_EQUAL}def f(x): return A()",
    "no more assertions": (
        "import builtins as b\nb.AssertionError = b.__build_class__ = b.compile = b.exec = None\n"
        "def f(x): return 1"
    ),
    "another check": "def check(candidate): pass\ndef f(x): return 1",
    "a check in the caller": IN_THE_CALLER,
    "a verdict on every stream": saying("null"),
    "answers in advance": saying('{"value": 8, "args": {"list": [3]}}'),
    "an unreadable answer": saying("[" * 65536),
    "a value of two kinds": saying('{"value": {"list": [], "set": []}, "args": {"list": [3]}}'),
    "a made-up failure": "class passed(Exception): pass\ndef f(x): raise passed",
}


@pytest.mark.parametrize("program", FORGERIES.values(), ids=FORGERIES)
def test_a_wrong_program_cannot_pass(program: str) -> None:
    failure = judge(program, EXPECT_SEVEN)
    assert failure is not None and failure.kind != "TimeoutError"


def test_the_tests_are_nowhere_in_the_programs_process() -> None:
    program = """
def f():
    import gc, sys
    word = "_".join(["canary", "8812"])
    found = [o for o in gc.get_objects() if isinstance(o, dict) and word in o]
    frame = sys._getframe()
    while frame:
        values = [str(value) for value in frame.f_locals.values()]
        found += [text for text in values if text != word and word in text]
        frame = frame.f_back
    return str(found)
"""
    failure = judge(program, "canary_8812 = 'canary_8812'\n" + TELL)
    assert failure == Failure("LookupError", "[]")


PLAIN = "[(1, {2: [3]}), {(True,): {4}}, frozenset('a'), b'x', None, '\\ud800', 0.1, 10 ** 6000]"


@pytest.mark.parametrize(
    ("body", "test"),
    [
        ("return x", f"x = {PLAIN}\n    assert candidate(x) == x"),
        ("return x", "nan = candidate(float('nan'))\n    assert nan != nan"),
        ("return (i * i for i in range(x))", "assert list(candidate(3)) == [0, 1, 4]"),
        ("return x.keys()", "assert list(candidate({'a': 1})) == ['a']"),
        ("return __import__('collections').Counter(x)", "assert candidate('aa') == {'a': 2}"),
        ("x.append(1)", "x = []\n    candidate(x)\n    assert x == [1]"),
        ("x['y'] = [1]", "x = {}\n    candidate(x)\n    assert x == {'y': [1]}"),
        ("x.clear()", "x = {1}\n    candidate(x)\n    assert x == set()"),
    ],
)
def test_values_arrive_as_a_test_in_one_process_would_see_them(body: str, test: str) -> None:
    assert judge(f"def f(x):\n    {body}", f"def check(candidate):\n    {test}") is None
