"""Which requests the step that vLLM computes at the moment consists of."""

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from mtp_graft.errors import GraftError


def request_bounds() -> Tensor:
    """Return where the R requests of this step begin and end, [R + 1]; [0] if there are none.

    Request i has rows `bounds[i]` to `bounds[i + 1]`; rows after the last bound are padding.
    Raises GraftError if vLLM does not say so.
    """
    metadata = get_forward_context().attn_metadata
    if not metadata:
        return torch.zeros(1, dtype=torch.int32)
    if not isinstance(metadata, dict):
        raise GraftError(
            "requests of a step that is split into micro-batches cannot be told apart; turn DBO off"
        )
    for layer in metadata.values():
        bounds: Tensor | None = getattr(layer, "query_start_loc_cpu", None)
        if bounds is not None:
            return bounds
    kinds = sorted({type(layer).__name__ for layer in metadata.values()})
    raise GraftError(f"attention metadata {kinds}: none has query_start_loc_cpu; other vLLM?")
