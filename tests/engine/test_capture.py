"""The capture on the real engine: the tiny base, served and recorded."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.conftest import wait_until_idle
from engine.reference_model import load_reference
from mtp_graft.checkpoint.capture import (
    CapturedSequence,
    Recorded,
    read_recorded,
    read_sequences,
    read_texts,
)
from mtp_graft.recipe import CaptureSection
from mtp_graft.serving.client import Prompt, ServerClient
from mtp_graft.serving.server import managed_server
from mtp_graft.stages.capture import capture, recording_options

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NEW_TOKENS = 56
STREAMS = 4
NUM_PROMPTS = 6
QUESTION = "How many legs have 7 cows?"
EOS = 1


def wanted(tiny_model: Path, folder: Path, concurrency: int) -> CaptureSection:
    """Ask for five bundled prompts, and a conversation that the server has to encode."""
    chat = {"prompt_id": "chat", "messages": [{"role": "user", "content": QUESTION}]}
    conversation = folder / "chat.jsonl"
    conversation.write_text(json.dumps(chat))
    return CaptureSection(
        calibration_prompts=str(tiny_model / "calibration.jsonl"),
        evaluation_prompts=str(conversation),
        calibration_count=NUM_PROMPTS - 1,
        evaluation_count=1,
        max_prompt_tokens=256,
        new_tokens=NEW_TOKENS,
        concurrency=concurrency,
        max_model_len=1024,
    )


class Bench:
    """A server that records, and captures made with it."""

    def __init__(self, client: ServerClient, link: Path, base: Path) -> None:
        self.client, self.link, self.base = client, link, base

    def into(self, folder: Path) -> Path:
        """Have the server record into `folder` from now on."""
        folder.mkdir(parents=True, exist_ok=True)
        self.link.unlink(missing_ok=True)
        self.link.symlink_to(folder)
        return folder

    def capture(self, folder: Path, concurrency: int) -> dict[str, Any]:
        out, settings = self.into(folder), wanted(self.base.parent, self.link.parent, concurrency)
        return capture(nullcontext(self.client), self.base, out, settings, lambda *_: None)


@pytest.fixture(scope="module")
def bench(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One server for the module: it records into a link that the tests point to their folders."""
    folder = tmp_path_factory.mktemp("capture")
    base = tiny_model / "base"
    options = recording_options(base, folder / "link", wanted(tiny_model, folder, 3))
    with managed_server(options, folder / "vllm.log") as client:
        yield Bench(client, folder / "link", base)


@pytest.fixture(scope="module")
def alone(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture with one prompt in work at a time: nothing else is computed with it."""
    folder = tmp_path_factory.mktemp("alone")
    bench.capture(folder, 1)
    assert len({s.recording for s in read_sequences(folder)}) == NUM_PROMPTS
    return folder


@pytest.fixture(scope="module")
def together(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A capture with three prompts in work at a time, and its result."""
    folder = tmp_path_factory.mktemp("together")
    return folder, bench.capture(folder, 3)


def captured(folder: Path) -> list[tuple[CapturedSequence, Recorded]]:
    return [(s, read_recorded(folder, s, STREAMS)) for s in read_sequences(folder)]


def rows(folder: Path) -> list[Recorded]:
    return [recorded for _, recorded in captured(folder)]


def assert_equal(ours: list[Recorded], theirs: list[Recorded]) -> None:
    assert len(ours) == len(theirs) == NUM_PROMPTS
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.token_ids, b.token_ids)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.residual, b.residual)


def test_rows_do_not_depend_on_what_else_was_computed(
    together: tuple[Path, Any], alone: Path
) -> None:
    recordings = {s.recording for s in read_sequences(together[0])}
    assert len(recordings) < NUM_PROMPTS, "no two prompts came together; nothing was compared"
    assert_equal(rows(together[0]), rows(alone))


def test_targets_are_the_tokens_that_were_generated_but_for_rounding(
    alone: Path, measured: dict[str, Any]
) -> None:
    """A prompt's pass has other kernels than a token's, which shows where the base hesitates."""
    same = []
    for sequence, recorded in captured(alone):
        generated = recorded.token_ids[sequence.prompt_tokens :]
        same.append(recorded.targets[sequence.prompt_tokens - 1 : -1] == generated)
    share = torch.cat(same).float().mean().item()
    measured.update(targets_as_generated=share)
    assert share > 0.97


def test_a_text_ends_where_the_base_ends_it_or_at_the_limit(alone: Path) -> None:
    continuations = [text.continuation for text in read_texts(alone)]
    for tokens in continuations:
        assert EOS not in tokens[:-1]
        assert len(tokens) == NEW_TOKENS or tokens[-1] == EOS
    assert any(len(tokens) < NEW_TOKENS for tokens in continuations)
    recorded = [
        tuple(each.token_ids[sequence.prompt_tokens :].tolist())
        for sequence, each in captured(alone)
    ]
    assert recorded == continuations


def test_a_conversation_is_encoded_as_the_bundled_prompts_are(
    bench: Bench, together: tuple[Path, Any]
) -> None:
    text = f"<｜begin▁of▁sentence｜><｜User｜>{QUESTION}<｜Assistant｜></think>"
    encoded = bench.client.encode(Prompt("text", text))
    assert read_texts(together[0])[-1].prompt == tuple(encoded)


def test_the_residual_is_that_of_transformers_in_float32(
    together: tuple[Path, Any], tiny_model: Path, measured: dict[str, Any]
) -> None:
    """Within what BF16 and the FP8 KV cache cost: a few percent of a row's norm.

    Rows at which a router hesitates get another expert, and are further away: hence the quantile.
    """
    model: Any = load_reference(tiny_model / "base")
    seen: list[torch.Tensor] = []
    model.model.hc_head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    errors = []
    for recorded in rows(together[0]):
        with torch.no_grad():
            model(input_ids=recorded.token_ids[None])
        expected = seen.pop()[0]  # [T, S, D]
        difference = (recorded.residual.float() - expected).flatten(1).norm(dim=1)
        errors.append(difference / expected.flatten(1).norm(dim=1))
    relative = torch.cat(errors)
    measured.update(
        rows=len(relative),
        median=relative.median().item(),
        q95=relative.quantile(0.95).item(),
        max=relative.max().item(),
    )
    assert relative.median() < 0.05
    assert relative.quantile(0.95) < 0.2


def test_speeds_with_and_without_recording_are_reported(
    together: tuple[Path, dict[str, Any]], measured: dict[str, Any]
) -> None:
    result = together[1]
    measured.update(result["tok_s"])
    assert result["sequences"] == NUM_PROMPTS
    assert result["tok_s"].keys() == {"generate", "prefill", "prefill_recording"}
    assert all(speed > 0 for speed in result["tok_s"].values())


CLIENT = """
import sys
from contextlib import nullcontext
from pathlib import Path
from engine import test_capture as test
from mtp_graft.serving.client import ServerClient
url, base, out = sys.argv[1], *map(Path, sys.argv[2:])
settings = test.wanted(base.parent, out.parent, concurrency=1)
test.capture(nullcontext(ServerClient(url)), base, out, settings, lambda *_: None)
"""


@pytest.mark.parametrize(("file", "lines"), [("texts.jsonl", 2), ("index.jsonl", 2)])
def test_a_killed_capture_is_finished_without_doing_anything_twice(
    file: str,
    lines: int,
    bench: Bench,
    alone: Path,
    tmp_path: Path,
    repo_root: Path,
) -> None:
    out = bench.into(tmp_path / "killed")
    environment = {**os.environ, "PYTHONPATH": str(repo_root / "tests")}
    command = [sys.executable, "-c", CLIENT, bench.client.base_url, str(bench.base), str(out)]
    client = subprocess.Popen(command, env=environment)
    wait_for_lines(out / file, lines, client)
    client.send_signal(signal.SIGKILL)
    client.wait()
    wait_until_idle(bench.client)
    texts, sequences = read_texts(out), read_sequences(out)
    assert len(texts if file == "texts.jsonl" else sequences) < NUM_PROMPTS

    asked: list[tuple[int, ...]] = []
    complete = bench.client.complete

    def counted(prompt: Any, max_tokens: int, **others: Any) -> tuple[int, ...]:
        if max_tokens > 1:
            asked.append(tuple(prompt))
        return complete(prompt, max_tokens, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.client, "complete", counted)
        bench.capture(out, 1)
    finished = {text.prompt for text in texts}
    assert len(asked) == NUM_PROMPTS - len(texts)
    assert not finished & set(asked)
    assert {s.number: s for s in read_sequences(out)}.items() >= {
        s.number: s for s in sequences
    }.items()
    assert_equal(rows(out), rows(alone))


def wait_for_lines(path: Path, count: int, client: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert client.poll() is None, "the client ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.002)
