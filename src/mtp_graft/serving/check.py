"""Whether a server's draft head is alive: one sentence repeated, and how much it foresaw."""

from typing import NamedTuple

from mtp_graft.errors import GraftError, in_words
from mtp_graft.serving.client import READ_ERRORS, ServerClient
from mtp_graft.serving.command import ServeOptions, find_vllm, num_speculative_tokens

_TEXT = "The quick brown fox jumps over the lazy dog. " * 30
_NEW_TOKENS = 128
#: Prompt and answer: 429 tokens with DeepSeek-V4's tokenizer, 549 with the tiny model's.
MIN_CONTEXT = 576
#: Text that repeats itself is foreseen almost wholly by a head that works and not at all by one
#: whose weights are wrong, so anything between serves as the border.
MIN_ACCEPTANCE = 0.2


class DrafterCheck(NamedTuple):
    """Drafted tokens of the check, and the share of them that the model accepted (0..1)."""

    num_draft_tokens: int
    acceptance: float


def require_drafts(options: ServeOptions) -> None:
    """Raise GraftError, before anything starts, if there is nothing to check or no room for it."""
    if num_speculative_tokens(options, find_vllm().platform) == 0:
        raise GraftError(
            f"{options.checkpoint}: --check without drafts; expected a checkpoint with a head and "
            "at least one speculative token"
        )
    if (length := options.max_model_len) is not None and length < MIN_CONTEXT:
        raise GraftError(
            f"{options.checkpoint}: --check with a context of {length} tokens; its sentence and "
            f"the answer take up to {MIN_CONTEXT}: --max-model-len {MIN_CONTEXT} or more"
        )


def check_drafter(client: ServerClient) -> DrafterCheck:
    """Let the server go on with a sentence repeated thirty times; return what its counters say.

    Other requests meanwhile would be counted too. Raises GraftError for a server that does not
    draft.
    """
    before = client.spec_decode_counters()
    prompt = client.tokenize(_TEXT)
    try:
        client.stream(prompt, _NEW_TOKENS)
    except READ_ERRORS as error:
        raise GraftError(
            f"{client.base_url}: not a completion's stream ({in_words(error)}); "
            "is a vLLM server at this address?"
        ) from error
    after = client.spec_decode_counters()
    gained = after - before if before and after else None
    if gained is None or gained.acceptance is None:
        raise GraftError(
            f"{client.base_url}: the server does not draft; expected a checkpoint with a head "
            "and at least one speculative token"
        )
    return DrafterCheck(gained.num_draft_tokens, gained.acceptance)
