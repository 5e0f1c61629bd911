"""The report: what it says of a run, and that it is one file, whatever a model wrote."""

import re
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench import report
from mtp_graft.bench.report import write_report
from run_folder import ACCEPTED, DRAFTED, HEAL, decoded, recorded, scored, served

STAGES = recorded("stages")
ACCEPTANCE = ACCEPTED["gptq"] / DRAFTED
RESULT = {
    **{"acceptance": ACCEPTANCE, "acceptance_by_position": [ACCEPTANCE], "k": 1},
    **{"acceptance_length": 1 + ACCEPTANCE, "greedy_identical": True, "divergences": []},
    "decode_tok_s": {"base": 41.27, "mtp": 58.84},
    "drafter": "mtp",
    "seconds": {"capture": 64.3, "quantize": 4.9, "score": 8.1, "bench": 118.6},
}
WHOLE = {
    **{stage: STAGES[f"{stage}/report.json"] for stage in ("capture", "quantize")},
    **{"result": RESULT, "heal": HEAL, "score": {"acceptance": scored()}, "served": served()},
    **{"decode": decoded(), "verify": STAGES["verify/gptq.json"], "model": "some-model"},
    **{"device": "some device", "versions": {"torch": "2.13.0", "vllm": "0.32.0"}},
    **{"concurrency": 8, "on_cpu": True},
}
#: What a run without measurements has of each part.
NOTHING: dict[str, Any] = dict.fromkeys(WHOLE) | {"served": {}, "versions": {}}
NOTHING |= {"result": dict.fromkeys(RESULT) | {"seconds": {}}}


def written(folder: Path, found: Any = WHOLE, **changed: Any) -> str:
    """Return the page with its white space made single."""
    return " ".join(write_report(folder, {**found, **changed}).read_text("utf-8").split())


def row(*cells: str) -> str:
    return "".join(f"<td>{cell}</td>" for cell in cells)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the slowest part of the charts."""
    monkeypatch.setattr(report, "_png", lambda figure: b"")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("report"))


@pytest.mark.parametrize(
    "shown",
    [
        "1.43× <small>the base’s: 58.8 against 41.3 tok/s",  # 58.84 / 41.27
        "80.3 % <small>95 %: 78.7 to 81.8 %",
        "1.80 <small>k = 1, 80.3 % of all drafts accepted",
        "identical <small>with and without MTP, on 6 prompts",
        row("rtn", "served", "76.2 %", "74.5 to 77.8 %", "1,938 of 2,543"),
        "went from 2.36 to 2.48 tokens a step; the difference is 0.05 to 0.19 (95 %",
        'points="50.0,100.0 590.0,15.0 "',
        row("bf16", "offline", "80.1 %", "78.5 to 81.6 %", "2,037 of 2,543"),
        row("gptq", "4.125", "4,125,000", "5.40 %"),
        "Left out as too long, and replaced: essay (3,100 tokens).",
        "damp 0.01 and groups of 128, calibrated on 473,216 tokens",
        "hessian 1.3 s, gptq 2.7 s, io 0.4 s. Peak memory: 0.57 GB on the host",
        "Without any: 2 experts (2, 3), calibrated on all tokens together.",
        row("decode, tok/s", "139.5 (126.0 to 142.5)", "124.2 (105.2 to 142.7)"),
        row("tensors compared", "1,575"),
        "capture 64.3 s, quantize 4.9 s, score 8.1 s, bench 118.6 s",
        "<li>gptq: with drafts, 8 requests at once, 60 of 64 texts equal the captured ones;",
    ],
)
def test_report_shows_what_was_measured(shown: str, page: str) -> None:
    assert shown in page


def test_heads_are_compared_on_the_same_texts(tmp_path: Path) -> None:
    differences = {"gptq-rtn": [-0.03, -0.01], "gptq-bf16": [-0.0135, 0.0016]}
    page = written(tmp_path, result={**RESULT, "acceptance_difference": differences})
    said = "On the same texts, served: "
    assert f"{said}gptq is accepted less often than rtn; the difference is −3.0 to −1.0" in page
    assert f"{said}no difference between gptq and bf16 is shown; the difference is −1.4" in page


def test_another_text_and_a_failed_verification_are_shown(tmp_path: Path) -> None:
    p7 = {"prompt": "p-7", "position": 31, "margin": 0.0625}
    p8 = {"prompt": "p-8", "position": 40, "margin": None}
    faults = [{"tensor": "mtp.0.norm.weight", "why": "its values differ"}]
    page = written(
        tmp_path,
        result={**RESULT, "greedy_identical": False, "divergences": [p7, p8], "drafter": "dspark"},
        verify={**WHOLE["verify"], "ok": False, "missing": ["mtp.0.x"], "mismatched": faults},
    )
    assert "<h1>DSpark drafter for some-model</h1>" in page and "with MTP" not in page
    assert "differs <small>on 2 prompts" in page and "failed <small>1,575 tensors" in page
    assert row("p-7", "31", "0.0625") in page and row("p-8", "40", "–") in page
    assert "missing: <code>mtp.0.x</code>" in page
    assert "mismatched: <code>mtp.0.norm.weight</code> its values differ" in page


def test_parts_that_were_not_measured_are_named(tmp_path: Path) -> None:
    page = written(tmp_path, NOTHING)
    assert page.count("was not measured in this run.") == 9
    body = re.sub(r"<[^>]*>", "", page.partition("<main>")[2])
    assert not re.search(r"\d", body)


@pytest.mark.parametrize("part", ["capture", "quantize", "score", "served", "decode", "verify"])
def test_any_part_may_be_missing(part: str, tmp_path: Path) -> None:
    assert "was not measured in this run" in written(tmp_path, **{part: NOTHING[part]})


@pytest.mark.parametrize("found", [NOTHING, WHOLE], ids=["nothing", "whole"])
def test_report_needs_no_other_file_and_no_network(found: Any, tmp_path: Path) -> None:
    page = written(tmp_path, found)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 5
    for target in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert target.removeprefix("#") in ids or target.startswith("data:image/png;base64,")
    assert page.count("<img ") == (2 if found["decode"] else 0)
    assert not re.search(r"@import|url\(|https?://", page)


def test_report_is_safe_from_what_models_and_recipes_write(tmp_path: Path) -> None:
    hostile = [
        "</script><script>alert(1)</script>",
        '<img src="http://evil.example/x.png" onerror="alert(2)">{{ 7 * 7 }}{% raw %}<!--',
        "<b onclick=alert(3)>|`\x00\x1b[31m\ud800",
    ]
    different = [{"prompt": text, "position": 3, "margin": None} for text in hostile]
    result = {**RESULT, "greedy_identical": False, "divergences": different}
    page = written(tmp_path, result=result, model="<script>alert(4)</script>")
    assert "<script" not in page and page.count("<img ") == 2 and "<b onclick" not in page
    assert "{{ 7 * 7 }}{% raw %}&lt;!--" in page and "|`��[31m�" in page
