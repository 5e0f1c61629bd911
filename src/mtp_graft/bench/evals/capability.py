"""Fourteen small tasks of seven kinds, each judged by a program; all of them written for this."""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mtp_graft.bench.evals.asking import Answer, Question
from mtp_graft.bench.evals.evaluation import (
    JUDGE_ERRORS,
    WRONG,
    Evaluation,
    Item,
    Judgement,
    no_answer,
)
from mtp_graft.bench.evals.humaneval import find_code
from mtp_graft.bench.evals.sandbox import Sandbox, Task

DISOBEYED = "instruction not followed"
NO_CALL = "no tool call"
WRONG_CALL = "wrong tool call"

Judge = Callable[[Answer], Judgement]

_LAST_LINE = " End with a line that says 'Answer: ' and then {what} alone."
_ANSWER = re.compile(r"answer:[\s*]*([^\n]+)", re.IGNORECASE)
#: Of a text's runs of four words, the share that must be different: a loop has few.
_MIN_DISTINCT = 0.5


def capability(sandbox: Sandbox, max_tokens: int = 2048) -> Evaluation:
    """Return the fourteen tasks. Raises GraftError if the sandbox for the code cannot be made."""
    sandbox.require()
    tasks = _MATH | _code_tasks(sandbox) | _REASONING | _KNOWLEDGE | _INSTRUCTION | _LONG | _TOOLS
    items = []
    for name, (messages, judge) in tasks.items():
        category = name.partition("/")[0]
        tools = _TOOL_LIST if category == "tools" else ()
        question = Question(f"capability/{name}", messages, max_tokens, tools)
        items.append(Item(question, judge, category))
    settings = {"max_tokens": max_tokens, "sandbox": {"without": sorted(sandbox.without)}}
    return Evaluation("capability", tuple(items), settings)


def _user(text: str) -> tuple[Mapping[str, Any], ...]:
    return ({"role": "user", "content": text},)


def judge_last_line(pattern: str, answer: Answer) -> Judgement:
    """Compare what follows the last `Answer:` with a pattern, ignoring case and a full stop."""
    found = _ANSWER.findall(answer.text)
    if not found:
        return no_answer(answer)
    said = found[-1].strip().strip("*").rstrip(".").strip()
    if not re.fullmatch(pattern, said, re.IGNORECASE):
        return Judgement(False, WRONG, said[:200])
    return Judgement(True)


def _asks(text: str, what: str, pattern: str) -> tuple[tuple[Mapping[str, Any], ...], Judge]:
    return _user(text + _LAST_LINE.format(what=what)), partial(judge_last_line, pattern)


_MATH = {
    "math/arithmetic": _asks("What is 48 * 37 - 159?", "the number", r"1,?617"),
    "math/rates": _asks(
        "One pipe fills an empty tank in 6 hours, another one fills it in 4 hours. Both are "
        "opened at the same time. After how many minutes is the tank full?",
        "the number of minutes",
        r"144(\.0+)?( min(utes)?)?",
    ),
}
_REASONING = {
    "reasoning/boxes": _asks(
        "Four boxes stand on each other. The green box is at the bottom. The red box stands "
        "directly on the blue one. The yellow box is somewhere above the red one. In which order "
        "are the boxes, from the top to the bottom?",
        "the four colours, with commas between them",
        r"yellow,\s*red,\s*blue,\s*green",
    ),
    "reasoning/days": _asks(
        "The day after tomorrow is a Thursday. Which day of the week was yesterday?",
        "the name of the day",
        "monday",
    ),
}
_KNOWLEDGE = {
    "knowledge/tungsten": _asks(
        "What is the chemical symbol of tungsten?", "the symbol", r"W( \(.*\))?"
    ),
    "knowledge/hermitage": _asks(
        "In which city is the State Hermitage Museum?",
        "the name of the city",
        r"(saint|st\.?) petersburg(, russia)?",
    ),
}

_RUNS_TESTS = """
def check(candidate):
    assert [tuple(run) for run in candidate("")] == []
    assert [tuple(run) for run in candidate("a")] == [("a", 1)]
    assert [tuple(run) for run in candidate("aabccc")] == [("a", 2), ("b", 1), ("c", 3)]
    assert [tuple(run) for run in candidate("abab")] == [(x, 1) for x in "abab"]
    assert [tuple(run) for run in candidate("  \\n")] == [(" ", 2), ("\\n", 1)]
"""
_MEDIAN_TESTS = """
def check(candidate):
    assert candidate([7]) == 7
    assert candidate([3, 1, 2]) == 2
    assert candidate([4, 1, 3, 2]) == 2.5
    assert candidate([-5, 10, 0, -1]) == -0.5
    values = [9, 8, 1]
    candidate(values)
    assert values == [9, 8, 1]
"""


def _code_tasks(sandbox: Sandbox) -> dict[str, tuple[tuple[Mapping[str, Any], ...], Judge]]:
    runs = (
        "Write a Python function run_lengths(text) that returns the runs of equal characters in a "
        "string, in order, as a list of pairs (character, length). An empty string has none. "
        "Answer with one fenced code block."
    )
    median = (
        "This function must return the median of a list of numbers that is not empty, and must "
        "leave the list as it is. It does neither. Correct it and answer with the whole function "
        "in one fenced code block.\n\n```python\ndef median(values):\n    values.sort()\n"
        "    return values[len(values) // 2]\n```"
    )
    return {
        "code/runs": (_user(runs), partial(_judge_function, sandbox, "run_lengths", _RUNS_TESTS)),
        "code/median": (_user(median), partial(_judge_function, sandbox, "median", _MEDIAN_TESTS)),
    }


def _judge_function(sandbox: Sandbox, name: str, tests: str, answer: Answer) -> Judgement:
    code = find_code(answer.content, name)
    if not code.strip():
        return no_answer(answer)
    verdict = sandbox.judge(Task(code, name, tests))
    return Judgement(verdict.passed, verdict.kind, verdict.message)


def judge_json(answer: Answer) -> Judgement:
    """Expect a JSON object and nothing else: name, legs and two habitats of an insect."""
    try:
        found = json.loads(answer.content)
    except JUDGE_ERRORS as error:
        return Judgement(False, DISOBEYED, f"not JSON: {error}")
    if not isinstance(found, dict) or set(found) != {"name", "legs", "habitats"}:
        return Judgement(False, DISOBEYED, "other keys than name, legs and habitats")
    habitats = found["habitats"]
    if not (isinstance(found["name"], str) and isinstance(habitats, list)):
        return Judgement(False, DISOBEYED, "name is no string, or habitats no list")
    if len(habitats) != 2 or not all(isinstance(place, str) for place in habitats):
        return Judgement(False, DISOBEYED, "habitats are not two strings")
    if found["legs"] != 6:
        return Judgement(False, WRONG, f"{found['legs']} legs")
    return Judgement(True)


def judge_hyphens(answer: Answer) -> Judgement:
    """Expect five lower-case words that begin with s, different ones, joined by hyphens."""
    said = answer.content.strip()
    words = said.split("-")
    if not re.fullmatch(r"s[a-z]+(-s[a-z]+){4}", said) or len(set(words)) < 5:
        return Judgement(False, DISOBEYED, said[:200])
    return Judgement(True)


_INSTRUCTION = {
    "instruction/json": (
        _user(
            "Describe an ant as a JSON object with exactly three keys: name (a string), legs (a "
            "number) and habitats (a list of two strings). Answer with the JSON alone: no code "
            "fence, no other text."
        ),
        judge_json,
    ),
    "instruction/hyphens": (
        _user(
            "Write five different English words, all in lower case, all beginning with the "
            "letter s, joined by hyphens, on one line. Write nothing else."
        ),
        judge_hyphens,
    ),
}

_SECTIONS = ("Evaporation", "Condensation", "Precipitation", "Collection")


def judge_sections(answer: Answer) -> Judgement:
    """Expect the four headings in order, 60 words or more below each, and no loop."""
    parts = re.split(r"^## +(.+?) *$", answer.content, flags=re.MULTILINE)
    if tuple(parts[1::2]) != _SECTIONS:
        return Judgement(False, DISOBEYED, f"headings {parts[1::2]}"[:200])
    shortest = min(len(text.split()) for text in parts[2::2])
    if shortest < 60:
        return Judgement(False, DISOBEYED, f"a section of {shortest} words")
    return _judge_variety(answer.content)


def judge_list(answer: Answer) -> Judgement:
    """Expect lines 1 to 20, three words or more each, all different."""
    lines = [line.strip() for line in answer.content.strip().splitlines() if line.strip()]
    found = [re.fullmatch(r"(\d+)\. (.+)", line) for line in lines]
    if [match and int(match[1]) for match in found] != list(range(1, 21)):
        return Judgement(False, DISOBEYED, f"{len(lines)} lines, expected 1. to 20.")
    texts = [match[2].lower() for match in found if match]
    if len(set(texts)) < 20 or min(len(text.split()) for text in texts) < 3:
        return Judgement(False, DISOBEYED, "lines that repeat, or of fewer than three words")
    return _judge_variety(" ".join(texts))


def _judge_variety(text: str) -> Judgement:
    words = text.lower().split()
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    distinct = len(set(runs)) / len(runs)
    if distinct < _MIN_DISTINCT:
        return Judgement(False, "repetition", f"{distinct:.2f} of the runs of four words differ")
    return Judgement(True)


_LONG = {
    "longform/sections": (
        _user(
            "Explain the water cycle in four sections with the headings '## Evaporation', "
            "'## Condensation', '## Precipitation' and '## Collection', in this order and with no "
            "other headings. Every section has 80 words or more."
        ),
        judge_sections,
    ),
    "longform/list": (
        _user(
            "List twenty different uses of an empty glass jar, numbered '1. ' to '20. ', one a "
            "line, each of five to twelve words. Write nothing before or after the list."
        ),
        judge_list,
    ),
}


def _tool(name: str, purpose: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    function = {"name": name, "description": purpose, "parameters": schema}
    return {"type": "function", "function": function}


_TOOL_LIST = (
    _tool("get_weather", "Today's weather in a city.", city="The city's name."),
    _tool(
        "add_event",
        "Put an event into the user's calendar.",
        title="What it is.",
        date="The day, as YYYY-MM-DD.",
    ),
    _tool("search_mail", "Search the user's mail.", query="Words to look for."),
)


def judge_call(answer: Answer) -> Judgement:
    """Expect one call: the dentist, into the calendar, on 4 March 2027."""
    if not answer.tool_calls:
        return Judgement(False, NO_CALL, answer.text[-200:])
    if len(answer.tool_calls) != 1 or answer.tool_calls[0]["name"] != "add_event":
        return Judgement(False, WRONG_CALL, str([call["name"] for call in answer.tool_calls]))
    try:
        given = json.loads(answer.tool_calls[0]["arguments"])
    except JUDGE_ERRORS as error:
        return Judgement(False, WRONG_CALL, f"arguments are not JSON: {error}")
    if not isinstance(given, dict) or set(given) != {"title", "date"}:
        return Judgement(False, WRONG_CALL, "arguments other than title and date")
    if given["date"] != "2027-03-04" or "dentist" not in str(given["title"]).lower():
        return Judgement(False, WRONG_CALL, str(given)[:200])
    return Judgement(True)


def judge_use(answer: Answer) -> Judgement:
    """Expect an answer in words, with the temperature that the tool gave, and no other call."""
    if answer.tool_calls:
        return Judgement(False, WRONG_CALL, "a call although the result is there")
    if not answer.content.strip():
        return no_answer(answer)
    if not re.search(r"(?<![\d.])17(\.0)? ?(°|degrees|celsius|c\b)", answer.content.lower()):
        return Judgement(False, WRONG, answer.content[-200:])
    return Judgement(True)


_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
}
_TOOLS = {
    "tools/call": (
        _user("I have a dentist appointment on 4 March 2027. Please put it into my calendar."),
        judge_call,
    ),
    "tools/result": (
        (
            {"role": "user", "content": "How warm is it in Oslo today?"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {
                "role": "tool",
                "tool_call_id": "call_1",
                "content": '{"city": "Oslo", "sky": "cloudy", "celsius": 17}',
            },
        ),
        judge_use,
    ),
}
