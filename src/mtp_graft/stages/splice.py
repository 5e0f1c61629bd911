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
from typing import Any

import torch
from torch import Tensor

from mtp_graft.checkpoint import quant_manifest
from mtp_graft.checkpoint.quantization_config import (
    ExpertFormat,
    add_head,
    check_head,
    int4_group_size,
)
from mtp_graft.checkpoint.shards import (
    INDEX_NAME,
    check_index,
    is_full_disk,
    num_bytes,
    open_shard,
    read_index,
    read_meta,
    stream_shard,
    values_size,
    write_index,
    write_json,
    write_text,
)
from mtp_graft.dsv4 import names
from mtp_graft.dsv4.head_shapes import head_shapes
from mtp_graft.dsv4.variants import (
    Variant,
    decoded_name,
    group_by_stem,
    is_expert,
    store_tensor,
)
from mtp_graft.errors import GraftError

HEAD_SHARD = "model-mtp-w4a16.safetensors"
#: Where the quantize stage leaves GPTQ's experts.
GPTQ_FOLDER = "gptq"

_EXPERTS: dict[str, ExpertFormat] = {
    "rtn": "int4",
    "gptq": "int4",
    "mxfp4": "mxfp4",
    "bf16": "bf16",
}
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


@dataclass(frozen=True)
class _Source:
    """Tensors in a folder: where each one is, and its shape and dtype."""

    files: Mapping[str, Path]
    meta: Mapping[str, Tensor]


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a source, each read from its file when it is asked for."""

    def __init__(self, source: _Source, stack: ExitStack) -> None:
        self._files = source.files
        paths = sorted(set(source.files.values()))
        self._open = {path: stack.enter_context(open_shard(path)) for path in paths}

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self._files[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclass(frozen=True)
class _Plan:
    """All that a splice will write, known before it writes anything."""

    base: Path
    base_map: Mapping[str, str]
    variant: Variant
    group_size: int
    head: _Source
    experts: _Source | None  # GPTQ's
    layout: Mapping[str, Tensor]  # stored name -> meta tensor
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """Return the size of the head's values as stored."""
        return sum(map(num_bytes, self.layout.values()))


def splice(
    base: Path,
    upstream: Path,
    out: Path,
    variant: Variant = "bf16",
    *,
    quantized: Path | None = None,
    copy: bool = False,
) -> SpliceResult:
    """Write `out`: the base's files linked, the upstream head as `variant` in a shard of its own.

    `rtn` rounds the routed experts to INT4, `gptq` takes them from the quantize stage's folder
    `quantized`, `mxfp4` keeps their codes, `bf16` decodes them (exact). Attention, e_proj and
    h_proj keep their FP8 codes: their power-of-two scales are exact in BF16. Memory holds one
    module at a time.

    An `out` that the same inputs gave is returned as it is. Raises GraftError, leaving nothing
    behind, for inputs that are broken or do not fit each other, for another `out` that exists,
    and for a full disk.
    """
    plan = _plan(base, upstream, variant, quantized)
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


# Reading and checking, before anything is written


def check_inputs(base: Path, upstream: Path) -> None:
    """Raise GraftError for what no stage could work with; reads headers only.

    A base that has a head or is cut off, an upstream head that is another or not whole.
    """
    _check_base(base)
    config = _head_config(base, "gptq")
    _check_head_complete(upstream, _read_head(upstream).meta, head_shapes(config))


def _plan(base: Path, upstream: Path, variant: Variant, quantized: Path | None) -> _Plan:
    base_map = _check_base(base)
    config = _head_config(base, variant)
    group_size = 0
    if _EXPERTS[variant] == "int4":
        group_size = int4_group_size(config["quantization_config"])
    head = _read_head(upstream)
    _check_head_complete(upstream, head.meta, head_shapes(config))
    report = None if quantized is None else quant_manifest.read_report(quantized)
    experts = _read_experts(quantized) if variant == "gptq" else None
    layout: dict[str, Tensor] = {}
    for stem, by_part in group_by_stem(head.meta).items():
        parts = {part: head.meta[name] for part, name in by_part.items()}
        given = experts.meta if experts else None
        layout.update(store_tensor(stem, parts, variant, given, group_size=group_size))
    manifest = quant_manifest.manifest(
        variant,
        config,
        report,
        _provenance(base, base_map, head, report, experts),
        len(layout),
        sum(map(num_bytes, layout.values())),
    )
    return _Plan(base, base_map, variant, group_size, head, experts, layout, config, manifest)


def _check_base(base: Path) -> dict[str, str]:
    weight_map = read_index(base)
    already = sorted(name for name in weight_map if name.startswith("mtp."))
    if already:
        raise GraftError(f"{base}: already has a head ({already[0]}, ...); expected none")
    return check_index(base)


def _head_config(base: Path, variant: Variant) -> dict[str, Any]:
    path = base / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        layer, quantization = config["num_hidden_layers"], config["quantization_config"]
        quantization = add_head(quantization, layer, _EXPERTS[variant], fp8_projections=True)
        check_head(quantization, layer, _EXPERTS[variant])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraftError(
            f"{path}: {error!r}; expected a compressed-tensors checkpoint's config with "
            "num_hidden_layers and quantization_config.config_groups"
        ) from error
    return {**config, "num_nextn_predict_layers": 1, "quantization_config": quantization}


def _read_head(upstream: Path) -> _Source:
    names.upstream_head_names(read_index(upstream, "mtp."), upstream)
    weight_map = check_index(upstream, "mtp.")
    files = {name: upstream / shard for name, shard in weight_map.items()}
    return _Source(files, read_meta(upstream, dict(sorted(weight_map.items()))))


def _check_head_complete(
    upstream: Path, head: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare the head's tensors with those that the base's config asks for."""
    found: dict[str, tuple[int, ...]] = {}
    for stem, by_part in group_by_stem(head).items():
        if "scale" in by_part and "weight" not in by_part:
            raise GraftError(f"{upstream}: {by_part['scale']} has no weight; fetch the shard again")
        tensor = head[by_part.get("weight", stem)]
        shape = list(tensor.shape)
        if is_expert(stem):
            shape[-1] *= 2  # two codes a byte
        found[decoded_name(stem, by_part)] = tuple(shape)
    if missing := sorted(expected.keys() - found.keys()):
        raise GraftError(
            f"{upstream}: has no {missing[0]} ({len(missing)} of the head's {len(expected)} "
            "tensors missing); fetch the shard again, or choose the upstream that fits the base"
        )
    if unknown := sorted(found.keys() - expected.keys()):
        raise GraftError(
            f"{upstream}: has {unknown[0]} ({len(unknown)} tensors that the one-block head has "
            "not); is it the upstream that fits the base?"
        )
    for name, logical in expected.items():
        if found[name] != logical:
            raise GraftError(
                f"{upstream}: {name} is {list(found[name])}, expected {list(logical)} by the "
                "base's config.json; base and upstream are different models"
            )
    for name, tensor in head.items():
        if names.FLOAT32.search(name) and tensor.dtype != torch.float32:
            raise GraftError(f"{upstream}: {name} is {tensor.dtype}, expected torch.float32")


def _read_experts(quantized: Path | None) -> _Source:
    if quantized is None:
        raise GraftError(
            "variant gptq needs the quantize stage's folder; run `mtp-graft quantize` first, or "
            "choose rtn, mxfp4 or bf16"
        )
    files: dict[str, Path] = {}
    meta: dict[str, Tensor] = {}
    for path in sorted((quantized / GPTQ_FOLDER).glob("experts-*.safetensors")):
        with open_shard(path) as tensors:
            held: dict[str, str] = dict.fromkeys(tensors.keys(), path.name)
        meta.update(read_meta(path.parent, held))
        files.update(dict.fromkeys(held, path))
    if not files:
        raise GraftError(f"{quantized / GPTQ_FOLDER}: has no experts-*.safetensors; run quantize")
    return _Source(files, meta)


def _provenance(
    base: Path,
    base_map: Mapping[str, str],
    head: _Source,
    report: Mapping[str, Any] | None,
    experts: _Source | None,
) -> dict[str, Any]:
    shards = sorted(set(head.files.values()))
    found: dict[str, Any] = {
        "base": quant_manifest.base_provenance(base, sorted(set(base_map.values()))),
        "upstream": quant_manifest.upstream_provenance(
            shards[0].parent, [path.name for path in shards]
        ),
    }
    if report is not None:
        files = [] if experts is None else sorted(set(experts.files.values()))
        found["quantize"] = quant_manifest.quantize_provenance(report, files)
    return found


# Writing


def _already_done(out: Path, plan: _Plan) -> SpliceResult:
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


def _check_space(folder: Path, plan: _Plan, *, copy: bool) -> None:
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


def _stored_tensors(plan: _Plan) -> Iterator[tuple[str, Tensor]]:
    """Yield the head's tensors as the checkpoint stores them, one stem at a time."""
    with ExitStack() as stack:
        head = _Tensors(plan.head, stack)
        experts = _Tensors(plan.experts, stack) if plan.experts else None
        for stem, by_part in group_by_stem(head).items():
            parts = {part: head[name] for part, name in by_part.items()}
            stored = store_tensor(stem, parts, plan.variant, experts, group_size=plan.group_size)
            yield from stored.items()


def _write_texts(plan: _Plan, folder: Path) -> None:
    write_json(plan.config, folder / "config.json")
    write_json(plan.manifest, folder / quant_manifest.MANIFEST_NAME)
    text = quant_manifest.manifest_text(plan.manifest)
    write_text(text, folder / quant_manifest.MANIFEST_TEXT_NAME)
    base_recipe = plan.base / quant_manifest.RECIPE_NAME
    before = base_recipe.read_text() if base_recipe.exists() else None
    recipe = quant_manifest.recipe_text(plan.manifest, before)
    write_text(recipe, folder / quant_manifest.RECIPE_NAME)


def _write_union_index(plan: _Plan, folder: Path) -> None:
    metadata = json.loads((plan.base / INDEX_NAME).read_text()).get("metadata", {})
    # Counted, not added up: a base's own total_size can be missing or wrong.
    total = sum(values_size(folder / shard) for shard in {*plan.base_map.values(), HEAD_SHARD})
    index = {**plan.base_map, **dict.fromkeys(sorted(plan.layout), HEAD_SHARD)}
    write_index(index, total, folder, metadata)
