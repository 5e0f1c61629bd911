"""What a run needs before it begins: bytes to download, disk, memory, and about how long.

Sizes follow from the checkpoints' headers and configs and are upper bounds. Times are estimates.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
from huggingface_hub import constants
from torch import Tensor

from mtp_graft.checkpoint.manifest import expect_this_version
from mtp_graft.checkpoint.quantization_config import read_quantization
from mtp_graft.dsv4.config import check_dimensions, check_readable
from mtp_graft.dsv4.names import EXPERT
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.errors import GraftError
from mtp_graft.pipeline.folder import Run
from mtp_graft.recipe import Device, HealSection, Recipe, Variant
from mtp_graft.serving import command, memory, topology
from mtp_graft.stages import fetch
from mtp_graft.stages.calibration import HUB, load_calibration
from mtp_graft.stages.capture import read_prompts, step_tokens, wanted_prompts, with_taps
from mtp_graft.stages.fetch import HubError, Source, headers_of
from mtp_graft.stages.parallel import find_device, gpus
from mtp_graft.stages.splice import check_out, open_base, plan_splice

Tensors = Mapping[str, Tensor]  # on the meta device


@dataclass(frozen=True)
class Models:
    """Base and upstream as their headers have them."""

    base: Source
    upstream: Source
    tensors: Tensors  # the base's
    heads: Mapping[Variant, Tensors]  # as a checkpoint would have them


@dataclass(frozen=True)
class Need:
    """Bytes that one stage needs of a disk or a memory, at most."""

    stage: str
    of: Literal["disk", "memory", "GPU memory"]
    where: str  # a folder, this machine, or how many GPUs
    bytes: int  # of all GPUs together
    free: int | None  # None: not known
    what_for: str


def check_run(run: Run) -> None:
    """Raise GraftError for models that no stage can read, and for disk or memory too small."""
    check_room(find_needs(run, read_models(run.recipe, *find_run_sources(run))))


def find_run_sources(run: Run) -> tuple[Source, Source]:
    """Return what is needed of base and upstream; of fetched ones, without asking the hub."""
    model = run.recipe.model
    if (fetched := fetch.already_fetched(run.path / "fetch", model)) is not None:
        model = replace(model, base=str(fetched.base), upstream=str(fetched.upstream))
    return fetch.find_sources(model)


def read_models(recipe: Recipe, base: Source, upstream: Source) -> Models:
    """Return what the headers say; GraftError for models that do not fit each other or recipe."""
    file = f"{base.given}/config.json"
    check_dimensions(base.config, file)
    if vllm := command.installed_vllm():
        check_readable(base.config, file, vllm.version.release)
    with headers_of(base) as base_folder, headers_of(upstream) as upstream_folder:
        given, dtype = (open_base(base_folder), upstream_folder), recipe.splice.linear_dtype
        if missing := sorted({"embed.weight", "head.weight"} - given[0].index.keys()):
            found = f"has no {missing[0]}, which a run reads by that name"
            raise GraftError(f"{base.given}: {found}; `mtp-graft graft` needs none")
        kinds = dict.fromkeys(("mxfp4", "rtn", *recipe.served_variants))  # the least asked first
        heads: dict[Variant, Tensors] = {
            kind: plan_splice(*given, kind, dtype).layout for kind in kinds if kind != "gptq"
        }
    if command.DSPARK_TENSOR in heads["mxfp4"]:
        found = f"{upstream.given}: has a DSpark drafter"
        if recipe.heal is not None:
            raise GraftError(f"{found}, expected none: leave out [heal]")
        if vllm and vllm.platform == "cpu":
            cure = "run it there, or call the stages up to `verify` one by one"
            raise GraftError(f"{found}, which vLLM serves on GPUs only; {cure}")
    group, ranks = recipe.quantize.group_size, recipe.serve.tensor_parallel_size
    experts = read_quantization(base.config, file).group_size([given[0].num_layers], "int4")
    if group != experts:
        expected = f"expected {experts} as in the experts of {base.given}"
        raise GraftError(f"quantize.group_size is {group}, {expected}")
    if uneven := topology.undivided(base.config, ranks):
        expected = f"a number that divides {', '.join(uneven)} of {base.given}"
        raise GraftError(f"serve.tensor_parallel_size is {ranks}, expected {expected}")
    return Models(base, upstream, given[0].tensors, {**heads, "gptq": heads["rtn"]})


def check_prompts(run: Run, *, dry_run: bool = False) -> None:
    """Raise GraftError for too few prompts, or in both sets; a dry run leaves the hub's out."""
    capture, bench = run.recipe.capture, run.recipe.bench
    if "capture" in run.stages:
        read_prompts(capture, local=dry_run)
    if "bench" in run.stages and not (dry_run and bench.prompts.startswith(HUB)):
        taken = sum(n for source, n in wanted_prompts(capture).values() if source == bench.prompts)
        load_calibration(bench.prompts, taken + bench.count)


def find_needs(run: Run, models: Models) -> list[Need]:
    """Return what unfinished stages still need; GraftError for fewer GPUs than are asked for."""
    recipe, config = run.recipe, models.base.config
    capture = with_taps(recipe.capture, models.upstream.folder)
    sizes = {v: sum(t.nbytes for t in head.values()) for v, head in models.heads.items()}
    longest = capture.max_prompt_tokens + capture.new_tokens
    tokens = capture.most_tokens(longest)
    taps = capture.taps or ()
    residuals = 2 * tokens * config["hidden_size"] * (config["hc_mult"] + len(taps))
    if (layers := config["num_hidden_layers"]) <= max(taps, default=0):
        raise GraftError(f"capture.taps is {list(taps)}, expected layers below the base's {layers}")
    sources, spliced = (models.base, models.upstream), [sizes[v] for v in recipe.served_variants]
    download, splice = disk_needs(sources, run.path, spliced, copy=recipe.splice.copy)
    weights = {n: t.numel() for n, t in decode_head(models.heads["mxfp4"]).items()}
    dense = sum(number for name, number in weights.items() if not EXPERT.match(name))
    experts = sum(weights.values()) - dense
    needs = [
        download,
        _disk("capture", run.path, residuals, "residuals, BF16"),
        _disk("quantize", run.path, sizes["gptq"], "GPTQ's experts"),
        splice,
        _disk("heal", run.path, sizes["mxfp4"] + 40 * dense, "its state, and the head"),
        _healing_memory(recipe.heal or HealSection(), longest, config, dense, experts),
        _memory("score", recipe.score.device, 1, 4 * (dense + experts), "the head in float32"),
        *_serving_needs(recipe, models),
    ]
    open_stages = [s for s in run.stages if not (run.path / s / "manifest.json").exists()]
    needs = [_less_written(need, run.path) for need in needs if need.stage in open_stages]
    return [need for need in needs if need.bytes]


def disk_needs(
    sources: Sequence[Source], out: Path, heads: Sequence[int], *, copy: bool
) -> tuple[Need, Need]:
    """Return what is downloaded, and what checkpoints with heads of these sizes take at `out`."""
    check_out(out, *(source.folder for source in sources))
    base, written, what = sources[0], sum(heads), f"{len(heads)} heads; the base is linked"
    if copy or _device(base.folder) != _device(out):
        written += len(heads) * sum(base.sizes.values())
        what = f"{len(heads)} heads, and copies of the base"
    missing, cache = sum(s.bytes_to_download for s in sources), Path(constants.HF_HUB_CACHE)
    download = _disk("fetch", cache, missing, "what is still to be downloaded")
    return download, _disk("splice", out, written, what)


def _device(folder: Path) -> int:
    """Return the number of the disk on which a folder is, or will be."""
    return fetch.nearest_folder(folder).stat().st_dev


def _disk(stage: str, folder: Path, size: int, what_for: str) -> Need:
    free = shutil.disk_usage(fetch.nearest_folder(folder)).free
    return Need(stage, "disk", str(folder), size, free, what_for)


def _memory(
    stage: str, device: Device, ranks: int, size: int, what_for: str, share: float = 1.0
) -> Need:
    """Return the need of a machine's memory, or of `share` of the memory of `ranks` GPUs."""
    if find_device(device) == "cpu":
        free = psutil.virtual_memory().available
        return Need(stage, "memory", "this machine", size, free, what_for)
    found = gpus()
    if found is None or found.num_gpus < ranks:
        wanted = f"{ranks} asked for: set serve.tensor_parallel_size, or run where they are"
        raise GraftError(f"{stage}: {found.num_gpus if found else 0} GPUs found, {wanted}")
    share_bytes = int(share * found.memory_bytes) * ranks or None
    return Need(stage, "GPU memory", f"{ranks}x {found.gpu}", size, share_bytes, what_for)


def _healing_memory(heal: HealSection, longest: int, config: Any, dense: int, experts: int) -> Need:
    """Return the memory of training a head with so many dense weights, and of its experts."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    drafted = heal.k * max(heal.batch_tokens, longest) * config["hc_mult"] * hidden
    on_cpu = find_device(heal.device) == "cpu"
    # Bytes: a fifth more than in heal_full_h200; on a CPU all of tiny_heal_cpu's process.
    activations = drafted * (32 if heal.recompute else 96) * (5 if on_cpu else 1)
    step = (4 if on_cpu else 2) * (experts + 2 * vocab * hidden) + activations
    step += 4 * (5 * dense + 8 * 2048 * vocab)  # with AdamW's state; logits of 2,048 drafts
    return _memory("heal", heal.device, 1, step, "a step of batch_tokens; less with recompute")


def _serving_needs(recipe: Recipe, models: Models) -> list[Need]:
    """Return the memory that base and largest head take when served, by doctor's estimate."""
    ranks, on_cpu = recipe.serve.tensor_parallel_size, find_device("auto") == "cpu"
    base, *heads = (
        memory.weights_bytes(tensors, ranks, decoded=on_cpu)
        for tensors in (models.tensors, *(models.heads[v] for v in recipe.served_variants))
    )
    share, besides, what_for = 1.0, 0, "the served model, decoded"
    if not on_cpu:
        length, cache_gib = recipe.capture.max_model_len, recipe.serve.kv_cache_gib
        cache = memory.kv_cache_bytes(models.base.config, length, 2 * step_tokens(length))
        besides = memory.RESERVE_BYTES + (cache if cache_gib is None else int(cache_gib * 2**30))
        what_for = "the served model and its cache"
        if not any(arg.startswith("--gpu-memory-utilization") for arg in recipe.serve.extra_args):
            share = memory.UTILIZATION
    return [
        _memory(stage, "auto", ranks, ranks * (size + besides), what_for, share)
        for stage, size in (("capture", base), ("bench", base + max(heads)))
    ]


def _less_written(need: Need, folder: Path) -> Need:
    """Return a need of the run folder less what an earlier, killed run has written there."""
    if need.where != str(folder):
        return need
    files = (path.stat() for path in (folder / need.stage).rglob("*") if path.is_file())
    written = sum(file.st_size for file in files if file.st_nlink == 1)  # links are the base's
    return replace(need, bytes=max(0, need.bytes - written))


def check_room(needs: Sequence[Need]) -> None:
    """Raise GraftError, before hours of work, for a disk or memory that will not do."""
    places: dict[object, list[Need]] = {}  # a disk is shared; a stage has the memory for itself
    for need in needs:
        place = _device(Path(need.where)) if need.of == "disk" else need.stage
        places.setdefault((need.of, place), []).append(need)
    for sharing in places.values():
        needed, free = sum(need.bytes for need in sharing), sharing[0].free
        if free is not None and needed > free:
            where = " and ".join(dict.fromkeys(need.where for need in sharing))
            uses = ", ".join(f"{n.stage}: {n.bytes:,} for {n.what_for}" for n in sharing)
            found = f"{sharing[0].of} of {where}: {free:,} bytes free, {needed:,} needed ({uses})"
            raise GraftError(f"{found}; make room, ask for less, or use a larger machine")


#: Of runs: which, a server's start in seconds, tokens a second of many requests, of one, of heal.
_DEMO = ("a demo of 288 s on two CPU cores", 23, 330, 120, 890, {"quantize": 3.1, "score": 8.8})
#: Its 25 minutes were for 256 prompts x 256 tokens, its start that of a cold H100.
_ACTI = ("the Acti card, 2x RTX PRO 6000", 244, 256**2 / 1500, 52.8, 9075, {"quantize": 180})


def estimate_times(recipe: Recipe, sources: Sequence[Source]) -> dict[str, dict[str, Any]]:
    """Return `seconds` of every stage that was timed and takes long, and `by` which run."""
    is_large = sum(sources[0].sizes.values()) > 10 * 10**9
    by, start, tok_s, single_tok_s, heal_tok_s, stages = _ACTI if is_large else _DEMO
    capture, bench, heads = recipe.capture, recipe.bench, len(recipe.served_variants)
    heal = recipe.heal or HealSection()
    texts = min(bench.acceptance_count or capture.evaluation_count, capture.evaluation_count)
    captured = capture.most_tokens(capture.new_tokens)
    answered = heads * texts * capture.new_tokens
    decoded = bench.count * bench.max_tokens * (2 * bench.rounds + 1)
    seconds = {
        "capture": start + captured / tok_s,
        **stages,
        "heal": heal.steps * heal.batch_tokens * heal.k / 3 / heal_tok_s,
        "bench": (1 + heads) * start + answered / tok_s + decoded / single_tok_s,
    }
    download = {"seconds": sum(source.bytes_to_download for source in sources) / 10**8}
    times = {stage: {"seconds": s, "by": by} for stage, s in seconds.items()}
    times["heal"]["by"] = "random weights, one H200" if is_large else "tiny-heal.toml, two cores"
    return {"fetch": download | {"by": "100 MB a second: a guess"}} | times


def plan_run(recipe: Recipe, path: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Return the JSON of `--dry-run`: recipe, stages, sizes and times; what is not known is null.

    Where the hub cannot be asked, `unknown` says why; `inputs`, where checkpoints do not fit.
    """
    if path.exists() and not path.is_dir():
        raise GraftError(f"{path}: cannot be a run folder (it is a file); use another --run")
    expect_this_version(path)
    run = Run(recipe, path, stages)
    plan: dict[str, Any] = {"run": str(path), "stages": list(run.stages), "recipe": asdict(recipe)}
    plan |= dict.fromkeys(("sources", "needs", "seconds", "inputs", "room", "unknown"))
    problem = "inputs"  # what the next error is put down to
    try:
        sources = find_run_sources(run)
        times = estimate_times(recipe, sources)
        plan["sources"] = dict(zip(("base", "upstream"), map(as_json, sources), strict=True))
        plan["seconds"] = {stage: times[stage] for stage in run.stages if stage in times}
        needs = find_needs(run, read_models(recipe, *sources))
        check_prompts(run, dry_run=True)
        plan |= {"inputs": "fit", "needs": [asdict(need) for need in needs], "room": "enough"}
        problem = "room"
        check_room(needs)
    except GraftError as error:
        plan["unknown" if isinstance(error, HubError) else problem] = str(error)
    return plan


def as_json(source: Source) -> dict[str, Any]:
    """Return what a plan says of base or upstream."""
    return {
        "source": source.given,
        "commit": source.commit,
        "files": dict(source.sizes),
        "bytes": sum(source.sizes.values()),
        "bytes_to_download": source.bytes_to_download,
    }
