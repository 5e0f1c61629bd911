"""The offline score: the server's steps against a simulation of them, and the stage around it."""

import json
from collections import ChainMap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.dsv4.replay import build_head, model_config, replay_drafts
from mtp_graft.dsv4.variants import decode_head, store_head
from mtp_graft.errors import GraftError
from mtp_graft.recipe import QuantizeSection, ScoreSection
from mtp_graft.stages.score import draft_steps, score
from serving.bench_server import quiet
from synthetic_capture import Played, random_sequences, write_capture

TOKENS = st.integers(0, 2)  # few, so that drafts are hit by chance
Run = Callable[..., dict[str, Any]]


def serve(continuation: list[int], drafts: list[list[int]]) -> list[tuple[int, int]]:
    """Play a server that knows what the base says next; return the drafts and hits of its steps."""
    out, steps = [continuation[0]], []  # with the prompt, before anything could be drafted
    while len(out) < len(continuation):
        guesses = drafts[len(out) - 1]  # made from the newest token
        made, hits = min(len(guesses), len(continuation) - len(out)), 0  # none past the end
        while hits < made and guesses[hits] == continuation[len(out) + hits]:
            hits += 1
        steps.append((made, hits))
        out += continuation[len(out) : len(out) + hits + 1]  # hits, and the base's own
    return steps


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.data())
def test_drafts_are_counted_as_a_server_makes_them(k: int, data: st.DataObject) -> None:
    continuation = data.draw(st.lists(TOKENS, min_size=1, max_size=30))
    guesses = st.lists(TOKENS, min_size=k, max_size=k)
    drafts = data.draw(st.lists(guesses, min_size=len(continuation), max_size=len(continuation)))
    assert [*draft_steps(drafts, continuation)] == serve(continuation, drafts)


@pytest.fixture(scope="module")
def run(tiny_model: Path, quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    texts = tmp_path_factory.mktemp("run") / "capture"
    sequences = random_sequences((20, 30))
    sequences += random_sequences((40, 25, 31), split="evaluation", seed=1)
    write_capture(texts, sequences)

    def run_score(
        out: Any, capture: Any = texts, quantized: Any = quantized, report: Any = quiet, **how: Any
    ) -> dict[str, Any]:
        given = capture, quantized, tiny_model / "upstream", tiny_model / "base", out
        return score(*given, QuantizeSection(**how), ScoreSection(device="cpu"), report)

    return run_score


def test_score_counts_drafts(run: Run, quantized: Path, tiny_model: Path, tmp_path: Path) -> None:
    """A capture whose tokens are partly what the gptq head drafts, so that there are hits."""
    config = model_config(json.loads((tiny_model / "base" / "config.json").read_text()))
    base = load_tensors(tiny_model / "base", ["embed.weight", "head.weight"])
    upstream, files = load_tensors(tiny_model / "upstream"), (quantized / "gptq").iterdir()
    experts = dict(ChainMap(*map(load_file, files)))
    head = build_head(config, decode_head(store_head(upstream, "gptq", experts)))

    def drafts(sequence: Played, k: int = 1) -> list[list[int]]:
        embeds = base["embed.weight"][sequence.token_ids]
        lm_head, residual = base["head.weight"].float(), sequence.residual.bfloat16()
        return replay_drafts(head, lm_head, residual[None], embeds[None], k=k)[0].tolist()

    sequences = random_sequences((40, 28), split="evaluation", seed=4)
    expected, threes = [], []
    for number, sequence in enumerate(sequences):
        ids, start = sequence.token_ids, sequence.prompt_tokens
        for i in range(start - 1, len(ids) - 2):
            if i % 3:  # the token two ahead becomes what the head drafts: it sees no later one
                [ids[i + 2]] = drafts(sequence)[i]
        found = serve(ids.tolist()[start:], drafts(sequence)[start - 1 :])
        verified, accepted = len(found), sum(hits for _, hits in found)
        assert 0 < accepted < verified
        expected.append({"id": f"prompt-{number}", "drafts": verified, "accepted": accepted})
        threes += serve(ids.tolist()[start:], drafts(sequence, 3)[start - 1 :])
    write_capture(tmp_path / "capture", sequences)

    result = run(tmp_path / "score", capture=tmp_path / "capture")["acceptance"]
    alone = run(tmp_path / "bf16", capture=tmp_path / "capture", variants=("bf16",))
    assert result["mxfp4"] == result["bf16"] == alone["acceptance"]["bf16"]
    gptq = result["gptq"]
    assert gptq["sequences"] == expected
    assert gptq["tokens"] == sum(s["drafts"] for s in expected)
    assert gptq["top1"] == sum(s["accepted"] for s in expected) / gptq["tokens"]
    assert gptq["interval"][0] < gptq["top1"] < gptq["interval"][1]
    assert gptq["length"] == 1 + sum(hits for _, hits in threes) / len(threes)
    assert gptq["by_position"][0] == sum(hits > 0 for _, hits in threes) / len(threes)
    assert set(gptq["by_k"]) == {"1", "2", "3"}


def test_experts_have_the_recipes_group_size(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    rounded = store_head(load_tensors(tiny_model / "upstream"), "rtn", group_size=64)
    (tmp_path / "gptq").mkdir()
    experts = {name: tensor for name, tensor in rounded.items() if ".ffn.experts." in name}
    save_file(experts, tmp_path / "gptq" / "experts-0000-0063.safetensors")
    found = run(tmp_path / "score", quantized=tmp_path, variants=("rtn", "gptq"), group_size=64)
    assert found["acceptance"]["rtn"] == found["acceptance"]["gptq"]


def test_killed_score_keeps_the_finished_variants(run: Run, tmp_path: Path) -> None:
    def kill(label: str, done: int, total: int) -> None:
        if (label, done) == ("score mxfp4", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "score", report=kill)
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "score").glob("*.json")}
    assert {p.name for p in finished} == {"config.json", "rtn.json", "gptq.json"}
    labels: set[str] = set()
    resumed = run(tmp_path / "score", report=lambda label, *_: labels.add(label))
    assert labels == {"score mxfp4"}, "bf16 has the same drafts"
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    assert resumed == run(tmp_path / "other")
    assert resumed == json.loads((tmp_path / "score" / "report.json").read_text())
    assert (tmp_path / "score" / "manifest.json").exists()


def test_texts_that_end_at_once_have_no_drafts(run: Run, tmp_path: Path) -> None:
    """Of 20 tokens 6 are the prompt: one text goes on, one is EOS alone, one has not even that."""
    sequences = random_sequences((20, 20, 20), split="evaluation")
    lengths = (sequences[0].prompt_tokens, 19, 20)
    texts = [replace(s, prompt_tokens=n) for s, n in zip(sequences, lengths, strict=True)]
    write_capture(tmp_path / "capture", texts)
    found = run(tmp_path / "score", variants=("bf16",), capture=tmp_path / "capture")
    drafts = [text["drafts"] for text in found["acceptance"]["bf16"]["sequences"]]
    assert [count > 0 for count in drafts] == [True, False, False]


def test_inputs_without_drafts_or_a_head_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="no quantized experts; run `mtp-graft quantize`"):
        run(tmp_path / "score", quantized=tmp_path)
    write_capture(tmp_path / "capture", random_sequences((20,)))
    with pytest.raises(GraftError, match="nothing to draft in split 'evaluation'"):
        run(tmp_path / "score", capture=tmp_path / "capture")
