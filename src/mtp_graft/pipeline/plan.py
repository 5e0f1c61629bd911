"""What a run will need, before it begins: bytes to download, disk, memory, and about how long.

Sizes follow from the checkpoints' indexes and configs and are upper bounds. Times are estimates,
each with what it was estimated by.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from mtp_graft.dsv4.head_shapes import head_shapes
from mtp_graft.dsv4.variants import is_expert
from mtp_graft.errors import GraftError
from mtp_graft.pipeline.device import torch_device
from mtp_graft.pipeline.folder import RunFolder
from mtp_graft.pipeline.times import estimate_times
from mtp_graft.recipe import Recipe
from mtp_graft.stages.fetch import Source, nearest_folder

#: Bits a weight of the routed experts; all else of the head takes two bytes at most.
_EXPERT_BITS = {"rtn": 4.125, "gptq": 4.125, "mxfp4": 4.25, "bf16": 16.0}
#: On a CPU the plugin decodes INT4 to BF16: four times the size.
_CPU_DECODED = 4
#: What vLLM may take of a GPU (its default), for weights and all else.
_GPU_SHARE = 0.9


@dataclass(frozen=True)
class Need:
    """Bytes that one stage needs of a disk or a memory, at most."""

    stage: str
    of: str  # "disk", "memory" or "GPU memory"
    where: str  # a folder, "this machine", or how many GPUs
    bytes: int
    what_for: str


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
    head = _count_head(base)
    size, streams = base.config["hidden_size"], base.config["hc_mult"]
    wanted = recipe.capture
    length = wanted.max_prompt_tokens + wanted.new_tokens
    tokens = length * (wanted.calibration_count + wanted.evaluation_count)
    cache, run = str(constants.HF_HUB_CACHE), str(folder.path)
    chosen = base.config.get("num_experts_per_tok", 1)
    replayed = wanted.calibration_count * length * (2 * size + 4 * chosen)
    variants = recipe.served_variants
    spliced = sum(head.bytes_as(variant) for variant in variants)
    whole = sum(base.sizes.values())
    download = sum(source.bytes_to_download for source in sources)
    needs = [
        Need("fetch", "disk", cache, download, "what is still to be downloaded"),
        Need("capture", "disk", run, 2 * tokens * size * streams, "residuals, BF16"),
        Need("quantize", "disk", run, replayed + head.bytes_as("gptq"), "inputs, GPTQ's experts"),
        Need("splice", "disk", run, spliced, f"{len(variants)} heads; the base is linked"),
    ]
    if recipe.splice.copy or _is_copied(base, folder.path):
        copies = len(variants) * whole
        needs.append(Need("splice", "disk", run, copies, "copies of the base"))
    device = torch_device(recipe.score.device)
    of, where = ("memory", "this machine") if device == "cpu" else ("GPU memory", "1 GPU")
    needs.append(Need("score", of, where, 4 * (head.routed + head.other), "the head in float32"))
    needs.append(_serving_need("capture", recipe, whole))
    needs.append(_serving_need("bench", recipe, whole + max(map(head.bytes_as, variants))))
    left = (_still_needed(need, folder) for need in needs if need.stage in stages)
    return [need for need in left if need.bytes]


def _still_needed(need: Need, folder: RunFolder) -> Need:
    """Return a need less what an earlier, killed run has written; nothing for a finished stage."""
    stage = folder.stage(need.stage)
    if (stage / "manifest.json").exists():
        return replace(need, bytes=0)
    if need.where != str(folder.path) or not stage.exists():
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
    there = base.folder or nearest_folder(Path(constants.HF_HUB_CACHE))
    return there.stat().st_dev != nearest_folder(folder).stat().st_dev


def _serving_need(stage: str, recipe: Recipe, weights: int) -> Need:
    ranks = recipe.serve.tensor_parallel_size
    if torch_device("auto") == "cpu":
        decoded = _CPU_DECODED * weights
        return Need(stage, "memory", "this machine", decoded, "the served model, decoded")
    where = f"{ranks} GPU{'s' if ranks > 1 else ''}"
    needed = math.ceil(weights / _GPU_SHARE)
    return Need(stage, "GPU memory", where, needed, "the served model; its cache comes on top")


def check_room(needs: Sequence[Need]) -> None:
    """Raise GraftError, before hours of work, for a disk or memory that will not do."""
    disks: dict[str, int] = {}
    for need in needs:
        if need.of == "disk":
            disks[need.where] = disks.get(need.where, 0) + need.bytes
        else:
            _check(need.bytes, _free(need), f"{need.of} of {need.where}", need.what_for)
    by_device: dict[int, list[str]] = {}
    for where in disks:
        device = nearest_folder(Path(where)).stat().st_dev
        by_device.setdefault(device, []).append(where)
    for folders in by_device.values():  # cache and run folder may share a disk
        free = shutil.disk_usage(nearest_folder(Path(folders[0]))).free
        what_for = ", ".join(f"{n.stage}: {n.bytes:,}" for n in needs if n.where in folders)
        _check(sum(disks[f] for f in folders), free, f"disk of {' and '.join(folders)}", what_for)


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
    wanted = int(need.where.split()[0])
    if torch.cuda.device_count() < wanted:
        raise GraftError(
            f"{need.stage}: {torch.cuda.device_count()} GPUs found, {wanted} asked for by the "
            "recipe; set serve.tensor_parallel_size, or run where they are"
        )
    return sum(int(torch.cuda.mem_get_info(device)[0]) for device in range(wanted))


def describe(
    recipe: Recipe,
    folder: RunFolder,
    stages: Sequence[str],
    survey: Callable[[], tuple[Source, Source]],
) -> dict[str, Any]:
    """Return the JSON of `--dry-run`: recipe, stages, sizes and times, doing nothing.

    Where the checkpoints cannot be looked at, `unknown` says why, and sizes and times are null.
    """
    plan: dict[str, Any] = {
        "run": str(folder.path),
        "stages": list(stages),
        "recipe": recipe.as_dict(),
        "sources": None,
        "needs": None,
        "seconds": None,
        "room": None,
        "unknown": None,
    }
    try:
        sources = survey()
        needs = find_needs(recipe, folder, stages, sources)
    except GraftError as error:
        return {**plan, "unknown": str(error)}
    try:
        check_room(needs)
        room = "enough"
    except GraftError as error:
        room = str(error)
    return {
        **plan,
        "sources": {
            name: {
                "source": source.given,
                "commit": source.repository and source.repository.commit,
                "files": dict(source.sizes),
                "bytes": sum(source.sizes.values()),
                "bytes_to_download": source.bytes_to_download,
            }
            for name, source in zip(("base", "upstream"), sources, strict=True)
        },
        "needs": [asdict(need) for need in needs],
        "seconds": {
            stage: asdict(estimate)
            for stage, estimate in estimate_times(recipe, sources).items()
            if stage in stages
        },
        "room": room,
    }
