"""Fetching by folder or hub id, with the hub's two functions replaced: no network."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.errors import GraftError
from mtp_graft.stages import fetch
from mtp_graft.stages.fetch import fetch_base, fetch_head

REPO = "owner/name"
SHARDS = [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
UPSTREAM = {
    "embed.weight": SHARDS[0],
    "layers.0.mtp.weight": SHARDS[1],  # the head's letters, elsewhere in the name
    "mtp.0.e_proj.weight": SHARDS[2],
    "mtp.0.ffn.experts.0.w1.weight": SHARDS[3],
    "mtp.0.ffn.experts.0.w1.scale": SHARDS[3],
}


class Hub:
    """A hub with one repository, which remembers what it was asked for."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.files = {"config.json": "{}", "model.bin": "", "README.md": "", "tf_model.h5": ""}
        self.asked: list[tuple[str, str | None]] = []
        self.error: Exception | None = None

    def set_index(self, text: str) -> None:
        self.files[INDEX_NAME] = text

    def _answer(self, repo: str, revision: str | None, names: list[str]) -> None:
        self.asked.append((repo, revision))
        if self.error is not None:
            raise self.error
        for name in names:
            (self.cache / name).write_text(self.files[name])

    def hf_hub_download(self, repo: str, name: str, *, revision: str | None = None) -> str:
        self._answer(repo, revision, [name])
        return str(self.cache / name)

    def snapshot_download(
        self, repo: str, *, revision: str | None = None, allow_patterns: list[str]
    ) -> str:
        names = [n for n in self.files if any(fnmatch(n, p) for p in allow_patterns)]
        self._answer(repo, revision, names)
        return str(self.cache)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    cache = tmp_path / "cache"
    cache.mkdir()
    hub = Hub(cache)
    hub.files |= dict.fromkeys(SHARDS, "")
    hub.set_index(json.dumps({"metadata": {}, "weight_map": UPSTREAM}))
    monkeypatch.setattr(fetch, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr(fetch, "snapshot_download", hub.snapshot_download)
    return hub


def fetched(hub: Hub) -> set[str]:
    return {path.name for path in hub.cache.iterdir()}


@pytest.mark.parametrize("fetching", [fetch_base, fetch_head])
def test_a_folder_is_itself_and_the_hub_is_not_asked(
    fetching: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert fetching(str(tmp_path / "model")) == tmp_path / "model"
    assert fetching("~/model") == tmp_path / "model"
    assert fetching("./model").resolve() == tmp_path / "model"
    assert hub.asked == []


@pytest.mark.parametrize("fetching", [fetch_base, fetch_head])
def test_a_folder_that_is_not_there_is_an_error(fetching: Any, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(GraftError, match=f"{name}: not a folder; expected a checkpoint"):
            fetching(str(tmp_path / name))
    assert hub.asked == []


def test_a_base_is_fetched_whole_but_for_other_frameworks(hub: Hub) -> None:
    assert fetch_base(REPO, "abc123") == hub.cache
    assert fetched(hub) == {INDEX_NAME, "config.json", "README.md", *SHARDS}
    assert hub.asked == [(REPO, "abc123")]


def test_of_upstream_only_the_shards_with_the_head_are_fetched(hub: Hub) -> None:
    assert fetch_head(REPO, "abc123") == hub.cache
    assert fetched(hub) == {INDEX_NAME, "config.json", SHARDS[2], SHARDS[3]}
    assert hub.asked == [(REPO, "abc123")] * 2, "another revision's index would name other shards"


def test_upstream_without_a_head_is_an_error_before_its_shards_are_fetched(hub: Hub) -> None:
    without = {name: shard for name, shard in UPSTREAM.items() if not name.startswith("mtp.")}
    hub.set_index(json.dumps({"weight_map": without}))
    with pytest.raises(GraftError, match=rf"{REPO}: its index lists no mtp\.\* tensor; expected"):
        fetch_head(REPO)
    assert fetched(hub) == {INDEX_NAME}


@pytest.mark.parametrize("text", ["<html>", "[]", '{"metadata": {}}'])
def test_an_index_that_is_none_is_an_error(text: str, hub: Hub) -> None:
    hub.set_index(text)
    with pytest.raises(GraftError, match="not a safetensors index"):
        fetch_head(REPO)


@pytest.mark.parametrize("fetching", [fetch_base, fetch_head])
@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no network, and nothing in the cache\nmore about it"),
        OfflineModeIsEnabled("no network, and nothing in the cache"),
        HFValidationError("no network, and nothing in the cache"),
        OSError(28, "no network, and nothing in the cache"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_hub_raises_is_one_line_that_names_the_repository(
    error: Exception, fetching: Any, hub: Hub
) -> None:
    hub.error = error
    with pytest.raises(GraftError) as raised:
        fetching(REPO)
    message = str(raised.value)
    assert message.startswith(f"{REPO}: cannot be fetched from the hub (")
    assert "no network, and nothing in the cache); check the id and the network" in message
    assert "\n" not in message


def test_an_error_without_words_is_named_by_its_type(hub: Hub) -> None:
    hub.error = ConnectionResetError()
    with pytest.raises(GraftError, match=r"from the hub \(ConnectionResetError\)"):
        fetch_base(REPO)
