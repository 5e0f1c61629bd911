"""Two servers that take turns: order, ratio, resuming."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench.alternating import AlternatingConfig, measure_alternating
from mtp_graft.bench.decode import DecodeConfig, Timed
from mtp_graft.bench.ledger import Ledger, open_ledger
from mtp_graft.bench.streams import BenchClient, Retrying
from mtp_graft.errors import GraftError
from mtp_graft.serving import server
from mtp_graft.serving.client import Completion, ServerClient
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.prompts import Prompt

PROMPTS = [Prompt("a", "ab"), Prompt("b", "hello"), Prompt("c", "0")]


def quiet(_label: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "POLL_S", 0.02)


class Sessions:
    """Serves a checkpoint for a session, and notes the sessions' names."""

    def __init__(self, log: Path, silence_s: float = 5.0) -> None:
        self.log, self.silence_s, self.names = log, silence_s, list[str]()

    def of(self, checkpoint: Path) -> Callable[[str], Any]:
        @contextmanager
        def serve(name: str) -> Iterator[ServerClient]:
            self.names.append(name)
            with (
                server.managed_server(ServeOptions(checkpoint, port=0), self.log) as running,
                BenchClient(running.base_url, silence_s=self.silence_s) as client,
            ):
                yield client

        return serve


def measure(
    sessions: Sessions,
    mtp: Path,
    base: Path,
    run: Path | None,
    config: AlternatingConfig,
    attempts: int = 1,
) -> dict[str, Any]:
    with open_ledger(run, {}) as ledger:
        return measure_alternating(
            sessions.of(mtp),
            sessions.of(base),
            *(PROMPTS, config, quiet, ledger, Retrying(attempts, wait_s=0.0)),
        )


def test_the_servers_take_turns_on_the_same_prompts(
    fake: Callable[..., None], base: Path, grafted: Path, tmp_path: Path
) -> None:
    fake(step_s=0.002)
    sessions = Sessions(tmp_path / "vllm.log")
    config = AlternatingConfig(pairs=3, decode=DecodeConfig(20, rounds=2))
    result = measure(sessions, grafted, base, None, config)
    assert sessions.names == ["base-1", "mtp-1", "mtp-2", "base-2", "base-3", "mtp-3"]
    ratio = result["ratio"]["decode_tok_s"]
    assert (ratio["pairs"], ratio["prompts"]) == (3, 3)
    assert (result["pairs"], result["base_first"]) == (3, 2)
    low, high = ratio["interval"]
    assert low < ratio["estimate"] < high
    assert result["acceptance"]["median"] == pytest.approx(7 / 13)
    assert result["against"]["acceptance"] is None
    assert result["decode_tok_s"]["runs"] == result["against"]["decode_tok_s"]["runs"] == 6
    assert result["greedy_identical"] is True
    assert result["errors"] == 0


def test_a_text_that_the_head_changed_is_named_with_the_bases_margin(
    fake: Callable[..., None], base: Path, grafted: Path, tmp_path: Path
) -> None:
    fake(diverge_at=4)
    config = AlternatingConfig(pairs=2, decode=DecodeConfig(20, rounds=1))
    result = measure(Sessions(tmp_path / "vllm.log"), grafted, base, None, config)
    assert result["greedy_identical"] is False
    found = [(d["prompt"], d["position"], d["margin"]) for d in result["divergences"]]
    assert found == [(prompt.id, 4, pytest.approx(4.25)) for prompt in PROMPTS]


def test_sampled_texts_are_timed_and_not_compared(
    fake: Callable[..., None], base: Path, grafted: Path, tmp_path: Path
) -> None:
    fake(requests=str(tmp_path / "requests"))
    config = AlternatingConfig(pairs=2, decode=DecodeConfig(20, rounds=2, temperature=1.0))
    result = measure(Sessions(tmp_path / "log"), grafted, base, tmp_path / "run", config)
    assert result["greedy_identical"] is result["divergences"] is result["repeatable"] is None
    assert result["config"]["temperature"] == 1.0
    assert result["ratio"]["decode_tok_s"]["pairs"] == 2 and result["acceptance_length"] > 1
    with open_ledger(tmp_path / "run", {}) as ledger:
        first, second = (ledger[f"mtp-1/{n}/a"]["token_ids"] for n in (0, 1))
    assert first != second, "the stand-in samples if it is told to"
    # Only the four that show that a server is up: margins of a text that is not compared are not
    # asked for.
    assert len((tmp_path / "requests").read_text().split()) == 4


@pytest.mark.parametrize(
    ("failure", "kind", "margins_kind"),
    [
        ("500", "refused", "refused"),
        ("hangs", "timeout", "timeout"),
        ("closes", "broken", "connection"),  # what is not streamed has a length to be cut short
    ],
)
def test_a_failed_request_is_counted_and_asked_again_in_every_turn(
    fake: Callable[..., None],
    base: Path,
    grafted: Path,
    tmp_path: Path,
    failure: str,
    kind: str,
    margins_kind: str,
) -> None:
    # Each server's first completion shows that it is up, and its first stream is the warm-up.
    fake(
        completion_fails={"2": failure},
        fails={"3": failure},
        refuses_first={"/tokenize": 1},
        step_s=0.001,
    )
    # A short silence is needed for the one kind only; on a busy machine it may come by itself.
    sessions = Sessions(tmp_path / "vllm.log", silence_s=0.5 if failure == "hangs" else 5.0)
    config = AlternatingConfig(pairs=2, decode=DecodeConfig(20, rounds=1))
    result = measure(sessions, grafted, base, None, config, attempts=2)
    assert [(f["request"], f["kind"]) for f in result["failures"]] == [
        ("tokenize a", "refused"),
        ("reference/a", margins_kind),
        *((f"{session}/0/b", kind) for session in ("base-1", "mtp-1", "mtp-2", "base-2")),
    ]
    assert result["errors"] == 6
    # Half an answer is no text, and what was drafted for it is in no number.
    assert result["greedy_identical"] is True
    assert result["acceptance"]["values"] == pytest.approx([7 / 13] * 2)
    assert result["tokens_per_round"] == result["against"]["tokens_per_round"] == 3 * 20


def test_the_ratio_is_that_of_the_speeds_whatever_drifts_meanwhile() -> None:
    """Prompts differ, and the machine slows down by 3 % from session to session."""
    ledger = Ledger()
    ledger.add("prompts", [{"id": p.id, "token_ids": [1]} for p in PROMPTS])
    for prompt in PROMPTS:
        scored = {"token_ids": [5] * 11, "margins": [0.5] * 11}
        ledger.add(f"reference/{prompt.id}", scored)
    ledger.add("reference", 3)
    gain = {"base": 1.0, "mtp": 1.25}
    order = ["base-1", "mtp-1", "mtp-2", "base-2", "base-3", "mtp-3", "mtp-4", "base-4"]
    for session, name in enumerate(order):
        for round_number in range(2):
            for prompt, tok_s in zip(PROMPTS, (10.0, 20.0, 40.0), strict=True):
                seconds = 10 / (tok_s * gain[name[:-2]] * 0.97**session)
                done = Completion((5,) * 11, "length", 0.0, ((0.1, 1), (0.1 + seconds, 10)))
                ledger.add(f"{name}/{round_number}/{prompt.id}", Timed(done, None).as_dict())
    config = AlternatingConfig(pairs=4, decode=DecodeConfig(11, rounds=2))
    result = measure_alternating(no_server, no_server, PROMPTS, config, quiet, ledger, Retrying())
    ratio = result["ratio"]["decode_tok_s"]
    assert ratio["estimate"] == pytest.approx(1.25)
    # A pair whose second session is MTP's has all of the drift against it, the next one for it.
    assert ratio["per_pair"] == pytest.approx([1.25 * 0.97, 1.25 / 0.97] * 2)
    assert ratio["interval"][0] < 1.25 < ratio["interval"][1]
    assert result["ratio"]["ttft_ms"]["interval"] == pytest.approx([1.0, 1.0])
    assert result["decode_tok_s"]["runs"] == 8


def no_server(name: str) -> Any:
    raise AssertionError(f"{name}: a server was asked for")


def test_a_killed_comparison_starts_only_the_servers_it_still_needs(
    fake: Callable[..., None], base: Path, grafted: Path, tmp_path: Path
) -> None:
    streams = tmp_path / "streams"
    # Each server's warm-up and three prompts, twice; MTP's first session fails at its last prompt.
    config = AlternatingConfig(pairs=2, decode=DecodeConfig(8, rounds=1))
    fake(streams=str(streams))
    whole = measure(Sessions(tmp_path / "log"), grafted, base, tmp_path / "whole", config)
    asked = streams.read_text().split()

    lines = (tmp_path / "whole" / "units.jsonl").read_text().splitlines(keepends=True)
    killed = next(i for i, line in enumerate(lines) if '"mtp-1/0/c"' in line)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "units.jsonl").write_text("".join(lines[:killed]) + lines[killed][:30])
    streams.unlink()
    sessions = Sessions(tmp_path / "log")
    resumed = measure(sessions, grafted, base, run, config)
    assert sessions.names == ["mtp-1", "mtp-2", "base-2"]
    again = streams.read_text().split()
    assert len(asked) == 4 * 4
    a, c = str(sum(b"ab")), str(sum(b"0"))
    assert again == [a, c, *asked[8:]]  # warm-up, the missing prompt, then as the first time
    assert resumed["num_prompts"] == whole["num_prompts"] == 3
    assert [json.loads(line)["unit"] for line in (run / "units.jsonl").open()] == [
        json.loads(line)["unit"] for line in lines
    ]


def test_one_pair_is_refused() -> None:
    with pytest.raises(GraftError, match="pairs is 1, expected at least 2"):
        AlternatingConfig(pairs=1)
