"""Which rows of a step are whose, and which are whole prompts: every step runs `forward`."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from mtp_graft.errors import GraftError
from mtp_graft.vllm_plugin.recording import Span, make_recorder


def request_bounds() -> list[int]:
    """Return where the R requests of this step begin and end, R + 1 rows; [0] if there are none."""
    layers = (get_forward_context().attn_metadata or {}).values()
    if not layers:
        return [0]
    for layer in layers:
        if (bounds := getattr(layer, "query_start_loc_cpu", None)) is not None:
            return list(bounds.tolist())
    kinds = sorted({type(layer).__name__ for layer in layers})
    raise GraftError(f"attention metadata {kinds}: none has query_start_loc_cpu; other vLLM?")


def record_on_demand(target: nn.Module, vllm_config: VllmConfig) -> None:
    """Have `target` record its prompts, if the environment names a folder for it."""
    if (recorder := make_recorder(target, vllm_config)) is None:
        return

    def before(*_: Any) -> None:
        if recorder.is_on:
            recorder.forget()

    def after(_target: nn.Module, _args: Any, kwargs: dict[str, Any], hidden: Tensor) -> None:
        if recorder.is_on:
            spans = whole_prompts(request_bounds(), kwargs["positions"])
            recorder.record(kwargs["input_ids"], hidden, spans)

    target.register_forward_pre_hook(before)
    target.register_forward_hook(after, with_kwargs=True)


def whole_prompts(bounds: Sequence[int], positions: Tensor) -> list[Span]:
    """Return the rows of the requests that begin at position 0; `positions` [T], of all rows."""
    spans = [(start, end) for start, end in pairwise(bounds) if start < end]
    first = positions[[start for start, _ in spans]].tolist()
    return [span for span, position in zip(spans, first, strict=True) if position == 0]
