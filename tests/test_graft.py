"""`mtp-graft graft`: from folders, hub ids and published heads to a verified checkpoint."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_stand_in import BASE, COMMIT, UPSTREAM, StandInHub, as_repository
from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD, MANIFEST_NAME, find_spliced
from mtp_graft.pipeline import find_bundled_recipe
from mtp_graft.pipeline.plan import plan_run
from mtp_graft.recipe import load_recipe
from mtp_graft.stages.publish import find_files
from quantized import TINY, edit_json, tiny_quantization
from run_folder import write

HEAD = "owner/that-head"
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def run(spliced: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that spliced a gptq head and verified it, with a card."""
    run = tmp_path_factory.mktemp("graft") / "run"
    shutil.copytree(spliced["gptq"], run / "splice" / "gptq" / "grafted")
    write(run / "splice/manifest.json", {"config": {"variant": "gptq"}})
    write(run / "verify/manifest.json", {})
    write(run / "verify/gptq.json", {"ok": True})
    write(run / "card/card.json", {"checkpoint": find_spliced(run).identity()})
    (run / "card" / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    return run


@pytest.fixture
def published(run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    for name, file in find_files(run, HEAD, run / "card", head_only=True).items():
        (folder / name).write_bytes(file if isinstance(file, bytes) else file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("options", "head"), [((), "mxfp4"), (("--head", "bf16", "--copy"), "bf16")]
)
def test_folders_become_a_verified_checkpoint_with_an_exact_head(
    mtp_graft: Command, base: Path, spliced: Any, options: Any, head: str
) -> None:
    out = Path("out")
    result = mtp_graft("graft", base, TINY / "upstream", out, *options)
    assert (result["checkpoint"], result["head"], result["verified"]) == (str(out), head, True)
    assert result["base_files_linked"] == ("--copy" not in options) and result["seconds"] > 0
    written = (out / HEAD_SHARD).read_bytes()
    assert written == (spliced[head] / HEAD_SHARD).read_bytes()
    assert 0 < len(written) - result["bytes_written"] < 100_000, "all but the header"


def test_a_head_alone_is_published_with_manifest_and_card(run: Path, published: Path) -> None:
    names = {path.name for path in published.iterdir()}
    own = {HEAD_SHARD, MANIFEST_NAME, "MTP_QUANT_MANIFEST.md"}
    assert names == own | {"README.md", "card.json"}
    card = (published / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n") and "# A card" in card
    assert f"mtp-graft graft BASE {HEAD} OUT" in card


@pytest.mark.parametrize("place", ["hub", "whole checkpoint"])
def test_a_published_head_is_taken_as_it_is(
    mtp_graft: Command, hub: StandInHub, base: Path, published: Path, run: Path, place: str
) -> None:
    hub.repositories[HEAD] = as_repository(published)
    original, out = run / "splice/gptq/grafted", Path("out")
    result = mtp_graft("graft", base, HEAD if place == "hub" else original, out)
    assert (result["head"], result["verified"]) == ("gptq", True)
    for path in original.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_head_tells_what_it_was_made_for(mtp_graft: Command, base: Path, published: Path) -> None:
    edit_json(base / "config.json", lambda config: config.update(rope_theta=5))
    assert mtp_graft("graft", base, published, Path("out"))["verified"]
    files = (folder / MANIFEST_NAME for folder in (published, Path("out")))
    before, after = (json.loads(file.read_text())["provenance"] for file in files)
    assert after["made_for"] == before["base"] != after["base"]


@pytest.mark.parametrize("options", [(), ("--head", "bf16", "--copy")])
def test_a_dry_run_tells_what_a_run_does(mtp_graft: Command, hub: StandInHub, options: Any) -> None:
    command = ("graft", BASE, UPSTREAM, Path("out"), "--base-revision", "main", *options)
    planned = mtp_graft(*command, "--dry-run")
    assert hub.downloads(".safetensors") == 0 and not Path("out").exists()
    needed = {need["stage"]: need["bytes"] for need in planned["needs"]}
    assert needed["fetch"] == sum(s["bytes_to_download"] for s in planned["sources"].values()) > 0
    base = sum(map(len, hub.repositories[BASE].values())) if options else 0
    assert needed["splice"] == planned["bytes_written"] + base
    done = mtp_graft(*command)
    assert done["verified"] and done["commits"] == {"base": COMMIT, "upstream": COMMIT}
    assert all(planned[key] == done[key] for key in done.keys() & planned.keys() - {"seconds"})


#: What doctor calls an error on any platform, and vLLM would find after hours.
BAD_BASES: dict[str, tuple[Callable[[Any], object], str]] = {
    "weights null": (lambda c: group(c).update(weights=None), "weights: input should .* instead"),
    "few ratios": (lambda c: c.update(compress_ratios=[0, 0]), "2 entries; expected one for each"),
    "other layers": (lambda c: c.update(num_hidden_layers=3), r"layers\.3.*; expected"),
}


def group(config: Any) -> Any:
    return config["quantization_config"]["config_groups"]["group_1"]


@pytest.mark.parametrize("name", BAD_BASES)
def test_bad_bases_are_refused(mtp_graft: Command, hub: StandInHub, name: str) -> None:
    change, message = BAD_BASES[name]
    hub.change(BASE, "config.json", change)
    said = mtp_graft("graft", BASE, UPSTREAM, Path("out"))
    assert re.search(rf"error: {BASE}(, with a head: |/config).*{message}", str(said)), said
    models = [f"model.base={BASE}", f"model.upstream={UPSTREAM}"]
    recipe = load_recipe(find_bundled_recipe(), models)
    told = plan_run(recipe, Path("run"), ["fetch", "splice"])["inputs"]
    assert re.search(message, told), told
    assert hub.downloads(".safetensors") == 0


def test_what_a_splice_cures_is_accepted(mtp_graft: Command, base: Path, tiny_model: Path) -> None:
    def for_gpus_alone(config: Any) -> None:
        config["quantization_config"].update(ignore=None)
        group(config)["targets"] = [r"re:.*\.ffn\.experts\.\d+\.w[123]$"]

    edit_json(base / "config.json", for_gpus_alone)
    assert mtp_graft("graft", base, tiny_model / "upstream", Path("out"), "--dry-run")["head"]


Damage = Callable[[Path, Path], object]


def configure(**changes: object) -> Damage:
    return lambda base, _: edit_json(base / "config.json", lambda c: c.update(changes))


GROUPS_OF_64 = tiny_quantization()
GROUPS_OF_64["config_groups"]["group_1"]["weights"]["group_size"] = 64


def say(**changes: object) -> Damage:
    return lambda _, published: edit_json(published / MANIFEST_NAME, lambda m: m.update(changes))


def lose(file: str) -> Damage:
    return lambda _, published: (published / file).unlink()


def spoil(_base: Path, published: Path) -> None:
    head = load_file(published / HEAD_SHARD)
    head["mtp.0.ffn.experts.9.w1.weight_scale"][0, 0] = torch.inf
    save_file(head, published / HEAD_SHARD, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (configure(n_routed_experts=32), r"base: layers.0.ffn.experts.32.w1.* of no module"),
        (configure(quantization_config=GROUPS_OF_64), "base: .*group_size: 64; expected 128"),
        (say(tensors=7), "expected 7 of .* by MTP_QUANT_MANIFEST"),
        (say(variant="bf16"), "would load as plain; .*or take another head"),
        (spoil, "experts.9.w1.weight_packed .holds values that are not finite"),
        (lose(MANIFEST_NAME), "published: is a spliced head without its MTP_Q"),
        (lose(HEAD_SHARD), f"has no {HEAD_SHARD}, which is needed"),
    ],
)
def test_a_head_that_does_not_fit_is_one_error(
    mtp_graft: Any, base: Path, published: Path, damage: Damage, message: str
) -> None:
    damage(base, published)
    said = mtp_graft("graft", base, published, Path("out"))
    assert isinstance(said, str) and re.search(message, said), said


def test_a_full_disk_an_out_that_exists_and_inputs_that_do_not_are_refused(
    mtp_graft: Any, base: Any, published: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream, new = TINY / "upstream", Path("new")
    Path("out").mkdir()
    assert "out: already exists; remove it" in mtp_graft("graft", base, upstream, Path("out"))
    for inside in (base / "a" / "out", upstream / "out"):
        assert "out: is in " in mtp_graft("graft", base, upstream, inside)
        assert not inside.exists()
    assert "x.gguf: is GGUF; expected" in mtp_graft("graft", base, "a/x.gguf", new)
    assert "x.gguf: is GGUF; expected" in mtp_graft("graft", "x.gguf", upstream, new)
    assert "nowhere: not a folder" in mtp_graft("graft", "nowhere", upstream, new)
    assert "upstream: is DeepSeek's own" in mtp_graft("graft", upstream, upstream, new)
    assert "is a gptq head" in mtp_graft("graft", base, published, new, "--head", "bf16")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=9))
    assert "new: 9 bytes free, " in mtp_graft("graft", base, upstream, new)
