"""Checkpoints and prompts that others reported, made by ../shared/cases: what is said of them."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_graft.errors import GraftError
from mtp_graft.serving.doctor import diagnose
from mtp_graft.serving.doctor.hardware import find_target
from mtp_graft.stages.calibration import iterate_prompts
from mtp_graft.stages.splice import splice

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
Make = Callable[[str], None]


@pytest.fixture
def make(
    spliced: dict[str, Path], tiny_base: Path, tiny_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Make:  # fmt: skip
    """Return a function that makes a case's input in the working directory."""
    if not CASES.is_dir():
        pytest.skip(f"no reported cases: {CASES} does not exist")
    (tmp_path / "models").mkdir()
    folders = {"base": tiny_base, "upstream": tiny_model / "upstream"}
    for name, folder in {**folders, **{f"grafted-{v}": f for v, f in spliced.items()}}.items():
        (tmp_path / "models" / name).symlink_to(folder)
    tools = (CASES / "_lib/tools.py").read_text().replace("@MODELS@", str(tmp_path / "models"))
    (tmp_path / "tools.py").write_text(tools)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tools", raising=False)
    return lambda case: runpy.run_path(str(next(CASES.glob(f"{case}-*/make.py")))) and None


IGNORED, FUSED = ["ignore-null"], ["expert-target-names"]
MISMATCH = ["scheme-mismatch"]
ACTORDER = ["base-tensor-unknown", "quantization-config"]
UNREADABLE = ["file-unreadable", *["shard-unreadable"] * 4]
PASTED = "a pasted paragraph"
CANADA = ["pattern-names-mtp", "expert-target-names"]


@pytest.mark.parametrize(
    ("case", "folder", "on_gpu", "on_cpu", "spliced_or_why"),
    [
        ("01", "base", [], ["config-dialect"], None),
        ("13", "actorder", ACTORDER, ACTORDER, "actorder: input should be"),
        ("13", "asymmetric", [], ["quantization-config"], None),
        ("13", "asymmetric-in-config-only", MISMATCH, MISMATCH, "int4-asymmetric; expected int4"),
        ("02", "base", IGNORED, IGNORED, None),
        ("02", "grafted", IGNORED, IGNORED, "already has a head"),
        ("03", "base", ["quantization-config"], ["quantization-config"], "is no regular expr"),
        ("05", "base", [], [], None),
        ("05", "base-first", FUSED, FUSED, None),
        ("06", "ckpt", CANADA, ["head-tensor-unknown", *CANADA], "already has a head"),
        ("09", "base", ["foreign-format"], ["foreign-format"], "is NVIDIA ModelOpt's"),
        ("15", "only-tokenizer", UNREADABLE[:1], UNREADABLE[:1], "already has a head"),
        ("15", "ckpt", UNREADABLE, UNREADABLE, "git-lfs pointer"),
        ("10", "official", ["foreign-format"], ["foreign-format"], "is DeepSeek's own"),
    ],
)
def test_a_reported_checkpoint_has_these_findings_and_is_spliced_or_refused(
    make: Make, tiny_model: Path, case: str, folder: str, on_gpu: list[str], on_cpu: list[str],
    spliced_or_why: str | None,
) -> None:  # fmt: skip
    make(case)
    for gpu, expected in (("H200", on_gpu), ("cpu", on_cpu)):
        found = diagnose(Path(folder), find_target(gpu=gpu))
        assert [f.id for f in found if f.severity != "note"] == expected
    if spliced_or_why is None:
        splice(Path(folder), tiny_model / "upstream", Path("out"), "mxfp4")
        return
    with pytest.raises(GraftError, match=spliced_or_why):
        splice(Path(folder), tiny_model / "upstream", Path("out"), "mxfp4")


@pytest.mark.parametrize(
    ("case", "file", "found"),
    [
        ("19", "prompts.jsonl", ["first line\u2028second line", "old mainframe\u0085text"]),
        ("19", "chats.jsonl", [({"role": "user", "content": f"Summarize:\u2028{PASTED}"},)]),
        ("20", "parts.jsonl", "messages.0.content: input should be a valid string"),
        ("20", "null.jsonl", "messages.1.content: input should be a valid string"),
        ("20", "text-null.jsonl", "text: input should be a valid string"),
    ],
)
def test_read_whole_or_refused(make: Make, case: str, file: str, found: list[object] | str) -> None:
    make(case)
    if isinstance(found, list):
        assert [prompt.content for prompt in iterate_prompts(file)] == found
        return
    with pytest.raises(GraftError, match=found):
        list(iterate_prompts(file))
