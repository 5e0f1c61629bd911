"""Who decides whether a program passes: its tests, whatever the program does."""

import sys
import threading

import pytest

from mtp_graft.bench.evals.sandbox import Sandbox, Task, Verdict

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux"),
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("whole_sandbox"),
]
TELL = "def check(candidate):\n    raise LookupError(candidate())\n"
EXPECT_SEVEN = "def check(candidate):\n    assert candidate(3) == 7\n    assert candidate(4) == 9\n"
FORGERIES = {
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit in the call": "import sys\ndef f(x):\n    sys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit in the call": "import os\ndef f(x):\n    os._exit(0)",
    "equal to everything": (
        "class A(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "    def __ne__(self, other): return False\ndef f(x):\n    return A(1)"
    ),
    "a foreign object": (
        "class A:\n    def __eq__(self, other): return True\ndef f(x):\n    return A()"
    ),
    "no more assertions": (
        "import builtins\nbuiltins.AssertionError = None\n"
        "builtins.__build_class__ = builtins.compile = builtins.exec = None\ndef f(x): return 1"
    ),
    "another check": "def check(candidate): pass\ndef f(x): return 1",
    "a check in the caller": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        frame.f_globals['check'] = lambda c: None\n"
        "        frame.f_builtins['AssertionError'] = ZeroDivisionError\n"
        "        frame = frame.f_back\n    return 1"
    ),
    "a verdict on every stream": (
        "import os\nfor n in range(64):\n    try:\n"
        '        os.write(n, b\'{"passed": true, "kind": null, "message": ""}\\n\')\n'
        "    except OSError:\n        pass\ndef f(x): return 1"
    ),
    "answers in advance": (
        "import os\nfor n in range(64):\n    try:\n"
        '        os.write(n, b\'{"value": {"int": "0x8"}, "args": [{"int": "0x3"}]}\\n\' * 9)\n'
        "    except OSError:\n        pass\ndef f(x): return 1"
    ),
    "an unreadable answer": (
        "import os\nfor n in range(64):\n    try:\n        os.write(n, b'[' * 65536 + b'\\n')\n"
        "    except OSError:\n        pass\ndef f(x): return 1"
    ),
    "a made-up failure": "class passed(Exception): pass\ndef f(x):\n    raise passed",
}


@pytest.mark.parametrize("program", FORGERIES.values(), ids=FORGERIES)
def test_a_wrong_program_cannot_pass(program: str) -> None:
    verdict = Sandbox(seconds=20).judge(Task(program, "f", EXPECT_SEVEN))
    assert not verdict.passed
    assert verdict.kind and verdict.kind != "TimeoutError"


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
    tests = "canary_8812 = 'canary_8812'\n" + TELL
    assert Sandbox().judge(Task(program, "f", tests)).message == "[]"


def test_several_at_a_time_do_not_mix() -> None:
    tests = (
        "def check(candidate):\n    for i in range(20):\n        assert candidate(i) == i + {n}\n"
    )
    verdicts: dict[int, Verdict] = {}

    def work(n: int) -> None:
        program = f"def f(x):\n    return x + {n if n % 2 else -1}"
        verdicts[n] = Sandbox().judge(Task(program, "f", tests.replace("{n}", str(n))))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: verdict.passed for n, verdict in verdicts.items()} == {
        n: n % 2 == 1 for n in range(8)
    }


def test_changes_to_arguments_are_seen_by_the_tests() -> None:
    program = "def f(a, b, c):\n    a.append(1)\n    b['x'] = a\n    c.clear()\n"
    tests = (
        "def check(candidate):\n    a, b, c = [], {}, {1}\n    assert candidate(a, b, c) is None\n"
        "    assert (a, b, c) == ([1], {'x': [1]}, set())\n"
    )
    assert Sandbox().judge(Task(program, "f", tests)) == Verdict(True, None, "")


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("(i * i for i in range(3))", "list(candidate()) == [0, 1, 4]"),
        ("{'a': 1}.keys()", "sorted(candidate()) == ['a']"),
        ("__import__('collections').Counter('aab')", "candidate() == {'a': 2, 'b': 1}"),
        ("range(3)", "candidate() == range(3)"),
        ("float('nan')", "candidate() != candidate()"),
        ("__import__('decimal').Decimal('1.5')", "candidate() == 1.5"),
        ("True", "candidate() is True"),
    ],
)
def test_values_arrive_as_a_test_in_one_process_would_see_them(value: str, seen: str) -> None:
    tests = f"def check(candidate):\n    assert {seen}\n"
    assert Sandbox().judge(Task(f"def f():\n    return {value}", "f", tests)).passed
