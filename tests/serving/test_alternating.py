"""Two servers that take turns: order, ratio, resuming."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench.alternating import measure_alternating
from mtp_graft.bench.decode import DecodeConfig
from mtp_graft.bench.requests import UNITS_NAME, Session, open_session
from mtp_graft.serving import server
from mtp_graft.serving.client import ServerClient

from .bench_server import PROMPTS, quiet, serving


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "POLL_S", 0.02)


class Turns:
    """Serves the base and the grafted checkpoint, and notes the turns' names."""

    def __init__(self, base: Path, grafted: Path, log: Path) -> None:
        self.names: list[str] = []
        self.log = log
        self.serve = {"base": self.of(base), "mtp": self.of(grafted)}

    def of(self, checkpoint: Path) -> Callable[[str], AbstractContextManager[ServerClient]]:
        @contextmanager
        def serve(name: str) -> Iterator[ServerClient]:
            self.names.append(name)
            with serving(checkpoint, self.log) as client:
                yield client

        return serve

    def measure(self, pairs: int, config: DecodeConfig, session: Session) -> dict[str, Any]:
        return measure_alternating(self.serve, PROMPTS, pairs, config, quiet, session)


@pytest.fixture
def turns(base: Path, grafted: Path, tmp_path: Path) -> Turns:
    return Turns(base, grafted, tmp_path / "vllm.log")


def test_the_servers_take_turns_on_the_same_prompts(
    fake: Callable[..., None], turns: Turns
) -> None:
    fake(step_s=0.002)
    result = turns.measure(3, DecodeConfig(20, rounds=2), Session())
    assert turns.names == ["base-1", "mtp-1", "mtp-2", "base-2", "base-3", "mtp-3"]
    ratio = result["ratio"]["decode_tok_s"]
    assert (ratio["pairs"], ratio["prompts"], result["pairs"]) == (3, 2, 3)
    low, high = ratio["interval"]
    assert low < ratio["estimate"] < high
    assert result["acceptance"]["median"] == pytest.approx(7 / 13)
    assert result["against"]["acceptance"] is None
    assert result["decode_tok_s"]["runs"] == result["against"]["decode_tok_s"]["runs"] == 6
    assert result["greedy_identical"] is True
    assert result["errors"] == 0


def test_a_text_that_the_head_changed_is_named_with_the_bases_margin(
    fake: Callable[..., None], turns: Turns
) -> None:
    fake(diverge_at=4)
    result = turns.measure(2, DecodeConfig(20, rounds=1), Session())
    assert result["greedy_identical"] is False
    found = [(d["prompt"], d["position"], d["margin"]) for d in result["divergences"]]
    assert found == [(prompt.id, 4, pytest.approx(4.25)) for prompt in PROMPTS]


def test_sampled_texts_are_timed_and_not_compared(
    fake: Callable[..., None], turns: Turns, tmp_path: Path
) -> None:
    fake(requests=str(tmp_path / "requests"))
    session = Session()
    result = turns.measure(2, DecodeConfig(20, rounds=2, temperature=1.0), session)
    assert result["greedy_identical"] is result["divergences"] is result["repeatable"] is None
    assert result["ratio"]["decode_tok_s"]["pairs"] == 2 and result["acceptance_length"] > 1
    first, second = (session.units[f"mtp-1/{n}/a"]["token_ids"] for n in (0, 1))
    assert first != second, "the stand-in samples if it is told to"
    # Only the four that show that a server is up: no margins are asked for.
    assert len((tmp_path / "requests").read_text().split()) == 4


def test_a_failed_request_is_counted_and_asked_again_in_every_turn(
    fake: Callable[..., None], turns: Turns
) -> None:
    # Each server's first completion shows that it is up, and its first stream is the warm-up.
    fake(completion_fails={"2": "500"}, fails={"3": "closes"}, refuses_first={"/tokenize": 1})
    session = Session(attempts=2, wait_s=0.0)
    result = turns.measure(2, DecodeConfig(20, rounds=1), session)
    assert [(f["request"], f["kind"]) for f in result["failures"]] == [
        ("tokenize a", "refused"),
        ("reference/a", "refused"),
        *((f"{turn}/0/b", "broken") for turn in ("base-1", "mtp-1", "mtp-2", "base-2")),
    ]
    # Half an answer is no text, and what was drafted for it is in no number.
    assert result["greedy_identical"] is True
    assert result["acceptance"]["values"] == pytest.approx([7 / 13] * 2)


def test_the_ratio_is_that_of_the_speeds_whatever_drifts_meanwhile() -> None:
    """Prompts differ, and the machine slows down by 3 % from turn to turn."""
    scored = {"token_ids": [5] * 11, "margins": [0.5] * 11}
    session = Session(units={f"reference/{p.id}": scored for p in PROMPTS})
    session.units["prompts"] = {p.id: [1] for p in PROMPTS}
    gain = {"base": 1.0, "mtp": 1.25}
    order = ["base-1", "mtp-1", "mtp-2", "base-2", "base-3", "mtp-3", "mtp-4", "base-4"]
    for turn, name in enumerate(order):
        for prompt, tok_s in zip(PROMPTS, (10.0, 40.0), strict=True):
            seconds = 10 / (tok_s * gain[name[:-2]] * 0.97**turn)
            chunks = [[0.1, 1], [0.1 + seconds, 10]]
            answer = {"token_ids": [5] * 11, "chunks": chunks, "counters": None}
            session.units[f"{name}/0/{prompt.id}"] = answer

    def no_server(name: str) -> Any:
        raise AssertionError(f"{name}: a server was asked for")

    serve = {"base": no_server, "mtp": no_server}
    config = DecodeConfig(11, rounds=1)
    result = measure_alternating(serve, PROMPTS, 4, config, quiet, session)
    ratio = result["ratio"]["decode_tok_s"]
    assert ratio["estimate"] == pytest.approx(1.25)
    # A pair whose second turn is MTP's has all of the drift against it, the next one for it.
    assert ratio["per_pair"] == pytest.approx([1.25 * 0.97, 1.25 / 0.97] * 2)
    assert ratio["interval"][0] < 1.25 < ratio["interval"][1]
    assert result["ratio"]["ttft_ms"]["interval"] == pytest.approx([1.0, 1.0])
    assert result["decode_tok_s"]["runs"] == 4


def test_a_resumed_comparison_starts_only_the_servers_it_still_needs(
    fake: Callable[..., None], turns: Turns, tmp_path: Path
) -> None:
    config, streams = DecodeConfig(8, rounds=1), tmp_path / "streams"
    fake(streams=str(streams))
    whole = turns.measure(2, config, open_session(tmp_path / "run", {}))
    file = tmp_path / "run" / UNITS_NAME
    kept = json.loads(file.read_text())
    for lost in ("mtp-1/0/b", "base-2/0/a", "base-2/0/b"):
        del kept["units"][lost]
    file.write_text(json.dumps(kept))
    turns.names.clear()
    streams.unlink()
    resumed = turns.measure(2, config, open_session(tmp_path / "run", {}))
    assert turns.names == ["mtp-1", "base-2"]
    a, b = str(sum(b"ab")), str(sum(b"hello"))
    assert streams.read_text().split() == [a, b, a, a, b]  # each with a warm-up
    assert resumed["num_prompts"] == whole["num_prompts"] == 2
