"""Our own fourteen tasks: a server that does all of them, and one that does each a little wrong."""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="Inspect is not installed (extra `evals`)")

from inspect_ai.model import ModelOutput

from mtp_graft.bench.evals.capability import capability, judge

from .chat_server import serving

pytestmark = [pytest.mark.usefixtures("sandbox"), pytest.mark.timeout(600)]
PARTS = ("Evaporation", "Condensation", "Precipitation", "Collection")
TEXTS = {part: " ".join(f"{part}{number}" for number in range(78)) for part in PARTS}
SECTIONS = "\n\n".join(f"## {part}\n\n{text}" for part, text in TEXTS.items())
SHORT = SECTIONS.replace(TEXTS["Precipitation"], "Rain.")
LIST = "\n".join(f"{n}. Keep the screws of machine {n} apart" for n in range(1, 21))
ANT = '{"name": "ant", "legs": 6, "habitats": ["forest", "meadow"]}'
RUNS = """
def run_lengths(text):
    from itertools import groupby
    return [(sign, len(list(run))) for sign, run in groupby(text)]
"""
MEDIAN = "import statistics\ndef median(values):\n    return statistics.median(values)\n"
IN_PLACE = "def median(v):\n    v.sort()\n    return v[len(v) // 2]\n"


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


RIGHT = {
    "math/arithmetic": "1776 - 159.\nAnswer: 1617",
    "math/rates": "**Answer: 144**",
    "reasoning/boxes": "Answer: Yellow, red, blue, green.",
    "reasoning/days": "Answer: Monday",
    "knowledge/tungsten": "Answer: W",
    "knowledge/hermitage": "Answer: St. Petersburg",
    "code/runs": f"```python{RUNS}```",
    "code/median": f"```python\n{MEDIAN}```",
    "instruction/json": ANT,
    "instruction/hyphens": "sun-sea-sand-salt-sail\n",
    "longform/sections": SECTIONS,
    "longform/list": LIST,
    "tools/call": call("add_event", title="Dentist appointment", date="2027-03-04"),
    "tools/result": "It is 17 degrees in Oslo.",
}
NOT_SO, WRONG, WRONG_CALL = "instruction not followed", "wrong answer", "wrong tool call"
WRONG_ANSWERS = [
    ("math/arithmetic", "Answer: 1627", WRONG),
    ("math/arithmetic", "1617", "no answer found"),
    ("math/rates", "Answer: 2.4", WRONG),
    ("reasoning/boxes", "Answer: green, blue, red, yellow", WRONG),
    ("reasoning/days", "Answer: Tuesday", WRONG),
    ("knowledge/tungsten", "Answer: Tu", WRONG),
    ("knowledge/hermitage", "Answer: Moscow", WRONG),
    ("code/runs", "```\ndef run_lengths(t): return []\n```", "AssertionError"),
    ("code/median", f"```\n{IN_PLACE}```", "AssertionError"),
    ("instruction/json", f"```json\n{ANT}\n```", NOT_SO),
    ("instruction/json", ANT.replace("6", "8"), NOT_SO),
    ("instruction/json", ANT.replace(', "meadow"', ""), NOT_SO),
    ("instruction/hyphens", "sun-sea-sand-salt", WRONG),
    ("instruction/hyphens", "sun-sun-sand-salt-sail", WRONG),
    ("instruction/hyphens", "Here: sun-sea-sand-salt-sail", WRONG),
    ("longform/sections", SHORT, NOT_SO),
    ("longform/sections", SHORT.replace("Rain.", "the rain falls " * 200), "repetition"),
    ("longform/list", LIST.replace("7. ", "8. "), NOT_SO),
    ("longform/list", LIST.replace("machine 4", "machine 5"), "repetition"),
    ("tools/call", "It is in your calendar.", "no tool call"),
    ("tools/call", call("search_mail", query="dentist"), WRONG_CALL),
    ("tools/call", call("add_event", title="Dentist", date="2027-04-03"), WRONG_CALL),
    ("tools/call", call("add_event", title=["Dentist"], date="2027-03-04"), WRONG_CALL),
    ("tools/result", call("get_weather", city="Oslo"), WRONG_CALL),
    ("tools/result", "It is 17.5 degrees.", WRONG),
    ("tools/result", "17 - 17 = 17", WRONG),
]


def test_a_server_that_does_every_task_scores_fourteen(mtp_graft: Callable[..., Any]) -> None:
    answers = {}
    for sample in capability(None, None, 0).dataset:
        asked = sample.input if isinstance(sample.input, str) else sample.input[0].text
        answers[asked] = RIGHT[str(sample.id).removeprefix("capability/")]
    with serving(answers.__getitem__) as server:
        result = mtp_graft("bench", "capability", "--base-url", server.url)
    assert (result["correct"], result["total"], result["failures"]) == (14, 14, [])
    kinds = {name.partition("/")[0] for name in RIGHT}
    assert result["categories"] == {kind: {"correct": 2, "total": 2} for kind in kinds}
    assert sum("tools" in body for body in server.bodies) == 2


@pytest.mark.parametrize(("name", "said", "kind"), WRONG_ANSWERS)
def test_each_task_tells_right_from_wrong(name: str, said: Any, kind: str) -> None:
    samples = capability(None, None, 0).dataset
    [data] = [s.metadata for s in samples if s.id == f"capability/{name}"]
    if isinstance(said, str):
        output = ModelOutput.from_content("m", said)
    else:
        wanted = said["tool_calls"][0]["function"]
        output = ModelOutput.for_tool_call("m", wanted["name"], json.loads(wanted["arguments"]))
    failure = judge(output, data or {})
    assert failure is not None and failure.kind == kind
