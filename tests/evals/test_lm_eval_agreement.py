"""The same outputs get the same scores from lm-eval: its filters, its metric, its programs.

lm-eval's HumanEval task gets its metric `code_eval` from the hub when it is imported, so that the
metric is replaced here by what it does: execute the program and its tests in a fresh process.
"""

import importlib
import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from mtp_graft.bench.evals.asking import Answer
from mtp_graft.bench.evals.gsm8k import find_number, judge_number
from mtp_graft.bench.evals.humaneval import judge_code
from mtp_graft.bench.evals.mmlu import judge_letter
from mtp_graft.bench.evals.sandbox import Sandbox, Task

lm_eval = pytest.importorskip("lm_eval", reason="no lm-eval: `make test-evals` has it")
TASKS = Path(lm_eval.__file__).parent / "tasks"


def lm_eval_score(task_file: Path, filter_name: str, output: str, target: str) -> bool:
    """Return what lm-eval's task, read from its own file, makes of one output."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters import build_filter_ensemble

    lines = [line for line in task_file.read_text().splitlines() if "!function" not in line]
    task = yaml.safe_load("\n".join(lines))
    [steps] = [f["filter"] for f in task["filter_list"] if f["name"] == filter_name]
    components = [(s["function"], {k: v for k, v in s.items() if k != "function"}) for s in steps]
    instance = Instance("generate_until", {}, ("", {}), 0, resps=[output])
    build_filter_ensemble(filter_name, [(n, k or None) for n, k in components]).apply([instance])
    [metric] = [m for m in task["metric_list"] if m["metric"] == "exact_match"]
    options = {k: v for k, v in metric.items() if k not in {"metric", "aggregation"}}
    options.pop("higher_is_better")
    found = instance.filtered_resps[filter_name]
    score = exact_match_fn(predictions=[found], references=[target], **options)
    return bool(score["exact_match"])


def gsm8k_outputs(reference: str, number: str) -> list[str]:
    """Return outputs as models give them: right, wrong, and right in another form."""
    return [
        reference,
        f"So.\n#### {number}",
        f"So.\n#### {number}.",
        f"So.\n#### {number}.0",
        f"So.\n#### ${number}",
        f"So.\n####{number}",
        f"So.\n####  {number}",
        f"#### {number} apples",
        f"**#### {number}**",
        f"#### -{number}",
        f"#### {int(float(number)):,}",
        f"#### {number},",
        f"#### 1\nNo:\n#### {number}",
        f"#### {number}\nOr:\n#### 1",
        f"The answer is {number}.",
        "#### ?",
        "",
        f"#### {number}\n\n#### {number}",
        f"#### {number}%",
        f"#### 0{number}",
    ]


def test_gsm8k_scores_as_lm_evals_strict_match(gsm8k: dict[str, str]) -> None:
    score = partial(lm_eval_score, TASKS / "gsm8k" / "gsm8k.yaml", "strict-match")
    rows = random.Random(0).sample(list(gsm8k.values()), 25)
    verdicts = []
    for reference in rows:
        number = find_number(reference)
        assert number is not None
        for output in gsm8k_outputs(reference, number):
            ours = judge_number(number, Answer(output, "", "stop")).correct
            assert ours == score(output, reference), output
            verdicts.append(ours)
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.8, "both right and wrong ones were compared"


FORMS = (
    "The answer is ({}).",
    "Well. The answer is ({}).",
    "the answer is {}",
    "The answer is {}.",
    "The answer is **{}**",
    "The answer is ({}). No, the answer is (A).",
    "The answer is not known. Perhaps the answer is ({}).",
    "The correct choice is ({}).",
    "The answer is ({}",
    "({})",
    "{}",
    "{}.\nBecause it is so.",
    "{}, because it is so.",
    "I think ({})",
)


@pytest.mark.parametrize("expected", "ABCD")
def test_mmlu_scores_as_lm_evals_extraction(expected: str) -> None:
    pro = TASKS / "mmlu_pro" / "_default_template_yaml"
    generative = TASKS / "mmlu" / "generative" / "_default_template_yaml"
    verdicts = []
    for output in [
        *(form.format(letter) for letter in "ABCDE" for form in FORMS),
        "",
        "The answer",
    ]:
        theirs = lm_eval_score(pro, "custom-extract", output, expected)
        if lm_eval_score(pro, "custom-extract", output, "[invalid]"):  # it found nothing
            theirs = lm_eval_score(generative, "get_response", output, expected)
        ours = judge_letter(expected, Answer(output, "", "stop")).correct
        assert ours == theirs, output
        verdicts.append(ours)
    assert any(verdicts) and not all(verdicts)


@pytest.mark.parametrize("output", ["Answer: B", "**Answer:** B.", "So.\n\nanswer: (B)"])
def test_mmlu_takes_one_form_that_lm_eval_does_not_know(output: str) -> None:
    assert judge_letter("B", Answer(output, "", "stop")).correct
    assert not judge_letter("A", Answer(output, "", "stop")).correct
    pro = TASKS / "mmlu_pro" / "_default_template_yaml"
    assert not lm_eval_score(pro, "custom-extract", output, "B")


@pytest.fixture
def lm_evals_humaneval(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of lm-eval's HumanEval task, without the metric that it would download."""
    import evaluate

    class NoMetric:
        def compute(self, **_arguments: Any) -> None:
            return None

    monkeypatch.setattr(evaluate, "load", lambda _name: NoMetric())
    return importlib.import_module("lm_eval.tasks.humaneval.utils")


JUDGE = """
import json, sys, os
for program in json.load(sys.stdin):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            exec(program, {"__name__": "program"})
        except BaseException:
            os._exit(1)
        os._exit(0)
    print(int(os.waitpid(child, 0)[1] == 0))
"""


def passes(programs: list[str]) -> list[bool]:
    """Return whether each program ends without an exception, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", JUDGE],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        check=True,
    )
    return [line == "1" for line in done.stdout.split()]


def continuations(row: dict[str, Any], number: int) -> list[str]:
    """Return what models continue lm-eval's prompt with; it ends with the unfinished function."""
    body, whole = row["canonical_solution"], row["prompt"] + row["canonical_solution"]
    other = ["    return None\n", "    pass\n", "    return []\n", "    return 0\n"][number % 4]
    return [
        body,
        body + "```\nThis works because it does.",
        whole + "```",
        other,
        row["prompt"] + other + "```",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("whole_sandbox")
@pytest.mark.parametrize("half", [0, 1])  # side by side on two workers
def test_humaneval_passes_what_passes_by_lm_evals_programs(
    humaneval: list[dict[str, Any]], lm_evals_humaneval: ModuleType, half: int
) -> None:
    sandbox = Sandbox()
    ours, theirs = [], []
    for number, row in list(enumerate(humaneval))[half::2]:
        outputs = continuations(row, number)
        # Each of the 164 with two of the five forms; all pairs of forms come up.
        outputs = [outputs[number % 5], outputs[(number + 1 + number // 5) % 5]]
        task = partial(Task, entry_point=row["entry_point"], tests=row["test"])
        for output in outputs:
            answer = Answer(output, "", "stop")
            ours.append(judge_code(sandbox, row["prompt"], task, answer).correct)
        [built] = lm_evals_humaneval.build_predictions_instruct([outputs], [row])
        tests = f"{row['test']}\ncheck({row['entry_point']})"
        theirs += passes([f"{program}\n{tests}" for program in built])
    assert ours == theirs
    assert len(ours) == 164
    assert 75 < sum(ours) < 125, "both right and wrong ones were compared"
