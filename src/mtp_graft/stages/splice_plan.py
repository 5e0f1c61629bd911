"""What a splice starts from: base, head and quantized experts, checked against each other.

Headers are read and no values, so that whatever is wrong is said before anything is written, or
downloaded.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_graft.checkpoint.quant_manifest import (
    HEAD_SHARD,
    MANIFEST_NAME,
    read_manifest,
    read_report,
)
from mtp_graft.checkpoint.quantization_config import (
    ExpertFormat,
    add_head,
    int4_group_size,
    read_quantization,
)
from mtp_graft.checkpoint.shards import Shard, read_index, read_meta
from mtp_graft.dsv4 import names
from mtp_graft.dsv4.head_shapes import head_shapes
from mtp_graft.dsv4.variants import (
    Linears,
    Variant,
    decode_head,
    store_head,
)
from mtp_graft.errors import GraftError, in_words
from mtp_graft.serving.doctor.checkpoint import modules_of
from mtp_graft.serving.doctor.schemes import mismatches
from mtp_graft.stages.inputs import check_base_tensor, read_model_config
from mtp_graft.stages.quantize import GPTQ

_EXPERTS: dict[str, ExpertFormat] = {
    "rtn": "int4",
    "gptq": "int4",
    "mxfp4": "mxfp4",
    "bf16": "bf16",
}


@dataclass(frozen=True)
class Tensors:
    """Tensors in a folder: where each one is, and its shape and dtype."""

    files: Mapping[str, Path]
    meta: Mapping[str, Tensor]


@dataclass(frozen=True)
class SplicePlan:
    """All that a splice will write, known before it writes anything."""

    base: Path
    base_map: Mapping[str, str]
    base_bytes: int  # of its tensors
    variant: Variant
    linears: Linears
    group_size: int
    head: Tensors  # upstream's, or those of a head that is taken as it is
    experts: Tensors | None  # GPTQ's
    layout: Mapping[str, Tensor]  # stored name -> meta tensor
    config: Mapping[str, Any]
    report: Mapping[str, Any] | None  # of the quantize stage
    published: Mapping[str, Any] | None  # the manifest of a head that is taken as it is

    @property
    def bytes(self) -> int:
        """Return the size of the head's values as stored."""
        return sum(tensor.nbytes for tensor in self.layout.values())


def plan_splice(
    base: Path,
    upstream: Path,
    variant: Variant | None,
    linears: Linears = "base",
    quantized: Path | None = None,
) -> SplicePlan:
    """Return what a splice of these inputs writes; raises GraftError where they do not fit.

    `upstream` is the master, or a folder with a head that was spliced before. Such a head is taken
    as it is, and says itself what its variant and linears are.
    """
    base_map, base_bytes = _check_base(base)
    published = read_manifest(upstream) if (upstream / MANIFEST_NAME).is_file() else None
    if published is None:
        head, variant = _read_upstream(upstream), variant or "mxfp4"
    else:
        head = _read_published(upstream, published)
        variant, linears = _described(upstream, published, head.meta, variant)
    config = _head_config(base, variant, linears)
    int4 = _EXPERTS[variant] == "int4"
    group_size = int4_group_size(config["quantization_config"]) if int4 else 128
    _check_fits(upstream, head.meta, head_shapes(config), group_size)
    report = None if quantized is None else read_report(quantized)
    experts = _read_experts(quantized) if variant == "gptq" and published is None else None
    layout = head.meta
    if published is None:
        given = None if experts is None else experts.meta
        layout = store_head(head.meta, variant, given, group_size=group_size, linears=linears)
    _check_schemes(base, config, layout)
    return SplicePlan(
        *(base, base_map, base_bytes, variant, linears, group_size, head, experts, layout),
        *(config, report, published),
    )


def _check_base(base: Path) -> tuple[dict[str, str], int]:
    """Return the base's weight map and the size of its tensors; GraftError if it is no base."""
    weight_map = read_index(base)
    if already := sorted(name for name in weight_map if name.startswith("mtp.")):
        raise GraftError(f"{base}: already has a head ({already[0]}, ...); expected none")
    size = sum(tensor.nbytes for tensor in read_meta(base, complete=True).values())
    model = read_model_config(base)
    for name in ("embed.weight", "head.weight"):
        check_base_tensor(base, name, weight_map, model)
    return weight_map, size


def _read_upstream(upstream: Path) -> Tensors:
    weight_map = read_index(upstream, "mtp.")
    names.upstream_head_names(weight_map, upstream)
    files = {name: upstream / shard for name, shard in weight_map.items()}
    return Tensors(files, dict(sorted(read_meta(upstream, "mtp.", complete=True).items())))


def _read_published(folder: Path, manifest: Mapping[str, Any]) -> Tensors:
    """Return the tensors of a spliced head, whose manifest says how many they are."""
    path = folder / HEAD_SHARD
    head = _read_files([path])
    size = sum(tensor.nbytes for tensor in head.meta.values())
    if (len(head.meta), size) != (manifest["tensors"], manifest["bytes"]):
        raise GraftError(
            f"{path}: has {len(head.meta)} tensors of {size:,} bytes, expected "
            f"{manifest['tensors']} of {manifest['bytes']:,} by {MANIFEST_NAME}; fetch it again"
        )
    # Values, which only verify reads, stand for what they must be.
    shapes = {
        f"{stem}.weight_shape": torch.tensor([codes.shape[0], 8 * codes.shape[1]])
        for name, codes in head.meta.items()
        if (stem := name.removesuffix(".weight_packed")) + ".weight_shape" in head.meta
    }
    return Tensors(head.files, {**head.meta, **shapes})


def _read_files(paths: Iterable[Path]) -> Tensors:
    files: dict[str, Path] = {}
    meta: dict[str, Tensor] = {}
    for path in paths:
        with Shard(path) as shard:
            meta |= dict(sorted(shard.meta.items()))
            files |= dict.fromkeys(shard.meta, path)
    return Tensors(files, meta)


def _described(
    folder: Path, manifest: Mapping[str, Any], head: Mapping[str, Tensor], wanted: str | None
) -> tuple[Variant, Linears]:
    """Return what a spliced head is; raises GraftError if another variant is wanted."""
    variant: Variant = manifest["variant"]
    if wanted not in (None, variant):
        raise GraftError(
            f"{folder}: is a {variant} head, which is taken as it is; {wanted} was asked for: "
            "leave that out, or graft from the upstream master"
        )
    if "mtp.0.ffn.shared_experts.w1.weight_scale" in head:
        return variant, "fp8"
    return variant, "base" if "mtp.0.e_proj.weight_scale" in head else "bf16"


def _head_config(base: Path, variant: Variant, linears: Linears) -> dict[str, Any]:
    path = base / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        layer, quantization = config["num_hidden_layers"], config["quantization_config"]
        quantization = add_head(quantization, layer, _EXPERTS[variant], linears)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraftError(
            f"{path}: {in_words(error)}; expected a compressed-tensors checkpoint's config with "
            "num_hidden_layers and quantization_config.config_groups"
        ) from error
    return {**config, "num_nextn_predict_layers": 1, "quantization_config": quantization}


def _check_schemes(base: Path, config: Mapping[str, Any], layout: Mapping[str, Tensor]) -> None:
    """Raise GraftError for a module that would load as noise, or not at all."""
    quantization, layers = read_quantization(config), config["num_hidden_layers"]
    for wrong in mismatches(quantization, modules_of(layout), layers):
        raise GraftError(
            f"{base / 'config.json'}: quantization_config{wrong.by}: {wrong.name} would load as "
            f"{wrong.loads}, expected {wrong.stored}; the base's targets or ignore list take it "
            "elsewhere (`mtp-graft doctor` says more), or the head is not what its manifest says"
        )


def _check_fits(
    upstream: Path,
    head: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    group_size: int,
) -> None:
    """Compare the head's tensors, as decoded, with those that the base's config asks for."""
    decoded = decode_head(head, group_size=group_size)
    found = {name: tuple(tensor.shape) for name, tensor in decoded.items()}
    wrong = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
    if wrong:
        shapes = (
            list(each[wrong[0]]) if wrong[0] in each else "none" for each in (found, expected)
        )
        raise GraftError(
            f"{upstream}: {wrong[0]} is {next(shapes)}, expected {next(shapes)} by the base's "
            f"config.json ({len(wrong)} of the head's {len(expected)} tensors differ); base and "
            "upstream are different models, or a shard is damaged: fetch it again"
        )
    for name, tensor in head.items():
        if names.FLOAT32.search(name) and tensor.dtype != torch.float32:
            raise GraftError(f"{upstream}: {name} is {tensor.dtype}, expected torch.float32")


def _read_experts(quantized: Path | None) -> Tensors:
    if quantized is None:
        raise GraftError(
            "variant gptq needs the quantize stage's folder; run `mtp-graft quantize` first, or "
            "choose rtn, mxfp4 or bf16"
        )
    experts = _read_files(sorted((quantized / GPTQ).glob("experts-*.safetensors")))
    if not experts.files:
        raise GraftError(f"{quantized / GPTQ}: has no experts-*.safetensors; run quantize")
    return experts
