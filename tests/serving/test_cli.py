import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtp_graft import cli, pipeline
from mtp_graft.serving import server

from .conftest import write_checkpoint

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(vllm: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; return exit status, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mtp-graft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        out, errors = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, errors

    monkeypatch.setattr(server, "POLL_S", 0.05)
    return call


def test_dry_run_prints_what_a_shell_can_run(run: Run, vllm: Path, grafted: Path) -> None:
    status, out, errors = run("serve", grafted, "--dry-run", "--max-model-len", 512)
    assert (status, errors) == (0, "")
    assert out == (
        "export VLLM_PLUGINS=mtp_graft\nexport HF_HUB_OFFLINE=1\nexport VLLM_NO_USAGE_STATS=1\n"
        f"{vllm} serve {grafted} --host 127.0.0.1 --port 8000 --tokenizer-mode deepseek_v4 "
        "--reasoning-parser deepseek_v4 --enable-auto-tool-choice --tool-call-parser deepseek_v4 "
        "--kv-cache-dtype fp8 --block-size 256 --tensor-parallel-size 1 --max-model-len 512 "
        "--kv-cache-memory-bytes 1073741824 --enforce-eager --speculative-config "
        """'{"method":"mtp","num_speculative_tokens":1}'\n"""
    )


def test_dry_run_json_has_the_same_command_and_nothing_else(run: Run, base: Path) -> None:
    _, text, _ = run("serve", base, "--dry-run", "--api-key", "s3cret", "--", "--seed", 7)
    status, out, _ = run(
        "serve", base, "--dry-run", "--json", "-", "--api-key", "s3cret", "--", "--seed", 7
    )
    result = json.loads(out)
    assert status == 0
    assert shlex.split(text.splitlines()[-1]) == result["argv"]
    assert result["argv"][-2:] == ["--seed", "7"]
    assert result["env"]["VLLM_API_KEY"] == "***"
    assert "s3cret" not in out + text


def test_listening_beyond_loopback_without_a_key_warns(run: Run, base: Path) -> None:
    _, _, errors = run("serve", base, "--dry-run", "--host", "0.0.0.0")
    assert "anyone may use it" in errors
    _, _, errors = run("serve", base, "--dry-run", "--host", "0.0.0.0", "--api-key", "k")
    assert errors == ""


def test_a_users_mistake_is_one_line_and_status_1(run: Run, tmp_path: Path) -> None:
    status, out, errors = run("serve", tmp_path / "nowhere", "--dry-run")
    assert (status, out) == (1, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert "nowhere: not a folder" in errors


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve",),
        ("serve", "x", "--port", "high"),
        ("serve", "x", "--json", "-"),
        ("bench", "decode"),
        ("bench", "decode", "--base-url", "u", "--checkpoint", "c"),
        ("capture",),
    ],
)
def test_wrong_usage_is_status_2(run: Run, arguments: tuple[str, ...]) -> None:
    status, out, _ = run(*arguments)
    assert (status, out) == (2, "")


def test_bench_decode_serves_a_checkpoint_and_writes_its_result(
    run: Run, grafted: Path, prompts_file: Path, tmp_path: Path
) -> None:
    arguments = ("--prompts", prompts_file, "--max-tokens", 20, "--rounds", 2)
    status, out, errors = run(
        *("bench", "decode", "--checkpoint", grafted, *arguments),
        *("--log", tmp_path / "vllm.log", "--json", tmp_path / "decode.json"),
    )
    assert status == 0, errors
    result = json.loads((tmp_path / "decode.json").read_text())
    for key in ("decode_tok_s", "ttft_ms", "tpot_ms", "acceptance"):
        assert {"median", "min", "max", "runs"} <= result[key].keys()
    assert result["acceptance"]["median"] == pytest.approx(7 / 13)
    assert "53.8 %" in out


def test_bench_decode_without_mtp_has_no_acceptance(
    run: Run, base: Path, prompts_file: Path, tmp_path: Path
) -> None:
    status, out, errors = run(
        *("bench", "decode", "--checkpoint", base, "--prompts", prompts_file),
        *("--max-tokens", 5, "--rounds", 1, "--log", tmp_path / "vllm.log", "--json", "-"),
    )
    assert status == 0, errors
    assert json.loads(out)["acceptance"] is None


def test_bench_decode_of_nobody_is_one_clear_error(run: Run, prompts_file: Path) -> None:
    status, _, errors = run(
        *("bench", "decode", "--base-url", "http://127.0.0.1:9", "--prompts", prompts_file)
    )
    assert status == 1
    assert "http://127.0.0.1:9: no answer" in errors
    assert "Traceback" not in errors


@pytest.fixture
def model(tmp_path: Path, base: Path, prompts_file: Path) -> Path:
    """A model folder as the bundled one is laid out."""
    root = tmp_path / "model"
    root.mkdir()
    base.rename(root / "base")
    (root / "upstream").mkdir()
    prompts_file.rename(root / "prompts.jsonl")
    return root


def fake_splice(base: Path, upstream: Path, out: Path, variant: str) -> None:
    assert not out.exists()
    write_checkpoint(out, ("embed.weight", "mtp.0.e_proj.weight"))


def test_demo_serves_base_and_graft_and_reports_both(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "splice", fake_splice)
    folder = tmp_path / "run"
    arguments = ("demo", "--run", folder, "--model", model, "--rounds", 1, "--max-tokens", 20)
    status, out, errors = run(*arguments, "--json", tmp_path / "demo.json")
    assert status == 0, errors
    result: dict[str, Any] = json.loads((tmp_path / "demo.json").read_text())
    assert result["acceptance"] == pytest.approx(7 / 13)
    assert result["acceptance_served"] == {"bf16": result["acceptance"]}
    assert result["greedy_identical"] is True and result["divergences"] == []
    assert result["decode_tok_s"].keys() == {"base", "mtp"}
    assert result["seconds"].keys() == {"splice", "decode"}
    assert result["report"] is None
    assert "53.8 %" in out and "identical on all 2 prompts" in out

    written = json.loads((folder / "bench" / "decode.json").read_text())
    assert written["acceptance"] == result["acceptance"]
    manifest = json.loads((folder / "bench" / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["config"]["decode"]["max_tokens"] == 20
    assert len(manifest["inputs"]) == 3

    # A second run into the same folder starts over, and JSON has standard output for itself.
    status, out, errors = run(*arguments, "--json", "-")
    assert status == 0, errors
    assert json.loads(out)["greedy_identical"] is True


def test_demo_says_which_part_of_the_model_is_missing(run: Run, model: Path) -> None:
    (model / "prompts.jsonl").unlink()
    status, _, errors = run("demo", "--model", model)
    assert status == 1
    assert "prompts.jsonl: not found" in errors


def test_without_a_checkout_the_demo_asks_for_a_model(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "lib" / "site-packages" / "mtp_graft" / "pipeline.py"
    monkeypatch.setattr(pipeline, "__file__", str(module))
    status, _, errors = run("demo", "--run", tmp_path / "run")
    assert status == 1
    assert "pass --model DIR" in errors
