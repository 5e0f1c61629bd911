"""Text with any Unicode line separator comes back whole from each reader of lines of JSON."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import http_stand_in
from mtp_graft.bench.evals.tasks import load_task
from mtp_graft.checkpoint.capture import FinishedText, append_row, read_texts
from mtp_graft.checkpoint.files import write_json
from mtp_graft.cli.output import show
from mtp_graft.serving.client import ServerClient
from mtp_graft.stages.calibration import load_calibration

SEPARATORS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


class Echo(http_stand_in.Handler):
    """Streams what was asked as one event, a byte at a time."""

    def do_POST(self) -> None:
        event = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for byte in b"data: " + event + b"\r\n\r\ndata: [DONE]\n\n":
            self.wfile.write(bytes([byte]))


def streamed(text: str, _folder: Path) -> str:
    with http_stand_in.serving(Echo) as url, ServerClient(url) as client:
        [event] = client.events("/", {"text": text, "error": None, "stream": True})
    return event["text"]


def written(folder: Path, **row: str) -> Path:
    (folder / "gsm8k").mkdir(exist_ok=True)
    (file := folder / "gsm8k/test.jsonl").write_text(json.dumps(row, ensure_ascii=False), "utf-8")
    return file


def calibration(text: str, folder: Path) -> str | object:
    return load_calibration(str(written(folder, id="a", text=text)), 1)[0].content


def question(text: str, folder: Path) -> str:
    written(folder, question=text, answer="#### 1")
    return str(load_task("gsm8k", folder, None, 0).dataset[0].input)[: len(text)]


def captured(text: str, folder: Path) -> str:
    append_row(folder, FinishedText(0, text, "calibration", (1,), (2,)))
    return read_texts(folder)[0].id


@pytest.mark.parametrize("read", [streamed, calibration, question, captured])
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.sampled_from(SEPARATORS) | st.characters(exclude_categories=["Cs"])))
@example(SEPARATORS)
def test_texts_come_back_whole(read: Callable[[str, Path], str], tmp_path: Path, text: str) -> None:
    assert read(f"<{text}>", tmp_path) == f"<{text}>"


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary())
def test_names_of_files_that_are_no_text_come_back_from_what_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: bytes
) -> None:
    given, files = os.fsdecode(name), (tmp_path / "shown.json", tmp_path / "written.json")
    show({"name": given}, files[0], given)
    write_json({"name": given}, files[1])
    assert [json.loads(file.read_text("utf-8"))["name"] for file in files] == [given] * 2
    capfd.readouterr().out.encode()
