"""Gap, until vLLM 0.28: the fullest decode steps of a server may have no CUDA graph of their own.

vLLM captures whole decode steps for 1, 2, 4, 8, 16, 24 … tokens, rounded up to a request's tokens
a step, and no larger than all of a server's sequences together. With three sequences of two tokens
these are 2 and 4; a step of all three has 6, and attention runs outside of any graph. Read in
0.26.0 to 0.28.0 (`VllmConfig._set_cudagraph_sizes`, `CudagraphDispatcher`); from 0.29 vLLM adds
that size.
"""

from packaging.specifiers import SpecifierSet
from packaging.version import Version

VERSIONS = SpecifierSet("<0.29")
#: With more sequences the sizes that vLLM has are close enough to each other.
MOST_SEQUENCES = 16


def missing_sizes(sequences: int | None, draft_tokens: int, version: Version) -> list[int]:
    """Return sizes, in tokens, with which every decode step has a graph; none if vLLM's do.

    `sequences` is the most at once (`--max-num-seqs`; None is vLLM's own choice, which is many),
    `draft_tokens` what a step verifies for each of them besides its next token.
    """
    if sequences is None or sequences > MOST_SEQUENCES:
        return []
    tokens = 1 + draft_tokens
    fullest = sequences * tokens
    if not VERSIONS.contains(version, prereleases=True) or fullest in own_sizes(fullest, tokens):
        return []
    return [*range(tokens, fullest + 1, tokens), 2 * fullest]


def own_sizes(fullest: int, tokens: int) -> list[int]:
    """Return the sizes that vLLM captures by itself, for steps of at most `fullest` tokens."""
    most = min(2 * fullest, 512)
    strides = [1, 2, 4, *range(8, min(most + 1, 256), 8), *range(256, most + 1, 16)]
    rounded = {-(-size // tokens) * tokens for size in strides if size <= most}
    return sorted(size for size in rounded if size <= most)
