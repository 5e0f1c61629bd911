"""Acceptance, from the counters of a stand-in server whose steps are known."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from mtp_graft.bench.acceptance import KnownText, measure_acceptance
from mtp_graft.errors import GraftError
from mtp_graft.serving import server
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import ServeOptions


class Streamed(ServerClient):
    """Completes by streaming: the stand-in counts drafts of streamed answers only."""

    def complete(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        ignore_eos: bool = False,
        timeout_s: float | None = None,
    ) -> tuple[int, ...]:
        return self.stream(prompt, max_tokens, ignore_eos=ignore_eos).token_ids


def known(name: str, prompt: tuple[int, ...], new_tokens: int) -> KnownText:
    """Return a prompt with the stand-in's own answer to it."""
    return KnownText(name, prompt, tuple((sum(prompt) + 7 * i) % 1000 for i in range(new_tokens)))


TEXTS = [known("a", (1, 2), 20), known("b", (3,), 5)]


def quiet(_label: str, _done: int, _total: int) -> None:
    pass


Serve = Callable[[Path], Streamed]


@pytest.fixture
def serve(vllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Return a function that serves a checkpoint until the test ends."""
    monkeypatch.setattr(server, "POLL_S", 0.05)
    with ExitStack() as stack:

        def start(checkpoint: Path) -> Streamed:
            options = ServeOptions(checkpoint, port=0)
            running = server.managed_server(options, tmp_path / "vllm.log")
            return stack.enter_context(Streamed(stack.enter_context(running).base_url))

        yield start


def drafts_and_hits(new_tokens: int) -> tuple[int, int]:
    """Walk an answer step by step; its first, third, ... draft is accepted."""
    made, drafts, hits = 1, 0, 0
    while made < new_tokens:
        drafts += 1
        hit = drafts % 2
        hits += hit
        made += 1 + hit
    return drafts, hits


def test_the_servers_counters_give_the_rate(serve: Serve, grafted: Path) -> None:
    result = measure_acceptance(serve(grafted), TEXTS, 1, quiet)
    drafted, accepted = map(sum, zip(*(drafts_and_hits(n) for n in (20, 5)), strict=True))
    assert (drafted, accepted) == (16, 9)
    assert (result["drafted"], result["accepted"]) == (16, 9)
    assert result["acceptance"] == pytest.approx(9 / 16)
    assert result["acceptance_by_position"] == [pytest.approx(9 / 16)]
    assert (result["k"], result["acceptance_length"]) == (1, pytest.approx(25 / 16))
    assert result["texts"] == result["identical"] == 2


def test_only_what_was_drafted_meanwhile_counts(serve: Serve, grafted: Path) -> None:
    client = serve(grafted)
    first = measure_acceptance(client, TEXTS, 1, quiet)
    client.stream((5, 6), 30)  # somebody else's request in between
    assert measure_acceptance(client, TEXTS, 1, quiet) == first


def test_the_interval_is_where_the_rate_is_1_96_deviations_away(
    serve: Serve, grafted: Path
) -> None:
    result = measure_acceptance(serve(grafted), TEXTS, 1, quiet)
    rate, (low, high) = result["acceptance"], result["interval"]
    assert 0 < low < rate < high < 1
    for end in (low, high):
        deviation = (end * (1 - end) / result["drafted"]) ** 0.5
        assert abs(rate - end) == pytest.approx(1.959964 * deviation, rel=1e-5)


def test_texts_that_come_out_otherwise_are_not_counted_as_identical(
    serve: Serve, fake: Callable[..., None], grafted: Path
) -> None:
    fake(diverge_at=7)  # past the end of the shorter text
    assert measure_acceptance(serve(grafted), TEXTS, 1, quiet)["identical"] == 1


def test_several_requests_at_a_time_are_all_counted_and_reported(
    serve: Serve, grafted: Path
) -> None:
    texts = [known(str(n), (n,), 12) for n in range(9)]
    steps: list[tuple[str, int, int]] = []
    result = measure_acceptance(
        serve(grafted), texts, 4, lambda *step: steps.append(step), "acceptance: rtn"
    )
    assert steps == [("acceptance: rtn", done, 9) for done in range(10)]
    assert result["texts"] == result["identical"] == 9
    assert 0 < result["accepted"] < result["drafted"]


def test_a_server_without_a_head_is_an_error(serve: Serve, base: Path) -> None:
    client = serve(base)
    with pytest.raises(GraftError, match=r"127\.0\.0\.1:\d+: the server drafts nothing; serve a"):
        measure_acceptance(client, TEXTS, 1, quiet)


def test_texts_too_short_to_draft_are_an_error_and_no_division_by_zero(
    serve: Serve, grafted: Path
) -> None:
    with pytest.raises(GraftError, match="the server drafts nothing"):
        measure_acceptance(serve(grafted), [known("a", (1,), 1)], 1, quiet)


def test_a_server_that_is_gone_is_an_error(vllm: Path) -> None:
    with (
        ServerClient("http://127.0.0.1:9") as client,
        pytest.raises(GraftError, match="no answer"),
    ):
        measure_acceptance(client, TEXTS, 1, quiet)
