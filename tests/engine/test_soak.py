"""A soak of the real engine, and what becomes of a request in work when the server has to stop."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from engine.conftest import Checkpoints
from mtp_graft.bench.requests import STREAM, read_answer
from mtp_graft.bench.soak.mix import make_pool
from mtp_graft.bench.soak.run import SoakConfig, soak
from mtp_graft.bench.soak.verdicts import margin
from mtp_graft.serving.client import ServerClient
from mtp_graft.serving.command import ServeOptions
from mtp_graft.serving.server import managed_server

pytestmark = [pytest.mark.vllm, pytest.mark.serves, pytest.mark.slow]
CHAT = "/v1/chat/completions"
LOGPROBS = {"logprobs": True, "top_logprobs": 10, "return_tokens_as_token_ids": True}


def test_a_sound_server_soaks_without_a_fault_and_finishes_what_it_does_when_it_stops(
    checkpoints: Checkpoints, tmp_path: Path, measured: dict[str, Any]
) -> None:
    options = ServeOptions(
        checkpoints.spliced, port=0, max_model_len=3072, num_speculative_tokens=3
    )
    config, begun = SoakConfig(minutes=0.25, concurrency=4, pool=8), Event()
    log = tmp_path / "vllm.log"
    with ThreadPoolExecutor(1) as executor:
        with managed_server(options, log) as client:
            result = soak(client, client, config, lambda *_: None)
            check_margins(client)
            last = executor.submit(last_request, client.base_url, begun)
            assert begun.wait(60)
        events = last.result()
    measured |= {key: result[key] for key in ("requests", "equal", "sound", "acceptance")}
    assert result["corrupted"] == result["failures"] == [], log.read_text()[-2000:]
    assert result["near_ties"] == 0 < result["equal"] and result["requests"] >= 4
    assert 0.1 < result["acceptance"]["load"] < 1
    assert events[-1]["usage"]["completion_tokens"] == 100


def check_margins(client: ServerClient) -> None:
    """Have another text part from the server's at its first token."""
    for _, body, _ in make_pool(1, 4, longest=100, chars_per_token=3.0):
        reference = read_answer(client, CHAT, body | LOGPROBS)
        assert len(reference["logprobs"]) == len(reference["token_ids"])
        other = {**reference, "token_ids": [4000, *reference["token_ids"][1:]]}
        assert 0 < margin(other, reference) < 100


def last_request(url: str, begun: Event) -> list[dict[str, Any]]:
    """Ask for 100 tokens; return the events of the stream."""
    found = []
    body = {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 100, **STREAM}
    with ServerClient(url) as client:
        for event in client.events(CHAT, {**body, "ignore_eos": True, "temperature": 0}):
            found.append(event)
            begun.set()
    return found
