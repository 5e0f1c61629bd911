"""Fetching by folder or hub id: from a stand-in for the hub on this machine, no network."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hub_stand_in import COMMIT, StandInHub, as_repository, in_place_of_the_hub
from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.errors import GraftError
from mtp_graft.pipeline import find_bundled_recipe, plan_run, run_stage
from mtp_graft.recipe import ModelSection, load_recipe
from mtp_graft.stages import fetch as stage
from mtp_graft.stages import hub as hub_stage
from mtp_graft.stages.fetch import fetch, survey
from mtp_graft.stages.splice import splice
from mtp_graft.stages.verify import verify

BASE, UPSTREAM = "quantizer/base", "maker/upstream"
MODEL = ModelSection("grafted", BASE, UPSTREAM)
SHARDS = [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
UPSTREAM_MAP = {
    "embed.weight": SHARDS[0],
    "layers.0.mtp.weight": SHARDS[1],  # the head's letters, elsewhere in the name
    "mtp.0.e_proj.weight": SHARDS[2],
    "mtp.0.ffn.experts.0.w1.weight": SHARDS[3],
    "mtp.0.ffn.experts.0.w1.scale": SHARDS[3],
}
LARGE = 200_000


def index(weight_map: dict[str, str]) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def shard(number: int, size: int = 9_000) -> bytes:
    return bytes((i * (number + 7)) % 251 for i in range(size))


def repositories() -> dict[str, dict[str, bytes]]:
    small = {"config.json": b'{"hidden_size": 4}', "README.md": b"about it"}
    base = {
        **small,
        INDEX_NAME: index({"embed.weight": SHARDS[0], "head.weight": SHARDS[1]}),
        "tokenizer.json": b"{}",
        SHARDS[0]: shard(0, LARGE),
        SHARDS[1]: shard(1),
        "consolidated.safetensors": shard(2),  # that the index does not name
        "pytorch_model.bin": b"for another framework",
    }
    upstream = {
        **small,
        INDEX_NAME: index(UPSTREAM_MAP),
        **{name: shard(10 + n) for n, name in enumerate(SHARDS)},
    }
    return {BASE: base, UPSTREAM: upstream}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with in_place_of_the_hub(repositories(), cache, monkeypatch) as hub:
        yield hub


def quiet(_label: str, _done: int, _total: int) -> None: ...


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Folders


def test_folders_are_themselves_and_the_hub_is_not_asked(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "upstream"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    found = fetch(ModelSection("m", str(tmp_path / "base"), "~/upstream"), tmp_path / "out", quiet)
    assert (found.base, found.upstream) == (tmp_path / "base", tmp_path / "upstream")
    assert hub.asked == []


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        model = ModelSection("m", str(tmp_path / name), str(tmp_path))
        with pytest.raises(GraftError, match=f"{name}: not a folder; expected a checkpoint"):
            fetch(model, tmp_path / "out", quiet)


# What is downloaded


def test_only_what_is_needed_is_downloaded(hub: StandInHub, tmp_path: Path) -> None:
    found = fetch(MODEL, tmp_path / "out", quiet)
    small = {INDEX_NAME, "config.json"}
    assert names(found.base) == small | {"README.md", "tokenizer.json", SHARDS[0], SHARDS[1]}
    assert names(found.upstream) == small | {SHARDS[2], SHARDS[3]}
    for repo, folder in ((BASE, found.base), (UPSTREAM, found.upstream)):
        for path in folder.iterdir():
            assert path.read_bytes() == hub.repositories[repo][path.name]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["base_commit"] == report["upstream_commit"] == COMMIT


def test_the_survey_knows_every_size_before_a_shard_is_there(hub: StandInHub) -> None:
    base, upstream = survey(MODEL)
    assert base.sizes[SHARDS[0]] == LARGE and upstream.sizes[SHARDS[2]] == 9_000
    assert upstream.bytes_to_download == 18_000, "index and config have come for the survey"
    assert base.bytes_to_download == LARGE + 9_000 + len(b"{}") + len(b"about it")
    assert [hub.downloads(name) for name in SHARDS] == [[], [], [], []]


def test_what_was_fetched_is_not_asked_for_again(hub: StandInHub, tmp_path: Path) -> None:
    first = fetch(MODEL, tmp_path / "out", quiet)
    hub.asked.clear()
    assert fetch(MODEL, tmp_path / "out", quiet) == first
    assert hub.asked == []
    assert fetch(MODEL, tmp_path / "another run", quiet) == first
    assert not any(hub.downloads(name) for name in SHARDS), "the hub's cache has them"


def test_a_revision_is_asked_for_and_kept(hub: StandInHub, tmp_path: Path) -> None:
    fetch(MODEL, tmp_path / "out", quiet)
    other = ModelSection("grafted", BASE, UPSTREAM, base_revision="v2")
    hub.asked.clear()
    fetch(other, tmp_path / "out", quiet)
    assert any(path.endswith(f"{BASE}/revision/v2") for _, path, _ in hub.asked)


def test_progress_ends_at_what_there_was_to_download(hub: StandInHub, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    fetch(MODEL, tmp_path / "out", lambda *step: steps.append(step))
    done = [(done, total) for label, done, total in steps if label == f"fetch: {UPSTREAM}"]
    assert done == sorted(done) and done[0] == (0, 18_000) and done[-1] == (18_000, 18_000)


# Interrupted and damaged


def part_of(cache: Path) -> Path:
    return next(iter(cache.rglob("*.mtp-graft-part")))


def test_a_download_that_was_cut_off_says_so_and_goes_on(
    hub: StandInHub, cache: Path, tmp_path: Path
) -> None:
    hub.cut_at = 120_000
    with pytest.raises(GraftError, match=rf"{SHARDS[0]}: .*run again to go on"):
        fetch(MODEL, tmp_path / "out", quiet)
    kept = part_of(cache).stat().st_size
    assert 0 < kept <= 120_000
    assert survey(MODEL)[0].bytes_to_download <= LARGE - kept + 9_010
    found = fetch(MODEL, tmp_path / "out", quiet)
    assert (found.base / SHARDS[0]).read_bytes() == hub.repositories[BASE][SHARDS[0]]
    assert hub.downloads(SHARDS[0])[:2] == [0, kept]


def test_a_server_that_cannot_go_on_begins_anew(
    hub: StandInHub, cache: Path, tmp_path: Path
) -> None:
    hub.cut_at = 50_000
    with pytest.raises(GraftError):
        fetch(MODEL, tmp_path / "out", quiet)
    hub.ignores_ranges = True
    found = fetch(MODEL, tmp_path / "out", quiet)
    assert (found.base / SHARDS[0]).read_bytes() == hub.repositories[BASE][SHARDS[0]]


KILLED = """
import sys
from pathlib import Path
from test_fetch import MODEL, fetch, quiet
fetch(MODEL, Path(sys.argv[1]), quiet)
"""


def test_a_killed_download_goes_on_where_it_was(
    hub: StandInHub, cache: Path, tmp_path: Path, repo_root: Path
) -> None:
    hub.chunk_s, hub.chunk = 0.05, 4096
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(repo_root / "tests"),
    }
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not [p for p in cache.rglob("*.mtp-graft-part") if p.stat().st_size > 20_000]:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = part_of(cache).stat().st_size
    hub.chunk_s = 0.0
    hub.asked.clear()
    found = fetch(MODEL, tmp_path / "out", quiet)
    assert hub.downloads(SHARDS[0]) == [kept], "and no byte before it"
    assert (found.base / SHARDS[0]).read_bytes() == hub.repositories[BASE][SHARDS[0]]


def test_bytes_that_are_not_the_announced_ones_are_refused_and_removed(
    hub: StandInHub, cache: Path, tmp_path: Path
) -> None:
    hub.wrong = {SHARDS[3]}
    with pytest.raises(GraftError, match=rf"{UPSTREAM}/{SHARDS[3]}: sha256 is \w+, expected \w+"):
        fetch(MODEL, tmp_path / "out", quiet)
    assert not list(cache.rglob("*.mtp-graft-part"))
    hub.wrong = set()
    assert names(fetch(MODEL, tmp_path / "out", quiet).upstream) >= {SHARDS[3]}


def test_a_file_damaged_in_the_cache_is_refused_by_its_name(
    hub: StandInHub, tmp_path: Path
) -> None:
    found = fetch(MODEL, tmp_path / "out", quiet)
    blob = (found.base / SHARDS[0]).resolve()
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    with pytest.raises(GraftError, match=rf"{blob}: sha256 is .*{SHARDS[0]}; remove it and fetch"):
        fetch(MODEL, tmp_path / "another run", quiet)
    blob.unlink()
    again = fetch(MODEL, tmp_path / "another run", quiet)
    assert (again.base / SHARDS[0]).read_bytes() == hub.repositories[BASE][SHARDS[0]]


def test_a_file_of_the_cache_is_hashed_once_a_run(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(MODEL, tmp_path / "out", quiet)
    hashed: list[str] = []
    real = stage.sha256
    monkeypatch.setattr(stage, "sha256", lambda p: (hashed.append(p.name), real(p))[1])
    other = tmp_path / "another run"
    fetch(MODEL, other, quiet)
    assert sorted(hashed) == sorted([SHARDS[0], SHARDS[1], SHARDS[2], SHARDS[3]])
    (other / "report.json").unlink()
    fetch(MODEL, other, quiet)
    assert len(hashed) == 4


# Refused


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_room_is_said_before_a_shard_is_downloaded(
    hub: StandInHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: Disk(10**6, 0, 1000))
    with pytest.raises(GraftError, match=r"hub: 1,000 bytes free, 227,0\d\d needed to download"):
        fetch(MODEL, tmp_path / "out", quiet)
    assert not any(hub.downloads(name) for name in SHARDS)


def test_a_disk_that_fills_up_while_downloading_is_one_error(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_stage.os, "fsync", full)
    with pytest.raises(GraftError, match=r"the disk of .*hub is full; make room or set HF_HOME"):
        fetch(MODEL, tmp_path / "out", quiet)


def test_upstream_without_a_head_is_refused_before_its_shards_come(
    hub: StandInHub, tmp_path: Path
) -> None:
    without = {name: s for name, s in UPSTREAM_MAP.items() if not name.startswith("mtp.")}
    hub.repositories[UPSTREAM][INDEX_NAME] = index(without)
    with pytest.raises(GraftError, match=rf"{UPSTREAM}: its index lists no mtp\.\* tensor; expec"):
        fetch(MODEL, tmp_path / "out", quiet)
    assert not any(hub.downloads(name) for name in SHARDS)


def test_a_shard_that_the_index_names_and_the_repository_lacks_is_an_error(
    hub: StandInHub, tmp_path: Path
) -> None:
    del hub.repositories[BASE][SHARDS[1]]
    with pytest.raises(GraftError, match=rf"{BASE}: its index names {SHARDS[1]} .* not in the rep"):
        fetch(MODEL, tmp_path / "out", quiet)


@pytest.mark.parametrize("text", [b"<html>", b"[]", b'{"metadata": {}}'])
def test_an_index_that_is_none_is_an_error(text: bytes, hub: StandInHub, tmp_path: Path) -> None:
    hub.repositories[BASE][INDEX_NAME] = text
    with pytest.raises(GraftError, match="not a safetensors index"):
        fetch(MODEL, tmp_path / "out", quiet)


@pytest.mark.parametrize("missing", [INDEX_NAME, "config.json"])
def test_a_repository_without_index_or_config_is_an_error(
    missing: str, hub: StandInHub, tmp_path: Path
) -> None:
    del hub.repositories[UPSTREAM][missing]
    with pytest.raises(GraftError, match=rf"{UPSTREAM}: has no {re.escape(missing)}; expected"):
        fetch(MODEL, tmp_path / "out", quiet)


def test_a_repository_that_nobody_has_is_one_line(hub: StandInHub, tmp_path: Path) -> None:
    with pytest.raises(GraftError) as raised:
        fetch(ModelSection("m", "no/body", UPSTREAM), tmp_path / "out", quiet)
    message = str(raised.value)
    assert message.startswith("no/body: cannot be fetched from the hub (")
    assert "check the id and the network" in message and "\n" not in message


def make_offline() -> Exception:
    return OfflineModeIsEnabled("no network\nmore about it")


def make_http_error() -> Exception:
    hub_error = HfHubHTTPError.__mro__[1]  # of requests, httpx or httpx2, by the hub's version
    return hub_error("no network")


@pytest.mark.parametrize(
    "make",
    [
        make_offline,
        make_http_error,
        lambda: httpx.ConnectError("no network"),
        lambda: httpx.InvalidURL("no network"),
        lambda: ConnectionResetError("no network"),
        lambda: ValueError("no network"),
        lambda: RuntimeError("no network"),
    ],
)
def test_whatever_the_hubs_client_raises_is_one_error(
    make: Callable[[], Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise make()

    monkeypatch.setattr(hub_stage.HfApi, "model_info", fail)
    with pytest.raises(GraftError, match=rf"{BASE}: cannot be fetched from the hub \(no network\)"):
        fetch(MODEL, tmp_path / "out", quiet)


def test_an_error_without_words_is_named_by_its_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(hub_stage.HfApi, "model_info", fail)
    with pytest.raises(GraftError, match=r"from the hub \(ConnectionResetError\)"):
        fetch(MODEL, tmp_path / "out", quiet)


def test_folders_that_are_gone_are_fetched_again(hub: StandInHub, tmp_path: Path) -> None:
    found = fetch(MODEL, tmp_path / "out", quiet)
    shutil.rmtree(found.base)
    assert names(fetch(MODEL, tmp_path / "out", quiet).base) >= {SHARDS[0]}


# From hub ids to a checkpoint, with the bundled model laid out as the two repositories


@pytest.fixture
def bundled(hub: StandInHub, tiny_model: Path) -> StandInHub:
    for repo, name in ((BASE, "base"), (UPSTREAM, "upstream")):
        hub.repositories[repo] = as_repository(tiny_model / name)
    hub.chunk = 2**20
    return hub


def rewrite(files: dict[str, bytes], name: str, change: Callable[[Any], object]) -> None:
    content = json.loads(files[name])
    change(content)
    files[name] = json.dumps(content).encode()


def first_shard(files: dict[str, bytes]) -> str:
    return min(name for name in files if name.endswith(".safetensors"))


@pytest.mark.parametrize(
    ("repo", "file", "change", "refusal"),
    [
        (BASE, "config.json", lambda c: c.update(model_type="llama"), "model_type 'llama', expe"),
        (BASE, "config.json", lambda c: c.update(vocab_size=7), r"embed.weight is \[.*\[7, "),
        (
            BASE,
            "config.json",
            lambda c: c.update(moe_intermediate_size=2 * c["moe_intermediate_size"]),
            "base and upstream are different models",
        ),
        (
            BASE,
            "config.json",
            lambda c: c["quantization_config"].pop("config_groups"),
            "expected a compressed-tensors checkpoint",
        ),
        (
            BASE,
            INDEX_NAME,
            lambda i: i["weight_map"].update(
                {"mtp.0.norm.weight": i["weight_map"]["embed.weight"]}
            ),
            "already has a head",
        ),
        (
            BASE,
            INDEX_NAME,
            lambda i: i["weight_map"].update(strange=i["weight_map"]["embed.weight"]),
            "has no strange .* lists it",
        ),
        (
            UPSTREAM,
            INDEX_NAME,
            lambda i: i["weight_map"].update(
                {"mtp.2.norm.weight": i["weight_map"]["mtp.0.norm.weight"]}
            ),
            r"has blocks mtp\.\{0,2\}; expected mtp\.0 alone\. Three blocks are a DSpark",
        ),
    ],
)
def test_what_the_headers_tell_is_refused_before_a_shard_comes(
    repo: str,
    file: str,
    change: Callable[[Any], object],
    refusal: str,
    bundled: StandInHub,
    tmp_path: Path,
) -> None:
    rewrite(bundled.repositories[repo], file, change)
    recipe = load_recipe(
        find_bundled_recipe(), [f"model.base={BASE}", f"model.upstream={UPSTREAM}"]
    )
    told = plan_run(recipe, tmp_path / "run", ["fetch", "splice"])["inputs"]
    with pytest.raises(GraftError, match=refusal) as raised:
        run_stage(recipe, tmp_path / "run", "fetch", quiet)
    assert str(raised.value) == told
    assert re.match(f"{BASE}|{UPSTREAM}", told), "by its id, not by where the header is"
    assert bundled.downloads(".safetensors") == []


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_shard_that_is_none_is_refused_by_its_beginning(
    ignores_ranges: bool, bundled: StandInHub, tmp_path: Path
) -> None:
    bundled.ignores_ranges = ignores_ranges
    base = bundled.repositories[BASE]
    shard = first_shard(base)
    base[shard] = b"<html>" + base[shard]
    recipe = load_recipe(
        find_bundled_recipe(), [f"model.base={BASE}", f"model.upstream={UPSTREAM}"]
    )
    with pytest.raises(GraftError, match=f"{BASE}/{shard}: no safetensors file"):
        run_stage(recipe, tmp_path / "run", "fetch", quiet)


def test_the_bundled_model_goes_from_the_hub_into_a_checkpoint(
    bundled: StandInHub, tmp_path: Path
) -> None:
    hub = bundled
    recipe = load_recipe(
        find_bundled_recipe(), [f"model.base={BASE}", f"model.upstream={UPSTREAM}"]
    )
    told = plan_run(recipe, tmp_path / "run", ["fetch", "splice"])
    shards = sum(len(c) for n, c in hub.repositories[BASE].items() if n.endswith(".safetensors"))
    assert told["sources"]["base"]["commit"] == COMMIT
    assert shards < told["sources"]["base"]["bytes_to_download"] < shards + 2_000_000
    assert told["needs"][0]["what_for"] == "what is still to be downloaded"
    assert hub.downloads(".safetensors") == [], "a dry run downloads no shard"

    found = run_stage(recipe, tmp_path / "run", "fetch", quiet)
    base, upstream = Path(found["base"]), Path(found["upstream"])
    hub.asked.clear()
    splice(base, upstream, tmp_path / "checkpoint", "mxfp4")
    result = verify(tmp_path / "checkpoint", base, upstream)
    assert result["ok"] and result["base_files_linked"], "through the cache's symbolic links"
    assert plan_run(recipe, tmp_path / "run", ["fetch"])["sources"]["base"]["files"]
    assert hub.asked == [], "what was fetched is known without the hub"
