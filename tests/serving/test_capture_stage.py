"""The capture stage against a stand-in server: resume, speeds, and what can go wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.checkpoint import capture as files
from mtp_graft.checkpoint.capture import INTACT_NAME, RECORDINGS, SWITCH_NAME, read_texts
from mtp_graft.errors import GraftError
from mtp_graft.recipe import CaptureSection
from mtp_graft.serving.server import managed_server
from mtp_graft.stages import capture as stage
from mtp_graft.stages.capture import capture, recording_options, with_taps
from run_folder import write_rows

from .bench_server import quiet
from .fake_vllm import EOS

NEW_TOKENS = 3
Row = dict[str, Any]
PROMPTS: dict[str, list[Row]] = {
    "calibration": [{"id": f"c{i}", "text": "abcdefgh"[: i + 1]} for i in range(8)],
    "evaluation": [
        {"prompt_id": "chat", "messages": [{"role": "user", "content": "hey"}]},
        {"id": "same", "text": "xy"},
        {"id": "same sum", "text": "yx"},
    ],
}
NUM_PROMPTS = sum(map(len, PROMPTS.values()))
#: Sums of the prompts c0 and c1, which the stand-in ends at once and after one token.
ENDS = {str(ord("a")): 0, str(ord("a") + ord("b")): 1}


def wanted(folder: Path) -> CaptureSection:
    sources = [write_rows(folder / f"{s}.jsonl", *prompts) for s, prompts in PROMPTS.items()]
    counts = {f"{split}_count": len(prompts) for split, prompts in PROMPTS.items()}
    limits = {"max_prompt_tokens": 8, "new_tokens": NEW_TOKENS, "max_model_len": 64}
    return CaptureSection(*sources, **counts, **limits, concurrency=2)


def take(base: Path, out: Path, settings: CaptureSection, report: Any = quiet) -> Any:
    log = out / "vllm.log"
    serving = managed_server(recording_options(base, out, settings), log)
    return capture(serving, base, out, settings, report, log)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "WRITE_TIMEOUT_S", 0.3)


@pytest.fixture
def requests(fake: Callable[..., None], tmp_path: Path) -> Path:
    """The file in which a well-behaved stand-in writes how many tokens it was asked for."""
    path = tmp_path / "requests"
    fake(requests=str(path), ends=ENDS)
    return path


def expected(prompt: Row) -> tuple[list[int], list[int]]:
    """Return the stand-in's tokens of a prompt, and its answer."""
    chat = [0, *b"hey"]
    token_ids = list(prompt["text"].encode()) if "text" in prompt else chat
    tokens = [(sum(token_ids) + 7 * i) % 1000 for i in range(NEW_TOKENS)]
    end = ENDS.get(str(sum(token_ids)))
    return token_ids, tokens if end is None else [*tokens[:end], EOS]


def check_complete(out: Path) -> None:
    """Every prompt is captured once, with its own rows, and nothing else is left behind."""
    asked = [(split, prompt) for split, each in PROMPTS.items() for prompt in each]
    captured = [(s, files.read_recorded(out, s, streams=2)) for s in files.read_sequences(out)]
    assert [s.number for s, _ in captured] == list(range(NUM_PROMPTS))
    for (split, prompt), (sequence, recorded) in zip(asked, captured, strict=True):
        token_ids, answer = expected(prompt)
        assert (sequence.split, sequence.id) == (split, prompt.get("id", "chat"))
        assert sequence.prompt_tokens == len(token_ids)
        assert recorded.token_ids.tolist() == token_ids + answer
        assert recorded.targets.tolist() == [t + 1 for t in token_ids + answer]
    named = {sequence.recording for sequence, _ in captured}
    assert {path.name for path in (out / RECORDINGS).iterdir()} == named
    assert not (out / SWITCH_NAME).exists() and not (out / INTACT_NAME).exists()


def asked(requests: Path) -> dict[int, int]:
    """Return new tokens -> how many requests asked for that many; the probe's 4 left out."""
    lines = [int(line) for line in requests.read_text().split()]
    return {n: lines.count(n) for n in set(lines) - {4}}


def test_taps_are_the_drafters_or_the_recipes(base: Path, requests: Path, tmp_path: Path) -> None:
    upstream, out, settings = tmp_path / "config.json", tmp_path / "out", wanted(tmp_path)
    assert with_taps(settings, tmp_path).taps is None
    upstream.write_text('{"dspark_target_layer_ids": [0, 2, 3]}')
    assert with_taps(replace(settings, taps=()), tmp_path).taps == ()
    take(base, out, with_taps(settings, tmp_path))
    check_complete(out)
    [sequence, *_] = files.read_sequences(out)
    taps = files.read_recorded(out, sequence, streams=2).taps
    assert taps is not None and taps.shape == (sequence.tokens, 3, 4)
    upstream.write_text('{"dspark_target_layer_ids": [2, 0]}')
    with pytest.raises(GraftError, match=r"dspark_target_layer_ids is \[2, 0\] .*ascending"):
        with_taps(settings, tmp_path)


def test_prompts_are_taken_up_to_enough_tokens(base: Path, requests: Path, tmp_path: Path) -> None:
    settings = replace(wanted(tmp_path), calibration_tokens=12)
    found = take(base, tmp_path / "out", settings)
    # Of one, two and three tokens, and three new ones of each.
    assert found["splits"] == {"calibration": 3, "evaluation": 3}
    before = requests.read_text()
    assert take(base, tmp_path / "out", settings) == found and requests.read_text() == before
    with pytest.raises(GraftError, match="calibration_tokens"):
        take(base, tmp_path / "out", replace(settings, calibration_tokens=13))


@pytest.mark.parametrize("longer", ["", "x" * 9])
def test_sets_may_share_no_prompt(longer: str, base: Path, requests: Path, tmp_path: Path) -> None:
    """Also where one takes the place of a longer one, which only the server's tokens tell."""
    rows = [{"id": f"e{n}", "text": text} for n, text in enumerate((longer or "z", "abc"))]
    held_out = {"evaluation_prompts": write_rows(tmp_path / "e.jsonl", *rows)}
    settings = replace(wanted(tmp_path), **held_out, evaluation_count=1 if longer else 2)
    with pytest.raises(
        GraftError, match=r"e\.jsonl: 1 of its prompts are in .*/calibration\.jsonl,"
    ):
        take(base, tmp_path / "out", settings)
    assert not read_texts(tmp_path / "out") and requests.exists() == bool(longer)


def test_every_prompt_is_continued_and_recorded(base: Path, requests: Path, tmp_path: Path) -> None:
    out = tmp_path / "capture"
    seen: list[tuple[str, int, int]] = []
    result = take(base, out, wanted(tmp_path), lambda *step: seen.append(step))
    check_complete(out)
    lengths = [len(t) + len(a) for each in PROMPTS.values() for t, a in map(expected, each)]
    assert result["sequences"] == NUM_PROMPTS
    assert result["tokens"] == sum(lengths)
    assert lengths[:3] == [1 + 1, 2 + 2, 3 + NEW_TOKENS]
    assert result["splits"] == {"calibration": 8, "evaluation": 3}
    assert result["dropped"] == []
    assert all(speed > 0 for speed in result["tok_s"].values())
    assert json.loads((out / "report.json").read_text()) == result
    assert json.loads((out / "manifest.json").read_text())["status"] == "done"
    for label in ("capture: generate", "capture: record"):
        steps = [(done, total) for name, done, total in seen if name == label]
        assert steps == sorted(steps)
        assert steps[-1] == (NUM_PROMPTS, NUM_PROMPTS)
    requests.unlink()
    assert take(base, out, wanted(tmp_path)) == result, "a finished capture is only reported"
    assert not requests.exists()


def test_long_prompts_are_left_out(base: Path, requests: Any, tmp_path: Path, caplog: Any) -> None:
    """Both splits draw from one source, each from where the one before it stopped."""
    texts = ["ab", "x" * 9, "cd", "y" * 10, "ef", "x" * 8, "gh"]
    rows = ({"id": f"p{n}", "text": t} for n, t in enumerate(texts))
    source = write_rows(tmp_path / "p.jsonl", *rows)
    changes = {f"{split}_prompts": source for split in PROMPTS}
    changes |= {f"{split}_count": 2 for split in PROMPTS}
    settings = replace(wanted(tmp_path), **changes)
    result = take(base, tmp_path / "capture", settings)
    assert result["dropped"] == [
        {"id": "p1", "split": "calibration", "tokens": 9},
        {"id": "p3", "split": "evaluation", "tokens": 10},
    ]
    assert "p1 (9)" in caplog.text and "p3 (10)" in caplog.text
    captured = [(t.split[0], t.id, bytes(t.prompt)) for t in read_texts(tmp_path / "capture")]
    expected = [("c", "p0", b"ab"), ("c", "p2", b"cd"), ("e", "p4", b"ef"), ("e", "p5", b"x" * 8)]
    assert captured == expected
    said = r"3 prompts for evaluation, expected 4; .*: p3 \(10\); allow longer"
    with pytest.raises(GraftError, match=said):
        take(base, tmp_path / "more", replace(settings, evaluation_count=4))


@pytest.mark.parametrize("dies_at", [5, 1 + NUM_PROMPTS + 8])
def test_a_dying_server_loses_no_texts(dies_at: int, base: Path, fake: Any, tmp_path: Path) -> None:
    """At the fifth completion it generates; after all texts, it records."""
    out, log = tmp_path / "capture", tmp_path / "requests"
    fake(dies_at=dies_at, requests=str(log), ends=ENDS)
    with pytest.raises(GraftError, match=r"vllm\.log: RuntimeError: died in the middle"):
        take(base, out, wanted(tmp_path))
    texts, sequences = len(read_texts(out)), len(files.read_sequences(out))
    assert (texts == NUM_PROMPTS) == (dies_at > NUM_PROMPTS)
    assert texts > 0
    assert sequences < NUM_PROMPTS
    assert not (out / SWITCH_NAME).exists()

    log.unlink()
    fake(requests=str(log), ends=ENDS)
    take(base, out, wanted(tmp_path))
    check_complete(out)
    assert asked(log).get(NEW_TOKENS, 0) == NUM_PROMPTS - texts


def test_what_a_killed_client_left_is_used(base: Path, requests: Path, tmp_path: Path) -> None:
    out, index = tmp_path / "capture", tmp_path / "capture" / "index.jsonl"
    take(base, out, wanted(tmp_path))
    kept = index.read_text().splitlines(keepends=True)[:3]
    index.write_text("".join(kept))
    (out / "manifest.json").unlink()
    for name in (SWITCH_NAME, INTACT_NAME, f"{RECORDINGS}/of no line.safetensors"):
        (out / name).touch()
    requests.unlink()
    take(base, out, wanted(tmp_path))
    check_complete(out)
    assert asked(requests) == {1: NUM_PROMPTS - 3}, "all texts were finished"
    assert index.read_text().startswith("".join(kept))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (None, "is in no recording; expected a server that records"),
        ("parts", "is in no recording; expected a server that records"),
        ("full disk", r"could not write what it recorded; make room .*log: OSError: .* No space"),
    ],
)
def test_needs_recording(records: Any, message: str, base: Path, fake: Any, tmp_path: Path) -> None:
    out = tmp_path / "capture"
    fake(records=records, ends=ENDS)
    with pytest.raises(GraftError, match=message):
        take(base, out, wanted(tmp_path))
    assert len(read_texts(out)) == NUM_PROMPTS
    assert not (out / SWITCH_NAME).exists()


def test_other_settings_or_bases_are_not_mixed(base: Path, requests: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "capture", wanted(tmp_path)
    result = take(base, out, settings)
    assert take(base, out, replace(settings, concurrency=7)) == result, "speed is no such setting"
    with pytest.raises(GraftError, match="new_tokens = 3, now it is 4"):
        take(base, out, replace(settings, new_tokens=4))
    with pytest.raises(GraftError, match=r"begun with taps = None, now it is \[0, 2\]"):
        take(base, out, replace(settings, taps=(0, 2)))
    with pytest.raises(GraftError, match="begun with prompts"):
        take(base, out, replace(settings, evaluation_count=2))
    for name in ("tokenizer_config.json", "model-1.safetensors"):
        (base / name).write_bytes(b"another chat template, or other weights")
        with pytest.raises(GraftError, match="begun with base"):
            take(base, out, settings)
        (base / name).unlink()
