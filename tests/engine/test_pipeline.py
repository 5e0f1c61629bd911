"""The whole pipeline on the real engine, shortened, and killed wherever it works for long."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from safetensors import safe_open

from mtp_graft.bench.card import write_card
from mtp_graft.checkpoint.shards import load_tensors, read_index
from mtp_graft.dsv4.replay import build_head
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.pipeline import STAGES
from mtp_graft.stages.inputs import EVALUATION, open_inputs
from mtp_graft.stages.score import draft_steps
from quantized import hashes
from test_scripts import load

pytestmark = [pytest.mark.vllm, pytest.mark.serves, pytest.mark.slow]
SETTINGS = """capture.calibration_count=6 capture.evaluation_count=6 capture.new_tokens=64
capture.concurrency=6 quantize.experts_per_batch=4 bench.count=2 bench.max_tokens=24 bench.rounds=1
bench.k=3 score.k=3 bench.served_variants=["gptq"]"""
ORDER = [stage for stage in STAGES if stage != "heal"]  # which the recipe has not
#: The stages that are killed, at most so many seconds after they have begun.
WORKS_FOR_S = {"capture": 40, "quantize": 4, "splice": 0.3, "bench": 30, "score": 3, "verify": 0.5}
WORKS_FOR_S |= {"report": 0.15}
SEED = 3
#: What nobody writes again once it is there.
KEPT = ["capture/manifest.json", "quantize/*/experts-*.safetensors", "score/*.json"]
KEPT += ["bench/mtp.json", "bench/[!dm]*.json"]
CHANGES = [f"--set={setting}" for setting in SETTINGS.split()]


def demo(run: Path) -> list[str]:
    return [sys.executable, "-m", "mtp_graft.cli", "demo", "--run", str(run), *CHANGES]


def moments(number: int) -> list[tuple[str, float]]:
    """Draw stages, in their order, and how many seconds into each a run is killed."""
    random, stages = Random(SEED), [*islice(cycle(WORKS_FOR_S), number)]
    return [(s, random.uniform(0, WORKS_FOR_S[s])) for s in sorted(stages, key=ORDER.index)]


def kill_in(stage: str, after_s: float, run: Path) -> set[Path]:
    """Run, and SIGKILL the command, not its children, so long after the stage has begun.

    Returns the shared memory that the run has then.
    """
    errors, begun = run.with_name("errors"), None
    manifest = run / ORDER[ORDER.index(stage) - 1] / "manifest.json"
    if stage == "quantize":  # the base is measured before
        manifest = run / "bench" / "base.json"
    with errors.open("wb") as file, subprocess.Popen(demo(run), stderr=file) as process:
        while begun is None or time.monotonic() < begun + after_s:
            assert process.poll() is None, errors.read_text()
            is_begun = stage == "capture" or manifest.exists()
            if begun is None and errors.stat().st_size and is_begun:
                begun = time.monotonic()
            time.sleep(0.002)
        memory = shared_memory(run)
        process.kill()
    return memory


def shared_memory(run: Path) -> set[Path]:
    """Return the shared memory that processes of a run have open, maybe by another name."""
    lines = []
    for pid in processes_of(run):
        with suppress(OSError):  # it ended just now
            lines += Path(f"/proc/{pid}/maps").read_text().splitlines()
    inodes = {int(line.split()[4]) for line in lines if "/dev/shm/" in line}
    return {path for path in Path("/dev/shm").iterdir() if path.stat().st_ino in inodes}


def processes_of(run: Path) -> list[int]:
    """Return the processes that name the run's folder for temporary files, as all of it do."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            about = (folder / "environ").read_bytes()
            if folder.name.isdigit() and str(run.parent).encode() in about:
                found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Any]:
    """A run that is killed at seeded moments and then finished.

    MTP_GRAFT_KILLS says how often; with the default, in capture and quantize.
    """
    run = tmp_path_factory.mktemp("pipeline") / "run"
    before = hashes(tiny_model / "base")
    (run.parent / "tmp").mkdir()
    kept: dict[Path, int] = {}
    kills: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(run.parent / "tmp"))  # and so all its processes name the run
        for stage, after_s in moments(int(os.environ.get("MTP_GRAFT_KILLS", "2"))):
            memory, killed_at = kill_in(stage, after_s, run), time.monotonic()
            wait_until_gone(run, memory)
            kept |= {p: p.stat().st_mtime_ns for files in KEPT for p in run.glob(files)}
            *_, said = run.with_name("errors").read_text().splitlines()
            gone_s = time.monotonic() - killed_at
            kills.append({"stage": stage, "after_s": after_s, "said": said, "gone_s": gone_s})
        result = run / "result.json"
        subprocess.run([*demo(run), "--json", str(result)], check=True, timeout=600)
    found = json.loads(result.read_text())
    yield {"run": run, "result": found, "kept": kept, "kills": kills, "base_hashes": before}
    for pid in processes_of(run):
        os.kill(pid, signal.SIGKILL)


def wait_until_gone(run: Path, memory: Collection[Path] = ()) -> None:
    """Wait for the end of all processes of a run, its folders of sockets and its shared memory."""
    deadline = time.monotonic() + 60
    folders = run.parent / "tmp"
    while left := [*processes_of(run), *folders.glob("vllm-*"), *filter(Path.exists, memory)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)


def test_a_killed_run_redoes_nothing_finished(killed_run: Any, measured: dict[str, Any]) -> None:
    wait_until_gone(killed_run["run"])
    kept, kills = killed_run["kept"], killed_run["kills"]
    redone = [path.name for path, written in kept.items() if path.stat().st_mtime_ns != written]
    measured |= {"seed": SEED, "kills": kills, "finished_files": len(kept), "redone": redone}
    assert kept and not redone


def test_the_result_has_the_contracts_keys_and_a_card(killed_run: Any) -> None:
    result = killed_run["result"]
    assert result["greedy_identical"] is True
    assert result["divergences"] == []
    assert 0.2 < result["acceptance"] <= 1  # of three drafts a step
    assert result["acceptance_served"] == {"gptq": result["acceptance"]}
    assert set(result["acceptance_offline"]) == {"rtn", "gptq", "mxfp4", "bf16"}
    assert set(result["decode_tok_s"]) == {"base", "mtp"}
    assert set(result["seconds"]) >= {"capture", "quantize", "score", "splice", "verify", "bench"}
    assert Path(result["report"]).is_file()
    page = Path(write_card(killed_run["run"], Path("card"))["card"]).read_text()
    assert "| result | ok |" in page and "| gptq (this one) | 3 |" in page
    assert str(killed_run["run"]) not in page


def test_offline_and_served_acceptance_count_to_the_texts_end(killed_run: Any) -> None:
    """A step gives its token and the accepted drafts before it; the first token comes before.

    Where the very last token is an accepted draft, its step has no room for a token of its own.
    """
    run, result = killed_run["run"], killed_run["result"]
    assert 0.5 < result["acceptance_offline"]["gptq"] <= 1
    lines = map(json.loads, (run / "capture" / "texts.jsonl").read_text().splitlines())
    lengths = {t["id"]: len(t["continuation"]) for t in lines if t["split"] == "evaluation"}
    assert min(lengths.values()) < 64, "no text ended by itself; nothing is shown"
    served = json.loads((run / "bench" / "served-gptq.json").read_text())
    offline = json.loads((run / "score" / "gptq.json").read_text())
    assert served["identical"] == served["texts"] == len(lengths)
    for text in offline["sequences"]:  # of one draft a step
        assert text["drafts"] + text["accepted"] - lengths[text["id"]] in (-1, 0)
    for text in served["sequences"]:
        assert sum(accepted + 1 for _, accepted in text["steps"]) - lengths[text["id"]] in (-1, 0)


def test_each_step_of_three_drafts_is_the_servers(killed_run: Any, tiny_model: Path) -> None:
    """The server rounds values to BF16 and cached keys to FP8, the replay nothing."""
    run, checkpoint = killed_run["run"], Path(killed_run["result"]["checkpoint"])
    models, ties = (tiny_model / "upstream", tiny_model / "base"), load("score_ties")
    inputs = open_inputs(run / "capture", *models, EVALUATION)
    stored = load_tensors(checkpoint, [n for n in read_index(checkpoint) if n.startswith("mtp.")])
    head = build_head(inputs.model, decode_head(stored))
    base = load_tensors(tiny_model / "base", ["embed.weight", "head.weight"]).values()
    served = json.loads((run / "bench" / "served-gptq.json").read_text())["sequences"]
    found = []
    for sequence, told in zip(inputs.sequences, served, strict=True):
        text, drafts, margins, _gaps = ties.replay(inputs, head, *base, sequence)
        ours, theirs = ties.begun(draft_steps(drafts, text)), ties.begun(told["steps"])
        at = next((at for at, step in ours.items() if step != theirs[at]), None)
        if at is not None:
            place = min(ours[at].accepted, theirs[at].accepted)
            found.append((sequence.id, at, place, margins[at][place]))
    assert len(found) <= len(served) // 2, found
    assert all(margin < 0.3 for *_, margin in found), found


def test_the_checkpoint_is_verified_and_the_base_linked(killed_run: Any, tiny_model: Path) -> None:
    found = json.loads((killed_run["run"] / "verify" / "gptq.json").read_text())
    assert found["ok"] and found["loaded_in_vllm"]
    assert not found["missing"] and not found["unexpected"] and not found["mismatched"]
    checkpoint = Path(killed_run["result"]["checkpoint"])
    assert hashes(tiny_model / "base") == killed_run["base_hashes"]
    for shard in (tiny_model / "base").glob("*.safetensors"):
        assert (checkpoint / shard.name).stat().st_ino == shard.stat().st_ino
    with safe_open(checkpoint / "model-mtp-w4a16.safetensors", framework="pt") as head:
        assert all(name.startswith("mtp.0.") for name in head.keys())  # noqa: SIM118


def test_same_without_kill(killed_run: Any, repo_root: Path, mtp_graft: Any, measured: Any) -> None:
    killed, other = killed_run["run"], Path("run")
    shutil.copytree(killed / "capture", other / "capture")
    shutil.copy(killed / "run.json", other)
    for stage in ("quantize", "splice"):
        mtp_graft(stage, repo_root / "recipes" / "tiny.toml", "--run", other, *CHANGES)
    files = hashes(killed / "splice" / "gptq")
    measured |= {"files": len(files), "bytes_equal": hashes(other / "splice" / "gptq") == files}
    assert measured["bytes_equal"]
