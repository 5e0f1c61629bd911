"""Hostile code in the sandbox, with every layer and with one of the others left out."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtp_graft.bench.evals.sandbox import LAYERS, Sandbox, Task, Verdict

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux"),
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("whole_sandbox"),
]
#: Every attack below has to fail with all layers, and with all but one of these.
REDUCED = [frozenset(), frozenset({"namespaces"}), frozenset({"landlock"})]
ALSO_WITHOUT_SECCOMP = [*REDUCED, frozenset({"seccomp"})]


def name_of(without: frozenset[str]) -> str:
    return "all" if not without else f"no-{next(iter(without))}"


def run(sandbox: Sandbox, body: str) -> str:
    """Execute `body`, which assigns `outcome`, inside; return the outcome as text."""
    program = f"def f():\n    outcome = None\n{textwrap.indent(textwrap.dedent(body), '    ')}"
    task = Task(program + "\n    return str(outcome)\n", "f", TELL)
    verdict = sandbox.judge(task)
    assert not verdict.passed
    return verdict.message if verdict.kind == "LookupError" else str(verdict.kind)


TELL = "def check(candidate):\n    raise LookupError(candidate())\n"


@pytest.fixture
def victim() -> Iterator["subprocess.Popen[bytes]"]:
    """A process of ours that the code should not be able to touch."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; secret = 'canary-7316'; time.sleep(300)"]
    )
    yield process
    process.kill()
    process.wait()


def attempts(*lines: str) -> str:
    """Return code that tries each line and notes which of them worked."""
    tried = "".join(
        f"try:\n    {line}\n    outcome.append({line!r})\n"
        "except (OSError, ImportError):\n    pass\n"
        for line in lines
    )
    return f"import os, sys, socket, subprocess, threading, ctypes\noutcome = []\n{tried}"


@pytest.mark.parametrize("without", ALSO_WITHOUT_SECCOMP, ids=name_of)
def test_no_connection_leaves_the_sandbox(without: frozenset[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        found = run(
            Sandbox(without),
            attempts(
                f"socket.create_connection(('127.0.0.1', {port}), 2)",
                "socket.create_connection(('192.0.2.1', 53), 2)",
                "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
            ),
        )
        assert found == "[]"
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("without", ALSO_WITHOUT_SECCOMP, ids=name_of)
def test_files_outside_its_folder_are_out_of_reach(without: frozenset[str], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("canary")
    at_home = [str(path) for path in Path.home().iterdir() if path.is_file()]
    targets = [
        "/etc/passwd",
        "/etc/hostname",
        str(secret),
        __file__,
        "/proc/self/environ",
        *at_home,
    ]
    found = run(
        Sandbox(without),
        attempts(
            *(f"open({target!r}).read(1)" for target in targets),
            *(f"os.listdir({folder!r})" for folder in (str(tmp_path), "/etc", "/proc")),
            f"open({str(tmp_path / 'new')!r}, 'w')",
            f"open({str(secret)!r}, 'a')",
            f"os.truncate({str(secret)!r}, 0)",
            f"os.unlink({str(secret)!r})",
            f"os.rename({str(secret)!r}, {str(tmp_path / 'moved')!r})",
            f"os.chmod({str(secret)!r}, 0)",
            f"os.utime({str(secret)!r}, (0, 0))",
            f"os.symlink({str(secret)!r}, 'link') or open('link').read()",
            f"open(os.path.join(os.path.dirname(os.__file__), {'planted.py'!r}), 'w')",
            "open('/tmp/planted', 'w')",
            "open('/dev/shm/planted', 'w')",
        ),
    )
    assert found == "[]"
    assert secret.read_text() == "canary"
    assert os.listdir(tmp_path) == ["secret"]


@pytest.mark.parametrize("without", ALSO_WITHOUT_SECCOMP, ids=name_of)
def test_memory_and_environment_of_other_processes_are_out_of_reach(
    without: frozenset[str], victim: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTP_GRAFT_CANARY", "canary")
    pids = (os.getpid(), victim.pid, "{os.getppid()}")
    found = run(
        Sandbox(without),
        attempts(
            *(
                f"open(f'/proc/{pid}/{f}', 'rb').read(1)"
                for pid in pids
                for f in ("mem", "environ")
            ),
            *(f"open(f'/proc/{pid}/mem', 'r+b')" for pid in pids),
        )
        + "if 'MTP_GRAFT_CANARY' in os.environ or 'HOME' in os.environ: outcome.append('environ')\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"for pid in ({os.getpid()}, {victim.pid}, os.getppid() or 1):\n"
        "    if libc.ptrace(16, pid, 0, 0) == 0: outcome.append('ptrace')\n"
        "    here, there = (ctypes.c_void_p * 2)(), (ctypes.c_void_p * 2)(0x400000, 8)\n"
        "    buffer = ctypes.create_string_buffer(8)\n"
        "    here[0], here[1] = ctypes.addressof(buffer), 8\n"
        "    if libc.process_vm_readv(pid, here, 1, there, 1, 0) > 0: outcome.append('vm')\n",
    )
    assert found == "[]"


@pytest.mark.parametrize("without", ALSO_WITHOUT_SECCOMP, ids=name_of)
def test_other_processes_get_no_signal(
    without: frozenset[str], victim: "subprocess.Popen[bytes]"
) -> None:
    # Signal 0 is enough where a real one would hit the tests themselves if the jail leaked.
    found = run(
        Sandbox(without),
        attempts(f"os.kill({victim.pid}, 9)", f"os.kill({os.getpid()}, 0)")
        + "parent = os.getppid()\n"
        "try:\n    parent and os.kill(parent, 0)\n    outcome += [parent] if parent else []\n"
        "except OSError:\n    pass\n",
    )
    assert found == "[]"
    assert victim.poll() is None


@pytest.mark.parametrize("without", REDUCED, ids=name_of)
def test_it_can_start_no_process_and_no_thread(without: frozenset[str]) -> None:
    found = run(
        Sandbox(without),
        attempts(
            "os.fork()",
            "os.execv('/bin/sh', ['sh', '-c', 'true'])",
            "os.execv(sys.executable, [sys.executable, '-c', 'pass'])",
            "subprocess.run(['true'])",
            "os.posix_spawn('/bin/true', ['true'], {})",
            "os.memfd_create('x')",
        )
        + "try:\n    threading.Thread(target=print).start()\n    outcome.append('thread')\n"
        "except RuntimeError:\n    pass\n",
    )
    assert found == "[]"


def test_a_fork_bomb_does_not_go_off() -> None:
    task = Task("import os\nwhile True:\n    os.fork()\n", "f", TELL)
    assert Sandbox(seconds=20).judge(task) == Verdict(
        False, "PermissionError", "[Errno 1] Operation not permitted"
    )


@pytest.mark.parametrize("without", ALSO_WITHOUT_SECCOMP, ids=name_of)
@pytest.mark.parametrize(
    "bomb",
    [
        "bytearray(1 << 33)",
        "x = [0]\nwhile True: x += x",
        "import mmap\nx = [mmap.mmap(-1, 1 << 24) for _ in range(1000)]",
    ],
)
def test_memory_ends_at_its_limit(without: frozenset[str], bomb: str) -> None:
    code = f"def f():\n{textwrap.indent(bomb, '    ')}\n"
    verdict = Sandbox(without, seconds=40).judge(Task(code, "f", TELL))
    assert verdict.kind in {"MemoryError", "OSError"}


def test_disk_ends_at_its_limit_in_bytes_and_in_files() -> None:
    fill = """
        outcome, block = 0, b"x" * (1 << 20)
        for number in range(100):
            try:
                with open(f"file-{number}", "wb", buffering=0) as file:
                    outcome += file.write(block)
            except OSError:
                break
    """
    written = int(run(Sandbox(), fill))
    assert 2**23 < written <= 2**24
    many = """
        outcome = 0
        for number in range(100_000):
            try:
                open(f"file-{number}", "w").close()
                outcome += 1
            except OSError:
                break
    """
    assert int(run(Sandbox(), many)) < 1024


def test_without_namespaces_there_is_nowhere_to_write() -> None:
    places = (".", "/tmp", "/dev/shm", "/var/tmp", "/box", "/run", str(Path.home()))
    code = attempts(*(f"open({place + '/x'!r}, 'w')" for place in places))
    assert run(Sandbox(frozenset({"namespaces"})), code) == "[]"


def test_limits_cannot_be_raised() -> None:
    code = """
        import resource
        outcome = []
        for limit in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):
            try:
                resource.setrlimit(limit, (1 << 40, 1 << 40))
                outcome.append(limit)
            except (OSError, ValueError):
                pass
    """
    assert run(Sandbox(), code) == "[]"
    assert run(Sandbox(frozenset({"seccomp"})), code) == "[]"


EXPECT_SEVEN = "def check(candidate):\n    assert candidate(3) == 7\n    assert candidate(4) == 9\n"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "def f(x):\n    while True: pass",
        "def f(x):\n    while True: print('x' * 10_000, flush=True)",
        "import time\ndef f(x): time.sleep(1000)",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
    ],
)
def test_a_program_that_does_not_end_is_a_timeout_and_leaves_no_process(program: str) -> None:
    started = time.monotonic()
    verdict = Sandbox(seconds=2).judge(Task(program, "f", EXPECT_SEVEN))
    assert verdict.kind == "TimeoutError"
    assert time.monotonic() - started < 10
    assert none_left(3)


def jails(cpu_s: int) -> list[int]:
    """Return the jail processes whose settings allow this much CPU time."""
    marker = f'"cpu_s": {cpu_s},'.encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"jail.py" in command and marker in command:
            found.append(int(folder.name))
    return found


def none_left(cpu_s: int) -> bool:
    """Wait for those processes to go; the kernel takes a moment after it killed them."""
    deadline = time.monotonic() + 10
    while jails(cpu_s) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not jails(cpu_s)


@pytest.mark.parametrize("without", ["", "namespaces"])
def test_a_killed_client_leaves_no_jail(without: str) -> None:
    code = (
        "from mtp_graft.bench.evals.sandbox import Sandbox, Task\n"
        f"Sandbox(frozenset({without.split()!r}), 911.0).judge("
        "Task('while True: pass', 'f', 'def check(c): c()'))"
    )
    client = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    expected = 2 if without else 4  # outside a namespace and inside it, program and tests
    while len(jails(912)) < expected:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    client.send_signal(signal.SIGKILL)
    client.wait()
    assert none_left(912)


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_can_be_given_up_by_name(layer: str) -> None:
    Sandbox(frozenset({layer})).require()
