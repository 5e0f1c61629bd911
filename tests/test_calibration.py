"""Loading prompts, and the bundled sets of them."""

import json
import os
import sys
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from hub_stand_in import StandInHub
from mtp_graft.errors import GraftError
from mtp_graft.serving.client import Prompt
from mtp_graft.stages.calibration import iterate_prompts, load_calibration
from run_folder import write_rows as write
from serving.doctor_defects import LFS_POINTER

HUB = "hub:HuggingFaceH4/ultrachat_200k"


def chat(name: str, *contents: str) -> dict[str, Any]:
    """Return a row as in ultrachat_200k, user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    return {"prompt_id": name, "prompt": contents[0], "messages": messages}


def test_texts_and_conversations_may_be_mixed(tmp_path: Path) -> None:
    both = chat("c", "q1", "a1", "q2", "a2") | {"text": None}
    first = {"id": 7, "text": "a\u2028b", "messages": None}
    rows = json.dumps(first), "", first | {"id": "the same"}, both
    text, conversation = load_calibration(write(tmp_path / "p.jsonl", *rows), 2)
    assert text == Prompt("7", "a\u2028b")
    assert [m["content"] for m in conversation.content if isinstance(m, dict)] == ["q1", "a1", "q2"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"p\.jsonl:2: not JSON"),
        ("[" * 100_000, r"p\.jsonl:2: not JSON \(recursion limit"),
        ('{"id": "b", "text": "\\ud800"}', r"p\.jsonl:2: not JSON \(.*hex escape"),
        ({"text": "b"}, r"p\.jsonl:2: not a prompt \(.*id: field required\)"),
        ({"id": "b", "text": ["y"]}, r"p\.jsonl:2: not a prompt \(text: input should be"),
        ("7", r"p\.jsonl:2: not a prompt"),
        ({"id": "a", "text": "y"}, r"p\.jsonl:2: id 'a' comes twice"),
        ({"id": "b", "text": ""}, r"p\.jsonl:2: prompt 'b' asks nothing"),
        ({"prompt_id": "b", "messages": [{"role": "system", "content": "s"}]}, "asks nothing"),
        ("", r"1 prompts, expected 2; ask for fewer"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path: Path, row: Any, message: str) -> None:
    source = write(tmp_path / "p.jsonl", {"id": "a", "text": "x"}, row)
    with pytest.raises(GraftError, match=message):
        load_calibration(source, 2)


NO_TEXT = st.sampled_from([None, 5, True, {"text": "x"}, ["x"], [{"type": "text", "text": "x"}]])
CONTENT = st.text(st.characters(codec="utf-8"), min_size=1) | NO_TEXT
ROLE = st.sampled_from(["system", "user", "assistant", "tool"])


@given(st.lists(st.fixed_dictionaries({"role": ROLE}, optional={"content": CONTENT}), min_size=1))
def test_contents_of_messages_are_their_text_or_refused(messages: list[dict[str, Any]]) -> None:
    contents = [message.get("content") for message in messages]
    with TemporaryDirectory() as name:
        source = write(Path(name) / "p.jsonl", {"prompt_id": "a", "messages": messages})
        try:
            (said,) = (prompt.content for prompt in iterate_prompts(source))
        except GraftError as error:
            assert "asks nothing" in str(error) or not all(isinstance(c, str) for c in contents)
            return
    assert [m["content"] for m in said if isinstance(m, dict)] == contents[: len(said)]


def test_an_unreadable_source_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    os.mkfifo(tmp_path / "pipe.jsonl")
    for source, message in {
        str(tmp_path / "pipe.jsonl"): "not a file; expected prompts",
        write(tmp_path / "empty.jsonl", ""): "no prompts",
        write(tmp_path / "lfs.jsonl", LFS_POINTER.decode()): "a git-lfs pointer: run `git lfs",
        str(tmp_path / "none.jsonl"): "not readable",
        write(tmp_path / "p.parquet"): "pyarrow is not installed; pip install",
    }.items():
        with pytest.raises(GraftError, match=message):
            load_calibration(source, 1)


def test_a_hubs_data_set_again_offline(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "data/train_sft-00001-of-00002-b.parquet": [chat("r2", "q2", "a2")],
        "data/train_sft-00000-of-00002-a.parquet": [chat("r0", "q0", "a0"), chat("r1", "q1")],
        "data/test_sft-00000-of-00001-c.parquet": [chat("held out", "q")],
    }
    files = {"README.md": b"Chats"}
    for name, held in rows.items():
        table, written = pyarrow.Table.from_pylist(held), pyarrow.BufferOutputStream()
        parquet.write_table(table, written)
        files[name] = written.getvalue().to_pybytes()
    hub.repositories[HUB.removeprefix("hub:")] = files
    assert [p.id for p in load_calibration(HUB, 2)] == ["r0", "r1"]
    assert hub.downloads(".parquet") == 1
    with pytest.raises(GraftError, match=r"no Parquet files of split 'x', found \['test_sft', "):
        load_calibration(f"{HUB}:x", 1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [p.id for p in load_calibration(HUB, 2)] == ["r0", "r1"]
    for source in (f"{HUB}:test_sft", HUB.upper().replace("HUB", "hub", 1)):
        with pytest.raises(GraftError, match=rf"{source}: cannot be fetched from the hub"):
            load_calibration(source, 1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert [p.id for p in islice(iterate_prompts(HUB), 1, None)] == ["r1", "r2"]
    assert [p.id for p in iterate_prompts(f"{HUB}:test_sft")] == ["held out"]


def test_the_bundled_sets_do_not_overlap(tiny_model: Path) -> None:
    names = ("calibration", "evaluation", "prompts")
    texts = [p.content for n in names for p in iterate_prompts(str(tiny_model / f"{n}.jsonl"))]
    assert len(set(texts)) == len(texts) == 96 + 144 + 28
