"""Splice: a base without its head, plus the head's upstream tensors, gives a new checkpoint.

The base is never written to: its shards are hard-linked (copied only across file systems), the
head goes into one new shard, and index and config are written last.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mtp_graft.checkpoint.quantization_config import add_head
from mtp_graft.checkpoint.shards import (
    INDEX_NAME,
    load_tensors,
    num_bytes,
    read_index,
    save_shard,
    values_size,
    write_index,
    write_json,
)
from mtp_graft.dsv4 import names
from mtp_graft.errors import GraftError
from mtp_graft.quant import fp8_block, int4, mxfp4

HEAD_SHARD = "model-mtp-w4a16.safetensors"

Variant = Literal["rtn", "mxfp4", "bf16"]
_EXPERTS: dict[str, Literal["int4", "mxfp4", "bf16"]] = {
    "rtn": "int4",
    "mxfp4": "mxfp4",
    "bf16": "bf16",
}


@dataclass(frozen=True)
class SpliceResult:
    """What a splice wrote."""

    checkpoint: Path
    variant: str
    tensors: int
    bytes_written: int


def splice(
    base: Path, upstream: Path, out: Path, variant: Variant = "bf16", *, copy: bool = False
) -> SpliceResult:
    """Write `out`: the base's shards linked, the upstream head as `variant` in a shard of its own.

    `rtn` rounds the routed experts to INT4, `mxfp4` keeps their codes, `bf16` decodes them (exact).
    Attention, e_proj and h_proj keep their FP8 codes: their power-of-two scales are exact in BF16.
    Raises GraftError if the base already has a head, or the upstream head is not the one-block MTP.
    """
    weight_map = read_index(base)
    already = [name for name in weight_map if name.startswith("mtp.")]
    if already:
        raise GraftError(f"{base}: already has a head ({already[0]}, ...); expected none")
    head = _read_head(upstream)
    config = _head_config(base, variant)
    stored = _convert(head, variant)

    temporary = out.with_name(f".{out.name}.tmp")
    if out.exists():
        raise GraftError(f"{out}: already exists; remove it or choose another folder")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for source in sorted(base.iterdir()):
        if source.is_file() and source.name not in (INDEX_NAME, "config.json"):
            _link(source, temporary / source.name, copy=copy)
    save_shard(stored, temporary / HEAD_SHARD)
    written = sum(map(num_bytes, stored.values()))
    _write_union_index(base, weight_map, stored, temporary)
    write_json(config, temporary / "config.json")
    temporary.rename(out)
    return SpliceResult(out, variant, len(stored), written)


def _read_head(upstream: Path) -> dict[str, Tensor]:
    weight_map = read_index(upstream)
    head = sorted(name for name in weight_map if name.startswith("mtp."))
    if not head:
        raise GraftError(f"{upstream}: has no mtp.* tensors; expected the upstream master's head")
    blocks = sorted({name.split(".")[1] for name in head})
    if blocks != ["0"]:
        raise GraftError(
            f"{upstream}: has blocks mtp.{{{','.join(blocks)}}}; expected mtp.0 alone. "
            "Three blocks are a DSpark drafter, another architecture"
        )
    return load_tensors(upstream, head)


def _head_config(base: Path, variant: Variant) -> dict[str, Any]:
    path = base / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        layer, quantization = config["num_hidden_layers"], config["quantization_config"]
        quantization = add_head(quantization, layer, _EXPERTS[variant], fp8_projections=True)
    except (OSError, ValueError, KeyError) as error:
        raise GraftError(
            f"{path}: {error!r}; expected a compressed-tensors checkpoint's config with "
            "num_hidden_layers and quantization_config.config_groups"
        ) from error
    return {**config, "num_nextn_predict_layers": 1, "quantization_config": quantization}


def _convert(head: dict[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    """Return the head's tensors as the checkpoint stores them, from upstream's."""
    expert = {"rtn": _expert_int4, "mxfp4": _expert_mxfp4, "bf16": _expert_bf16}[variant]
    stored: dict[str, Tensor] = {}
    for name, tensor in head.items():
        if name.endswith(".scale"):
            continue  # goes with its weight
        stem = name.removesuffix(".weight")
        scale = head.get(f"{stem}.scale")
        if scale is None:
            stored[name] = tensor
        elif names.EXPERT.match(name):
            stored.update(expert(stem, tensor, scale))
        elif ".shared_experts." in name:
            stored[name] = fp8_block.decode(tensor, scale).to(torch.bfloat16)
        else:
            stored[name] = tensor
            stored[f"{stem}.weight_scale"] = scale.to(torch.bfloat16)
    return stored


def _expert_int4(stem: str, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    weight = mxfp4.decode(codes, scale)
    group_scale = int4.group_scale(weight, group_size=128)
    return {
        f"{stem}.weight_packed": int4.pack(int4.encode(weight, group_scale)),
        f"{stem}.weight_scale": group_scale,
        f"{stem}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _expert_mxfp4(stem: str, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    return {
        f"{stem}.weight_packed": codes.view(torch.uint8),
        f"{stem}.weight_scale": scale.view(torch.uint8),
    }


def _expert_bf16(stem: str, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    return {f"{stem}.weight": mxfp4.decode(codes, scale).to(torch.bfloat16)}


def _link(source: Path, target: Path, *, copy: bool) -> None:
    place: Callable[[Path, Path], object] = shutil.copy2 if copy else os.link
    source = source.resolve()  # the hub's cache has relative symbolic links, which would break
    try:
        place(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise GraftError(f"{target}: cannot link or copy {source} ({error})") from error
        shutil.copy2(source, target)


def _write_union_index(
    base: Path, weight_map: dict[str, str], stored: dict[str, Tensor], out: Path
) -> None:
    metadata = json.loads((base / INDEX_NAME).read_text()).get("metadata", {})
    # Counted, not added up: a base's own total_size can be missing or wrong.
    total = sum(values_size(out / shard) for shard in {*weight_map.values(), HEAD_SHARD})
    write_index({**weight_map, **dict.fromkeys(stored, HEAD_SHARD)}, total, out, metadata)
