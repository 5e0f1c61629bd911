import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from mtp_graft.bench.drafting import drafting_result
from mtp_graft.bench.report import CHARTS, write_report
from mtp_graft.bench.results import RunResults
from mtp_graft.serving.metrics import SpecDecodeCounters

VARIANTS = ("rtn", "gptq", "mxfp4", "bf16")
ACCEPTED = {"rtn": 3801, "gptq": 3969, "mxfp4": 3993, "bf16": 4011}
OFFLINE = {"rtn": 3767, "gptq": 3941, "mxfp4": 3997, "bf16": 4007}
DRAFTED = 5107
NUM_EXPERTS = 64


def speed(median: float) -> dict[str, Any]:
    return {"median": median, "min": 0.97 * median, "max": 1.04 * median, "runs": 3}


def rate(accepted: int, half: float = 0.011) -> dict[str, Any]:
    value = accepted / DRAFTED
    return {"accepted": accepted, "interval": [value - half, value + half]}


def errors(level: float) -> list[float]:
    return [level + 0.0004 * (e * 37 % NUM_EXPERTS) for e in range(NUM_EXPERTS)]


def served(**intervals: tuple[float, float]) -> dict[str, Any]:
    """Return what each head's server counted at k = 1, with these intervals."""
    found = {}
    for v, a in ACCEPTED.items():
        counted = drafting_result(SpecDecodeCounters(DRAFTED, DRAFTED, a, (a,)))
        interval = intervals.get(v, rate(a)["interval"])
        counted |= {"acceptance_by_position_interval": [interval], "interval": interval}
        found[v] = {"accepted": a, "acceptance": a / DRAFTED, "drafted": DRAFTED, **counted}
    return found


def scored() -> dict[str, Any]:
    return {v: {**rate(a), "top1": a / DRAFTED, "tokens": DRAFTED} for v, a in OFFLINE.items()}


def quantized(num_experts: int = NUM_EXPERTS) -> dict[str, Any]:
    counts = [20 + (e * e * 53) % 3980 for e in range(num_experts)]
    levels = {"rtn": 0.113, "gptq": 0.081, "mxfp4": 0.0, "bf16": 0.0}
    return {
        "variants": {
            "rtn": {"bits_per_weight": 4.125, "rel_error": 0.1257, "bytes": 8019304},
            "gptq": {"bits_per_weight": 4.125, "rel_error": 0.0936, "bytes": 8019305},
            "mxfp4": {"bits_per_weight": 4.25, "rel_error": 0.0, "bytes": 8212840},
            "bf16": {"bits_per_weight": 16.0, "rel_error": 0.0, "bytes": 26693992},
        },
        "tokens_per_expert": {
            "min": min(counts),
            "mean": sum(counts) / len(counts),
            "max": max(counts),
            "zero": 0,
            "counts": counts,
        },
        "rel_errors": {
            v: {m: (errors(level) * 4)[:num_experts] for m in ("w1", "w2", "w3")}
            for v, level in levels.items()
        },
        "zero_token_policy": "pool",
        "experts_without_tokens": [],
        "seconds": {"hessian": 1.31, "gptq": 2.72, "io": 0.43},
        "peak_gpu_bytes": 0,
        "peak_host_bytes": 570224640,
        "damp": 0.01,
        "group_size": 128,
        "calibration_tokens": 8346,
        "replay": "true attention",
    }


def decoded(base: float = 41.27, mtp: float = 58.84) -> dict[str, Any]:
    def result(tok_s: float, acceptance: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "decode_tok_s": speed(tok_s),
            "ttft_ms": speed(8 * tok_s),
            "tpot_ms": speed(1e3 / tok_s),
            "acceptance": acceptance,
            "acceptance_by_position": acceptance and [0.7615],
            "acceptance_length": acceptance and 1.7615,
            "num_prompts": 9,
            "tokens_per_round": 1152,
        }

    accepted = {"median": 0.762, "min": 0.751, "max": 0.773, "runs": 3}
    return {"base": result(base, None), "mtp": result(mtp, accepted)}


def verified() -> dict[str, Any]:
    return {
        "ok": True,
        "variant": "gptq",
        "tensors": 612,
        "missing": [],
        "unexpected": [],
        "mismatched": [],
        "rel_error_max": 0.18928,
        "base_files_linked": True,
        "base_unchanged": True,
        "loaded_in_vllm": True,
    }


def whole_run() -> RunResults:
    return RunResults(
        result={
            "acceptance": ACCEPTED["gptq"] / DRAFTED,
            "k": 1,
            "acceptance_by_position": [ACCEPTED["gptq"] / DRAFTED],
            "acceptance_length": 1 + ACCEPTED["gptq"] / DRAFTED,
            "acceptance_served": {v: a / DRAFTED for v, a in ACCEPTED.items()},
            "acceptance_offline": {v: a / DRAFTED for v, a in OFFLINE.items()},
            "decode_tok_s": {"base": 41.27, "mtp": 58.84},
            "greedy_identical": True,
            "divergences": [],
            "seconds": {"bench": 118.6, "capture": 64.3, "quantize": 4.9, "score": 8.1},
        },
        capture={
            "sequences": 160,
            "tokens": 21304,
            "dropped": [{"id": "essay", "split": "calibration", "tokens": 3100}],
            "tok_s": {"generate": 449.53, "prefill": 3587.2, "prefill_recording": 3241.8},
            "seconds": 46.14,
        },
        quantize=quantized(),
        score={"acceptance": scored()},
        served=served(),
        decode=decoded(),
        verify=verified(),
        model="some-model",
        device="some device",
        versions={"torch": "2.13.0", "vllm": "0.32.0"},
        notes=["A shared machine: only ratios mean something."],
    )


def nothing_but_the_summary() -> RunResults:
    result = {
        "acceptance": None,
        "k": None,
        "acceptance_by_position": None,
        "acceptance_length": None,
        "acceptance_served": {},
        "acceptance_offline": {},
        "decode_tok_s": None,
        "greedy_identical": None,
        "divergences": None,
        "seconds": {},
    }
    return RunResults(result, None, None, None, None, None, None, "m", "d", {}, [])


def written(folder: Path, results: RunResults) -> str:
    return write_report(folder, results).read_text()


def intervals(results: RunResults, **by_variant: tuple[float, float]) -> RunResults:
    """Return the results with other served intervals."""
    return replace(results, served=served(**by_variant))


def all_numbers(value: object) -> list[float]:
    """Return every number anywhere in JSON, and of the texts the digits in them."""
    if isinstance(value, Mapping):
        return [n for part in value.items() for n in all_numbers(part)]
    if isinstance(value, list | tuple):
        return [n for part in value for n in all_numbers(part)]
    if isinstance(value, str):
        return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", value)]
    return [float(value)] if isinstance(value, int | float) else []


def without_names(page: str) -> str:
    """Drop what has digits but is no number: variants, matrices, the page's pictures."""
    return re.sub(r"mxfp4|bf16|\bw[123]\b|95 %|\(\w+\.png\)", "", page)


@pytest.mark.parametrize(
    "shown",
    [
        "41.3 tok/s",
        "58.8 tok/s, 1.43× the base's",  # 58.84 / 41.27
        "| greedy text identical | yes |",
        "| first draft accepted, gptq | 77.7 % (95 %: 76.6 to 78.8 %) |",
        "| tokens a step, gptq | 1.78 (k = 1) |",
        "accepts 77.7 % of the gptq head's drafts, 1.78 tokens a step",
        "| gptq | 1 | 77.7 % | 1.78 |",
        "| rtn | served | 74.4 % | 73.3 to 75.5 % | 3,801 of 5,107 |",
        "| bf16 | offline | 78.5 % | 77.4 to 79.6 % | 4,007 of 5,107 |",
        "| gptq | 4.125 | 8,019,305 | 9.36 % | 77.2 % | 77.7 % | +0.5 points |",
        "| mxfp4 | 4.250 | 8,212,840 | 0.00 % | 78.3 % | 78.2 % | −0.1 points |",
        "gptq has 99.0 % of the acceptance of bf16",  # 3969 / 4011
        "20 at the least",
        "| tokens | 21,304 |",
        "| prefill, recording, tok/s | 3,241.8 |",
        "0.90× its speed without",  # 3241.8 / 3587.2
        "Left out as too long, and replaced: essay (3,100 tokens).",
        "damp 0.01 and groups of 128, calibrated on 8,346 tokens (replay: true attention)",
        "hessian 1.3 s, gptq 2.7 s, io 0.4 s",
        "570,224,640 bytes",
        "| decode, tok/s | 41.3 (40.0 to 42.9) | 58.8 (57.1 to 61.2) |",
        "| time to first token, ms | 330.2 (320.3 to 343.4) | 470.7 (456.6 to 489.5) |",
        "| drafts accepted | – | 76.2 % (75.1 to 77.3 %) |",
        "| tokens a step | – | 1.76 |",
        "continues 9 prompts, one at a time, by 1,152 tokens",
        "| tensors compared | 612 |",
        "| largest relative error (Frobenius) | 0.1893 |",
        "capture 64.3 s, quantize 4.9 s, score 8.1 s, bench 118.6 s",  # in the stages' order
        "195.9 s in all",
        "| device | some device |",
        "| vllm | 0.32.0 |",
        "- A shared machine: only ratios mean something.",
    ],
)
def test_page_shows_what_was_measured(shown: str, tmp_path: Path) -> None:
    assert shown in written(tmp_path, whole_run())


def test_page_has_no_number_that_was_not_measured(tmp_path: Path) -> None:
    results = whole_run()
    given = all_numbers([vars(results)])
    acceptance = [n / DRAFTED for n in (*ACCEPTED.values(), *OFFLINE.values())]
    assert results.quantize is not None
    derived = [
        58.84 / 41.27,
        ACCEPTED["gptq"] / ACCEPTED["bf16"],
        3241.8 / 3587.2,
        sum(results.result["seconds"].values()),
        *(abs(ACCEPTED[v] - OFFLINE[v]) / DRAFTED for v in VARIANTS),
        *(sum(by["w1"]) / NUM_EXPERTS for by in results.quantize["rel_errors"].values()),
    ]
    page = without_names(written(tmp_path, results))
    allowed = [*given, *acceptance, *derived]
    for shown in re.findall(r"\d[\d,]*(?:\.\d+)?", page):
        digits = shown.rstrip(",").replace(",", "")
        places = len(digits.partition(".")[2])
        forms = {f"{scale * n:.{places}f}" for n in allowed for scale in (1, 100)}
        forms |= {"0", "½"}  # numbers of faults
        assert digits in forms, f"{shown} is none of the results"


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ([0.004, 0.021], "gptq is accepted more often than rtn; the difference is +0.4 points to"),
        ([-0.03, -0.01], "gptq is accepted less often than rtn; the difference is −3.0 points to"),
        ([-0.0135, 0.0016], "no difference between gptq and rtn is shown; the difference is −1.4"),
    ],
)
def test_page_compares_heads_on_the_same_texts_where_it_can(
    interval: list[float], expected: str, tmp_path: Path
) -> None:
    run = whole_run()
    known = {"acceptance_difference": {"gptq-rtn": interval}}
    page = written(tmp_path, replace(run, result={**run.result, **known}))
    assert f"- On the same texts, served: {expected}" in page
    assert "the served intervals of gptq" not in page, "one comparison, the better one"
    assert "the offline intervals of gptq" in page
    assert "resampling texts, the same for both heads" in page


def test_page_says_whether_intervals_of_gptq_and_rtn_overlap(tmp_path: Path) -> None:
    run = whole_run()
    above = intervals(run, gptq=(0.77, 0.79), rtn=(0.74, 0.76))
    below = intervals(run, gptq=(0.74, 0.76), rtn=(0.77, 0.79))
    touching = intervals(run, gptq=(0.75, 0.77), rtn=(0.73, 0.75))
    told = "the served intervals of gptq ({}) and rtn ({})"
    assert (
        "gptq is accepted more often than rtn: "
        + told.format("77.0 to 79.0 %", "74.0 to 76.0 %")
        + " do not overlap."
    ) in written(tmp_path, above)
    assert (
        "gptq is accepted less often than rtn: "
        + told.format("74.0 to 76.0 %", "77.0 to 79.0 %")
        + " do not overlap."
    ) in written(tmp_path, below)
    assert (
        "No difference between gptq and rtn is shown: "
        + told.format("75.0 to 77.0 %", "73.0 to 75.0 %")
        + " overlap."
    ) in written(tmp_path, touching)


@pytest.mark.parametrize(
    ("mtp", "words"),
    [
        (58.84, "faster than without (1.43× the base's speed)"),
        (38.4, "slower than without (0.93× the base's speed)"),
        (41.2, "as fast as without (1.00× the base's speed)"),
    ],
)
def test_summary_says_which_is_faster(mtp: float, words: str, tmp_path: Path) -> None:
    run = whole_run()
    speeds = {"base": 41.27, "mtp": mtp}
    page = written(tmp_path, replace(run, result={**run.result, "decode_tok_s": speeds}))
    assert f"decoding with MTP is {words}" in page.splitlines()[2]


def test_summary_does_not_hide_another_text_or_a_failed_verification(tmp_path: Path) -> None:
    run = whole_run()
    divergences = [
        {"prompt": "p-7", "position": 31, "margin": 0.0625},
        {"prompt": "p-8", "position": 40, "margin": None},
    ]
    result = {**run.result, "greedy_identical": False, "divergences": divergences}
    faults = [{"tensor": "mtp.0.norm.weight", "why": "its values differ"}]
    verify = {**verified(), "ok": False, "missing": ["mtp.0.x"], "mismatched": faults}
    page = written(tmp_path, replace(run, result=result, verify=verify))
    summary = page.splitlines()[2]
    assert "the greedy text is not the same on 2 prompts" in summary
    assert "fails verification" in summary
    assert "| p-7 | 31 | 0.0625 |\n| p-8 | 40 | – |" in page
    assert "- missing: `mtp.0.x`\n- mismatched: `mtp.0.norm.weight` its values differ" in page


def test_parts_that_were_not_measured_are_named(tmp_path: Path) -> None:
    page = written(tmp_path, nothing_but_the_summary())
    for what in (
        "Served acceptance",
        "Offline acceptance",
        "Size and error of the variants",
        "The capture",
        "The calibration",
        "Decode speed, as a spread over rounds,",
        "Whether MTP changes the greedy text",
        "When each token came",
        "The checkpoint's integrity",
        "The stages' time",
    ):
        assert f"{what} was not measured in this run." in page
    assert not re.search(r"\d", without_names(page))
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.html"}


@pytest.mark.parametrize(
    ("part", "chart"),
    [
        ("quantize", "errors.png"),
        ("quantize", "tokens.png"),
        ("decode", "decode.png"),
        ("capture", None),
        ("verify", None),
        ("score", None),
        ("served", None),
    ],
)
def test_any_part_may_be_missing(part: str, chart: str | None, tmp_path: Path) -> None:
    write_report(tmp_path, whole_run())
    page = written(tmp_path, replace(whole_run(), **{part: None}))
    assert "not measured" in page
    # A chart of an earlier report would be taken for this one's.
    assert chart is None or not (tmp_path / chart).exists()
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == set(re.findall(r"\]\((\w+\.png)\)", page))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_single_variant_has_its_report(variant: str, tmp_path: Path) -> None:
    run = whole_run()
    acceptance = ACCEPTED[variant] / DRAFTED
    result = {**run.result, "acceptance": acceptance, "acceptance_served": {variant: acceptance}}
    page = written(
        tmp_path,
        replace(
            run,
            result=result,
            served={variant: served()[variant]},
            score={"acceptance": {variant: scored()[variant]}},
            verify={**verified(), "variant": variant},
        ),
    )
    assert f"The server accepts {100 * acceptance:.1f} % of the {variant} head's drafts" in page
    assert f"| first draft accepted, {variant} | {100 * acceptance:.1f} % (95 %: " in page
    assert {path.name for path in tmp_path.glob("*.png")} == set(CHARTS)
    assert "overlap" not in page.partition("## Decode speed")[0], "there is nothing to compare"
    for other in set(VARIANTS) - {variant}:
        assert f"| {other} | served" not in page and f"| {other} | offline" not in page


def test_with_several_drafts_a_step_the_first_ones_are_compared(tmp_path: Path) -> None:
    counters = SpecDecodeCounters(1000, 3000, 1550, (742, 492, 316))
    three = {
        "gptq": {
            **{"accepted": 1550, "drafted": 3000, "acceptance": 1550 / 3000},
            **drafting_result(counters),
        }
    }
    run = whole_run()
    result = {
        **run.result,
        **{"acceptance": 1550 / 3000, "k": 3, "acceptance_length": 2.55},
        "acceptance_by_position": three["gptq"]["acceptance_by_position"],
    }
    page = written(tmp_path, replace(run, result=result, served=three))
    assert "accepts 51.7 % of the gptq head's drafts, 2.55 tokens a step" in page
    assert "| first draft accepted, gptq | 74.2 % (95 %: 71.4 to 76.8 %) |" in page
    assert "| gptq | served | 74.2 % | 71.4 to 76.8 % | 742 of 1,000 |" in page
    assert "| gptq | 3 | 74.2, 66.3, 64.2 % | 2.55 |" in page
    assert "| gptq | 4.125 | 8,019,305 | 9.36 % | 77.2 % | 74.2 % | −3.0 points |" in page


def test_experts_without_tokens_are_listed_with_their_policy(tmp_path: Path) -> None:
    quantize = quantized()
    tokens = quantize["tokens_per_expert"]
    tokens["counts"][3] = tokens["counts"][17] = 0
    quantize |= {"experts_without_tokens": [3, 17], "tokens_per_expert": {**tokens, "zero": 2}}
    page = written(tmp_path, replace(whole_run(), quantize=quantize))
    assert "2 experts without tokens (3, 17), treated by the policy `pool`." in page


@pytest.mark.parametrize("num_experts", [1, 64, 256])
def test_charts_are_pictures_twice_600_pixels_wide(num_experts: int, tmp_path: Path) -> None:
    page = written(tmp_path, replace(whole_run(), quantize=quantized(num_experts)))
    for name in CHARTS:
        picture = (tmp_path / name).read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture.endswith(b"IEND\xaeB`\x82")
        width, height = struct.unpack(">II", picture[16:24])
        assert width == 1200
        assert 200 < height < 1000
        assert re.search(rf"!\[[^\]]{{20,}}\]\({name}\)", page), "no text in place of the picture"


def test_same_results_give_the_same_bytes_whatever_the_users_style(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_report(first, whole_run())
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red"}):
        before = dict(mpl.rcParams)
        write_report(second, whole_run())
        assert dict(mpl.rcParams) == before
    names = {path.name for path in first.iterdir()}
    assert (
        names == {"report.md", "report.html", *CHARTS} == {path.name for path in second.iterdir()}
    )
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_failed_write_leaves_the_earlier_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path, whole_run())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    with pytest.raises(OSError, match="no rename"):
        write_report(tmp_path, nothing_but_the_summary())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def failing(_: Callable[..., Any]) -> Callable[..., Any]:
    def rename(*_: object) -> None:
        raise OSError("no rename")

    return rename
