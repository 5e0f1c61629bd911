"""HumanEval: functions written from a docstring, pass@1, greedy, judged by their unit tests."""

import re
from functools import partial
from pathlib import Path

from mtp_graft.bench.evals.asking import Answer, Question
from mtp_graft.bench.evals.data import humaneval_rows, sample
from mtp_graft.bench.evals.evaluation import Evaluation, Item, Judgement, no_answer
from mtp_graft.bench.evals.sandbox import Sandbox, Task

_INSTRUCTION = (
    "Complete this Python function. Answer with one fenced code block that holds the whole "
    "function and the imports it needs, and with nothing else.\n\n```python\n{prompt}```"
)
_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_DEFINITION = r"^(?:async )?def {name}\b"


def humaneval(
    data_dir: Path | None, limit: int | None, seed: int, sandbox: Sandbox, max_tokens: int = 1024
) -> Evaluation:
    """Return the problems, all 164 or `limit` of them drawn by `seed`.

    Raises GraftError at once if the sandbox cannot be made on this machine.
    """
    sandbox.require()
    items = []
    for row in sample(humaneval_rows(data_dir), limit, seed, "HumanEval"):
        text = _INSTRUCTION.format(prompt=row["prompt"])
        question = Question(row["task_id"], ({"role": "user", "content": text},), max_tokens)
        task = partial(Task, entry_point=row["entry_point"], tests=row["test"])
        items.append(Item(question, partial(judge_code, sandbox, row["prompt"], task)))
    settings = {
        "limit": limit,
        "seed": seed,
        "max_tokens": max_tokens,
        "sandbox": {"without": sorted(sandbox.without), "seconds": sandbox.seconds},
    }
    return Evaluation("humaneval", tuple(items), settings)


def judge_code(sandbox: Sandbox, prompt: str, task: "partial[Task]", answer: Answer) -> Judgement:
    """Run the tests on the code in an answer's content; what was thought is not looked at."""
    entry_point = task.keywords["entry_point"]
    code = find_code(answer.content, entry_point)
    if not code.strip():
        return no_answer(answer)
    verdict = sandbox.judge(task(program=join(prompt, code, entry_point), prompt=prompt))
    if not verdict.passed:
        return Judgement(False, verdict.kind, verdict.message)
    return Judgement(True)


def find_code(content: str, entry_point: str) -> str:
    """Return the code of an answer: of its blocks the first that defines the function.

    Without such a block it is the first one; without any, all of the text up to a lone closing
    fence, as it stands.
    """
    lone_fence = content.count("```") == 1 and not content.lstrip().startswith("```")
    blocks = [] if lone_fence else [found[1] for found in _BLOCK.finditer(content)]
    if not blocks:
        return content.partition("```")[0]
    return next((block for block in blocks if _defines(block, entry_point)), blocks[0])


def join(prompt: str, code: str, entry_point: str) -> str:
    """Return a program: the prompt's imports and helpers with the code, or the prompt continued.

    A code that defines no function at all is taken for the body that the prompt asks for. One
    that names its function differently stays without the entry point: a NameError.
    """
    if not re.search(r"^(?:async )?def ", code, re.MULTILINE):
        return prompt + code
    start = re.search(_DEFINITION.format(name=re.escape(entry_point)), prompt, re.MULTILINE)
    return (prompt[: start.start()] if start else prompt) + "\n" + code


def _defines(code: str, name: str) -> bool:
    return bool(re.search(_DEFINITION.format(name=re.escape(name)), code, re.MULTILINE))
