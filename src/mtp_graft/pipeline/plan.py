"""What a run will need, before it begins: bytes to download, disk, memory, and about how long.

Sizes follow from the checkpoints' indexes and configs and are upper bounds. Times are estimates,
each with what it was estimated by.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants
from torch import Tensor

from mtp_graft.checkpoint.quantization_config import int4_group_size
from mtp_graft.dsv4.config import check_dimensions
from mtp_graft.dsv4.head_shapes import head_shapes
from mtp_graft.dsv4.variants import is_expert
from mtp_graft.errors import GraftError
from mtp_graft.pipeline.device import free_gpu_memory, torch_device
from mtp_graft.pipeline.folder import RunFolder
from mtp_graft.pipeline.times import estimate_times
from mtp_graft.pipeline.weights import base_tensors, head_tensors
from mtp_graft.recipe import Recipe
from mtp_graft.serving.memory import RESERVE_BYTES, UTILIZATION, kv_cache_bytes, weights_bytes
from mtp_graft.serving.topology import undivided
from mtp_graft.stages.capture import step_tokens
from mtp_graft.stages.fetch import Source, headers_of, nearest_folder
from mtp_graft.stages.splice_plan import plan_splice

#: Bits a weight of the routed experts; all else of the head takes two bytes at most.
_EXPERT_BITS = {"rtn": 4.125, "gptq": 4.125, "mxfp4": 4.25, "bf16": 16.0}
#: What is known of repositories on the hub without asking it.
_KNOWN_SIZES = {
    "pastapaul/DeepSeek-V4-Flash-W4A16-FP8": "4 shards, about 143 GiB (Acti card; the GB that it "
    "says are GiB by the tensors' shapes, docs/log.md)",
    "deepseek-ai/DeepSeek-V4-Flash": "the head is in one shard of 46; its routed experts, nearly "
    "all of it, take 3.2 GiB (docs/format.md)",
}


@dataclass(frozen=True)
class Need:
    """Bytes that one stage needs of a disk or a memory, at most."""

    stage: str
    of: Literal["disk", "memory", "GPU memory"]
    bytes: int  # of all GPUs together
    what_for: str
    folder: Path | None = None  # whose disk it is
    num_gpus: int = 0  # that share it evenly

    @property
    def where(self) -> str:
        """Return the folder, how many GPUs, or that it is this machine."""
        if self.num_gpus:
            return f"{self.num_gpus} GPU{'s' if self.num_gpus > 1 else ''}"
        return str(self.folder or "this machine")

    def as_json(self) -> dict[str, Any]:
        """Return what `--dry-run` says of it."""
        names = ("stage", "of", "where", "bytes", "what_for")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Head:
    """The head's parameters, counted from the model's config."""

    routed: int
    other: int

    def bytes_as(self, variant: str) -> int:
        """Return the size of the head's shard."""
        return math.ceil(self.routed * _EXPERT_BITS[variant] / 8) + 2 * self.other


def find_needs(
    recipe: Recipe, folder: RunFolder, stages: Sequence[str], sources: Sequence[Source]
) -> list[Need]:
    """Return what `stages` still need; raises GraftError for a config of another model."""
    base = sources[0]
    check_dimensions(base.config, f"{base.given}/config.json")
    head = _count_head(base)
    size, streams = base.config["hidden_size"], base.config["hc_mult"]
    wanted = recipe.capture
    length = wanted.max_prompt_tokens + wanted.new_tokens
    tokens = length * (wanted.calibration_count + wanted.evaluation_count)
    cache, run = Path(constants.HF_HUB_CACHE), folder.path
    chosen = base.config.get("num_experts_per_tok", 1)
    replayed = wanted.calibration_count * length * (2 * size + 4 * chosen)
    variants = recipe.served_variants
    spliced = sum(head.bytes_as(variant) for variant in variants)
    whole = sum(base.sizes.values())
    download = sum(source.bytes_to_download for source in sources)
    needs = [
        Need("fetch", "disk", download, "what is still to be downloaded", cache),
        Need("capture", "disk", 2 * tokens * size * streams, "residuals, BF16", run),
        Need("quantize", "disk", replayed + head.bytes_as("gptq"), "inputs, GPTQ's experts", run),
        Need("splice", "disk", spliced, f"{len(variants)} heads; the base is linked", run),
    ]
    if recipe.splice.copy or _is_copied(base, run):
        needs.append(Need("splice", "disk", len(variants) * whole, "copies of the base", run))
    in_float32 = 4 * (head.routed + head.other), "the head in float32"
    if torch_device(recipe.score.device) == "cpu":
        needs.append(Need("score", "memory", *in_float32))
    else:
        needs.append(Need("score", "GPU memory", *in_float32, num_gpus=1))
    needs += _serving_needs(recipe, base.config)
    left = (_still_needed(need, folder) for need in needs if need.stage in stages)
    return [need for need in left if need.bytes]


def _still_needed(need: Need, folder: RunFolder) -> Need:
    """Return a need less what an earlier, killed run has written; nothing for a finished stage."""
    stage = folder.stage(need.stage)
    if (stage / "manifest.json").exists():
        return replace(need, bytes=0)
    if need.folder != folder.path or not stage.exists():
        return need
    files = (path.stat() for path in stage.rglob("*") if path.is_file())
    written = sum(file.st_size for file in files if file.st_nlink == 1)  # links are the base's
    return replace(need, bytes=max(0, need.bytes - written))


def _count_head(base: Source) -> Head:
    shapes = head_shapes(base.config)
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    routed = sum(n for name, n in counts.items() if is_expert(name.removesuffix(".weight")))
    return Head(routed, sum(counts.values()) - routed)


def _is_copied(base: Source, folder: Path) -> bool:
    """Return whether base and run folder are on two disks, across which there are no links."""
    return base.folder.stat().st_dev != nearest_folder(folder).stat().st_dev


def _serving_needs(recipe: Recipe, config: Mapping[str, Any]) -> list[Need]:
    """Return the memory that base and largest head take when served, by doctor's estimate."""
    ranks, group = recipe.serve.tensor_parallel_size, recipe.quantize.group_size
    on_cpu = torch_device("auto") == "cpu"

    def weights(tensors: Mapping[str, Tensor]) -> int:
        return weights_bytes(tensors, ranks, decoded=on_cpu)

    linears = recipe.splice.linears
    base = weights(base_tensors(config, group))
    heads = [weights(head_tensors(config, v, linears, group)) for v in recipe.served_variants]
    by_stage = {"capture": base, "bench": base + max(heads)}
    if on_cpu:
        what_for = "the served model, decoded"
        return [Need(stage, "memory", ranks * size, what_for) for stage, size in by_stage.items()]
    besides = RESERVE_BYTES + _cache_bytes(recipe, config)
    return [
        Need(
            stage,
            "GPU memory",
            ranks * math.ceil((size + besides) / UTILIZATION),
            f"the served model and its cache in {UTILIZATION:.0%} of the memory",
            num_gpus=ranks,
        )
        for stage, size in by_stage.items()
    ]


def _cache_bytes(recipe: Recipe, config: Mapping[str, Any]) -> int:
    """Return the KV cache on each rank: what the recipe says, or one sequence of full length."""
    if recipe.serve.kv_cache_gib is not None:
        return int(recipe.serve.kv_cache_gib * 2**30)
    length = recipe.capture.max_model_len
    return kv_cache_bytes(config, length, tokens_in_flight=2 * step_tokens(length))


def check_models(recipe: Recipe, base: Source, upstream: Source) -> None:
    """Raise GraftError for models that do not fit each other, or the recipe; reads headers only."""
    check_dimensions(base.config, f"{base.given}/config.json")
    with headers_of(base) as base_folder, headers_of(upstream) as upstream_folder:
        plan_splice(base_folder, upstream_folder, "rtn", recipe.splice.linears)
    group, ranks = recipe.quantize.group_size, recipe.serve.tensor_parallel_size
    experts = int4_group_size(base.config["quantization_config"])
    if group != experts:
        raise GraftError(
            f"quantize.group_size is {group}, expected {experts} as in the experts of {base.given}"
        )
    if uneven := undivided(base.config, ranks):
        raise GraftError(
            f"serve.tensor_parallel_size is {ranks}, expected a number that divides the "
            f"{uneven} of {base.given}"
        )


def check_room(needs: Sequence[Need]) -> None:
    """Raise GraftError, before hours of work, for a disk or memory that will not do."""
    by_device: dict[int, list[Need]] = {}  # cache and run folder may share a disk
    for need in needs:
        if need.folder is not None:
            device = nearest_folder(need.folder).stat().st_dev
            by_device.setdefault(device, []).append(need)
        else:
            _check(need.bytes, _free(need), f"{need.of} of {need.where}", need.what_for)
    for on_disk in by_device.values():
        folders = list(dict.fromkeys(need.folder for need in on_disk if need.folder))
        free = shutil.disk_usage(nearest_folder(folders[0])).free
        what_for = ", ".join(f"{need.stage}: {need.bytes:,}" for need in on_disk)
        where = " and ".join(map(str, folders))
        _check(sum(need.bytes for need in on_disk), free, f"disk of {where}", what_for)


def _check(needed: int, free: int, what: str, what_for: str) -> None:
    if needed > free:
        raise GraftError(
            f"{what}: {free:,} bytes free, {needed:,} needed ({what_for}); make room, ask for "
            "less in the recipe, or use a larger machine"
        )


def _free(need: Need) -> int:
    """Return the bytes that are free of a memory."""
    if need.of == "memory":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
        raise GraftError("/proc/meminfo: has no MemAvailable; expected Linux")
    wanted, free = need.num_gpus, free_gpu_memory()
    if len(free) < wanted:
        raise GraftError(
            f"{need.stage}: {len(free)} GPUs found, {wanted} asked for by the recipe; set "
            "serve.tensor_parallel_size, or run where they are"
        )
    return wanted * min(free[:wanted])


def describe(
    recipe: Recipe,
    folder: RunFolder,
    stages: Sequence[str],
    survey: Callable[[], tuple[Source, Source]],
) -> dict[str, Any]:
    """Return the JSON of `--dry-run`: recipe, stages, sizes and times, doing nothing.

    Where the checkpoints cannot be looked at, `unknown` says why, sizes and times are null, and
    `known` has what can be said of them all the same.
    """
    plan: dict[str, Any] = {
        "run": str(folder.path),
        "stages": list(stages),
        "recipe": asdict(recipe),
        "sources": None,
        "needs": None,
        "seconds": None,
        "inputs": None,
        "room": None,
        "unknown": None,
        "known": [],
    }
    try:
        sources = survey()
        inputs = _refusal(lambda: check_models(recipe, *sources)) or "fit"
        needs = find_needs(recipe, folder, stages, sources)
    except GraftError as error:
        given = (recipe.model.base, recipe.model.upstream)
        known = [f"{name}: {_KNOWN_SIZES[name]}" for name in given if name in _KNOWN_SIZES]
        return {**plan, "unknown": str(error), "known": known}
    return {
        **plan,
        "sources": {
            name: {
                "source": source.given,
                "commit": source.commit,
                "files": dict(source.sizes),
                "bytes": sum(source.sizes.values()),
                "bytes_to_download": source.bytes_to_download,
            }
            for name, source in zip(("base", "upstream"), sources, strict=True)
        },
        "needs": [need.as_json() for need in needs],
        "seconds": {
            stage: asdict(estimate)
            for stage, estimate in estimate_times(recipe, sources).items()
            if stage in stages
        },
        "inputs": inputs,
        "room": _refusal(lambda: check_room(needs)) or "enough",
    }


def _refusal(check: Callable[[], None]) -> str | None:
    try:
        check()
    except GraftError as error:
        return str(error)
    return None
