"""What each routed expert sees: the head replayed on every captured sequence, a file each."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mtp_graft.checkpoint.capture import CapturedSequence, Recorded, read_recorded
from mtp_graft.checkpoint.shards import read_tensors, save_shard
from mtp_graft.dsv4.experts import RoutedRows
from mtp_graft.dsv4.replay import build_head, replay_routing
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.stages.inputs import Progress, check_recorded, read_base_tensor
from mtp_graft.stages.overlap import read_ahead, write_behind
from mtp_graft.stages.quantize_job import Job, is_whole

#: Threads that read files ahead: one alone does not keep a fast disk busy.
READERS = 8
#: Rows of up to this size are kept on a GPU: 786,000 of Flash, beside which 24 GiB have room.
RESIDENT_BYTES = 6 * 2**30


def replay_capture(job: Job, report: Progress) -> None:
    """Write a file with the experts' inputs and choices for every sequence that has none yet."""
    pending = [s for s in job.sequences if not is_whole(job.replay_file(s))]
    total, done = len(job.sequences), len(job.sequences) - len(pending)
    report("replay", done, total)
    if not pending:
        return
    config = job.config
    with job.timed("io"):
        embed = read_base_tensor(job.base, "embed.weight", job.model).to(job.device)
        head = build_head(
            job.model,
            decode_head(job.other_tensors()),
            with_experts=False,
            with_attention=config.replay == "true",
            device=job.device,
            dtype=getattr(torch, config.dtype),
        )

    def read(sequence: CapturedSequence) -> Recorded:
        recorded = read_recorded(job.capture, sequence, job.model.hc_mult, job.device)
        check_recorded(job.capture, sequence, recorded, job.model)
        return recorded

    with write_behind() as write, read_ahead(read, job.ranks.share(pending), READERS) as capture:
        for sequence in job.ranks.share(pending):
            with job.timed("io"):
                recorded = next(capture)
            with job.timed("replay"), job.products():
                embeds = embed[recorded.token_ids.to(job.device)]
                routed = replay_routing(head, recorded.residual, embeds)
                # BF16 is the precision that the experts' inputs have in service.
                unit = {"x": routed.x.to(torch.bfloat16), "experts": routed.experts.int()}
            with job.timed("io"):
                write(save_from_device, unit, job.replay_file(sequence))
            done += 1
            report("replay", done, total)


def save_from_device(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Do `save_shard` with tensors of any device; for a thread that need not wait for another."""
    save_shard({name: tensor.cpu() for name, tensor in tensors.items()}, path)


def read_rows(job: Job) -> RoutedRows:
    """Return every sequence's rows: on the stage's device, or in host memory if they are many."""
    files = [job.replay_file(s) for s in job.sequences]
    num_rows = sum(s.tokens - 1 for s in job.sequences)
    fits = 2 * num_rows * job.model.hidden_size <= RESIDENT_BYTES
    device = job.device if fits else "cpu"

    def read(path: Path) -> tuple[Tensor, Tensor]:
        unit = read_tensors(path, ("x", "experts"))
        return unit["x"].to(device), unit["experts"].to(device)

    with read_ahead(read, files, READERS) as units:
        x, experts = zip(*units, strict=True)
    return RoutedRows(torch.cat(x), torch.cat(experts), job.model.n_routed_experts)
