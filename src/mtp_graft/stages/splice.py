"""Splice: a base without its head, plus a head, gives a new checkpoint.

The base is never written to. A temporary folder gets its name when it is complete; a killed splice
leaves only that, which the next one removes.
"""

import errno
import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from mtp_graft.checkpoint import files, quant_manifest, shards
from mtp_graft.checkpoint.makers import expect_format
from mtp_graft.checkpoint.quant_manifest import HEAD_SHARD, Manifest, QuantizeReport
from mtp_graft.checkpoint.quantization_config import add_head, read_quantization
from mtp_graft.dsv4.config import num_stages
from mtp_graft.dsv4.variants import modules_of, part_name, store_head
from mtp_graft.errors import GraftError
from mtp_graft.recipe import LinearDtype, Variant
from mtp_graft.serving.command import Platform
from mtp_graft.serving.doctor import examine
from mtp_graft.serving.doctor.checkpoint import Checkpoint, read_checkpoint
from mtp_graft.serving.doctor.hardware import Target
from mtp_graft.stages.inputs import Tensors, check_head, drafter_config, expert_files, read_master

#: Files that a splice writes itself; all others are the base's.
_TEXTS = (quant_manifest.MANIFEST_NAME, quant_manifest.MANIFEST_TEXT_NAME)
_OWN_FILES = (HEAD_SHARD, shards.INDEX_NAME, "config.json", *_TEXTS, quant_manifest.RECIPE_NAME)


@dataclass(frozen=True)
class SplicePlan:
    """All that a splice will write, known from headers before it writes anything."""

    base: Checkpoint  # without a head
    variant: Variant
    linear_dtype: LinearDtype
    head: Tensors  # upstream's, or those of a head that is taken as it is
    experts: Tensors  # GPTQ's; none for other variants
    store: Callable[..., dict[str, Tensor]]  # `store_head` of upstream's and `experts`
    layout: Mapping[str, Tensor]  # stored name -> meta tensor
    config: Mapping[str, Any]
    report: QuantizeReport | None  # of the quantize stage
    published: Manifest | None  # the manifest of a head that is taken as it is

    @property
    def bytes(self) -> int:
        """Return the size of the head's values as stored."""
        return sum(tensor.nbytes for tensor in self.layout.values())


def splice(
    base: Path,
    upstream: Path,
    out: Path,
    variant: Variant | None = None,
    *,
    linear_dtype: LinearDtype = "base",
    quantized: Path | None = None,
    copy: bool = False,
) -> SplicePlan:
    """Write `out`: the base's files linked, the head as `variant` in a shard of its own.

    `rtn` rounds the routed experts to INT4, `gptq` takes them from the quantize stage's folder
    `quantized`, `mxfp4` (the default) keeps their codes, `bf16` decodes them (exact).
    `linear_dtype` says which FP8 linears keep their codes (exact either way). A head in `upstream`
    that was spliced before is taken as it is. Memory holds one module at a time.

    An `out` that the same inputs gave is left as it is. Raises GraftError, leaving nothing behind,
    for inputs that do not fit each other, another `out` that exists, and a full disk.
    """
    check_out(out, base, upstream)
    plan = plan_splice(open_base(base), upstream, variant, linear_dtype, quantized)
    manifest = _manifest(plan)
    if out.exists():
        path = out / quant_manifest.MANIFEST_NAME
        if not path.is_file() or files.read_object(path, "a manifest", f"remove {out}") != manifest:
            raise GraftError(f"{out}: already exists, and not from these inputs; choose another")
        shards.read_meta(out, complete=True)
        return plan
    with files.new_folder(out) as folder:
        for name, source in base_files(base).items():
            _link(source, folder / name, copy=copy)
        if plan.published is None:
            shards.stream_shard(plan.layout, _stored_tensors(plan), folder / HEAD_SHARD)
        else:
            _link(upstream / HEAD_SHARD, folder / HEAD_SHARD, copy=copy)
        _write_texts(plan, manifest, folder)
    return plan


def check_out(out: Path, *inputs: Path) -> None:
    """Raise GraftError for an output in the folder of an input, to which nothing is written."""
    if above := [folder for folder in inputs if out.resolve().is_relative_to(folder.resolve())]:
        raise GraftError(f"{out}: is in {above[0]}; choose another folder")


def open_base(folder: Path) -> Checkpoint:
    """Read config, index and headers; raises GraftError for what is no base without a head."""
    expect_format(folder, "base")
    base = read_checkpoint(folder)
    if base.foreign_format:
        raise GraftError(f"{folder}: is {base.foreign_format}; expected a W4A16-FP8 checkpoint")
    for shard, why in base.unreadable.items():
        raise GraftError(f"{folder / shard}: {why}")
    if any(name.startswith("mtp.") for name in base.read_as):
        raise GraftError(f"{folder}: already has a head (tensors mtp.*); expected none")
    if base.formats.get("layers.0.attn.wq_b") == "plain":
        raise GraftError(f"{folder}: its attention is not quantized; expected FP8: W4A16-FP8")
    if isinstance(base.quantization, GraftError):
        raise GraftError(f"{base.quantization}; name such a one instead") from base.quantization
    return base


def plan_splice(
    base: Checkpoint,
    upstream: Path,
    variant: Variant | None,
    dtype: LinearDtype = "base",
    quantized: Path | None = None,
) -> SplicePlan:
    """Return what a splice of these inputs writes, by headers; GraftError where they do not fit."""
    given, experts = None, Tensors()
    if (upstream / quant_manifest.MANIFEST_NAME).is_file():  # spliced before: it says what it is
        given = quant_manifest.read_manifest(upstream)
        head = Tensors.in_files([upstream / HEAD_SHARD])
        variant, dtype = _describe(upstream, given, head.meta, variant)
    else:
        expect_format(upstream, "head")
        head, variant = read_master(upstream), variant or "mxfp4"
        if variant == "gptq":
            experts = Tensors.in_files(expert_files(quantized))
    config = config_with_head(base.config, drafter_config(upstream, head.meta), variant, dtype)
    quantization = read_quantization(config, base.folder / "config.json")
    is_int4 = variant in ("rtn", "gptq")
    group_size = quantization.group_size([base.num_layers], "int4") if is_int4 else 128
    if group_size < 0:
        found = f"its INT4 experts have a scale a channel, which {variant} does not make"
        raise GraftError(f"{base.folder}: {found}; `mtp-graft graft` adds an mxfp4 or bf16 head")
    try:
        check_head(upstream, head, config, group_size)
    except GraftError:
        _ask_doctor(base, base.config, {})  # whether config.json is not the base's either
        raise
    report = None if quantized is None else quant_manifest.read_report(quantized)
    store = partial(store_head, variant=variant, group_size=group_size, linear_dtype=dtype)
    with head.named():
        layout = store(head.meta, gptq_experts=experts.meta) if given is None else head.meta
    _ask_doctor(base, config, layout)
    return SplicePlan(base, variant, dtype, head, experts, store, layout, config, report, given)


def _describe(
    folder: Path, manifest: Manifest, head: Mapping[str, Tensor], wanted: str | None
) -> tuple[Variant, LinearDtype]:
    """Return what a spliced head is; GraftError for a damaged one, or if another is wanted."""
    expected, size = manifest["tensors"], sum(tensor.nbytes for tensor in head.values())
    if (len(head), size) != (expected, manifest["bytes"]):
        found = f"{folder / HEAD_SHARD}: has {len(head)} tensors of {size:,} bytes, expected"
        named = f"{expected} of {manifest['bytes']:,} by {quant_manifest.MANIFEST_NAME}"
        raise GraftError(f"{found} {named}; fetch it again")
    variant: Variant = manifest["variant"]
    if wanted not in (None, variant):
        found = f"is a {variant} head, which is taken as it is; {wanted} was asked for"
        raise GraftError(f"{folder}: {found}: leave that out, or graft from upstream")
    return variant, linear_dtype_of(head)


def linear_dtype_of(head: Container[str]) -> LinearDtype:
    """Return what a spliced head's linears are stored as, by their names."""
    if "mtp.0.ffn.shared_experts.w1.weight_scale" in head:
        return "fp8"
    projections = (f"mtp.0.{name}.weight_scale" for name in ("e_proj", "main_proj"))
    return "base" if any(name in head for name in projections) else "bf16"


def config_with_head(
    config: Mapping[str, Any], drafter: Mapping[str, Any], variant: Variant, dtype: LinearDtype
) -> dict[str, Any]:
    """Return config.json of a base with a head; `drafter` is what `drafter_config` says of it."""
    section, layer = config["quantization_config"], config["num_hidden_layers"]
    section = add_head(section, layer, variant, dtype, num_stages(drafter))
    return {**config, "num_nextn_predict_layers": 1, **drafter, "quantization_config": section}


def _ask_doctor(base: Checkpoint, config: Mapping[str, Any], layout: Mapping[str, Tensor]) -> None:
    """Raise GraftError, in doctor's words, for errors of base and head on any platform."""
    index = {**base.index, **dict.fromkeys(layout, HEAD_SHARD)}
    made = Checkpoint(base.folder, config, index, {HEAD_SHARD: layout, **base.shards}, {})
    for platform in (None, *get_args(Platform)):  # None has the errors of all
        found = examine(made, Target(None, platform, None))
        if not (errors := [each for each in found if each.severity == "error"]):
            return
    first, *others = errors
    said = f"{first.where}: {first.found}; expected {first.expected}: {first.why}; {first.cure}"
    more = f" (also: {', '.join(each.id for each in others)})" if others else ""
    what, cure = (", with a head", ", or take another head") if layout else ("", "")
    raise GraftError(f"{base.folder}{what}: {said}{cure}{more}")


def _manifest(plan: SplicePlan) -> Manifest:
    """Return what the checkpoint will say about its head, with hashes of what it is made of."""
    base = quant_manifest.base_provenance(plan.base.folder, plan.base.index.values())
    if plan.published is not None:
        origin = dict(plan.published["provenance"])
        if (made_for := origin.get("base")) != base:
            origin.setdefault("made_for", made_for)
        return {**plan.published, "provenance": {**origin, "base": base}}
    upstream = quant_manifest.hashes(plan.head.files.values())
    provenance: dict[str, Any] = {"base": base, "upstream": upstream}
    about = next(iter(plan.head.files.values())).parent / quant_manifest.HEALED_NAME
    if about.exists():
        provenance["healed"] = files.read_object(about, "what a head was trained on")
    if plan.report is not None:
        experts = plan.experts.files.values()
        provenance["quantize"] = quant_manifest.quantize_provenance(plan.report, experts)
    said = plan.variant, plan.linear_dtype, plan.config, plan.report, provenance
    return quant_manifest.manifest(*said, num_tensors=len(plan.layout), num_bytes=plan.bytes)


def base_files(base: Path) -> dict[str, Path]:
    """Return the base's files that the checkpoint takes over, by name: all but unnamed shards."""
    named = set(shards.read_weight_map(base / shards.INDEX_NAME).values())
    return {
        name: path
        for name, path in files.visible_files(base).items()
        if name not in _OWN_FILES and (name in named or path.suffix != ".safetensors")
    }


def _link(source: Path, target: Path, *, copy: bool) -> None:
    """Hard-link a file; copy it if asked to, or if it lies on another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # the hub's cache has relative symbolic links, which would break
    if not copy:
        try:
            return os.link(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
    shutil.copy2(source, target)


def _stored_tensors(plan: SplicePlan) -> Iterator[tuple[str, Tensor]]:
    """Yield the head's tensors as the checkpoint stores them, one module at a time."""
    with plan.head.named(), plan.head.opened() as head, plan.experts.opened() as experts:
        for module, parts in modules_of(plan.head.meta).items():
            names = [part_name(module, part) for part in parts]
            stored = plan.store({name: head[name] for name in names}, gptq_experts=experts)
            yield from stored.items()


def _write_texts(plan: SplicePlan, manifest: Manifest, folder: Path) -> None:
    """Write config, manifest and recipe; last, the index of base and head."""
    files.write_json(plan.config, folder / "config.json")
    files.write_json(manifest, folder / quant_manifest.MANIFEST_NAME)
    text = quant_manifest.manifest_text(manifest)
    files.write_text(text, folder / quant_manifest.MANIFEST_TEXT_NAME)
    base_recipe = plan.base.folder / quant_manifest.RECIPE_NAME
    before = base_recipe.read_text(errors="backslashreplace") if base_recipe.is_file() else None
    recipe = quant_manifest.recipe_text(manifest, before)
    files.write_text(recipe, folder / quant_manifest.RECIPE_NAME)
    metadata = files.read_object(plan.base.folder / shards.INDEX_NAME, "an index").get("metadata")
    index = {**plan.base.index, **dict.fromkeys(sorted(plan.layout), HEAD_SHARD)}
    total = sum(tensor.nbytes for tensor in plan.base.tensors.values()) + plan.bytes
    shards.write_index(index, total, folder, metadata)
