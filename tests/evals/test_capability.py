"""Our own fourteen tasks: a server that does all of them, and one that does each a little wrong."""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="Inspect is not installed (extra `evals`)")


from .chat_server import serving
from .conftest import Run

pytestmark = [pytest.mark.usefixtures("sandbox"), pytest.mark.timeout(600)]

CATEGORIES = ("math", "code", "reasoning", "knowledge", "instruction", "longform", "tools")
WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen".split()  # noqa: SIM905


def section(number: int) -> str:
    return " ".join(f"{word}{number}x{i}" for i in range(6) for word in WORDS)


SECTIONS = "\n\n".join(
    f"## {name}\n\n{section(number)}"
    for number, name in enumerate(("Evaporation", "Condensation", "Precipitation", "Collection"))
)
LIST = "\n".join(f"{n}. Keep the screws of machine {n} apart" for n in range(1, 21))
RUNS = """
def run_lengths(text):
    runs = []
    for sign in text:
        if runs and runs[-1][0] == sign:
            runs[-1] = (sign, runs[-1][1] + 1)
        else:
            runs.append((sign, 1))
    return runs
"""
MEDIAN = """
def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
"""


def call(name: str, **arguments: str) -> dict[str, Any]:
    return call_with(json.dumps(arguments), name)


def call_with(arguments: str, name: str = "add_event") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


DENTIST = call("add_event", title="Dentist appointment", date="2027-03-04")
#: Task -> a part of its question, an answer that is right, and wrong ones with their kinds.
TASKS: dict[str, tuple[str, Any, list[tuple[Any, str]]]] = {
    "math/arithmetic": (
        "48 * 37",
        "1776 - 159.\nAnswer: 1617",
        [("Answer: 1627", "wrong answer"), ("1617", "no answer found")],
    ),
    "math/rates": ("pipe", "**Answer: 144**", [("Answer: 2.4", "wrong answer")]),
    "reasoning/boxes": (
        "boxes",
        "Answer: Yellow, red, blue, green.",
        [("Answer: green, blue, red, yellow", "wrong answer")],
    ),
    "reasoning/days": ("Thursday", "Answer: Monday", [("Answer: Tuesday", "wrong answer")]),
    "knowledge/tungsten": ("tungsten", "Answer: W", [("Answer: Tu", "wrong answer")]),
    "knowledge/hermitage": (
        "Hermitage",
        "Answer: St. Petersburg",
        [("Answer: Moscow", "wrong answer")],
    ),
    "code/runs": (
        "run_lengths",
        f"```python{RUNS}```",
        [
            ("```python\ndef run_lengths(t): return []\n```", "AssertionError"),
            ("", "no answer found"),
        ],
    ),
    "code/median": (
        "median",
        f"```python{MEDIAN}```",
        [
            (
                "```python\ndef median(v):\n    v.sort()\n    return v[len(v)//2]\n```",
                "AssertionError",
            )
        ],
    ),
    "instruction/json": (
        "an ant",
        '{"name": "ant", "legs": 6, "habitats": ["forest", "meadow"]}',
        [
            ('```json\n{"name": "ant"}\n```', "instruction not followed"),
            ('{"name": "ant", "legs": 8, "habitats": ["a", "b"]}', "wrong answer"),
            ('{"name": "ant", "legs": 6, "habitats": ["a"]}', "instruction not followed"),
            ('["name", "legs", "habitats"]', "instruction not followed"),
        ],
    ),
    "instruction/hyphens": (
        "hyphens",
        "sun-sea-sand-salt-sail\n",
        [
            ("sun-sea-sand-salt", "instruction not followed"),
            ("sun-sun-sand-salt-sail", "instruction not followed"),
            ("Here: sun-sea-sand-salt-sail", "instruction not followed"),
        ],
    ),
    "longform/sections": (
        "water cycle",
        SECTIONS,
        [
            (SECTIONS.replace("## Coll", "## Call"), "instruction not followed"),
            (SECTIONS.replace(section(2), "Rain."), "instruction not followed"),
            (SECTIONS.replace(section(2), "the rain falls " * 200), "repetition"),
        ],
    ),
    "longform/list": (
        "glass jar",
        LIST,
        [
            (LIST.replace("7. ", "8. "), "instruction not followed"),
            (f"Here:\n{LIST}", "instruction not followed"),
            (LIST.replace("machine 4", "machine 5"), "instruction not followed"),
        ],
    ),
    "tools/call": (
        "dentist",
        DENTIST,
        [
            ("It is in your calendar.", "no tool call"),
            (call("search_mail", query="dentist"), "wrong tool call"),
            (call("add_event", title="Dentist", date="2027-04-03"), "wrong tool call"),
            (call("add_event", title="Dentist"), "wrong tool call"),
            (call_with("[" * 100_000), "wrong tool call"),
        ],
    ),
    "tools/result": (
        "in Oslo",
        "It is 17 degrees in Oslo.",
        [
            ("It is 7 degrees.", "wrong answer"),
            ("It is 17.5 degrees.", "wrong answer"),
            ("17 - 17 = 17", "wrong answer"),
            (call("get_weather", city="Oslo"), "wrong tool call"),
        ],
    ),
}


#: The answers that every task is asked for: right, then wrong in its first way, and so on.
VARIANTS = max(len(wrong) for _, _, wrong in TASKS.values())


def task_of(text: str) -> str:
    [name] = [name for name, (part, _, _) in TASKS.items() if part in text]
    return name


Ask = Callable[[Callable[[str], Any]], dict[str, Any]]


@pytest.fixture
def ask(run: Run) -> Ask:
    """Return a function that gives the result on a server's answers, by task."""

    def result(say: Callable[[str], Any]) -> dict[str, Any]:
        with serving(lambda text: say(task_of(text))) as server:
            status, out, errors = run(
                "bench", "capability", "--base-url", server.url, "--json", "-"
            )
        assert status == 0, errors
        assert sum("tools" in body for body in server.bodies) == 2
        found: dict[str, Any] = json.loads(out)
        return found

    return result


def test_a_server_that_does_every_task_scores_fourteen(ask: Ask) -> None:
    result = ask(lambda name: TASKS[name][1])
    assert (result["correct"], result["total"], result["failures"]) == (14, 14, [])
    assert result["categories"] == {name: {"correct": 2, "total": 2} for name in CATEGORIES}


@pytest.mark.parametrize("variant", range(VARIANTS))
def test_each_task_tells_right_from_wrong(ask: Ask, variant: int) -> None:
    wrong = {name: TASKS[name][2][variant] for name in TASKS if variant < len(TASKS[name][2])}
    result = ask(lambda name: wrong[name][0] if name in wrong else TASKS[name][1])
    found = {f["id"].removeprefix("capability/"): f["kind"] for f in result["failures"]}
    assert found == {name: kind for name, (_, kind) in wrong.items()}
