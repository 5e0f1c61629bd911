import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench.decode import (
    DecodeConfig,
    Divergence,
    Round,
    Timed,
    TokenPrompt,
    decode_result,
    find_divergences,
    measure_base,
    measure_decode,
    measure_kept,
    measure_mtp,
    median_round,
)
from mtp_graft.bench.decode import (
    compare as compare_results,
)
from mtp_graft.bench.drafting import drafting_result
from mtp_graft.bench.ledger import Ledger, open_ledger
from mtp_graft.bench.streams import BenchClient, Retrying
from mtp_graft.errors import GraftError
from mtp_graft.serving import client as serving_client
from mtp_graft.serving import server
from mtp_graft.serving.client import Completion, ScoredCompletion
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.metrics import SpecDecodeCounters, parse_spec_decode
from mtp_graft.serving.prompts import Prompt, load_prompts

PROMPTS = [Prompt("a", "ab"), Prompt("b", "hello")]
CONFIG = DecodeConfig(max_tokens=20, rounds=2)


def quiet(_label: str, _done: int, _total: int) -> None:
    pass


def compare(tmp_path: Path, base: Path, grafted: Path) -> dict[str, Any]:
    with server.managed_server(ServeOptions(base, port=0), tmp_path / "base.log") as client:
        without = json.loads(json.dumps(measure_base(client, PROMPTS, CONFIG, quiet)))
    with server.managed_server(ServeOptions(grafted, port=0), tmp_path / "mtp.log") as client:
        return compare_results(without, measure_mtp(client, without, CONFIG, quiet))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "POLL_S", 0.05)


class Ticking:
    """The clock of the client: a step has passed whenever it is looked at, once a chunk."""

    STEP_S = 0.02

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        self.now_s += self.STEP_S
        return self.now_s


def test_a_faster_identical_server_is_seen_as_that(
    fake: Callable[..., None],
    base: Path,
    grafted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake()
    monkeypatch.setattr(serving_client, "time", Ticking())
    result = compare(tmp_path, base, grafted)
    assert result["greedy_identical"] is True
    assert result["divergences"] == []
    # 20 tokens: one from prefill, then 2, 1, 2, 1, ...: 13 steps, 7 of which accept.
    assert result["acceptance"] == pytest.approx(7 / 13)
    assert result["base"]["acceptance"] is None
    assert (result["base"]["k"], result["base"]["acceptance_length"]) == (None, None)
    assert (result["mtp"]["k"], result["mtp"]["steps"]) == (1, 52)
    assert result["mtp"]["acceptance_by_position"] == [pytest.approx(7 / 13)]
    assert result["mtp"]["acceptance_length"] == pytest.approx(20 / 13)
    speeds = result["decode_tok_s"]
    assert speeds["base"] == pytest.approx(1 / Ticking.STEP_S)
    assert speeds["mtp"] == pytest.approx(19 / 13 / Ticking.STEP_S)
    assert result["base"]["decode_tok_s"]["runs"] == 2
    assert result["base"]["repeatable"] and result["mtp"]["repeatable"]


def test_each_draft_position_is_counted_given_that_those_before_were_accepted(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    fake(accepts=[3, 1, 0])
    options = ServeOptions(grafted, port=0, num_speculative_tokens=3)
    with server.managed_server(options, tmp_path / "vllm.log") as client:
        result = decode_result(measure_decode(client, TOKEN_PROMPTS, CONFIG, quiet), CONFIG)
    # 20 tokens: one from prefill, then 4, 2, 1, 4, 2, 1, 4, and 1 of a last 2.
    assert result["k"] == 3
    assert result["accepted_by_position"] == [4 * n for n in (6, 3, 3)]
    assert result["acceptance_by_position"] == [6 / 8, 3 / 6, 3 / 3]
    assert result["acceptance_length"] == 1 + 12 / 8
    assert result["acceptance"]["median"] == 12 / 24
    # Both prompts have the same steps: another choice of prompts would change nothing.
    assert result["acceptance_by_position_interval"] == [[n, n] for n in (0.75, 0.5, 1.0)]
    assert result["acceptance_length_interval"] == [2.5, 2.5]


def test_a_position_that_no_step_reached_has_no_acceptance() -> None:
    counters = SpecDecodeCounters(10, 30, 0, (0, 0, 0))
    found = drafting_result(counters)
    assert found["acceptance_by_position"] == [0.0, None, None]
    assert found["acceptance_by_position_interval"][1:] == [None, None]
    assert found["acceptance_length"] == 1.0
    nothing = drafting_result(counters - counters)
    assert nothing["k"] == 3 and nothing["acceptance_by_position"] is None
    assert set(drafting_result(None).values()) == {None}


def test_divergences_name_prompt_position_and_the_bases_margin(
    fake: Callable[..., None], base: Path, grafted: Path, tmp_path: Path
) -> None:
    fake(diverge_at=4)
    result = compare(tmp_path, base, grafted)
    assert result["greedy_identical"] is False
    # The stand-in's margin at position i is 0.25 + i.
    assert result["divergences"] == [
        {"prompt": "a", "position": 4, "margin": pytest.approx(4.25)},
        {"prompt": "b", "position": 4, "margin": pytest.approx(4.25)},
    ]


def timed(*completions: Completion, counters: SpecDecodeCounters | None = None) -> Round:
    return Round(tuple(Timed(done, counters) for done in completions))


def completion(tokens: int, first: int, ttft_s: float, decode_s: float) -> Completion:
    chunks = ((10.0 + ttft_s, first), (10.0 + ttft_s + decode_s, tokens - first))
    return Completion(tuple(range(tokens)), "length", 10.0, chunks)


def test_speed_counts_tokens_after_the_first_chunk_over_all_prompts() -> None:
    one = timed(completion(11, 1, 0.1, 1.0), completion(32, 2, 0.3, 4.0))
    assert one.decode_tok_s == pytest.approx((10 + 30) / 5.0)
    assert one.ttft_ms == pytest.approx(200.0)
    assert one.tpot_ms == pytest.approx((100.0 + 4000.0 / 30) / 2)


def test_results_give_median_extremes_and_number_of_rounds() -> None:
    rounds = [
        timed(
            completion(11, 1, 0.1, 10 / speed),
            counters=SpecDecodeCounters(10, 10, accepted, (accepted,)),
        )
        for speed, accepted in [(20.0, 5), (10.0, 7), (40.0, 9)]
    ]
    result = decode_result(rounds, CONFIG)
    speed = result["decode_tok_s"]
    assert [speed[key] for key in ("median", "min", "max", "runs")] == [
        *(pytest.approx(20.0), pytest.approx(10.0), pytest.approx(40.0), 3)
    ]
    assert result["acceptance"]["median"] == pytest.approx(0.7)


def test_the_round_that_is_kept_has_the_median_speed() -> None:
    def kept(*speeds: float) -> int:
        rounds = [timed(completion(11, 1, 0.1, 10 / speed)) for speed in speeds]
        found = median_round(rounds)
        assert found["rounds"] == len(speeds)
        assert found["timed"] == [rounds[found["round"] - 1].timed[0].as_dict()]
        number: int = found["round"]
        return number

    assert kept(20.0, 10.0, 40.0) == 1
    assert kept(20.0, 40.0) == 1 and kept(40.0, 20.0, 30.0, 10.0) == 2


def test_chunks_are_kept_with_their_texts(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    fake()
    with server.managed_server(ServeOptions(grafted, port=0), tmp_path / "vllm.log") as client:
        done = client.stream([1, 2], 5)
    assert [size for _, size in done.chunks] == [1, 2, 1, 1]
    assert done.texts == (" 3", " 10 17", " 24", " 31")
    one = Timed(done, None)
    assert Timed.from_dict(json.loads(json.dumps(one.as_dict()))).completion.texts == done.texts


def test_the_interval_spans_what_other_prompts_would_have_given() -> None:
    rounds = [timed(*(completion(11, 1, 0.1, 10 / speed) for speed in (10.0, 20.0, 40.0)))]
    low, high = decode_result(rounds, CONFIG)["decode_tok_s"]["interval"]
    assert low == pytest.approx(10.0) and high == pytest.approx(40.0)
    same = [timed(*(completion(11, 1, 0.1, 0.5) for _ in range(3)))]
    assert decode_result(same, CONFIG)["decode_tok_s"]["interval"] == pytest.approx([20.0, 20.0])


def test_a_prompt_that_is_answered_in_one_chunk_has_no_time_per_token() -> None:
    result = decode_result([timed(completion(11, 1, 0.1, 1.0), completion(1, 1, 0.1, 0.0))], CONFIG)
    assert result["tpot_ms"]["median"] == pytest.approx(100.0)
    assert result["tpot_ms"]["interval"] == pytest.approx([100.0, 100.0])
    assert result["decode_tok_s"]["interval"] == pytest.approx([10.0, 10.0])


def test_rounds_that_differ_are_not_called_repeatable() -> None:
    rounds = [timed(completion(n, 1, 0.1, 1.0)) for n in (5, 6)]
    assert decode_result(rounds, CONFIG)["repeatable"] is False


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((1, 2, 3), []),
        ((1, 9, 3), [Divergence("p", 1, 0.2)]),
        ((1, 2), [Divergence("p", 2, 0.3)]),
        ((1, 2, 3, 4), [Divergence("p", 3, None)]),
    ],
)
def test_the_first_difference_is_found(tokens: tuple[int, ...], expected: list[Divergence]) -> None:
    reference = ScoredCompletion((1, 2, 3), (0.1, 0.2, 0.3))
    assert find_divergences([TokenPrompt("p", (0,))], [reference], [tokens]) == expected


def test_counters_are_summed_over_engines_and_split_by_position() -> None:
    page = "\n".join(
        f'vllm:spec_decode_num_{name}_total{{engine="{engine}",model_name="m"{label}}} {value}'
        for engine in (0, 1)
        for name, label, value in [
            ("drafts", "", 10.0),
            ("draft_tokens", "", 2e1),
            ("accepted_tokens", "", 12.0),
            ("accepted_tokens_per_pos", ',position="1"', 4.0),
            ("accepted_tokens_per_pos", ',position="0"', 8.0),
        ]
    )
    counters = parse_spec_decode("# HELP vllm:spec_decode_num_drafts_total x\n" + page)
    assert counters == SpecDecodeCounters(20, 40, 24, (16, 8))
    assert counters is not None and counters.acceptance == pytest.approx(0.6)


def test_a_server_that_does_not_draft_has_no_counters() -> None:
    assert parse_spec_decode("vllm:num_requests_running 0.0\n") is None


def test_prompts_are_loaded_in_order_up_to_the_limit(prompts_file: Path) -> None:
    assert load_prompts(prompts_file) == [Prompt("a", "ab"), Prompt("b", "hello")]
    assert load_prompts(prompts_file, 1) == [Prompt("a", "ab")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 1, "text": "x"}\n{"id": 2}', ":2: not a prompt"),
        ("[]", ":1: not a prompt"),
        (json.dumps({"id": 1, "text": ""}), ":1: prompt '1' is empty"),
        ('{"id": 1, "text": "x"}\n{"id": 1, "text": "y"}', ":2: id '1' comes twice"),
        ("\n", "no prompts"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_line(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(GraftError, match=message):
        load_prompts(file)


TOKEN_PROMPTS = [TokenPrompt("a", (1, 2)), TokenPrompt("b", (3,))]


@pytest.mark.parametrize(
    ("failure", "kind"),
    [("500", "refused"), ("hangs", "timeout"), ("closes", "broken"), ("aborts", "broken")],
)
def test_a_failed_request_is_counted_and_asked_again(
    fake: Callable[..., None], grafted: Path, tmp_path: Path, failure: str, kind: str
) -> None:
    fake(fails={"3": failure}, step_s=0.001)  # the warm-up is stream 1, "a" 2, "b" 3
    retrying = Retrying(wait_s=0.0)
    with (
        server.managed_server(ServeOptions(grafted, port=0), tmp_path / "vllm.log") as running,
        BenchClient(running.base_url, silence_s=0.5) as client,
    ):
        rounds = measure_decode(client, TOKEN_PROMPTS, CONFIG, quiet, retrying=retrying)
    assert [(f.request, f.attempt, f.kind) for f in retrying.failures] == [("decode/0/b", 1, kind)]
    assert retrying.as_dict()["errors"] == 1
    # What the broken attempt drafted is in no round.
    assert rounds[0].counters == rounds[1].counters
    assert decode_result(rounds, CONFIG)["repeatable"] is True


def test_a_request_that_always_fails_ends_the_measurement(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    fake(fails={"2": "500", "3": "closes"})
    with (
        server.managed_server(ServeOptions(grafted, port=0), tmp_path / "vllm.log") as client,
        pytest.raises(GraftError, match=r"decode/0/a: failed 2 times in a row, .* ended after 1"),
    ):
        measure_decode(
            client, TOKEN_PROMPTS, CONFIG, quiet, retrying=Retrying(attempts=2, wait_s=0.0)
        )


def test_what_was_measured_before_a_kill_is_not_asked_again(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    streams, folder = tmp_path / "streams", tmp_path / "run"
    fake(streams=str(streams), fails={"4": "500"})
    with server.managed_server(ServeOptions(grafted, port=0), tmp_path / "vllm.log") as client:

        def measure() -> list[Round]:
            with open_ledger(folder, {"a": 1}) as ledger:
                give_up = Retrying(attempts=1)
                return measure_kept(lambda: client, PROMPTS, CONFIG, quiet, ledger, give_up)

        with pytest.raises(GraftError, match="decode/1/a"):
            measure()
        rounds = measure()
        assert measure() == rounds  # nothing is left to ask
    a, b = sum(b"ab"), sum(b"hello")
    # Warm-up, a, b, a (which failed); then warm-up and what was missing: a, b.
    assert list(map(int, streams.read_text().split())) == [a, a, b, a, a, a, b]
    assert [len(r.timed) for r in rounds] == [2, 2]


def no_server() -> BenchClient:
    raise AssertionError("a server was asked for")


def finished(*timed: Timed) -> Ledger:
    """Return the ledger of one prompt, with a continuation a round."""
    ledger = Ledger()
    ledger.add("prompts", [{"id": "a", "token_ids": [1]}])
    for n, one in enumerate(timed):
        ledger.add(f"decode/{n}/a", json.loads(json.dumps(one.as_dict())))
    return ledger


def test_a_finished_measurement_needs_no_server() -> None:
    one = Timed(completion(5, 1, 0.1, 1.0), SpecDecodeCounters(4, 4, 2, (2,)))
    rounds = measure_kept(no_server, PROMPTS, CONFIG, quiet, finished(one, one), Retrying())
    assert [r.counters for r in rounds] == [(one.counters,)] * 2
    assert rounds[0].completions[0].decode_s == pytest.approx(one.completion.decode_s)


def test_a_round_without_a_second_chunk_is_refused_also_when_it_was_measured_before() -> None:
    two_chunks, one_chunk = (Timed(completion(5, n, 0.1, 1.0), None) for n in (1, 5))
    for ledger, unit in (
        (finished(one_chunk, one_chunk), "decode/0/a"),
        (finished(two_chunks, one_chunk), "decode/1/a"),
    ):
        with pytest.raises(GraftError, match=f"{unit} .* single chunk"):
            measure_kept(no_server, PROMPTS, CONFIG, quiet, ledger, Retrying())


def test_a_refused_tokenization_is_counted_and_asked_again(
    fake: Callable[..., None], grafted: Path, tmp_path: Path
) -> None:
    fake(refuses_first={"/tokenize": 1})
    retrying = Retrying(wait_s=0.0)
    with server.managed_server(ServeOptions(grafted, port=0), tmp_path / "vllm.log") as client:
        rounds = measure_kept(lambda: client, PROMPTS, CONFIG, quiet, Ledger(), retrying)
    assert [(f.request, f.kind) for f in retrying.failures] == [("tokenize a", "refused")]
    assert [len(r.timed) for r in rounds] == [2, 2]
