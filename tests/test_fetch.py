"""Fetching by folder or hub id: from a stand-in for the hub on this machine, no network."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from hub_stand_in import BASE, COMMIT, UPSTREAM, StandInHub
from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.errors import GraftError
from mtp_graft.pipeline import find_bundled_recipe
from mtp_graft.pipeline.plan import plan_run
from mtp_graft.pipeline.run import run_stage
from mtp_graft.recipe import ModelSection, Recipe, load_recipe
from mtp_graft.stages import fetch as stage
from mtp_graft.stages.fetch import fetch, find_sources
from serving.bench_server import quiet

MODEL = ModelSection(name="grafted", base=BASE, upstream=UPSTREAM)
SHARDS = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]


def test_only_what_is_needed_and_announced_is_fetched(hub: StandInHub, tmp_path: Path) -> None:
    other = {"layers.0.mtp.weight": "layers.safetensors"}  # the head's letters, elsewhere
    hub.change(UPSTREAM, INDEX_NAME, lambda index: index["weight_map"].update(other))
    needed = {repo: {**hub.repositories[repo]} for repo in (BASE, UPSTREAM)}
    hub.repositories[BASE] |= {"consolidated.safetensors": b"in no index", "model.bin": b"other"}
    hub.repositories[UPSTREAM] |= {"layers.safetensors": b"no head", "tokenizer.json": b"{}"}
    sources = dict(zip((BASE, UPSTREAM), find_sources(MODEL), strict=True))
    assert hub.downloads(".safetensors") == 0
    total = sum(len(c) for n, c in needed[UPSTREAM].items() if n.endswith(".safetensors"))
    assert sources[UPSTREAM].bytes_to_download == total

    steps: list[tuple[str, int, int]] = []
    found = fetch(MODEL, tmp_path / "out", lambda *step: steps.append(step))
    for repo, folder in zip((BASE, UPSTREAM), found, strict=True):
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == needed[repo]
        assert sources[repo].sizes == {name: len(c) for name, c in needed[repo].items()}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["base_commit"] == report["upstream_commit"] == COMMIT
    done = [step[1:] for step in steps if step[0] == f"fetch: {UPSTREAM}"]
    assert done == sorted(done) and done[0] == (0, total) and done[-1] == (total, total)


@pytest.mark.parametrize(
    ("revision", "offline"), [(None, True), ("v2", False), ("v2", True), (COMMIT, True)]
)
def test_a_full_cache_needs_no_network_by_branch_or_commit(
    hub: Any, monkeypatch: pytest.MonkeyPatch, revision: Any, offline: bool
) -> None:
    model = ModelSection(name="m", base=BASE, upstream=UPSTREAM, base_revision=revision)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the client's attempts
    first = fetch(model, Path("out"), quiet)
    if revision == "v2":  # a branch
        assert ("GET", f"/api/models/{BASE}/revision/v2") in hub.asked
    hub.asked.clear()
    assert fetch(model, Path("out"), quiet) == first
    assert hub.asked == [], "it was fetched before"
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):  # where nobody listens
        monkeypatch.setattr(constants, name, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert fetch(model, Path("another run"), quiet) == first
    (first.base / SHARDS[1]).unlink()
    with pytest.raises(GraftError, match=rf"{BASE}: cannot be fetched from the hub"):
        fetch(model, Path("third run"), quiet)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("busy", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"RateLimit": '"resolvers";r=0;t=7'}, 7),
        ({"Retry-After": "soon"}, 1),
        ({"Retry-After": "86400"}, None),
        ({"Retry-After": "Wed, 21 Oct 2150 07:28:00 GMT"}, None),
    ],
)
def test_a_hub_that_is_asked_too_often_is_waited_for_and_that_is_said(
    busy: Any, seconds: Any, hub: StandInHub, recipe: Recipe, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    hub.busy = busy
    if seconds is None:
        said = r"too many requests \(429\); [\d,]{6,} s to wait: run"
        with pytest.raises(GraftError, match=said):
            fetch(MODEL, Path("out"), quiet)
        assert slept == []
        return
    assert plan_run(recipe, Path("run"), ["fetch", "splice"])["inputs"] == "fit"
    first = fetch(MODEL, Path("out"), quiet)
    assert (first.base / SHARDS[1]).read_bytes() == hub.repositories[BASE][SHARDS[1]]
    assert set(slept) == {seconds} and len(slept) > 20, "every kind of request, once"
    assert caplog.text.count(f"(429); {seconds} s to wait") == len(slept)


@pytest.mark.parametrize(
    ("base", "upstream", "card", "releases"),
    [
        ("pasta-paul/DeepSeek-V4-Flash-W4A16-FP8", "deepseek-ai/DeepSeek-V4-Flash-0731", "", "v4"),
        ("me/DeepSeek-V4-Flash-0731-W4A16", "deepseek-ai/DeepSeek-V4-Flash-DSpark", "", "0731"),
        ("me/mine", "deepseek-ai/DeepSeek-V4-Flash", "base_model: a/DeepSeek-V4-Pro", "pro"),
        ("me/mine", "a/DeepSeek-V4.1-Flash", "base_model: [a/DeepSeek-V4-Flash]", "v4.1"),
        ("me/DeepSeek-V4-Flash-0731", "a/DeepSeek-V4-Flash", "base_model: a/DeepSeek-V4-Flash", ""),
        ("pasta-paul/DeepSeek-V4-Flash-W4A16-FP8", "a/DeepSeek-V4-Flash-DSpark", "", ""),
        ("me/mine", "deepseek-ai/DeepSeek-V4-Flash-0731", "base_model: [1, null]", ""),
        ("me/mine", "deepseek-ai/DeepSeek-V4-Flash-0731", "base_model: [", ""),
    ],
)
def test_another_release_is_warned_of_where_names_tell(
    base: str, upstream: str, card: str, releases: str, tmp_path: Path, caplog: Any
) -> None:
    for name in ("base", "upstream"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "README.md").write_text(f"---\n{card}\n---\n")
    given = ((base, tmp_path / "base"), (upstream, tmp_path / "upstream"))
    stage.warn_of_releases(*(stage.Source(*each, None, {}, {}) for each in given))
    assert releases in caplog.text and bool(caplog.text) == bool(releases)


def test_a_date_to_wait_for_is_read() -> None:
    for wait in (0, 60):
        headers = {"Retry-After": formatdate(time.time() + wait, usegmt=True)}
        assert wait - 1 <= stage._asked_wait(headers) <= wait + 1


@given(st.lists(st.text() | st.integers(-5, 2000).map(str), max_size=8))
def test_every_429_is_waited_for_as_asked_or_refused(asked: list[str]) -> None:
    request = SimpleNamespace(method="GET", url=SimpleNamespace(host="hub"))
    busy = [Mock(status_code=429, headers={"Retry-After": seconds}) for seconds in asked]
    send, slept = Mock(side_effect=[*busy, Mock(status_code=200)]), list[float]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", slept.append)
        try:
            assert stage._send(send, request).status_code == 200 and len(slept) == len(asked)
        except GraftError as error:
            assert re.search(r"\(429\); [\d,]+ s to wait: run again", str(error))
    for seconds, told in zip(slept, asked, strict=False):
        assert (int(told) if told.isdecimal() else 1) <= seconds <= 900


@pytest.mark.parametrize("where", ["on the way", "in the cache"])
def test_bytes_not_as_announced_are_removed(where: str, hub: StandInHub, tmp_path: Path) -> None:
    if where == "on the way":
        hub.wrong = {SHARDS[0]}
    else:
        blob = (fetch(MODEL, tmp_path / "first", quiet).base / SHARDS[0]).resolve()
        blob.write_bytes(b"x" + blob.read_bytes()[1:])
    said = rf"sha256 is \w+, expected \w+ by the hub, for {SHARDS[0]}"
    with pytest.raises(GraftError, match=said):
        fetch(MODEL, tmp_path / "out", quiet)
    hub.wrong = set()
    again = fetch(MODEL, tmp_path / "out", quiet)
    shutil.rmtree(again.base)
    assert fetch(MODEL, tmp_path / "out", quiet) == again, "what has gone is fetched again"
    assert (again.base / SHARDS[0]).read_bytes() == hub.repositories[BASE][SHARDS[0]]


def lose(repo: str, file: str) -> Callable[[StandInHub], object]:
    return lambda hub: hub.repositories[repo].pop(file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda hub: hub.change(UPSTREAM, INDEX_NAME, lambda i: i["weight_map"].clear()),
            rf"{UPSTREAM}: its index lists no mtp\.\* tensor; expected the upstream",
        ),
        (lose(BASE, SHARDS[1]), rf"{BASE}: has no {SHARDS[1]}, .* another revision"),
        (lose(UPSTREAM, "config.json"), f"{UPSTREAM}: has no config.json; expected"),
        (lambda hub: hub.repositories.pop(BASE), rf"{BASE}: cannot be fetched .*check the id"),
    ],
)
def test_incomplete_is_refused(damage: Any, message: str, hub: StandInHub, tmp_path: Path) -> None:
    damage(hub)
    with pytest.raises(GraftError, match=message):
        fetch(MODEL, tmp_path / "out", quiet)
    assert hub.downloads(".safetensors") == 0


def test_needs_disk_room(hub: StandInHub, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(GraftError, match=r"hub: 1,000 bytes free, .*still to be downloaded"):
        run_stage(recipe, Path("run"), "fetch", quiet)
    assert hub.downloads(".safetensors") == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("no network\nmore about it"), r"from the hub \(no network\); check"),
        (OSError(28, "No space left"), r"the disk of .*hub is full; make room or set HF_HOME"),
    ],
)
def test_any_error_is_told(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.hub, "snapshot_download", Mock(side_effect=error))
    with pytest.raises(GraftError, match=message):
        fetch(MODEL, Path("out"), quiet)


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(find_bundled_recipe(), [f"model.base={BASE}", f"model.upstream={UPSTREAM}"])


MORE = {"layers.0.x": SHARDS[0]}


@pytest.mark.parametrize(
    ("file", "change", "refusal"),
    [
        ("config.json", lambda c: c.update(model_type="llama"), "model_type is 'llama', expe"),
        ("config.json", lambda c: c.update(vocab_size=7), r"embed.weight.*\[7, "),
        (INDEX_NAME, lambda i: i["weight_map"].update(MORE), r"layers\.0\.x: not in .*index.json"),
    ],
)
def test_fails_early(file: str, change: Any, refusal: str, hub: StandInHub, recipe: Recipe) -> None:
    assert plan_run(recipe, Path("run"), ["fetch", "splice"])["inputs"] == "fit"
    hub.change(BASE, file, change)
    shutil.rmtree(constants.HF_HUB_CACHE)
    told = plan_run(recipe, Path("run"), ["fetch", "splice"])["inputs"]
    with pytest.raises(GraftError, match=refusal) as raised:
        run_stage(recipe, Path("run"), "fetch", quiet)
    assert str(raised.value) == told
    assert re.match(f"{BASE}|{UPSTREAM}", told), "by its id, not by where the header is"
    assert hub.downloads(".safetensors") == 0


def test_a_web_page_as_a_shard_is_refused(hub: StandInHub, recipe: Recipe, tmp_path: Path) -> None:
    hub.repositories[BASE][SHARDS[0]] = b"<html>" + hub.repositories[BASE][SHARDS[0]]
    with pytest.raises(GraftError, match=f"{BASE}/{SHARDS[0]}: .*safetensors"):
        run_stage(recipe, tmp_path / "run", "fetch", quiet)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("pipe.jsonl", "pipe.jsonl: not a file"),
        ("one.jsonl", "one.jsonl: 1 prompts, expected"),
        ("cut.jsonl", "cut.jsonl:1: not JSON"),
        ("hub:owner/chats", None),
    ],
)
@pytest.mark.parametrize("key", ["capture.calibration_prompts", "bench.prompts"])
def test_dry_run_sees_prompts(key: str, prompts: str, message: str | None, hub: StandInHub) -> None:
    os.mkfifo(Path("pipe.jsonl"))
    Path("one.jsonl").write_text('{"id": "a", "text": "b"}\n')
    Path("cut.jsonl").write_text('{"id": "a", "text')
    value = prompts if prompts.startswith("hub:") else Path() / prompts
    asked, stage = load_recipe(find_bundled_recipe(), [f"{key}={value}"]), key.partition(".")[0]
    told = plan_run(asked, Path("run"), [stage])["inputs"]
    assert told == "fit" if message is None else re.search(message, told), told
    assert plan_run(asked, Path("run"), ["splice"])["inputs"] == "fit"
    assert hub.asked == []
