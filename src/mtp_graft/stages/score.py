"""Score: how often the server would accept each variant's drafts, before anything is served.

The capture has what the base said; the replay has what a head drafts after every token. Walking
over them as the server does (two tokens forward on a hit, one on a miss) gives the acceptance.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from mtp_graft.checkpoint import capture as capture_files
from mtp_graft.checkpoint.capture import CapturedSequence, read_recorded, read_sequences
from mtp_graft.checkpoint.manifest import (
    claim_folder,
    fingerprints,
    finished_result,
    read_result,
    write_manifest,
)
from mtp_graft.checkpoint.shards import INDEX_NAME, load_tensors, open_shard, read_index, write_json
from mtp_graft.dsv4 import names
from mtp_graft.dsv4.acceptance import walk, wilson_interval
from mtp_graft.dsv4.head import MTPHead
from mtp_graft.dsv4.replay import build_head, replay_drafts
from mtp_graft.dsv4.variants import VARIANTS, Variant, decode_head, store_head
from mtp_graft.errors import GraftError
from mtp_graft.stages.inputs import (
    REPORT_NAME,
    Progress,
    check_recorded,
    cpu_threads,
    read_base_tensor,
    read_model_config,
)
from mtp_graft.stages.quantize import GPTQ


@dataclass(frozen=True)
class ScoreConfig:
    """What is scored, and on which part of the capture."""

    variants: tuple[Variant, ...] = VARIANTS
    split: str = "evaluation"
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    cpu_threads: int = 1  # for the reasons of QuantizeConfig's


@dataclass(frozen=True)
class _Job:
    """The stage's inputs, opened and checked."""

    capture: Path
    quantized: Path
    upstream: Path
    base: Path
    out: Path
    config: ScoreConfig
    model: DeepseekV4Config
    head_names: list[str]
    sequences: list[CapturedSequence]


def score(
    capture: Path,
    quantized: Path,
    upstream: Path,
    base: Path,
    out: Path,
    config: ScoreConfig,
    report: Progress,
) -> dict[str, Any]:
    """Write the acceptance of every variant to `out/report.json` and return it.

    A finished variant is not scored again. Raises GraftError for inputs that do not fit each
    other, a capture that leaves nothing to draft, and if `out` is of another configuration.
    """
    started = time.perf_counter()
    job = _open(capture, quantized, upstream, base, out, config)
    if (finished := finished_result(out, REPORT_NAME)) is not None:
        return finished
    with cpu_threads(config.cpu_threads):
        acceptance = {variant: _score_variant(job, variant, report) for variant in config.variants}
    result = {"acceptance": acceptance, "split": config.split, "replay": "true attention"}
    write_json(result, out / REPORT_NAME)
    inputs = [capture / capture_files.INDEX_NAME, upstream / INDEX_NAME, base / INDEX_NAME]
    seconds = time.perf_counter() - started
    write_manifest(out, "score", asdict(config), inputs, config.device, seconds)
    return result


def _open(
    capture: Path, quantized: Path, upstream: Path, base: Path, out: Path, config: ScoreConfig
) -> _Job:
    """Check what can be checked before anything is computed, and claim the stage's folder."""
    head_map = read_index(upstream, "mtp.")
    head_names = names.upstream_head_names(head_map, upstream)
    model = read_model_config(base)
    sequences = [s for s in read_sequences(capture) if s.split == config.split]
    if not any(s.tokens >= s.prompt_tokens + 2 for s in sequences):
        raise GraftError(
            f"{capture}: nothing to draft in split {config.split!r} ({len(sequences)} sequences); "
            "expected sequences with at least two tokens after the prompt"
        )
    inputs = [base / "config.json", capture / capture_files.INDEX_NAME]
    inputs += sorted({capture / capture_files.RECORDINGS / s.recording for s in sequences})
    inputs += sorted({upstream / head_map[name] for name in head_names})
    inputs += sorted({base / read_index(base)[name] for name in ("embed.weight", "head.weight")})
    if "gptq" in config.variants:
        inputs += _gptq_files(quantized)
    claim_folder(out, {**asdict(config), "inputs": fingerprints(inputs)})
    return _Job(capture, quantized, upstream, base, out, config, model, head_names, sequences)


def _gptq_files(quantized: Path) -> list[Path]:
    files = sorted((quantized / GPTQ).glob("experts-*.safetensors"))
    if not files:
        raise GraftError(
            f"{quantized / GPTQ}: no quantized experts; run `mtp-graft quantize` first, "
            "or leave gptq out of the variants"
        )
    return files


def _score_variant(job: _Job, variant: Variant, report: Progress) -> dict[str, Any]:
    """Return the acceptance of one variant, from its file if it has been scored before."""
    path = job.out / f"{variant}.json"
    if (scored := read_result(path)) is not None:
        return scored
    label, total = f"score {variant}", len(job.sequences)
    report(label, 0, total)
    head = _load_head(job, variant)
    like = head.h_proj.weight
    embed = read_base_tensor(job.base, "embed.weight", job.model)
    lm_head = read_base_tensor(job.base, "head.weight", job.model).to(like)
    sequences = []
    for done, sequence in enumerate(job.sequences, start=1):
        recorded = read_recorded(job.capture, sequence, job.model.hc_mult)
        check_recorded(job.capture, sequence, recorded, job.model)
        drafts = replay_drafts(
            head,
            lm_head,
            recorded.residual,
            embed[recorded.token_ids],
            first_row=sequence.prompt_tokens - 1,
        )
        result = walk(drafts.tolist(), recorded.token_ids[sequence.prompt_tokens :].tolist())
        sequences.append({"id": sequence.id, **asdict(result)})
        report(label, done, total)
    summary = _summary(sequences)
    write_json(summary, path)
    return summary


def _load_head(job: _Job, variant: Variant) -> MTPHead:
    upstream = load_tensors(job.upstream, job.head_names)
    experts: dict[str, Tensor] = {}
    if variant == "gptq":
        for path in _gptq_files(job.quantized):
            with open_shard(path) as file:
                experts.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    decoded = decode_head(store_head(upstream, variant, experts))
    dtype: torch.dtype = getattr(torch, job.config.dtype)
    return build_head(job.model, decoded, device=job.config.device, dtype=dtype)


def _summary(sequences: list[dict[str, Any]]) -> dict[str, Any]:
    drafts = sum(sequence["drafts"] for sequence in sequences)
    accepted = sum(sequence["accepted"] for sequence in sequences)
    return {
        "top1": accepted / drafts,
        "tokens": drafts,
        "accepted": accepted,
        "interval": list(wilson_interval(accepted, drafts)),
        "sequences": sequences,
    }
