"""About how long the stages of a run take, by runs that somebody has timed."""

from collections.abc import Sequence
from dataclasses import dataclass

from mtp_graft.recipe import Recipe
from mtp_graft.stages.fetch import Source

_LARGE_BYTES = 10 * 10**9
_DOWNLOAD_BYTES_S, _HASH_BYTES_S = 100 * 10**6, 10**9


@dataclass(frozen=True)
class Estimate:
    """Seconds, or None where nothing is known to go by; and by what."""

    seconds: float | None
    by: str


@dataclass(frozen=True)
class Rates:
    """What one timed run took."""

    by: str
    start_s: float  # of a server
    capture_tok_s: float  # new tokens, recording included
    served_tok_s: float | None  # with drafts, several texts at a time
    decode_tok_s: float  # one stream
    quantize_s: float
    score_s: float | None
    splice_s: float  # and verify


_DEMO = Rates("a demo of 288 s on two CPU cores", 23, 330, 400, 120, 3.1, 8.8, 1.5)
#: 25 minutes for 256 prompts x 256 tokens, in an eager server; 52.8 tok/s is 85.5 by 1.62.
_SEED = Rates(
    "the Acti card, 2x RTX PRO 6000; starting a server as we saw it on a cold H100",
    *(244, 256 * 256 / 1500, None, 52.8, 180, None, 120),
)


def estimate_times(recipe: Recipe, sources: Sequence[Source]) -> dict[str, Estimate]:
    """Return an estimate for every stage that takes long: what a run of like size took, scaled."""
    large = sum(sources[0].sizes.values()) > _LARGE_BYTES
    rates = _SEED if large else _DEMO
    capture, bench = recipe.capture, recipe.bench
    to_download = sum(source.bytes_to_download for source in sources)
    texts = capture.calibration_count + capture.evaluation_count
    captured = texts * capture.new_tokens
    served = len(recipe.served_variants)
    decoded = bench.count * bench.max_tokens * (2 * bench.rounds + 1) / rates.decode_tok_s
    accepting = None
    if rates.served_tok_s is not None:
        each = min(bench.acceptance_count or capture.evaluation_count, capture.evaluation_count)
        accepting = served * (rates.start_s + each * capture.new_tokens / rates.served_tok_s)
    download_s = to_download / _DOWNLOAD_BYTES_S + to_download / _HASH_BYTES_S
    return {
        "fetch": Estimate(
            download_s, "100 MB a second to download, 1 GB a second to hash: guesses"
        ),
        "capture": Estimate(rates.start_s + captured / rates.capture_tok_s, rates.by),
        "quantize": Estimate(rates.quantize_s, rates.by),
        "score": Estimate(rates.score_s, rates.by if rates.score_s else "not known: never timed"),
        "splice": Estimate(rates.splice_s, f"{rates.by}; with verify"),
        "bench": Estimate(
            None if accepting is None else rates.start_s + decoded + accepting,
            rates.by if accepting is not None else "not known: acceptance was never timed",
        ),
    }
