"""Splice: a base without its head, plus a head, gives a new checkpoint.

The base is never written to: its files are hard-linked (copied only across file systems), the
head goes into one new shard, and everything is put together in a temporary folder that gets its
name when it is complete. A killed splice leaves only that folder, which the next one removes.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mtp_graft.checkpoint import quant_manifest
from mtp_graft.checkpoint.files import is_full_disk, sha256, write_json, write_text
from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD
from mtp_graft.checkpoint.shards import INDEX_NAME, Shard, read_meta, stream_shard, write_index
from mtp_graft.dsv4.variants import Linears, Variant, group_by_module, store_head
from mtp_graft.errors import GraftError
from mtp_graft.stages.fetch import nearest_folder
from mtp_graft.stages.splice_plan import SplicePlan, Tensors, plan_splice

#: Files that a splice writes itself; all others are the base's.
OWN_FILES = frozenset(
    {
        *(INDEX_NAME, "config.json", HEAD_SHARD, quant_manifest.RECIPE_NAME),
        *(quant_manifest.MANIFEST_NAME, quant_manifest.MANIFEST_TEXT_NAME),
    }
)
#: Beside the shard: index, config and manifests are a few MB at full size.
_MARGIN_BYTES = 64 * 2**20


@dataclass(frozen=True)
class SpliceResult:
    """What a splice wrote, or had written before."""

    checkpoint: Path
    variant: Variant
    tensors: int
    bytes_written: int  # of the head; the base's are linked
    already_done: bool = False


def splice(
    base: Path,
    upstream: Path,
    out: Path,
    variant: Variant | None = None,
    *,
    linears: Linears = "base",
    quantized: Path | None = None,
    copy: bool = False,
) -> SpliceResult:
    """Write `out`: the base's files linked, the head as `variant` in a shard of its own.

    `rtn` rounds the routed experts to INT4, `gptq` takes them from the quantize stage's folder
    `quantized`, `mxfp4` (the default) keeps their codes, `bf16` decodes them (exact). `linears`
    says which FP8 linears keep their codes (`dsv4.variants.Linears`; exact either way). Where
    `upstream` is a folder with a head that was spliced before, that head is taken as it is.
    Memory holds one module at a time.

    An `out` that the same inputs gave is returned as it is. Raises GraftError, leaving nothing
    behind, for inputs that are broken or do not fit each other, for another `out` that exists,
    and for a full disk.
    """
    plan = plan_splice(base, upstream, variant, linears, quantized)
    manifest = _manifest(plan)
    if out.exists():
        return _already_done(out, plan, manifest)
    files = base_files(base)
    check_space(out, plan, base, sum(path.stat().st_size for path in files), copy=copy)
    with _temporary_folder(out) as folder:
        for source in files:
            _link(source, folder / source.relative_to(base), copy=copy)
        if plan.published is None:
            stream_shard(plan.layout, _stored_tensors(plan), folder / HEAD_SHARD)
        else:
            _link(upstream / HEAD_SHARD, folder / HEAD_SHARD, copy=copy)
        _write_texts(plan, manifest, folder)
        _write_union_index(plan, folder)
        folder.rename(out)
    return SpliceResult(out, plan.variant, len(plan.layout), plan.bytes)


def _manifest(plan: SplicePlan) -> dict[str, Any]:
    """Return what the checkpoint will say about its head, with hashes of what it is made of."""
    base = quant_manifest.base_provenance(plan.base, plan.base_map.values())
    if plan.published is not None:
        origin = dict(plan.published["provenance"])
        if origin["base"] != base:
            origin["made_for"] = origin.get("made_for", origin["base"])
        return {**plan.published, "provenance": {**origin, "base": base}}
    shards = sorted(set(plan.head.files.values()))
    provenance = {"base": base, "upstream": {path.name: sha256(path) for path in shards}}
    if plan.report is not None:
        files = plan.experts.files.values() if plan.experts else []
        provenance["quantize"] = quant_manifest.quantize_provenance(plan.report, files)
    return quant_manifest.manifest(
        *(plan.variant, plan.linears, plan.config, plan.report, provenance),
        *(len(plan.layout), plan.bytes),
    )


def _already_done(out: Path, plan: SplicePlan, manifest: Mapping[str, Any]) -> SpliceResult:
    """Return what an earlier splice of the same inputs left; GraftError if `out` is not that."""
    try:
        same = json.loads((out / quant_manifest.MANIFEST_NAME).read_text()) == manifest
    except (OSError, ValueError):
        same = False
    if not same:
        raise GraftError(
            f"{out}: already exists, and not from these inputs; remove it or choose another folder"
        )
    read_meta(out, complete=True)
    return SpliceResult(out, plan.variant, len(plan.layout), plan.bytes, already_done=True)


def check_space(out: Path, plan: SplicePlan, base: Path, base_bytes: int, *, copy: bool) -> None:
    """Raise GraftError if the disk of `out` has no room for the head, and the base if copied."""
    disk = nearest_folder(out)
    needed = plan.bytes + _MARGIN_BYTES
    if copy or disk.stat().st_dev != base.resolve().stat().st_dev:
        needed += base_bytes
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise GraftError(
            f"{out.parent}: {free:,} bytes free, {needed:,} needed for {HEAD_SHARD} and what "
            "goes with it; make room or choose another folder"
        )


def base_files(base: Path) -> list[Path]:
    """Return the base's files that the checkpoint takes over, hidden folders apart."""
    files = (path for path in sorted(base.rglob("*")) if path.is_file())
    inside = ((path, path.relative_to(base)) for path in files)
    return [
        path
        for path, relative in inside
        if str(relative) not in OWN_FILES
        and not any(part.startswith(".") for part in relative.parts[:-1])
    ]


@contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    """Make `.OUT.tmp` anew; remove it if the body fails, and name a full disk for what it is."""
    folder = out.with_name(f".{out.name}.tmp")
    if folder.exists():
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
        yield folder
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)  # must not hide what went wrong
        if isinstance(error, OSError):
            what = "the disk is full" if is_full_disk(error) else "cannot be written"
            raise GraftError(f"{out}: {what} ({error}); make room, or choose another") from error
        raise


def _link(source: Path, target: Path, *, copy: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # the hub's cache has relative symbolic links, which would break
    if not copy:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        else:
            return
    shutil.copy2(source, target)


def _stored_tensors(plan: SplicePlan) -> Iterator[tuple[str, Tensor]]:
    """Yield the head's tensors as the checkpoint stores them, one module at a time."""
    experts = plan.experts or Tensors({}, {})
    files = {**experts.files, **plan.head.files}
    given = group_by_module(experts.files)
    with ExitStack() as stack:
        opened = {path: stack.enter_context(Shard(path)) for path in set(files.values())}

        def read(tensors: Iterable[str]) -> dict[str, Tensor]:
            return {name: opened[files[name]].get_tensor(name) for name in tensors}

        for module, parts in group_by_module(plan.head.files).items():
            tensors, by_gptq = read(parts.values()), read(given.get(module, {}).values())
            yield from store_head(
                *(tensors, plan.variant, by_gptq),
                group_size=plan.group_size,
                linears=plan.linears,
            ).items()


def _write_texts(plan: SplicePlan, manifest: Mapping[str, Any], folder: Path) -> None:
    write_json(plan.config, folder / "config.json")
    write_json(manifest, folder / quant_manifest.MANIFEST_NAME)
    text = quant_manifest.manifest_text(manifest)
    write_text(text, folder / quant_manifest.MANIFEST_TEXT_NAME)
    base_recipe = plan.base / quant_manifest.RECIPE_NAME
    before = base_recipe.read_text() if base_recipe.exists() else None
    recipe = quant_manifest.recipe_text(manifest, before)
    write_text(recipe, folder / quant_manifest.RECIPE_NAME)


def _write_union_index(plan: SplicePlan, folder: Path) -> None:
    metadata = json.loads((plan.base / INDEX_NAME).read_text()).get("metadata")
    index = {**plan.base_map, **dict.fromkeys(sorted(plan.layout), HEAD_SHARD)}
    write_index(index, plan.base_bytes + plan.bytes, folder, metadata)
