"""Checks of files, tensors and config.json: what the config asks for, against what is there."""

import re
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.dsv4.formats import part_name, stored_as, weight_of
from mtp_graft.dsv4.head_shapes import base_shapes, head_shapes
from mtp_graft.dsv4.names import EXPERT, FLOAT32, NEVER_QUANTIZED
from mtp_graft.serving.doctor.checkpoint import Checkpoint
from mtp_graft.serving.doctor.findings import Finding, finding, findings, listed
from mtp_graft.serving.doctor.hardware import Target

_COMPRESSION = re.compile(r"\.attn\.(compressor|indexer)\.")
_OTHER_BLOCK = re.compile(r"^mtp\.[1-9]\d*\.")
#: Copies of the target's, for which vLLM's drafter has rules on GPUs.
_HEAD_COPIES = {"mtp.0.head.weight", "mtp.0.emb.tok_emb.weight"}
#: dtype that a tensor is stored in -> what is read as well.
_ALSO_READ = {
    torch.bfloat16: (torch.float16, torch.float32),
    torch.float32: (torch.bfloat16, torch.float16),  # a finding of its own
    torch.uint8: (torch.float8_e8m0fnu,),
    torch.int32: (torch.int64,),
}
Wrong = dict[str, tuple[object, object]]  # name -> found, expected


# Files


def shards(checkpoint: Checkpoint, _target: Target) -> Iterator[Finding]:
    """Find shards that are missing, cut off or not safetensors."""
    for shard, reason in checkpoint.unreadable.items():
        there = (checkpoint.folder / shard).is_file()
        yield finding("shard-unreadable" if there else "shard-missing", shard, reason, "a shard")


def index(checkpoint: Checkpoint, _target: Target) -> Iterator[Finding]:
    """Find differences between the index and what the shards hold."""
    for shard, held in checkpoint.shards.items():
        if lost := [n for n, s in checkpoint.index.items() if s == shard and n not in held]:
            where, found = f"{INDEX_NAME}: {listed(lost)}", f"{len(lost)} that {shard} has not"
            yield finding("index-entry-without-tensor", where, found, f"all of them in {shard}")
        if unlisted := [name for name in held if name not in checkpoint.index]:
            where, found = f"{shard}: {listed(unlisted)}", f"{len(unlisted)} not in {INDEX_NAME}"
            yield finding("tensor-without-index-entry", where, found, "an entry for every tensor")
    times = Counter(checkpoint.read_as[n] for held in checkpoint.shards.values() for n in held)
    if twice := sorted(name for name, count in times.items() if count > 1):
        yield finding("tensor-twice", listed(twice), f"{len(twice)} more than once", "each once")


# config.json


def config(checkpoint: Checkpoint, _target: Target) -> Iterator[Finding]:
    """Find a head that is absent, or of which config.json says something else."""
    layers, ratios = checkpoint.num_layers, checkpoint.ratios
    where = "config.json: compress_ratios"
    if len(ratios) < layers:
        found = f"{len(ratios)} entries" if ratios else repr(checkpoint.config.get(where[13:]))
        expected, cure = f"one for each of {layers} layers", "take config.json from the base"
        yield finding("compress-ratios", where, found, expected, "error", cure)
    if not checkpoint.has_head:
        yield finding("head-absent", "mtp.*", "no tensor", "a base without its head serves")
        return
    if ratios[layers:] != [0] and len(ratios) >= layers:
        found = f"{len(ratios)} entries, {ratios[-1]} the last"
        expected = f"{layers + 1} entries, the head's last and 0"
        yield finding("compress-ratios", where, found, expected)
    number = checkpoint.config.get("num_nextn_predict_layers")
    if number != 1:
        where = "config.json: num_nextn_predict_layers"
        yield finding("nextn-count", where, number, 1, "warning" if number is None else "error")


# Tensors


def dspark_drafter(checkpoint: Checkpoint, _target: Target) -> Iterator[Finding]:
    """Find the blocks of newer upstream checkpoints' drafter."""
    blocks = sorted({n.split(".")[1] for n in checkpoint.tensors if _OTHER_BLOCK.match(n)})
    if blocks:
        where, found = "mtp." + ", mtp.".join(blocks), f"{len(blocks)} blocks besides mtp.0"
        yield finding("dspark-drafter", where, found, "mtp.0 alone, as in the first release")


def names(checkpoint: Checkpoint, _target: Target) -> Iterator[Finding]:
    """Find tensors under another spelling of their name."""
    wrong: dict[str, Wrong] = {"scale-name": {}, "tensor-name": {}}
    for old, new in checkpoint.misnamed.items():
        is_scale = old.rpartition(".")[0] == new.rpartition(".")[0]
        wrong["scale-name" if is_scale else "tensor-name"][old] = old, f"{new}, the others alike"
    for kind, tensors in wrong.items():
        yield from findings(kind, tensors)


def contents(checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Compare the tensors with those that the config asks for, in the formats they are in."""
    asked, known = _asked(checkpoint)
    tensors = {n: t for n, t in checkpoint.tensors.items() if not _OTHER_BLOCK.match(n)}
    if target.platform != "cpu":
        known |= _HEAD_COPIES
    if len(checkpoint.ratios) < checkpoint.num_layers:  # a finding of its own
        known |= {name for name in tensors if _COMPRESSION.search(name)}
    missing = sorted(asked.keys() - tensors.keys() - checkpoint.unseen)
    strange = sorted(tensors.keys() - asked.keys() - known)
    for place in ("base", "head") if checkpoint.has_head else ("base",):
        if lost := [name for name in missing if _place(name) == place]:
            found = f"{len(lost)} tensors are in no shard"
            yield finding(f"{place}-tensor-missing", listed(lost), found, "what config.json asks")
        if more := [name for name in strange if _place(name) == place]:
            found = f"{len(more)} tensors that no module of the {place} has"
            yield finding(f"{place}-tensor-unknown", listed(more), found, "none")
    wrong: dict[str, Wrong] = {"tensor-shape": {}, "tensor-dtype": {}, "scale-shape": {}}
    for name in sorted(asked.keys() & tensors.keys()):
        tensor, like = tensors[name], asked[name]
        if tensor.dtype not in (like.dtype, *_ALSO_READ.get(like.dtype, ())):
            wrong["tensor-dtype"][name] = tensor.dtype, like.dtype
        elif tensor.shape != like.shape:
            kind = "scale-shape" if name.endswith("weight_scale") else "tensor-shape"
            wrong[kind][name] = list(tensor.shape), f"{list(like.shape)} by config.json"
    for kind, differing in wrong.items():
        yield from findings(kind, differing)


def _asked(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], set[str]]:
    """Return meta tensors that the config asks for, and names that have findings of their own."""
    asked, known = dict[str, Tensor](), set[str]()
    shapes = head_shapes(checkpoint.config) | base_shapes(checkpoint.config)
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        parts, stored = checkpoint.modules.get(module, {}), checkpoint.formats.get(module)
        as_usual = "int4" if EXPERT.match(name) else "plain"
        asked |= stored_as(name, shape, stored or as_usual, checkpoint.group_size)
        if NEVER_QUANTIZED.search(name) or (stored is None and weight_of(parts) is not None):
            known |= {part_name(module, part) for part in parts}
    return asked, known


def _place(name: str) -> str:
    return "head" if name.startswith("mtp.") else "base"


def precision(checkpoint: Checkpoint, _target: Target) -> Iterator[Finding]:
    """Find parameters that were rounded or quantized although they should not be."""
    rounded: Wrong = {
        name: (tensor.dtype, torch.float32)
        for name, tensor in checkpoint.tensors.items()
        if FLOAT32.search(name) and tensor.dtype in (torch.bfloat16, torch.float16)
    }
    yield from findings("float32-rounded", rounded)
    quantized: dict[str, Wrong] = {"compressor-fp8": {}, "compressor-quantized": {}}
    for module, parts in checkpoint.modules.items():
        stored = checkpoint.formats[module]
        if NEVER_QUANTIZED.search(module) and (stored != "plain" or "weight_scale" in parts):
            kind = "compressor-fp8" if stored == "fp8" else "compressor-quantized"
            quantized[kind][module] = stored, "BF16"
    for kind, wrong in quantized.items():
        yield from findings(kind, wrong)
