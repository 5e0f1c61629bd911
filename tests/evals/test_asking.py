"""Servers that fail, and mistakes of users; see test_killed.py for clients that are killed."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mtp_graft.bench import streams

from .chat_server import ChatServer, Message, serving
from .conftest import Run


def right(text: str) -> str:
    """Answer a question of `own_gsm8k`."""
    return f"#### {10 * int(text.split()[2].rstrip('?'))}"


def question_of(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"]).partition("\n")[0]


def asked(server: ChatServer) -> Counter[str]:
    return Counter(map(question_of, server.bodies))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let failed requests be asked again almost at once."""
    monkeypatch.setattr(
        "mtp_graft.cli.target.Target.retrying",
        lambda target: streams.Retrying(target.attempts, wait_s=0.01),
    )


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        ("500", "refused"),
        ("hangs", "timeout"),
        ("closes", "connection"),
        ("garbage", "broken"),
        ("aborts", "broken"),
        ({"content": ["#### 30"]}, "broken"),
        ({"content": 30}, "broken"),
    ],
)
def test_a_failed_request_is_counted_and_asked_again_and_no_wrong_answer(
    run: Run, own_gsm8k: Path, failure: str | Message, kind: str
) -> None:
    seen: Counter[str] = Counter()

    def say(text: str) -> str | Message:
        seen[text] += 1
        return failure if "times 3?" in text and seen[text] < 3 else right(text)

    arguments = ("--data-dir", own_gsm8k, "--limit", 12, "--silence-s", 1, "--json", "-")
    with serving(say) as server:
        status, out, errors = run("bench", "gsm8k", "--base-url", server.url, *arguments)
    assert status == 0, errors
    result = json.loads(out)
    assert (result["correct"], result["failures"]) == (12, [])
    assert result["retried"] == {kind: 2}
    assert asked(server)["Ten times 3?"] == 3 and asked(server).total() == 14


def test_questions_without_an_answer_end_the_run_and_a_second_one_asks_only_those(
    run: Run, own_gsm8k: Path, tmp_path: Path
) -> None:
    broken = True

    def say(text: str) -> str:
        return "500" if broken and ("times 3?" in text or "times 9?" in text) else right(text)

    folder = tmp_path / "run"
    with serving(say) as server:
        command = ("bench", "gsm8k", "--base-url", server.url, "--data-dir", own_gsm8k)
        command += ("--limit", 12, "--attempts", 2, "--json", tmp_path / "result.json")
        status, out, errors = run(*command, "--run", folder)
        assert (status, out) == (1, "")
        last = errors.splitlines()[-1]
        assert last.startswith("error: gsm8k: 2 of 12 questions left: gsm8k/")
        assert "status 500" in last
        assert f"answered ones are in {folder / 'bench' / 'gsm8k'}: run the same command" in last
        assert not (tmp_path / "result.json").exists()
        assert asked(server).total() == 10 + 2 * 2

        broken = False
        server.bodies.clear()
        status, _, errors = run(*command, "--run", folder)
        assert status == 0, errors
        assert asked(server) == {"Ten times 3?": 1, "Ten times 9?": 1}
        assert json.loads((tmp_path / "result.json").read_text())["correct"] == 12

        server.bodies.clear()
        assert run(*command, "--run", folder)[0] == 0
        assert server.bodies == [], "it was finished"


def test_a_server_that_is_gone_is_not_asked_every_question(run: Run, own_gsm8k: Path) -> None:
    with serving(lambda _text: "500") as server:
        status, _, errors = run(
            *("bench", "gsm8k", "--base-url", server.url, "--data-dir", own_gsm8k),
            *("--limit", 12, "--concurrency", 1),
        )
    assert status == 1
    assert "12 of 12 questions left" in errors
    assert "give --run DIR to be able to go on" in errors
    assert len(asked(server)) == 3


def test_answers_of_another_server_or_other_settings_are_not_mixed(
    run: Run, own_gsm8k: Path, tmp_path: Path
) -> None:
    with serving(right) as server, serving(right) as other:
        command = ("bench", "gsm8k", "--data-dir", own_gsm8k, "--run", tmp_path / "run")
        assert run(*command, "--base-url", server.url, "--limit", 6)[0] == 0
        for change in (
            ("--base-url", server.url, "--limit", 7),
            ("--base-url", server.url, "--limit", 6, "--seed", 1),
            ("--base-url", server.url, "--limit", 6, "--thinking"),
            ("--base-url", server.url, "--limit", 6, "--max-tokens", 9),
            ("--base-url", server.url, "--limit", 6, "--concurrency", 1),
            ("--base-url", other.url, "--limit", 6),
        ):
            status, _, errors = run(*command, *change)
            assert status == 1
            assert "was begun with" in errors and "use another --run" in errors
        (own_gsm8k / "gsm8k" / "test.jsonl").write_text(
            "".join(json.dumps({"question": f"{i}?", "answer": "#### 1"}) + "\n" for i in range(12))
        )
        status, _, errors = run(*command, "--base-url", server.url, "--limit", 6)
        assert status == 1 and "was begun with questions" in errors


def test_several_are_asked_at_a_time(run: Run, own_gsm8k: Path) -> None:
    with serving(right, delay_s=0.5) as server:
        started = time.monotonic()
        status, _, _ = run(
            *("bench", "gsm8k", "--base-url", server.url, "--data-dir", own_gsm8k),
            *("--limit", 12, "--concurrency", 6),
        )
        taken = time.monotonic() - started
    assert status == 0
    assert taken < 12 * 0.5 / 2


def test_thinking_is_said_explicitly_and_its_field_is_read(run: Run, own_gsm8k: Path) -> None:
    def say(text: str) -> dict[str, Any]:
        if "times 1?" in text:  # the content counts, where there is one
            return {"content": "#### 1", "reasoning": right(text)}
        return {"content": None, "reasoning": right(text)}

    with serving(say) as server:
        status, out, _ = run(
            *("bench", "gsm8k", "--base-url", server.url, "--data-dir", own_gsm8k),
            *("--limit", 12, "--thinking", "--json", "-"),
        )
    result = json.loads(out)
    assert status == 0
    assert [failure["id"] for failure in result["failures"]] == ["gsm8k/1"]
    assert all(body["chat_template_kwargs"] == {"thinking": True} for body in server.bodies)


def test_the_key_is_shown_and_the_result_is_kept(run: Run, own_gsm8k: Path, tmp_path: Path) -> None:
    with serving(right) as server:
        status, out, errors = run(
            *("bench", "gsm8k", "--base-url", server.url, "--data-dir", own_gsm8k),
            *("--limit", 12, "--run", tmp_path),
        )
    assert status == 0
    assert "100.0 %" in out and "12 of 12" in out
    assert "asking" in errors
    assert json.loads((tmp_path / "bench" / "gsm8k" / "result.json").read_text())["correct"] == 12


def test_half_a_surrogate_pair_in_an_answer_does_no_harm(run: Run, own_gsm8k: Path) -> None:
    with serving(lambda _text: "what\ud800") as server:
        status, out, errors = run(
            *("bench", "gsm8k", "--base-url", server.url, "--data-dir", own_gsm8k),
            *("--limit", 12, "--json", "-"),
        )
    assert status == 0, errors
    assert {failure["detail"] for failure in json.loads(out)["failures"]} == {"what?"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gsm8k", "--limit", 13), "GSM8K has 12 questions, --limit asks for 13"),
        (("mmlu",), "no *_test.csv; expected one a subject"),
        (("humaneval",), "HumanEval.jsonl.gz: not readable"),
        (("humaneval", "--sandbox-without", "chroot"), "'chroot' is unknown"),
        (("gsm8k", "--run", "FILE"), "error: "),
    ],
)
def test_a_mistake_is_one_message_before_anything_is_asked(
    run: Run, own_gsm8k: Path, tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    (tmp_path / "file").touch()
    name, *rest = [tmp_path / "file" if word == "FILE" else word for word in arguments]
    with serving(right) as server:
        status, out, errors = run(
            *("bench", name, "--base-url", server.url, "--data-dir", own_gsm8k, *rest)
        )
    assert (status, out, server.bodies) == (1, "", [])
    assert message in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("name", ["gsm8k", "humaneval", "mmlu", "capability"])
def test_wrong_usage_is_status_2(run: Run, name: str) -> None:
    assert run("bench", name)[0] == 2
    assert run("bench", name, "--base-url", "u", "--checkpoint", "c")[0] == 2


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['mtp-graft', 'bench', 'humaneval', '--help']\n"
        "from mtp_graft.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'httpx', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--sandbox-without" in done.stdout
