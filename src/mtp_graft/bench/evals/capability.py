"""Fourteen small tasks of seven kinds, in capability.toml, which says what is right, too."""

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
from inspect_ai import Task
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput
from inspect_ai.tool import ToolInfo

from mtp_graft.bench.evals.sandbox import Failure, find_python
from mtp_graft.bench.evals.tasks import WRONG, compare, deal, judge_code, make_task, said
from mtp_graft.errors import UsageError

DISOBEYED = "instruction not followed"
NO_CALL = "no tool call"
WRONG_CALL = "wrong tool call"
REPETITION = "repetition"
#: Of a text's runs of four words, the share that must be different: a loop has few.
_MIN_DISTINCT = 0.5

Data = Mapping[str, Any]


def capability(data_dir: Path | None, limit: int | None, seed: int) -> Task:
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
        data |= {"category": data["id"].partition("/")[0], "prompt": ""}
        samples.append(Sample(id=f"capability/{data['id']}", input=text, metadata=data))
    tools = [ToolInfo.model_validate(tool) for tool in found["tool"]]
    return make_task("capability", deal(samples, limit, seed), judge, tools)


def judge(output: ModelOutput, data: Data) -> Failure | None:
    """Judge an answer to the task `data`, by the check that it names."""
    return next(check for key, check in _CHECKS.items() if key in data)(output, data)


def _judge_pattern(output: ModelOutput, data: Data) -> Failure | None:
    """Match all of the text or, of a task with an `answer`, what the last `Answer:` says."""
    text = said(output).strip()
    if "answer" in data:
        lines = re.findall(r"answer:[\s*]*([^\n]+)", text, re.IGNORECASE)
        text = lines[-1].strip().strip("*").rstrip(".").strip() if lines else ""
    if output.message.tool_calls:
        return Failure(WRONG_CALL, "a call although none is needed")
    if not text:
        return compare(None, data["pattern"], output)
    is_right = re.fullmatch(data["pattern"], text, re.IGNORECASE | re.DOTALL)
    return None if is_right else Failure(WRONG, text[-200:])


def _judge_schema(output: ModelOutput, data: Data) -> Failure | None:
    try:
        jsonschema.validate(json.loads(output.completion), data["schema"])
    except (ValueError, jsonschema.ValidationError) as error:
        return Failure(DISOBEYED, str(error)[:200])
    return None


def _judge_parts(output: ModelOutput, data: Data) -> Failure | None:
    """Expect parts with these names, different from each other, and few words that come again."""
    before, *found = re.split(data["split"], output.completion.strip(), flags=re.MULTILINE)
    names, texts = found[::2], [text.lower().split() for text in found[1::2]]
    sizes = [len(words) for words in texts]
    if before or names != data["names"] or min(sizes) < data["min_words"]:
        return Failure(DISOBEYED, f"parts {names} with {sizes} words"[:200])
    words = [word for text in texts for word in text]
    runs = list(zip(*(words[start:] for start in range(4)), strict=False))
    if len(set(map(tuple, texts))) < len(texts) or len(set(runs)) / len(runs) < _MIN_DISTINCT:
        return Failure(REPETITION, f"{len(set(runs))} of {len(runs)} runs of four words differ")
    return None


def _judge_call(output: ModelOutput, data: Data) -> Failure | None:
    """Expect one call, every argument of which matches its pattern."""
    calls, wanted = output.message.tool_calls or [], data["arguments"]
    if not calls:
        return Failure(NO_CALL, said(output)[-200:])
    given = calls[0].arguments
    is_right = (
        (len(calls), calls[0].parse_error, calls[0].function) == (1, None, data["call"])
        and given.keys() == wanted.keys()
        and all(isinstance(given[n], str) and re.fullmatch(wanted[n], given[n]) for n in wanted)
    )
    return None if is_right else Failure(WRONG_CALL, f"{calls[0].function}: {given}"[:200])


#: By the key of a task that says what is right.
_CHECKS: Mapping[str, Callable[[ModelOutput, Data], Failure | None]] = {
    "pattern": _judge_pattern,
    "test": judge_code,
    "schema": _judge_schema,
    "split": _judge_parts,
    "call": _judge_call,
}
