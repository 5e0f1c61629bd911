"""The offline score: the server's walk against a simulation of it, and the stage around it."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.acceptance import walk, wilson_interval
from mtp_graft.dsv4.replay import build_head, model_config, replay_drafts
from mtp_graft.dsv4.variants import decode_head, store_head
from mtp_graft.errors import GraftError
from mtp_graft.stages.quantize import QuantizeConfig, quantize
from mtp_graft.stages.score import ScoreConfig, score
from synthetic_capture import random_sequences, write_capture

CONFIG = ScoreConfig()
tokens = st.integers(0, 2)  # few, so that drafts are hit by chance


class Killed(Exception):
    pass


def silent(label: str, done: int, total: int) -> None:
    pass


def serve(continuation: list[int], drafts: list[int]) -> tuple[int, int]:
    """Play a server that knows what the base says next; return drafts verified and accepted."""
    out = [continuation[0]]  # with the prompt, before anything could be drafted
    verified = accepted = 0
    while len(out) < len(continuation):
        draft = drafts[len(out) - 1]  # made from the newest token
        truth = continuation[len(out)]
        verified += 1
        out.append(truth)
        if draft == truth:
            accepted += 1
            if len(out) < len(continuation):
                out.append(continuation[len(out)])  # the base's own, after the accepted draft
    return verified, accepted


@settings(max_examples=200, deadline=None)
@given(st.lists(tokens, min_size=1, max_size=30), st.data())
def test_walk_counts_what_a_server_would(continuation: list[int], data: st.DataObject) -> None:
    length = len(continuation)
    drafts = data.draw(st.lists(tokens, min_size=length, max_size=length))
    result = walk(drafts, continuation)
    assert (result.drafts, result.accepted) == serve(continuation, drafts)


def test_walk_of_a_perfect_and_a_useless_drafter() -> None:
    continuation = list(range(10, 21))
    assert walk([*continuation[1:], 0], continuation).accepted == 5
    assert walk([*continuation[1:], 0], continuation).drafts == 5
    useless = walk([0] * 11, continuation)
    assert (useless.drafts, useless.accepted) == (10, 0)


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (7, 7), (3, 10), (812, 1000)])
def test_wilson_interval_ends_where_the_rate_is_1_96_deviations_away(
    successes: int, trials: int
) -> None:
    rate = successes / trials
    low, high = wilson_interval(successes, trials)
    assert low <= rate <= high
    for end in (low, high):
        if 0 < end < 1:
            deviation = math.sqrt(end * (1 - end) / trials)
            assert abs(rate - end) == pytest.approx(1.959964 * deviation, rel=1e-6)


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("run")
    sequences = random_sequences((20, 30), hidden=256, vocab=4096)
    sequences += random_sequences((40, 25, 31), hidden=256, vocab=4096, split="evaluation", seed=1)
    write_capture(root / "capture", sequences)
    given = {"upstream": tiny_model / "upstream", "base": tiny_model / "base"}
    given |= {"capture": root / "capture"}
    quantize(out=root / "quantize", config=QuantizeConfig(), report=silent, **given)
    return {**given, "quantized": root / "quantize"}


@pytest.fixture(scope="module")
def run(folders: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    def run_score(out: Path, config: ScoreConfig = CONFIG, **given: Any) -> dict[str, Any]:
        return score(out=out, config=config, **{"report": silent, **folders, **given})

    return run_score


def test_score_is_the_walk_over_the_heads_drafts(
    run: Callable[..., dict[str, Any]], folders: dict[str, Path], tmp_path: Path
) -> None:
    """A capture whose tokens are partly what the gptq head drafts, so that there are hits."""
    config = model_config(json.loads((folders["base"] / "config.json").read_text()))
    base = load_tensors(folders["base"], ["embed.weight", "head.weight"])
    experts: dict[str, torch.Tensor] = {}
    for path in (folders["quantized"] / "gptq").glob("*.safetensors"):
        experts |= load_file(path)
    upstream = load_tensors(folders["upstream"])
    head = build_head(config, decode_head(store_head(upstream, "gptq", experts)))

    sequences = random_sequences((40, 28), hidden=256, vocab=4096, split="evaluation", seed=4)
    expected = []
    for number, sequence in enumerate(sequences):
        residual, ids = sequence.residual.bfloat16(), sequence.token_ids
        start = sequence.prompt_tokens
        for i in range(start - 1, len(ids) - 2):
            if i % 3:  # the token two ahead becomes what the head drafts: it sees no later one
                drafts = replay_drafts(
                    head, base["head.weight"].float(), residual, base["embed.weight"][ids]
                )
                ids[i + 2] = drafts[i]
        drafts = replay_drafts(
            head, base["head.weight"].float(), residual, base["embed.weight"][ids]
        ).tolist()
        verified, accepted = serve(ids.tolist()[start:], [*drafts[start - 1 :], -1])
        assert 0 < accepted < verified
        expected.append({"id": f"prompt-{number}", "drafts": verified, "accepted": accepted})
    write_capture(tmp_path / "capture", sequences)

    result = run(tmp_path / "score", capture=tmp_path / "capture")["acceptance"]
    assert result["gptq"]["sequences"] == expected
    assert result["gptq"]["tokens"] == sum(s["drafts"] for s in expected)
    assert result["gptq"]["accepted"] == sum(s["accepted"] for s in expected)
    assert result["gptq"]["top1"] == result["gptq"]["accepted"] / result["gptq"]["tokens"]
    assert result["mxfp4"] == result["bf16"], "both decode to upstream's values"
    low, high = result["gptq"]["interval"]
    assert low < result["gptq"]["top1"] < high


@pytest.mark.parametrize("name", ["report.json", "gptq.json"])
def test_a_torn_result_is_named(
    run: Callable[..., dict[str, Any]], tmp_path: Path, name: str
) -> None:
    run(tmp_path / "score")
    (tmp_path / "score" / name).write_text('{"acceptance": {"gp')
    if name == "gptq.json":
        (tmp_path / "score" / "manifest.json").unlink()  # or it would not be read
    with pytest.raises(
        GraftError, match=rf"{name}: not a result .not JSON.* remove it and run again"
    ):
        run(tmp_path / "score")


def test_a_finished_score_without_its_result_is_an_error(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run(tmp_path / "score")
    (tmp_path / "score" / "report.json").unlink()
    with pytest.raises(GraftError, match=r"has manifest\.json and no report\.json"):
        run(tmp_path / "score")


def test_killed_score_keeps_the_finished_variants(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def kill(label: str, done: int, total: int) -> None:
        if (label, done) == ("score mxfp4", 1):
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "score", report=kill)
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "score").glob("*.json")}
    assert {p.name for p in finished} == {"config.json", "rtn.json", "gptq.json"}
    labels: set[str] = set()
    resumed = run(tmp_path / "score", report=lambda label, *_: labels.add(label))
    assert labels == {"score mxfp4", "score bf16"}
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    assert resumed == run(tmp_path / "other")
    assert resumed == json.loads((tmp_path / "score" / "report.json").read_text())
    assert (tmp_path / "score" / "manifest.json").exists()


def test_other_settings_are_refused(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    config = replace(CONFIG, variants=("bf16",))
    run(tmp_path / "score", config)
    with pytest.raises(GraftError, match="begun with variants"):
        run(tmp_path / "score", CONFIG)


def test_gptq_needs_the_quantized_experts(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(GraftError, match="no quantized experts; run `mtp-graft quantize`"):
        run(tmp_path / "score", quantized=tmp_path / "none")
    run(tmp_path / "score", replace(CONFIG, variants=("rtn",)), quantized=tmp_path / "none")


def test_texts_that_end_at_once_have_no_drafts(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Of 20 tokens 6 are the prompt: one text goes on, one is EOS alone, one has not even that."""
    sequences = random_sequences((20, 20, 20), hidden=256, vocab=4096, split="evaluation")
    texts = [sequences[0], replace(sequences[1], prompt_tokens=19)]
    texts.append(replace(sequences[2], prompt_tokens=20))
    write_capture(tmp_path / "capture", texts)
    config = replace(CONFIG, variants=("bf16",))
    found = run(tmp_path / "score", config, capture=tmp_path / "capture")["acceptance"]["bf16"]
    assert [text["id"] for text in found["sequences"]] == [f"prompt-{n}" for n in range(3)]
    assert [text["drafts"] > 0 for text in found["sequences"]] == [True, False, False]


def test_capture_without_anything_to_draft_is_refused(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    write_capture(tmp_path / "capture", random_sequences((20,), hidden=256, vocab=4096))
    with pytest.raises(GraftError, match="nothing to draft in split 'evaluation'"):
        run(tmp_path / "score", capture=tmp_path / "capture")
