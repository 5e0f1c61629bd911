"""One `mtp-graft run` from two hub ids to served checkpoints: only hub and vLLM are stand-ins."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub_stand_in import BASE, COMMIT, UPSTREAM, StandInHub
from mtp_graft import pipeline
from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD
from mtp_graft.pipeline import find_bundled_recipe
from mtp_graft.serving import server

SETTINGS = (
    f"model.base={BASE}",
    f"model.upstream={UPSTREAM}",
    "capture.calibration_count=3",
    "capture.evaluation_count=2",
    "capture.new_tokens=6",
    "bench.count=1",
    "bench.max_tokens=8",
    "bench.rounds=1",
    'bench.served_variants=["gptq"]',
)
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(
    hub: StandInHub, fake: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    mtp_graft: Callable[..., Any],
) -> Run:  # fmt: skip
    """Run the bundled recipe with the hub's ids, by the command; return its JSON."""
    monkeypatch.setattr(server, "POLL_S", 0.05)
    config = json.loads(hub.repositories[BASE]["config.json"])
    fake(width=config["hc_mult"] * config["hidden_size"], record=str(tmp_path / "server.json"))
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    command = ["run", find_bundled_recipe(), "--run", tmp_path / "run", *settings]
    return lambda: mtp_graft(*command)


def test_one_run_goes_from_hub_ids_to_a_served_checkpoint(
    run: Run, hub: StandInHub, tiny_model: Path, tmp_path: Path
) -> None:
    result = run()
    folder = tmp_path / "run"
    for stage in pipeline.STAGES[1:]:
        assert json.loads((folder / stage / "manifest.json").read_text())["status"] == "done"
    fetched = json.loads((folder / "fetch" / "report.json").read_text())
    assert fetched["base_commit"] == fetched["upstream_commit"] == COMMIT
    checkpoint = Path(result["checkpoint"])
    served = json.loads((tmp_path / "server.json").read_text())["argv"]  # the last server's
    assert served[1] == str(checkpoint) and "--speculative-config" in served
    assert 0 < result["acceptance"] < 1 and result["greedy_identical"]
    verified = json.loads((folder / "verify" / "gptq.json").read_text())
    assert verified["ok"] and verified["loaded_in_vllm"]
    assert verified["base_files_linked"], "through the cache's symbolic links"
    assert (checkpoint / HEAD_SHARD).is_file()
    for shard in (tiny_model / "base").glob("*.safetensors"):
        assert (checkpoint / shard.name).read_bytes() == shard.read_bytes()
        assert hub.downloads(shard.name) == 1, "once for all stages"

    hub.asked.clear()
    assert run()["acceptance"] == result["acceptance"]
    assert hub.asked == [], "a finished run asks the hub for nothing"
