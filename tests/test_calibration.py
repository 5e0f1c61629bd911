"""Loading prompts, and the bundled sets of them."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mtp_graft.errors import GraftError
from mtp_graft.serving.prompts import ChatPrompt, Prompt, load_prompts
from mtp_graft.stages import calibration
from mtp_graft.stages.calibration import load_calibration


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def chat(name: str, *contents: str) -> dict[str, Any]:
    """Return a row as in ultrachat_200k, user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    return {"prompt_id": name, "prompt": contents[0], "messages": messages}


def test_texts_and_conversations_may_be_mixed(tmp_path: Path) -> None:
    rows = {"id": "t", "text": "abc"}, "", chat("c", "q1", "a1", "q2", "a2")
    text, conversation = load_calibration(write(tmp_path / "p.jsonl", *rows))
    assert text == Prompt("t", "abc")
    assert isinstance(conversation, ChatPrompt)
    assert [m["content"] for m in conversation.messages] == ["q1", "a1", "q2"]


def test_count_and_skip_choose_rows_that_do_not_overlap(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *({"id": i, "text": "x"} for i in range(7)))
    first = load_calibration(path, count=4)
    then = load_calibration(path, count=3, skip=4)
    assert [p.id for p in first + then] == list("0123456")
    assert load_calibration(str(path), skip=4) == then
    with pytest.raises(GraftError, match=r"3 prompts after the first 4, expected 4; ask for fewer"):
        load_calibration(path, count=4, skip=4)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", r"p\.jsonl:2: not JSON"),
        ({"id": "b"}, r"p\.jsonl:2: not a prompt \(has no 'text'\)"),
        ("7", r"p\.jsonl:2: not a prompt"),
        ({"id": "a", "text": "y"}, r"p\.jsonl:2: id 'a' comes twice"),
        ({"id": "b", "text": ""}, r"p\.jsonl:2: prompt 'b' asks nothing"),
        ({"prompt_id": "b", "messages": [{"role": "system", "content": "s"}]}, "asks nothing"),
        ({"prompt_id": "b", "messages": [{"role": "user"}]}, "not a prompt"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path: Path, row: Any, said: str) -> None:
    path = write(tmp_path / "p.jsonl", {"id": "a", "text": "x"}, row)
    with pytest.raises(GraftError, match=said):
        load_calibration(path)


def test_a_missing_and_an_empty_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="not readable"):
        load_calibration(tmp_path / "none.jsonl")
    with pytest.raises(GraftError, match="0 prompts"):
        load_calibration(write(tmp_path / "p.jsonl"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in hub with one data set, whose "Parquet" files are JSON; returns the fetched."""
    import huggingface_hub

    fetched: list[str] = []
    files = {
        "data/train_sft-00001-of-00002-b.parquet": [chat("r2", "q2", "a2")],
        "data/train_sft-00000-of-00002-a.parquet": [chat("r0", "q0", "a0"), chat("r1", "q1")],
        "data/test_sft-00000-of-00001-c.parquet": [chat("held out", "q")],
        "README.md": [],
    }

    class Api:
        def list_repo_files(self, repo: str, repo_type: str) -> list[str]:
            assert (repo, repo_type) == ("HuggingFaceH4/ultrachat_200k", "dataset")
            return list(files)

    def download(_repo: str, file: str, repo_type: str) -> str:
        assert repo_type == "dataset"
        fetched.append(file)
        return str(write(tmp_path / Path(file).name, *files[file]))

    class ParquetFile:
        def __init__(self, path: Path) -> None:
            self.rows = [json.loads(line) for line in path.read_text().splitlines()]

        def iter_batches(self, batch_size: int) -> list[Any]:
            return [SimpleNamespace(to_pylist=lambda row=row: [row]) for row in self.rows]

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    arrow, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    arrow.ArrowException = type("ArrowException", (Exception,), {})  # type: ignore[attr-defined]
    parquet.ParquetFile = ParquetFile  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    return fetched


def test_the_hubs_files_are_read_in_order_and_only_as_far_as_needed(hub: list[str]) -> None:
    prompts = load_calibration("hub:HuggingFaceH4/ultrachat_200k", count=2)
    assert [p.id for p in prompts] == ["r0", "r1"]
    assert len(hub) == 1
    assert [p.id for p in load_calibration("hub:HuggingFaceH4/ultrachat_200k", skip=1)] == [
        "r1",
        "r2",
    ]


def test_another_split_of_the_hub_can_be_named(hub: list[str]) -> None:
    (prompt,) = load_calibration("hub:HuggingFaceH4/ultrachat_200k:test_sft")
    assert prompt.id == "held out"
    with pytest.raises(GraftError, match=r"no Parquet files of split 'x', found \['test_sft', "):
        load_calibration("hub:HuggingFaceH4/ultrachat_200k:x")


def test_a_hub_that_cannot_be_reached_is_one_error(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(_file: str, *_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(GraftError, match=r"ultrachat_200k: not available \(no route to host\)"):
        load_calibration("hub:HuggingFaceH4/ultrachat_200k")


def test_without_pyarrow_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(GraftError, match="pyarrow is not installed; pip install"):
        load_calibration(write(tmp_path / "p.parquet"))
    assert calibration.DEFAULT_SPLIT == "train_sft"


@pytest.fixture(scope="module")
def maker(tiny_model: Path) -> ModuleType:
    """The script that makes the bundled sets."""
    spec = importlib.util.spec_from_file_location("prompts", tiny_model / "make" / "prompts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bundled_sets_are_what_their_script_makes(
    maker: ModuleType, tiny_model: Path, tmp_path: Path
) -> None:
    maker.write(tmp_path)
    for name in ("calibration.jsonl", "evaluation.jsonl"):
        assert (tmp_path / name).read_bytes() == (tiny_model / name).read_bytes()


def test_the_bundled_sets_do_not_overlap(maker: ModuleType, tiny_model: Path) -> None:
    texts = [
        [p.text for p in load_prompts(tiny_model / f"{name}.jsonl")]
        for name in ("calibration", "evaluation", "prompts")
    ]
    assert list(map(len, texts)) == [96, 144, 28]
    flat = [text for each in texts for text in each]
    assert len(set(flat)) == len(flat)
    templates = [t.splitlines() for t in maker.SETS.values()]
    assert list(map(len, templates)) == [24, 24]
    assert len({t for each in templates for t in each}) == 48
    assert all(text.count("[") == text.count("@") == 0 for text in flat)
