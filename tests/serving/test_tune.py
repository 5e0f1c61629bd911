"""`mtp-graft tune` and how `serve` takes what it found, with speeds that are known."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from mtp_graft.bench import sweep
from mtp_graft.bench.tune import hold, make_schedule, tune
from mtp_graft.checkpoint.files import TUNED_NAME
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import ServeOptions, build_command, vllm_elsewhere
from mtp_graft.serving.plan import with_tuned
from mtp_graft.stages.parallel import device_name
from mtp_graft.stages.splice import base_files

LOADS, USUAL = [1, 4, 16], {"draft_lm_head_quantization": None, "draft_sample_method": None}
FP8, GREEDY = {"draft_lm_head_quantization": "fp8"}, {"draft_sample_method": "greedy"}
CHOICES = {"default": USUAL, "fp8": FP8, "greedy": GREEDY}


def decide(gain: Callable[..., float], choices: Any = CHOICES) -> Any:
    """Return the decision and the servers' names in turn; `gain` is of a load and its drafts."""
    noise, names = np.random.default_rng(0), list[str]()

    def served(name: str, **drafts: Any) -> list[dict[str, Any]]:
        names.append(name)
        base = 31 / np.linspace(50, 90, 8) / noise.normal(1, 0.01, (len(LOADS), 2, 8))
        seconds = [s.ravel() / gain(load, **drafts) for load, s in zip(LOADS, base, strict=True)]
        return [{"answers": [(31, s) for s in of_load]} for of_load in seconds]

    return tune(partial(hold, served, 8, 2), LOADS, [0, 1, 3], choices), names


def test_each_load_gets_the_k_that_pays_most_and_the_mix_is_held_against_the_base() -> None:
    speeds = {1: {0: 1, 1: 1.3, 3: 1.8}, 4: {0: 1, 1: 1.2, 3: 1.1}, 16: {0: 1, 1: 1, 3: 0.8}}

    def gain(load: int, k: int, schedule: Any = ()) -> float:
        if schedule:  # at k = 0 the head runs, too
            return speeds[load][next(k for a, b, k in schedule if a <= load <= b)] - 0.1
        return speeds[load][k]

    found, names = decide(gain, {"default": {}})
    table = found["table"]
    assert [line["k"] for line in table] == [3, 1, 0]
    assert found["schedule"] == [[1, 1, 3], [2, 4, 1], [5, 16, 0]]
    estimates = [line["tuned"]["estimate"] for line in table]
    assert estimates == pytest.approx([1.7, 1.1, 0.9], rel=0.03)
    assert table[2]["tuned"]["interval"][1] < 1 and table[0]["base_tok_s"] == pytest.approx(70, 0.1)
    assert names[:6] == [f"k-{k}-round{n}" for n, ks in ((1, "013"), (2, "310")) for k in ks]
    assert len(names) == 10


@pytest.mark.parametrize(
    ("fp8", "greedy", "taken", "servers"),
    [(1.0, 0.8, {}, 12), (1.1, 0.8, FP8, 16), (1.1, 1.2, FP8 | GREEDY, 16)],
)
def test_choices_must_pay(fp8: float, greedy: float, taken: dict[str, Any], servers: int) -> None:
    def gain(_load: int, k: int, **drafts: Any) -> float:
        factor = fp8 if drafts.get("draft_lm_head_quantization") else 1.0
        return (1 + k / 3) * factor * (greedy if drafts.get("draft_sample_method") else 1.0)

    found, names = decide(gain)
    assert {name: found[name] for name in USUAL} == USUAL | taken
    assert found["schedule"] == [[1, 16, 3]] and len(names) == servers
    low, high = found["choices"]["fp8"]["interval"]
    assert low < fp8 < high


def test_without_a_k_that_pays_nothing_drafts() -> None:
    found, names = decide(lambda _load, k: 1 - k / 10)
    assert (found["schedule"], found["choices"], len(names)) == ([[1, 16, 0]], {}, 6)


def test_prompts_without_an_answer_of_all_are_left_out() -> None:
    def served(_name: str, k: int) -> Any:
        return [{"answers": [(31, 1.0), (31, 1 / (k + 1)), (0, 0.0) if k else (5, 1.0)]}]

    [line] = tune(partial(hold, served, 3, 2), [1], [0, 1], {"default": {}})["table"]
    assert line["by_k"]["1"]["prompts"] == 2
    with pytest.raises(GraftError, match="no prompt was answered"):
        failed = partial(hold, lambda _name, k: [{"answers": [(k, 0.0)]}], 1, 2)
        tune(failed, [1], [0, 1], {"default": {}})


def test_a_schedule_joins_loads_that_chose_the_same() -> None:
    assert make_schedule([1, 2, 4, 8], [3, 3, 1, 1]) == [[1, 2, 3], [3, 8, 1]]
    assert make_schedule([2, 16], [1, 1]) == [[1, 16, 1]]


@pytest.fixture
def load(vllm: object, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for vLLM's client: with one request at a time a draft gains a half, else it costs."""

    def hold(base_url: str, load: dict[str, Any]) -> dict[str, Any]:
        counters = ServerClient(base_url).spec_decode_counters()
        words = dict(word.partition("=")[::2] for word in load["arguments"])
        assert words["--temperature"] == "1.0" and "--ignore-eos" not in words
        each, n = 0.5 if words["--max-concurrency"] == "1" else -0.1, int(words["--num-prompts"])
        seconds = 2 / (1 + each * (counters.k if counters else 0))
        times = {"latencies": [seconds] * n, "ttfts": [0.1] * n, "output_lens": [20] * n}
        totals = {"total_output_tokens": 1, "output_throughput": 1.0, "duration": 1.0}
        return {**times, **totals, "errors": [""] * n}

    client = Mock(side_effect=hold)
    monkeypatch.setattr(sweep, "run_load", client)
    return client


def test_tune_measures_once_and_serve_takes_what_it_found(
    run_command: Any, load: Any, grafted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, file = Path("prompts.jsonl"), grafted / TUNED_NAME
    prompts.write_text('{"id": "a", "text": "ab"}\n{"id": "b", "text": "hello"}\n')
    words = ("tune", grafted, "--k", "1,2", "--concurrency", "1,2", "--prompts", prompts)
    plan = json.loads(run_command(*words, "--dry-run", "--json", "-")[1])
    assert plan == {"k": [0, 1, 2], "choices": ["default"], "starts": 6, "at_most_then": 4}
    assert not file.exists()
    for _ in range(2):
        status, out, errors = run_command(*words, "--", "--seed", 7)
        assert status == 0 and "2.00 (2.00 to 2.00)" in out, errors
        assert load.call_count == 20, "nothing is measured twice"
    tuned = json.loads(file.read_text())
    assert tuned["schedule"] == [[1, 1, 2], [2, 2, 0]]
    assert tuned["serve"] == "mtp-graft serve grafted --profile none -- --seed 7"
    assert tuned.keys() >= {"date", "table", *USUAL}
    assert file.name not in base_files(grafted), "another checkpoint was not measured"

    def dry_run(*more: object) -> str:
        status, out, errors = run_command("serve", grafted, "--dry-run", *more)
        return " ".join((errors if status else out).replace("\n#  ", "").split())

    drafts = '"num_speculative_tokens":2,"num_speculative_tokens_per_batch_size":[[1,1,2],[2,2,0]]'
    said = f"k = 2 for 1 to 1 requests, 0 for 2 to 2 requests: tuned on {device_name()}, vLLM 0.32"
    text = dry_run()
    assert drafts in text and said in text and "warning" not in text
    assert "tuned on" not in dry_run("--k", 1)
    monkeypatch.setattr("mtp_graft.stages.parallel.device_name", lambda: "1x another")
    assert "warning: tuned on another device or vLLM than 1x another, vLLM 0.32" in dry_run()
    file.write_text(json.dumps(tuned | {"schedule": [[1, 4, -1]]}))
    assert f"{file}: not what mtp-graft tune writes (schedule" in dry_run()


MIXED, THREE = [[1, 4, 3], [5, 16, 1]], {"num_speculative_tokens": 3, **FP8}
BY_LOAD: Any = THREE | {"num_speculative_tokens_per_batch_size": MIXED}


@pytest.mark.parametrize(
    ("schedule", "sampling", "drafts"),
    [
        ([[1, 4, 3]], None, THREE),
        ([[1, 4, 0]], None, None),
        (MIXED, "probabilistic", BY_LOAD | {"draft_sample_method": "probabilistic"}),
    ],
)
def test_gpus_draft_as_tuned(grafted: Path, schedule: Any, sampling: Any, drafts: Any) -> None:
    where = {"device": "1x G", "vllm": "0.33.0 (cuda)", "serve": "as it was", "date": "2026-12-01"}
    tuned = {"schedule": schedule, **FP8, **GREEDY, **where}
    (grafted / TUNED_NAME).write_text(json.dumps(tuned))
    options = ServeOptions(grafted, draft_sample_method=sampling)
    served = with_tuned(options, "1x G", vllm_elsewhere())
    argv = build_command(served, vllm_elsewhere()).argv
    found = argv[argv.index("--speculative-config") + 1] if drafts else "null"
    assert json.loads(found) == (drafts and {"method": "mtp", **drafts})
    assert len(served.why) == 1, "nothing to warn of"
