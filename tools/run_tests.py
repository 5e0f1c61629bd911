"""Run the tests: those that start a vLLM engine alone, then all others on two workers.

    python tools/run_tests.py [PYTEST ARGUMENTS]

Two engines at once would take the cores from each other. Arguments go to both parts; a part in
which they select nothing does not count. With paths among them, it is a plain run of those.
"""

import subprocess
import sys

ENGINE = ("tests/engine", "tests/evals/test_real_engine.py")
OTHERS = ("tests", *(f"--ignore={path}" for path in ENGINE), "-n", "2", "--dist", "loadfile")
NOTHING_SELECTED = 5


def main() -> int:
    arguments = sys.argv[1:]
    if any(argument.startswith("tests") for argument in arguments):
        return pytest(*arguments)
    statuses = [pytest(*part, *arguments) for part in (ENGINE, OTHERS)]
    counting = [status for status in statuses if status != NOTHING_SELECTED]
    return max(counting, default=NOTHING_SELECTED)


def pytest(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
