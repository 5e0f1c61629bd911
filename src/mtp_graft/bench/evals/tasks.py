"""GSM8K, HumanEval and MMLU as Inspect tasks: what is asked, how answers are read and judged."""

import csv
import gzip
import io
import os
import re
import string
import tomllib
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from anyio import to_thread
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ContentReasoning, ModelOutput, get_model
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.tool import ToolInfo
from inspect_ai.util import concurrency
from markdown_it import MarkdownIt
from pydantic_core import from_json
from tenacity import RetryError

from mtp_graft.bench.evals.sandbox import Failure, find_python, run_tests
from mtp_graft.errors import GraftError, in_words, translated
from mtp_graft.serving.client import READ_ERRORS

Row = Mapping[str, Any]
#: Takes a model's output and its sample's metadata; None is right.
Judge = Callable[[ModelOutput, Mapping[str, Any]], Failure | None]

NO_ANSWER, WRONG = "no answer found", "wrong answer"
CUT_OFF = f"{NO_ANSWER}, cut off"  # the token limit ended it
UNREADABLE = "unreadable answer"  # too deep or too many digits for Python
#: Benchmark -> where its questions are, and what they are asked with.
SOURCES: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
#: No other number may follow on the line: `12/5` is not 12.
_NUMBER = re.compile(r"#### (-?[0-9][0-9.,]*)(?!.*[0-9])")
#: A letter in brackets, or one that ends the line: `Boyle's law` and `B cells` are no letters.
_LETTER = re.compile(
    r"(?i:answer(?: is)?)[ :*]+(?:\(([A-D])\)(?!,? (?:and|or)\b)|([A-D])(?=[ .*]*$))", re.MULTILINE
)


def load_task(name: str, data_dir: Path | None, limit: int | None, seed: int) -> Task:
    """Return a benchmark's task: `limit` of its test questions (None: all) as `seed` draws them.

    Raises GraftError for files that are not the benchmark's, and if its code cannot be confined.
    """
    if name == "humaneval":
        find_python()
    (to_sample, judge), pattern = _ASKED[name], SOURCES[name]["files"]
    files = [_fetch(**SOURCES[name])] if data_dir is None else sorted(data_dir.glob(pattern))
    if not files:
        expected = "the folder of the benchmark data as --data-dir, or none to load it from the hub"
        raise GraftError(f"{data_dir}: has no {pattern}; expected {expected}")
    samples: list[Sample] = []
    for path in files:
        first = len(samples)
        try:
            for row in _read_rows(path):
                samples.append(to_sample(row, len(samples)))
        except (OSError, EOFError, zlib.error, *READ_ERRORS) as error:
            where = f"{path}: row {len(samples) - first + 1}"
            raise GraftError(f"{where}: not of {name} ({in_words(error)})") from error
    return make_task(name, deal(samples, limit, seed), judge)


def deal(samples: list[Sample], limit: int | None, seed: int) -> list[Sample]:
    """Return `limit` of the questions (None: all) as `seed` draws them, from categories in turn."""
    if limit is not None and limit > len(samples):
        raise GraftError(f"there are {len(samples)} questions, --limit asks for {limit}: lower it")
    turns = defaultdict[str, Iterator[int]](count)  # by category
    drawn = Random(seed).sample(samples, len(samples))
    drawn.sort(key=lambda each: next(turns[(each.metadata or {}).get("category", "")]))
    return drawn[:limit]


def _fetch(dataset: str, config: str, **_: str) -> Path:
    file = f"{config}/test-00000-of-00001.parquet"
    what, cure = f"{dataset}: {file} cannot be fetched", "; give the data as --data-dir"
    with translated(what, HfHubHTTPError, OSError, then=cure):
        return Path(hf_hub_download(dataset, file, repo_type="dataset"))


def _read_rows(path: Path) -> Iterable[Row]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    if path.suffix == ".csv":
        subject, text = path.stem.removesuffix("_test"), io.StringIO(path.read_text("utf-8"))
        keys = ("subject", "question", "choices", "answer")
        parts = ((subject, q, c, "ABCD".index(letter)) for q, *c, letter in csv.reader(text))
        return (dict(zip(keys, row, strict=True)) for row in parts)
    content = path.read_bytes()
    lines = (gzip.decompress(content) if path.suffix == ".gz" else content).split(b"\n")
    return (from_json(line) for line in lines if line.strip())


# Asking and judging, of all tasks


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
    """Return an answer's content, or what was thought if there is none."""
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
    """Run HumanEval's `test` on the code in an answer; what was thought is not looked at."""
    prompt, name = data["prompt"], data["entry_point"]
    code = find_code(output.completion, name)
    if not code.strip():
        return compare(None, "", output)
    if re.search(r"^(?:async )?def ", code, re.MULTILINE):  # else the body that is asked for
        start = _definition(prompt, name)
        prompt = (prompt[: start.start()] if start else prompt) + "\n"
    return run_tests({**data, "program": prompt + code})


def find_code(content: str, name: str) -> str:
    """Return the code of an answer: of its fenced blocks the first that defines the function.

    Without such a block the first one; without any, all text up to a lone closing fence.
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


# What each benchmark asks, and where its answer stands


def find_number(text: str) -> str | None:
    """Return the number after the first `#### `, without commas and a final full stop."""
    found = _NUMBER.search(text)
    return found and found[1].replace(",", "").removesuffix(".")


def find_letter(text: str) -> str | None:
    """Return the one letter of `answer is (X)` or `Answer: X`, or of a first line with X alone."""
    found = {bracketed or bare for bracketed, bare in _LETTER.findall(text)}
    first_line = text.partition("\n")[0].strip(string.punctuation + string.whitespace)
    if not found and first_line in tuple("ABCD"):
        return first_line
    return found.pop() if len(found) == 1 else None


def _gsm8k(row: Row, number: int) -> Sample:
    text, target = row["question"].strip() + SOURCES["gsm8k"]["prompt"], find_number(row["answer"])
    if target is None:
        raise ValueError("no '#### N' in the reference answer")
    return Sample(id=f"gsm8k/{number}", input=text, metadata={"target": target})


def _humaneval(row: Row, _number: int) -> Sample:
    data = {key: row[key] + "" for key in ("prompt", "entry_point", "test")}
    text = SOURCES["humaneval"]["prompt"].format(**data)
    return Sample(id=row["task_id"] + "", input=text, metadata=data)


def _mmlu(row: Row, number: int) -> Sample:
    choices = "\n".join(f"({x}) " + c for x, c in zip("ABCD", row["choices"], strict=True))
    text = f"{row['question'].strip()}\n\n{choices}\n\n{SOURCES['mmlu']['prompt']}"
    data = {"category": row["subject"] + "", "target": "ABCD"[row["answer"]]}
    return Sample(id=f"mmlu/{row['subject']}/{number}", input=text, metadata=data)


def _expect(find: Callable[[str], str | None]) -> Judge:
    return lambda output, data: compare(find(said(output)), data["target"], output)


#: Benchmark -> how a row becomes a question (KeyError and the like for no such row), and its judge.
_ASKED: Mapping[str, tuple[Callable[[Row, int], Sample], Judge]] = {
    "gsm8k": (_gsm8k, _expect(find_number)),  # step by step, exact match on `#### N`
    "humaneval": (_humaneval, judge_code),  # from a docstring, judged by unit tests
    "mmlu": (_mmlu, _expect(find_letter)),  # four-way, as many of each subject, give or take one
}
