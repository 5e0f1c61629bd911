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
PARTS = ["Evaporation", "Condensation", "Precipitation", "Collection"]
TEXTS = {part: " ".join(f"{part}{number}" for number in range(78)) for part in PARTS}
SECTIONS = "\n\n".join(f"## {part}\n\n{text}" for part, text in TEXTS.items())
SHORT = SECTIONS.replace(TEXTS["Precipitation"], "Rain.")
LIST = "\n".join(f"{n}. Keep the screws of machine {n} apart" for n in range(1, 21))
RUNS = """
def run_lengths(text):
    from itertools import groupby
    return [(sign, len(list(run))) for sign, run in groupby(text)]
"""
MEDIAN = "import statistics\ndef median(values):\n    return statistics.median(values)\n"
IN_PLACE = "def median(v):\n    v.sort()\n    return v[len(v) // 2]\n"


def call(name: str, **arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


DENTIST = call("add_event", title="Dentist appointment", date="2027-03-04")
NOT_SO, WRONG = "instruction not followed", "wrong answer"
#: Task -> a part of its question, an answer that is right, and wrong ones with their kinds.
TASKS: dict[str, tuple[str, Any, dict[Any, str]]] = {
    "math/arithmetic": (
        *("48 * 37", "1776 - 159.\nAnswer: 1617"),
        {"Answer: 1627": WRONG, "1617": "no answer found"},
    ),
    "math/rates": ("pipe", "**Answer: 144**", {"Answer: 2.4": WRONG}),
    "reasoning/boxes": (
        *("boxes", "Answer: Yellow, red, blue, green."),
        {"Answer: green, blue, red, yellow": WRONG},
    ),
    "reasoning/days": ("Thursday", "Answer: Monday", {"Answer: Tuesday": WRONG}),
    "knowledge/tungsten": ("tungsten", "Answer: W", {"Answer: Tu": WRONG}),
    "knowledge/hermitage": ("Hermitage", "Answer: St. Petersburg", {"Answer: Moscow": WRONG}),
    "code/runs": (
        *("run_lengths", f"```python{RUNS}```"),
        {"```\ndef run_lengths(t): return []\n```": "AssertionError", "": "no answer found"},
    ),
    "code/median": ("median", f"```python\n{MEDIAN}```", {f"```\n{IN_PLACE}```": "AssertionError"}),
    "instruction/json": (
        *("an ant", '{"name": "ant", "legs": 6, "habitats": ["forest", "meadow"]}'),
        {
            '```json\n{"name": "ant"}\n```': NOT_SO,
            '{"name": "ant", "legs": 8, "habitats": ["a", "b"]}': NOT_SO,
            '{"name": "ant", "legs": 6, "habitats": ["a"]}': NOT_SO,
            '["name", "legs", "habitats"]': NOT_SO,
        },
    ),
    "instruction/hyphens": (
        *("hyphens", "sun-sea-sand-salt-sail\n"),
        dict.fromkeys(
            ("sun-sea-sand-salt", "sun-sun-sand-salt-sail", "Here: sun-sea-sand-salt-sail"), WRONG
        ),
    ),
    "longform/sections": (
        *("water cycle", SECTIONS),
        {
            SECTIONS.replace("## Coll", "## Call"): NOT_SO,
            SHORT: NOT_SO,
            SHORT.replace("Rain.", "the rain falls " * 200): "repetition",
        },
    ),
    "longform/list": (
        *("glass jar", LIST),
        {
            LIST.replace("7. ", "8. "): NOT_SO,
            f"Here:\n{LIST}": NOT_SO,
            LIST.replace("machine 4", "machine 5"): "repetition",
        },
    ),
    "tools/call": ("dentist", DENTIST, {"It is in your calendar.": "no tool call"}),
    "tools/result": (
        *("in Oslo", "It is 17 degrees in Oslo."),
        dict.fromkeys(("It is 7 degrees.", "It is 17.5 degrees.", "17 - 17 = 17"), WRONG),
    ),
}
WRONG_CALLS = [
    ("tools/call", call("search_mail", query="dentist")),
    ("tools/call", call("add_event", title="Dentist", date="2027-04-03")),
    ("tools/call", call("add_event", title="Dentist")),
    ("tools/result", call("get_weather", city="Oslo")),
]
WRONG_ANSWERS = [
    *((name, said, kind) for name, (_, _, wrong) in TASKS.items() for said, kind in wrong.items()),
    *((name, said, "wrong tool call") for name, said in WRONG_CALLS),
]


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


@pytest.mark.parametrize(("name", "said", "kind"), WRONG_ANSWERS)
def test_each_task_tells_right_from_wrong(name: str, said: Any, kind: str) -> None:
    samples = capability(None, None, 0).dataset
    [data] = [s.metadata for s in samples if s.id == f"capability/{name}"]
    failure = judge(output_of(said), data or {})
    assert failure is not None and failure.kind == kind
