"""Commands that are ended by SIGKILL, and results without what a clock decides."""

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Durations and speeds, and what follows from them.
TIMES = frozenset({"seconds", "decode_s", "decode_tok_s", "pooled_tok_s", "ttft_ms", "tpot_ms"})


def kill_in_the_middle(
    command: Sequence[str],
    ledger: Path,
    num_units: int,
    count_begun: Callable[[], int],
    environment: Mapping[str, str] | None = None,
) -> bytes:
    """SIGKILL a benchmark that has kept some units and begun another; return what it had kept."""
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 120

    def wait_until(what: Callable[[], bool]) -> None:
        while not what():
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)

    try:
        wait_until(lambda: ledger.exists() and len(units_in(ledger.read_bytes())) >= num_units)
        begun = count_begun()
        wait_until(lambda: count_begun() > begun)
    finally:
        process.kill()
        process.wait()
    content = ledger.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def units_in(content: bytes) -> list[str]:
    """Return the names of the units whose lines are whole."""
    whole = content[: content.rfind(b"\n") + 1]
    return [json.loads(line)["unit"] for line in whole.splitlines()]


def without(result: Any, names: frozenset[str]) -> Any:
    """Return a result's JSON without the values of these names, wherever they are."""
    if isinstance(result, dict):
        return {k: without(v, names) for k, v in result.items() if k not in names}
    return [without(item, names) for item in result] if isinstance(result, list) else result
