"""What all tasks share: asking once, reading the answer, and judging it by a program."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anyio import to_thread
from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ContentReasoning, ModelOutput, get_model
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.tool import ToolInfo
from inspect_ai.util import concurrency
from markdown_it import MarkdownIt
from tenacity import RetryError

from mtp_graft.bench.evals.sandbox import Failure, run_tests
from mtp_graft.errors import GraftError

NO_ANSWER = "no answer found"
CUT_OFF = "no answer found, cut off"  # the token limit ended it
WRONG = "wrong answer"
UNREADABLE = "unreadable answer"  # too deep or too many digits for Python

#: Takes a model's output and its sample's metadata; None is right.
Judge = Callable[[ModelOutput, Mapping[str, Any]], Failure | None]


def make_task(
    name: str, samples: list[Sample], judge: Judge, tools: Sequence[ToolInfo] = ()
) -> Task:
    """Return a task that asks each sample once; the category `tools` is offered the tools."""
    return Task(
        dataset=MemoryDataset(samples), solver=_ask(tools), scorer=_judged(judge), name=name
    )


@solver
def _ask(tools: Sequence[ToolInfo]) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        offered = list(tools) if state.metadata.get("category") == "tools" else []
        try:
            state.output = await get_model().generate(state.messages, offered)
        except RetryError as error:
            raise GraftError(str(error.last_attempt.exception())) from error
        if state.output.stop_reason in ("model_length", "content_filter"):  # a status of 400
            raise GraftError(state.output.completion[:300])
        return state

    return solve


@scorer(metrics=[accuracy(), stderr()])
def _judged(judge: Judge) -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        async with concurrency("judge", len(os.sched_getaffinity(0))):
            try:
                failure = await to_thread.run_sync(judge, state.output, state.metadata)
            except (ValueError, RecursionError) as error:
                failure = Failure(UNREADABLE, str(error)[:200])
        if failure is None:
            return Score(value=CORRECT)
        detail = failure.detail.encode(errors="replace").decode()  # half a surrogate pair
        return Score(value=INCORRECT, explanation=detail, metadata={"kind": failure.kind})

    return score


def said(output: ModelOutput) -> str:
    """Return an answer's content, or what was thought if there is none.

    Inspect reads `reasoning` and `reasoning_content` alike.
    """
    message = output.message
    parts = [] if isinstance(message.content, str) else message.content
    thought = "".join(part.reasoning for part in parts if isinstance(part, ContentReasoning))
    return message.text if message.text.strip() else thought


def compare(found: str | None, expected: str, output: ModelOutput) -> Failure | None:
    """Judge what was found in an answer, None being nothing."""
    if found is None:
        is_cut_off = output.stop_reason == "max_tokens"
        return Failure(CUT_OFF if is_cut_off else NO_ANSWER, said(output)[-200:])
    return None if found == expected else Failure(WRONG, f"{found}, expected {expected}")


def judge_code(output: ModelOutput, data: Mapping[str, Any]) -> Failure | None:
    """Run the tests on the code in an answer's content; what was thought is not looked at.

    `data` has HumanEval's `prompt`, `entry_point` and `test`.
    """
    prompt, name = data["prompt"], data["entry_point"]
    code = find_code(output.completion, name)
    if not code.strip():
        return compare(None, "", output)
    if not re.search(r"^(?:async )?def ", code, re.MULTILINE):
        program = prompt + code  # the body that the prompt asks for
    else:
        start = _definition(prompt, name)
        program = (prompt[: start.start()] if start else prompt) + "\n" + code
    return run_tests({**data, "program": program})


def find_code(content: str, name: str) -> str:
    """Return the code of an answer: of its fenced blocks the first that defines the function.

    Without such a block it is the first one; without any, all of the text up to a lone closing
    fence.
    """
    opening = re.search(r"```|^ *~~~", content, re.MULTILINE)
    mark = opening[0].strip() if opening else "```"
    before, fence, after = content.partition(mark)
    is_closing = before.strip() and mark not in after and not after.partition("\n")[0].strip()
    if not fence or (is_closing and not _definition(after, name)):
        return before
    own_line = content.replace(f" {mark}", f"\n{mark}")  # where text stands before the fence
    blocks = [b for text in (content, own_line) for b in _fenced(text) if b.strip()]
    return next((block for block in blocks if _definition(block, name)), (blocks or [before])[0])


def _fenced(markdown: str) -> list[str]:
    """Return the fenced blocks, those in lists and inside blocks of Markdown, too."""
    blocks = []
    for token in MarkdownIt("commonmark", {"html": False}).parse(markdown):
        if token.type == "fence":
            is_markdown = token.info.strip().lower() in ("", "md", "markdown")
            blocks += (is_markdown and _fenced(token.content)) or [token.content]
    return blocks


def _definition(code: str, name: str) -> re.Match[str] | None:
    return re.search(rf"^(?:async )?def {re.escape(name)}\b", code, re.MULTILINE)
