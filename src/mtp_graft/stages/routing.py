"""What each routed expert sees: the head replayed on every captured sequence, a file each.

Shape legend: R rows of all sequences, D hidden size, K experts a row.
"""

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from mtp_graft.checkpoint.capture import CapturedSequence, Recorded, read_recorded
from mtp_graft.checkpoint.shards import read_tensors, save_shard
from mtp_graft.dsv4.experts import RoutedRows
from mtp_graft.dsv4.head import MTPHead
from mtp_graft.dsv4.replay import Routed, build_head, replay_routing
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.stages.inputs import Progress, check_recorded, read_base_tensor
from mtp_graft.stages.overlap import read_ahead, write_behind
from mtp_graft.stages.quantize_job import Job, is_whole

#: Sequences that are read ahead, and files that are read again, at once.
READERS = 8
#: Rows of up to this size are kept on a GPU: 786,000 of Flash, beside which 24 GiB have room.
RESIDENT_BYTES = 6 * 2**30


class ReplayedRows:
    """Every sequence's rows in one place, kept as they are computed.

    They are on the stage's device, or in host memory if they are many. What a killed run or
    another rank computed is read from its files when all are asked for.
    """

    def __init__(self, job: Job) -> None:
        ends = list(accumulate(s.calibration_tokens for s in job.sequences))
        places = map(slice, [0, *ends], ends)
        self._job = job
        self._places = dict(zip((s.number for s in job.sequences), places, strict=True))
        self._elsewhere = list(job.sequences)
        fits = 2 * ends[-1] * job.model.hidden_size <= RESIDENT_BYTES
        device = job.device if fits else "cpu"
        # BF16 is the precision that the experts' inputs have in service.
        self._x = torch.empty(ends[-1], job.model.hidden_size, dtype=torch.bfloat16, device=device)
        self._experts = torch.empty(
            ends[-1], job.model.num_experts_per_tok, dtype=torch.int32, device=device
        )

    def keep(self, sequence: CapturedSequence, routed: Routed) -> dict[str, Tensor]:
        """Keep a sequence's rows; return them as its file is to have them."""
        self._elsewhere.remove(sequence)
        return self._put(sequence, routed.x, routed.experts)

    def complete(self) -> RoutedRows:
        """Return all rows, those that were not kept from their files."""

        def read(sequence: CapturedSequence) -> None:
            unit = read_tensors(self._job.replay_file(sequence), ("x", "experts"))
            self._put(sequence, unit["x"], unit["experts"])

        with read_ahead(read, self._elsewhere, READERS) as units:
            for _ in units:
                pass
        self._elsewhere.clear()
        return RoutedRows(self._x, self._experts, self._job.model.n_routed_experts)

    def _put(self, sequence: CapturedSequence, x: Tensor, experts: Tensor) -> dict[str, Tensor]:
        place = self._places[sequence.number]
        self._x[place] = x
        self._experts[place] = experts
        return {"x": self._x[place], "experts": self._experts[place]}


def replay_capture(job: Job, report: Progress) -> ReplayedRows:
    """Write a file with the experts' inputs and choices for every sequence that has none yet."""
    rows = ReplayedRows(job)
    pending = [s for s in job.sequences if not is_whole(job.replay_file(s))]
    total, done = len(job.sequences), len(job.sequences) - len(pending)
    report("replay", done, total)
    if not pending:
        return rows

    def read(sequence: CapturedSequence) -> Recorded:
        recorded = read_recorded(job.capture, sequence, job.model.hc_mult, job.device)
        check_recorded(job.capture, sequence, recorded, job.model)
        return recorded

    with write_behind() as write, read_ahead(read, job.ranks.share(pending), READERS) as capture:
        with job.timed("io"):  # while the first sequences are being read
            embed, head = _embedding_and_head(job)
        for sequence in job.ranks.share(pending):
            with job.timed("io"):
                recorded = next(capture)
            with job.timed("replay"), job.products():
                known = sequence.calibration_tokens + 1  # row i reads token i + 1
                embeds = embed[recorded.token_ids[:known].to(job.device)]
                routed = replay_routing(head, recorded.residual[:known], embeds)
                unit = rows.keep(sequence, routed)
            with job.timed("io"):
                write(_save_rows, unit, job.replay_file(sequence))
            done += 1
            report("replay", done, total)
    return rows


def _embedding_and_head(job: Job) -> tuple[Tensor, MTPHead]:
    """Return the base's embedding [V, D] and the head without its experts, on the device."""
    embed = read_base_tensor(job.base, "embed.weight", job.model).to(job.device)
    head = build_head(
        job.model,
        decode_head(job.other_tensors()),
        with_experts=False,
        with_attention=job.config.replay == "true",
        device=job.device,
        dtype=getattr(torch, job.config.dtype),
    )
    return embed, head


def _save_rows(unit: Mapping[str, Tensor], path: Path) -> None:
    # A killed run finds what is written; a power cut costs replaying, never the result.
    save_shard(to_host(unit), path, sync=False)


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in host memory; for a thread that writes what a device computed."""

    def copied(tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        # Pinned memory is reused by torch, and a GPU writes to it by itself.
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)

    return {name: copied(tensor) for name, tensor in tensors.items()}
