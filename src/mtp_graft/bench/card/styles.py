"""How the card writes values: named styles, so that `card.json` can say which one was used."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mtp_graft.bench.markdown import percents


@dataclass(frozen=True)
class Style:
    """How values are written; `how` says so in `card.json`."""

    how: str
    write: Callable[..., str]


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _spread(median: float, low: float, high: float) -> str:
    return f"{median:,.1f} ({low:,.1f} to {high:,.1f})"


def _rate_spread(median: float, low: float, high: float) -> str:
    return f"{_percent(median)} ({100 * low:.1f} to {100 * high:.1f} %)"


def _size(*sizes: int) -> str:
    whole = sum(sizes)
    return f"{whole / 1e9:,.2f} GB" if whole >= 1e7 else f"{whole:,} bytes"


def _scheme(found: Mapping[str, Any]) -> str:
    """Return a compressed-tensors scheme (`format`, `weights`) in words."""
    weights = found["weights"]
    if weights is None:
        return "BF16"
    bits, group = weights["num_bits"], weights.get("group_size")
    if weights["type"] == "int":
        symmetric = "symmetric" if weights["symmetric"] else "asymmetric"
        return f"INT{bits}, groups of {group}, {symmetric} (W{bits}A16)"
    if weights["strategy"] == "block":
        rows, columns = weights["block_structure"]
        return f"FP{bits} (E4M3), blocks of {rows}×{columns}"
    return f"MXFP{bits} (E2M1), one power of two for {group} inputs"


def _stored(how: str) -> str:
    """Return the format of tensors of which MTP_QUANT_MANIFEST.json says what became of them."""
    if how.startswith("as upstream"):
        return "BF16, F32"
    return "BF16" if "decoded to BF16" in how else "FP8 (E4M3), blocks of 128×128"


def _kinds(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items())) or "none"


STYLES: Mapping[str, Style] = {
    "text": Style("as it is", str),
    "count": Style("a whole number", lambda n: f"{n:,}"),
    "number": Style("one decimal", lambda x: f"{x:,.1f}"),
    "plain": Style("up to six digits", lambda x: f"{x:g}"),
    "percent": Style("100 a %, one decimal", _percent),
    "percents": Style("100 a for each, one decimal", percents),
    "two decimals": Style("two decimals", lambda x: f"{x:,.2f}"),
    "small percent": Style("100 a %, two decimals", lambda x: f"{100 * x:.2f} %"),
    "whole percentage": Style("100 a, no decimals", lambda x: f"{100 * x:.0f}"),
    "percentage": Style("100 a, one decimal", lambda x: f"{100 * x:.1f}"),
    "interval": Style("a to b, one decimal", lambda a, b: f"{a:,.1f} to {b:,.1f}"),
    "rate interval": Style("100 a to 100 b %", lambda a, b: f"{100 * a:.1f} to {100 * b:.1f} %"),
    "spread": Style("a (b to c), one decimal", _spread),
    "rate spread": Style("100 a % (100 b to 100 c %)", _rate_spread),
    "ratio": Style("a, two decimals", lambda x: f"{x:.2f}×"),
    "ratio interval": Style("a (b to c)", lambda x, a, b: f"{x:.2f}× ({a:.2f} to {b:.2f})"),
    "each, all": Style("a, b, one decimal", lambda a, b: f"{a:,.1f}, {b:,.1f}"),
    "quotient": Style("a / b, two decimals", lambda a, b: f"{a / b:.2f}×"),
    "part": Style("a of b", lambda a, b: f"{a:,} of {b:,}"),
    "length": Style("the number of items in a", lambda items: f"{len(items):,}"),
    "sum": Style("the sum of all", lambda *numbers: f"{sum(numbers):,}"),
    "size": Style("the sum, in GB (10^9) from 10 MB on", _size),
    "kinds": Style("number and name of each", _kinds),
    "scheme": Style("number format and groups of a compressed-tensors scheme", _scheme),
    "stored": Style("the number format that the text means", _stored),
}
