"""Replay a capture: run the head without its experts, and keep what reaches each of them.

    capture/recordings -> residual stream, tokens -> head, up to the router -> replay/*.safetensors

Shapes: T tokens of a sequence, N of all sequences, S hyper-connection streams, D hidden size,
V vocabulary, K experts a token.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mtp_graft.checkpoint.capture import CapturedSequence
from mtp_graft.checkpoint.shards import Shard, save_shard
from mtp_graft.dsv4.head import MTPHead
from mtp_graft.dsv4.hessians import RoutedTokens
from mtp_graft.dsv4.names import EXPERTS_PREFIX
from mtp_graft.dsv4.replay import build_head, replay_routing
from mtp_graft.dsv4.variants import decode_head
from mtp_graft.errors import GraftError
from mtp_graft.stages.inputs import Inputs, Progress
from mtp_graft.stages.parallel import Clock, read_ahead, share, wait_for_ranks, write_behind

#: Sequences that are read ahead.
_AHEAD = 8
#: Tokens of up to this size stay on a GPU: 786,000 of Flash, beside which 24 GiB have room.
RESIDENT_BYTES = 6 * 2**30

#: Where a sequence's tokens are kept: x bf16 [T, D], experts int32 [T, K].
Kept = Mapping[CapturedSequence, tuple[Tensor, Tensor]]


def replay_capture(
    inputs: Inputs, folder: Path, replay: str, clock: Clock, report: Progress
) -> RoutedTokens:
    """Return what reaches the experts; write a file of it for every sequence that has none yet.

    `replay` is "true", or "identity" to leave out the head's attention. The tokens are on the
    clock's device, or in host memory if they are many. What a killed run or another rank has
    computed is read from its files.
    """
    model, sequences = inputs.model, inputs.sequences
    files = {s: folder / f"{s.number:06d}.safetensors" for s in sequences}
    pending = [s for s in sequences if not is_whole(files[s])]
    mine = share(pending)
    lengths = [s.calibration_tokens for s in sequences]
    fits = 2 * sum(lengths) * model.hidden_size <= RESIDENT_BYTES
    device = clock.device if fits else "cpu"
    # BF16 is the precision that the experts' inputs have in service.
    x = torch.empty(sum(lengths), model.hidden_size, dtype=torch.bfloat16, device=device)  # [N, D]
    shape = (sum(lengths), model.num_experts_per_tok)
    experts = torch.empty(shape, dtype=torch.int32, device=device)  # [N, K]
    parts = zip(x.split(lengths), experts.split(lengths), strict=True)  # views
    kept = dict(zip(sequences, parts, strict=True))

    done, total = len(sequences) - len(pending), len(sequences)
    report("replay", done, total)
    if mine:
        compute = partial(_compute, inputs, replay, clock)
        for number, _ in enumerate(compute(mine, kept, files), start=done + 1):
            report("replay", number, total)
    wait_for_ranks()  # every rank needs every sequence
    with clock.timed("io"):
        _read([s for s in sequences if s not in set(mine)], kept, files)
        return RoutedTokens(x, experts, model.n_routed_experts)


def _compute(
    inputs: Inputs,
    replay: str,
    clock: Clock,
    sequences: Sequence[CapturedSequence],
    kept: Kept,
    files: Mapping[CapturedSequence, Path],
) -> Iterator[CapturedSequence]:
    """Replay `sequences`, keep their tokens and write them; yield each that is done."""
    read = partial(inputs.read_sequence, device=clock.device)
    with write_behind() as write, read_ahead(read, sequences, _AHEAD) as captured:
        with clock.timed("io"):  # while the first sequences are being read
            embed, head = _load_head(inputs, replay, clock.device)
        for sequence in sequences:
            with clock.timed("io"):
                recorded = next(captured)
            x, experts = kept[sequence]
            with clock.timed("replay", tf32=True):
                known = sequence.calibration_tokens + 1  # at token i the head reads token i + 1
                embeds = embed[recorded.token_ids[:known].to(clock.device)]  # [T + 1, D]
                routed = replay_routing(head, recorded.residual[:known], embeds)
                x.copy_(routed.x)
                experts.copy_(routed.experts)
            with clock.timed("io"):
                write(_save, x, experts, files[sequence])
            yield sequence


def _load_head(inputs: Inputs, replay: str, device: str) -> tuple[Tensor, MTPHead]:
    """Return the base's embedding [V, D] and the head without its experts."""
    embed = inputs.read_base("embed.weight").to(device)
    others = [name for name in inputs.shards if not name.startswith(EXPERTS_PREFIX)]
    decoded = decode_head(inputs.read_upstream(others, device))
    head = build_head(
        inputs.model, decoded, with_experts=False, with_attention=replay == "true", device=device
    )
    return embed, head


def _save(x: Tensor, experts: Tensor, path: Path) -> None:
    # A killed run finds what is written; a power cut costs replaying, never the result.
    save_shard(to_host({"x": x, "experts": experts}), path, sync=False)


def _read(
    sequences: Sequence[CapturedSequence], kept: Kept, files: Mapping[CapturedSequence, Path]
) -> None:
    """Keep what the files of `sequences` hold."""

    def read(sequence: CapturedSequence) -> None:
        with Shard(files[sequence]) as file:
            found = file.read(("x", "experts"))
        for tensor, name in zip(kept[sequence], ("x", "experts"), strict=True):
            tensor.copy_(found[name])

    with read_ahead(read, sequences, _AHEAD) as units:
        for _ in units:
            pass


def is_whole(path: Path) -> bool:
    """Return whether a unit's file is there and readable; one that is not, is made again."""
    try:
        with Shard(path):
            return True
    except GraftError:
        return False


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in host memory; for a thread that writes what a device computed."""

    def copied(tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        # Pinned memory is reused by torch, and a GPU writes to it by itself.
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)

    return {name: copied(tensor) for name, tensor in tensors.items()}
