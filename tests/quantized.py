"""Checkpoints by hand, and a quantize stage's folder without quantizing.

GPTQ's stand-ins are a coarser rounding.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mtp_graft.checkpoint.files import sha256
from mtp_graft.checkpoint.shards import save_shard, write_index
from mtp_graft.dsv4 import variants
from mtp_graft.quant import int4
from run_folder import recorded

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny-dsv4"
UPSTREAM = TINY / "upstream"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def tiny_quantization() -> Any:
    """Return the bundled base's section, as those of W4A16-FP8 bases are."""
    return read_json(TINY / "base" / "config.json")["quantization_config"]


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file, which may be a link to one that has to stay."""
    change(content := read_json(path))
    path.unlink()
    path.write_text(json.dumps(content))


def hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p) for p in folder.rglob("*") if p.is_file()}


def write_checkpoint(tensors: dict[str, Tensor], folder: Path) -> None:
    save_shard(tensors, folder / "model.safetensors")
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_index(dict.fromkeys(tensors, "model.safetensors"), size, folder)


def stand_in(weight: Tensor) -> dict[str, Tensor]:
    """Return an expert rounded with scales a sixteenth too large: not what nearest gives."""
    scale = (int4.group_scale(weight, 128).float() * 1.0625).to(torch.bfloat16)
    return variants.int4_parts(int4.encode(weight, scale), scale)


def write_quantized(folder: Path, upstream: dict[str, Tensor]) -> Path:
    """Write `folder` as `mtp-graft quantize` leaves it, in batches of 32 experts."""
    (folder / "gptq").mkdir(parents=True)
    decoded = variants.decode_head({n: t for n, t in upstream.items() if ".experts." in n})
    for first in (0, 32):
        batch: dict[str, Tensor] = {}
        for e in range(first, first + 32):
            for w in ("w1", "w2", "w3"):
                module = f"mtp.0.ffn.experts.{e}.{w}"
                parts = stand_in(decoded[f"{module}.weight"])
                batch |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        save_file(batch, folder / "gptq" / f"experts-{first:04d}-{first + 31:04d}.safetensors")
    (folder / "report.json").write_text(json.dumps(recorded("stages")["quantize/report.json"]))
    return folder
