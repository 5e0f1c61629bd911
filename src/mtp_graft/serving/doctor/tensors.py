"""Checks of files, tensors and config.json: what the config asks for, against what is there."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.dsv4.head_shapes import base_shapes, head_shapes, stored_as
from mtp_graft.dsv4.names import EXPERT, FLOAT32, NEVER_QUANTIZED
from mtp_graft.serving.doctor.checkpoint import Checkpoint
from mtp_graft.serving.doctor.findings import Finding, finding, findings, listed
from mtp_graft.serving.doctor.target import Target

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


# Files


def shards(checkpoint: Checkpoint, _target: Target) -> Iterator[Finding]:
    """Find shards that are missing, cut off or not safetensors."""
    for shard, reason in checkpoint.unreadable.items():
        there = (checkpoint.folder / shard).is_file()
        yield finding("shard-unreadable" if there else "shard-missing", shard, reason, "a shard")


def index(checkpoint: Checkpoint, _target: Target) -> Iterator[Finding]:
    """Find differences between the index and what the shards hold."""
    held = checkpoint.shards
    lost = {n: s for n, s in checkpoint.index.items() if s in held and n not in held[s]}
    for shard in sorted(set(lost.values())):
        names = [name for name, its_shard in lost.items() if its_shard == shard]
        found = f"{len(names)} names that {shard} does not hold"
        where = f"{INDEX_NAME}: {listed(names)}"
        yield finding("index-entry-without-tensor", where, found, f"all of them in {shard}")
    for shard, tensors in held.items():
        if names := [name for name in tensors if name not in checkpoint.index]:
            found = f"{len(names)} tensors that {INDEX_NAME} does not list"
            where, expected = f"{shard}: {listed(names)}", "an entry for every tensor"
            yield finding("tensor-without-index-entry", where, found, expected)
    times = Counter(checkpoint.read_as[name] for tensors in held.values() for name in tensors)
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
    wrong: dict[str, dict[str, tuple[object, object]]] = {"scale-name": {}, "tensor-name": {}}
    for old, new in checkpoint.misnamed.items():
        is_scale = old.rpartition(".")[0] == new.rpartition(".")[0]
        wrong["scale-name" if is_scale else "tensor-name"][old] = old, f"{new}, the others alike"
    for kind, tensors in wrong.items():
        yield from findings(kind, tensors)


def contents(checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Compare the tensors with those that the config asks for, in the formats they are in."""
    head, base = head_shapes(checkpoint.config), base_shapes(checkpoint.config)
    tensors, modules = checkpoint.tensors, checkpoint.modules
    asked: dict[str, Tensor] = {}
    known = set() if target.platform == "cpu" else set(_HEAD_COPIES)
    if len(checkpoint.ratios) < checkpoint.num_layers:  # a finding of its own
        known |= {name for name in tensors if _COMPRESSION.search(name)}
    for name, shape in (head | base).items():
        module = modules.get(name.removesuffix(".weight"))
        stored = (module and module.format) or ("int4" if EXPERT.match(name) else "plain")
        asked |= stored_as(name, shape, stored, checkpoint.group_size)
        is_odd = module and module.format is None and module.weight is not None
        if module and (NEVER_QUANTIZED.search(name) or is_odd):
            known |= set(module.full_names)  # a finding of its own
    for place in ("base", "head") if checkpoint.has_head else ("base",):
        shapes = {name for name in asked if name.startswith("mtp.") == (place == "head")}
        if lost := sorted(shapes - tensors.keys() - checkpoint.unseen):
            found = f"{len(lost)} tensors are in no shard"
            yield finding(f"{place}-tensor-missing", listed(lost), found, "what config.json asks")
        strange = {n for n in tensors if n.startswith("mtp.") == (place == "head")} - shapes - known
        if strange := {name for name in strange if not _OTHER_BLOCK.match(name)}:
            found = f"{len(strange)} tensors that no module of the {place} has"
            yield finding(f"{place}-tensor-unknown", listed(sorted(strange)), found, "none")
    yield from _differences(tensors, asked)


def _differences(tensors: Mapping[str, Tensor], asked: Mapping[str, Tensor]) -> Iterator[Finding]:
    wrong: dict[str, dict[str, tuple[object, object]]] = {
        "tensor-shape": {},
        "tensor-dtype": {},
        "scale-shape": {},
    }
    for name, like in asked.items():
        if (tensor := tensors.get(name)) is None:
            continue
        if tensor.dtype not in (like.dtype, *_ALSO_READ.get(like.dtype, ())):
            wrong["tensor-dtype"][name] = tensor.dtype, like.dtype
        elif tensor.shape != like.shape:
            kind = "scale-shape" if name.endswith("weight_scale") else "tensor-shape"
            wrong[kind][name] = list(tensor.shape), f"{list(like.shape)} by config.json"
    for kind, names in wrong.items():
        yield from findings(kind, names)


def precision(checkpoint: Checkpoint, _target: Target) -> Iterator[Finding]:
    """Find parameters that were rounded or quantized although they should not be."""
    halves = (torch.bfloat16, torch.float16)
    rounded = {
        name: (tensor.dtype, torch.float32)
        for name, tensor in checkpoint.tensors.items()
        if FLOAT32.search(name) and tensor.dtype in halves
    }
    yield from findings("float32-rounded", rounded)
    for kind, is_fp8 in (("compressor-fp8", True), ("compressor-quantized", False)):
        quantized = {
            module.stem: (module.format, "BF16")
            for module in checkpoint.modules.values()
            if NEVER_QUANTIZED.search(module.stem)
            and (module.format != "plain" or "weight_scale" in module.parts)
            and (module.format == "fp8") == is_fp8
        }
        yield from findings(kind, quantized)
