"""Fetching by folder or hub id: from a stand-in for the hub on this machine, no network."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import constants

from hub_stand_in import COMMIT, StandInHub, as_repository, in_place_of_the_hub
from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.errors import GraftError
from mtp_graft.pipeline import find_bundled_recipe
from mtp_graft.pipeline.plan import plan_run
from mtp_graft.pipeline.run import run_stage
from mtp_graft.recipe import ModelSection, Recipe, load_recipe
from mtp_graft.stages import fetch as stage
from mtp_graft.stages import hub as hub_stage
from mtp_graft.stages.fetch import fetch, survey

BASE, UPSTREAM = "quantizer/base", "maker/upstream"
MODEL = ModelSection(name="grafted", base=BASE, upstream=UPSTREAM)
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
    shards = {name: shard(10 + n) for n, name in enumerate(SHARDS)}
    return {BASE: base, UPSTREAM: {**small, INDEX_NAME: index(UPSTREAM_MAP), **shards}}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with in_place_of_the_hub(repositories(), tmp_path / "hub", monkeypatch) as hub:
        yield hub


def quiet(_label: str, _done: int, _total: int) -> None: ...


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_folders_are_themselves_and_the_hub_is_not_asked(
    hub: StandInHub, tiny_model: Path, tmp_path: Path
) -> None:
    base, upstream = tiny_model / "base", tiny_model / "upstream"
    model = ModelSection(name="m", base=str(base), upstream=str(upstream))
    found = fetch(model, tmp_path / "out", quiet)
    assert (found.base, found.upstream) == (base, upstream)
    assert hub.asked == []


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    model = ModelSection(name="m", base=str(tmp_path / "nowhere"), upstream=str(tmp_path))
    with pytest.raises(GraftError, match=r"nowhere: not a folder; expected a checkpoint"):
        fetch(model, tmp_path / "out", quiet)


def test_only_what_is_needed_is_downloaded(hub: StandInHub, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    found = fetch(MODEL, tmp_path / "out", lambda *step: steps.append(step))
    small = {INDEX_NAME, "config.json"}
    assert names(found.base) == small | {"README.md", "tokenizer.json", SHARDS[0], SHARDS[1]}
    assert names(found.upstream) == small | {SHARDS[2], SHARDS[3]}
    for repo, folder in ((BASE, found.base), (UPSTREAM, found.upstream)):
        for path in folder.iterdir():
            assert path.read_bytes() == hub.repositories[repo][path.name]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["base_commit"] == report["upstream_commit"] == COMMIT
    done = [(done, total) for label, done, total in steps if label == f"fetch: {UPSTREAM}"]
    assert done == sorted(done) and done[0] == (0, 18_000) and done[-1] == (18_000, 18_000)


def test_the_survey_knows_every_size_before_a_shard_is_there(hub: StandInHub) -> None:
    base, upstream = survey(MODEL)
    assert base.sizes[SHARDS[0]] == LARGE and upstream.sizes[SHARDS[2]] == 9_000
    assert (base.bytes_to_download, upstream.bytes_to_download) == (LARGE + 9_000, 18_000)
    assert not any(hub.downloads(name) for name in SHARDS)


def test_what_was_fetched_is_not_asked_for_again(hub: StandInHub, tmp_path: Path) -> None:
    first = fetch(MODEL, tmp_path / "out", quiet)
    hub.asked.clear()
    assert fetch(MODEL, tmp_path / "out", quiet) == first
    assert hub.asked == []
    assert fetch(MODEL, tmp_path / "another run", quiet) == first
    assert not any(hub.downloads(name) for name in SHARDS), "the hub's cache has them"
    shutil.rmtree(first.base)
    assert names(fetch(MODEL, tmp_path / "out", quiet).base) >= {SHARDS[0]}


@pytest.mark.parametrize("revision", [None, "v2", COMMIT])
@pytest.mark.parametrize("said", [True, False])
def test_a_full_cache_needs_no_network_by_branch_or_commit(
    hub: StandInHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    revision: str | None,
    said: bool,
) -> None:
    model = ModelSection(name="m", base=BASE, upstream=UPSTREAM, base_revision=revision)
    first = fetch(model, tmp_path / "out", quiet)
    if revision == "v2":
        assert ("GET", f"/api/models/{BASE}/revision/v2") in hub.asked
    hub.asked.clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", said)
    assert fetch(model, tmp_path / "another run", quiet) == first
    (first.base / SHARDS[1]).unlink()
    with pytest.raises(GraftError, match=rf"{BASE}: cannot be fetched from the hub"):
        fetch(model, tmp_path / "third run", quiet)
    assert hub.asked == []


@pytest.mark.parametrize("where", ["on the way", "in the cache"])
def test_bytes_that_are_not_the_announced_ones_are_refused_and_removed(
    where: str, hub: StandInHub, tmp_path: Path
) -> None:
    if where == "on the way":
        hub.wrong = {SHARDS[0]}
    else:
        blob = (fetch(MODEL, tmp_path / "first", quiet).base / SHARDS[0]).resolve()
        blob.write_bytes(b"x" + blob.read_bytes()[1:])
    with pytest.raises(
        GraftError, match=rf"sha256 is \w+, expected \w+ by the hub, for {SHARDS[0]}"
    ):
        fetch(MODEL, tmp_path / "out", quiet)
    hub.wrong = set()
    again = fetch(MODEL, tmp_path / "out", quiet)
    assert (again.base / SHARDS[0]).read_bytes() == hub.repositories[BASE][SHARDS[0]]


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_room_is_said_before_a_shard_is_downloaded(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: Disk(10**6, 0, 1000))
    with pytest.raises(GraftError, match=r"hub: 1,000 bytes free, 227,000 needed to download"):
        fetch(MODEL, tmp_path / "out", quiet)
    assert not any(hub.downloads(name) for name in SHARDS)


def forget_head(repositories: dict[str, dict[str, bytes]]) -> None:
    without = {name: s for name, s in UPSTREAM_MAP.items() if not name.startswith("mtp.")}
    repositories[UPSTREAM][INDEX_NAME] = index(without)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (forget_head, rf"{UPSTREAM}: its index lists no mtp\.\* tensor; expected the upstream"),
        (lambda r: r[BASE].pop(SHARDS[1]), rf"{BASE}: has no {SHARDS[1]}, .* another revision"),
        (lambda r: r[BASE].update({INDEX_NAME: b"<html>"}), "not a safetensors index"),
        (lambda r: r[UPSTREAM].pop(INDEX_NAME), f"{UPSTREAM}: has no {INDEX_NAME}; expected"),
        (lambda r: r[UPSTREAM].pop("config.json"), f"{UPSTREAM}: has no config.json; expected"),
        (lambda r: r.pop(BASE), rf"{BASE}: cannot be fetched from the hub \(.*check the id"),
    ],
)
def test_what_is_no_checkpoint_is_refused_before_its_shards_come(
    damage: Callable[[Any], object], message: str, hub: StandInHub, tmp_path: Path
) -> None:
    damage(hub.repositories)
    with pytest.raises(GraftError, match=message):
        fetch(MODEL, tmp_path / "out", quiet)
    assert not any(hub.downloads(name) for name in SHARDS)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("no network\nmore about it"), r"from the hub \(no network\); check"),
        (ConnectionResetError(), r"from the hub \(ConnectionResetError\)"),
        (OSError(28, "No space left"), r"the disk of .*hub is full; make room or set HF_HOME"),
    ],
)
def test_whatever_the_hubs_client_raises_is_one_error(
    error: Exception,
    message: str,
    hub: StandInHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(hub_stage, "snapshot_download", fail)
    with pytest.raises(GraftError, match=message):
        fetch(MODEL, tmp_path / "out", quiet)


# The bundled model as two repositories: what headers tell before a shard is downloaded


@pytest.fixture
def bundled(hub: StandInHub, tiny_model: Path) -> StandInHub:
    for repo, name in ((BASE, "base"), (UPSTREAM, "upstream")):
        hub.repositories[repo] = as_repository(tiny_model / name)
    return hub


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(find_bundled_recipe(), [f"model.base={BASE}", f"model.upstream={UPSTREAM}"])


@pytest.mark.parametrize(
    ("repo", "file", "change", "refusal"),
    [
        (BASE, "config.json", lambda c: c.update(model_type="llama"), "model_type 'llama', expe"),
        (BASE, "config.json", lambda c: c.update(vocab_size=7), r"embed.weight is \[.*\[7, "),
        (BASE, "config.json", lambda c: c.update(moe_intermediate_size=512), "different models"),
        (
            BASE,
            "config.json",
            lambda c: c["quantization_config"].pop("config_groups"),
            "expected a compressed-tensors checkpoint",
        ),
        (
            BASE,
            INDEX_NAME,
            lambda i: i["weight_map"].update({"mtp.0.x": i["weight_map"]["embed.weight"]}),
            "already has a head",
        ),
        (
            BASE,
            INDEX_NAME,
            lambda i: i["weight_map"].update(strange=i["weight_map"]["embed.weight"]),
            "has no strange .* lists it",
        ),
    ],
)
def test_what_the_headers_tell_is_refused_before_a_shard_comes(
    repo: str,
    file: str,
    change: Callable[[Any], object],
    refusal: str,
    bundled: StandInHub,
    recipe: Recipe,
    tmp_path: Path,
) -> None:
    content = json.loads(bundled.repositories[repo][file])
    change(content)
    bundled.repositories[repo][file] = json.dumps(content).encode()
    told = plan_run(recipe, tmp_path / "run", ["fetch", "splice"])["inputs"]
    with pytest.raises(GraftError, match=refusal) as raised:
        run_stage(recipe, tmp_path / "run", "fetch", quiet)
    assert str(raised.value) == told
    assert re.match(f"{BASE}|{UPSTREAM}", told), "by its id, not by where the header is"
    assert bundled.downloads(".safetensors") == 0


def test_a_shard_that_is_none_is_refused_by_its_beginning(
    bundled: StandInHub, recipe: Recipe, tmp_path: Path
) -> None:
    base = bundled.repositories[BASE]
    shard = min(name for name in base if name.endswith(".safetensors"))
    base[shard] = b"<html>" + base[shard]
    with pytest.raises(GraftError, match=f"{BASE}/{shard}: .*safetensors"):
        run_stage(recipe, tmp_path / "run", "fetch", quiet)


def test_a_dry_run_downloads_no_shard_and_knows_their_sizes(
    bundled: StandInHub, recipe: Recipe, tmp_path: Path
) -> None:
    told = plan_run(recipe, tmp_path / "run", ["fetch", "splice"])
    files = bundled.repositories[BASE].items()
    shards = sum(len(content) for name, content in files if name.endswith(".safetensors"))
    assert told["sources"]["base"]["commit"] == COMMIT and told["inputs"] == "fit"
    assert told["sources"]["base"]["bytes_to_download"] == shards
    assert bundled.downloads(".safetensors") == 0
