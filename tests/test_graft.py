"""`mtp-graft graft`: from folders, hub ids and published heads to a verified checkpoint."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_stand_in import COMMIT, StandInHub, as_repository, in_place_of_the_hub
from mtp_graft import cli
from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD, MANIFEST_NAME, find_spliced
from mtp_graft.checkpoint.shards import load_tensors
from mtp_graft.stages.publish import plan_publication
from mtp_graft.stages.splice import splice
from quantized import write_quantized

BASE, UPSTREAM, HEAD = "quantizer/base", "maker/upstream", "owner/that-head"
Graft = Callable[..., Any]


@pytest.fixture
def graft(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Graft:
    """Return a function that runs the command: its JSON, or the error that it printed."""

    def call(*arguments: object) -> Any:
        words = ["mtp-graft", "graft", *map(str, arguments), "--json", "-"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        out, errors = capfd.readouterr()
        if ended.value.code in (0, None):
            return json.loads(out)
        assert ended.value.code == 1, errors
        return next(line for line in errors.splitlines() if line.startswith("error: "))

    return call


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model / "base", tmp_path / "base"))


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that spliced a gptq head and verified it, with a card."""
    run = tmp_path_factory.mktemp("graft") / "run"
    upstream = tiny_model / "upstream"
    quantized = write_quantized(run / "quantize", load_tensors(upstream))
    out = run / "splice" / "gptq" / "grafted"
    out.parent.mkdir(parents=True)
    splice(tiny_model / "base", upstream, out, "gptq", quantized=quantized, copy=True)
    config: dict[str, Any] = {"config": {"variant": "gptq"}}
    texts = {"splice/manifest.json": config, "verify/manifest.json": {}}
    texts |= {"verify/gptq.json": {"ok": True}}
    for name, content in texts.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(json.dumps(content))
    (run / "card").mkdir()
    (run / "card" / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    about = {"checkpoint": find_spliced(run).identity()}
    (run / "card" / "card.json").write_text(json.dumps(about))
    return run


@pytest.fixture
def published(run: Path, tmp_path: Path) -> Path:
    """A folder with what `publish --head-only` uploads."""
    folder = tmp_path / "published"
    folder.mkdir()
    plan = plan_publication(run, HEAD, False, run / "card", head_only=True)
    for name, file in plan.files.items():
        (folder / name).write_bytes(file if isinstance(file, bytes) else file.read_bytes())
    return folder


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    folders = {BASE: tiny_model / "base", UPSTREAM: tiny_model / "upstream"}
    repositories = {repo: as_repository(folder) for repo, folder in folders.items()}
    with in_place_of_the_hub(repositories, tmp_path / "hub", monkeypatch) as hub:
        yield hub


@pytest.mark.parametrize(("options", "head"), [((), "mxfp4"), (("--head", "bf16"), "bf16")])
def test_folders_become_a_verified_checkpoint_with_an_exact_head(
    graft: Graft, base: Path, tiny_model: Path, tmp_path: Path, options: tuple[str, ...], head: Any
) -> None:
    out = tmp_path / "out"
    result = graft(base, tiny_model / "upstream", out, *options)
    assert (result["checkpoint"], result["head"], result["verified"]) == (str(out), head, True)
    assert result["base_files_linked"] and result["seconds"] > 0
    splice(base, tiny_model / "upstream", tmp_path / "same", head)
    written = (out / HEAD_SHARD).read_bytes()
    assert written == (tmp_path / "same" / HEAD_SHARD).read_bytes()
    assert 0 < len(written) - result["bytes_written"] < 100_000, "all but the header"


def test_copies_are_files_of_their_own(
    graft: Graft, base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    result = graft(base, tiny_model / "upstream", tmp_path / "out", "--copy")
    assert result["verified"] and not result["base_files_linked"]


def test_hub_ids_are_fetched_and_a_dry_run_fetches_no_shard(
    graft: Graft, hub: StandInHub, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    told = graft(BASE, UPSTREAM, out, "--dry-run")
    assert not out.exists() and hub.downloads(".safetensors") == 0
    shards = {n: len(c) for n, c in hub.repositories[UPSTREAM].items() if n.endswith("tensors")}
    assert told["sources"]["upstream"]["bytes_to_download"] == sum(shards.values())
    result = graft(BASE, UPSTREAM, out, "--base-revision", "main")
    assert result["verified"] and result["commits"] == {"base": COMMIT, "upstream": COMMIT}
    assert result["bytes_written"] == told["bytes_to_write"]


def test_a_head_alone_is_published_with_manifest_and_card(run: Path, published: Path) -> None:
    names = {path.name for path in published.iterdir()}
    own = {HEAD_SHARD, MANIFEST_NAME, "MTP_QUANT_MANIFEST.md"}
    assert names == own | {"README.md", "card.json"}
    card = (published / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n") and "# A card" in card
    assert f"mtp-graft graft BASE {HEAD} OUT" in card


@pytest.mark.parametrize("place", ["folder", "hub", "whole checkpoint"])
def test_a_published_head_is_taken_as_it_is(
    graft: Graft, hub: StandInHub, base: Path, published: Path, run: Path, tmp_path: Path,
    place: str,
) -> None:  # fmt: skip
    hub.repositories[HEAD] = as_repository(published)
    original = find_spliced(run).folder
    source = {"folder": published, "hub": HEAD, "whole checkpoint": original}[place]
    out = tmp_path / "out"
    assert graft(base, source, out, "--dry-run")["head"] == "gptq"
    assert hub.downloads(HEAD_SHARD) == 0
    result = graft(base, source, out)
    assert (result["head"], result["verified"]) == ("gptq", True)
    for path in original.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_head_on_another_base_says_which_it_was_made_for(
    graft: Graft, base: Path, published: Path, tmp_path: Path
) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rope_theta": 5}))
    assert graft(base, published, tmp_path / "out")["verified"]
    before, after = (
        json.loads((folder / MANIFEST_NAME).read_text())["provenance"]
        for folder in (published, tmp_path / "out")
    )
    assert after["made_for"] == before["base"] != after["base"]


def other_model(base: Path, published: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "n_routed_experts": 32}))


def other_group_size(base: Path, published: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_1"]["weights"]["group_size"] = 64
    (base / "config.json").write_text(json.dumps(config))


def change_manifest(published: Path, **changes: object) -> None:
    path = published / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil(base: Path, published: Path) -> None:
    head = load_file(published / HEAD_SHARD)
    head["mtp.0.ffn.experts.9.w1.weight_scale"][0, 0] = torch.inf
    save_file(head, published / HEAD_SHARD, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda b, p: None, ("--head", "bf16"), "is a gptq head, .* bf16 was asked for"),
        (other_model, (), r"is \[64, 256\], expected \[32, 256\] by the base's config.json"),
        (other_group_size, (), "expected .*group 64"),
        (lambda b, p: change_manifest(p, tensors=7), (), "expected 7 of .* by MTP_QUANT_MANIFEST"),
        (lambda b, p: change_manifest(p, variant="mxfp5"), (), "MANIFEST.json: .*variant: input"),
        (lambda b, p: change_manifest(p, variant="bf16"), (), "would load as plain, expected int4"),
        (spoil, (), "experts.9.w1.weight_packed .holds values that are not finite"),
        (lambda b, p: (p / HEAD_SHARD).unlink(), (), f"has no {HEAD_SHARD}, which is needed"),
    ],
)
def test_a_head_that_does_not_fit_is_one_error(
    graft: Graft, base: Path, published: Path, tmp_path: Path,
    damage: Callable[[Path, Path], object], options: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    damage(base, published)
    said = graft(base, published, tmp_path / "out", *options)
    assert isinstance(said, str) and re.search(message, said), said


def test_an_out_that_exists_and_inputs_that_do_not_are_refused(
    graft: Graft, base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    upstream = tiny_model / "upstream"
    (tmp_path / "out").mkdir()
    assert "out: already exists; remove it" in graft(base, upstream, tmp_path / "out")
    assert "nowhere: not a folder" in graft("nowhere", upstream, tmp_path / "new")
    assert "already has a head" in graft(upstream, upstream, tmp_path / "new")
