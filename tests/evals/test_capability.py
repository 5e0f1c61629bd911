"""Our own fourteen tasks: a server that does all of them, and one that does each a little wrong."""

import json
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="Inspect is not installed (extra `evals`)")


from inspect_ai.model import ModelOutput

from mtp_graft.bench.evals.capability import capability, judge

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
    function = {"name": name, "arguments": json.dumps(arguments)}
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
            ('{"name": "ant", "legs": 8, "habitats": ["a", "b"]}', "instruction not followed"),
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
            (LIST.replace("machine 4", "machine 5"), "repetition"),
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


def output_of(said: Any) -> ModelOutput:
    if isinstance(said, str):
        return ModelOutput.from_content("m", said)
    function = said["tool_calls"][0]["function"]
    return ModelOutput.for_tool_call("m", function["name"], json.loads(function["arguments"]))


def test_a_server_that_does_every_task_scores_fourteen(run: Run) -> None:
    def say(text: str) -> Any:
        [answer] = [answer for part, answer, _ in TASKS.values() if part in text]
        return answer

    with serving(say) as server:
        status, out, errors = run("bench", "capability", "--base-url", server.url, "--json", "-")
    assert status == 0, errors
    result = json.loads(out)
    assert (result["correct"], result["total"], result["failures"]) == (14, 14, [])
    assert result["categories"] == {name: {"correct": 2, "total": 2} for name in CATEGORIES}
    assert sum("tools" in body for body in server.bodies) == 2


@pytest.mark.parametrize("name", TASKS)
def test_each_task_tells_right_from_wrong(name: str) -> None:
    samples = capability(None, None, 0).dataset
    [data] = [s.metadata for s in samples if s.id == f"capability/{name}"]
    _, right, wrong = TASKS[name]
    assert data is not None and judge(output_of(right), data) is None
    for said, kind in wrong:
        failure = judge(output_of(said), data)
        assert failure is not None and failure.kind == kind, said
