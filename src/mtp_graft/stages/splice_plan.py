"""What a splice starts from: base, head and quantized experts, checked against each other.

Headers are read and nothing else, so that all that is wrong is said before anything is written.
"""

import json
from collections.abc import Mapping
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
    check_index,
    num_bytes,
    open_shard,
    read_index,
    read_meta,
)
from mtp_graft.dsv4 import names
from mtp_graft.dsv4.head_shapes import head_shapes
from mtp_graft.dsv4.variants import (
    Linears,
    Variant,
    decoded_name,
    group_by_module,
    is_expert,
    store_module,
)
from mtp_graft.errors import GraftError, in_words
from mtp_graft.stages.inputs import check_base_tensor, read_model_config
from mtp_graft.stages.quantize import GPTQ

_EXPERTS: dict[str, ExpertFormat] = {
    "rtn": "int4",
    "gptq": "int4",
    "mxfp4": "mxfp4",
    "bf16": "bf16",
}


@dataclass(frozen=True)
class Source:
    """Tensors in a folder: where each one is, and its shape and dtype."""

    files: Mapping[str, Path]
    meta: Mapping[str, Tensor]


@dataclass(frozen=True)
class SplicePlan:
    """All that a splice will write, known before it writes anything."""

    base: Path
    base_map: Mapping[str, str]
    variant: Variant
    linears: Linears
    group_size: int
    head: Source
    experts: Source | None  # GPTQ's
    layout: Mapping[str, Tensor]  # stored name -> meta tensor
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """Return the size of the head's values as stored."""
        return sum(map(num_bytes, self.layout.values()))


def check_inputs(base: Path, upstream: Path) -> None:
    """Raise GraftError for what no stage could work with; reads headers only.

    A base that is no DeepSeek-V4, has a head or is cut off, or has an embedding or LM head of
    another size than its config; an upstream head that is another or not whole.
    """
    model, weight_map = read_model_config(base), _check_base(base)
    for name in ("embed.weight", "head.weight"):
        check_base_tensor(base, name, weight_map, model)
    config = _head_config(base, "gptq", "base")
    _check_head_complete(upstream, _read_head(upstream).meta, head_shapes(config))


def plan_splice(
    base: Path, upstream: Path, variant: Variant, linears: Linears, quantized: Path | None
) -> SplicePlan:
    """Return what a splice of these inputs writes; raises GraftError where they do not fit."""
    base_map = _check_base(base)
    config = _head_config(base, variant, linears)
    group_size = 0
    if _EXPERTS[variant] == "int4":
        group_size = int4_group_size(config["quantization_config"])
    head = _read_head(upstream)
    _check_head_complete(upstream, head.meta, head_shapes(config))
    report = None if quantized is None else quant_manifest.read_report(quantized)
    experts = _read_experts(quantized) if variant == "gptq" else None
    layout: dict[str, Tensor] = {}
    for stem, by_part in group_by_module(head.meta).items():
        parts = {part: head.meta[name] for part, name in by_part.items()}
        given = experts.meta if experts else None
        layout.update(
            store_module(stem, parts, variant, given, group_size=group_size, linears=linears)
        )
    manifest = quant_manifest.manifest(
        variant,
        linears,
        config,
        report,
        _provenance(base, base_map, head, report, experts),
        len(layout),
        sum(map(num_bytes, layout.values())),
    )
    return SplicePlan(
        base, base_map, variant, linears, group_size, head, experts, layout, config, manifest
    )


def _check_base(base: Path) -> dict[str, str]:
    weight_map = read_index(base)
    already = sorted(name for name in weight_map if name.startswith("mtp."))
    if already:
        raise GraftError(f"{base}: already has a head ({already[0]}, ...); expected none")
    return check_index(base)


def _head_config(base: Path, variant: Variant, linears: Linears) -> dict[str, Any]:
    path = base / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        layer, quantization = config["num_hidden_layers"], config["quantization_config"]
        quantization = add_head(quantization, layer, _EXPERTS[variant], linears)
        check_head(quantization, layer, _EXPERTS[variant], linears)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraftError(
            f"{path}: {in_words(error)}; expected a compressed-tensors checkpoint's config with "
            "num_hidden_layers and quantization_config.config_groups"
        ) from error
    return {**config, "num_nextn_predict_layers": 1, "quantization_config": quantization}


def _read_head(upstream: Path) -> Source:
    names.upstream_head_names(read_index(upstream, "mtp."), upstream)
    weight_map = check_index(upstream, "mtp.")
    files = {name: upstream / shard for name, shard in weight_map.items()}
    return Source(files, read_meta(upstream, dict(sorted(weight_map.items()))))


def _check_head_complete(
    upstream: Path, head: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare the head's tensors with those that the base's config asks for."""
    found: dict[str, tuple[int, ...]] = {}
    for stem, by_part in group_by_module(head).items():
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


def _read_experts(quantized: Path | None) -> Source:
    if quantized is None:
        raise GraftError(
            "variant gptq needs the quantize stage's folder; run `mtp-graft quantize` first, or "
            "choose rtn, mxfp4 or bf16"
        )
    files: dict[str, Path] = {}
    meta: dict[str, Tensor] = {}
    for path in sorted((quantized / GPTQ).glob("experts-*.safetensors")):
        with open_shard(path) as tensors:
            held: dict[str, str] = dict.fromkeys(tensors.keys(), path.name)
        meta.update(read_meta(path.parent, held))
        files.update(dict.fromkeys(held, path))
    if not files:
        raise GraftError(f"{quantized / GPTQ}: has no experts-*.safetensors; run quantize")
    return Source(files, meta)


def _provenance(
    base: Path,
    base_map: Mapping[str, str],
    head: Source,
    report: Mapping[str, Any] | None,
    experts: Source | None,
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
