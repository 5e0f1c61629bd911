"""The tables and sentences that the speed benchmarks print."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from mtp_graft.bench.page import percents


def decode_table(results: dict[str, dict[str, Any]]) -> Table:
    """Return one row per server, each cell `median (min to max)`."""
    table = Table("", "decode tok/s", "TTFT ms", "ms per token", "acceptance")
    for name, result in results.items():
        keys = ("decode_tok_s", "ttft_ms", "tpot_ms")
        acceptance = result["acceptance"]
        accepted = None if acceptance is None else acceptance["median"]
        table.add_row(name, *(_spread_cell(result[key]) for key in keys), _percent(accepted))
    return table


def ratio_lines(result: dict[str, Any]) -> list[str]:
    """Return the ratio of the decode speeds with its interval, and what to know of it."""
    ratio = result["ratio"]["decode_tok_s"]
    low, high = ratio["interval"]
    if result["greedy_identical"] is None:
        text = "not compared, since texts are sampled"
    elif result["greedy_identical"]:
        text = "identical on every prompt"
    elif differing := len(result["divergences"]):
        text = f"differs on {differing} prompts"
    else:
        text = "the same once, but not in every round"
    lines = [
        f"decode speed: {ratio['estimate']:.3f} times the other's "
        f"({100 * ratio['confidence']:.0f} % interval {low:.3f} to {high:.3f}; "
        f"{ratio['pairs']} pairs, {ratio['prompts']} prompts)",
        f"a change by 2 % would take {ratio['pairs_for_2_percent']} pairs to be seen here",
        f"greedy text: {text}",
    ]
    if result["pairs"] % 2:
        lines.append(
            f"the base came first in {result['base_first']} of {result['pairs']} pairs: an odd "
            "number leaves some of a drift in the ratio"
        )
    return lines


def drafting_lines(result: dict[str, Any]) -> list[str]:
    """Return how many drafts were accepted at each position, if there were any."""
    if result["acceptance_length"] is None:
        return []
    ended = ", after the end of a text too" if result.get("config", {}).get("ignore_eos") else ""
    return [
        f"k = {result['k']}: accepted by position {percents(result['acceptance_by_position'])} "
        f"(each given the ones before{ended}), {result['acceptance_length']:.2f} tokens a step"
    ]


def sweep_table(points: Sequence[dict[str, Any]]) -> Table:
    """Return one row per point; each position's acceptance is given the ones before."""
    table = Table(
        "k", "streams", "tok/s a stream", "tok/s in all", "95 % interval", "TTFT ms",
        "accepted by position", "errors",
    )  # fmt: skip
    for point in points:
        low, high = point["aggregate_interval"]
        table.add_row(
            "-" if point["k"] is None else str(point["k"]),
            str(point["concurrency"]),
            _number(point["per_stream_tok_s"]),
            _number(point["aggregate_tok_s"]),
            f"{low:.1f} to {high:.1f}",
            _number(point["ttft_ms"]),
            percents(point["acceptance_by_position"]),
            str(point["errors"]),
        )
    return table


def sweep_lines(result: dict[str, Any]) -> list[str]:
    """Return the best k for every load, and where more streams brought fewer tokens a second."""
    lines = [
        f"streams {best['concurrency']}: k = {best['k']} is fastest, "
        f"{best['aggregate_tok_s']:.1f} tok/s"
        + ("" if best["clear"] else ", but intervals overlap: no clear winner")
        for best in result["best_k"]
    ]
    for dip in result["dips"]:
        k = "" if dip["k"] is None else f"k = {dip['k']}: "
        lines.append(
            f"{k}{dip['concurrency']} streams bring less than {dip['smaller']}: "
            f"{dip['aggregate_tok_s']:.1f} against {dip['smaller_aggregate_tok_s']:.1f} tok/s"
        )
    return lines


def workload_table(result: dict[str, Any]) -> Table:
    """Return one row per category, and one for all."""
    table = Table("", "requests", "tokens", "tok/s (mean)", "TTFT ms", "acceptance", "cut off")
    for name, found in [*result["categories"].items(), ("all", result)]:
        table.add_row(
            name,
            str(found["requests"]),
            str(found["completion_tokens"]),
            _number(found["decode_tok_s"]),
            _number(found["ttft_ms"]),
            _percent(found["acceptance"]),
            str(found["cut_off"]),
        )
    return table


def _spread_cell(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f} %"
