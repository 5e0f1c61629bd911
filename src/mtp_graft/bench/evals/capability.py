"""Fourteen small tasks of seven kinds (capability.toml), each judged by a program."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from inspect_ai import Task
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput
from inspect_ai.tool import ToolInfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mtp_graft.bench.evals.judging import WRONG, compare, judge_code, make_task, said
from mtp_graft.bench.evals.sandbox import Failure, find_python
from mtp_graft.bench.evals.tasks import deal
from mtp_graft.errors import UsageError

DISOBEYED = "instruction not followed"
NO_CALL = "no tool call"
WRONG_CALL = "wrong tool call"
REPETITION = "repetition"
_SECTIONS = ["Evaporation", "Condensation", "Precipitation", "Collection"]
#: Of a text's runs of four words, the share that must be different: a loop has few.
_MIN_DISTINCT = 0.5


def capability(data_dir: Path | None, limit: int | None, seed: int, timeout_s: float) -> Task:
    """Return the fourteen tasks. Raises GraftError if there is no sandbox for the code."""
    if data_dir is not None:
        raise UsageError("capability has its own questions: leave out --data-dir")
    find_python()
    found = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    samples = []
    for data in found["task"]:
        text = data.pop("input")
        if "answer" in data:
            text += f" End with a line that says 'Answer: ' and then {data['answer']} alone."
        data |= {"category": data["id"].partition("/")[0], "prompt": "", "timeout_s": timeout_s}
        sample = {"id": f"capability/{data['id']}", "input": text, "metadata": data}
        samples.append(Sample.model_validate(sample))
    tools = [ToolInfo.model_validate(tool) for tool in found["tool"]]
    return make_task("capability", deal(samples, limit, seed), judge, tools)


def judge(output: ModelOutput, data: Mapping[str, Any]) -> Failure | None:
    """Judge an answer to the task `data`."""
    if "pattern" in data:
        return _judge_last_line(output, data["pattern"])
    return judge_code(output, data) if "test" in data else _JUDGES[data["id"]](output)


def _judge_last_line(output: ModelOutput, pattern: str) -> Failure | None:
    """Compare what follows the last `Answer:`, ignoring case and a full stop."""
    lines = re.findall(r"answer:[\s*]*([^\n]+)", said(output), re.IGNORECASE)
    if not lines:
        return compare(None, pattern, output)
    last = lines[-1].strip().strip("*").rstrip(".").strip()
    return None if re.fullmatch(pattern, last, re.IGNORECASE) else Failure(WRONG, last[:200])


class _Ant(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    name: str
    legs: float
    habitats: Annotated[list[str], Field(min_length=2, max_length=2)]


def _judge_json(output: ModelOutput) -> Failure | None:
    try:
        ant = _Ant.model_validate_json(output.completion)
    except ValidationError as error:
        return Failure(DISOBEYED, str(error)[:200])
    return None if ant.legs == 6 else Failure(WRONG, f"{ant.legs} legs")


def _judge_hyphens(output: ModelOutput) -> Failure | None:
    line = output.completion.strip()
    is_right = re.fullmatch(r"s[a-z]+(-s[a-z]+){4}", line) and len(set(line.split("-"))) == 5
    return None if is_right else Failure(DISOBEYED, line[:200])


def _judge_sections(output: ModelOutput) -> Failure | None:
    parts = re.split(r"^## +(.+?) *$", output.completion, flags=re.MULTILINE)
    words = [len(text.split()) for text in parts[2::2]]
    if parts[1::2] != _SECTIONS or min(words) < 60:
        return Failure(DISOBEYED, f"headings {parts[1::2]} with {words} words"[:200])
    return _judge_variety(output.completion)


def _judge_list(output: ModelOutput) -> Failure | None:
    lines = [line.strip() for line in output.completion.splitlines() if line.strip()]
    texts = [line.partition(". ")[2].lower() for line in lines]
    is_numbered = all(line.startswith(f"{i}. ") for i, line in enumerate(lines, start=1))
    if not is_numbered or len(lines) != 20:
        return Failure(DISOBEYED, f"{len(lines)} lines, expected 1. to 20.")
    if len(set(texts)) < 20 or min(len(text.split()) for text in texts) < 3:
        return Failure(DISOBEYED, "lines that repeat, or of fewer than three words")
    return _judge_variety(" ".join(texts))


def _judge_variety(text: str) -> Failure | None:
    words = text.lower().split()
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    distinct = len(set(runs)) / len(runs)
    detail = f"{distinct:.2f} of the runs of four words differ"
    return None if distinct >= _MIN_DISTINCT else Failure(REPETITION, detail)


def _judge_call(output: ModelOutput) -> Failure | None:
    """Expect one call: the dentist, into the calendar, on 4 March 2027."""
    if not output.message.tool_calls:
        return Failure(NO_CALL, said(output)[-200:])
    call, *others = output.message.tool_calls
    given = call.arguments
    is_right = (
        not (others or call.parse_error)
        and (call.function, given.keys()) == ("add_event", {"title", "date"})
        and given["date"] == "2027-03-04"
        and "dentist" in str(given["title"]).lower()
    )
    return None if is_right else Failure(WRONG_CALL, f"{call.function}: {given}"[:200])


def _judge_use(output: ModelOutput) -> Failure | None:
    """Expect an answer in words, with the temperature that the tool gave, and no other call."""
    if output.message.tool_calls:
        return Failure(WRONG_CALL, "a call although the result is there")
    if not output.completion.strip():
        return compare(None, "17", output)
    is_right = re.search(r"(?<![\d.])17(\.0)? ?(°|degrees|celsius|c\b)", output.completion.lower())
    return None if is_right else Failure(WRONG, output.completion[-200:])


_JUDGES = {
    "instruction/json": _judge_json,
    "instruction/hyphens": _judge_hyphens,
    "longform/sections": _judge_sections,
    "longform/list": _judge_list,
    "tools/call": _judge_call,
    "tools/result": _judge_use,
}
