"""Start vLLM, wait until it really answers, and never leave a process of it behind."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from textwrap import shorten
from typing import IO

from mtp_graft.errors import GraftError
from mtp_graft.serving import command as vllm_command
from mtp_graft.serving.client import Prompt, ServerClient, ServerUnreachable
from mtp_graft.serving.command import ServeCommand, ServeOptions, build_command, start_limit_s
from mtp_graft.serving.metrics import SpecDecodeCounters

POLL_S = 0.5
#: What vLLM gets to end its workers by itself before the whole group is killed.
GRACE_S = 15.0
#: A process that waits for our end, SIGKILL included, and ends the server with all it started.
#: vLLM ignores SIGTERM while it starts; killed with requests in work, it leaves shared memory.
_WATCHER = (
    "cat > /dev/null; kill -s TERM -- -$0; for _ in $(seq 30); do kill -s 0 -- -$0 && sleep 0.5; "
    'done; kill -s KILL -- -$0; rm -rf "$1"'
)

#: Of text that repeats itself a drafter foresees almost all, one with wrong weights nothing.
MIN_ACCEPTANCE = 0.2
_REPEATED_TEXT = Prompt(
    "check", "<｜begin▁of▁sentence｜>" + "The quick brown fox jumps over the lazy dog. " * 30
)

#: A line: what vLLM puts before (process; level, time and place), torch's rank, and text.
_BEFORE = r"(?:\(\S+ pid=\d+[^)\n]*\) ?)?(?:[A-Z]+ \d\d-\d\d [\d:]{8} \[\S+\] ?)?"
_LINE = re.compile(rf"^({_BEFORE})(?:\[rank\d+\]: ?)?(.*[^\s^~].*)$", re.MULTILINE)
_NAMED = r"(?:[\w.]+(?:Error|Exception)|\S+: error|Fatal Python error|terminate called)(?: |:|$)"
_ENDS = rf"{_NAMED}|Traceback \(|(?:The|During handling of the) above exc|Process \S+:$|[A-Z]+:  "
#: The message of an exception, below a traceback's frames (and the code, if it has no text) or not.
_EXCEPTION = re.compile(
    rf"^(?:Traceback \(.*\n(?:\s.*\n)*?(?=\s.*\n[\w.]+$|\S)|(?={_NAMED}))"
    rf"(.*(?:\n(?!{_ENDS}|\[[A-Z]\d|Exception ignored|.*Warning: ).*)*)",
    re.MULTILINE,
)
#: The processes above the failing one only report that it failed.
_SECOND_HAND = re.compile(r"root cause|Engine core initialization failed", re.IGNORECASE)

#: Called with what is going on, how much of it is done, and of how much (0: not known).
Report = Callable[[str, int, int], None]
_Process = subprocess.Popen[bytes]


@contextmanager
def managed_server(
    options: ServeOptions, log_path: Path, report: Report = lambda *_: None
) -> Iterator[ServerClient]:
    """Serve inside the `with` block, output going to `log_path`; yield a client of the server.

    The server is ready when the block begins and gone, workers included, when it ends. SIGTERM and
    SIGHUP to us raise SystemExit in the block. `report` gets the seconds so far. Raises GraftError,
    with the log's reason, for a server that dies or takes over `start_limit_s`.
    """
    command = build_command(options)
    if command.is_headless:
        found = "this machine would serve without an address (--node-rank or --headless)"
        raise GraftError(f"{options.checkpoint}: {found}; ask machine 0's server, by --base-url")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log, _running(command, log) as (process, client):
        try:
            limit_s = start_limit_s(options.checkpoint)
            if not _wait_ready(process, client, limit_s, report, log_path.stem):
                raise GraftError(f"vLLM ended with status {_wait(process)} before it was ready")
        except GraftError as error:
            reason = f"{error}; in {log_path}: {explain(log_path)}"
            raise GraftError(f"{options.checkpoint}: {reason}") from error
        yield client


def serve_foreground(options: ServeOptions, on_ready: Callable[[str], None]) -> int:
    """Run vLLM on our own streams until it ends; return its exit status.

    SIGINT, SIGTERM and SIGHUP stop it; a second one kills it. `on_ready` gets the address once a
    completion came back (GraftError if it is refused), on a headless node once vLLM runs.
    """
    command = build_command(options)
    with (
        _running(command) as (process, client),
        suppress(SystemExit, KeyboardInterrupt),  # a signal: vLLM is stopped, and says its status
    ):
        if command.is_headless:
            on_ready("headless; the first machine answers")
        elif _wait_ready(process, client, float("inf"), lambda *_: None, ""):
            on_ready(command.base_url)
        _wait(process)
    return _wait(process)


@contextmanager
def _running(
    command: ServeCommand, log: IO[bytes] | None = None
) -> Iterator[tuple[_Process, ServerClient]]:
    """Run vLLM in a process group of its own, of which nothing is left after the block."""
    if not command.is_headless:
        vllm_command.check_port(command.host, command.port)
    sockets = mkdtemp(prefix="vllm-")  # which vLLM leaves behind
    environment = {"VLLM_RPC_BASE_PATH": sockets, **os.environ, **command.env}
    process = subprocess.Popen(
        command.argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,  # None: ours
        stderr=log and subprocess.STDOUT,
        start_new_session=True,
    )
    watcher = subprocess.Popen(
        ["sh", "-c", _WATCHER, str(process.pid), sockets],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # where kill says that the group has gone
        start_new_session=True,
    )
    with _exit_on_signals():
        try:
            # Closed before the end of vLLM, which waits for its clients.
            with ServerClient(command.base_url, environment.get("VLLM_API_KEY")) as client:
                yield process, client
        finally:
            try:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
            finally:
                with suppress(ProcessLookupError):  # no member of the group is left
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                watcher.kill()  # after the group has gone: its number may be used again
                watcher.communicate()
                rmtree(sockets, ignore_errors=True)


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise SystemExit in the block, an ignored SIGHUP (`nohup`) apart."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, lambda number, _frame: sys.exit(128 + number))  # as a shell's
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _wait_ready(
    process: _Process, client: ServerClient, timeout_s: float, report: Report, name: str
) -> bool:
    """Wait until the server has returned one completion; False if it ended, GraftError if late."""
    started = time.monotonic()
    while process.poll() is None:
        elapsed = time.monotonic() - started
        if elapsed > timeout_s:
            raise GraftError(f"{client.base_url} is not ready after {timeout_s:.0f} s")
        report(f"{name}: starting, {elapsed:.0f} s", 0, 0)
        with suppress(ServerUnreachable):  # it may have died just now
            # Four tokens have a server with a head draft and verify at least once.
            if client.is_healthy() and client.complete((0, 1, 2, 3), max_tokens=4):
                return True
        time.sleep(POLL_S)
    return False


def _wait(process: _Process) -> int:
    """Wait for the end; return the exit status, a shell's 128 + n for signal n."""
    # A wait without end would not notice a signal to us that comes just before it begins.
    while (status := process.poll()) is None:
        time.sleep(POLL_S)
    return status if status >= 0 else 128 - status


def check_drafter(client: ServerClient) -> SpecDecodeCounters:
    """Let the server go on with a repeated sentence; return what it drafted and accepted.

    Other requests meanwhile are counted too. Raises GraftError for a server that does not draft.
    """
    before = client.spec_decode_counters()
    client.complete(client.encode(_REPEATED_TEXT), 128)
    after = client.spec_decode_counters()
    if before and after and (gained := after - before).num_draft_tokens:
        return gained
    expected = "expected a checkpoint with a head and at least one speculative token"
    raise GraftError(f"{client.base_url}: the server does not draft; {expected}")


def explain(log: Path) -> str:
    """Return why the vLLM that wrote `log` stopped: its exceptions, else its last lines."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 256 * 1024))
        text = re.sub(r"\x1b\[[\d;]*m", "", file.read().decode(errors="replace"))
    said: dict[str, list[str]] = {}  # by what stands before: processes and records take turns
    for before, line in _LINE.findall(text.replace("\r", "\n")):
        said.setdefault(before.rstrip(), []).append(line)
    found = [each for lines in said.values() for each in _EXCEPTION.findall("\n".join(lines))]
    reasons = [each for each in found if not _SECOND_HAND.search(each)] or found
    reasons = reasons or [*filter(str.strip, text.split("\n"))][-3:]
    said_once = " | ".join(dict.fromkeys(reasons))
    return shorten(said_once, 4000, placeholder=" ...") or "it wrote nothing"
