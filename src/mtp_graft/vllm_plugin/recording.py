"""Record what the target computes on whole prompts, for the `capture` stage.

A server whose environment has MTP_GRAFT_RECORD=FOLDER writes, while the file FOLDER/recording-on
exists, one `FOLDER/recordings/NNNNNN.safetensors` per forward pass. It holds, for the R tokens of
its prompts, one prompt after the other:

    token_ids  int32 [R]
    residual   bfloat16 [R, S*D], the S streams before hc_head and the final norm
    targets    int32 [R], the target's argmax after each token
    starts     int32 [prompts], the first row of each prompt
    taps       bfloat16 [R, L*D], only with MTP_GRAFT_RECORD_TAPS=l,..: the mean over the S streams
               after each of the L layers, that is after the feed-forward's hc_post

Only prompts that one step computes whole are recorded: nothing else can be recomputed from the file
alone. Which rows of a step those are is for `cpu/recording.py` and `cuda.py` to know.

The switch may only be turned while the server is idle: all ranks look at it in every step, and
have to see the same, because the logits are put together from all of them.

A recording that cannot be written, as on a full disk, does not end the server: its log has the
reason, and FOLDER/recording-intact, which the client made and looks for, is removed.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger

from mtp_graft.checkpoint import capture
from mtp_graft.checkpoint.capture import RECORD_VARIABLE, TAPS_VARIABLE
from mtp_graft.checkpoint.shards import save_shard
from mtp_graft.errors import GraftError

logger = init_logger(f"vllm.{__name__}")  # under vLLM's logger, whose handlers it gets

#: Rows whose logits are computed at once: at 129,280 entries a token, a quarter of a GB in float32.
_LOGIT_ROWS = 512

Span = tuple[int, int]


def make_recorder(target: Any, vllm_config: VllmConfig) -> "Recorder | None":
    """Return a recorder of `target`, if the environment names a folder and this rank has logits.

    Raises GraftError under data parallelism, where every replica would write the same files.
    """
    folder = os.environ.get(RECORD_VARIABLE)
    if not folder or not get_pp_group().is_last_rank:
        return None
    if (replicas := vllm_config.parallel_config.data_parallel_size) > 1:
        found = f"{RECORD_VARIABLE} is set with data parallel size {replicas}, expected 1"
        raise GraftError(f"{found}; use tensor parallelism")
    model = target.model
    streams, width = model.hc_head_fn.shape

    def rows(width: int) -> Tensor:
        size = vllm_config.scheduler_config.max_num_batched_tokens, width
        dtype, device = vllm_config.model_config.dtype, model.hc_head_fn.device
        return torch.empty(size, dtype=dtype, device=device)

    if model._mtp_hidden_buffer is None:  # vLLM allocates it only if there is a drafter
        model._mtp_hidden_buffer = rows(width)
    states = {"residual": model._mtp_hidden_buffer}
    if layers := [int(layer) for layer in os.environ.get(TAPS_VARIABLE, "").split(",") if layer]:
        states["taps"] = rows(len(layers) * width // streams)
        _tap(target, layers, states["taps"])
    return Recorder(target, Path(folder), states, writes=get_tensor_model_parallel_rank() == 0)


def _tap(target: Any, layers: Sequence[int], taps: Tensor) -> None:
    """Have `target` write the means of its streams after `layers` into `taps` [rows, L*D].

    vLLM computes them for drafters, as auxiliary states; without a drafter its runners do not
    expect them. A hook runs while a CUDA graph is captured, so its copy is part of the graph.
    """
    first, end = target.model.start_layer, target.model.end_layer
    if not first <= layers[0] <= layers[-1] < end:
        expected = f"expected of {first} to {end - 1}, which this rank has; see [capture] taps"
        raise GraftError(f"{TAPS_VARIABLE}: layers {layers}, {expected}")
    target.set_aux_hidden_state_layers(tuple(layer + 1 for layer in layers))  # as vLLM counts

    def keep(_target: Any, _args: Any, output: tuple[Tensor, list[Tensor]]) -> Tensor:
        hidden, means = output
        torch.cat(means, dim=1, out=taps[: len(hidden)])
        return hidden

    target.register_forward_hook(keep)


class Recorder:
    """Records steps of one target; a thread writes one recording while the next is computed."""

    def __init__(self, target: Any, folder: Path, states: dict[str, Tensor], writes: bool) -> None:
        self._target = target
        self._folder = folder
        self._states = states  # buffers, which every step writes
        self._writes = writes  # other ranks only take part in the logits
        self._writer = ThreadPoolExecutor(1, "recording")
        self._written = self._writer.submit(lambda: None)

    @property
    def is_on(self) -> bool:
        """Return whether steps are to be recorded at the moment."""
        return (self._folder / capture.SWITCH_NAME).exists()

    def forget(self) -> None:
        """Make sure that a row of the buffers that the next step does not write is not finite."""
        for buffer in self._states.values():
            buffer.fill_(float("nan"))

    def record(self, token_ids: Tensor, hidden: Tensor, spans: Sequence[Span]) -> None:
        """Record the prompts in the rows `spans` of the step that was just computed.

        token_ids [T]; hidden [T, D], which the LM head reads. Other rows may be padding, say.
        """
        if not spans:
            return
        targets = [self._argmax(hidden[a:b]) for a, b in spans]
        if not self._writes:
            return
        rows = {  # copies, as the next step overwrites what these are cut from
            name: [state[a:b].to("cpu", copy=True) for a, b in spans]
            for name, state in {"token_ids": token_ids, **self._states}.items()
        }
        rows["targets"] = [each.cpu() for each in targets]
        self._written.result()  # at most two recordings in memory
        self._written = self._writer.submit(self._write, rows)

    def _argmax(self, hidden: Tensor) -> Tensor:
        logits = (self._target.compute_logits(rows) for rows in hidden.split(_LOGIT_ROWS))
        # Ranks that get no logits have only had to help.
        return torch.cat([hidden.new_zeros(0) if x is None else x.argmax(-1) for x in logits])

    def _write(self, rows: dict[str, list[Tensor]]) -> None:
        lengths = torch.tensor([len(prompt) for prompt in rows["token_ids"]])
        tensors = {name: torch.cat(parts) for name, parts in rows.items()}
        tensors["starts"] = lengths.cumsum(0) - lengths
        tensors |= {n: tensors[n].int() for n in ("token_ids", "targets", "starts")}
        recordings = self._folder / capture.RECORDINGS
        earlier = [int(path.stem) for path in recordings.glob("[0-9]*.safetensors")]
        try:
            save_shard(tensors, recordings / f"{max(earlier, default=0) + 1:06d}.safetensors")
        except (OSError, SafetensorError, GraftError):
            logger.exception("a recording could not be written to %s", recordings)
            (self._folder / capture.INTACT_NAME).unlink(missing_ok=True)
