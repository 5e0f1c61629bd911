"""How a checkpoint is served: a profile fitted to it and the hardware, drafts as `tune` found."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from mtp_graft.checkpoint.files import TUNED_NAME, read_as
from mtp_graft.checkpoint.makers import expect_format
from mtp_graft.checkpoint.shards import read_meta
from mtp_graft.errors import GraftError, UsageError
from mtp_graft.serving import command, profiles
from mtp_graft.serving.command import ServeOptions, read_config
from mtp_graft.serving.memory import Room, measure_room, num_positions
from mtp_graft.serving.topology import ATTENTION, Hardware, most_ranks, undivided

AUTO = "auto"


@dataclass(frozen=True)
class Plan:
    """Options with everything decided that the profile decides, and what was decided."""

    profile: str
    hardware: Hardware
    options: ServeOptions
    notes: tuple[str, ...]


def make_plan(
    options: ServeOptions,
    profile_name: str,
    hardware: Hardware,
    node_rank: int = 0,
    master_addr: str | None = None,
) -> Plan:
    """Return how to serve `options.checkpoint` with a profile; what `options` set stays.

    Of several machines, this one has `node_rank`, and the first `master_addr`. Raises UsageError
    for an unknown profile, and GraftError for a context that has no room (without one, `auto` takes
    the largest that has), for ranks or machines that do not fit hardware or model.
    """
    expect_format(options.checkpoint, "base")
    config = read_config(options.checkpoint)
    options = replace(options, tensor_parallel_size=_ranks(options, config, hardware))
    if hardware.capability[0] not in ATTENTION:
        expected = "expected 9, 10 or 12 for vLLM's attention; --profile none serves all the same"
        raise GraftError(f"{hardware}: compute capability {hardware.capability}, {expected}")
    step = options.max_num_batched_tokens or profiles.MAX_NUM_BATCHED_TOKENS
    room = measure_room(read_meta(options.checkpoint), config, hardware, options.num_ranks, step)
    name, fitted = _fit(profile_name, options, hardware, room)
    estimate = room.estimate(fitted.max_model_len or 0, fitted.gpu_memory_utilization)
    profile = profiles.PROFILES[name]
    notes = [f"profile {name}: {profile.why}", estimate]
    if options.max_model_len is None and fitted.max_model_len != profile.max_model_len:
        cut = f"the most that fits, where the profile has {profile.max_model_len}"
        notes.append(f"--max-model-len {fitted.max_model_len}: {cut}")
    fitted, adapted = adapt(fitted, hardware)
    flags = _node_flags(hardware, node_rank, master_addr)
    fitted = replace(fitted, extra_args=(*flags, *fitted.extra_args))
    return Plan(name, hardware, fitted, (*notes, *adapted))


def _ranks(options: ServeOptions, config: Mapping[str, Any], hardware: Hardware) -> int:
    """Return the ranks asked for, or the most that hardware and model allow."""
    wanted = options.tensor_parallel_size
    if wanted is None:
        return most_ranks(config, hardware.num_gpus)
    flag = f"--tensor-parallel-size {wanted}"
    if hardware.gpu is not None and wanted > hardware.num_gpus:
        raise GraftError(f"{flag} on {hardware}; expected at most {hardware.num_gpus}")
    if wanted > 1 and (uneven := undivided(config, wanted)):
        raise GraftError(f"{flag}: expected a divisor of {', '.join(uneven)} in config.json")
    return wanted


def _fit(
    wanted: str, options: ServeOptions, hardware: Hardware, room: Room
) -> tuple[str, ServeOptions]:
    """Return the profile's name (`auto`: which reaches furthest) and `options` with its values."""
    if wanted not in (names := (*profiles.PROFILES, AUTO)):
        raise UsageError(f"--profile {wanted}: unknown; expected one of {', '.join(names)} or none")
    candidates = list(profiles.PROFILES) if wanted == AUTO else [wanted]
    filled_by = {n: _filled(options, profiles.PROFILES[n], wanted, hardware) for n in candidates}
    most = {n: room.largest_context(by.gpu_memory_utilization) for n, by in filled_by.items()}
    name = max(candidates, key=lambda name: min(most[name], filled_by[name].max_model_len or 0))
    filled, largest = filled_by[name], most[name]
    length = filled.max_model_len or 0
    if largest < length and (wanted != AUTO or options.max_model_len or largest == 0):
        positions = num_positions(room.config)
        too_long = f"the model has {positions} positions" if length > positions else None
        cures = "a smaller model, or more or larger GPUs, or a larger --gpu-memory-utilization"
        if largest > 0:
            cures = f"--max-model-len {largest}, --profile {AUTO}, {cures}"
        why = too_long or room.estimate(length, filled.gpu_memory_utilization)
        found = f"a context of {length} tokens has no room on {hardware}: {why}"
        raise GraftError(f"{options.checkpoint}: {found}; take {cures}")
    return name, replace(filled, max_model_len=min(length, largest))


def _filled(
    options: ServeOptions, profile: profiles.Profile, wanted: str, hardware: Hardware
) -> ServeOptions:
    on_cpu = hardware.gpu is None
    share = min(profile.gpu_memory_utilization, hardware.most_utilization)
    num_seqs = profiles.MAX_NUM_SEQS if wanted == AUTO else profile.max_num_seqs
    step = None if on_cpu else profiles.MAX_NUM_BATCHED_TOKENS
    return replace(
        options,
        max_model_len=options.max_model_len or profile.max_model_len,
        max_num_seqs=options.max_num_seqs or num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens or step,
        # A CPU's cache is given in bytes.
        gpu_memory_utilization=None if on_cpu else options.gpu_memory_utilization or share,
        served_model_names=options.served_model_names or profiles.SERVED_MODEL_NAMES,
    )


def adapt(options: ServeOptions, hardware: Hardware) -> tuple[ServeOptions, list[str]]:
    """Return `options` with what suits the hardware, where nothing is said yet, and notes on it."""
    is_pcie = hardware.is_pcie_only and options.num_ranks > 1  # such ranks can hang
    flags, wanted = profiles.split(
        {**(profiles.ON_GPUS if hardware.gpu else {}), **(profiles.ON_PCIE if is_pcie else {})}
    )
    notes = ["Acti's settings for GPUs without NVLink between them (docs/serving.md)"] * is_pcie
    notes += [f"{n}: the environment has {os.environ[n]}" for n in wanted if n in os.environ]
    environment = {name: value for name, value in wanted.items() if name not in os.environ}
    share = hardware.most_utilization if hardware.unified_memory else None
    options = replace(
        options,
        gpu_memory_utilization=options.gpu_memory_utilization or share,
        environment={**environment, **options.environment},
        extra_args=(*flags, *options.extra_args),
    )
    return options, notes


def _node_flags(hardware: Hardware, node_rank: int, master_addr: str | None) -> tuple[str, ...]:
    if hardware.num_nodes == 1 and node_rank == 0 and master_addr is None:
        return ()
    if master_addr is None or node_rank >= hardware.num_nodes:
        flags = f"--node-rank {node_rank} --master-addr {master_addr}"
        expected = "a rank below their number, and the address of the first"
        raise GraftError(f"{flags} on {hardware}: expected several machines (--nnodes), {expected}")
    words = ("--nnodes", hardware.num_nodes, "--node-rank", node_rank, "--master-addr", master_addr)
    return (*map(str, words), *(("--headless",) if node_rank else ()))


class Tuned(BaseModel):
    """What `mtp-graft tune` measured beside a checkpoint: what `serve` reads of TUNED_NAME."""

    schedule: tuple[tuple[PositiveInt, PositiveInt, NonNegativeInt], ...] = Field(min_length=1)
    draft_lm_head_quantization: command.DraftLmHead | None
    draft_sample_method: command.DraftSampling | None
    device: str
    vllm: str
    serve: str  # a command that serves as it was measured, but for the drafts
    date: str


def with_tuned(options: ServeOptions, device: str, vllm: command.InstalledVllm) -> ServeOptions:
    """Return options that draft as given, tuned or by default; GraftError for a broken file."""
    path, on_gpu = options.checkpoint / TUNED_NAME, vllm.platform == "cuda"
    if options.num_speculative_tokens is not None:
        return options
    if not path.exists():
        k = command.num_speculative_tokens(options, vllm.platform)
        known = " (step times of Flash's size: docs/results.md)" if on_gpu and k == 3 else ""
        said = f"k = {k}: the default{known}; mtp-graft tune measures what pays here"
        return replace(options, why=(said,) if k else ())
    tuned = read_as(Tuned, path, "what mtp-graft tune writes", "remove it, or tune again")
    ks = ", ".join(f"{k} for {first} to {last} requests" for first, last, k in tuned.schedule)
    where = f"tuned on {tuned.device}, vLLM {tuned.vllm}, {tuned.date}, as `{tuned.serve}`"
    why: tuple[str, ...] = (f"k = {ks}: {where} ({TUNED_NAME}; or give --k)",)
    if (device, here := f"{vllm.version} ({vllm.platform})") != (tuned.device, tuned.vllm):
        why += (f"warning: tuned on another device or vLLM than {device}, vLLM {here}",)
    names = ("draft_lm_head_quantization", "draft_sample_method") if on_gpu else ()
    taken: dict[str, Any] = {name: getattr(options, name) or getattr(tuned, name) for name in names}
    k = max(k for *_, k in tuned.schedule)
    return replace(options, num_speculative_tokens=k, schedule=tuned.schedule, why=why, **taken)
