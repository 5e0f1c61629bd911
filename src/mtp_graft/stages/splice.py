"""Splice: a base without its head, plus the head's upstream tensors, gives a new checkpoint.

The base is never written to: its files are hard-linked (copied only across file systems), the
head goes into one new shard, and everything is put together in a temporary folder that gets its
name when it is complete. A killed splice leaves only that folder, which the next one removes.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mtp_graft.checkpoint import quant_manifest
from mtp_graft.checkpoint.shards import (
    INDEX_NAME,
    check_index,
    is_full_disk,
    open_shard,
    stream_shard,
    values_size,
    write_index,
    write_json,
    write_text,
)
from mtp_graft.checkpoint.spliced import HEAD_SHARD
from mtp_graft.dsv4.variants import Linears, Variant, group_by_module, store_module
from mtp_graft.errors import GraftError
from mtp_graft.stages.splice_plan import Source, SplicePlan, plan_splice

_OWN_FILES = frozenset(
    {
        INDEX_NAME,
        "config.json",
        HEAD_SHARD,
        quant_manifest.MANIFEST_NAME,
        quant_manifest.MANIFEST_TEXT_NAME,
        quant_manifest.RECIPE_NAME,
    }
)
#: Beside the shard: index, config and manifests are a few MB at full size.
_MARGIN_BYTES = 64 * 2**20


@dataclass(frozen=True)
class SpliceResult:
    """What a splice wrote, or had written before."""

    checkpoint: Path
    variant: str
    tensors: int
    bytes_written: int
    already_done: bool = False


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a source, each read from its file when it is asked for."""

    def __init__(self, source: Source, stack: ExitStack) -> None:
        self._files = source.files
        paths = sorted(set(source.files.values()))
        self._open = {path: stack.enter_context(open_shard(path)) for path in paths}

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self._files[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def splice(
    base: Path,
    upstream: Path,
    out: Path,
    variant: Variant = "bf16",
    *,
    linears: Linears = "base",
    quantized: Path | None = None,
    copy: bool = False,
) -> SpliceResult:
    """Write `out`: the base's files linked, the upstream head as `variant` in a shard of its own.

    `rtn` rounds the routed experts to INT4, `gptq` takes them from the quantize stage's folder
    `quantized`, `mxfp4` keeps their codes, `bf16` decodes them (exact). `linears` says which FP8
    linears keep their codes (`dsv4.variants.Linears`; exact either way). Memory holds one module
    at a time.

    An `out` that the same inputs gave is returned as it is. Raises GraftError, leaving nothing
    behind, for inputs that are broken or do not fit each other, for another `out` that exists,
    and for a full disk.
    """
    plan = plan_splice(base, upstream, variant, linears, quantized)
    if out.exists():
        return _already_done(out, plan)
    with _temporary_folder(out) as folder:
        _check_space(folder, plan, copy=copy)
        _link_base(base, folder, copy=copy)
        stream_shard(plan.layout, _stored_tensors(plan), folder / HEAD_SHARD)
        _write_texts(plan, folder)
        _write_union_index(plan, folder)
        folder.rename(out)
    return SpliceResult(out, variant, len(plan.layout), plan.bytes)


def _already_done(out: Path, plan: SplicePlan) -> SpliceResult:
    """Return what an earlier splice of the same inputs left; GraftError if `out` is not that."""
    try:
        same = json.loads((out / quant_manifest.MANIFEST_NAME).read_text()) == plan.manifest
    except (OSError, ValueError):
        same = False
    if not same:
        raise GraftError(
            f"{out}: already exists, and not from these inputs; remove it or choose another folder"
        )
    check_index(out)
    return SpliceResult(out, plan.variant, len(plan.layout), plan.bytes, already_done=True)


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
        if isinstance(error, OSError) and is_full_disk(error):
            raise GraftError(f"{out}: the disk is full ({error}); make room") from error
        raise


def _check_space(folder: Path, plan: SplicePlan, *, copy: bool) -> None:
    needed = plan.bytes + _MARGIN_BYTES
    if copy or folder.stat().st_dev != plan.base.resolve().stat().st_dev:
        needed += sum(path.stat().st_size for path in _base_files(plan.base))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise GraftError(
            f"{folder.parent}: {free:,} bytes free, {needed:,} needed for {HEAD_SHARD} and what "
            "goes with it; make room or choose another folder"
        )


def _base_files(base: Path) -> list[Path]:
    """Return the base's files that the checkpoint takes over, hidden folders apart."""
    files = (path for path in sorted(base.rglob("*")) if path.is_file())
    inside = ((path, path.relative_to(base)) for path in files)
    return [
        path
        for path, relative in inside
        if str(relative) not in _OWN_FILES
        and not any(part.startswith(".") for part in relative.parts[:-1])
    ]


def _link_base(base: Path, folder: Path, *, copy: bool) -> None:
    for source in _base_files(base):
        target = folder / source.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(source, target, copy=copy)


def _link(source: Path, target: Path, *, copy: bool) -> None:
    place: Callable[[Path, Path], object] = shutil.copy2 if copy else os.link
    source = source.resolve()  # the hub's cache has relative symbolic links, which would break
    try:
        try:
            place(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copy2(source, target)
    except OSError as error:
        size = source.stat().st_size
        raise GraftError(
            f"{target}: cannot link or copy {source} ({size:,} bytes; {error})"
        ) from error


def _stored_tensors(plan: SplicePlan) -> Iterator[tuple[str, Tensor]]:
    """Yield the head's tensors as the checkpoint stores them, one stem at a time."""
    with ExitStack() as stack:
        head = _Tensors(plan.head, stack)
        experts = _Tensors(plan.experts, stack) if plan.experts else None
        for stem, by_part in group_by_module(head).items():
            parts = {part: head[name] for part, name in by_part.items()}
            sizes = {"group_size": plan.group_size}
            stored = store_module(stem, parts, plan.variant, experts, **sizes, linears=plan.linears)
            yield from stored.items()


def _write_texts(plan: SplicePlan, folder: Path) -> None:
    write_json(plan.config, folder / "config.json")
    write_json(plan.manifest, folder / quant_manifest.MANIFEST_NAME)
    text = quant_manifest.manifest_text(plan.manifest)
    write_text(text, folder / quant_manifest.MANIFEST_TEXT_NAME)
    base_recipe = plan.base / quant_manifest.RECIPE_NAME
    before = base_recipe.read_text() if base_recipe.exists() else None
    recipe = quant_manifest.recipe_text(plan.manifest, before)
    write_text(recipe, folder / quant_manifest.RECIPE_NAME)


def _write_union_index(plan: SplicePlan, folder: Path) -> None:
    metadata = json.loads((plan.base / INDEX_NAME).read_text()).get("metadata", {})
    # Counted, not added up: a base's own total_size can be missing or wrong.
    total = sum(values_size(folder / shard) for shard in {*plan.base_map.values(), HEAD_SHARD})
    index = {**plan.base_map, **dict.fromkeys(sorted(plan.layout), HEAD_SHARD)}
    write_index(index, total, folder, metadata)
