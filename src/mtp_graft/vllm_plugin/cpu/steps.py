"""Which requests the step that vLLM computes at the moment consists of."""

from vllm.forward_context import get_forward_context

from mtp_graft.errors import GraftError


def request_bounds() -> list[int]:
    """Return where the R requests of this step begin and end, R + 1 rows; [0] if there are none.

    Request i has rows `bounds[i]` to `bounds[i + 1]`; rows after the last bound are padding.
    Raises GraftError if this vLLM does not say so.
    """
    layers = (get_forward_context().attn_metadata or {}).values()
    if not layers:
        return [0]
    for layer in layers:
        if (bounds := getattr(layer, "query_start_loc_cpu", None)) is not None:
            return list(bounds.tolist())
    kinds = sorted({type(layer).__name__ for layer in layers})
    raise GraftError(f"attention metadata {kinds}: none has query_start_loc_cpu; other vLLM?")
