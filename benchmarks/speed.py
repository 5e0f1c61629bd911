"""Run one of `mtp-graft bench decode, sweep, workload` and keep its result as a result file.

    python benchmarks/speed.py sweep_cpu --note "..." -- bench sweep --checkpoint DIR --k 0,1,2

The file is NAME.json in benchmarks/results, or in --results. Its command is the one after `--`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from engines import exit_on_sigterm
from record import write_result

RESULTS = Path(__file__).parent / "results"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--note", help="what a reader has to know of the run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    # Not left to argparse, whose versions treat the second `--`, before vLLM's words, differently.
    own, words = split(sys.argv[1:])
    options = parser.parse_args(own)
    if not words:
        parser.error("no command after --")
    options.words = words
    return options


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Return what is before the first `--`, and what is after it."""
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


def main() -> None:
    options = parse_arguments()
    exit_on_sigterm()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "result.json"
        words, for_vllm = split(options.words)
        command = [sys.executable, "-m", "mtp_graft.cli", *words, "--json", str(file)]
        process = subprocess.Popen([*command, "--", *for_vllm] if for_vllm else command)
        try:
            status = process.wait()
        finally:  # by SIGTERM too: the command takes its servers with it
            if process.poll() is None:
                process.terminate()
                process.wait()
        if status:
            sys.exit(status)
        results = json.loads(file.read_text())
    more = {"note": options.note} if options.note else {}
    write_result(
        options.results / f"{options.name}.json",
        options.name,
        results,
        command=" ".join(["mtp-graft", *options.words]),
        **more,
    )


if __name__ == "__main__":
    main()
