"""Checks of files, tensors and config.json: what the config asks for, against what is there."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from mtp_graft.checkpoint.files import fetched, read_object
from mtp_graft.checkpoint.makers import CONSOLIDATED
from mtp_graft.checkpoint.shards import INDEX_NAME
from mtp_graft.dsv4.config import num_stages, unread_keys
from mtp_graft.dsv4.names import EXPERT, FLOAT32, HEAD_COPIES, NEVER_QUANTIZED, QUANTIZED
from mtp_graft.dsv4.variants import part_name, stored_as, weight_of
from mtp_graft.errors import in_words
from mtp_graft.serving.doctor.checkpoint import Checkpoint
from mtp_graft.serving.doctor.findings import Defect, Finding, Severity, finding, listed, merged
from mtp_graft.serving.doctor.hardware import Target

_COMPRESSION = re.compile(r"\.attn\.(compressor|indexer)\.")
#: dtype that a tensor is stored in -> what is read as well.
_ALSO_READ = {
    torch.bfloat16: (torch.float32,),
    torch.float32: (torch.bfloat16,),  # a finding of its own
    torch.int32: (torch.int64,),
}
#: Files besides that vLLM reads. It stops at one of the first that is damaged.
_STOPS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_GOES_ON = ("generation_config.json", "chat_template.jinja")


class _Tokenizer(TypedDict):
    model: Annotated[dict[str, Any], Field(min_length=1)]


def shards(checkpoint: Checkpoint, _target: Target) -> Iterator[Finding]:
    """Find shards that are missing, cut off or not safetensors."""
    for shard, reason in checkpoint.unreadable.items():
        there = (checkpoint.folder / shard).is_file()
        yield finding("shard-unreadable" if there else "shard-missing", shard, reason, "a shard")


def files(checkpoint: Checkpoint, _target: Target) -> Iterator[Finding]:
    """Find left-over shards, a wrong size in the index, tokenizer and settings that are no JSON."""
    if stale := sorted(checkpoint.stale):
        taken = [name for name in stale if Path(name).match(CONSOLIDATED)]
        id_ = "shard-consolidated" if taken else "shard-stale"
        yield finding(id_, listed(taken or stale), f"not in {INDEX_NAME}", "shards that it names")
    if not checkpoint.folder.is_dir():  # headers alone
        return
    metadata = read_object(checkpoint.folder / INDEX_NAME, "an index").get("metadata") or {}
    given, total = metadata.get("total_size"), sum(t.nbytes for t in checkpoint.tensors.values())
    if given not in (None, total) and not checkpoint.unreadable:
        yield finding("index-total-size", f"{INDEX_NAME}: total_size", given, f"{total}, the sum")
    there = {path.name for path in checkpoint.folder.iterdir()} & {*_STOPS, *_GOES_ON}
    level: Severity
    if missing := sorted({*_STOPS[:2], *_GOES_ON[:1]} - there):
        level = "error" if _STOPS[0] in missing else "warning"
        yield finding("file-missing", listed(missing), "not there", "as in the base", level)
    for name in sorted(there):
        path = checkpoint.folder / name
        try:
            data, is_json = fetched(path.read_bytes() if path.is_file() else b""), ".json" in name
            schema = TypeAdapter(_Tokenizer if name == _STOPS[0] else dict[str, Any])
            schema.validate_json(data) if is_json else data.decode()
        except (OSError, ValueError) as error:
            level = "error" if name in _STOPS else "warning"
            yield finding("file-unreadable", name, in_words(error), "the whole file", level)


@merged
def index(checkpoint: Checkpoint, _target: Target) -> Iterator[Defect]:
    """Find differences between the index and what the shards hold."""
    held = [(name, shard) for shard, found in checkpoint.shards.items() for name in found]
    there = {name for name, _ in held}
    for name, shard in checkpoint.index.items():
        if name not in there and shard in checkpoint.shards:
            yield "index-entry-without-tensor", name, f"not in {shard}", f"as in {INDEX_NAME}"
    for name, shard in held:
        listed_in = checkpoint.index.get(name)
        if listed_in is None or name not in checkpoint.shards.get(listed_in, {name}):
            found = f"in {shard}, not in {listed_in or INDEX_NAME}"
            yield "tensor-without-index-entry", name, found, "an entry for every tensor"
    for name, count in Counter(checkpoint.read_as[name] for name, _ in held).items():
        if count > 1:
            yield "tensor-twice", name, f"{count} times", "once"


def config(checkpoint: Checkpoint, target: Target) -> Iterator[Finding]:
    """Find keys that vLLM does not read, and a head that is absent or not as config.json says."""
    if target.vllm and (keys := unread_keys(checkpoint.config, target.vllm.release)):
        yield finding("config-dialect", "config.json", keys, "all of DeepSeek's keys, no others")
    layers, ratios = checkpoint.num_layers, checkpoint.ratios
    key, said = "num_nextn_predict_layers", checkpoint.config.get("is_causal")
    where = "config.json: compress_ratios"
    if len(ratios) < layers:
        given = f"{checkpoint.config.get('compress_ratios')!r:.200}"
        found = f"{len(ratios)} entries" if ratios else given
        expected, cure = f"one for each of {layers} layers", "take config.json from the base"
        yield finding("compress-ratios", where, found, expected, "error", cure)
    elif checkpoint.has_head and set(ratios[layers:]) != {0}:
        found = f"{len(ratios)} entries, {ratios[-1]} the last"
        expected = f"{layers + 1} entries or more, those after the base's layers 0"
        yield finding("compress-ratios", where, found, expected)
    sliding = set(checkpoint.config.get("layer_types") or ()) == {"sliding_attention"}
    if num_stages(checkpoint.config) and (sliding if said is None else said):
        yield finding("dspark-causal", "config.json: is_causal", said, False)
    if not checkpoint.has_head:
        yield finding("head-absent", "mtp.*", "no tensor", "a base without its head serves")
    elif (number := checkpoint.config.get(key, "absent")) != 1:
        level: Severity = "warning" if number == "absent" else "error"
        yield finding("nextn-count", f"config.json: {key}", number, 1, level)


@merged
def names(checkpoint: Checkpoint, _target: Target) -> Iterator[Defect]:
    """Find tensors under another spelling of their name, and a drafter's of newer upstreams."""
    for old, new in checkpoint.misnamed.items():
        kind = "scale" if new == f"{old.rpartition('.')[0]}.weight_scale" else "tensor"
        yield f"{kind}-name", old, old, f"{new}, the others alike"
    for name in checkpoint.unsaid:
        yield "dspark-drafter", name, "in config.json no dspark_block_size", "what upstream's has"


@merged
def contents(checkpoint: Checkpoint, target: Target) -> Iterator[Defect]:
    """Compare the tensors with those that the config asks for, in the formats they are in."""
    asked, known = _asked(checkpoint)
    half = "float16" in (checkpoint.config.get(key) for key in ("torch_dtype", "dtype"))
    tensors = {n: t for n, t in checkpoint.tensors.items() if n not in checkpoint.unsaid}
    if target.platform != "cpu":
        known |= HEAD_COPIES
    if len(checkpoint.ratios) < checkpoint.num_layers:  # a finding of its own
        known |= {name for name in tensors if _COMPRESSION.search(name)}
    for name in sorted(asked.keys() - tensors.keys() - checkpoint.unseen):
        if not name.endswith("weight_shape"):  # of which vLLM makes nothing
            yield f"{_place(name)}-tensor-missing", name, "in no shard", "as config.json asks"
    for name in sorted(tensors.keys() - asked.keys() - known):
        yield f"{_place(name)}-tensor-unknown", name, "of no module", "none"
    for name in sorted(asked.keys() & tensors.keys()):
        tensor, like = tensors[name], asked[name]
        kind = "scale" if name.endswith("weight_scale") else "tensor"
        is_half = tensor.dtype == torch.float16 and like.is_floating_point()
        right = (like.dtype, *_ALSO_READ.get(like.dtype, ()))
        right += (torch.float8_e8m0fnu,) * (kind == "scale")  # a power of two is exact in all
        if is_half and not half:
            yield f"{kind}-float16", name, tensor.dtype, like.dtype
        elif not is_half and tensor.dtype not in right:
            yield "tensor-dtype", name, tensor.dtype, like.dtype
        elif tensor.shape != like.shape:
            yield f"{kind}-shape", name, list(tensor.shape), f"{list(like.shape)} by config.json"


def _asked(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], set[str]]:
    """Return meta tensors that the config asks for, and names that have findings of their own."""
    asked, known, unread = dict[str, Tensor](), set[str](), {*_never_quantized(checkpoint)}
    for name, shape in checkpoint.shapes.items():
        module = name.removesuffix(".weight")
        parts, stored = checkpoint.modules.get(module, {}), checkpoint.formats.get(module)
        kind = stored or ("int4" if EXPERT.match(module) else "plain")
        layer = module.rpartition(".experts.")[0]
        size = checkpoint.group_sizes.get(layer, checkpoint.group_size)
        asked |= stored_as(name, shape, kind, size)
        if module in unread or (stored is None and weight_of(parts) is not None):
            known |= {part_name(module, part) for part in parts}
    return asked, known


def _never_quantized(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield modules that are stored quantized and that vLLM builds without quantization."""
    asked = {name.removesuffix(".weight") for name in checkpoint.shapes}
    for module, stored in checkpoint.formats.items():
        is_plain = stored == "plain" and "weight_scale" not in checkpoint.modules[module]
        is_built = stored and module in asked and not QUANTIZED.match(module)
        if not is_plain and (is_built or NEVER_QUANTIZED.search(module)):
            yield module


def _place(name: str) -> str:
    return "head" if name.startswith("mtp.") else "base"


@merged
def precision(checkpoint: Checkpoint, _target: Target) -> Iterator[Defect]:
    """Find parameters that were rounded or quantized although they should not be."""
    for name, tensor in checkpoint.tensors.items():
        if FLOAT32.search(name) and tensor.dtype == torch.bfloat16:
            yield "float32-rounded", name, tensor.dtype, torch.float32
    for module in _never_quantized(checkpoint):
        stored, decoded = checkpoint.formats[module], NEVER_QUANTIZED.search(module)
        kind = "compressor-fp8" if stored == "fp8" and decoded else "never-quantized"
        yield kind, module, stored, "BF16"
