"""Gap: from the second draft on, every request reads the first request's window.

`CommonAttentionMetadata` keeps which request a token belongs to once it was asked for. vLLM's
proposer changes the metadata in place from a request's several tokens to its one draft and asks
again: the kept answer says that the first tokens are the first request's. Text stays right, since
the target verifies; drafts after the first are wrong for all requests but one. Seen in 0.32, read
in 0.33 (vllm/v1/attention/backend.py, vllm/v1/spec_decode/llm_base_proposer.py, the V1 runner's).
"""

from functools import wraps
from typing import Any

#: What `CommonAttentionMetadata` keeps of its tokens' requests and positions.
KEPT = ("_token_to_req_indices_cache", "_num_computed_tokens_cache")


def apply() -> None:
    """Let the proposer forget what the metadata kept, before each further draft."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer as Proposer

    build = Proposer.build_per_group_and_layer_attn_metadata
    if hasattr(build, "forgets"):
        return

    @wraps(build)
    def build_anew(self: Any, common_attn_metadata: Any, draft_index: int = 0) -> Any:
        if draft_index > 0:
            forget(common_attn_metadata)
        return build(self, common_attn_metadata, draft_index)

    build_anew.forgets = KEPT  # type: ignore[attr-defined]
    Proposer.build_per_group_and_layer_attn_metadata = build_anew


def forget(metadata: Any) -> None:
    """Drop what was kept, so that it is computed from the metadata as it is now."""
    for name in KEPT:
        if getattr(metadata, name, None) is not None:
            setattr(metadata, name, None)
